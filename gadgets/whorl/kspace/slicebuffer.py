"""Readouts of one slice: received into preallocated memory, compressed, folded into the subspace.

Letters: T timepoints, K coefficients, C coils, V virtual coils, I interleaves, S samples, R readouts.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.kspace.accumulate import fold, fold_gram
from whorl.scan.integrity import Tally
from whorl.scan.readout import Flag, Readout

#: Readouts that are compressed together.
BLOCK = 64
#: Chooses the virtual coils of a slice: from its first block `(R, C, S)`, whitened, and what gives the
#: trajectories `(R, S, D)` of these readouts, a matrix `(V, C)`; and what could not be made as asked for, or "".
Compress = Callable[[Tensor, Callable[[], NDArray[np.float32]]], tuple[Tensor, str]]


def digest(readout: Readout) -> int:
    """A number that tells different data of a timepoint apart."""
    return zlib.crc32(readout.data.tobytes())


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
        """Number of the trajectory that is the same but for rounding, or a new one."""
        tolerance = _SAME * float(np.abs(trajectory).max())
        probe = trajectory[:: max(1, len(trajectory) // 8)].ravel()
        if self._trajectories:
            near = np.abs(self._probes - probe).max(axis=1) <= tolerance
            for number in np.flatnonzero(near):
                if np.abs(self._trajectories[number] - trajectory).max() <= tolerance:
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


#: Share of the timepoints that are kept by themselves, and the fewest that can judge anything.
_HELD, _FEWEST_HELD = 0.1, 5


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Readouts that are kept by themselves, to judge a reconstruction that has not seen them.

    Parameters
    ----------
    readouts
        Complex `(R, V, S)`.
    timepoint, interleaf
        `(R,)`; the interleaf as an index into `SubspaceKspace.bins`.
    """

    readouts: Tensor
    timepoint: Tensor
    interleaf: Tensor


