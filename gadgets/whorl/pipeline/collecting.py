"""Slices while they arrive: which readout belongs to which slice and repetition, and when one is complete.

Letters: T timepoints, C coils, R readouts, S samples.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.config import Settings
from whorl.kspace.coils import NoiseStatistics, dependent_coils, whitening_matrix
from whorl.kspace.outliers import has_noise_spikes
from whorl.kspace.slicebuffer import BLOCK, SliceBuffer, digest
from whorl.pipeline.encoding import ROVIR_BLOCK, make_compression
from whorl.pipeline.protocol import Protocol, Sources, settle
from whorl.scan import resolve
from whorl.scan.arrivals import Placed, ScanCounter
from whorl.scan.failure import ScanError
from whorl.scan.integrity import Tally
from whorl.scan.readout import Flag, Readout

_logger = logging.getLogger("whorl")

#: Share of timepoints outside the train above which the train cannot be the right one.
_OUTSIDE = 0.1
#: Readouts of one slice that are kept at most while its train is not known.
_LONGEST_TRAIN = 10_000
#: Slices that can be open at once: damaged slice numbers must not fill the memory.
_MOST_OPEN = 1024
#: Timepoints that must have come again before they are taken for a repetition of the scan.
_REPEATED = 16
#: Reasons of the tally that are no loss.
HARMLESS = ("came twice", "lie behind the timepoints that are used")
_STRAY = "of a slice that the header does not announce were dropped"
_TWICE, _BEHIND = HARMLESS
_AGAIN = "came again with other data; the first one counts"
_LATE = "came after their slice was over and were dropped"
_OUT = "with a timepoint outside the train were dropped"
_OTHER = "of another repetition were dropped"
_SPIKED = "with spikes were dropped"


class Report:
    """What is said about a scan, and what of it counts at the end.

    Parameters
    ----------
    log
        Takes (level, text) with level ``DBG``, ``WRN`` or ``ERR``.
    """

    def __init__(self, log: Callable[[str, str], None]) -> None:
        self.say = log
        self.failures: list[str] = []
        self.notes: list[str] = []
        self.of_each_slice: list[str] = []

    def note(self, text: str, *, each_slice: bool = False) -> None:
        """Something is degraded, or made in another way than asked for."""
        self.notes.append(text)
        if each_slice:
            self.of_each_slice.append(text)
        self.say("WRN", text)

    def fail(self, text: str) -> None:
        """Something is not delivered."""
        self.failures.append(text)
        self.say("ERR", text)


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
    repetition
        0 for the first; -1 as long as it may be made of damaged readouts alone.
    lost
        Why readouts are missing, as far as is known when it is handed over.
    """

    slice_number: int
    tag: tuple[int, ...] = ()
    buffer: SliceBuffer | None = None
    seen: dict[int, int] = field(default_factory=dict)
    repetition: int = -1
    closed: bool = False
    lost: str = ""

    def __str__(self) -> str:
        number = f"slice {self.slice_number}"
        return f"{number}, repetition {self.repetition}" if self.repetition > 0 else number


