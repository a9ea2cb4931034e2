"""From a slice's subspace k-space to its maps: the method's figure, step by step.

Letters: K coefficients, C coils, I interleaves, S samples, D trajectory columns, Y X pixels.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.config import Settings
from whorl.cores import spread
from whorl.kspace.coilmaps import maps_from_centre
from whorl.kspace.coils import combine, compression_matrix
from whorl.kspace.density import attached_density, density_compensation
from whorl.kspace.nufft import Nufft, make_nufft
from whorl.kspace.rovir import low_resolution_images, region_energies, rovir_matrix
from whorl.kspace.slicebuffer import Compress, HeldOut, SubspaceKspace
from whorl.maps.images import SliceMaps
from whorl.physics.dictionary import Dictionary
from whorl.physics.matching import match
from whorl.recon import methods
from whorl.recon.calibration import regress_interleaves
from whorl.recon.corrected import Start, advance, corrected_start, corrected_starts, joint_phase
from whorl.recon.heldout import held_out_error, without
from whorl.recon.inr import DeadlinePassed, InrFit, Watch, fit_inr
from whorl.recon.lowrank import adjoint_coil_images
from whorl.recon.mask import object_mask, widen
from whorl.recon.normal import GramNormal, is_real, make_normal
from whorl.recon.slicedata import Estimate, SliceData
from whorl.recon.tuning import PRESETS, USUAL, Preset, choose, worth_trying
from whorl.scan.failure import ScanError
from whorl.scan.girf import Girf, corrected, read_girf
from whorl.scan.header import Header
from whorl.scan.protocol import Sources
from whorl.scan.trajectory import resolve_units, to_recon_pixels

_logger = logging.getLogger("whorl")

#: Share of the object in which B1 may be taken from the nearest place where it was measured.
_GUESSED_B1 = 0.05
#: Readouts of which the virtual coils are chosen by region: enough for a full set of interleaves, whatever
#: their order.
ROVIR_BLOCK = 128
#: Coefficients of which the coil maps are made; weaker ones add noise.
_CALIBRATING = 3


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
    points
        `(I·S, 2)` trajectory in cycles per pixel.
    nufft
        Transform for these samples.
    phase
        `(I, S)` radians by which the data are to be turned; ``None``: not at all.
    """

    shape: tuple[int, int]
    dcf: Tensor
    central: Tensor
    points: Tensor
    nufft: Nufft
    phase: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Inside:
    """What a slice's maps were made of.

    Parameters
    ----------
    images
        Subspace images `(K, Y, X)`, arbitrary unit.
    mask
        Boolean `(Y, X)`: the object.
    to_maps
        Matches other subspace images in the same way.
    refit
        Repeats the fit of the INR to be watched; see `whorl.recon.slicedata.Estimate`.
    """

    images: Tensor
    mask: Tensor
    to_maps: Callable[[Tensor], SliceMaps]
    refit: Callable[[Watch], InrFit] | None


@dataclass(slots=True)
class SliceResult:
    """Maps of a slice with what there is to say about them."""

    maps: SliceMaps
    method: str
    status: str = "complete"
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    diagnostics: dict[str, float | str] = field(default_factory=dict)
    inside: Inside | None = None

    def remark(self, status: str, note: str) -> None:
        """Lower the status and say why."""
        order = ("complete", "degraded", "fallback")
        self.status = max(self.status, status, key=order.index)
        self.notes.append(note)


def encode(
    trajectory: NDArray[np.float32],
    head: np.void,
    header: Header,
    settings: Settings,
    girf: Girf | None,
    device: torch.device,
    log: Callable[[str, str], None],
    *,
    units: str = "auto",
) -> Encoding:
    """Density compensation and transform for a set of interleaves.

    Parameters
    ----------
    trajectory
        `(I, S, D)` as it came: two columns kx, ky, and perhaps a third with density weights.
    head
        Acquisition header of the slice's first readout: dwell time, position and directions.
    girf
        Impulse response of the gradients, by which the trajectory is corrected.
    units
        Of the trajectory, if its source says it; property ``trajectory_units`` counts more.

    Raises
    ------
    ScanError
        If its unit is not clear or its weights cannot be used.
    """
    columns = trajectory.shape[-1]
    if columns not in (2, 3):
        raise ScanError(f"the trajectory has {columns} columns: expected kx, ky and perhaps a density weight")
    told = units if settings.trajectory_units == "auto" else settings.trajectory_units
    units = resolve_units(trajectory[..., :2], header.encoded, told)
    nominal = to_recon_pixels(trajectory[..., :2], units, header.encoded, header.recon)
    played, phase = _played(nominal, head, header, settings, girf, log)
    points = torch.from_numpy(played).to(device)
    shape = (header.recon.matrix[1], header.recon.matrix[0])
    # A column that is constant weighs nothing (it may be a kz).
    attached = columns == 3 and settings.density == "attached" and float(np.ptp(trajectory[..., 2])) > 0
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
    points = points.clamp(-0.5, 0.5).reshape(-1, 2)
    nufft = make_nufft(points, shape, backend=settings.nufft)
    turn = None if phase is None else torch.from_numpy(phase.astype(np.float32)).to(device)
    return Encoding(shape, dcf, radius <= 0.1 * radius.max(), points, nufft, turn)


