"""A scan while it arrives: readouts in, images out.

`whorl.pipeline.collecting` settles what was scanned and collects each slice's readouts; `reconstruct_scan`
hands complete slices to `whorl.pipeline.slices.reconstruct_slice`, in a thread of its own.
"""

from __future__ import annotations

import logging
import math
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
from whorl.kspace.slicebuffer import SliceBuffer, SubspaceKspace
from whorl.maps.geometry import orientation
from whorl.maps.images import ImageMaker, Provenance, SliceMaps
from whorl.physics.dictionary import Dictionary
from whorl.pipeline.collecting import HARMLESS, Collector, Part, Report
from whorl.pipeline.deadlines import Deadline, in_time
from whorl.pipeline.dictionaries import dictionary_parameters, get_dictionary, pulse_shape
from whorl.pipeline.encoding import Encoder, Encoding
from whorl.pipeline.fitting import record_fit
from whorl.pipeline.protocol import Protocol, Sources, gather, settle
from whorl.pipeline.slices import B1Field, SliceResult, is_tuned, reconstruct_slice
from whorl.recon.inr import warm_up
from whorl.recon.pointspread import check_order
from whorl.runtime.logs import current_scan
from whorl.scan.arrivals import ScanCounter
from whorl.scan.failure import EndOfStream, ScanError
from whorl.scan.integrity import Tally, UnusableScan
from whorl.scan.readout import Flag, Readout
from whorl.scan.train import Train
from whorl.scan.transmit import read_b1_map

_logger = logging.getLogger("whorl")

