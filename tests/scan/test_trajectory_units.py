"""Units of an attached trajectory, its third column, and the two spaces of the header."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from scan_edit import Result, Scan, assert_close

#: With these fields of view the six units are well apart for 64 pixels; see the ambiguous case below.
FOV_MM = 220.0
PER_PIXEL = {
    "cycles/pixel": 1.0,
    "±1": 2.0,
    "rad/pixel": 2 * np.pi,
    "cycles/FOV": 64.0,
    "1/m": 64 / (FOV_MM * 1e-3),
    "1/cm": 64 / (FOV_MM * 1e-1),
}


def zoomed(scan: Scan) -> Scan:
    """The scan as if its field of view had been `FOV_MM`: in pixels nothing changes."""
    for which in ("encodedSpace", "reconSpace"):
        scan.space(which, (64, 64), (FOV_MM, FOV_MM))
    return scan


def failure(result: Result) -> str:
    assert result.outcome.exit_code == 1
    assert not result.images
    (text,) = result.outcome.failures
    return text


@pytest.mark.parametrize("unit", PER_PIXEL)
def test_each_unit_is_found(scan: Scan, untouched: Result, unit: str) -> None:
    result = zoomed(scan).trajectory(lambda k: k * PER_PIXEL[unit]).run()
    assert f"trajectory in {unit}," in result.said
    assert result.outcome.exit_code == 0
    assert_close(result, untouched, share=0.999)


def test_two_units_that_fit_are_listed_and_one_can_be_told(scan: Scan, untouched: Result) -> None:
    # At 300 mm and 64 pixels the edge lies at 1.07/cm: k/kmax could be either.
    scan.trajectory(lambda k: k * 2)
    text = failure(scan.copy().run())
    assert "several units fit (±1, 1/cm)" in text
    assert "Set property trajectory_units" in text
    told = scan.copy().run(trajectory_units="±1")
    assert "trajectory in ±1," in told.said
    assert_close(told, untouched, share=0.999)


def test_no_unit_fits(scan: Scan) -> None:
    text = failure(zoomed(scan).trajectory(lambda k: k * 0.7).run())
    assert "no unit fits" in text
    assert all(unit in text for unit in PER_PIXEL)


def test_the_property_overrides_what_would_fit(scan: Scan) -> None:
    result = scan.run(trajectory_units="rad/pixel")
    assert "trajectory in rad/pixel" in result.said


def test_units_refer_to_the_encoded_matrix(scan: Scan, untouched: Result) -> None:
    # Twice the field of view in x, as for readout oversampling: the pixel stays, k·FOV doubles.
    scan.space("encodedSpace", (128, 64), (2 * FOV_MM, FOV_MM)).space(
        "reconSpace", (64, 64), (FOV_MM, FOV_MM)
    )
    result = scan.trajectory(lambda k: k * np.array([128, 64])).run()
    assert "trajectory in cycles/FOV" in result.said
    assert_close(result, untouched, share=0.999)


# --- Third column -----------------------------------------------------------------------------------


def ring_weights(k: np.ndarray) -> np.ndarray:
    """The area of the rings, which is what the pipeline computes for such a spiral."""
    radius = np.hypot(k[:, 0], k[:, 1])
    return np.gradient(radius**2).clip(0)[:, None]


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e-6], ids="{:g}".format)
def test_a_third_column_is_a_density_of_any_scale(scan: Scan, untouched: Result, scale: float) -> None:
    result = scan.trajectory(lambda k: np.hstack([k, scale * ring_weights(k)])).run()
    assert "density attached" in result.said
    assert_close(result, untouched, share=0.95)
    # One scale of M0 whatever the weights' scale, near that of the computed density.
    inside = (result.physical("M0") > 0) & (untouched.physical("M0") > 0)
    ratio = np.median(result.physical("M0")[inside] / untouched.physical("M0")[inside])
    assert ratio == pytest.approx(1, abs=0.1)


def test_attached_weights_are_used_unless_told_otherwise(scan: Scan, untouched: Result) -> None:
    # Only the middle of k-space: a blurred image, so the column has had its effect.
    scan.trajectory(lambda k: np.hstack([k, ring_weights(k) * (np.hypot(*k.T) < 0.1)[:, None]]))
    blurred = scan.copy().run()
    inside = (untouched.physical("T1") > 0) & (blurred.physical("T1") > 0)
    assert np.mean(np.abs(blurred.physical("T1")[inside] / untouched.physical("T1")[inside] - 1)) > 0.1
    computed = scan.copy().run(density="computed")
    assert "density computed" in computed.said
    np.testing.assert_array_equal(computed.of("T1").data, untouched.of("T1").data)


def test_a_third_column_of_zeros_is_no_density(scan: Scan, untouched: Result) -> None:
    result = scan.trajectory(lambda k: np.hstack([k, 0 * k[:, :1]])).run()
    assert "density computed" in result.said
    np.testing.assert_array_equal(result.of("T1").data, untouched.of("T1").data)


#: Third columns that are no weights, and what is said of them.
NO_WEIGHTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "kz of both signs": (lambda k: k[:, :1], "expected positive numbers"),
    "not a number": (lambda k: np.full((len(k), 1), np.nan), "are not all finite"),
    "one is not a number": (lambda k: np.where(np.arange(len(k)) == 9, np.nan, 1)[:, None], "not all finite"),
    "infinite": (lambda k: np.full((len(k), 1), np.inf), "are not all finite"),
    "radius": (lambda k: np.hypot(*k.T)[:, None], "do not suit it"),
    "kz in steps": (lambda k: np.round(0.05 + 0.1 * k[:, :1], 2), "do not suit it"),
    "number of the sample": (lambda k: np.arange(len(k))[:, None], "do not suit it"),
}


@pytest.mark.parametrize("case", NO_WEIGHTS)
def test_a_column_that_cannot_be_weights_is_not_used(scan: Scan, untouched: Result, case: str) -> None:
    column, why = NO_WEIGHTS[case]
    result = scan.trajectory(lambda k: np.hstack([k, column(k)])).run()
    assert "density computed" in result.said
    for role in ("T1", "T2", "M0", "QUALITY"):
        np.testing.assert_array_equal(result.of(role).data, untouched.of(role).data)
    (note,) = result.outcome.notes
    assert why in note
    assert "set density=computed. Computed weights were used" in note
    assert result.of("T1").meta["whorl_status"] == "degraded"
    told = scan.run(density="computed")
    assert told.outcome.exit_code == 0
    np.testing.assert_array_equal(told.of("T2").data, untouched.of("T2").data)


def test_a_third_column_that_is_constant_but_for_rounding_is_no_density(
    scan: Scan, untouched: Result
) -> None:
    rng = np.random.default_rng(0)
    result = scan.trajectory(
        lambda k: np.hstack([k, 0.01 * (1 + 1e-6 * rng.standard_normal((len(k), 1)))])
    ).run()
    assert result.outcome.exit_code == 0
    assert "24 interleaves" in result.said
    np.testing.assert_array_equal(result.of("T2").data, untouched.of("T2").data)


@pytest.mark.parametrize("columns", [1, 4])
def test_other_numbers_of_columns(scan: Scan, columns: int) -> None:
    result = scan.trajectory(lambda k: np.hstack([k, k])[:, :columns]).run()
    assert f"the trajectory has {columns} columns" in failure(result)


# --- Spaces of the header ---------------------------------------------------------------------------


def centre_crop(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixel n // 2 stays pixel n // 2."""
    at = [old // 2 - new // 2 for old, new in zip(values.shape, shape, strict=True)]
    return values[at[0] : at[0] + shape[0], at[1] : at[1] + shape[1]]


@pytest.mark.parametrize("matrix", [(64, 48), (47, 64), (40, 33)], ids="{0[0]}x{0[1]}".format)
def test_a_smaller_field_of_view_at_the_same_pixel_size(
    scan: Scan, untouched: Result, matrix: tuple[int, int]
) -> None:
    pixel = 300 / 64
    result = scan.space("reconSpace", matrix, (matrix[0] * pixel, matrix[1] * pixel)).run()
    shape = matrix[::-1]
    ours, theirs = result.physical("T1"), centre_crop(untouched.physical("T1"), shape)
    assert ours.shape == shape
    # Coil maps see less of the object, so a few pixels differ at its edges.
    both = (ours > 0) & (theirs > 0)
    assert both.sum() > 0.9 * (theirs > 0).sum()
    assert np.mean(np.abs(ours[both] - theirs[both]) <= 0.06 * theirs[both]) > 0.9


@pytest.mark.parametrize("matrix", [(64, 48), (48, 64)], ids="{0[0]}x{0[1]}".format)
def test_an_encoded_matrix_that_is_not_square(scan: Scan, untouched: Result, matrix: tuple[int, int]) -> None:
    pixel = FOV_MM / 64
    fov = (matrix[0] * pixel, matrix[1] * pixel)
    scan.space("encodedSpace", matrix, fov).space("reconSpace", matrix, fov)
    result = scan.trajectory(lambda k: k * np.array(matrix)).run()
    assert "trajectory in cycles/FOV" in result.said
    ours, theirs = result.physical("T1"), centre_crop(untouched.physical("T1"), matrix[::-1])
    both = (ours > 0) & (theirs > 0)
    assert both.sum() > 0.9 * (theirs > 0).sum()
    assert np.mean(np.abs(ours[both] - theirs[both]) <= 0.06 * theirs[both]) > 0.9


@pytest.mark.parametrize("n", [32, 45, 96])
def test_another_matrix_over_the_same_field_of_view(scan: Scan, untouched: Result, n: int) -> None:
    result = scan.space("reconSpace", (n, n), (300, 300)).run()
    ours, theirs = result.physical("T1") > 0, untouched.physical("T1") > 0
    assert ours.shape == (n, n)

    def place_mm(mask: np.ndarray) -> tuple[np.ndarray, float]:
        pixel = 300 / len(mask)
        return (np.argwhere(mask).mean(0) - len(mask) // 2) * pixel, mask.sum() * pixel**2

    centre, area = place_mm(ours)
    expected, expected_area = place_mm(theirs)
    # A third of the coarsest pixel; the mask is smoothed by pixels, so its rim grows with them: one
    # of 9 mm around a disc of 210 mm is 18 % of its area.
    np.testing.assert_allclose(centre, expected, atol=3)
    assert area == pytest.approx(expected_area, rel=0.2)
    big = untouched.physical("T1")
    assert np.median(result.physical("T1")[ours]) == pytest.approx(np.median(big[theirs]), rel=0.1)
    assert list(result.of("T1").field_of_view) == [300, 300, 5]