class Encoder:
    """Encodings of a scan's slices, which mostly share one.

    Parameters
    ----------
    header, settings, device, log
        See `encode`.

    Raises
    ------
    ScanError
        If the gradients' impulse response cannot be read.
    """

    def __init__(
        self, header: Header, settings: Settings, device: torch.device, log: Callable[[str, str], None]
    ) -> None:
        self._header, self._settings, self._device, self._log = header, settings, device, log
        self._girf = read_girf(settings.girf, settings.girf_raster_us) if settings.girf else None
        self._latest: tuple[bytes, Encoding] | None = None

    def __call__(self, trajectory: NDArray[np.float32], head: np.void, units: str) -> Encoding:
        """Parameters: see `encode`."""
        place = ("read_dir", "phase_dir", "slice_dir", "position")
        moves = self._girf is not None or self._settings.fov_shift == "nominal"
        key = b"".join([trajectory.tobytes(), *(head[name].tobytes() for name in place if moves)])
        if self._latest is None or self._latest[0] != key:
            encoding = encode(
                trajectory,
                head,
                self._header,
                self._settings,
                self._girf,
                self._device,
                self._log,
                units=units,
            )
            self._latest = key, encoding
        return self._latest[1]


def _played(
    nominal: NDArray[np.float32],
    head: np.void,
    header: Header,
    settings: Settings,
    girf: Girf | None,
    log: Callable[[str, str], None],
) -> tuple[NDArray[np.float32], NDArray[np.float64] | None]:
    """Trajectory `(I, S, 2)` that was played, cycles per pixel, and phase `(I, S)` to be added to the data.

    The phase takes back what the gradients' response adds to the field, and with fov_shift=nominal moves the
    centre of the image from the isocentre to the position of the slice: with ``y(k) = Σ ρ(r) exp(-i 2π k·r)``
    and ``r = r' + c``, the data about c are ``y(k) exp(+i 2π k·c)``.
    """
    played, phase = nominal, None
    directions = np.stack([head["read_dir"], head["phase_dir"], head["slice_dir"]]).astype(np.float64)
    delay_us = (settings.gradient_delay_x_us, settings.gradient_delay_y_us)
    pixel_m = np.array(header.recon.pixel_mm) * 1e-3
    if girf is not None or any(delay_us):
        dwell_us = float(head["sample_time_us"])
        if not dwell_us > 0:
            raise ScanError(
                f"sample_time_us of the readouts is {dwell_us:g}: expected the time between two samples, "
                f"without which girf and gradient_delay cannot be used"
            )
        moved, turned = corrected(nominal / pixel_m, dwell_us, girf, delay_us, directions)
        played = (moved * pixel_m).astype(np.float32)
        phase = turned  # which the data lack: the field adds to that of the gradients, exp(-i 2π k·r)
        shift = np.abs(played - nominal).max() * max(header.recon.matrix[:2])
        log("DBG", f"trajectory corrected by up to {shift:.2g} cycles per field of view")
    if settings.fov_shift == "nominal":
        centre = directions[:2] @ head["position"] / (pixel_m * 1e3)  # pixels along x and y
        ramp = 2 * np.pi * (nominal.astype(np.float64) @ centre)
        phase = ramp if phase is None else phase + ramp
        log("DBG", f"data shifted by {centre[0]:.2f} and {centre[1]:.2f} pixels to the slice's position")
    return played, phase


