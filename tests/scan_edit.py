"""A scan in memory that a test can change: what a real scanner might have sent instead."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import ismrmrd
import numpy as np
from ismrmrd.hdf5 import acquisition_dtype
from numpy.typing import NDArray

from whorl.config import Settings
from whorl.doors.files import read_header, read_readouts
from whorl.pipeline.scan import Outcome, reconstruct_scan
from whorl.scan.readout import Flag, Readout

QUANTITIES = ("T1", "T2", "M0", "QUALITY")


@dataclass
class Result:
    """What a reconstruction delivered and said."""

    outcome: Outcome
    images: list[ismrmrd.Image]
    texts: list[tuple[str, str]]

    @property
    def said(self) -> str:
        return "\n".join(text for _, text in self.texts)

    def of(self, role: str, slice_number: int = 0) -> ismrmrd.Image:
        """The one image of a quantity and slice."""
        (image,) = (
            i for i in self.images if i.meta["GADGETRON_DataRole"] == role and i.slice == slice_number
        )
        return image

    def slices(self) -> list[int]:
        """Slices of which all four quantities came."""
        numbers = sorted({int(image.slice) for image in self.images})
        for number in numbers:
            for role in QUANTITIES:
                self.of(role, number)
        return numbers

    def physical(self, role: str, slice_number: int = 0) -> NDArray[np.float64]:
        """Map `(Y, X)` in physical units, as a receiver computes it."""
        image = self.of(role, slice_number)
        slope, intercept = float(image.meta["RescaleSlope"]), float(image.meta["RescaleIntercept"])
        return image.data[0, 0].astype(np.float64) * slope + intercept


@dataclass
class Scan:
    """Header and readouts of a scan: `heads` `(R,)`, one trajectory `(S, D)` and data `(C, S)` each."""

    header: bytes
    heads: NDArray[np.void]
    trajectories: list[NDArray[np.float32]]
    data: list[NDArray[np.complex64]]
    settings: dict[str, Any] = field(default_factory=lambda: {"method": "lowrank"})

    @classmethod
    def load(cls, path: Path) -> Scan:
        readouts = [Readout(r.head.copy(), r.trajectory.copy(), r.data.copy()) for r in read_readouts(path)]
        return cls(
            read_header(path),
            np.array([r.head for r in readouts]),
            [r.trajectory for r in readouts],
            [r.data for r in readouts],
        )

    def copy(self) -> Scan:
        return copy.deepcopy(self)

    @property
    def imaging(self) -> NDArray[np.int64]:
        """Places of the readouts that are not noise."""
        return np.flatnonzero(self.heads["flags"] & np.uint64(Flag.IS_NOISE_MEASUREMENT) == 0)

    def readouts(self) -> Iterator[Readout]:
        for head, trajectory, data in zip(self.heads, self.trajectories, self.data, strict=True):
            yield Readout(head, trajectory, data)

    # --- Changes; each returns the scan, so that they can be chained ----------------------------

    def take(self, order: Any) -> Scan:
        """Only these readouts, in this order."""
        order = np.asarray(order, dtype=np.int64)
        self.heads = self.heads[order]
        self.trajectories = [self.trajectories[n].copy() for n in order]
        self.data = [self.data[n].copy() for n in order]
        return self

    def without(self, lost: Any) -> Scan:
        """Without some readouts, by their place."""
        return self.take(np.setdiff1d(np.arange(len(self.heads)), lost))

    def without_noise(self) -> Scan:
        return self.take(self.imaging)

    def two_slices(self, second_scale: float = 1.0) -> Scan:
        """The same slice twice, one after the other, as slices 0 and 1."""
        imaging = self.imaging
        n_noise, n = len(self.heads) - len(imaging), len(imaging)
        self.take(np.concatenate([np.arange(len(self.heads)), imaging]))
        second = slice(n_noise + n, None)
        self.heads["idx"]["slice"][second] = 1
        self.heads["position"][second] = (1.5, -2.5, 5.0)
        self.heads["flags"][n_noise + n - 1] &= ~np.uint64(Flag.LAST_IN_MEASUREMENT)
        for n in range(second.start, len(self.heads)):
            self.data[n] *= np.float32(second_scale)
        return self.limit("slice", 1)

    def slices(self, number: int) -> Scan:
        """The same slice several times, one after the other; none says that it is the last."""
        imaging = self.imaging
        n_noise, T = len(self.heads) - len(imaging), len(imaging)
        self.heads["flags"][imaging] &= ~np.uint64(Flag.LAST_IN_MEASUREMENT)
        self.take(np.concatenate([np.arange(n_noise), *([imaging] * number)]))
        self.heads["idx"]["slice"][n_noise:] = np.arange(number).repeat(T)
        return self.limit("slice", number - 1)

    def flag(self, places: Any, flag: int) -> Scan:
        self.heads["flags"][places] |= np.uint64(flag)
        return self

    def no_flags(self) -> Scan:
        """Without the flags that mark an end or a beginning."""
        self.heads["flags"] &= np.uint64(Flag.IS_NOISE_MEASUREMENT)
        return self

    def no_user_train(self) -> Scan:
        """Without TR, TE, flip angle and phase in the readouts; the counter in `user_int[0]` stays."""
        self.heads["user_int"][:, 1:] = 0
        return self

    def user_train(self) -> NDArray[np.int32]:
        """`user_int` of the imaging readouts, in their order."""
        return self.heads["user_int"][self.imaging]

    def trajectory(self, change: Callable[[NDArray[np.float32]], NDArray[np.floating]]) -> Scan:
        """Change the trajectory `(S, D)` of each imaging readout."""
        for n in self.imaging:
            self.trajectories[n] = np.ascontiguousarray(change(self.trajectories[n]), dtype=np.float32)
            self.heads["trajectory_dimensions"][n] = self.trajectories[n].shape[1]
        return self

    def limit(self, name: str, maximum: int | None) -> Scan:
        """Set (or remove) an encoding limit of the header."""
        self.header = re.sub(rf"\s*<{name}>.*?</{name}>".encode(), b"", self.header, flags=re.DOTALL)
        if maximum is not None:
            text = f"<{name}><minimum>0</minimum><maximum>{maximum}</maximum><center>0</center></{name}>"
            self.header = self.header.replace(b"</encodingLimits>", f"{text}</encodingLimits>".encode())
        return self

    def header_list(self, name: str, values: Any) -> Scan:
        """Replace a list of the header's sequence parameters, such as ``TR``."""
        self.header = re.sub(rf"\s*<{name}>[^<]*</{name}>".encode(), b"", self.header)
        text = "".join(f"<{name}>{float(value)!r}</{name}>" for value in values)
        # The schema wants TR, TE, TI, flip angle in this order.
        order = ("TR", "TE", "TI", "flipAngle_deg")
        at = next(
            (
                place
                for later in order[order.index(name) + 1 :]
                if (place := self.header.find(f"<{later}>".encode())) >= 0
            ),
            self.header.find(b"</sequenceParameters>"),
        )
        self.header = self.header[:at] + text.encode() + self.header[at:]
        return self

    def no_header_train(self) -> Scan:
        """Without lists of flip angle, TR and TE in the header; TI stays."""
        for name in ("flipAngle_deg", "TR", "TE"):
            self.header_list(name, [])
        return self

    def space(self, which: str, matrix: tuple[int, int], fov_mm: tuple[float, float]) -> Scan:
        """Set matrix and field of view of ``encodedSpace`` or ``reconSpace``."""
        text = (
            f"<{which}><matrixSize><x>{matrix[0]}</x><y>{matrix[1]}</y><z>1</z></matrixSize>"
            f"<fieldOfView_mm><x>{fov_mm[0]}</x><y>{fov_mm[1]}</y><z>5</z></fieldOfView_mm></{which}>"
        )
        pattern = rf"<{which}>.*?</{which}>".encode()
        assert re.search(pattern, self.header, flags=re.DOTALL)
        self.header = re.sub(pattern, text.encode(), self.header, flags=re.DOTALL)
        return self

    # --- What becomes of it ---------------------------------------------------------------------

    def run(self, readouts: Iterator[Readout] | None = None, **properties: Any) -> Result:
        """Reconstruct it in this process, by the low-rank method unless told otherwise."""
        images: list[ismrmrd.Image] = []
        texts: list[tuple[str, str]] = []
        outcome = reconstruct_scan(
            self.header,
            self.readouts() if readouts is None else readouts,
            Settings.from_properties({**self.settings, **properties}),
            images.append,
            lambda level, text: texts.append((level, text)),
        )
        assert outcome.delivered == len(images)
        return Result(outcome, images, texts)

    def write(self, path: Path) -> Path:
        """Write it as an MRD file."""
        rows = np.empty(len(self.heads), dtype=acquisition_dtype)
        for n, readout in enumerate(self.readouts()):
            head = readout.head.copy()
            head["active_channels"], head["number_of_samples"] = readout.data.shape
            head["trajectory_dimensions"] = readout.trajectory.shape[1] if readout.trajectory.size else 0
            rows["head"][n] = head
            rows["traj"][n] = readout.trajectory.ravel()
            rows["data"][n] = np.ascontiguousarray(readout.data).view(np.float32).ravel()
        with h5py.File(path, "w") as file:
            group = file.create_group("dataset")
            group.create_dataset("xml", data=[self.header], dtype=h5py.special_dtype(vlen=bytes))
            group.create_dataset("data", data=rows)
        return path


def assert_close(
    result: Result, reference: Result, *, slice_number: int = 0, share: float = 0.98, relative: float = 0.06
) -> None:
    """T1 and T2 agree in nearly all pixels of the object.

    The dictionary has steps of 5 %, so rounding moves a pixel by one atom at most; `share` of the
    pixels shall be within `relative`, and the masks shall agree.
    """
    for role in ("T1", "T2"):
        ours, theirs = result.physical(role, slice_number), reference.physical(role)
        assert ours.shape == theirs.shape
        inside = (ours > 0) & (theirs > 0)
        assert inside.sum() > 200
        assert inside.sum() >= 0.97 * max((ours > 0).sum(), (theirs > 0).sum())
        near = np.abs(ours[inside] - theirs[inside]) <= relative * theirs[inside]
        assert near.mean() >= share, f"{role}: only {near.mean():.1%} of the pixels agree"
