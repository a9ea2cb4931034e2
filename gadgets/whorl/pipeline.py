"""A scan while it arrives: readouts in, images out.

`reconstruct_scan` settles what was scanned, collects each slice's readouts and hands complete slices
to `whorl.reconstruction.reconstruct_slice`, in a thread of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import ismrmrd
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.config import Settings
from whorl.dictionaries import dictionary_parameters, get_dictionary, pulse_shape
from whorl.kspace.coils import NoiseStatistics, dependent_coils, whitening_matrix
from whorl.kspace.slicebuffer import BLOCK, SliceBuffer, digest
from whorl.logs import current_scan
from whorl.maps.images import ImageMaker, Provenance
from whorl.physics.dictionary import Dictionary
from whorl.recon.inr import warm_up
from whorl.reconstruction import (
    ROVIR_BLOCK,
    Encoding,
    SliceResult,
    encode,
    is_tuned,
    make_compression,
    reconstruct_slice,
)
from whorl.scan import resolve
from whorl.scan.failure import EndOfStream, ScanError
from whorl.scan.header import Header, read_header
from whorl.scan.integrity import Tally, UnusableScan, usable
from whorl.scan.readout import Flag, Readout
from whorl.scan.train import Train
from whorl.scan.transmit import read_b1_map

_logger = logging.getLogger("whorl")

#: Share of timepoints outside the train above which the train cannot be the right one.
_OUTSIDE = 0.1
#: Readouts of one slice that are kept at most while its train is not known.
_LONGEST_TRAIN = 10_000
#: Timepoints below which an undersampled train hardly tells tissues apart.
_SHORT_TRAIN = 50
#: Slices that are complete and not sent yet; while there are more, no readouts are taken.
_HANDED_OVER = 2
#: Slices that can be open at once: damaged slice numbers must not fill the memory.
_MOST_OPEN = 1024
#: Reasons of the tally that are no loss.
_HARMLESS = ("came twice",)
_STRAY = "of a slice that the header does not announce were dropped"

LogText = Callable[[str, str], None]
#: Takes the number of a slice and everything that is known about it.
Observe = Callable[[int, SliceResult], None]


def _log_only(level: str, text: str) -> None:
    _logger.log({"WRN": logging.WARNING, "ERR": logging.ERROR}.get(level, logging.INFO), text)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a scan.

    Parameters
    ----------
    delivered
        Images that were sent.
    failures
        What was not delivered, and why: errors for the operator.
    notes
        What was degraded or made in another way than asked for: warnings.
    """

    delivered: int
    failures: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0: all delivered; 1: nothing; 3: something is missing, degraded or a fall-back."""
        if not self.delivered:
            return 1
        return 3 if self.failures or self.notes else 0


class _Scan:
    """State of one scan while it arrives."""

    def __init__(
        self,
        header: Header,
        settings: Settings,
        send: Callable[[ismrmrd.Image], None],
        log: LogText,
        observe: Observe | None,
        hold_out: bool,
    ):
        self._header, self._settings, self._send, self._log = header, settings, send, log
        self._observe, self._hold_out = observe, hold_out or is_tuned(settings)
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise ScanError("device=cuda, but there is no usable GPU: expected one, or device=auto")
        cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
        self._device = torch.device("cuda" if cuda else "cpu")
        self.tally = Tally()
        self._images = ImageMaker(header.recon, settings.output_dtype)
        pulse_shape(settings)  # what cannot be read shall not wait for the train
        self._b1_map = read_b1_map(settings.b1_map) if settings.b1_map else None
        self._inversion = resolve.inversion_time(header, settings.inversion_time_ms)
        self._overridden = bool(settings.sequence)
        self._early = (
            resolve.train_from_csv(settings.sequence, self._inversion)
            if settings.sequence
            else resolve.train_from_header(header, self._inversion)
        )
        self._train: Train | None = None
        self._counter = ""
        self._noise = NoiseStatistics()
        self._whitening: Tensor | None = None
        self._compress = make_compression(header, settings)
        self._slices: dict[int, SliceBuffer] = {}
        # Slices that were handed over or given up, with the digests of their timepoints.
        self._done: dict[int, NDArray[np.int64]] = {}
        self._latest: int | None = None
        # A slice that one readout has named since, and whether it was known before.
        self._other: tuple[int, bool] | None = None
        self._interleaved = False
        self._n_imaging = 0
        self._compared: NDArray[np.bool_] | None = None
        self._encoding: tuple[NDArray[np.float32], Encoding] | None = None  # of the latest slice
        self._delivered = 0
        self._failures: list[str] = []
        self._notes: list[str] = []
        self._scan_notes: list[str] = []  # those that concern each slice
        self._jobs: list[Future[None]] = []  # those that may not be done yet
        self._handed_over = threading.BoundedSemaphore(_HANDED_OVER)
        # One slice is reconstructed while the next arrives; the dictionary is built meanwhile.
        # What they log is of this scan too.
        of_scan: Any = {"initializer": current_scan.set, "initargs": (current_scan.get(),)}
        self._worker = ThreadPoolExecutor(1, "whorl-slice", **of_scan)
        self._builder = ThreadPoolExecutor(1, "whorl-dictionary", **of_scan)
        self._dictionary: Future[Dictionary] | None = None
        if settings.method == "inr":
            self._worker.submit(warm_up)
        if self._early is not None:
            try:
                self._build_dictionary(self._early)
            except ScanError:
                self.close()
                raise

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)
        self._builder.shutdown(cancel_futures=True)

    def _build_dictionary(self, train: Train) -> None:
        settings = self._settings

        span = self._b1_map.span() if self._b1_map else None
        parameters = dictionary_parameters(train, settings, span)

        def build() -> Dictionary:
            # What is wrong with the cache changes no map: a warning, and no mark on the images.
            return get_dictionary(parameters, settings, lambda text: self._log("WRN", text), self._device)

        self._dictionary = self._builder.submit(build)

    # --- Arrival -------------------------------------------------------------------------------

    def add(self, readout: Readout) -> None:
        if readout.flags & Flag.IS_NOISE_MEASUREMENT:
            if self._latest is None:  # later ones would not be used
                self._noise.add(readout.data, float(readout.head["sample_time_us"]))
            return
        number = int(readout.head["idx"]["slice"])
        self._n_imaging += 1
        if self._latest is None:
            self._whiten(readout.data.shape[0], float(readout.head["sample_time_us"]))
            self._latest = number
        self._follow(self._latest, number)
        if number in self._done:
            self._count_late(readout, self._done[number])
            return
        buffer = self._slices.get(number)
        if buffer is None:
            if len(self._slices) >= _MOST_OPEN:
                self.tally[f"beyond {_MOST_OPEN} slices that were open at once were dropped"] += 1
                return
            buffer = SliceBuffer(
                readout,
                self._whitening,
                self._compress,
                self._device,
                keep_held=self._hold_out,
                block=ROVIR_BLOCK if self._settings.compression == "rovir" else BLOCK,
            )
            self._slices[number] = buffer
            if self._train is not None:
                self._number(buffer)
        buffer.add(readout, buffer.interleaves.number(readout.trajectory), self.tally)
        if self._train is None:
            if buffer.n_waiting > _LONGEST_TRAIN:
                self._resolve(buffer)
            elif self._may_be_complete(buffer):
                self._try_to_resolve(buffer)
        if self._train is None:
            return
        self._check_outside()
        T = self._train.n_timepoints
        if buffer.n_seen == T and self._counter != "arrival":
            self._finish_slice(number)
        elif (
            len(buffer.interleaves) * (self._settings.n_coefficients or 10) < T
            and self._dictionary is not None
            and self._dictionary.done()
        ):
            # Folded, the slice takes less memory than raw.
            try:
                basis = self._dictionary.result().basis
            except Exception as error:
                raise ScanError(f"the dictionary cannot be built: {error}") from error
            buffer.fold(basis)

    def _may_be_complete(self, buffer: SliceBuffer) -> bool:
        """Whether a slice's timepoints have all come, as far as can be told while it still arrives.

        Counts that contradict each other, or a flag alone, do not tell: then the next slice does.
        """
        announced = self._header.n_timepoints_announced
        if announced < 2 or buffer.n_waiting < announced or self._settings.timepoint == "arrival":
            return False
        return buffer.flagged if self._early is None else self._early.n_timepoints == announced

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
            self._other = number, number in self._slices or number in self._done

    def _leave(self, number: int, to_known: bool) -> None:
        """Another slice has followed, perhaps one that was there before: the one before may be over."""
        self._interleaved |= to_known
        buffer = self._slices.get(number)
        if buffer is None or self._interleaved:
            return
        if self._train is None:
            announced = self._header.n_timepoints_announced
            expected = self._early.n_timepoints if self._early else announced
            # A flag is believed if as much came as was announced.
            believed = buffer.flagged and buffer.n_waiting >= resolve.COVERAGE * announced
            if believed or buffer.n_waiting >= max(expected, 2):
                self._try_to_resolve(buffer)
        if self._train is None:
            return
        T = self._train.n_timepoints
        if self._counter == "arrival":
            over = buffer.n_arrived == T
        else:
            share = self._settings.min_readouts
            over = buffer.n_seen >= (share if buffer.flagged else max(share, resolve.COVERAGE)) * T
        if over:
            self._finish_slice(number)

    def _count_late(self, readout: Readout, digests: NDArray[np.int64]) -> None:
        """A readout of a slice that has been handed over or given up."""
        if self._counter == "arrival":
            self.tally["came after their slice was complete and were dropped"] += 1
            return
        t = int(resolve.timepoints(np.array([readout.head]), self._counter)[0])
        if not 0 <= t < len(digests):
            self.tally["with a timepoint outside the train were dropped"] += 1
            self._check_outside()
        elif digests[t] < 0:
            self.tally["came after their slice was over and were dropped"] += 1
        elif digests[t] == digest(readout):
            self.tally["came twice"] += 1
        else:
            self.tally["came again with other data; the first one counts"] += 1

    def _check_outside(self) -> None:
        assert self._train is not None
        T = self._train.n_timepoints
        outside = self.tally["with a timepoint outside the train were dropped"]
        if outside > max(_OUTSIDE * max(T, self._n_imaging), 1):
            raise ScanError(
                f"more than {_OUTSIDE:.0%} of the timepoints lie outside the train of {T} "
                f"({self._train.source}): it cannot be the one that was played. Set property sequence"
            )

    def _whiten(self, n_coils: int, dwell_us: float) -> None:
        """Whitening matrix of the noise readouts that came before the first image data."""
        n_readouts = self._noise.n_usable(n_coils)
        if others := self._noise.n_readouts - n_readouts:
            self.tally[f"of noise, which have not the {n_coils} coils of the image data, were dropped"] += (
                others
            )
        if self._settings.whiten == "off" or not self._noise.n_readouts:
            why = "whiten=off" if self._settings.whiten == "off" else "no noise readouts"
            self._log("DBG", f"not whitened: {why}")
            return
        bandwidth = self._settings.noise_bandwidth or self._header.noise_bandwidth or 1.0
        try:
            covariance = self._noise.covariance(n_coils, dwell_us, bandwidth)
            self._whitening = whitening_matrix(covariance).to(self._device, torch.complex64)
        except ValueError as error:
            self._note(f"{error}: not whitened", each_slice=True)
            return
        noise_dwell_us = self._noise.dwell_us(n_coils)
        scaled = (
            f"noise of {noise_dwell_us:g} µs scaled to {dwell_us:g} µs, relative bandwidth {bandwidth:g}"
            if noise_dwell_us and dwell_us > 0
            else "noise not scaled, its dwell time or that of the data is not known"
        )
        self._log("DBG", f"{n_coils} coils whitened by {n_readouts} noise readouts; {scaled}")
        if dropped := dependent_coils(covariance):
            listed = ", ".join(str(coil) for coil in dropped)
            self._note(
                f"of {n_coils} coils, {listed} (counted from 0) "
                f"{'was' if len(dropped) == 1 else 'were'} dropped: without noise of their own, "
                f"they are dead or copies of others",
                each_slice=True,
            )

    def _find_train(self, buffer: SliceBuffer) -> tuple[Train, str]:
        return resolve.resolve_train(
            self._early,
            self._overridden,
            buffer.heads,
            self._settings.timepoint,
            self._inversion,
            min(resolve.COVERAGE, self._settings.min_readouts),
        )

    def _try_to_resolve(self, buffer: SliceBuffer) -> None:
        try:
            found = self._find_train(buffer)
        except ScanError as error:
            # The slice may not be complete yet; at the end the error counts.
            _logger.debug("not resolved yet: %s", error)
            return
        self._adopt(buffer, *found)

    def _resolve(self, buffer: SliceBuffer) -> None:
        """Settle train and timepoint counter by one slice, and number what has come."""
        self._adopt(buffer, *self._find_train(buffer))

    def _adopt(self, buffer: SliceBuffer, train: Train, counter: str) -> None:
        if self._early is None or train.key() != self._early.key():
            self._build_dictionary(train)
        self._train, self._counter = train, counter
        inversion = "none" if train.inversion_time_ms is None else f"{train.inversion_time_ms:g} ms"
        self._log(
            "DBG",
            f"train of {train.n_timepoints} timepoints from {train.source}, inversion {inversion}, "
            f"timepoints by {counter}",
        )
        if "interpolated" in train.source:
            self._note(f"the train is from {train.source}", each_slice=True)
        if not self._overridden:
            # What was interpolated may turn out otherwise in another slice.
            self._compared = np.full(train.n_timepoints, "interpolated" not in train.source)
            t = resolve.timepoints(buffer.heads, counter)
            self._compared[t[(t >= 0) & (t < train.n_timepoints)]] = True
        for other in self._slices.values():
            self._number(other)

    def _number(self, buffer: SliceBuffer) -> None:
        assert self._train is not None
        train, compared = self._train, self._compared
        count = _Arrivals() if self._counter == "arrival" else None

        def place(heads: NDArray[np.void]) -> NDArray[np.int64]:
            t = resolve.timepoints(heads, self._counter) if count is None else count(heads)
            if compared is not None:
                known = (t >= 0) & (t < train.n_timepoints)
                known[known] = compared[t[known]]
                resolve.check_agreement(train, heads[known], t[known])
            return t

        buffer.number_timepoints(place, train.n_timepoints, self.tally)

    def _note(self, text: str, *, each_slice: bool = False) -> None:
        self._notes.append(text)
        if each_slice:
            self._scan_notes.append(text)
        self._log("WRN", text)

    def _fail(self, text: str) -> None:
        self._failures.append(text)
        self._log("ERR", text)

    # --- Reconstruction ------------------------------------------------------------------------

    def _finish_slice(self, number: int) -> None:
        """Hand a slice over, once there is room: until then no further readouts are taken."""
        arrived = time.monotonic()
        self._handed_over.acquire()
        buffer = self._slices.pop(number)
        self._done[number] = buffer.digests
        lost = self._lost(number, buffer)
        job = self._worker.submit(self._reconstruct, number, buffer, arrived, lost)
        handed_over = self._handed_over  # not self: the job would keep the scan, and the scan the job
        job.add_done_callback(lambda _: handed_over.release())
        self._jobs = [*(other for other in self._jobs if not other.done()), job]

    def _is_announced(self, number: int) -> bool:
        announced = self._header.n_slices_announced
        return not announced or number < announced

    def _lost(self, number: int, buffer: SliceBuffer) -> str:
        """What is known of readouts that a slice lacks."""
        counts = self.tally.of_slice(number, but=_HARMLESS)
        unknown = len(buffer.digests) - buffer.n_seen - counts.total()
        strays = sum(b.n_arrived for n, b in self._slices.items() if not self._is_announced(n))
        if self._is_announced(number) and min(unknown, strays) > 0:
            counts[_STRAY] = min(unknown, strays)
        return ", ".join(f"{n} {reason.removesuffix(' were dropped')}" for reason, n in counts.items())

    def _reconstruct(self, number: int, buffer: SliceBuffer, arrived: float, lost: str) -> None:
        """Reconstruct and send one slice; what goes wrong stays with this slice."""
        try:
            assert self._dictionary is not None
            assert self._train is not None
            T = self._train.n_timepoints
            dictionary = self._dictionary.result()
            waited = time.monotonic()
            kspace = buffer.finish(dictionary.basis)
            encoding = self._encode(buffer.interleaves.stack(kspace.interleaves))
            folded = time.monotonic()
            settings = self._settings
            deadline = arrived + settings.deadline_s if settings.deadline_s else None
            field = self._b1_map.on_slice(number, encoding.shape) if self._b1_map else None
            result = reconstruct_slice(kspace, encoding, dictionary, settings, deadline, field)
            if self._b1_map and field is None:
                result.remark("degraded", "the B1 map has no values for this slice: flip angles as planned")
            if T < _SHORT_TRAIN:
                result.remark(
                    "degraded", f"{T} timepoints are few: expected {_SHORT_TRAIN} or more for maps to trust"
                )
            if buffer.n_seen < T:
                why = f": {lost}" if lost else ""
                result.remark("degraded", f"{T - buffer.n_seen} of {T} readouts are missing{why}")
            elif lost:
                result.remark("degraded", f"of the readouts, {lost}")
            result.seconds = {
                "dictionary": waited - arrived,
                "fold": folded - waited,
                **result.seconds,
                "slice": time.monotonic() - waited,
            }
            provenance = Provenance(
                method=result.method,
                status=result.status,
                notes=(*self._scan_notes, *result.notes),
                settings=settings.digest(),
                protocol_name=self._header.protocol_name,
                seconds=result.seconds,
                preset=str(result.diagnostics.get("preset", "")),
            )
            if provenance.notes and provenance.status == "complete":
                provenance = replace(provenance, status="degraded")
            if self._observe is not None:
                self._observe(number, result)
            for image in self._images.images(result.maps, buffer.head, provenance):
                self._send(image)
                self._delivered += 1
            for note in result.notes:
                self._note(f"slice {number}: {note}")
            times = ", ".join(f"{name} {value:.2f} s" for name, value in result.seconds.items())
            self._log("DBG", f"slice {number} sent: {result.method}, {result.status}; {times}")
        except Exception as error:
            if not isinstance(error, ScanError):
                _logger.exception("slice %d failed", number)
            self._fail(f"slice {number} failed: {str(error) or type(error).__name__}")

    def _encode(self, trajectory: NDArray[np.float32]) -> Encoding:
        """Encoding of a set of interleaves; slices mostly share one."""
        if self._encoding is None or not np.array_equal(self._encoding[0], trajectory):
            encoding = encode(trajectory, self._header, self._settings, self._device, self._log)
            self._encoding = (trajectory, encoding)
        return self._encoding[1]

    def finish(self, ended_early: str) -> Outcome:
        """The stream is over: reconstruct what is open, wait for all slices."""
        if not self._slices and not self._done:
            lost = "; ".join(self.tally.sentences())
            raise ScanError(
                "no imaging readouts arrived"
                + (f" ({self._noise.n_readouts} noise readouts did)" if self._noise.n_readouts else "")
                + (f": {lost}" if lost else "")
                + (f". {ended_early}" if ended_early else "")
            )
        if self._train is None:
            self._resolve_at_the_end(ended_early)
        assert self._train is not None
        T = self._train.n_timepoints
        short = {}
        for number in sorted(self._slices):
            seen, arrived = self._slices[number].n_seen, self._slices[number].n_arrived
            if self._counter == "arrival" and arrived != T:
                why = f"timepoint=arrival needs exactly one readout for each of {T} timepoints, got {arrived}"
            elif seen < self._settings.min_readouts * T:
                why = f"{seen} of {T} timepoints arrived, expected at least {self._settings.min_readouts:.0%}"
            else:
                self._finish_slice(number)
                continue
            lost = self._lost(number, self._slices[number])
            short[number] = f"{why}: {lost}" if lost else why
        failed = set()
        for number, why in short.items():
            n_arrived = self._slices.pop(number).n_arrived
            if self._done and not self._is_announced(number):
                self.tally[_STRAY] += n_arrived
                continue
            failed.add(number)
            self._fail(f"slice {number} failed: {why}")
        for job in self._jobs:
            job.result()
        for reason in _HARMLESS:
            if count := self.tally.pop(reason, 0):
                self._log("DBG", f"{count} readout{'s' if count > 1 else ''} {reason}, which changes nothing")
        for sentence in self.tally.sentences():
            self._note(sentence)
        missing = set(range(self._header.n_slices_announced)) - self._done.keys() - failed
        if missing:
            listed = ", ".join(str(n) for n in sorted(missing)[:8])
            self._fail(
                f"of {self._header.n_slices_announced} slices that the header announces, "
                f"{listed} did not arrive"
            )
        if ended_early:
            self._fail(ended_early)
        return Outcome(self._delivered, tuple(self._failures), tuple(self._notes))

    def _resolve_at_the_end(self, ended_early: str) -> None:
        """By the fullest slice from which train and counter can be told."""
        # Only its text: the error would know this frame, and both would stay until cycles are looked for.
        text = ""
        for buffer in sorted(self._slices.values(), key=lambda buffer: -buffer.n_waiting):
            try:
                found = self._find_train(buffer)
            except ScanError as error:  # noqa: PERF203 - a few slices, once
                text = text or str(error)
            else:
                self._adopt(buffer, *found)
                return
        T = self._early.n_timepoints if self._early else self._header.n_timepoints_announced
        fullest = max(self._slices, key=lambda number: self._slices[number].n_waiting)
        most = self._slices[fullest].n_waiting
        if lost := self._lost(fullest, self._slices[fullest]):
            text = f"{text}; lost were {lost}"
        if most < self._settings.min_readouts * T:
            # That comes first: the counters may not be at fault.
            least = f"{self._settings.min_readouts:.0%}"
            text = f"{most} of {T} timepoints arrived, expected at least {least}: {text}"
        raise ScanError(f"{text}. {ended_early}" if ended_early else text)

    def stop(self, why: str) -> Outcome | None:
        """Nothing more can be made; what is under way is not lost by it. ``None`` if there is nothing."""
        for job in self._jobs:
            job.result()
        if not self._delivered:
            return None
        lost = ", ".join(str(number) for number in sorted(self._slices))
        self._fail(f"slice {lost} failed: {why}" if lost else why)
        return Outcome(self._delivered, tuple(self._failures), tuple(self._notes))


def find_train(header_xml: bytes, readouts: Iterable[Readout], settings: Settings) -> Train:
    """The train that a scan would be reconstructed with, from its fullest slice.

    Raises
    ------
    ScanError
        If it cannot be told.
    """
    if settings.sequence:
        inversion = resolve.inversion_time(read_header(header_xml), settings.inversion_time_ms)
        return resolve.train_from_csv(settings.sequence, inversion)
    return find_train_and_counter(header_xml, readouts, settings)[0]


def find_train_and_counter(
    header_xml: bytes, readouts: Iterable[Readout], settings: Settings
) -> tuple[Train, str]:
    """The train of a scan and the name of the counter of its timepoints, from its fullest slice.

    Raises
    ------
    ScanError
        If they cannot be told.
    """
    header = read_header(header_xml)
    inversion = resolve.inversion_time(header, settings.inversion_time_ms)
    overridden = bool(settings.sequence)
    early = (
        resolve.train_from_csv(settings.sequence, inversion)
        if overridden
        else resolve.train_from_header(header, inversion)
    )
    heads: dict[int, list[np.void]] = {}
    for readout in usable(readouts, Tally()):
        if readout.flags & Flag.IS_NOISE_MEASUREMENT:
            continue
        heads.setdefault(int(readout.head["idx"]["slice"]), []).append(readout.head.copy())
    if not heads:
        raise ScanError("no imaging readouts: the train cannot be told")
    coverage = min(resolve.COVERAGE, settings.min_readouts)
    fullest = np.array(max(heads.values(), key=len))
    return resolve.resolve_train(early, overridden, fullest, settings.timepoint, inversion, coverage)


class _Arrivals:
    """Numbers readouts in the order in which they come."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, heads: NDArray[np.void]) -> NDArray[np.int64]:
        self._next += len(heads)
        return np.arange(self._next - len(heads), self._next)