def make_compression(sources: Sources, settings: Settings) -> Compress:
    """What chooses the virtual coils of a slice."""
    header, table = sources.header, sources.trajectories
    V, energy = settings.virtual_coils, settings.coil_energy
    shape = (header.recon.matrix[1], header.recon.matrix[0])
    region = settings.region_of_interest()

    def svd(block: Tensor, _: object) -> tuple[Tensor, str]:
        return compression_matrix(block, V, energy=energy), ""

    def nothing(block: Tensor, _: object) -> tuple[Tensor, str]:
        return torch.eye(block.shape[1], dtype=block.dtype, device=block.device), ""

    def rovir(block: Tensor, places: Callable[[], NDArray[np.float32]]) -> tuple[Tensor, str]:
        trajectory = places()
        if trajectory.shape[-1] not in (2, 3):
            return (
                compression_matrix(block, V, energy=energy),
                "where the first readouts lie is known too late to choose virtual coils by region: "
                "the strongest ones instead of rovir",
            )
        trajectory = trajectory[..., :2]
        told: str = settings.trajectory_units
        if told == "auto" and table is not None:
            told = table.units
        units = resolve_units(trajectory, header.encoded, told)
        points = torch.from_numpy(to_recon_pixels(trajectory, units, header.encoded, header.recon))
        low = low_resolution_images(block, points.to(block.device), shape)
        if low is None and region != (0, 1, 0, 1):  # what is around the region may be seen all the same
            low = low_resolution_images(block, points.to(block.device), shape, zoom=1)
        if low is None:
            return (
                compression_matrix(block, V, energy=energy),
                f"the centre of k-space of the first {len(block)} readouts is not sampled densely enough to "
                f"tell what lies around the region: the strongest virtual coils instead of rovir",
            )
        return rovir_matrix(*region_energies(low, region), V, energy=energy), ""

    return {"svd": svd, "rovir": rovir, "off": nothing}[settings.compression]


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
    b1: tuple[NDArray[np.float32], NDArray[np.bool_]] | None = None,
    maps: Callable[[Tensor, Tensor], Tensor] | None = None,
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
    b1
        Known transmit field and where it was measured, both `(Y, X)`; see `whorl.scan.transmit`.
    maps
        Coil maps from elsewhere: of the matrix `(V, C)` of the virtual coils and of coil images
        `(K, V, Y, X)`; see `whorl.kspace.coilmaps.ExternalMaps`.
    """
    clock = _Clock()
    # Data in units of 1e-10 or 1e10 shall not leave the range of float32 where they are squared.
    scale = float(kspace.bins.abs().max()) or 1.0
    if not math.isfinite(scale):
        raise ScanError("the folded data are not finite: expected numbers of at most 1e38")
    kspace = kspace.scaled(1 / scale)
    empty = np.zeros(encoding.shape, dtype=np.float32)
    result = SliceResult(
        SliceMaps(empty, empty, empty, empty, empty if settings.b1 == "match" else None), settings.method
    )
    if kspace.note:
        result.remark("degraded", kspace.note)
    if not has_signal(kspace, encoding):
        result.remark("degraded", "the slice has no signal, its maps are zero")
        return result
    given = None if maps is None else partial(maps, kspace.matrix)
    images, mask, refit = subspace_images(
        kspace, encoding, dictionary, settings, deadline, result, clock, given
    )
    if not bool(mask.any()):
        result.remark("degraded", "no object stands out of the slice, its maps are zero")
        return result
    joint = settings.b1 == "match"
    field = None
    if len(dictionary.grid.b1_axis) > 1 and not joint:
        field = _known_b1(b1, mask, dictionary, result)

    def to_maps(images: Tensor) -> SliceMaps:
        found = match(images[:, mask].T.contiguous(), dictionary, b1=field, refine=settings.refine == "on")
        return SliceMaps(
            t1_ms=_on_raster(found.t1_ms, mask),
            t2_ms=_on_raster(found.t2_ms, mask),
            m0=_on_raster(found.m0.abs() * scale, mask),
            quality=_on_raster(found.quality, mask),
            b1=_on_raster(found.b1, mask) if joint else None,
        )

    result.maps = to_maps(images)
    clock.lap("match")
    result.seconds = clock.seconds
    result.inside = Inside(images, mask, to_maps, refit)
    return result


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began = self._latest = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = now - self._latest
        self._latest = now


def subspace_images(
    kspace: SubspaceKspace,
    encoding: Encoding,
    dictionary: Dictionary,
    settings: Settings,
    deadline: float | None,
    result: SliceResult,
    clock: _Clock,
    given: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Callable[[Watch], InrFit] | None]:
    """Subspace images `(K, Y, X)`, the object's mask `(Y, X)`, and what repeats the fit of an INR.

    A fall-back is remarked in `result`; `given` makes coil maps, see `slice_data`.
    """
    held = None if settings.method == "lowrank" else kspace.held
    bins, gram = kspace.bins, kspace.gram
    if held is not None:
        bins, gram = without(bins, gram, held, dictionary.basis)
    energies = dictionary.coefficients.abs().square().sum(0)
    energies = energies / energies[0]
    # What applies no normal operator needs no kernel.
    unused = settings.method == "lowrank" or (
        settings.method == "inr" and (settings.start, settings.head) == ("adjoint", "image")
    )
    form = "gram" if unused else settings.normal
    data, mask = slice_data(bins, gram, encoding, energies, form, settings.nufft, settings.coil_maps, given)
    # What is not to be judged is made of all readouts.
    whole = data
    if held is not None:
        normal = GramNormal(kspace.gram, encoding.dcf, data.normal.csm, encoding.nufft)
        coil_images = adjoint_coil_images(kspace.bins, encoding.dcf, encoding.nufft)
        whole = replace(data, coil_images=coil_images, normal=normal)
    clock.lap("adjoint")
    if settings.method == "lowrank" or not bool(mask.any()):
        return methods.lowrank(whole).coefficients, mask, None
    refit = None
    try:
        if settings.method == "llr":
            estimate = methods.llr(
                data,
                lam=settings.llr_lambda,
                block=settings.llr_block,
                iterations=settings.llr_iterations,
                seed=settings.seed,
                deadline=deadline,
            )
            if held is not None:
                held_out = _held_out(estimate.coefficients, data, held, dictionary, encoding, settings)
                estimate.diagnostics["held_out"] = held_out
        elif is_tuned(settings) and held is not None:
            judge = Judge(held, dictionary.basis, encoding, settings.nufft)
            estimate = _tuned_inr(data, whole, judge, settings, deadline, clock)
        else:
            estimate = _inr(data, settings, deadline, clock)
        images = estimate.coefficients
        if not bool(torch.isfinite(images).all()):
            raise FloatingPointError("its images are not finite")
        for status, note in estimate.remarks:
            result.remark(status, note)
        result.diagnostics, refit = estimate.diagnostics, estimate.refit
    except Exception as error:
        # Whatever it was: maps that are late or wrong help nobody at the console; these are ready.
        late = isinstance(error, DeadlinePassed)
        name = {"inr": "INR", "llr": "LLR"}[settings.method]
        _logger.warning("the %s was given up: %s", name, error, exc_info=None if late else error)
        why = str(error) or type(error).__name__
        result.remark("fallback", f"low-rank maps instead of the {name}: {why}")
        result.method = "lowrank"
        if held is not None:  # with coil maps of all readouts, as if it had been asked for
            whole, mask = slice_data(
                kspace.bins,
                kspace.gram,
                encoding,
                energies,
                "gram",
                settings.nufft,
                settings.coil_maps,
                given,
            )
        images = methods.lowrank(whole).coefficients
    clock.lap("fit")
    return images, mask, refit


def slice_data(
    bins: Tensor,
    gram: Tensor,
    encoding: Encoding,
    energies: Tensor,
    form: str,
    backend: str,
    maps: str = "walsh",
    given: Callable[[Tensor], Tensor] | None = None,
) -> tuple[SliceData, Tensor]:
    """What each method starts from, and the object's mask `(Y, X)` (that of the data is wider).

    Parameters
    ----------
    bins, gram
        `(I, K, C, S)` and `(I, K, K)`, of `SubspaceKspace`.
    energies
        `(K,)` in the dictionary, relative to the first.
    form, backend
        Of the normal operator, and the NUFFT for its kernel; see `whorl.recon.normal.make_normal`.
    maps
        How coil maps are made, see `whorl.kspace.coilmaps.maps_from_centre`.
    given
        Coil maps from elsewhere, for coil images `(K, C, Y, X)`.
    """
    coil_images = adjoint_coil_images(bins, encoding.dcf, encoding.nufft)  # (K, C, Y, X)
    told_apart = regress_interleaves(bins, gram, energies)
    clean = adjoint_coil_images(told_apart, encoding.dcf, encoding.nufft)
    estimate = partial(maps_from_centre, method=maps)
    csm = estimate(clean[:_CALIBRATING]) if given is None else given(clean)
    calibrated = combine(clean, csm)
    mask = object_mask(calibrated, energies)
    around = widen(mask, 2)
    form = form if bool(mask.any()) else "gram"
    normal = make_normal(
        gram, encoding.dcf, csm, encoding.points, encoding.nufft, around, form=form, backend=backend
    )
    again = None if given is not None else estimate
    return SliceData(coil_images, normal, calibrated, around, energies, is_real(gram), again), mask


class Judge:
    """Held-out error of images; see `whorl.recon.heldout.held_out_error`."""

    def __init__(self, held: HeldOut, basis: Tensor, encoding: Encoding, backend: str) -> None:
        points = encoding.points.reshape(*encoding.dcf.shape, 2)[held.interleaf].reshape(-1, 2)
        self._nufft = make_nufft(points, encoding.shape, backend=backend)
        self._held, self._basis, self._dcf = held, basis, encoding.dcf[held.interleaf]

    def error(self, images: Tensor, csm: Tensor, *, scaled: bool = False) -> float:
        return held_out_error(images, self._held, self._basis, csm, self._dcf, self._nufft, scaled=scaled)


def _held_out(
    images: Tensor,
    data: SliceData,
    held: HeldOut,
    dictionary: Dictionary,
    encoding: Encoding,
    settings: Settings,
) -> float:
    """Held-out error of images, which lack the joint phase if they are real."""
    if not images.is_complex():
        images = joint_phase(data.calibrated, data.energies) * images
    return Judge(held, dictionary.basis, encoding, settings.nufft).error(images, data.normal.csm)


def is_tuned(settings: Settings) -> bool:
    """Whether presets are tried, for which readouts must be held out: some must differ."""
    return (
        settings.method == "inr"
        and settings.preset == "auto"
        and settings.start == "corrected"
        and settings.fit == "varpro"
        and settings.tuning_budget_s > 0
        and len(set(_presets(settings).values())) > 1
    )


def _presets(settings: Settings) -> dict[str, Preset]:
    """The presets, with whatever was set by itself."""
    return {
        name: Preset(
            preset.steps if settings.correction_steps < 0 else settings.correction_steps,
            settings.finest_resolution or preset.finest,
            settings.iterations or preset.iterations,
        )
        for name, preset in PRESETS.items()
    }


def _fit(
    start: Start | SliceData,
    preset: Preset,
    settings: Settings,
    deadline: float | None,
    watch: Watch | None = None,
) -> InrFit:
    """The INR of a corrected start, or of x0."""
    images, mask = (start.x0, start.mask) if isinstance(start, SliceData) else (start.z, start.data.mask)
    return fit_inr(
        images,
        mask,
        fit=settings.fit,
        encoder=settings.encoder,
        iterations=settings.iterations or (preset.iterations if settings.fit == "varpro" else 0),
        levels=settings.levels,
        features=settings.features,
        base_resolution=min(settings.base_resolution, preset.finest),
        finest_resolution=preset.finest,
        log2_table=settings.log2_table,
        frequencies=settings.frequencies,
        sigma=settings.frequency_sigma,
        layers=settings.sine_layers,
        omega=settings.sine_omega,
        hidden=settings.hidden,
        learning_rate=settings.learning_rate,
        lambda_enc=settings.lambda_enc,
        lambda_mlp=settings.lambda_mlp,
        ridge=settings.ridge,
        seed=settings.seed,
        deadline=deadline,
        watch=watch,
    )


def _fit_alone(
    start: Start | SliceData, preset: Preset, settings: Settings, deadline: float | None
) -> InrFit:
    """On one core: two are 1.3 times as fast, but 20 times as slow as soon as anything else runs."""
    return spread(lambda given: _fit(given, preset, settings, deadline), [start])[0]


def _inr(data: SliceData, settings: Settings, deadline: float | None, clock: _Clock) -> Estimate:
    """With the settings of a preset."""
    preset = _presets(settings)[settings.preset if settings.preset in PRESETS else USUAL]
    start: Start | None = None
    remarks: tuple[tuple[str, str], ...] = ()
    if settings.start == "corrected":
        start, remarks = methods.trusted(corrected_start(data, steps=preset.steps))
        clock.lap("start")
    fit = _fit_alone(start or data, preset, settings, deadline)
    images = fit.coefficients
    # A start that is not trusted leaves the data flow as published.
    if settings.head == "kspace" and (start is not None or settings.start == "adjoint"):
        images = methods.kspace_head(fit.features, images, data, start, steps=settings.head_steps)
    if start is not None:
        images, doubts = methods.plain_where_doubtful(images, start, start.data.x0)
        remarks += doubts
    return Estimate(
        images, {"data_term": fit.losses[-1]}, remarks, partial(_fit, start or data, preset, settings, None)
    )


def _tuned_inr(
    data: SliceData, whole: SliceData, judge: Judge, settings: Settings, deadline: float | None, clock: _Clock
) -> Estimate:
    """With the preset that predicts readouts best which it has not seen.

    Parameters
    ----------
    data, whole
        Without and with the readouts that are held out.
    """
    presets = _presets(settings)
    starts = corrected_starts(data, sorted({preset.steps for preset in presets.values()}))
    last = starts[max(starts)]
    error = judge.error(last.images, last.data.normal.csm)
    plain = judge.error(data.x0 * data.mask, data.normal.csm, scaled=True)
    diagnostics: dict[str, float | str] = {"held_out_start": error, "held_out_x0": plain}
    clock.lap("start")
    start, remarks = methods.trusted(last)
    if start is not None and not error < plain:
        remarks = (("fallback", f"the corrected start predicts held-out readouts worse than x0 does "
                    f"({error:.3g} against {plain:.3g}): the INR was fitted to x0"),)  # fmt: skip
        start = None
    if start is None:
        fit = _fit_alone(whole, presets[USUAL], settings, deadline)
        refit = partial(_fit, whole, presets[USUAL], settings, None)
        return Estimate(fit.coefficients, diagnostics, remarks, refit)

    until = clock.began + settings.tuning_budget_s
    in_time = time.monotonic() < clock.began + settings.tuning_budget_s / 2
    at_a_time = 3 if data.mask.device.type != "cpu" else torch.get_num_threads()
    names = worth_trying(error, at_a_time) if in_time else (USUAL,)

    def fit_preset(start: Start, name: str) -> InrFit:
        limits = [deadline, None if name == USUAL else until]
        return _fit(start, presets[name], settings, min((t for t in limits if t is not None), default=None))

    taken, tried = choose({name: presets[name].steps for name in names}, starts, fit_preset, judge.error)
    tried_names = ", ".join(one.name for one in tried)
    diagnostics |= {
        "preset": f"{taken.name} of {tried_names}",
        **{f"held_out_{one.name}": one.error for one in tried},
    }
    # The features are those of the training data; the last word on their weights is that of all readouts.
    start = replace(taken.start, data=whole.with_maps(taken.start.data.normal.csm))
    if settings.head == "kspace":
        images = methods.kspace_head(
            taken.fit.features, taken.fit.coefficients, start.data, start, steps=settings.head_steps
        )
    else:
        images = methods.image_head(taken.fit.features, advance(start, 2).z, settings.ridge)
    images, doubts = methods.plain_where_doubtful(images, taken.start, start.data.x0)
    refit = partial(_fit, taken.start, presets[taken.name], settings, None)
    return Estimate(images, diagnostics, remarks + doubts, refit)


def _known_b1(
    b1: tuple[NDArray[np.float32], NDArray[np.bool_]] | None,
    mask: Tensor,
    dictionary: Dictionary,
    result: SliceResult,
) -> Tensor:
    """Transmit field `(V,)` in the mask: as measured, or 1. What had to be assumed is remarked."""
    inside = mask.cpu().numpy()
    if b1 is None:
        return torch.ones(int(inside.sum()), device=mask.device)
    values, measured = b1[0][inside], b1[1][inside]
    axis = dictionary.grid.b1_axis
    guessed = float(np.mean(~measured))
    beyond = float(np.mean((values < axis[0] - 1e-3) | (values > axis[-1] + 1e-3)))
    if guessed > _GUESSED_B1:
        result.remark(
            "degraded", f"B1 was not measured in {guessed:.0%} of the object: the nearest value counts"
        )
    if beyond > 0:
        result.remark(
            "degraded",
            f"B1 is beyond {axis[0]:g} to {axis[-1]:g} in {beyond:.1%} of the object: "
            f"the nearest end counts. Set properties b1_min and b1_max",
        )
    return torch.from_numpy(values).to(mask.device)


def _on_raster(values: Tensor, mask: Tensor) -> NDArray[np.float32]:
    image = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    image[mask] = values.float()
    return image.cpu().numpy()
