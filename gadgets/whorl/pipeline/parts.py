"""Where a readout belongs: slice, repetition of the scan, timepoint.

Letters: T timepoints, R readouts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from whorl.config import Settings
from whorl.kspace.slicebuffer import Damage, SliceBuffer
from whorl.pipeline.agreement import Agreement
from whorl.pipeline.completeness import has_enough, is_whole
from whorl.pipeline.interleaving import Interleaving
from whorl.pipeline.losses import AGAIN, BEHIND, COPIED, LATE, OTHER, OUT, TWICE
from whorl.pipeline.protocol import Protocol
from whorl.scan.failure import ScanError
from whorl.scan.integrity import Tally

#: Share of timepoints outside the train above which the train cannot be the right one.
_OUTSIDE = 0.1
#: Slices that can be open at once: damaged slice numbers must not fill the memory.
_MOST_OPEN = 1024
#: Timepoints that must have come again before they are taken for a repetition of the scan.
_REPEATED = 16


@dataclass(slots=True, eq=False)
class Part:
    """One slice in one repetition of the scan.

    Parameters
    ----------
    slice_number
        As the readouts say.
    tag
        Values of the counters that number repetitions.
    buffer
        Its readouts; ``None`` once they were handed over or given up.
    seen
        Digest of the data of each timepoint that came.
    digests
        The same digests.
    repetition
        0 for the first; -1 as long as it may be made of damaged readouts alone.
    lost
        Why readouts are missing, as far as is known when it is handed over.
    """

    slice_number: int
    tag: tuple[int, ...] = ()
    buffer: SliceBuffer | None = None
    seen: dict[int, int] = field(default_factory=dict)
    digests: set[int] = field(default_factory=set)
    repetition: int = -1
    closed: bool = False
    lost: str = ""

    def __str__(self) -> str:
        number = f"slice {self.slice_number}"
        return f"{number}, repetition {self.repetition}" if self.repetition > 0 else number

    @property
    def n_arrived(self) -> int:
        """Readouts that are kept for it."""
        return self.buffer.n_arrived if self.buffer is not None else 0

    @property
    def n_waiting(self) -> int:
        """Those whose timepoint is not known yet."""
        return self.buffer.n_waiting if self.buffer is not None else 0


class Parts:
    """The slices that have come, each in one or more repetitions, and which of them a readout belongs to.

    As long as timepoints are not known, a slice has one part.

    Parameters
    ----------
    tally
        Counts readouts that are not used.
    settings
        See `whorl.config.Settings`.
    """

    def __init__(self, tally: Tally, settings: Settings) -> None:
        self._tally, self._settings = tally, settings
        self._parts: dict[int, list[Part]] = {}
        self._protocol: Protocol | None = None
        self._agreement: Agreement | None = None
        #: Repetitions that have come, by slice.
        self.n_repetitions: Counter[int] = Counter()
        #: Imaging readouts that have come.
        self.n_readouts = 0

    def __iter__(self) -> Iterator[Part]:
        return (part for parts in self._parts.values() for part in parts)

    def has(self, number: int) -> bool:
        """Whether readouts of a slice have come."""
        return number in self._parts

    @property
    def slices(self) -> list[int]:
        """Numbers of the slices, in the order in which they came."""
        return list(self._parts)

    @property
    def open(self) -> list[Part]:
        """Those that are not handed over yet."""
        return [part for part in self if part.buffer is not None]

    def latest_open(self, number: int) -> Part | None:
        """The latest part of a slice that is not handed over, those of a few damaged readouts aside."""
        parts = [part for part in self._parts.get(number, []) if part.buffer is not None]
        if self._protocol is not None:
            confirmed = [part for part in parts if part.repetition >= 0]
            if self._protocol.counter == "arrival" and len(confirmed) < len(parts):
                return None  # more came than a train has
            parts = confirmed
        return parts[-1] if parts else None

    def n_again(self, part: Part) -> int:
        """Timepoints that came again in its slice, too few for a repetition."""
        others = (p for p in self._parts[part.slice_number] if p is not part)
        return sum(len(p.seen) for p in others if p.repetition < 0)

    def has_enough(self, part: Part) -> bool:
        """Whether a part that is over is of use."""
        assert self._protocol is not None
        self.judge(part)
        return has_enough(len(part.seen), part.n_arrived, self._protocol, self._settings.min_readouts)

    def judge(self, part: Part) -> None:
        """Damaged readouts are missing."""
        if part.buffer is None:
            return
        for t, damage in part.buffer.judge():
            if not self._is_dark(t, damage):
                part.digests.discard(part.seen.pop(t))
                self._lose_damaged(damage, part.slice_number)

    def see(self, part: Part, timepoint: int, its_digest: int) -> bool:
        """Take notice of a timepoint of a part; gives whether its data are its own.

        Noise makes them different: those of another timepoint were sent from a buffer that was not filled.
        """
        if its_digest and its_digest in part.digests:
            self._tally.lose(COPIED, part.slice_number)
            return False
        part.seen[timepoint] = its_digest
        part.digests.add(its_digest)
        return True

    def _is_dark(self, timepoint: int, damage: Damage) -> bool:
        """Whether a readout has no data because nothing was excited: without noise these are zeros."""
        assert self._protocol is not None
        return damage is Damage.ZEROS and not self._protocol.train.flip_deg[timepoint]

    def _lose_damaged(self, damage: Damage, number: int) -> None:
        self._tally.lose(f"{damage} were dropped", number)

    # --- One readout ---------------------------------------------------------------------------

    def place(self, head: np.void, its_digest: int) -> tuple[Part, int | None] | None:
        """Part and timepoint (``None``: not known yet) of a readout; if it is not used that is counted.

        Raises
        ------
        ScanError
            If it contradicts the train, or too many do not belong to it.
        """
        number, heads, protocol = int(head["idx"]["slice"]), np.array([head]), self._protocol
        parts = self._parts.get(number, [])
        timepoint: int | None = None
        tag: tuple[int, ...] = ()
        if protocol is None:
            part = parts[0] if parts else None
        elif protocol.counter == "arrival":
            # What comes after a whole train begins a repetition, or is too much: the end tells.
            n = protocol.n_measured
            part = next((p for p in parts if p.buffer is not None and p.n_arrived < n), None)
            n_arrived = np.array([part.n_arrived if part is not None else 0])
            timepoint = self._compared(heads, protocol.resolved.numbering.timepoints(n_arrived))
        else:
            timepoint = self._compared(heads, protocol.resolved.timepoints(heads))
            if not 0 <= timepoint < protocol.train.n_timepoints:
                self._lose_outside(protocol, timepoint, number)
                self._check_outside(protocol)
                return None
            tag = protocol.tag(head)
            mine = [part for part in parts if part.tag == tag]
            if any(part.seen.get(timepoint) == its_digest for part in mine):
                self._tally.lose(TWICE, number)
                return None
            part = next((p for p in mine if not p.closed and timepoint not in p.seen), None)
        part = part or self._begin(number, tag)
        return None if part is None else (part, timepoint)

    def _compared(self, heads: NDArray[np.void], timepoint: NDArray[np.int64]) -> int:
        """The timepoint `(1,)` of a readout, which is compared with the train."""
        assert self._agreement is not None
        self._agreement.check(heads, timepoint)
        return int(timepoint[0])

    def _begin(self, number: int, tag: tuple[int, ...]) -> Part | None:
        if len(self.open) >= _MOST_OPEN:
            self._tally[f"beyond {_MOST_OPEN} slices that were open at once were dropped"] += 1
            return None
        part = Part(number, tag)
        self._parts.setdefault(number, []).append(part)
        return part

    def _lose_outside(self, protocol: Protocol, timepoint: int, number: int) -> None:
        behind = self._settings.timepoints and timepoint >= protocol.train.n_timepoints
        self._tally.lose(BEHIND if behind else OUT, number)

    def _check_outside(self, protocol: Protocol) -> None:
        T = protocol.train.n_timepoints
        if self._tally[OUT] > max(_OUTSIDE * max(T, self.n_readouts), 1):
            raise ScanError(
                f"more than {_OUTSIDE:.0%} of the timepoints lie outside the train of {T} "
                f"({protocol.train.source}): it cannot be the one that was played. Set property sequence"
            )

    # --- Repetitions ---------------------------------------------------------------------------

    def confirm(self, part: Part) -> list[Part]:
        """Take a part for a repetition once enough of it has come.

        Gives those before it that are of use: they are over by that.
        """
        assert self._protocol is not None
        others = [p for p in self._parts[part.slice_number] if p is not part]
        if others and len(part.seen) < min(_REPEATED, self._protocol.n_measured):
            return []
        self._number(part)
        before = [p for p in others if p.repetition >= 0 and not p.closed]
        for other in before:
            other.closed = True
        return [p for p in before if p.buffer is not None and self.has_enough(p)]

    def _number(self, part: Part) -> None:
        part.repetition = self.n_repetitions[part.slice_number]
        self.n_repetitions[part.slice_number] += 1

    # --- Readouts that waited ------------------------------------------------------------------

    def adopt(self, protocol: Protocol, agreement: Agreement) -> None:
        """From now on timepoints are known; `sort` tells those of the readouts that have come."""
        self._protocol, self._agreement = protocol, agreement

    def sort(self, number: int, interleaving: Interleaving) -> list[Part]:
        """Parts and timepoints of all readouts of a slice that came before they were known.

        Gives the parts that are complete.
        """
        protocol = self._protocol
        assert protocol is not None
        (first,) = self._parts.pop(number)
        assert first.buffer is not None
        parts, part_of, timepoint = self._sorted(protocol, number, first.buffer)
        buffers = [first.buffer] if len(parts) == 1 else first.buffer.divide(part_of)
        self._parts[number] = parts
        for p, (part, buffer) in enumerate(zip(parts, buffers, strict=True)):
            chosen = timepoint[part_of == p]
            buffer.number_timepoints(chosen, interleaving.of_timepoints(chosen, buffer))
            part.buffer = buffer
        self._check_outside(protocol)
        fullest = max(parts, key=lambda p: len(p.seen))
        confirmed = [p for p in parts if p is fullest or len(p.seen) >= min(_REPEATED, protocol.n_measured)]
        for part in confirmed:
            self._number(part)
            part.closed = part is not confirmed[-1]
        return [p for p in confirmed if is_whole(len(p.seen), protocol) or (p.closed and self.has_enough(p))]

    def _sorted(
        self, protocol: Protocol, number: int, buffer: SliceBuffer
    ) -> tuple[list[Part], NDArray[np.int64], NDArray[np.int64]]:
        """Parts, and for each readout the place of its own among them and its timepoint, both `(R,)`."""
        buffer.judge()
        heads, digests = buffer.heads, buffer.waiting_digests
        parts: list[Part] = []
        part_of, timepoint = np.zeros(len(heads), dtype=np.int64), np.full(len(heads), -1, dtype=np.int64)
        by_arrival = protocol.counter == "arrival"
        if by_arrival:
            expected, n = protocol.n_measured, np.arange(len(heads))
            whole = not len(heads) % expected
            t_of = protocol.resolved.numbering.timepoints(n % expected if whole else n)
        else:
            t_of = protocol.resolved.timepoints(heads)
        assert self._agreement is not None
        self._agreement.check(heads, t_of)
        for r, (t, its_digest) in enumerate(zip(t_of.tolist(), digests, strict=True)):
            tag = protocol.tag(heads[r])
            mine = [part for part in parts if part.tag == tag]
            inside = 0 <= t < protocol.train.n_timepoints
            damage = buffer.damaged_waiting.get(r)
            if damage is not None and inside and self._is_dark(t, damage):
                damage = None
            inside = inside and damage is None
            twice = inside and any(p.seen.get(t) == its_digest for p in mine)
            part = next((p for p in mine if not inside or twice or t not in p.seen), None)
            if part is None:
                part = Part(number, tag)
                parts.append(part)
            part_of[r] = parts.index(part)
            if damage is not None:
                self._lose_damaged(damage, number)
            elif not inside:
                self._lose_outside(protocol, t, number)
            elif twice and not by_arrival:
                self._tally.lose(TWICE, number)
            elif twice or self.see(part, t, its_digest):
                timepoint[r] = t
        return parts, part_of, timepoint

    # --- The end -------------------------------------------------------------------------------

    def drop_strangers(self, number: int) -> list[Part]:
        """The parts of a slice without those that a few damaged readouts made, which are counted."""
        parts = self._parts[number]
        fullest = max(parts, key=lambda p: len(p.seen))
        strangers = [p for p in parts if p.repetition < 0 and p is not fullest]
        for part in strangers:
            self._count_stranger(part, fullest)
            part.buffer = None
        if fullest.repetition < 0:
            self._number(fullest)
        self._parts[number] = [p for p in parts if p not in strangers]
        return self._parts[number]

    def _count_stranger(self, part: Part, fullest: Part) -> None:
        assert self._protocol is not None
        if self._protocol.counter != "arrival":
            for t in part.seen:
                same = AGAIN if t in fullest.seen else LATE
                self._tally.lose(same if part.tag == fullest.tag else OTHER, part.slice_number)
        elif fullest.buffer is not None:
            fullest.buffer.n_arrived += part.n_arrived  # too many are as wrong as too few
        else:
            self._tally["came after their slice was complete and were dropped"] += part.n_arrived
