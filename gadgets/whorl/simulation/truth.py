"""What a simulated scan was made of, beside it in its file.

Letters: Z slices, T timepoints, M tissues, C coils, Y X pixels, V U samples of the fine grid.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from whorl.simulation.phantoms import FINE
from whorl.simulation.scene import Scene

# Parameters that are arrays: datasets in the file, because HDF5 limits attributes to 64 KiB.
_ARRAYS = (
    "noise_covariance",
    "flip_deg",
    "phase_deg",
    "tr_ms",
    "te_ms",
    "slice_profile",
    "turned_deg",
    "centre_mm",
)


@dataclass(frozen=True, slots=True)
class Truth:
    """What a simulated scan was made of, on the grid of the image.

    Parameters
    ----------
    t1_ms, t2_ms, m0
        `(Z, Y, X)` float32, of the tissue with the largest share of a pixel; 0 outside. `m0` is the
        proton density.
    b1
        `(Z, Y, X)` float32, transmit field relative to the nominal one; 0 outside.
    b0_hz
        `(Z, Y, X)` float32, off-resonance in Hz without chemical shift; 0 outside.
    labels
        `(Z, Y, X)` int16, number of the region of interest from 1 on, away from its edges; 0 elsewhere.
    mask
        `(Z, Y, X)` bool, the whole object.
    roi_names, roi_t1_ms, roi_t2_ms
        Of each region of interest; label n is entry n - 1. Where the relaxation varies, means of
        `t1_ms` and `t2_ms` over the region.
    parameters
        All parameters of the simulation by name, the train `(T,)` and the covariance of the coils
        `(C, C)` included. In the file they are attributes of the group, arrays are datasets.
    """

    t1_ms: NDArray[np.float32]
    t2_ms: NDArray[np.float32]
    m0: NDArray[np.float32]
    b1: NDArray[np.float32]
    b0_hz: NDArray[np.float32]
    labels: NDArray[np.int16]
    mask: NDArray[np.bool_]
    roi_names: tuple[str, ...]
    roi_t1_ms: NDArray[np.float64]
    roi_t2_ms: NDArray[np.float64]
    parameters: dict[str, Any]


def read_truth(path: str | os.PathLike[str]) -> Truth:
    """Read the truth of a simulated scan.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file has no truth: it was measured, or written by another program.
    """
    with h5py.File(path, "r") as file:
        if "truth" not in file:
            raise ValueError(f"{path} has no group truth: expected a file written by whorl simulate")
        group = file["truth"]
        mask = group["mask"][()].astype(bool)
        return Truth(
            t1_ms=group["t1_ms"][()],
            t2_ms=group["t2_ms"][()],
            m0=group["m0"][()],
            # Files of older versions have uniform fields and do not say so.
            b1=group["b1"][()] if "b1" in group else mask.astype(np.float32),
            b0_hz=group["b0_hz"][()] if "b0_hz" in group else np.zeros(mask.shape, dtype=np.float32),
            labels=group["labels"][()],
            mask=mask,
            roi_names=tuple(group["roi_names"].asstr()[()]),
            roi_t1_ms=group["roi_t1_ms"][()],
            roi_t2_ms=group["roi_t2_ms"][()],
            parameters={
                "b1": 0.0,
                "inversion_efficiency": 1.0,
                "slice_profile": np.empty(0),
                "turned_deg": np.zeros(3),
                "centre_mm": np.zeros(3),
                "b0_hz": 0.0,
                "gradient_delay_us": 0.0,
                "phase_jump_rad": 0.0,
                "motion_pixels": 0.0,
                "fat": False,
                **{
                    name: value.item() if isinstance(value, np.generic) else value
                    for name, value in group.attrs.items()
                },
                **{name: group[name][()] for name in _ARRAYS if name in group},
            },
        )


def write_truth(group: Any, scene: Scene, parameters: dict[str, Any]) -> None:
    """Write the truth of a scan into a group of its file."""
    thing = scene.thing
    share = thing.on_pixels()  # (Z, M, Y, X)
    mask = share.sum(axis=1) > 0.5
    dominant = share.argmax(axis=1)
    maps = {"t1_ms": thing.t1_ms[dominant], "t2_ms": thing.t2_ms[dominant], "m0": thing.pd[dominant]}
    for z, m in itertools.product(range(len(share)), thing.textured):
        here = dominant[z] == m
        factors = _pixel_means(thing.factors(m, z))
        maps["t1_ms"][z][here] *= factors[here, 0]
        maps["t2_ms"][z][here] *= factors[here, 1]
    for name, field in (("b1", scene.b1), ("b0_hz", scene.b0_hz)):
        maps[name] = np.broadcast_to(_pixel_means(field), mask.shape)
    for name, values in maps.items():
        group.create_dataset(name, data=np.where(mask, values, 0).astype(np.float32))
    labels = thing.labels(share)
    group.create_dataset("labels", data=labels)
    group.create_dataset("mask", data=mask)
    regions = list(thing.regions)
    names = [thing.names[m] for m in regions]
    group.create_dataset("roi_names", data=names, dtype=h5py.string_dtype())
    for name, nominal in (("t1_ms", thing.t1_ms), ("t2_ms", thing.t2_ms)):
        values = nominal[regions]
        for n, m in enumerate(regions):
            inside = labels == n + 1
            if m in thing.textured and inside.any():
                values[n] = maps[name][inside].mean()
        group.create_dataset(f"roi_{name}", data=values)
    for name, value in parameters.items():
        if name in _ARRAYS:
            group.create_dataset(name, data=value)
        else:
            group.attrs[name] = value


def _pixel_means(fine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the fine samples of each pixel, `(V, U, ...)` to `(Y, X, ...)`."""
    v, u, *rest = fine.shape
    return np.asarray(fine.reshape(v // FINE, FINE, u // FINE, FINE, *rest).mean(axis=(1, 3)))
