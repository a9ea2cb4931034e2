"""Slices while they arrive: readouts in, complete slices out.

Letters: T timepoints, C coils, R readouts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.config import Settings
from whorl.kspace.coils import NoiseStatistics
from whorl.kspace.outliers import has_noise_spikes
from whorl.kspace.slicebuffer import BLOCK, Damage, SliceBuffer, digest
from whorl.pipeline.agreement import Agreement
from whorl.pipeline.completeness import (
    SliceChanges,
    has_enough,
    is_whole,
    may_be_complete,
    may_be_over,
    n_expected,
)
from whorl.pipeline.encoding import ROVIR_BLOCK, make_compression
from whorl.pipeline.interleaving import Interleaving
from whorl.pipeline.losses import STRAY, Losses
from whorl.pipeline.parts import Part, Parts
from whorl.pipeline.protocol import Protocol, Sources, settle
from whorl.pipeline.report import Report
from whorl.pipeline.whitening import make_whitening
from whorl.scan import resolve
from whorl.scan.arrivals import ScanCounter
from whorl.scan.failure import ScanError
from whorl.scan.integrity import Tally
from whorl.scan.readout import Flag, Readout

_logger = logging.getLogger("whorl")

#: Readouts of one slice that are kept at most while its train is not known.
_LONGEST_TRAIN = 10_000


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
    ) -> None:
        self.sources, self._settings, self._device = sources, settings, device
        self._tally, self._report = tally, report
        self._settled, self._complete, self._basis = settled, complete, basis
        self._compress = make_compression(sources, settings)
        self.protocol: Protocol | None = None
        self.noise = NoiseStatistics()
        self.whitening: Tensor | None = None
        self.scan_counter = ScanCounter()
        self.receiver: Tensor | None = None
        self.parts = Parts(tally, settings)
        self._changes = SliceChanges()
        self._losses = Losses(tally)
        self._interleaving = Interleaving(sources)

    # --- Arrival -------------------------------------------------------------------------------

    def add(self, readout: Readout) -> None:
        """Take one readout; its arrays are copied."""
        is_first = self._changes.latest is None
        if readout.flags & Flag.IS_NOISE_MEASUREMENT:
            if has_noise_spikes(readout.data):
                self._tally[f"of noise {Damage.SPIKES} were dropped"] += 1
            elif is_first:  # later ones would not be used
                self.noise.add(readout.data, float(readout.head["sample_time_us"]))
            return
        if is_first:
            self._begin(readout)
        self.parts.n_readouts += 1
        number = int(readout.head["idx"]["slice"])
        left = self._changes.follow(number, self.parts.has(number))
        if left is not None:
            self._leave(left)
        its_digest = digest(readout)
        place = self.parts.place(readout.head, its_digest)
        if place is None:
            return
        part, timepoint = place
        if part.buffer is None:
            part.buffer = self._new_buffer(readout)
        interleaf = self._interleaving.of(readout, timepoint, part.buffer)
        if timepoint is None:
            part.buffer.add(readout, interleaf, timepoint, its_digest)
            self._look_for_protocol(part.buffer)
        else:
            is_new = self.parts.see(part, timepoint, its_digest)
            part.buffer.add(readout, interleaf, timepoint if is_new else -1, its_digest)
            self._look_at(part, part.buffer)

    def _begin(self, first: Readout) -> None:
        self.sources = self.sources.with_first(first)
        self._interleaving = Interleaving(self.sources)
        n_coils, noise = first.data.shape[0], self.noise
        if others := noise.n_readouts - noise.n_usable(n_coils):
            reason = f"of noise, which have not the {n_coils} coils of the image data, were dropped"
            self._tally[reason] += others
        dwell_us, bandwidth = float(first.head["sample_time_us"]), self.sources.header.noise_bandwidth
        whitening = make_whitening(noise, n_coils, dwell_us, bandwidth, self._settings)
        if whitening.matrix is not None:
            self.whitening = whitening.matrix.to(self._device)
        if whitening.how:
            self._report.say("DBG", whitening.how)
        if whitening.note:
            self._report.note(whitening.note, each_slice=True)

    def _new_buffer(self, first: Readout) -> SliceBuffer:
        return SliceBuffer(
            first,
            self.whitening,
            self._compress,
            self._device,
            block=ROVIR_BLOCK if self._settings.compression == "rovir" else BLOCK,
        )

    def _look_for_protocol(self, buffer: SliceBuffer) -> None:
        """Settle the protocol if a slice seems to be complete."""
        if buffer.n_waiting > _LONGEST_TRAIN:
            self._adopt(settle(self.sources, buffer.heads, self._settings), buffer.heads)
        elif may_be_complete(buffer, self.sources, self._settings):
            self._try_to_settle(buffer)

    def _look_at(self, part: Part, buffer: SliceBuffer) -> None:
        """Hand a slice over if it is complete, or fold it: then it takes less memory than raw."""
        assert self.protocol is not None
        if part.repetition < 0:
            for before in self.parts.confirm(part):
                self._finish(before)
        T, K = self.protocol.n_measured, self._settings.n_coefficients or 10
        if is_whole(len(part.seen), self.protocol):
            self.parts.judge(part)
        if is_whole(len(part.seen), self.protocol):
            self._finish(part)
        elif len(buffer.interleaves) * K < T and (basis := self._basis()) is not None:
            buffer.fold(basis, self.receiver)

    def _leave(self, number: int) -> None:
        """Another slice has followed: the one before may be over."""
        part = self.parts.latest_open(number)
        if self.protocol is None and part is not None and part.buffer is not None:
            if may_be_over(part.buffer, self.sources, self._settings):
                self._try_to_settle(part.buffer)
            part = self.parts.latest_open(number)
        if self.protocol is None or part is None:
            return
        self.parts.judge(part)
        share = self._settings.min_readouts
        if part.buffer is not None and not part.buffer.flagged:
            share = max(share, resolve.COVERAGE)
        if has_enough(len(part.seen), part.n_arrived, self.protocol, share):
            self._finish(part)

    # --- The protocol --------------------------------------------------------------------------

    def _try_to_settle(self, buffer: SliceBuffer) -> str:
        """Settle the protocol by the readouts of a slice that wait, or say why that cannot be.

        The slice may not be complete yet; at the end the reason counts.
        """
        try:
            protocol = settle(self.sources, buffer.heads, self._settings)
        except ScanError as error:
            # Only its text: the error would know this frame, and both would stay until cycles are looked for.
            _logger.debug("not resolved yet: %s", error)
            return str(error)
        self._adopt(protocol, buffer.heads)
        return ""

    def _adopt(self, protocol: Protocol, heads: NDArray[np.void]) -> None:
        """From now on timepoints are known: what has come gets its own, repetitions their parts."""
        self.protocol = protocol
        if protocol.receiver_deg is not None:
            turns = torch.from_numpy(np.deg2rad(protocol.receiver_deg)).to(self._device)
            self.receiver = torch.polar(torch.ones_like(turns), turns).to(torch.complex64)
        self._settled(protocol)
        for warning in protocol.warnings:
            self._report.say("WRN", warning)
        if "interpolated" in protocol.train.source:
            self._report.note(f"the train is from {protocol.train.source}", each_slice=True)
        self.parts.adopt(protocol, Agreement(protocol, self.sources.overridden, heads))
        for number in self.parts.slices:
            for part in self.parts.sort(number, self._interleaving):
                self._finish(part)

    # --- Handing over --------------------------------------------------------------------------

    def _finish(self, part: Part) -> None:
        """Hand a part over."""
        buffer = part.buffer
        assert buffer is not None
        part.closed = True
        part.lost = self._lost(part)
        part.buffer = None
        self._losses.told(part.slice_number)
        self._complete(part, buffer)

    def _is_announced(self, number: int) -> bool:
        announced = self.sources.header.n_slices_announced
        return not announced or number < announced

    def _lost(self, part: Part) -> str:
        """What is known of readouts that a part lacks, or had too many of."""
        if self.protocol is not None:
            missing = self.protocol.n_measured - len(part.seen)
        else:
            missing = n_expected(self.sources, self._settings) - part.n_waiting
        strays = 0
        if self._is_announced(part.slice_number):
            strays = sum(p.n_arrived for p in self.parts.open if not self._is_announced(p.slice_number))
        return self._losses.sentence(part.slice_number, missing, self.parts.n_again(part), strays)

    def finish(self, ended_early: str) -> None:
        """The stream is over: hand over what is open, or say why not.

        Raises
        ------
        ScanError
            If there is nothing at all, or train or timepoints cannot be told.
        """
        if not self.parts.slices:
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
        short: list[tuple[Part, str]] = []
        for number in sorted(self.parts.slices):
            for part in self.parts.drop_strangers(number):
                if part.buffer is None:
                    continue
                if self.parts.has_enough(part):
                    self._finish(part)
                else:
                    short.append((part, self._why_short(protocol, part)))
        any_done = any(part.buffer is None for part in self.parts)
        for part, why in short:
            n_arrived, part.buffer = part.n_arrived, None
            if any_done and not self._is_announced(part.slice_number):
                self._tally[STRAY] += n_arrived
            else:
                self._report.fail(f"{part} failed: {why}")
        self._check_announced(protocol)

    def _why_short(self, protocol: Protocol, part: Part) -> str:
        T = protocol.n_measured
        if protocol.counter == "arrival":
            why = (
                f"timepoint=arrival needs exactly one readout for each of {T} timepoints, "
                f"got {part.n_arrived}"
            )
        else:
            least = f"{self._settings.min_readouts:.0%}"
            why = f"{len(part.seen)} of {T} timepoints arrived, expected at least {least}"
        lost = self._lost(part)
        return f"{why}: {lost}" if lost else why

    def _check_announced(self, protocol: Protocol) -> None:
        """Say which slices and repetitions are missing that the header announces."""
        header = self.sources.header
        if missing := sorted(set(range(header.n_slices_announced)) - set(self.parts.slices)):
            listed = ", ".join(str(n) for n in missing[:8])
            self._report.fail(
                f"of {header.n_slices_announced} slices that the header announces, {listed} did not arrive"
            )
        # A limit as long as the train numbers timepoints, in another counter than the one that was taken.
        T = protocol.train.n_timepoints
        announced = [n for name in protocol.repetition if 1 < (n := header.limits.get(name, 0)) != T]
        if len(announced) != 1:
            return
        for number in sorted(self.parts.slices):
            n_repetitions = self.parts.n_repetitions[number]
            if self._is_announced(number) and 0 < n_repetitions < announced[0]:
                self._report.fail(
                    f"of {announced[0]} repetitions that the header announces, "
                    f"{n_repetitions} of slice {number} arrived"
                )

    def _settle_at_the_end(self, ended_early: str) -> None:
        """By the fullest slice from which train and counter can be told."""
        waiting = sorted(self.parts.open, key=lambda part: -part.n_waiting)
        text = ""
        for part in waiting:
            assert part.buffer is not None
            why = self._try_to_settle(part.buffer)
            if not why:
                return
            text = text or why
        T, most = n_expected(self.sources, self._settings), waiting[0].n_waiting
        if lost := self._lost(waiting[0]):
            text = f"{text}; lost were {lost}"
        if most < self._settings.min_readouts * T:
            # That comes first: the counters may not be at fault.
            least = f"{self._settings.min_readouts:.0%}"
            text = f"{most} of {T} timepoints arrived, expected at least {least}: {text}"
        raise ScanError(f"{text}. {ended_early}" if ended_early else text)