def reconstruct_scan(
    header_xml: bytes,
    readouts: Iterable[Readout],
    settings: Settings,
    send_image: Callable[[ismrmrd.Image], None],
    log: LogText = _log_only,
    *,
    observe: Observe | None = None,
    hold_out: bool = False,
) -> Outcome:
    """Reconstruct a scan while it arrives.

    A slice is reconstructed as soon as it is complete, in a thread of its own, while further
    readouts come in: `send_image` and `log` are called from there.

    Parameters
    ----------
    header_xml
        The MRD header document.
    readouts
        In order of arrival; an `EndOfStream` or `ScanError` from here is reported, what has come is
        delivered.
    settings
        See `whorl.config.Settings`.
    send_image
        Takes each image when it is ready.
    log
        Takes (level, text) with level ``DBG``, ``WRN`` or ``ERR``.
    observe
        Takes each slice before its images are sent: its number and all that is known about it.
    hold_out
        Whether method=llr does without a tenth of the readouts and is judged by them: `held_out` in the
        diagnostics of the slice. The INR decides by itself.

    Raises
    ------
    ScanError
        If nothing could be delivered of the whole scan: no readouts, no train, no trajectory, sources that
        contradict each other. After the first slice this is one of the failures of the outcome.
    """
    scan = _Scan(read_header(header_xml), settings, send_image, log, observe, hold_out)
    source = usable(readouts, scan.tally)
    ended_early = ""
    try:
        while True:
            try:
                readout = next(source, None)
            except UnusableScan:
                raise
            except (EndOfStream, ScanError) as error:
                ended_early = f"the stream ended early: {error}"
                break
            if readout is None:
                break
            scan.add(readout)
        return scan.finish(ended_early)
    except ScanError as error:
        outcome = scan.stop(str(error))
        if outcome is None:
            raise
        return outcome
    finally:
        scan.close()
