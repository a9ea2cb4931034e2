"""Volumes as NIfTI files.

Letters: K coefficients, Z slices, Y X pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from whorl.exports import map_name, numbered
from whorl.maps.volumes import Volume

#: From the patient system of MRD and DICOM (LPS) to that of NIfTI (RAS).
_RAS_OF_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


def ras_affine(lps: NDArray[np.float64]) -> NDArray[np.float64]:
    """`(4, 4)`: index (column, row, slice, 1) to RAS in mm, of that to LPS."""
    affine: NDArray[np.float64] = _RAS_OF_LPS @ lps
    return affine


def write(
    volumes: Sequence[Volume], folder: Path, scale: float = 1.0, names: Sequence[str] | None = None
) -> tuple[list[Path], list[str]]:
    """Write one file for each volume, and one for each slice of a stack with unequal distances.

    Values are float32 in the unit of the volume × `scale`, RGB is 3 × 8 bits, and subspace images are
    complex64 with the coefficients on the fourth axis. Array order is (x, y, z).

    Parameters
    ----------
    volumes
        Of one result.
    folder
        Exists.
    scale
        Factor of all values.
    names
        One for each volume, with folders but without ``.nii.gz``; by default what is in them.

    Returns
    -------
    list, list
        The files, and sentences for the user.
    """
    if names is None:
        names = _names(volumes)
    paths: list[Path] = []
    said: list[str] = []
    for name, stack in _stacks(volumes, names):
        base = folder / name
        base.parent.mkdir(parents=True, exist_ok=True)
        first = stack[0]
        if first.is_even:
            path = base.with_name(f"{base.name}.nii.gz")
            _save([v.values for v in stack], first.affine, scale, path)
            paths.append(path)
            continue
        said.append(
            f"the slices of {base.name} do not lie at equal distances, which a NIfTI file cannot tell: "
            f"each of its {len(first.geometries)} slices has a file of its own"
        )
        for n, place in enumerate(first.geometries):
            path = base.with_name(f"{base.name}_slice-{n + 1:02d}.nii.gz")
            _save([v.values[n : n + 1] for v in stack], place.affine, scale, path)
            paths.append(path)
    return paths, said


def _names(volumes: Sequence[Volume]) -> list[str]:
    several = len({v.repetition for v in volumes}) > 1
    names = [map_name(v) + (f"_run-{v.repetition + 1}" if several else "") for v in volumes]
    # Coefficients are told apart by their contrast, and share a file.
    kept = [n for n, v in enumerate(volumes) if not (np.iscomplexobj(v.values) and v.contrast)]
    unique = dict(zip(kept, numbered([names[n] for n in kept], lambda s, n: f"{s}_{n}"), strict=True))
    return [unique.get(n, names[n]) for n in range(len(volumes))]


def _stacks(volumes: Sequence[Volume], names: Sequence[str]) -> list[tuple[str, list[Volume]]]:
    """Volumes of equal names (coefficients of one subspace) together, in the order of their contrast."""
    stacks: dict[str, list[Volume]] = {}
    for name, volume in zip(names, volumes, strict=True):
        stacks.setdefault(name, []).append(volume)
    return [(name, sorted(stack, key=lambda v: v.contrast)) for name, stack in stacks.items()]


def _save(values: list[NDArray[Any]], lps: NDArray[np.float64], scale: float, path: Path) -> None:
    if values[0].ndim == 4:  # (Z, C, Y, X): colours
        colours = np.clip(np.rint(np.moveaxis(values[0], 1, -1)), 0, 255).astype(np.uint8)
        array = np.ascontiguousarray(colours[..., :3]).view(_RGB)[..., 0].T  # (X, Y, Z)
    elif np.iscomplexobj(values[0]):
        array = np.stack([v.T for v in values], axis=-1).astype(np.complex64)  # (X, Y, Z, K)
    else:
        array = (values[0].T * np.float32(scale)).astype(np.float32)
    affine = ras_affine(lps)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    # Both, and both as the scanner's: programs differ in which of them they read.
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    nib.save(image, path)
