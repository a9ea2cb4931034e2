"""Places of images, complete and incomplete."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scan_edit import Scan
from whorl.maps.geometry import Geometry, orientation
from whorl.scan.readout import HEAD_DTYPE

X, Y, Z = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
NONE, NAN = (0.0, 0.0, 0.0), (float("nan"), 0.0, 0.0)


def head(read: Any, phase: Any, normal: Any, position: Any = (1, 2, 3)) -> np.void:
    heads = np.zeros(1, HEAD_DTYPE)
    heads["read_dir"], heads["phase_dir"], heads["slice_dir"], heads["position"] = (
        read,
        phase,
        normal,
        position,
    )
    return heads[0]


@pytest.mark.parametrize("matrix", [(6, 4), (7, 5)])
def test_the_position_is_the_pixel_of_the_origin(matrix: tuple[int, int]) -> None:
    place = Geometry((10, 20, 30), Y, Z, X, (60, 30, 5), matrix)
    index = np.array([matrix[0] // 2, matrix[1] // 2, 0, 1])
    np.testing.assert_allclose(place.affine @ index, (10, 20, 30, 1), atol=1e-12)
    # One column to the right: a pixel along y of the patient; one row down: a pixel along z.
    step = place.affine @ (index + np.array([1, 0, 0, 0])) - place.affine @ index
    np.testing.assert_allclose(step, (0, 60 / matrix[0], 0, 0), atol=1e-12)
    step = place.affine @ (index + np.array([0, 1, 0, 0])) - place.affine @ index
    np.testing.assert_allclose(step, (0, 0, 30 / matrix[1], 0), atol=1e-12)
    np.testing.assert_allclose(place.first_pixel, (place.affine @ [0, 0, 0, 1])[:3])


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ((X, Y, Z), (X, Y, Z)),
        ((X, Y, NONE), (X, Y, Z)),
        ((X, Y, NAN), (X, Y, Z)),
        ((Y, X, Z), (Y, X, Z)),  # left-handed, as it is told
        ((Y, X, NONE), (Y, X, (0, 0, -1))),
        ((X, Y, (0, 0, -1)), (X, Y, (0, 0, -1))),
        # What is told of the third direction cannot be true.
        ((X, Y, X), (X, Y, Z)),
    ],
)
def test_what_follows_is_not_remarked(told: Any, expected: Any) -> None:
    directions, position, assumed = orientation(head(*told))
    np.testing.assert_allclose(directions, expected, atol=1e-7)
    assert position == (1, 2, 3)
    assert assumed == ""


@pytest.mark.parametrize(
    ("told", "expected", "said"),
    [
        ((NONE, Y, Z), (X, Y, Z), "one of the directions is missing"),
        ((X, NONE, Z), (X, Y, Z), "one of the directions is missing"),
        ((NONE, NONE, NONE), (X, Y, Z), "labelled axial"),
        ((NONE, NONE, Z), (X, Y, Z), "labelled axial"),
        ((X, X, Z), (X, Y, Z), "labelled axial"),
        ((NAN, NAN, NAN), (X, Y, Z), "labelled axial"),
    ],
)
def test_what_is_assumed_is_said(told: Any, expected: Any, said: str) -> None:
    directions, _, assumed = orientation(head(*told))
    np.testing.assert_allclose(directions, expected, atol=1e-7)
    assert said in assumed


def test_rounded_directions_become_orthonormal() -> None:
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    told = np.round(turn, 3)
    directions, _, assumed = orientation(head(*told))
    assert assumed == ""
    np.testing.assert_allclose(np.array(directions) @ np.array(directions).T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(directions, turn, atol=2e-3)


def test_a_position_that_is_no_number() -> None:
    _, position, assumed = orientation(head(X, Y, Z, NAN))
    assert position == (0, 0, 0)
    assert "isocentre" in assumed


def test_a_scan_without_orientation_is_delivered_and_marked(scan: Scan) -> None:
    for name in ("read_dir", "phase_dir", "slice_dir"):
        scan.heads[name] = 0
    result = scan.run()
    image = result.of("T1")
    assert (list(image.read_dir), list(image.phase_dir), list(image.slice_dir)) == (list(X), list(Y), list(Z))
    assert image.meta["whorl_status"] == "degraded"
    assert "labelled axial" in image.meta["whorl_notes"]
    assert result.outcome.exit_code == 3
