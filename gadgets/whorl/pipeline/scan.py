"""A scan while it arrives: readouts in, images out.

`whorl.pipeline.collecting` settles what was scanned and collects each slice's readouts; `reconstruct_scan`
hands complete slices to `whorl.pipeline.slices.reconstruct_slice`, in a thread of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ismrmrd
import numpy as np
import torch
from torch import Tensor

from whorl.config import Settings
from whorl.kspace.coilmaps import read_external_maps
from whorl.kspace.nufft import gpu_backend
from whorl.kspace.slicebuffer import SliceBuffer, SubspaceKspace
from whorl.maps.images import ImageMaker, Provenance, SliceMaps
from whorl.physics.dictionary import Dictionary
from whorl.pipeline.beside import Further, beside_maps
from whorl.pipeline.collecting import Collector
from whorl.pipeline.deadlines import Deadline, SliceDeadlines
from whorl.pipeline.dictionaries import dictionary_parameters, get_dictionary, pulse_shape
from whorl.pipeline.encoding import Encoder, Encoding
from whorl.pipeline.folding import fold, shortcomings
from whorl.pipeline.losses import HARMLESS
from whorl.pipeline.parts import Part
from whorl.pipeline.protocol import Protocol, Sources, gather, settle
from whorl.pipeline.report import Report
from whorl.pipeline.slices import B1Field, SliceResult, reconstruct_slice
from whorl.recon.calibration import is_uneven
from whorl.runtime.cores import limit_this_thread, one_thread
from whorl.runtime.logs import current_scan
from whorl.runtime.torch_ready import warm_up
from whorl.scan.arrivals import ScanCounter
from whorl.scan.failure import EndOfStream, ScanError
from whorl.scan.integrity import Tally, UnusableScan
from whorl.scan.readout import Flag, Readout
from whorl.scan.train import Train
from whorl.scan.transmit import read_b1_map

_logger = logging.getLogger("whorl")

#: Slices that are complete and not sent yet; while there are more, no readouts are taken.
_HANDED_OVER = 2

LogText = Callable[[str, str], None]
#: Takes the number of a slice and everything that is known about it.
Observe = Callable[[int, SliceResult], None]


def _log_only(level: str, text: str) -> None:
    _logger.log({"WRN": logging.WARNING, "ERR": logging.ERROR}.get(level, logging.INFO), text)


def device_of(settings: Settings) -> tuple[torch.device, str]:
    """Where scans are reconstructed, and why on the CPU although there is a GPU (or nothing).

    Raises
    ------
    ScanError
        If property device asks for what is not there.
    """
    cpu, insists = torch.device("cpu"), settings.device == "cuda"
    if settings.device == "cpu":
        return cpu, ""
    if not torch.cuda.is_available():
        if insists:
            raise ScanError("device=cuda, but there is no usable GPU: expected one, or device=auto")
        return cpu, ""
    try:
        gpu_backend(settings.nufft)
    except ImportError as error:
        if insists:
            raise ScanError(f"device=cuda, but {error}, or device=auto") from error
        return cpu, str(error)
    return torch.device("cuda"), ""


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


@dataclass(frozen=True, slots=True, eq=False)
class _Folded:
    """A slice whose readouts are in the subspace.

    Parameters
    ----------
    part
        The slice.
    kspace, encoding, dictionary
        What it is reconstructed from.
    head
        Says where it is, and which repetition of it.
    arrived, begun
        When it was complete, and when the dictionary was there (`time.monotonic`).
    seconds
        By stage until now.
    """

    part: Part
    kspace: SubspaceKspace
    encoding: Encoding
    dictionary: Dictionary
    head: np.void
    arrived: float
    begun: float
    seconds: dict[str, float]


class _Scan:
    """State of one scan while it arrives."""

    def __init__(
        self,
        sources: Sources,
        settings: Settings,
        send: Callable[[ismrmrd.Image], None],
        report: Report,
        observe: Observe | None,
    ):
        self._header, self._settings, self._send, self._report = sources.header, settings, send, report
        self._observe = observe
        self._device, why = device_of(settings)
        if why:
            report.say("WRN", f"on the CPU: {why}")
        self.tally = Tally()
        self.collector = Collector(
            sources,
            settings,
            self._device,
            self.tally,
            report,
            settled=self._settled,
            complete=self._hand_over,
            basis=self._basis_if_ready,
        )
        self._images = ImageMaker(self._header.recon, settings.output_dtype)
        pulse_shape(settings)  # what cannot be read shall not wait for the train
        self._b1_map = read_b1_map(settings.b1_map) if settings.b1_map else None
        self._coil_maps = read_external_maps(settings.coil_maps_file) if settings.coil_maps_file else None
        self._encoder = Encoder(self._header, settings, self._device, report.say)
        self._protocol: Protocol | None = None
        self._deadlines = SliceDeadlines(settings.deadline_s, settings.scan_deadline_s, _HANDED_OVER)
        self._delivered = 0
        self._jobs: list[Future[bool]] = []  # those that may not be done yet
        self._further: deque[Future[None]] = deque()  # what is made beside the maps of slices
        self._handed_over = threading.BoundedSemaphore(_HANDED_OVER)

        # One slice is reconstructed while the next arrives; the dictionary is built meanwhile.
        # What they log is of this scan too.
        def begin(name: str) -> None:
            current_scan.set(name)
            limit_this_thread()

        of_scan: Any = {"initializer": begin, "initargs": (current_scan.get(),)}
        self._worker = ThreadPoolExecutor(1, "whorl-slice", **of_scan)
        self._builder = ThreadPoolExecutor(1, "whorl-dictionary", **of_scan)
        self._dictionary: Future[Dictionary] | None = None
        self._train = sources.train
        if settings.iterates:
            self._worker.submit(warm_up)
        if self._train is not None:
            try:
                self._build_dictionary(self._train)
            except ScanError:
                self.close()
                raise

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)
        self._builder.shutdown(cancel_futures=True)
        # It knows the scan, which would keep both, and their slices, until cycles are looked for.
        del self.collector

    def _build_dictionary(self, train: Train) -> None:
        settings, report = self._settings, self._report

        span = self._b1_map.span() if self._b1_map else None
        parameters = dictionary_parameters(train, settings, span)

        def build() -> Dictionary:
            # What is wrong with the cache changes no map: a warning, and no mark on the images.
            return get_dictionary(parameters, settings, lambda text: report.say("WRN", text), self._device)

        self._dictionary = self._builder.submit(build)

    def _basis_if_ready(self) -> Tensor | None:
        if self._dictionary is None or not self._dictionary.done():
            return None
        try:
            return self._dictionary.result().basis
        except Exception as error:
            raise ScanError(f"the dictionary cannot be built: {error}") from error

    def _settled(self, protocol: Protocol) -> None:
        train = protocol.train
        if self._train is None or train.key() != self._train.key():
            self._build_dictionary(train)
        self._train, self._protocol = train, protocol
        inversion = "none" if train.inversion_time_ms is None else f"{train.inversion_time_ms:g} ms"
        self._report.say(
            "DBG",
            f"train of {train.n_timepoints} timepoints from {train.source}, inversion {inversion}, "
            f"timepoints by {protocol.counter}",
        )
        for item in protocol.items:
            self._report.say("DBG", f"{item.name}: {item.value} ({item.source})")

    # --- Reconstruction ------------------------------------------------------------------------

    def _hand_over(self, part: Part, buffer: SliceBuffer) -> None:
        """Reconstruct a slice, once there is room: until then no further readouts are taken."""
        arrived = time.monotonic()
        if not self._handed_over.acquire(blocking=False):
            self._deadlines.scan_is_held_up(arrived)
            self._handed_over.acquire()
        deadline = self._deadlines.of_slice(arrived)
        job = self._worker.submit(self._reconstruct, part, buffer, arrived, deadline)
        handed_over = self._handed_over  # not self: the job would keep the scan, and the scan the job

        def done(job: Future[bool]) -> None:
            if job.cancelled() or not job.result():
                handed_over.release()

        job.add_done_callback(done)
        self._jobs = [*(other for other in self._jobs if not other.done()), job]

    def _reconstruct(
        self, part: Part, buffer: SliceBuffer, arrived: float, deadline: Deadline | None
    ) -> bool:
        """Reconstruct and send one slice; what goes wrong stays with this slice.

        Gives whether there is more to be made of it, which waits until slices that are complete are sent.
        """
        try:
            one = self._fold(part, buffer, arrived)
            result = self._make_maps(one, deadline)
            assert self._protocol is not None
            for note in shortcomings(
                part, one.head, one.encoding, self._protocol, one.kspace, one.dictionary
            ):
                result.remark("degraded", note)
            provenance = replace(
                self._provenance(result.method, result.status, result.notes, result.seconds),
                flags=self._flags(one, result),
                losses=result.inside.losses if result.inside is not None else (),
            )
            if self._observe is not None:
                self._observe(part.slice_number, result)
            self._send_all(self._images.images(result.maps, one.head, provenance))
            for note in result.notes:
                self._report.note(f"{part}: {note}")
            times = ", ".join(f"{name} {value:.2f} s" for name, value in result.seconds.items())
            self._report.say("DBG", f"{part} sent: {result.method}, {result.status}; {times}")
            if not self._settings.wants_more:
                return False
            further = beside_maps(result, self._settings, self._images, one.head, provenance, deadline)
            self._further.append(self._worker.submit(self._send_further, part, further))
            return True
        except Exception as error:
            if not isinstance(error, ScanError):
                _logger.exception("%s failed", part)
            self._report.fail(f"{part} failed: {str(error) or type(error).__name__}")
        return False

    def _fold(self, part: Part, buffer: SliceBuffer, arrived: float) -> _Folded:
        """Wait for the dictionary, and bring a slice's readouts into its subspace."""
        assert self._dictionary is not None
        assert self._protocol is not None
        dictionary = self._dictionary.result()
        waited = time.monotonic()
        kspace, encoding = fold(
            buffer, dictionary.basis, self.collector.receiver, self._encoder, self._protocol.units
        )
        seconds = {"dictionary": waited - arrived, "fold": time.monotonic() - waited}
        head = self._labelled(buffer.head, part)
        return _Folded(part, kspace, encoding, dictionary, head, arrived, waited, seconds)

    def _make_maps(self, one: _Folded, deadline: Deadline | None) -> SliceResult:
        part, settings, shape = one.part, self._settings, one.encoding.shape
        field = self._b1_map.on_slice(part.slice_number, shape) if self._b1_map else None
        self._report.say("DBG", f"{part}: its readouts are here, reconstructing")

        def on_lowrank(maps: SliceMaps) -> None:
            after = time.monotonic() - one.arrived
            self._report.say("DBG", f"{part}: low-rank maps ready after {after:.2f} s")
            ahead = self._provenance("lowrank", "complete", (), {"lowrank": after})
            self._send_all(self._images.images(maps, one.head, ahead, preview=True))

        def progress(what: str, done: int, of: int) -> None:
            if done == of // 2:
                self._report.say("DBG", f"{part}: {what} {done} of {of}")

        result = reconstruct_slice(
            one.kspace,
            one.encoding,
            one.dictionary,
            settings,
            deadline,
            B1Field(*field) if field is not None else None,
            partial(self._coil_maps.on_slice, part.slice_number) if self._coil_maps else None,
            noise_sd=1.0 if self.collector.whitening is not None else None,
            on_lowrank=on_lowrank if settings.preview else None,
            progress=progress,
        )
        if self._b1_map and field is None:
            result.remark("degraded", "the B1 map has no values for this slice: flip angles as planned")
        result.seconds = {**one.seconds, **result.seconds, "slice": time.monotonic() - one.begun}
        return result

    def _flags(self, one: _Folded, result: SliceResult) -> tuple[str, ...]:
        assert self._protocol is not None
        n_lost = self._protocol.n_measured - len(one.part.seen)
        flags = {
            "fallback": result.method != self._settings.method or result.status == "fallback",
            f"readouts_lost={n_lost}": n_lost > 0,
            "uneven_order": is_uneven(one.kspace.gram, one.encoding.points, one.dictionary.energies),
        }
        return tuple(flag for flag, is_so in flags.items() if is_so)

    def _send_all(self, images: list[ismrmrd.Image]) -> None:
        for image in images:
            self._send(image)
            self._delivered += 1

    def _send_further(self, part: Part, further: Further) -> None:
        """What was asked for beside the maps; if it cannot be made that is said, and costs no map."""
        try:
            for name, make in further:
                if not self._try_to_send(part, name, make):
                    return
        finally:
            self._handed_over.release()

    def _try_to_send(self, part: Part, name: str, make: Callable[[], list[ismrmrd.Image]]) -> bool:
        """Send what can be made; ``False`` if nobody takes it."""
        try:
            self._send_all(make())
        except ConnectionError as error:
            self._report.fail(f"{part}: {name} were not taken: {error}")
            return False
        except Exception as error:
            if not isinstance(error, ImportError | TimeoutError):
                _logger.exception("%s: no %s", part, name)
            self._report.note(f"{part}: no {name}: {str(error) or type(error).__name__}")
        return True

    def _provenance(
        self, method: str, status: str, notes: Iterable[str], seconds: dict[str, float]
    ) -> Provenance:
        assert self._protocol is not None
        notes = (*self._report.of_each_slice, *notes)
        train = self._protocol.train
        resolved = [f"train of {train.n_timepoints} timepoints: {train.source}"]
        resolved += [f"{item.name}: {item.value} ({item.source})" for item in self._protocol.items]
        return Provenance(
            method=method,
            status="degraded" if notes and status == "complete" else status,
            notes=notes,
            settings=self._settings.digest(),
            protocol_name=self._header.protocol_name,
            seconds=seconds,
            resolved=tuple(resolved),
            changed=self._settings.changed(),
        )

    def _labelled(self, head: np.void, part: Part) -> np.void:
        """The head that says where the slice is, and which repetition of it this is."""
        head = head.copy()
        head["idx"]["repetition"] = part.repetition
        if self._settings.fov_shift == "off":
            # In the plane of the slice the data are centred on the isocentre.
            head["position"] = np.dot(head["position"], head["slice_dir"]) * head["slice_dir"]
        return head

    def finish(self, ended_early: str) -> Outcome:
        """The stream is over: reconstruct what is open, wait for all slices."""
        self._deadlines.scan_ended(time.monotonic())
        self.collector.finish(ended_early)
        self._wait()
        for reason in HARMLESS:
            if count := self.tally.pop(reason, 0):
                text = f"{count} readout{'s' if count > 1 else ''} {reason}, which changes nothing"
                self._report.say("DBG", text)
        for sentence in self.tally.sentences():
            self._report.note(sentence)
        if sentence := self.collector.scan_counter.sentence():
            self._report.say("DBG", sentence)
        if ended_early:
            self._report.fail(ended_early)
        return self._outcome()

    def _wait(self) -> None:
        """Until everything that is under way is sent."""
        for job in self._jobs:
            job.result()
        while self._further:
            self._further.popleft().result()

    def _outcome(self) -> Outcome:
        return Outcome(self._delivered, tuple(self._report.failures), tuple(self._report.notes))

    def stop(self, why: str) -> Outcome | None:
        """Nothing more can be made; what is under way is not lost by it. ``None`` if there is nothing."""
        self._wait()
        if not self._delivered:
            return None
        lost = ", ".join(sorted({str(part.slice_number) for part in self.collector.parts.open}))
        self._report.fail(f"slice {lost} failed: {why}" if lost else why)
        return self._outcome()