#: Timepoints below which an undersampled train hardly tells tissues apart.
_SHORT_TRAIN = 50
#: Slices that are complete and not sent yet; while there are more, no readouts are taken.
_HANDED_OVER = 2
#: Joint features that the pictures of a fit show.
_N_FEATURES = 8

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
        sources: Sources,
        settings: Settings,
        send: Callable[[ismrmrd.Image], None],
        report: Report,
        observe: Observe | None,
        hold_out: bool,
    ):
        self._header, self._settings, self._send, self._report = sources.header, settings, send, report
        self._observe = observe
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise ScanError("device=cuda, but there is no usable GPU: expected one, or device=auto")
        cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
        self._device = torch.device("cuda" if cuda else "cpu")
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
            keep_held=hold_out or is_tuned(settings),
        )
        self._images = ImageMaker(self._header.recon, settings.output_dtype)
        pulse_shape(settings)  # what cannot be read shall not wait for the train
        self._b1_map = read_b1_map(settings.b1_map) if settings.b1_map else None
        self._coil_maps = read_external_maps(settings.coil_maps_file) if settings.coil_maps_file else None
        self._encoder = Encoder(self._header, settings, self._device, report.say)
        self._protocol: Protocol | None = None
        self._deadline = Deadline()  # of the scan: known when it ends
        self._deadlines: deque[Deadline] = deque(maxlen=_HANDED_OVER)  # of the latest slices
        self._order: tuple[Encoding, bool] | None = None
        self._delivered = 0
        self._jobs: list[Future[bool]] = []  # those that may not be done yet
        self._further: deque[Future[None]] = deque()  # what is made beside the maps of slices
        self._handed_over = threading.BoundedSemaphore(_HANDED_OVER)
        # One slice is reconstructed while the next arrives; the dictionary is built meanwhile.
        # What they log is of this scan too.
        of_scan: Any = {"initializer": current_scan.set, "initargs": (current_scan.get(),)}
        self._worker = ThreadPoolExecutor(1, "whorl-slice", **of_scan)
        self._builder = ThreadPoolExecutor(1, "whorl-dictionary", **of_scan)
        self._dictionary: Future[Dictionary] | None = None
        self._train = sources.train
        if settings.method == "inr":
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
        arrived, settings = time.monotonic(), self._settings
        deadline = None
        if settings.deadline_s or settings.scan_deadline_s:
            deadline = Deadline(arrived + (settings.deadline_s or math.inf), self._deadline)
        if not self._handed_over.acquire(blocking=False):
            # Nobody sees the end of a scan that is held up.
            if settings.scan_deadline_s:
                for earlier in self._deadlines:
                    earlier.bring_forward(arrived + settings.scan_deadline_s)
            self._handed_over.acquire()
        if deadline is not None:
            self._deadlines.append(deadline)
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
            assert self._dictionary is not None
            assert self._protocol is not None
            T, lost = self._protocol.n_measured, part.lost
            dictionary = self._dictionary.result()
            waited = time.monotonic()
            kspace = buffer.finish(dictionary.basis, self.collector.receiver)
            units = self._protocol.units
            encoding = self._encoder(buffer.interleaves.stack(kspace.interleaves), buffer.head, units)
            if encoding.phase is not None:
                kspace = kspace.turned(encoding.phase)
            folded = time.monotonic()
            settings = self._settings
            field = self._b1_map.on_slice(part.slice_number, encoding.shape) if self._b1_map else None
            maps = partial(self._coil_maps.on_slice, part.slice_number) if self._coil_maps else None
            head = self._labelled(buffer.head, part)
            self._report.say("DBG", f"{part}: its readouts are here, reconstructing")

            def on_lowrank(maps: SliceMaps) -> None:
                after = time.monotonic() - arrived
                self._report.say("DBG", f"{part}: low-rank maps ready after {after:.2f} s")
                if settings.preview:
                    ahead = self._provenance("lowrank", "complete", (), {"lowrank": after})
                    self._send_all(self._images.images(maps, head, ahead, preview=True))

            def progress(iteration: int, iterations: int) -> None:
                if iteration == iterations // 2:
                    self._report.say("DBG", f"{part}: fit at iteration {iteration} of {iterations}")

            result = reconstruct_slice(
                kspace,
                encoding,
                dictionary,
                settings,
                deadline,
                B1Field(*field) if field is not None else None,
                maps,
                noise_sd=1.0 if self.collector.whitening is not None else None,
                on_lowrank=on_lowrank if settings.preview else None,
                progress=progress,
            )
            if encoding.note:
                result.remark("degraded", encoding.note)
            if self._b1_map and field is None:
                result.remark("degraded", "the B1 map has no values for this slice: flip angles as planned")
            if T < _SHORT_TRAIN:
                result.remark(
                    "degraded", f"{T} timepoints are few: expected {_SHORT_TRAIN} or more for maps to trust"
                )
            if len(part.seen) < T:
                why = f": {lost}" if lost else ""
                result.remark("degraded", f"{T - len(part.seen)} of {T} readouts are missing{why}")
            elif lost:
                result.remark("degraded", f"of the readouts, {lost}")
            result.seconds = {
                "dictionary": waited - arrived,
                "fold": folded - waited,
                **result.seconds,
                "slice": time.monotonic() - waited,
            }
            if assumed := orientation(head)[2]:
                result.remark("degraded", assumed)
            flags = []
            if result.method != settings.method or result.status == "fallback":
                flags.append("fallback")
            if len(part.seen) < T:
                flags.append(f"readouts_lost={T - len(part.seen)}")
            if self._is_uneven(kspace, encoding, dictionary):
                flags.append("uneven_order")
            provenance = replace(
                self._provenance(result.method, result.status, result.notes, result.seconds),
                preset=str(result.diagnostics.get("preset", "")),
                flags=tuple(flags),
                losses=result.inside.losses if result.inside is not None else (),
            )
            if self._observe is not None:
                self._observe(part.slice_number, result)
            self._send_all(self._images.images(result.maps, head, provenance))
            for note in result.notes:
                self._report.note(f"{part}: {note}")
            times = ", ".join(f"{name} {value:.2f} s" for name, value in result.seconds.items())
            self._report.say("DBG", f"{part} sent: {result.method}, {result.status}; {times}")
            if not settings.wants_more:
                return False
            more = partial(self._send_more, part, result, head, provenance, deadline)
            self._further.append(self._worker.submit(more))
            return True
        except Exception as error:
            if not isinstance(error, ScanError):
                _logger.exception("%s failed", part)
            self._report.fail(f"{part} failed: {str(error) or type(error).__name__}")
        return False

    def _send_all(self, images: list[ismrmrd.Image]) -> None:
        for image in images:
            self._send(image)
            self._delivered += 1

    def _send_more(
        self,
        part: Part,
        result: SliceResult,
        head: np.void,
        provenance: Provenance,
        deadline: Deadline | None,
    ) -> None:
        """What was asked for beside the maps; if it cannot be made that is said, and costs no map."""
        try:
            self._make_more(part, result, head, provenance, deadline)
        finally:
            self._handed_over.release()

    def _make_more(
        self,
        part: Part,
        result: SliceResult,
        head: np.void,
        provenance: Provenance,
        deadline: Deadline | None,
    ) -> None:
        settings, images, inside = self._settings, self._images, result.inside
        found = inside is not None

        def coloured() -> list[ismrmrd.Image]:
            return images.coloured(result.maps, head, provenance)

        def subspace() -> list[ismrmrd.Image]:
            assert inside is not None
            values = inside.images if inside.phase is None else inside.phase * inside.images
            shown = (values * inside.mask).to(torch.complex64).cpu().numpy()
            return images.subspace(shown, head, provenance)

        def deviations() -> list[ismrmrd.Image]:
            assert inside is not None
            make = partial(inside.deviations, deadline)
            sd = make() if deadline is None else in_time(make, deadline, "whorl-uncertainty")
            return images.deviations(*sd, head, provenance)

        def frames() -> list[ismrmrd.Image]:
            assert inside is not None
            return images.frames(record_fit(inside, settings.fit_frames), _N_FEATURES, head, provenance)

        wanted: list[tuple[bool, str, Callable[[], list[ismrmrd.Image]]]] = [
            (settings.rgb, "coloured maps", coloured),
            (settings.subspace_images and found, "subspace images", subspace),
            (settings.uncertainty and found, "uncertainty", deviations),
            (bool(settings.fit_frames) and found, "pictures of the fit", frames),
        ]
        for is_wanted, name, make in wanted:
            if not is_wanted:
                continue
            try:
                self._send_all(make())
            except ConnectionError as error:
                self._report.fail(f"{part}: {name} were not taken: {error}")
                return
            except Exception as error:
                if not isinstance(error, ImportError | TimeoutError):
                    _logger.exception("%s: no %s", part, name)
                self._report.note(f"{part}: no {name}: {str(error) or type(error).__name__}")

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

    def _is_uneven(self, kspace: SubspaceKspace, encoding: Encoding, dictionary: Dictionary) -> bool:
        """Whether the order of the interleaves biases low-rank maps; said once."""
        if self._order is None or self._order[0] is not encoding:
            points = encoding.points.reshape(*encoding.dcf.shape, 2)
            try:
                order = check_order(
                    kspace.gram, encoding.dcf, points, encoding.nufft, encoding.shape, dictionary
                )
            except Exception:
                _logger.exception("the order of the interleaves could not be judged")
                return False
            if order.biased and self._order is None:
                # No warning: the INR and LLR correct for it, and the images are flagged.
                self._report.say("DBG", order.warning())
            self._order = encoding, order.biased
        return self._order[1]

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
        if self._settings.scan_deadline_s:
            self._deadline.bring_forward(time.monotonic() + self._settings.scan_deadline_s)
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
        lost = ", ".join(sorted({str(part.slice_number) for part in self.collector.open_parts}))
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
    sources = gather(header_xml, settings)
    scan = _Scan(sources, settings, send_image, Report(log), observe, hold_out)
    source = sources.prepared(readouts, settings, scan.tally, scan.collector.scan_counter)
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
            scan.collector.add(readout)
        return scan.finish(ended_early)
    except ScanError as error:
        outcome = scan.stop(str(error))
        if outcome is None:
            raise
        return outcome
    finally:
        scan.close()
