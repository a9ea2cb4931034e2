"""The images of a result as volumes: what reports and exports are made of.

Letters: Z slices, C channels, Y X pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ismrmrd
import numpy as np
from numpy.typing import NDArray

from whorl.maps.geometry import Geometry, geometry_of

#: Deviation of the distance of slices from their mean, in mm, that is no gap.
_UNEVEN_MM = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """The parallel slices of one quantity.

    Parameters
    ----------
    role
        What it is, `GADGETRON_DataRole` of its images: `T1`, `T2`, `M0`, `QUALITY`, `B1`, `T1_SD`, `T2_SD`,
        `T1_LOWRANK` ..., `T1_RGB`, `SUBSPACE` ...; empty if they do not say it.
    series, repetition, contrast
        Of the image headers.
    units
        Of the values.
    values
        `(Z, Y, X)` in physical units, float32 or complex64, in order along `slice_dir`; 0 outside the
        object. Images of several channels: `(Z, C, Y, X)`.
    geometries
        Z places.
    images
        The Z images themselves, with their headers and attributes.
    """

    role: str
    series: int
    repetition: int
    contrast: int
    units: str
    values: NDArray[Any]
    geometries: tuple[Geometry, ...]
    images: tuple[ismrmrd.Image, ...]

    @property
    def spacing_mm(self) -> float:
        """Mean distance of the slices; the thickness of a single one."""
        if len(self.geometries) < 2:
            return self.geometries[0].fov_mm[2]
        return (self.geometries[-1].along_mm - self.geometries[0].along_mm) / (len(self.geometries) - 1)

    @property
    def is_even(self) -> bool:
        """Whether the slices lie at equal distances, one behind the other: one affine holds for all."""
        places = np.array([g.position for g in self.geometries])
        line = places[0] + np.arange(len(places))[:, None] * self.affine[:3, 2]
        return bool(np.abs(places - line).max() < _UNEVEN_MM)

    @property
    def affine(self) -> NDArray[np.float64]:
        """`(4, 4)`: index (column, row, slice, 1) to LPS in mm; exact if `is_even`."""
        affine = self.geometries[0].affine.copy()
        if len(self.geometries) > 1:
            first, last = (np.array(self.geometries[n].position) for n in (0, -1))
            affine[:3, 2] = (last - first) / (len(self.geometries) - 1)
        return affine

    def attribute(self, name: str) -> str:
        """A meta attribute of the first image; empty if there is none."""
        return attribute(self.images[0], name)


def attribute(image: ismrmrd.Image, name: str) -> str:
    """A meta attribute as text; empty if the image does not have it."""
    value = image.meta.get(name)
    if isinstance(value, (list, tuple)):
        return "\n".join(str(v) for v in value)
    return "" if value is None else str(value)


def physical(image: ismrmrd.Image) -> NDArray[Any]:
    """Values of an image in physical units, stored × RescaleSlope + RescaleIntercept; as its data, less
    axes of length 1 before the last two."""
    data = np.asarray(image.data)
    data = data.reshape([n for n in data.shape[:-2] if n > 1] + list(data.shape[-2:]))
    if np.iscomplexobj(data):
        return data.astype(np.complex64)
    slope = float(attribute(image, "RescaleSlope") or 1)
    return (data * slope + float(attribute(image, "RescaleIntercept") or 0)).astype(np.float32)


def volumes(images: Sequence[ismrmrd.Image]) -> list[Volume]:
    """Images put together to volumes: of one role, series, repetition and contrast, parallel to each other.

    Ordered by series, repetition and contrast. Where one place was sent twice (a result that was appended
    to), the later image counts.
    """
    stacks: dict[tuple[int, int, int, str], list[list[ismrmrd.Image]]] = {}
    for image in images:
        key = (
            int(image.image_series_index),
            int(image.repetition),
            int(image.contrast),
            attribute(image, "GADGETRON_DataRole"),
        )
        place = geometry_of(image)
        parallel = stacks.setdefault(key, [])
        for stack in parallel:
            if place.is_parallel(geometry_of(stack[0])):
                stack.append(image)
                break
        else:
            parallel.append([image])
    found = []
    for (series, repetition, contrast, role), parallel in sorted(stacks.items(), key=lambda item: item[0]):
        for stack in parallel:
            at = {(int(image.slice), round(geometry_of(image).along_mm, 3)): image for image in stack}
            slices = sorted(at.values(), key=lambda image: geometry_of(image).along_mm)
            found.append(
                Volume(
                    role,
                    series,
                    repetition,
                    contrast,
                    attribute(slices[0], "Units"),
                    np.stack([physical(image) for image in slices]),
                    tuple(geometry_of(image) for image in slices),
                    tuple(slices),
                )
            )
    return found