class Collector:
    """Takes readouts and hands slices over when they are complete.

    Parameters
    ----------
    sources
        What is known of the scan.
    settings
        See `whorl.config.Settings`.
    device
        Where the data are kept.
    tally
        Counts readouts that are not used; that of `whorl.scan.integrity.usable`.
    report
        Takes what is found and what is wrong.
    settled
        Takes the protocol, before any slice is handed over.
    complete
        Takes a slice whose buffer is full; it is not kept here.
    basis
        Gives the temporal basis once it is ready, ``None`` before: then slices are folded while they arrive.
    keep_held
        Whether a tenth of the readouts is also kept by itself.
    """

    def __init__(
        self,
        sources: Sources,
        settings: Settings,
        device: torch.device,
        tally: Tally,
        report: Report,
        *,
        settled: Callable[[Protocol], None],
        complete: Callable[[Part, SliceBuffer], None],
        basis: Callable[[], Tensor | None],
        keep_held: bool,
    ) -> None:
        self.sources, self._settings, self._device = sources, settings, device
        self._tally, self._report = tally, report
        self._settled, self._complete, self._basis = settled, complete, basis
        self._keep_held = keep_held
        self._compress = make_compression(sources, settings)
        self.protocol: Protocol | None = None
        self.noise = NoiseStatistics()
        self.whitening: Tensor | None = None
        self.scan_counter = ScanCounter()
        self.receiver: Tensor | None = None
        self._places: Placed | None = None
        self._parts: dict[int, list[Part]] = {}
        self._attributed: dict[int, Counter[str]] = {}  # losses that a repetition before has been told
        self._n_repetitions: Counter[int] = Counter()  # by slice
        self._latest: int | None = None
        # A slice that one readout has named since, and whether it was known before.
        self._other: tuple[int, bool] | None = None
        self._interleaved = False
        self._n_imaging = 0
        self._compared: NDArray[np.bool_] | None = None

    @property
    def open_parts(self) -> list[Part]:
        """Those that are not handed over yet."""
        return [part for parts in self._parts.values() for part in parts if part.buffer is not None]

    # --- Arrival -------------------------------------------------------------------------------

    def add(self, readout: Readout) -> None:
        """Take one readout; its arrays are copied."""
        if readout.flags & Flag.IS_NOISE_MEASUREMENT:
            if has_noise_spikes(readout.data):
                self._tally[f"of noise {_SPIKED}"] += 1
            elif self._latest is None:  # later ones would not be used
                self.noise.add(readout.data, float(readout.head["sample_time_us"]))
            return
        number = int(readout.head["idx"]["slice"])
        self._n_imaging += 1
        if self._latest is None:
            self._begin(readout)
            self._latest = number
        self._follow(self._latest, number)
        its_digest = digest(readout)
        timepoint: int | None = None
        if self.protocol is None:
            part = self._first_part(number)
        else:
            found = self._place(self.protocol, readout, its_digest)
            if found is None:
                return
            part, timepoint = found
        if part is None:
            self._tally[f"beyond {_MOST_OPEN} slices that were open at once were dropped"] += 1
            return
        if part.buffer is None:
            part.buffer = self._new_buffer(readout)
        part.buffer.add(readout, self._interleaf(part.buffer, readout, timepoint), timepoint, its_digest)
        if timepoint is not None:
            part.seen[timepoint] = its_digest
        if self.protocol is None:
            if part.buffer.n_waiting > _LONGEST_TRAIN:
                self._adopt(settle(self.sources, part.buffer.heads, self._settings), part)
            elif self._may_be_complete(part.buffer):
                self._try_to_settle(part)
            return
        self._after(self.protocol, part)

    def _after(self, protocol: Protocol, part: Part) -> None:
        """Hand a slice over if it is complete, or fold it."""
        assert part.buffer is not None
        if part.repetition < 0:
            self._confirm(protocol, part)
        if len(part.seen) == protocol.n_measured and protocol.counter != "arrival":
            self._judge(part)
        if len(part.seen) == protocol.n_measured and protocol.counter != "arrival":
            self._finish(part)
        elif (
            len(part.buffer.interleaves) * (self._settings.n_coefficients or 10) < protocol.n_measured
            and (basis := self._basis()) is not None
        ):
            part.buffer.fold(basis, self.receiver)  # folded, the slice takes less memory than raw

    def _begin(self, first: Readout) -> None:
        self.sources = self.sources.with_first(first)
        if self.sources.by_timepoint and self.sources.trajectories is not None:
            self._places = Placed(self.sources.trajectories, replaces=self.sources.replaces)
        self._whiten(first.data.shape[0], float(first.head["sample_time_us"]))

    def _first_part(self, number: int) -> Part | None:
        """The slice's only part, as long as timepoints are not known; ``None`` if there are too many."""
        if number not in self._parts:
            if len(self._parts) >= _MOST_OPEN:
                return None
            self._parts[number] = [Part(number)]
        return self._parts[number][0]

    def _new_buffer(self, readout: Readout) -> SliceBuffer:
        return SliceBuffer(
            readout,
            self.whitening,
            self._compress,
            self._device,
            keep_held=self._keep_held,
            block=ROVIR_BLOCK if self._settings.compression == "rovir" else BLOCK,
        )

    def _interleaf(self, buffer: SliceBuffer, readout: Readout, timepoint: int | None) -> int:
        if self._places is None:
            return buffer.interleaves.number(readout.trajectory)
        return 0 if timepoint is None else int(self._interleaves_of(buffer, np.array([timepoint]))[0])

    def _interleaves_of(self, buffer: SliceBuffer, timepoint: NDArray[np.int64]) -> NDArray[np.int64]:
        """Interleaf of each timepoint whose trajectory is not attached."""
        assert self._places is not None
        table = self._places.of_size(buffer.head)
        numbers = np.zeros(len(timepoint), dtype=np.int64)
        for n, t in enumerate(timepoint.tolist()):
            if t < 0:
                continue
            places = table.interleaf(t)
            if places is None:
                raise ScanError(
                    f"the trajectory ({table.source}) has {len(table)} timepoints, the readouts have "
                    f"timepoint {t}: expected one for each"
                )
            numbers[n] = buffer.interleaves.number(places.astype(np.float32))
        return numbers

    def _may_be_complete(self, buffer: SliceBuffer) -> bool:
        """Whether a slice's timepoints have all come, as far as can be told while it still arrives.

        Counts that contradict each other, or a flag alone, do not tell: then the next slice does.
        """
        announced = self._announced()
        if self._settings.timepoint == "arrival":
            return False
        if self.sources.pulseq is not None:  # which knows how many there are
            return buffer.n_waiting >= self._expected()
        if announced < 2 or buffer.n_waiting < announced:
            return False
        early = self.sources.train
        return buffer.flagged if early is None else self._expected() == announced

    def _announced(self) -> int:
        """Readouts of a slice by the header."""
        announced, measured = self.sources.header.n_timepoints_announced, self._settings.timepoints
        return min(announced, measured) if measured else announced

    def _expected(self) -> int:
        """Readouts of a slice by its train, as far as that is known; else by the header."""
        train, pulseq = self.sources.train, self.sources.pulseq
        if train is None:
            return self._settings.timepoints or self._announced()
        T = min(self._settings.timepoints or train.n_timepoints, train.n_timepoints)
        return T if pulseq is None else int(pulseq.measured[:T].sum())

    def _follow(self, latest: int, number: int) -> None:
        """Notice where the slice changes.

        One readout between two of the same slice changes nothing: its slice number may be damaged.
        """
        if self._other is not None and number != latest:
            other, known = self._other
            self._leave(latest, known)
            self._latest = latest = other
        self._other = None
        if number != latest:
            self._other = number, number in self._parts

    def _leave(self, number: int, to_known: bool) -> None:
        """Another slice has followed, perhaps one that was there before: the one before may be over."""
        self._interleaved |= to_known
        part = self._open_part(number)
        if part is None or self._interleaved:
            return
        assert part.buffer is not None
        if self.protocol is None:
            # A flag is believed if as much came as was announced.
            waiting = part.buffer.n_waiting
            believed = part.buffer.flagged and waiting >= resolve.COVERAGE * self._announced()
            if believed or waiting >= max(self._expected(), 2):
                self._try_to_settle(part)
                part = self._open_part(number)
        if self.protocol is None or part is None or part.buffer is None:
            return
        T = self.protocol.n_measured
        self._judge(part)
        if self.protocol.counter == "arrival":
            over = part.buffer.n_arrived == T
        else:
            share = self._settings.min_readouts
            over = len(part.seen) >= (share if part.buffer.flagged else max(share, resolve.COVERAGE)) * T
        if over:
            self._finish(part)

    def _open_part(self, number: int) -> Part | None:
        """The latest part of a slice that is not handed over, those of a few damaged readouts aside."""
        parts = [part for part in self._parts.get(number, []) if part.buffer is not None]
        if self.protocol is not None:
            confirmed = [part for part in parts if part.repetition >= 0]
            if self.protocol.counter == "arrival" and len(confirmed) < len(parts):
                return None  # more came than a train has
            parts = confirmed
        return parts[-1] if parts else None

    # --- Slices and repetitions ----------------------------------------------------------------

    def _place(self, protocol: Protocol, readout: Readout, its_digest: int) -> tuple[Part | None, int] | None:
        """Part and timepoint of a readout; no part if there are too many, ``None`` if it is not used."""
        head = readout.head
        number = int(head["idx"]["slice"])
        parts, tag = self._parts.get(number, []), protocol.tag(head)
        mine = [part for part in parts if part.tag == tag]
        if protocol.counter == "arrival":
            return self._place_by_arrival(protocol, parts, head)
        t = int(protocol.resolved.timepoints(np.array([head]))[0])
        self._compare(protocol, head, t)
        if not 0 <= t < protocol.train.n_timepoints:
            self._tally.lose(self._why_outside(protocol, t), number)
            self._check_outside(protocol)
            return None
        if any(part.seen.get(t) == its_digest for part in mine):
            self._tally.lose(_TWICE, number)
            return None
        part = next((p for p in mine if not p.closed and t not in p.seen), None)
        return part or self._new_part(number, tag), t

    def _place_by_arrival(
        self, protocol: Protocol, parts: list[Part], head: np.void
    ) -> tuple[Part | None, int] | None:
        """As `_place`; what comes after a whole train begins a repetition, or is too much: the end tells."""
        number, T = int(head["idx"]["slice"]), protocol.n_measured
        part = next((p for p in parts if p.buffer is not None and p.buffer.n_arrived < T), None)
        n_arrived = part.buffer.n_arrived if part is not None and part.buffer is not None else 0
        t = int(protocol.resolved.numbering.timepoints(np.array([n_arrived]))[0])
        self._compare(protocol, head, t)
        return part or self._new_part(number, ()), t

    def _new_part(self, number: int, tag: tuple[int, ...]) -> Part | None:
        if len(self.open_parts) >= _MOST_OPEN:
            return None
        part = Part(number, tag)
        self._parts.setdefault(number, []).append(part)
        return part

    def _confirm(self, protocol: Protocol, part: Part) -> None:
        """Take a part for a repetition once enough of it has come, and those before it for over."""
        others = [p for p in self._parts[part.slice_number] if p is not part]
        needed = min(_REPEATED, protocol.n_measured)
        if others and len(part.seen) < needed:
            return
        part.repetition = self._n_repetitions[part.slice_number]
        self._n_repetitions[part.slice_number] += 1
        for other in others:
            if other.closed or other.repetition < 0:
                continue
            other.closed = True
            if other.buffer is not None and self._has_enough(protocol, other):
                self._finish(other)

    def _judge(self, part: Part) -> None:
        """Readouts with spikes are missing."""
        assert part.buffer is not None
        for t in part.buffer.judge():
            del part.seen[t]
            self._tally.lose(_SPIKED, part.slice_number)

    def _has_enough(self, protocol: Protocol, part: Part) -> bool:
        assert part.buffer is not None
        self._judge(part)
        if protocol.counter == "arrival":
            return part.buffer.n_arrived == protocol.n_measured
        return len(part.seen) >= self._settings.min_readouts * protocol.n_measured

    def _compare(self, protocol: Protocol, head: np.void, t: int) -> None:
        """Compare a readout with the train, unless a property says what the train is."""
        if self._compared is not None and 0 <= t < len(self._compared) and self._compared[t]:
            resolve.check_agreement(protocol.train, np.array([head]), np.array([t]))

    def _why_outside(self, protocol: Protocol, t: int) -> str:
        behind = self._settings.timepoints and t >= protocol.train.n_timepoints
        return _BEHIND if behind else _OUT

    def _check_outside(self, protocol: Protocol) -> None:
        T = protocol.train.n_timepoints
        outside = self._tally[_OUT]
        if outside > max(_OUTSIDE * max(T, self._n_imaging), 1):
            raise ScanError(
                f"more than {_OUTSIDE:.0%} of the timepoints lie outside the train of {T} "
                f"({protocol.train.source}): it cannot be the one that was played. Set property sequence"
            )

    def _whiten(self, n_coils: int, dwell_us: float) -> None:
        """Whitening matrix of the noise readouts that came before the first image data."""
        n_readouts = self.noise.n_usable(n_coils)
        if others := self.noise.n_readouts - n_readouts:
            self._tally[f"of noise, which have not the {n_coils} coils of the image data, were dropped"] += (
                others
            )
        if self._settings.whiten == "off" or not self.noise.n_readouts:
            why = "whiten=off" if self._settings.whiten == "off" else "no noise readouts"
            self._report.say("DBG", f"not whitened: {why}")
            return
        bandwidth = self._settings.noise_bandwidth or self.sources.header.noise_bandwidth or 1.0
        try:
            covariance = self.noise.covariance(n_coils, dwell_us, bandwidth)
            self.whitening = whitening_matrix(covariance).to(self._device, torch.complex64)
        except ValueError as error:
            self._report.note(f"{error}: not whitened", each_slice=True)
            return
        noise_dwell_us = self.noise.dwell_us(n_coils)
        scaled = (
            f"noise of {noise_dwell_us:g} µs scaled to {dwell_us:g} µs, relative bandwidth {bandwidth:g}"
            if noise_dwell_us and dwell_us > 0
            else "noise not scaled, its dwell time or that of the data is not known"
        )
        self._report.say("DBG", f"{n_coils} coils whitened by {n_readouts} noise readouts; {scaled}")
        if dropped := dependent_coils(covariance):
            listed = ", ".join(str(coil) for coil in dropped)
            self._report.note(
                f"of {n_coils} coils, {listed} (counted from 0) "
                f"{'was' if len(dropped) == 1 else 'were'} dropped: without noise of their own, "
                f"they are dead or copies of others",
                each_slice=True,
            )

    # --- Train and timepoints ------------------------------------------------------------------

    def _try_to_settle(self, part: Part) -> None:
        assert part.buffer is not None
        try:
            protocol = settle(self.sources, part.buffer.heads, self._settings)
        except ScanError as error:
            # The slice may not be complete yet; at the end the error counts.
            _logger.debug("not resolved yet: %s", error)
            return
        self._adopt(protocol, part)

    def _adopt(self, protocol: Protocol, part: Part) -> None:
        """From now on timepoints are known: what has come gets its own, repetitions their parts."""
        assert part.buffer is not None
        train = protocol.train
        self.protocol = protocol
        if protocol.receiver_deg is not None:
            turns = torch.from_numpy(np.deg2rad(protocol.receiver_deg)).to(self._device)
            self.receiver = torch.polar(torch.ones_like(turns), turns).to(torch.complex64)
        self._settled(protocol)
        for warning in protocol.warnings:
            self._report.say("WRN", warning)
        if "interpolated" in train.source:
            self._report.note(f"the train is from {train.source}", each_slice=True)
        if not self.sources.overridden:
            # What was interpolated may turn out otherwise in another slice.
            self._compared = np.full(train.n_timepoints, "interpolated" not in train.source)
            t = protocol.resolved.timepoints(part.buffer.heads)
            self._compared[t[(t >= 0) & (t < train.n_timepoints)]] = True
        for number in list(self._parts):
            self._place_waiting(protocol, number)

    def _place_waiting(self, protocol: Protocol, number: int) -> None:
        """Timepoints of all readouts of a slice that came before they were known."""
        (first,) = self._parts.pop(number)
        assert first.buffer is not None
        first.buffer.judge()
        heads, digests = first.buffer.heads, first.buffer.waiting_digests
        parts: list[Part] = []
        part_of, timepoint = np.zeros(len(heads), dtype=np.int64), np.full(len(heads), -1, dtype=np.int64)
        t_of = protocol.resolved.timepoints(heads)
        if protocol.counter == "arrival":
            expected, n = protocol.n_measured, np.arange(len(heads))
            whole = not len(heads) % expected
            t_of = protocol.resolved.numbering.timepoints(n % expected if whole else n)
        if self._compared is not None:
            known = (t_of >= 0) & (t_of < len(self._compared))
            known[known] = self._compared[t_of[known]]
            resolve.check_agreement(protocol.train, heads[known], t_of[known])
        for r, (t, its_digest) in enumerate(zip(t_of.tolist(), digests, strict=True)):
            tag = protocol.tag(heads[r])
            mine = [part for part in parts if part.tag == tag]
            spiked = r in first.buffer.spiked_waiting
            inside = 0 <= t < protocol.train.n_timepoints and not spiked
            twice = inside and any(p.seen.get(t) == its_digest for p in mine)
            part = next((p for p in mine if not inside or twice or t not in p.seen), None)
            if part is None:
                part = Part(number, tag)
                parts.append(part)
            part_of[r] = parts.index(part)
            if spiked:
                self._tally.lose(_SPIKED, number)
            elif not inside:
                self._tally.lose(self._why_outside(protocol, t), number)
            elif twice and protocol.counter != "arrival":
                self._tally.lose(_TWICE, number)
            else:
                part.seen[t], timepoint[r] = its_digest, t
        buffers = [first.buffer] if len(parts) == 1 else first.buffer.divide(part_of)
        self._parts[number] = parts
        fullest = max(parts, key=lambda p: len(p.seen))
        for p, (part, buffer) in enumerate(zip(parts, buffers, strict=True)):
            chosen = timepoint[part_of == p]
            interleaf = self._interleaves_of(buffer, chosen) if self._places is not None else None
            buffer.number_timepoints(chosen, interleaf)
            part.buffer = buffer
        self._check_outside(protocol)
        for part in parts:
            if part is fullest or len(part.seen) >= min(_REPEATED, protocol.n_measured):
                part.repetition = self._n_repetitions[number]
                self._n_repetitions[number] += 1
        confirmed = [part for part in parts if part.repetition >= 0]
        for part in confirmed:
            part.closed = part is not confirmed[-1]
            complete = len(part.seen) == protocol.n_measured and protocol.counter != "arrival"
            if complete or (part.closed and self._has_enough(protocol, part)):
                self._finish(part)

    # --- Handing over --------------------------------------------------------------------------

    def _finish(self, part: Part) -> None:
        """Hand a part over."""
        buffer = part.buffer
        assert buffer is not None
        part.closed = True
        part.lost = self._lost(part)
        part.buffer = None
        counts = self._tally.of_slice(part.slice_number)
        self._attributed[part.slice_number] = counts
        self._complete(part, buffer)

    def _is_announced(self, number: int) -> bool:
        announced = self.sources.header.n_slices_announced
        return not announced or number < announced

    def _lost(self, part: Part) -> str:
        """What is known of readouts that a part lacks, or had too many of."""
        number = part.slice_number
        counts = self._tally.of_slice(number, but=HARMLESS)
        counts.subtract(
            {k: n for k, n in self._attributed.get(number, Counter()).items() if k not in HARMLESS}
        )
        again = sum(len(p.seen) for p in self._parts[number] if p.repetition < 0 and p is not part)
        if again:
            counts[_AGAIN] += again
        expected = self.protocol.n_measured if self.protocol else self._expected()
        seen = len(part.seen) if self.protocol else part.buffer.n_waiting if part.buffer else 0
        unknown = expected - seen - counts.total()
        strays = sum(
            p.buffer.n_arrived for p in self.open_parts if p.buffer and not self._is_announced(p.slice_number)
        )
        if self._is_announced(number) and min(unknown, strays) > 0:
            counts[_STRAY] = min(unknown, strays)
        return ", ".join(f"{n} {reason.removesuffix(' were dropped')}" for reason, n in counts.items() if n)

    def finish(self, ended_early: str) -> None:
        """The stream is over: hand over what is open, or say why not.

        Raises
        ------
        ScanError
            If there is nothing at all, or train or timepoints cannot be told.
        """
        if not self._parts:
            lost = "; ".join(self._tally.sentences())
            raise ScanError(
                "no imaging readouts arrived"
                + (f" ({self.noise.n_readouts} noise readouts did)" if self.noise.n_readouts else "")
                + (f": {lost}" if lost else "")
                + (f". {ended_early}" if ended_early else "")
            )
        if self.protocol is None:
            self._settle_at_the_end(ended_early)
        protocol = self.protocol
        assert protocol is not None
        if protocol.counter == "arrival" and self.scan_counter.counts and self.scan_counter.n_late:
            raise ScanError(
                f"timepoint=arrival, but {self.scan_counter.sentence()}: expected the order of measurement"
            )
        T = protocol.n_measured
        short: list[tuple[Part, str]] = []
        for number in sorted(self._parts):
            for part in self._drop_strangers(protocol, number):
                if part.buffer is None:
                    continue
                if self._has_enough(protocol, part):
                    self._finish(part)
                    continue
                if protocol.counter == "arrival":
                    why = (
                        f"timepoint=arrival needs exactly one readout for each of {T} timepoints, "
                        f"got {part.buffer.n_arrived}"
                    )
                else:
                    least = f"{self._settings.min_readouts:.0%}"
                    why = f"{len(part.seen)} of {T} timepoints arrived, expected at least {least}"
                lost = self._lost(part)
                short.append((part, f"{why}: {lost}" if lost else why))
        failed = set()
        for part, why in short:
            assert part.buffer is not None
            n_arrived, part.buffer = part.buffer.n_arrived, None
            if self._any_done(but=[p for p, _ in short]) and not self._is_announced(part.slice_number):
                self._tally[_STRAY] += n_arrived
                continue
            failed.add(part.slice_number)
            self._report.fail(f"{part} failed: {why}")
        self._check_announced()

    def _any_done(self, but: list[Part]) -> bool:
        return any(p.buffer is None and p not in but for parts in self._parts.values() for p in parts)

    def _drop_strangers(self, protocol: Protocol, number: int) -> list[Part]:
        """Parts of a slice without those that a few damaged readouts made, which are counted."""
        parts = self._parts[number]
        fullest = max(parts, key=lambda p: len(p.seen))
        kept = []
        for part in parts:
            if part.repetition < 0 and part is not fullest:
                n_arrived, part.buffer = part.buffer.n_arrived if part.buffer else 0, None
                if protocol.counter == "arrival":
                    if fullest.buffer is not None:
                        fullest.buffer.n_arrived += n_arrived  # too many are as wrong as too few
                    else:
                        self._tally["came after their slice was complete and were dropped"] += n_arrived
                    continue
                for t in part.seen:
                    if part.tag != fullest.tag:
                        self._tally.lose(_OTHER, number)
                    else:
                        self._tally.lose(_AGAIN if t in fullest.seen else _LATE, number)
                continue
            if part.repetition < 0:
                part.repetition = self._n_repetitions[number]
                self._n_repetitions[number] += 1
            kept.append(part)
        self._parts[number] = kept
        return kept

    def _check_announced(self) -> None:
        """Say which slices and repetitions are missing that the header announces."""
        header, protocol = self.sources.header, self.protocol
        assert protocol is not None
        missing = sorted(set(range(header.n_slices_announced)) - self._parts.keys())
        if missing:
            listed = ", ".join(str(n) for n in missing[:8])
            self._report.fail(
                f"of {header.n_slices_announced} slices that the header announces, {listed} did not arrive"
            )
        # A limit as long as the train numbers timepoints, in another counter than the one that was taken.
        T = protocol.train.n_timepoints
        announced = [n for name in protocol.repetition if 1 < (n := header.limits.get(name, 0)) != T]
        if len(announced) == 1:
            for number in sorted(self._parts):
                if self._is_announced(number) and 0 < self._n_repetitions[number] < announced[0]:
                    self._report.fail(
                        f"of {announced[0]} repetitions that the header announces, "
                        f"{self._n_repetitions[number]} of slice {number} arrived"
                    )

    def _settle_at_the_end(self, ended_early: str) -> None:
        """By the fullest slice from which train and counter can be told."""
        # Only its text: the error would know this frame, and both would stay until cycles are looked for.
        text = ""
        waiting = {part.slice_number: part for part in self.open_parts}
        for part in sorted(waiting.values(), key=lambda p: -p.buffer.n_waiting if p.buffer else 0):
            assert part.buffer is not None
            try:
                found = settle(self.sources, part.buffer.heads, self._settings)
            except ScanError as error:
                text = text or str(error)
            else:
                self._adopt(found, part)
                return
        T = self._expected()
        fullest = max(waiting.values(), key=lambda p: p.buffer.n_waiting if p.buffer else 0)
        assert fullest.buffer is not None
        most = fullest.buffer.n_waiting
        if lost := self._lost(fullest):
            text = f"{text}; lost were {lost}"
        if most < self._settings.min_readouts * T:
            # That comes first: the counters may not be at fault.
            least = f"{self._settings.min_readouts:.0%}"
            text = f"{most} of {T} timepoints arrived, expected at least {least}: {text}"
        raise ScanError(f"{text}. {ended_early}" if ended_early else text)
