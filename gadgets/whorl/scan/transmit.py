"""A measured map of the transmit field B1+.

Letters: Z slices, Y X pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from whorl.scan.array_file import read_arrays
from whorl.scan.failure import ScanError

#: A relative field is near 1; percent, degrees and DICOM units are not.
_PLAUSIBLE = (0.2, 3.0)


@dataclass(frozen=True, slots=True, eq=False)
class TransmitField:
    """Relative transmit field on the field of view of the scan.

    Parameters
    ----------
    values
        `(Z, Y, X)` float32, dimensionless, 1: flip angles as planned; 0 where nothing was measured. Y and X
        are those of the map itself.
    source
        The file.
    """

    values: NDArray[np.float32]
    source: str

    def span(self) -> tuple[float, float]:
        """Smallest and largest value that was measured."""
        known = self.values[self.values > 0]
        return float(known.min()), float(known.max())

    def on_slice(
        self, number: int, shape: tuple[int, int]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]] | None:
        """Field of one slice on a raster, and where it was measured, both of `shape`.

        The map covers the same field of view; it is interpolated linearly. Beyond what was measured the
        nearest value counts, because the field is smooth.

        Returns
        -------
        tuple or None
            ``None`` if the map has no such slice, or nothing was measured there. One slice stands for all.
        """
        Z = len(self.values)
        if not (Z == 1 or number < Z):
            return None
        image = self.values[0 if Z == 1 else number]
        known = image > 0
        if not known.any():
            return None
        nearest = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
        filled = image[tuple(nearest)]
        # Pixel centres of the raster in pixels of the map; both cover the same field of view.
        rows, columns = (
            (np.arange(n) + 0.5) * size / n - 0.5 for n, size in zip(shape, image.shape, strict=True)
        )
        places = np.meshgrid(rows, columns, indexing="ij")
        field = ndimage.map_coordinates(filled, places, order=1, mode="nearest").astype(np.float32)
        measured = ndimage.map_coordinates(known.astype(np.float32), places, order=1, mode="nearest") >= 0.5
        return field, measured


def read_b1_map(path: str) -> TransmitField:
    """Read the map of property ``b1_map``.

    `.npy`, or `.npz` or HDF5 with an array `b1`: `(Z, Y, X)` or `(Y, X)`. 0 and NaN mean that
    nothing was measured.

    Raises
    ------
    ScanError
        If the file cannot be read or does not hold a relative transmit field.
    """
    found, there = read_arrays(path, "the B1 map", ["b1"])
    if "b1" not in found:
        raise ScanError(f"the B1 map {path}: expected an array b1, got {', '.join(there) or 'none'}")
    loaded = found["b1"]
    if loaded.ndim == 2:
        loaded = loaded[None]
    if loaded.ndim != 3 or not loaded.size or loaded.dtype.kind not in "fiu":
        raise ScanError(
            f"the B1 map {path} has shape {loaded.shape} of {loaded.dtype}: "
            f"expected real numbers (slices, y, x) or (y, x)"
        )
    values = np.nan_to_num(loaded.astype(np.float32), nan=0.0, posinf=-1.0, neginf=-1.0)
    if (values < 0).any():
        raise ScanError(f"the B1 map {path} has negative or infinite values: expected 0 or more")
    if not values.any():
        raise ScanError(
            f"the B1 map {path} is 0 throughout: expected values near 1 where something was measured"
        )
    middle = float(np.median(values[values > 0]))
    if not _PLAUSIBLE[0] <= middle <= _PLAUSIBLE[1]:
        raise ScanError(
            f"the B1 map {path} has a median of {middle:g}: expected the relative field, near 1 "
            f"(percent divided by 100, an angle by its nominal angle)"
        )
    return TransmitField(values, path)
