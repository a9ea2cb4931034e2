"""Maps of the transmit field: what is read, where it lands, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from whorl.scan.failure import ScanError
from whorl.scan.transmit import TransmitField, read_b1_map


def ramp(shape: tuple[int, int]) -> np.ndarray:
    """A field that is linear over the field of view, in pixels of any raster."""
    rows, columns = ((np.arange(n) + 0.5) / n for n in shape)
    return (0.8 + 0.3 * rows[:, None] + 0.1 * columns).astype(np.float32)


@pytest.mark.parametrize("shape", [(12, 18), (40, 33), (7, 9)], ids=["same", "finer", "coarser"])
def test_a_map_of_another_matrix_covers_the_same_field_of_view(shape: tuple[int, int]) -> None:
    found = TransmitField(ramp((12, 18))[None], "test").on_slice(5, shape)
    assert found is not None
    field, measured = found
    assert field.shape == measured.shape == shape
    assert field.dtype == np.float32
    assert measured.all()
    # Linear interpolation of a linear field is exact, up to half a pixel of the map at the edges.
    edge = [-(-n // m) for n, m in zip(shape, (12, 18), strict=True)]
    inside = tuple(slice(n, -n) for n in edge)
    np.testing.assert_allclose(field[inside], ramp(shape)[inside], rtol=1e-6)
    np.testing.assert_allclose(field, ramp(shape), atol=0.02)


def test_beyond_what_was_measured_the_nearest_value_counts() -> None:
    values = np.zeros((1, 6, 8), dtype=np.float32)
    values[0, 2:4, 2] = 0.9
    values[0, 2:4, 6] = 1.2
    found = TransmitField(values, "test").on_slice(0, (6, 8))
    assert found is not None
    field, measured = found
    np.testing.assert_array_equal(field[:, :4], np.float32(0.9))
    np.testing.assert_array_equal(field[:, 5:], np.float32(1.2))
    np.testing.assert_array_equal(measured, values[0] > 0)


def test_each_slice_has_its_own_unless_there_is_one_for_all() -> None:
    values = np.stack([np.full((4, 4), v, dtype=np.float32) for v in (0.9, 0.0, 1.1)])
    field = TransmitField(values, "test")
    found = field.on_slice(2, (4, 4))
    assert found is not None
    np.testing.assert_array_equal(found[0], np.float32(1.1))
    assert field.on_slice(1, (4, 4)) is None
    assert field.on_slice(3, (4, 4)) is None
    assert field.span() == pytest.approx((0.9, 1.1))


@pytest.mark.parametrize("kind", ["npy", "npz", "npz with one array"])
def test_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"b1.{kind[:3]}"
    values = ramp((5, 6)).astype(np.float64)
    values[0, 0] = np.nan
    if kind == "npy":
        np.save(path, values)
    elif kind == "npz":
        np.savez(path, other=np.ones(3), b1=values)
    else:
        np.savez(path, field=values)
    read = read_b1_map(str(path))
    assert read.values.shape == (1, 5, 6)
    assert read.values[0, 0, 0] == 0
    np.testing.assert_allclose(read.values[0, 1:], values[1:], rtol=1e-6)


BAD = {
    "percent": (100 * ramp((5, 6)), "median of .*: expected the relative field"),
    "zero": (np.zeros((5, 6)), "0 throughout"),
    "negative": (-ramp((5, 6)), "negative"),
    "infinite": (np.full((5, 6), np.inf), "infinite"),
    "complex": (ramp((5, 6)) + 0j, "expected real numbers"),
    "one axis": (np.ones(5), r"shape \(5,\)"),
    "nothing": (np.ones((0, 4)), "expected real numbers"),
    "objects": (np.array([[{}]]), "cannot be read"),
}


@pytest.mark.parametrize("bad", BAD)
def test_maps_that_cannot_be_used(tmp_path: Path, bad: str) -> None:
    values, says = BAD[bad]
    path = tmp_path / "b1.npy"
    np.save(path, values)
    with pytest.raises(ScanError, match=says):
        read_b1_map(str(path))


def test_files_that_are_no_maps(tmp_path: Path) -> None:
    path = tmp_path / "b1.npz"
    with pytest.raises(ScanError, match="cannot be read"):
        read_b1_map(str(path))
    path.write_bytes(b"no archive")
    with pytest.raises(ScanError, match="cannot be read"):
        read_b1_map(str(path))
    np.savez(path, one=np.ones((2, 2)), two=np.ones((2, 2)))
    with pytest.raises(ScanError, match="expected an array b1, got one, two"):
        read_b1_map(str(path))