def find_train(header_xml: bytes, readouts: Iterable[Readout], settings: Settings) -> Train:
    """The train that a scan would be reconstructed with, from its fullest slice.

    Raises
    ------
    ScanError
        If it cannot be told.
    """
    sources = gather(header_xml, settings)
    if sources.train is not None and sources.overridden:
        n = settings.timepoints
        return sources.train.first(n) if 0 < n < sources.train.n_timepoints else sources.train
    return find_protocol(header_xml, readouts, settings).train


def find_protocol(header_xml: bytes, readouts: Iterable[Readout], settings: Settings) -> Protocol:
    """The protocol of a scan, from its fullest slice.

    Raises
    ------
    ScanError
        If it cannot be told.
    """
    sources = gather(header_xml, settings)
    heads: dict[int, list[np.void]] = {}
    for readout in sources.prepared(readouts, settings, Tally(), ScanCounter()):
        if readout.flags & Flag.IS_NOISE_MEASUREMENT:
            continue
        heads.setdefault(int(readout.head["idx"]["slice"]), []).append(readout.head.copy())
    if not heads:
        raise ScanError("no imaging readouts: the train cannot be told")
    return settle(sources, np.array(max(heads.values(), key=len)), settings)


def reconstruct_scan(
    header_xml: bytes,
    readouts: Iterable[Readout],
    settings: Settings,
    send_image: Callable[[ismrmrd.Image], None],
    log: LogText = _log_only,
    *,
    observe: Observe | None = None,
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

    Raises
    ------
    ScanError
        If nothing could be delivered of the whole scan: no readouts, no train, no trajectory, sources that
        contradict each other. After the first slice this is one of the failures of the outcome.
    """
    sources = gather(header_xml, settings)
    scan = _Scan(sources, settings, send_image, Report(log), observe)
    source = sources.prepared(readouts, settings, scan.tally, scan.collector.scan_counter)
    ended_early = ""
    try:
        # What is added up by one thread does not depend on how many there are.
        with one_thread():
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
                scan.collector.add(readout)
            return scan.finish(ended_early)
    except ScanError as error:
        outcome = scan.stop(str(error))
        if outcome is None:
            raise
        return outcome
    finally:
        scan.close()