def held_timepoints(n_timepoints: int) -> Tensor:
    """Timepoints to keep: a tenth, scattered irregularly but always the same; none of a short train."""
    shuffled = torch.randperm(n_timepoints, generator=torch.Generator().manual_seed(0))
    n_held = int(_HELD * n_timepoints)
    return shuffled[: n_held if n_held >= _FEWEST_HELD else 0].sort().values


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
    held
        Some of the readouts by themselves, as well; ``None`` if none were to be kept.
    """

    bins: Tensor
    gram: Tensor
    interleaves: NDArray[np.int64]
    matrix: Tensor
    note: str = ""
    held: HeldOut | None = None

    def scaled(self, factor: float) -> SubspaceKspace:
        """The same data in another unit."""
        held = self.held and replace(self.held, readouts=self.held.readouts * factor)
        return replace(self, bins=self.bins * factor, held=held)


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
    keep_held
        Whether a tenth of the readouts is also kept by itself.
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
        keep_held: bool = False,
        block: int = BLOCK,
    ) -> None:
        C, S = first.data.shape
        self.head: np.void = first.head.copy()
        self._staging = np.empty((block, C, S), dtype=np.complex64)
        self._staged = 0
        self._whitening = whitening
        self._choose = compress
        self._device = device
        self._matrix: Tensor | None = None  # whitening and compression in one, (V, C)
        self._note = ""
        self._rows: list[Tensor] = []  # blocks (R, V, S) that are not folded yet
        self._heads: list[np.void] = []  # of rows and staged readouts that are not placed yet
        self._digests: list[int] = []
        self._interleaf: list[int] = []
        self._timepoint: list[int] = []  # -1: not used
        self._seen: dict[int, int] = {}  # timepoint -> digest of its data
        self._bins: Tensor | None = None
        self._gram: Tensor | None = None
        self._keep_held = keep_held
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []  # readouts, timepoints, interleaves
        self._place: Callable[[NDArray[np.void]], NDArray[np.int64]] | None = None
        self._n_timepoints = 0
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
    def n_seen(self) -> int:
        """Distinct timepoints that have come."""
        return len(self._seen)

    @property
    def digests(self) -> NDArray[np.int64]:
        """`(T,)` digest of the data of each timepoint, -1 where none came."""
        digests = np.full(self._n_timepoints, -1, dtype=np.int64)
        digests[list(self._seen)] = list(self._seen.values())
        return digests

    def add(self, readout: Readout, interleaf: int, tally: Tally) -> None:
        """Take over one readout; it is copied."""
        self._staging[self._staged] = readout.data
        self._staged += 1
        self.n_arrived += 1
        last = bool(readout.flags & (Flag.LAST_IN_SLICE | Flag.LAST_IN_MEASUREMENT))
        self._n_flags += last
        self.flagged = last and self._n_flags == 1
        self._heads.append(readout.head.copy())
        self._digests.append(digest(readout))
        self._interleaf.append(interleaf)
        if self._place is not None:
            self._place_waiting(tally)
        if self._staged == len(self._staging):
            self._compress()

    def number_timepoints(
        self, place: Callable[[NDArray[np.void]], NDArray[np.int64]], n_timepoints: int, tally: Tally
    ) -> None:
        """From now on timepoints are known: `place` maps headers to them."""
        self._place, self._n_timepoints = place, n_timepoints
        self._place_waiting(tally)

    def _place_waiting(self, tally: Tally) -> None:
        assert self._place is not None
        if not self._heads:
            return
        first, number = len(self._timepoint), int(self.head["idx"]["slice"])
        for offset, t in enumerate(self._place(self.heads).tolist()):
            its_digest = self._digests[first + offset]
            if not 0 <= t < self._n_timepoints:
                tally.lose("with a timepoint outside the train were dropped", number)
                t = -1
            elif t in self._seen:
                same = self._seen[t] == its_digest
                tally.lose(
                    "came twice" if same else "came again with other data; the first one counts", number
                )
                t = -1
            else:
                self._seen[t] = its_digest
            self._timepoint.append(t)
        self._heads.clear()

    def _compress(self) -> None:
        """Move the staged readouts to the compressed rows."""
        if not self._staged:
            return
        block = torch.from_numpy(self._staging[: self._staged]).to(self._device)
        if self._matrix is None:
            white = block if self._whitening is None else self._whitening.to(block) @ block
            numbers = np.array(self._interleaf[-self._staged :], dtype=np.int64)
            compression, self._note = self._choose(white, lambda: self.interleaves.stack(numbers))
            self._matrix = compression if self._whitening is None else compression @ self._whitening.to(block)
        self._rows.append(self._matrix @ block)
        self._staged = 0

    def fold(self, basis: Tensor) -> None:
        """Fold all compressed rows into the subspace and free them."""
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
        kept = held_timepoints(len(basis)).to(self._device)
        for rows in self._rows:
            t, i = timepoint[start : start + len(rows)], interleaf[start : start + len(rows)]
            used = t >= 0
            if self._keep_held:
                held = torch.isin(t, kept)
                self._held.append((rows[held], t[held], i[held]))
            fold(self._bins, rows[used], t[used], i[used], basis)
            fold_gram(self._gram, t[used], i[used], basis)
            start += len(rows)
        self._rows.clear()
        # What is left belongs to readouts that are still staged.
        self._timepoint, self._interleaf, self._digests = (
            values[n_rows:] for values in (self._timepoint, self._interleaf, self._digests)
        )

    def finish(self, basis: Tensor) -> SubspaceKspace:
        """Fold what is left and hand the slice over."""
        self._compress()
        self.fold(basis)
        assert self._bins is not None
        assert self._gram is not None
        assert self._matrix is not None
        visited = torch.nonzero(self._gram.diagonal(dim1=1, dim2=2).abs().sum(1) > 0)[:, 0]
        bins, gram = self._bins, self._gram
        if len(visited) < len(bins):
            bins, gram = bins[visited], gram[visited]
        held = None
        if sum(len(t) for _, t, _ in self._held):
            readouts, timepoint, interleaf = (torch.cat(parts) for parts in zip(*self._held, strict=True))
            # Numbers of interleaves become places among those that were visited.
            held = HeldOut(readouts, timepoint, torch.searchsorted(visited, interleaf))
        return SubspaceKspace(bins, gram, visited.cpu().numpy(), self._matrix, self._note, held)
