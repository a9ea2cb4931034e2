"""Trajectories in files: arrays in NumPy or HDF5 files, and the readouts of another MRD file.

Letters: I interleaves, S samples, D columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from whorl.scan.array_file import HDF5, read_arrays, with_file
from whorl.scan.failure import ScanError
from whorl.scan.readout import NOT_IMAGING
from whorl.scan.trajectories import Trajectories
from whorl.scan.trajectory import UNITS

#: Samples of all interleaves: 10000 of 5000 take 0.8 GB.
_MOST_PLACES = 50_000_000
_NAMES = ("trajectory", "kx", "ky", "density", "units", "dwell_us", "by")


def rotated(
    points: NDArray[np.floating], n_interleaves: int, rotation_deg: float = 0.0
) -> NDArray[np.float64]:
    """All rotations of one interleaf.

    Parameters
    ----------
    points
        `(S, D)`: kx, ky, and perhaps a density weight, which stays.
    n_interleaves
        Number I.
    rotation_deg
        Angle from one to the next, from kx towards ky; 0: 360 / I.

    Returns
    -------
    ndarray
        `(I, S, D)`; the first is `points`.

    Raises
    ------
    ScanError
        If they are more than 50 million samples.
    """
    if n_interleaves * len(points) > _MOST_PLACES:  # both may come from a header
        raise ScanError(
            f"{n_interleaves} interleaves of {len(points)} samples are too many: expected at most "
            f"{_MOST_PLACES} samples in all"
        )
    step = rotation_deg or 360.0 / n_interleaves
    angle = np.deg2rad(step * np.arange(n_interleaves))[:, None]
    x, y = points[:, 0].astype(np.float64), points[:, 1].astype(np.float64)
    turned = [np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y]
    turned += [np.broadcast_to(column, turned[0].shape) for column in points[:, 2:].T]
    return np.stack(turned, axis=-1)


def read_trajectories(path: str) -> Trajectories:
    """Read the file of property ``trajectory``.

    `.npz` and `.h5`: an array `trajectory` `(I, S, D)` or `(S, D)`, or `kx` and `ky` `(I, S)` and perhaps
    `density`; perhaps `units`, `dwell_us` and `by` (``arm`` or ``timepoint``), in HDF5 as datasets or as
    attributes.
    An MRD file: what is attached to its imaging readouts, by kspace_encode_step_1 if each arm has one
    trajectory, else in their order by timepoint.

    Raises
    ------
    ScanError
        If the file cannot be read, or has no trajectory that can be used.
    """

    def readouts(file: Any) -> Trajectories | None:
        """Those of an MRD file; ``None`` if it is another one."""
        if file.read(len(HDF5)) != HDF5:
            return None
        with h5py.File(file, "r") as hdf5:
            acquisitions = _acquisitions(hdf5)
            return _of_readouts(acquisitions, path) if acquisitions is not None else None

    if found := with_file(path, "the trajectory", readouts):
        return found
    return _of_arrays(*read_arrays(path, "the trajectory", _NAMES), path)


def _of_arrays(values: Mapping[str, Any], there: list[str], path: str) -> Trajectories:
    if "trajectory" in values:
        points = np.asarray(values["trajectory"])
        if points.ndim == 2:
            points = points[None]
    elif "kx" in values and "ky" in values:
        columns = [np.atleast_2d(values[name]) for name in ("kx", "ky", "density") if name in values]
        if len({column.shape for column in columns}) > 1:
            shapes = ", ".join(str(column.shape) for column in columns)
            raise ScanError(f"the trajectory {path} has kx, ky, density of {shapes}: expected one shape")
        points = np.stack(columns, axis=-1)
    else:
        raise ScanError(
            f"the trajectory {path} has {', '.join(there) or 'nothing'}: expected an array trajectory "
            f"(interleaves, samples, 2 or 3), or kx and ky"
        )
    _check(points, path)
    units, by = _text(values.get("units", "auto")), _text(values.get("by", "auto"))
    if units not in ("auto", *UNITS):
        raise ScanError(f"the trajectory {path} has units {units!r}: expected one of {', '.join(UNITS)}")
    if by not in ("auto", "arm", "timepoint"):
        raise ScanError(f"the trajectory {path} is numbered by {by!r}: expected arm or timepoint")
    dwell_us = float(np.asarray(values["dwell_us"]).reshape(-1)[0]) if "dwell_us" in values else None
    if dwell_us is not None and not 0 < dwell_us < 1e6:
        raise ScanError(f"the trajectory {path} has dwell_us {dwell_us:g}: expected more than 0")
    known: Literal["auto", "arm", "timepoint"] = by  # type: ignore[assignment]
    return Trajectories(points.astype(np.float64), units, f"file {path}", known, None, dwell_us)


def _text(value: object) -> str:
    one = np.asarray(value).reshape(-1)[0]
    return one.decode() if isinstance(one, bytes) else str(one)


def _check(points: NDArray[Any], path: str) -> None:
    if (
        points.ndim != 3
        or points.shape[-1] not in (2, 3)
        or not points.size
        or points.dtype.kind not in "fiu"
    ):
        raise ScanError(
            f"the trajectory {path} has shape {points.shape} of {points.dtype}: expected numbers "
            f"(interleaves, samples, 2 or 3)"
        )
    if not np.isfinite(points).all():
        raise ScanError(f"the trajectory {path} has values that are not finite: expected numbers")


def _acquisitions(hdf5: h5py.File) -> h5py.Dataset | None:
    for group in hdf5.values():
        if isinstance(group, h5py.Group) and "data" in group and "xml" in group:
            return group["data"]
    return None


def _of_readouts(acquisitions: h5py.Dataset, path: str) -> Trajectories:
    """By arm, or by timepoint in the order of the readouts."""
    arms: dict[int, NDArray[np.float32]] = {}
    in_order: list[NDArray[np.float32]] = []
    by_arm, dwell_us = True, 0.0
    for start in range(0, acquisitions.size, 256):
        for row in acquisitions[start : start + 256]:
            head = row["head"]
            if int(head["flags"]) & NOT_IMAGING or not len(row["traj"]):
                continue
            one = np.asarray(row["traj"], np.float32).reshape(int(head["number_of_samples"]), -1)
            if in_order and one.shape != in_order[0].shape:
                raise ScanError(
                    f"the readouts of {path} have trajectories of {in_order[0].shape} and {one.shape}: "
                    f"expected one size"
                )
            known = arms.setdefault(int(head["idx"]["kspace_encode_step_1"]), one)
            by_arm &= known is one or bool(np.allclose(known, one, atol=2e-5 * np.abs(known).max()))
            in_order.append(one)
            dwell_us = float(head["sample_time_us"])
    if not in_order:
        raise ScanError(f"no readout of {path} has a trajectory: expected them attached")
    if by_arm and sorted(arms) != list(range(len(arms))):
        raise ScanError(
            f"the readouts of {path} have {len(arms)} arms numbered {min(arms)} to {max(arms)}: expected "
            f"each from 0 on"
        )
    points = np.stack([arms[n] for n in sorted(arms)] if by_arm else in_order)
    _check(points, path)
    return Trajectories(
        points.astype(np.float64),
        "auto",
        f"readouts of {path}",
        "arm" if by_arm else "timepoint",
        None,
        dwell_us or None,
    )
