"""The status image: a text that can be read where nothing but images is shown."""

from __future__ import annotations

import ismrmrd
import numpy as np
import pytest
from numpy.typing import NDArray

from whorl import __version__
from whorl.maps.images import ascii_text
from whorl.maps.status import status_image
from whorl.scan.header import Space
from whorl.scan.readout import HEAD_DTYPE

TEXT = "the readouts carry no trajectory: expected kx, ky for each sample, attached to the data"


def pixels(text: str, space: Space | None = None) -> NDArray[np.uint16]:
    image = status_image(text, space)
    assert image.data.shape[:2] == (1, 1)
    values: NDArray[np.uint16] = image.data[0, 0]
    assert values.dtype == np.uint16
    assert values.max() == 4000
    return values


def rows_with_text(values: NDArray[np.uint16]) -> int:
    """Lines of text, as runs of rows that are not black."""
    lit = values.any(axis=1).astype(int)
    return int((np.diff(lit, prepend=0) == 1).sum())


@pytest.mark.parametrize(
    ("matrix", "shape", "fov_mm"),
    [
        ((320, 300, 1), (300, 320), (310.0, 290.0, 5.0)),
        ((256, 256, 1), (256, 256), (310.0, 290.0, 5.0)),
        ((64, 64, 1), (256, 256), (310.0, 290.0, 5.0)),
        ((512, 128, 1), (256, 256), (310.0, 290.0, 5.0)),
        ((2048, 2048, 1), (2048, 2048), (310.0, 290.0, 5.0)),
        (None, (256, 256), (256.0, 256.0, 5.0)),
    ],
    ids=str,
)
def test_size_and_field_of_view(
    matrix: tuple[int, int, int] | None, shape: tuple[int, int], fov_mm: tuple[float, float, float]
) -> None:
    image = status_image(TEXT, matrix and Space(matrix, fov_mm))
    assert image.data.shape == (1, 1, *shape)
    assert tuple(image.field_of_view) == fov_mm
    assert image.image_type == ismrmrd.IMTYPE_MAGNITUDE
    assert (image.image_series_index, image.image_index) == (99, 1)


def test_what_it_says_of_itself() -> None:
    meta = status_image(f"  {TEXT}\n", None).meta
    for name in ("ImageComments", "ImageComment", "GADGETRON_ImageComment"):
        assert meta[name] == TEXT
    assert (meta["DataRole"], meta["GADGETRON_DataRole"]) == ("Image", "STATUS")
    assert (meta["SeriesDescription"], meta["whorl_status"]) == ("whorl_status", "failed")
    assert meta["whorl_version"] == __version__
    assert meta["Keep_image_geometry"] == "1"
    for name in ("WindowCenter", "WindowWidth"):
        assert int(meta[name]) > 0


def test_it_lies_where_the_scan_was() -> None:
    plain = status_image(TEXT, None)
    assert [tuple(v) for v in (plain.read_dir, plain.phase_dir, plain.slice_dir, plain.position)] == [
        (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0),
    ]  # fmt: skip
    head = np.zeros((), dtype=HEAD_DTYPE)
    head["position"], head["read_dir"] = (1.5, -2.5, 5), (0, 1, 0)
    head["phase_dir"], head["slice_dir"] = (0, 0, 1), (1, 0, 0)
    head["measurement_uid"] = 77
    image = status_image(TEXT, None, head[()])
    assert [tuple(v) for v in (image.read_dir, image.phase_dir, image.slice_dir, image.position)] == [
        (0, 1, 0), (0, 0, 1), (1, 0, 0), (1.5, -2.5, 5),
    ]  # fmt: skip
    assert image.measurement_uid == 77
    assert [float(v) for v in image.meta["ImageRowDir"]] == [0, 1, 0]


def test_the_picture_shows_the_text() -> None:
    one, other, none = pixels(TEXT), pixels(TEXT.replace("kx", "xk")), pixels("")
    title = rows_with_text(none)
    assert title == 1
    assert rows_with_text(one) > title
    # The title is the same, the letters differ where the text does.
    assert np.array_equal(one[:34], none[:34])
    assert 0 < (one != other).mean() < 0.05
    assert (one > 2000).mean() > (none > 2000).mean()


@pytest.mark.parametrize("matrix", [(256, 256, 1), (600, 256, 1), (256, 600, 1)], ids=str)
@pytest.mark.parametrize("text", [TEXT * 40, "x" * 3000, "W " * 1500], ids=["words", "one word", "wide"])
def test_a_long_text_stays_inside_and_is_cut(text: str, matrix: tuple[int, int, int]) -> None:
    values = pixels(text, Space(matrix, (300, 300, 5)))
    for edge in (values[:5], values[-5:], values[:, :5], values[:, -5:]):
        assert not edge.any()
    assert rows_with_text(values) >= 8
    assert status_image(text, None).meta["ImageComments"] == text.strip()
    # What comes after the cut is not drawn, and the dots say so.
    assert np.array_equal(values, pixels(text + "never seen", Space(matrix, (300, 300, 5))))


def test_a_text_that_just_fits_is_not_cut() -> None:
    words = "abcd " * 60
    assert not np.array_equal(pixels(words + "one"), pixels(words + "two"))


@pytest.mark.parametrize(
    "text", ["Größe ±1 — 信号なし 🧲", "\x00\x1b[0m\ttab", "é" * 900], ids=["letters", "control", "long"]
)
def test_letters_beyond_ascii(text: str) -> None:
    image = status_image(text, None)
    said = image.meta["ImageComments"]
    assert said == ascii_text(text)
    assert said.isascii()
    assert np.array_equal(image.data, status_image(said, None).data)
    # As a receiver reads it.
    assert ismrmrd.Meta.deserialize(image.attribute_string)["ImageComments"] == said
