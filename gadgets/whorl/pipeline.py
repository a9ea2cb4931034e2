"""The way of the data, from readouts to maps: the only place where the rooms meet.

`reconstruct_scan` takes readouts while they arrive; `reconstruct_slice` reads as the method's
figure: subspace k-space, adjoint, coil combination, start, joint INR, dictionary match.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache

import ismrmrd
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.config import Settings
from whorl.kspace.coils import coil_maps, combine, whitening_matrix
from whorl.kspace.density import attached_density, density_compensation
from whorl.kspace.nufft import Nufft, make_nufft
from whorl.kspace.slicebuffer import Interleaves, SliceBuffer, SubspaceKspace, digest
from whorl.maps.images import ImageMaker, Provenance, SliceMaps
from whorl.physics.dictionary import Dictionary, build_dictionary
from whorl.physics.matching import match
from whorl.recon.corrected import corrected_start, imaginary_share
from whorl.recon.inr import fit_inr
from whorl.recon.lowrank import adjoint_coil_images
from whorl.recon.mask import object_mask, widen
from whorl.recon.normal import NormalOperator
from whorl.scan import resolve
from whorl.scan.failure import EndOfStream, ScanError
from whorl.scan.header import Header, read_header
from whorl.scan.integrity import Tally, usable
from whorl.scan.readout import Flag, Readout
from whorl.scan.train import Train
from whorl.scan.trajectory import resolve_units, to_recon_pixels

_logger = logging.getLogger("whorl")

#: Share of timepoints outside the train above which the train cannot be the right one.
_OUTSIDE = 0.1
#: Readouts of one slice that are kept at most while its train is not known.
_LONGEST_TRAIN = 10_000
#: Energy that a joint phase may leave in the imaginary part before its model is not trusted.
_IMAGINARY = 0.15

#: Reasons of the tally that are no loss.
_HARMLESS = ("came twice",)

LogText = Callable[[str, str], None]


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


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """How one set of interleaves was encoded.

    Parameters
    ----------
    shape
        (Y, X) of the images.
    dcf
        `(I, S)`: area of k-space for each sample, (cycles per pixel)².
    central
        `(I, S)` boolean: samples in the middle tenth of k-space.
    nufft
        Transform for the I·S samples.
    """

    shape: tuple[int, int]
    dcf: Tensor
    central: Tensor
    nufft: Nufft


@dataclass(slots=True)
class SliceResult:
    """Maps of a slice with what there is to say about them."""

    maps: SliceMaps
    method: str
    status: str = "complete"
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def remark(self, status: str, note: str) -> None:
        """Lower the status and say why."""
        order = ("complete", "degraded", "fallback")
        self.status = max(self.status, status, key=order.index)
        self.notes.append(note)


@lru_cache(maxsize=4)
def _cached_dictionary(key: bytes, build: Callable[[], Dictionary]) -> Dictionary:
    return build()


class _DictionaryRequest:
    """A dictionary to be built, equal to all requests for the same one: a warm server builds it once."""

    def __init__(self, train: Train, settings: Settings) -> None:
        self._train = train
        self._options = {
            "t1_range_ms": (settings.t1_min_ms, settings.t1_max_ms),
            "t2_range_ms": (settings.t2_min_ms, settings.t2_max_ms),
            "step": settings.dictionary_step,
            "energy": settings.energy,
            "n_coefficients": settings.n_coefficients,
        }
        self.key = train.key() + repr(self._options).encode()

    def __call__(self) -> Dictionary:
        return build_dictionary(self._train, **self._options)  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _DictionaryRequest) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def get(self) -> Dictionary:
        return _cached_dictionary(self.key, self)


def encode(
    trajectory: NDArray[np.float32], header: Header, settings: Settings, device: torch.device, log: LogText
) -> Encoding:
    """Density compensation and transform for a set of interleaves.

    Parameters
    ----------
    trajectory
        `(I, S, D)` as it came: two columns kx, ky, and perhaps a third with density weights.

    Raises
    ------
    ScanError
        If its unit is not clear or its weights cannot be used.
    """
    columns = trajectory.shape[-1]
    if columns not in (2, 3):
        raise ScanError(f"the trajectory has {columns} columns: expected kx, ky and perhaps a density weight")
    units = resolve_units(trajectory[..., :2], header.encoded, settings.trajectory_units)
    points = torch.from_numpy(to_recon_pixels(trajectory[..., :2], units, header.encoded, header.recon)).to(
        device
    )
    shape = (header.recon.matrix[1], header.recon.matrix[0])
    attached = columns == 3 and bool(trajectory[..., 2].any()) and settings.density == "attached"
    try:
        if attached:
            dcf = attached_density(torch.from_numpy(trajectory[..., 2].copy()).to(device), points)
        else:
            dcf = density_compensation(points, shape)
    except ValueError as error:
        raise ScanError(str(error)) from error
    # What the reconstructed matrix cannot resolve would fold back.
    dcf = dcf * (points.abs() <= 0.5).all(-1)
    radius = torch.linalg.vector_norm(points, dim=-1)
    log("DBG", f"{len(trajectory)} interleaves of {trajectory.shape[1]} samples, trajectory in {units}, "
        f"density {'attached' if attached else 'computed'}")  # fmt: skip
    nufft = make_nufft(points.clamp(-0.5, 0.5).reshape(-1, 2), shape, backend=settings.nufft)
    return Encoding(shape, dcf, radius <= 0.1 * radius.max(), nufft)


def has_signal(kspace: SubspaceKspace, encoding: Encoding) -> bool:
    """Whether a slice holds an object: its k-space is denser in the middle than outside, noise is not."""
    power = kspace.bins[:, 0].abs().square().sum(1)  # (I, S), first coefficient
    inner, outer = power[encoding.central], power[~encoding.central]
    if not len(inner) or not len(outer):
        return bool(power.any())
    return float(inner.mean()) > 3 * float(outer.mean())


def reconstruct_slice(
    kspace: SubspaceKspace,
    encoding: Encoding,
    dictionary: Dictionary,
    settings: Settings,
    deadline: float | None,
) -> SliceResult:
    """From subspace k-space to maps.

    Parameters
    ----------
    kspace
        The slice's readouts, folded: ``Uᴴy``.
    encoding, dictionary
        Of the scan, on the same device.
    deadline
        Time (`time.monotonic`) after which the low-rank maps are taken.
    """
    seconds: dict[str, float] = {}
    started = time.monotonic()

    def lap(name: str) -> None:
        nonlocal started
        now = time.monotonic()
        seconds[name] = now - started
        started = now

    if not has_signal(kspace, encoding):
        empty = np.zeros(encoding.shape, dtype=np.float32)
        result = SliceResult(SliceMaps(empty, empty, empty, empty), settings.method)
        result.remark("degraded", "the slice has no signal, its maps are zero")
        return result

    coil_images = adjoint_coil_images(kspace.bins, encoding.dcf, encoding.nufft)  # (K, C, Y, X)
    lap("adjoint")
    csm = coil_maps(coil_images)
    x0 = combine(coil_images, csm)  # x0 = A'W(U'y), (K, Y, X)
    del coil_images
    lap("coils")
    mask = object_mask(x0)
    result = SliceResult(SliceMaps(*[np.empty(0, np.float32)] * 4), settings.method)
    images = x0
    if settings.method == "inr":
        around = widen(mask, 2)
        start = x0
        try:
            if settings.start == "corrected":
                normal = NormalOperator(kspace.gram, encoding.dcf, csm, encoding.nufft)
                energies = dictionary.coefficients.abs().square().sum(0)
                z, phase = corrected_start(
                    x0, around, normal, energies / energies[0], steps=settings.correction_steps
                )
                unexplained = imaginary_share(x0[:1], phase, mask)
                lap("start")
                if unexplained < _IMAGINARY and bool(torch.isfinite(z).all()):
                    start = z  # a common phase changes no map
                else:
                    result.remark(
                        "fallback",
                        f"no common phase ({unexplained:.0%} of the energy is left over): "
                        f"the INR was fitted to x0",
                    )
            images = fit_inr(
                start,
                around,
                fit=settings.fit,
                iterations=settings.iterations,
                levels=settings.levels,
                features=settings.features,
                base_resolution=settings.base_resolution,
                finest_resolution=settings.finest_resolution,
                hidden=settings.hidden,
                learning_rate=settings.learning_rate,
                lambda_enc=settings.lambda_enc,
                lambda_mlp=settings.lambda_mlp,
                ridge=settings.ridge,
                seed=settings.seed,
                deadline=deadline,
            ).coefficients
        except Exception as error:
            # Whatever it was: maps that are late or wrong help nobody at the console; these are ready.
            _logger.warning("the INR was given up", exc_info=error)
            result.method = "lowrank"
            why = str(error) or type(error).__name__
            result.remark("fallback", f"low-rank maps instead of the INR: {why}")
            images = x0
        lap("fit")
    found = match(images[:, mask].T.contiguous(), dictionary)
    result.maps = SliceMaps(
        *(_on_raster(values, mask) for values in (found.t1_ms, found.t2_ms, found.m0.abs(), found.quality))
    )
    lap("match")
    result.seconds = seconds
    return result


def _on_raster(values: Tensor, mask: Tensor) -> NDArray[np.float32]:
    image = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    image[mask] = values.float()
    return image.cpu().numpy()


class _Scan:
    """State of one scan while it arrives."""

    def __init__(
        self, header: Header, settings: Settings, send: Callable[[ismrmrd.Image], None], log: LogText
    ):
        self._header, self._settings, self._send, self._log = header, settings, send, log
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise ScanError("device=cuda, but there is no usable GPU: expected one, or device=auto")
        cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
        self._device = torch.device("cuda" if cuda else "cpu")
        self.tally = Tally()
        self._images = ImageMaker(header.recon, settings.output_dtype)
        self._inversion = resolve.inversion_time(header, settings.inversion_time_ms)
        self._overridden = bool(settings.sequence)
        self._early = (
            resolve.train_from_csv(settings.sequence, self._inversion)
            if settings.sequence
            else resolve.train_from_header(header, self._inversion)
        )
        self._train: Train | None = None
        self._counter = ""
        self._noise: list[NDArray[np.complex64]] = []
        self._whitening: Tensor | None = None
        self._interleaves = Interleaves()
        self._slices: dict[int, SliceBuffer] = {}
        # Slices that were handed over or given up, with the digests of their timepoints.
        self._done: dict[int, NDArray[np.int64]] = {}
        self._latest: int | None = None
        self._interleaved = False
        self._compared: NDArray[np.bool_] | None = None
        self._encodings: dict[tuple[int, ...], Encoding] = {}
        self._delivered = 0
        self._failures: list[str] = []
        self._notes: list[str] = []
        self._scan_notes: list[str] = []  # those that concern each slice
        self._jobs: list[Future[None]] = []
        # One slice is reconstructed while the next arrives; the dictionary is built meanwhile.
        self._worker = ThreadPoolExecutor(1, "whorl-slice")
        self._builder = ThreadPoolExecutor(1, "whorl-dictionary")
        self._dictionary: Future[Dictionary] | None = None
        if self._early is not None:
            self._build_dictionary(self._early)

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)
        self._builder.shutdown(cancel_futures=True)

    def _build_dictionary(self, train: Train) -> None:
        request = _DictionaryRequest(train, self._settings)
        self._dictionary = self._builder.submit(lambda: request.get().to(self._device))

    # --- Arrival -------------------------------------------------------------------------------

    def add(self, readout: Readout) -> None:
        if readout.flags & Flag.IS_NOISE_MEASUREMENT:
            if self._latest is None:  # later ones would not be used
                self._noise.append(readout.data.copy())
            return
        if not readout.data.shape[1]:
            raise ScanError("the readouts have no samples left: expected some between discard_pre and _post")
        if not readout.trajectory.shape[1]:
            raise ScanError(
                "the readouts carry no trajectory: expected kx, ky for each sample, attached to the data"
            )
        if readout.head["idx"]["kspace_encode_step_2"]:
            raise ScanError(
                "the readouts number partitions (kspace_encode_step_2): only 2D scans are reconstructed"
            )
        number = int(readout.head["idx"]["slice"])
        if self._latest is None:
            self._whiten(readout.data.shape[0])
        elif number != self._latest:
            self._leave(self._latest, number)
        self._latest = number
        if number in self._done:
            self._count_late(readout, self._done[number])
            return
        buffer = self._slices.get(number)
        if buffer is None:
            buffer = SliceBuffer(readout, self._whitening, self._settings.virtual_coils, self._device)
            self._slices[number] = buffer
            if self._train is not None:
                self._number(buffer)
        buffer.add(readout, self._interleaves.number(readout.trajectory), self.tally)
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
            len(self._interleaves) * (self._settings.n_coefficients or 10) < T
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

    def _leave(self, number: int, following: int) -> None:
        """A readout of another slice follows: the one before may be over."""
        if following in self._slices or following in self._done:
            self._interleaved = True
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
        if self.tally["with a timepoint outside the train were dropped"] > max(_OUTSIDE * T, 1):
            raise ScanError(
                f"more than {_OUTSIDE:.0%} of the timepoints lie outside the train of {T} "
                f"({self._train.source}): it cannot be the one that was played. Set property sequence"
            )

    def _whiten(self, n_coils: int) -> None:
        """Whitening matrix of the noise readouts that came before the first image data."""
        if self._settings.whiten == "off" or not self._noise:
            self._log("DBG", "not whitened: " + ("no noise readouts" if not self._noise else "whiten=off"))
            return
        noise = [n for n in self._noise if len(n) == n_coils]
        samples = np.concatenate(noise, axis=1) if noise else np.empty((n_coils, 0), np.complex64)
        if samples.shape[1] < 4 * n_coils:
            self._note(
                f"the noise readouts hold {samples.shape[1]} usable samples for {n_coils} coils: "
                f"not whitened",
                each_slice=True,
            )
            return
        covariance = torch.from_numpy(samples @ samples.conj().T / samples.shape[1])
        try:
            self._whitening = whitening_matrix(covariance).to(self._device)
        except ValueError as error:
            self._note(f"{error}: not whitened", each_slice=True)
            return
        self._log("DBG", f"{n_coils} coils whitened by {samples.shape[1]} noise samples")

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
            self._compared[resolve.timepoints(buffer.heads, counter)] = True
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
        buffer = self._slices.pop(number)
        self._done[number] = buffer.digests
        self._jobs.append(self._worker.submit(self._reconstruct, number, buffer, time.monotonic()))

    def _reconstruct(self, number: int, buffer: SliceBuffer, arrived: float) -> None:
        """Reconstruct and send one slice; what goes wrong stays with this slice."""
        try:
            assert self._dictionary is not None
            assert self._train is not None
            T = self._train.n_timepoints
            dictionary = self._dictionary.result()
            waited = time.monotonic()
            kspace = buffer.finish(dictionary.basis)
            key = tuple(kspace.interleaves.tolist())
            if key not in self._encodings:
                trajectory = self._interleaves.stack(kspace.interleaves)
                self._encodings[key] = encode(
                    trajectory, self._header, self._settings, self._device, self._log
                )
            folded = time.monotonic()
            settings = self._settings
            deadline = arrived + settings.deadline_s if settings.deadline_s else None
            result = reconstruct_slice(kspace, self._encodings[key], dictionary, settings, deadline)
            if buffer.n_seen < T:
                result.remark("degraded", f"{T - buffer.n_seen} of {T} readouts are missing")
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
            )
            if provenance.notes and provenance.status == "complete":
                provenance = replace(provenance, status="degraded")
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

    def finish(self, ended_early: str) -> Outcome:
        """The stream is over: reconstruct what is open, wait for all slices."""
        if not self._slices and not self._done:
            lost = "; ".join(self.tally.sentences())
            raise ScanError(
                "no imaging readouts arrived"
                + (f" ({len(self._noise)} noise readouts did)" if self._noise else "")
                + (f": {lost}" if lost else "")
                + (f". {ended_early}" if ended_early else "")
            )
        if self._train is None:
            self._resolve_at_the_end(ended_early)
        assert self._train is not None
        T = self._train.n_timepoints
        failed = set()
        for number in sorted(self._slices):
            seen, arrived = self._slices[number].n_seen, self._slices[number].n_arrived
            if self._counter == "arrival" and arrived != T:
                why = f"timepoint=arrival needs exactly one readout for each of {T} timepoints, got {arrived}"
            elif seen < self._settings.min_readouts * T:
                why = f"{seen} of {T} timepoints arrived, expected at least {self._settings.min_readouts:.0%}"
            else:
                self._finish_slice(number)
                continue
            del self._slices[number]
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
            self._note(
                f"of {self._header.n_slices_announced} slices that the header announces, "
                f"{listed} did not arrive"
            )
        if ended_early:
            self._fail(ended_early)
        return Outcome(self._delivered, tuple(self._failures), tuple(self._notes))

    def _resolve_at_the_end(self, ended_early: str) -> None:
        """By the fullest slice from which train and counter can be told."""
        first_error: ScanError | None = None
        for buffer in sorted(self._slices.values(), key=lambda buffer: -buffer.n_waiting):
            try:
                found = self._find_train(buffer)
            except ScanError as error:  # noqa: PERF203 - a few slices, once
                first_error = first_error or error
            else:
                self._adopt(buffer, *found)
                return
        assert first_error is not None
        text = str(first_error)
        T = self._early.n_timepoints if self._early else self._header.n_timepoints_announced
        most = max(buffer.n_waiting for buffer in self._slices.values())
        if most < self._settings.min_readouts * T:
            # That comes first: the counters may not be at fault.
            least = f"{self._settings.min_readouts:.0%}"
            text = f"{most} of {T} timepoints arrived, expected at least {least}: {text}"
        raise ScanError(f"{text}. {ended_early}" if ended_early else text) from first_error

    def stop(self, error: ScanError) -> Outcome:
        """Nothing more can be made; what is under way is not lost by it.

        Raises
        ------
        ScanError
            `error`, if there is nothing.
        """
        for job in self._jobs:
            job.result()
        if not self._delivered:
            raise error
        lost = ", ".join(str(number) for number in sorted(self._slices))
        self._fail(f"slice {lost} failed: {error}" if lost else str(error))
        return Outcome(self._delivered, tuple(self._failures), tuple(self._notes))


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

    Raises
    ------
    ScanError
        If nothing could be delivered of the whole scan: no readouts, no train, no trajectory, sources that
        contradict each other. After the first slice this is one of the failures of the outcome.
    """
    scan = _Scan(read_header(header_xml), settings, send_image, log)
    source = usable(readouts, scan.tally)
    ended_early = ""
    try:
        while True:
            try:
                readout = next(source, None)
            except (EndOfStream, ScanError) as error:
                ended_early = f"the stream ended early: {error}"
                break
            if readout is None:
                break
            scan.add(readout)
        return scan.finish(ended_early)
    except ScanError as error:
        return scan.stop(error)
    finally:
        scan.close()
