"""Readouts of one slice: received into preallocated memory, compressed, folded into the subspace.

Letters: T timepoints, K coefficients, C coils, V virtual coils, I interleaves, S samples, R readouts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.kspace.accumulate import fold, fold_gram
from whorl.kspace.outliers import find_spikes
from whorl.scan.readout import Flag, Readout

#: Readouts that are compressed together.
BLOCK = 64
#: Chooses the virtual coils of a slice: from its first block `(R, C, S)`, whitened, and what gives the
#: trajectories `(R, S, D)` of these readouts, a matrix `(V, C)`; and what could not be made as asked for.
Compress = Callable[[Tensor, Callable[[], NDArray[np.float32]]], tuple[Tensor, str]]


class Damage(StrEnum):
    """Why a readout that has come is of no use."""

    SPIKES = "with spikes"
    ZEROS = "with nothing but zeros"


def digest(readout: Readout) -> int:
    """A number that tells data apart; 0: they are nothing but zeros.

    64 bits: of a thousand readouts two have the same by chance once in 10¹³ slices. It lasts for one process.
    """
    return hash(readout.data.tobytes()) if readout.data.any() else 0


#: Trajectories that differ by less, relative to their largest value, are one interleaf: a sender may compute
#: each rotation anew. At the edge of a 256² image the phase then errs by less than 0.02 rad.
_SAME = 2e-5


class Interleaves:
    """The distinct trajectories of a slice, numbered in the order in which they come."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}  # of exact copies, the fast way
        self._trajectories: list[NDArray[np.float32]] = []
        self._probes = np.empty((0, 0), dtype=np.float32)  # a few values of each trajectory

    def number(self, trajectory: NDArray[np.float32]) -> int:
        """Number of a trajectory `(S, D)`."""
        key = trajectory.tobytes()
        number = self._numbers.get(key)
        return self._find(trajectory, key) if number is None else number

    def _find(self, trajectory: NDArray[np.float32], key: bytes) -> int:
        """Number of the trajectory that is the same but for rounding, or a new one.

        Two columns are places; a third one has weights, of any size and perhaps no numbers.
        """
        places = trajectory[:, :2]
        tolerance = _SAME * float(np.abs(places).max())
        probe = places[:: max(1, len(trajectory) // 8)].ravel()
        if self._trajectories:
            near = np.abs(self._probes - probe).max(axis=1) <= tolerance
            for number in np.flatnonzero(near):
                if np.abs(self._trajectories[number][:, :2] - places).max() <= tolerance:
                    return int(number)
            self._probes = np.concatenate([self._probes, probe[None]])
        else:
            self._probes = probe[None].copy()
        self._numbers[key] = len(self._trajectories)
        self._trajectories.append(trajectory.copy())
        return self._numbers[key]

    def __len__(self) -> int:
        return len(self._trajectories)

    def stack(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Trajectories `(I, S, D)` of some numbers."""
        return np.stack([self._trajectories[n] for n in numbers])


@dataclass(frozen=True, slots=True, eq=False)
class SubspaceKspace:
    """What a slice's reconstruction starts from.

    Parameters
    ----------
    bins
        `(I, K, V, S)` complex64: ``Uᴴy`` by interleaf.
    gram
        `(I, K, K)` complex64: ``Σ conj(u_t) u_tᵀ`` by interleaf.
    interleaves
        `(I,)` numbers of the interleaves that were visited, in `Interleaves`.
    matrix
        `(V, C)`: whitening and compression of the scan's coils to the virtual ones.
    note
        What in that could not be made as asked for; empty if all could.
    """

    bins: Tensor
    gram: Tensor
    interleaves: NDArray[np.int64]
    matrix: Tensor
    note: str = ""

    def turned(self, phase: Tensor) -> SubspaceKspace:
        """The same data times `exp(i phase)`; phase `(I, S)` in radians, by interleaf and sample."""
        factor = torch.polar(torch.ones_like(phase), phase).to(self.bins)
        return replace(self, bins=self.bins * factor[:, None, None])

    def scaled(self, factor: float) -> SubspaceKspace:
        """The same data in another unit."""
        return replace(self, bins=self.bins * factor)


class SliceBuffer:
    """Collects one slice.

    Readouts are staged in one preallocated block; a full block is whitened and compressed to
    virtual coils by one matrix product. Compressed rows are then kept raw, or, once the basis is
    known and the folded form is the smaller one, folded at once.

    Parameters
    ----------
    first
        The slice's first imaging readout: its size is that of all others.
    whitening
        `(C', C)` or ``None``; C' is smaller than C where coils are dead.
    compress
        Chooses the virtual coils of the slice.
    device
        Where the compressed data live.
    block
        Readouts that are compressed together; the first ones choose the virtual coils.
    """

    def __init__(
        self,
        first: Readout,
        whitening: Tensor | None,
        compress: Compress,
        device: torch.device,
        *,
        block: int = BLOCK,
    ) -> None:
        C, S = first.data.shape
        self.head: np.void = first.head.copy()
        self._staging = np.empty((block, C, S), dtype=np.complex64)
        self._staged = self._judged = 0  # readouts in the block, and those of them that were looked at
        self._clean = np.ones(block, dtype=np.bool_)
        self._smooth: Tensor | None = None  # what the next ones are judged by
        self._has_signal = False  # whether anything but zeros was looked at
        self._damaged: list[tuple[int, Damage]] = []  # timepoints that nobody was told of
        #: Places among the readouts that wait for a timepoint: those that are damaged.
        self.damaged_waiting: dict[int, Damage] = {}
        self._whitening = whitening
        self._choose = compress
        self._device = device
        self._matrix: Tensor | None = None  # whitening and compression in one, (V, C)
        self._note = ""
        self._rows: list[Tensor] = []  # blocks (R, V, S) that are not folded yet
        self._heads: list[np.void] = []  # of rows and staged readouts whose timepoint is not known yet
        self._digests: list[int] = []  # of the same
        self._interleaf: list[int] = []
        #: Interleaf of each readout, in order of arrival.
        self.order: list[int] = []
        self._timepoint: list[int] = []  # -1: not used
        self._bins: Tensor | None = None
        self._gram: Tensor | None = None
        self.interleaves = Interleaves()
        self.n_arrived = 0
        self.flagged = False  # whether the latest readout, and no other, says that it is the last
        self._n_flags = 0

    @property
    def heads(self) -> NDArray[np.void]:
        """`(R,)` headers of the readouts that have no timepoint yet."""
        return np.array(self._heads, dtype=self.head.dtype)

    @property
    def n_waiting(self) -> int:
        return len(self._heads)

    @property
    def waiting_digests(self) -> list[int]:
        """Of the readouts that have no timepoint yet."""
        return self._digests

    def add(self, readout: Readout, interleaf: int, timepoint: int | None, its_digest: int) -> None:
        """Take over one readout; it is copied.

        Parameters
        ----------
        readout
            One of the slice.
        interleaf
            Number of its trajectory, in `interleaves`.
        timepoint
            One that has not come yet; -1: it is not used; ``None`` as long as timepoints are not known.
        its_digest
            Of its data, see `digest`.
        """
        self._staging[self._staged] = readout.data
        self._staged += 1
        self.n_arrived += 1
        last = bool(readout.flags & (Flag.LAST_IN_SLICE | Flag.LAST_IN_MEASUREMENT))
        self._n_flags += last
        self.flagged = last and self._n_flags == 1
        self._interleaf.append(interleaf)
        self.order.append(interleaf)
        if timepoint is None:
            self._heads.append(readout.head.copy())
            self._digests.append(its_digest)
        else:
            self._timepoint.append(timepoint)
        if self._staged == len(self._staging):
            self._compress()

    def number_timepoints(
        self, timepoint: NDArray[np.int64], interleaf: NDArray[np.int64] | None = None
    ) -> None:
        """Timepoints `(R,)` of all readouts that wait for one, each at most once; -1: not used.

        `interleaf` `(R,)` replaces the numbers that were given before the timepoints were known.
        """
        if interleaf is not None:
            self._interleaf[len(self._timepoint) :] = interleaf.tolist()
            self.order = list(self._interleaf)
        self._timepoint.extend(timepoint.tolist())
        self.damaged_waiting.clear()
        self._heads.clear()
        self._digests.clear()

    def divide(self, part: NDArray[np.int64]) -> list[SliceBuffer]:
        """One buffer for each part, while none of the readouts has a timepoint yet.

        Parameters
        ----------
        part
            `(R,)` number of the part of each readout that waits, from 0 on without gaps.
        """
        assert not self._timepoint
        self._compress()
        rows = torch.cat(self._rows)
        heads = self.heads
        buffers = []
        for number in range(int(part.max()) + 1):
            chosen = np.flatnonzero(part == number)
            buffer = copy.copy(self)
            buffer._staging, buffer._clean = np.empty_like(self._staging), np.ones_like(self._clean)
            buffer.head = heads[chosen[0]].copy()
            buffer._rows = list(torch.split(rows[torch.from_numpy(chosen)], BLOCK))
            buffer._heads = [heads[n] for n in chosen]
            buffer._digests = [self._digests[n] for n in chosen]
            buffer._interleaf = [self._interleaf[n] for n in chosen]
            buffer.order = list(buffer._interleaf)
            buffer._timepoint = []
            buffer._damaged, buffer.damaged_waiting = [], {}
            buffer.n_arrived = len(chosen)
            buffers.append(buffer)
        return buffers

    def judge(self) -> list[tuple[int, Damage]]:
        """Look for damage in all that has come.

        Timepoints that came with some are returned, each once: they are missing from now on. Of readouts
        that wait for a timepoint, `damaged_waiting` tells. If there is nothing but zeros in all of them, the
        slice has no signal, and none is missing.
        """
        self._find_damage()
        found, self._damaged = self._damaged, []
        return found

    def _find_damage(self) -> None:
        """Mark those among the staged readouts that were not looked at."""
        begin, end = self._judged, self._staged
        if begin == end:
            return
        new = self._staging[begin:end]
        zeros = np.array([not data.any() for data in new])
        spiked, self._smooth = find_spikes(torch.from_numpy(new), self._smooth)
        self._judged = end
        self._clean[begin:end] = ~(spiked.numpy() | zeros)
        for n in np.flatnonzero(spiked.numpy()) - len(new):  # from the latest one backwards
            self._mark(int(n), Damage.SPIKES)
        if not self._has_signal and not zeros.all():  # what came before was not
            self._has_signal = True
            zeros = np.concatenate([np.ones(self.n_arrived - self._staged + begin, dtype=np.bool_), zeros])
        if self._has_signal:
            for n in np.flatnonzero(zeros) - len(zeros):
                self._mark(int(n), Damage.ZEROS)

    def _mark(self, n: int, damage: Damage) -> None:
        """A readout is damaged; the latest one is -1."""
        if self._heads:
            self.damaged_waiting[len(self._heads) + n] = damage
        elif (t := self._timepoint[n]) >= 0:
            self._timepoint[n] = -1
            self._damaged.append((t, damage))

    def _compress(self) -> None:
        """Move the staged readouts to the compressed rows."""
        if not self._staged:
            return
        self._find_damage()
        block = torch.from_numpy(self._staging[: self._staged]).to(self._device)
        if self._matrix is None:
            # Damage chooses no coils, unless there is nothing else.
            chosen = np.flatnonzero(self._clean[: self._staged] | ~self._clean[: self._staged].any())
            white = block[torch.from_numpy(chosen).to(self._device)]
            white = white if self._whitening is None else self._whitening.to(block) @ white
            numbers = np.array(self._interleaf[-self._staged :], dtype=np.int64)[chosen]
            nowhere = np.zeros(
                (len(white), white.shape[2], 0), dtype=np.float32
            )  # as long as it is not known
            compression, self._note = self._choose(
                white, lambda: self.interleaves.stack(numbers) if len(self.interleaves) else nowhere
            )
            self._matrix = compression if self._whitening is None else compression @ self._whitening.to(block)
        self._rows.append(self._matrix @ block)
        self._staged = self._judged = 0

    def fold(self, basis: Tensor, receiver: Tensor | None = None) -> None:
        """Fold all compressed rows into the subspace and free them, once there is signal.

        Parameters
        ----------
        basis
            `(T, K)`.
        receiver
            `(T,)` complex factors that bring the readouts into the receiver's frame of the signal model;
            ``None``: they are in it.
        """
        if self._has_signal:
            self._fold(basis, receiver)

    def _fold(self, basis: Tensor, receiver: Tensor | None) -> None:
        n_rows = sum(len(rows) for rows in self._rows)
        if not n_rows:
            return
        V, S = self._rows[0].shape[1:]
        K, n_bins = basis.shape[1], max(self._interleaf[:n_rows]) + 1
        have = 0 if self._bins is None else len(self._bins)
        if n_bins > have:
            bins = torch.zeros((n_bins, K, V, S), dtype=torch.complex64, device=self._device)
            gram = torch.zeros((n_bins, K, K), dtype=torch.complex64, device=self._device)
            if self._bins is not None and self._gram is not None:
                bins[:have], gram[:have] = self._bins, self._gram
            self._bins, self._gram = bins, gram
        assert self._bins is not None
        assert self._gram is not None
        timepoint = torch.tensor(self._timepoint[:n_rows], device=self._device)
        interleaf = torch.tensor(self._interleaf[:n_rows], device=self._device)
        start = 0
        for rows in self._rows:
            t, i = timepoint[start : start + len(rows)], interleaf[start : start + len(rows)]
            used = t >= 0
            if receiver is not None:
                rows = rows * receiver[t.clamp_min(0)][:, None, None]
            fold(self._bins, rows[used], t[used], i[used], basis)
            fold_gram(self._gram, t[used], i[used], basis)
            start += len(rows)
        self._rows.clear()
        # What is left belongs to readouts that are still staged.
        self._timepoint, self._interleaf = self._timepoint[n_rows:], self._interleaf[n_rows:]

    def finish(self, basis: Tensor, receiver: Tensor | None = None) -> SubspaceKspace:
        """Fold what is left and hand the slice over; parameters as for `fold`."""
        self._compress()
        self._fold(basis, receiver)
        assert self._bins is not None
        assert self._gram is not None
        assert self._matrix is not None
        visited = torch.nonzero(self._gram.diagonal(dim1=1, dim2=2).abs().sum(1) > 0)[:, 0]
        bins, gram = self._bins, self._gram
        if len(visited) < len(bins):
            bins, gram = bins[visited], gram[visited]
        return SubspaceKspace(bins, gram, visited.cpu().numpy(), self._matrix, self._note)
