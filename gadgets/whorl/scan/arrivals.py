"""Readouts on their way in: parts of one ADC are joined, prescans told, places looked up, losses noticed.

Each step takes readouts and gives readouts; `whorl.scan.integrity.usable` is the next one.

Letters: C coils, S samples, D trajectory columns, A ADCs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from whorl.scan.failure import ScanError
from whorl.scan.integrity import kept, trimmed
from whorl.scan.readout import NOT_IMAGING, Flag, Readout
from whorl.scan.trajectories import Trajectories

#: Parts of one ADC at most: a counter that goes further numbers something else.
_MOST_PARTS = 64
#: Counters that tell readouts apart, but for the segment.
_OTHERS = (
    "kspace_encode_step_1",
    "kspace_encode_step_2",
    "average",
    "slice",
    "contrast",
    "phase",
    "repetition",
    "set",
)
#: Readouts after a prescan that it is compared with. How far a sample of noise may stand out of its readout:
#: of one coil and 65536 samples by a factor of 17.
_AFTER_PRESCAN, _FLAT = 16, 20.0


class ScanCounter:
    """Watches `scan_counter`, by which a scanner numbers what it measures. It may start anew."""

    def __init__(self) -> None:
        self._n = self._steps = self._equal = self._skipped = 0
        self._latest = 0
        self._back: int | None = None  # where it was before its latest step back
        #: Readouts that came after one with a larger number.
        self.n_late = 0

    def see(self, head: np.void) -> None:
        """Take notice of one readout."""
        number = int(head["scan_counter"])
        step = number - self._latest
        if self._n:
            self._steps += step == 1
            self._equal += step == 0
            if step > 1 and self._back is not None:  # it goes on where it was: that one was late
                self.n_late += 1
                self._skipped += number - self._back - 1 - 1  # what was skipped before it came after all
            elif step > 1:
                self._skipped += step - 1
            if step:
                self._back = self._latest if step < 0 else None
        self._latest = number
        self._n += 1

    @property
    def counts(self) -> bool:
        """Whether nearly all readouts follow each other: else it numbers something else, or nothing."""
        return self._steps > 0 and self._steps >= 0.8 * (self._n - 1 - self._equal)

    @property
    def n_skipped(self) -> int:
        """Numbers that did not come: not sent, or lost."""
        return max(0, self._skipped) if self.counts else 0

    def sentence(self) -> str:
        """What there is to say about it; empty if all is well."""
        parts = []
        if self.n_skipped:
            parts.append(f"leaves out {self.n_skipped} numbers: readouts that were not sent, or lost")
        if self.counts and self.n_late:
            parts.append(f"shows {self.n_late} readouts out of order")
        return f"scan_counter {' and '.join(parts)}" if parts else ""


def watched(readouts: Iterable[Readout], counter: ScanCounter) -> Iterator[Readout]:
    """The same readouts, seen by a counter."""
    for readout in readouts:
        counter.see(readout.head)
        yield readout


def join_segments(readouts: Iterable[Readout], n_parts: int = 0) -> Iterator[Readout]:
    """Join successive readouts that differ in ``idx.segment`` alone: parts of one ADC.

    A scanner's ADC holds a limited number of samples; longer ones come in parts with segments 0, 1, ...
    Each part is trimmed by its own discard_pre and discard_post.

    Parameters
    ----------
    n_parts
        Parts of a readout, if that is known; 0: seen from the first one. A readout is handed on when all
        its parts are there, without waiting for the next.
    """
    parts: list[Readout] = []

    def joined() -> Readout:
        nonlocal parts
        pieces, parts = parts, []
        if len(pieces) == 1:
            return pieces[0]
        pieces = [trimmed(piece) for piece in pieces]
        head = pieces[0].head.copy()
        head["flags"] = np.bitwise_or.reduce([p.head["flags"] for p in pieces])
        data = np.concatenate([p.data for p in pieces], axis=1)
        head["number_of_samples"] = data.shape[1]
        head["discard_pre"] = head["discard_post"] = 0
        return Readout(head, np.concatenate([p.trajectory for p in pieces]), data)

    def follows(readout: Readout) -> bool:
        head, last = readout.head, parts[-1].head
        return (
            int(head["idx"]["segment"]) == int(last["idx"]["segment"]) + 1
            and len(parts) < _MOST_PARTS
            and int(head["user_int"][0]) == int(last["user_int"][0])
            and all(head["idx"][name] == last["idx"][name] for name in _OTHERS)
            and readout.data.shape[0] == parts[-1].data.shape[0]
            and readout.trajectory.shape[1] == parts[-1].trajectory.shape[1]
        )

    for readout in readouts:
        if readout.flags & NOT_IMAGING:
            if parts:
                yield joined()
            yield readout
            continue
        if parts and not follows(readout):
            n_parts = n_parts or len(parts)
            yield joined()
        if not parts and (n_parts == 1 or int(readout.head["idx"]["segment"])):
            if int(readout.head["idx"]["segment"]):
                n_parts = 0 if n_parts == 1 else n_parts  # there are more parts than was thought
            yield readout
            continue
        parts.append(kept(readout))
        if len(parts) == n_parts:
            yield joined()
    if parts:
        yield joined()


def mark_prescan(readouts: Iterable[Readout], n_noise: int) -> Iterator[Readout]:
    """Flag the noise readouts at the start of a scan that are not flagged as such.

    A Pulseq sequence without labels sends its noise prescan as any other readout. The first `n_noise`
    are noise if none of their samples stands out, and in those that follow some do: an echo is short.

    Parameters
    ----------
    n_noise
        ADCs of the sequence before its first pulse.
    """
    waiting: list[Readout] = []
    decided = False
    for readout in readouts:
        if decided or readout.flags & NOT_IMAGING:
            yield readout
            continue
        waiting.append(kept(readout))
        if len(waiting) == n_noise + _AFTER_PRESCAN:
            decided = True
            yield from _with_noise_flags(waiting, n_noise)
            waiting = []
    yield from _with_noise_flags(waiting, n_noise)


def _with_noise_flags(readouts: list[Readout], n_noise: int) -> list[Readout]:
    first, rest = readouts[:n_noise], readouts[n_noise:]
    if first and rest and _outstanding(first) < min(_FLAT, _outstanding(rest) / 2):
        for readout in first:
            readout.head["flags"] |= np.uint64(Flag.IS_NOISE_MEASUREMENT)
    return readouts


def _outstanding(readouts: list[Readout]) -> float:
    """Strongest sample relative to the usual one, in mean square over the coils; median over readouts."""
    power = [np.square(np.abs(r.data)).mean(0) for r in readouts if r.data.size]
    if not power:
        return 1.0
    return float(np.median([p.max() / max(float(np.median(p)), 1e-30) if p.any() else 1.0 for p in power]))


class Placed:
    """Attaches to each readout the trajectory of its arm.

    Parameters
    ----------
    table
        By arm.
    replaces
        Whether what is attached already does not count.
    """

    def __init__(self, table: Trajectories, *, replaces: bool) -> None:
        self._table, self._replaces = table, replaces
        self._sampled: dict[tuple[int, float], Trajectories] = {}

    def sampled(self, readout: Readout) -> Trajectories:
        """The table for readouts like this one, its discarded samples left out."""
        head, S = readout.head, readout.data.shape[1]
        key = (S, float(head["sample_time_us"]))
        if key not in self._sampled:
            if len(self._sampled) > _MOST_PARTS:
                raise ScanError(
                    "the readouts have more than 64 different lengths or dwell times: expected one of each"
                )
            self._sampled[key] = self._table.sampled(*key)
        return self._sampled[key]

    def of_size(self, head: np.void) -> Trajectories:
        """The same, by the header of a readout whose discarded samples are left out already."""
        S = int(head["number_of_samples"])
        key = (S, float(head["sample_time_us"]))
        if key not in self._sampled:
            self._sampled[key] = self._table.sampled(*key)
        table, first = self._sampled[key], int(head["discard_pre"])
        last = max(first, S - int(head["discard_post"]))
        return replace(table, points=table.points[:, first:last])

    def __call__(self, readouts: Iterable[Readout]) -> Iterator[Readout]:
        for readout in readouts:
            attached = readout.trajectory.shape[1] > 0 and not self._replaces
            if attached or readout.flags & NOT_IMAGING or not readout.data.size:
                yield readout
                continue
            places = self.sampled(readout).interleaf(int(readout.head["idx"]["kspace_encode_step_1"]))
            if places is None:
                # Dropped and counted as of the wrong size: its arm number is damaged, or the table too short.
                places = np.zeros((0, 2))
            yield Readout(readout.head, places.astype(np.float32), readout.data, placed=True)
