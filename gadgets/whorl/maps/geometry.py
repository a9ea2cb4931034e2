"""Where an image lies in the patient.

All places are in the patient system of MRD and DICOM, LPS: to the left, to the back, to the head, in mm
from the isocentre. Pixel (column i, row j) of an image of n_x × n_y lies at
``position + (i - n_x // 2) Δx read_dir + (j - n_y // 2) Δy phase_dir``: `position` is the centre of the pixel
that the origin of the Fourier transform falls on. Gadgetron's DICOM writer places images of even size alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Deviation from unit length and right angles that rounding to single precision and text cannot explain.
_SKEW = 1e-2
_DIRECTIONS = ("read_dir", "phase_dir", "slice_dir")

Vector = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Place of one image.

    Parameters
    ----------
    position
        Centre of pixel (n_x // 2, n_y // 2), LPS in mm.
    read_dir, phase_dir, slice_dir
        Unit vectors along columns (index i, MRD's x), along rows (j, y) and to the next slice, LPS. The
        third may point to either side of the plane.
    fov_mm
        Along the three; the last is the thickness of the slice.
    matrix
        (n_x, n_y).
    """

    position: Vector
    read_dir: Vector
    phase_dir: Vector
    slice_dir: Vector
    fov_mm: Vector
    matrix: tuple[int, int]

    @property
    def pixel_mm(self) -> tuple[float, float]:
        """Distances (Δx, Δy) of neighbours in a row, and of neighbours in a column."""
        return self.fov_mm[0] / self.matrix[0], self.fov_mm[1] / self.matrix[1]

    @property
    def affine(self) -> NDArray[np.float64]:
        """`(4, 4)`: index (i, j, slice from this one on, 1) to LPS in mm, slices one thickness apart."""
        affine = np.eye(4)
        steps = (*self.pixel_mm, self.fov_mm[2])
        for axis, (name, step) in enumerate(zip(_DIRECTIONS, steps, strict=True)):
            affine[:3, axis] = np.array(getattr(self, name)) * step
        middle = np.array([self.matrix[0] // 2, self.matrix[1] // 2, 0.0])
        affine[:3, 3] = np.array(self.position) - affine[:3, :3] @ middle
        return affine

    @property
    def first_pixel(self) -> Vector:
        """Centre of pixel (0, 0), LPS in mm: DICOM's Image Position (Patient)."""
        x, y, z = self.affine[:3, 3].tolist()
        return x, y, z

    @property
    def along_mm(self) -> float:
        """Place of the plane along `slice_dir`."""
        return float(np.dot(self.position, self.slice_dir))

    def is_parallel(self, other: Geometry) -> bool:
        """Whether two images could be slices of one stack: directions, pixels and matrix are the same."""
        return (
            self.matrix == other.matrix
            and np.allclose(self.fov_mm[:2], other.fov_mm[:2], rtol=1e-4)
            and all(np.allclose(getattr(self, n), getattr(other, n), atol=1e-3) for n in _DIRECTIONS)
        )


def orientation(head: Any) -> tuple[tuple[Vector, Vector, Vector], Vector, str]:
    """Directions and position of an acquisition or image header, complete and orthonormal.

    Of three directions the missing one (0, or not finite) follows from the two others; with fewer, or with
    directions that are not perpendicular, the image is labelled axial.

    Parameters
    ----------
    head
        With `read_dir`, `phase_dir`, `slice_dir` and `position`, as attributes or fields.

    Returns
    -------
    tuple, Vector, str
        The unit vectors (read, phase, slice), the position in mm, and what had to be assumed; empty if
        nothing.
    """
    read, phase, normal = (_unit(_field(head, name)) for name in _DIRECTIONS)
    position = np.array(_field(head, "position"), dtype=np.float64)
    assumed = []
    if read is not None and phase is not None and abs(float(read @ phase)) < _SKEW:
        phase = phase - (phase @ read) * read
        phase /= np.linalg.norm(phase)
        cross = np.cross(read, phase)
        # Perpendicular to both; only its side is a matter of what is told.
        normal = -cross if normal is not None and normal @ cross < -0.5 else cross
    elif normal is not None and (read is None) != (phase is None) and _perpendicular(normal, read, phase):
        if read is None:
            assert phase is not None
            read = np.cross(phase, normal)
        else:
            phase = np.cross(normal, read)
        assumed.append("one of the directions is missing and was taken to complete a right-handed system")
    else:
        assumed.append("the orientation is not told (read_dir, phase_dir): the image is labelled axial")
        read, phase, normal = np.eye(3)
    if not np.isfinite(position).all():
        position = np.zeros(3)
        assumed.append("the position is not a number: the image is labelled as at the isocentre")
    vectors = [_vector(v) for v in (read, phase, normal)]
    return (vectors[0], vectors[1], vectors[2]), _vector(position), "; ".join(assumed)


def geometry_of(image: Any) -> Geometry:
    """Of an MRD image."""
    (read, phase, normal), position, _ = orientation(image)
    n_y, n_x = image.data.shape[-2:]
    fov = [float(edge) for edge in image.field_of_view]
    known = [edge if math.isfinite(edge) and edge > 0 else 0.0 for edge in fov]
    # Pixels of 1 mm where nothing is told.
    fov_mm = (known[0] or float(n_x), known[1] or float(n_y), known[2] or 1.0)
    return Geometry(position, read, phase, normal, fov_mm, (n_x, n_y))


def _field(head: Any, name: str) -> list[float]:
    values = head[name] if isinstance(head, np.void) else getattr(head, name)
    return [float(value) for value in values]


def _unit(values: list[float]) -> NDArray[np.float64] | None:
    """The vector with length 1; None if it has not about that already."""
    vector = np.array(values)
    length = float(np.linalg.norm(vector)) if np.isfinite(vector).all() else 0.0
    return vector / length if abs(length - 1) < 0.1 else None


def _perpendicular(normal: NDArray[np.float64], *others: NDArray[np.float64] | None) -> bool:
    return all(other is None or abs(float(normal @ other)) < _SKEW for other in others)


def _vector(values: NDArray[np.float64]) -> Vector:
    x, y, z = (float(v) for v in values)
    return x, y, z
