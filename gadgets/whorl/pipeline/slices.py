"""From a slice's subspace k-space to its maps: the method's figure, step by step.

Letters: K coefficients, C coils, I interleaves, S samples, D trajectory columns, Y X pixels.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.config import Settings
from whorl.kspace.coilmaps import maps_from_centre
from whorl.kspace.coils import combine
from whorl.kspace.nufft import make_nufft
from whorl.kspace.slicebuffer import HeldOut, SubspaceKspace
from whorl.maps.images import SliceMaps
from whorl.physics.dictionary import Dictionary
from whorl.physics.matching import match
from whorl.physics.precision import relative_sd, sensitivity
from whorl.physics.real import as_real
from whorl.pipeline.deadlines import Deadline, DeadlinePassed, in_time
from whorl.pipeline.encoding import Encoding
from whorl.recon import methods
from whorl.recon.calibration import regress_interleaves
from whorl.recon.corrected import Start, advance, corrected_start, corrected_starts, joint_phase
from whorl.recon.heldout import held_out_error, without
from whorl.recon.inr import InrFit, Watch, fit_inr
from whorl.recon.lowrank import adjoint_coil_images
from whorl.recon.mask import object_mask, widen
from whorl.recon.normal import GramNormal, is_real, make_normal
from whorl.recon.slicedata import Estimate, SliceData
from whorl.recon.tuning import PRESETS, USUAL, Preset, choose, worth_trying
from whorl.recon.uncertainty import SecondScan, covariance_of
from whorl.runtime.cores import spread
from whorl.scan.failure import ScanError

_logger = logging.getLogger("whorl")

_NAMES = {"inr": "INR", "llr": "LLR", "lowrank": "low-rank"}

#: Share of the object in which B1 may be taken from the nearest place where it was measured.
_GUESSED_B1 = 0.05
#: Coefficients of which the coil maps are made; weaker ones add noise.
_CALIBRATING = 3
#: Scans of the result from which its uncertainty is told.
_REPETITIONS = 6

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Inside:
    """What a slice's maps were made of.

    Parameters
    ----------
    images
        Subspace images `(K, Y, X)`, arbitrary unit; real where a common phase has been taken out.
    phase
        That phase as a factor `(Y, X)`; ``None``: none.
    mask
        Boolean `(Y, X)`: the object.
    to_maps
        Matches other subspace images in the same way.
    losses
        Data term of each iteration of the fit.
    deviations
        Standard deviations of T1 and T2 in ms, both `(Y, X)`, 0 outside: of noise and what is systematic,
        or, with ``noise_only=True``, of noise alone. Takes a `Deadline` or ``None``, and as long as a few
        slices.
    refit
        Repeats the fit of the INR to be watched; see `whorl.recon.slicedata.Estimate`.
    """

    images: Tensor
    phase: Tensor | None
    mask: Tensor
    to_maps: Callable[[Tensor], SliceMaps]
    losses: tuple[float, ...]
    deviations: Callable[..., tuple[NDArray[np.float32], NDArray[np.float32]]]
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


@dataclass(frozen=True, slots=True)
class B1Field:
    """Known transmit field of a slice and where it was measured, both `(Y, X)`; see `whorl.scan.transmit`."""

    values: NDArray[np.float32]
    measured: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """What the images of a slice are made from, in units in which the largest sample is about 1."""

    kspace: SubspaceKspace
    encoding: Encoding
    dictionary: Dictionary
    settings: Settings
    energies: Tensor
    given: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """Images of a slice, the object's mask `(Y, X)`, and the maps (of zeros if the mask is empty)."""

    estimate: Estimate
    mask: Tensor
    maps: SliceMaps
    seconds: dict[str, float]
    remarks: tuple[tuple[str, str], ...] = ()


def reconstruct_slice(
    kspace: SubspaceKspace,
    encoding: Encoding,
    dictionary: Dictionary,
    settings: Settings,
    deadline: Deadline | None,
    b1: B1Field | None = None,
    maps: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    noise_sd: float | None = None,
    on_lowrank: Callable[[SliceMaps], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SliceResult:
    """From subspace k-space to maps.

    Parameters
    ----------
    kspace
        The slice's readouts, folded: ``Uᴴy``.
    encoding, dictionary
        Of the scan, on the same device.
    deadline
        At which the low-rank maps are taken: they are made first, and what else is under way is left alone,
        whatever it hangs in. ``None``: there is none.
    b1
        Known transmit field.
    maps
        Coil maps from elsewhere: of the matrix `(V, C)` of the virtual coils and of coil images
        `(K, V, Y, X)`; see `whorl.kspace.coilmaps.ExternalMaps`.
    noise_sd
        Standard deviation of a complex sample's noise; ``None``: not known.
    on_lowrank
        Takes the low-rank maps as soon as they are ready, if another method was asked for.
    progress
        Takes (iteration, iterations) of the fit, from its thread.
    """
    # Data in units of 1e-10 or 1e10 shall not leave the range of float32 where they are squared.
    scale = float(kspace.bins.abs().max()) or 1.0
    if not math.isfinite(scale):
        raise ScanError("the folded data are not finite: expected numbers of at most 1e38")
    empty = np.zeros(encoding.shape, dtype=np.float32)
    joint = settings.b1 == "match"
    result = SliceResult(
        SliceMaps(empty, empty, empty, empty, empty if joint else None), settings.method
    )  # fmt: skip
    if kspace.note:
        result.remark("degraded", kspace.note)
    kspace = kspace.scaled(1 / scale)
    if not has_signal(kspace, encoding):
        result.remark("degraded", "the slice has no signal, its maps are zero")
        return result
    energies = dictionary.coefficients.abs().square().sum(0)
    given = None if maps is None else partial(maps, kspace.matrix)
    inputs = _Inputs(kspace, encoding, dictionary, settings, energies / energies[0], given)

    def known_b1(mask: Tensor) -> tuple[Tensor | None, tuple[tuple[str, str], ...]]:
        if len(dictionary.grid.b1_axis) == 1 or joint:
            return None, ()
        return _known_b1(b1, mask, dictionary)

    def to_maps(images: Tensor, mask: Tensor) -> SliceMaps:
        refine = settings.refine == "on"
        found = match(images[:, mask].T.contiguous(), dictionary, b1=known_b1(mask)[0], refine=refine)
        return SliceMaps(
            t1_ms=_on_raster(found.t1_ms, mask),
            t2_ms=_on_raster(found.t2_ms, mask),
            m0=_on_raster(found.m0.abs() * scale, mask),
            quality=_on_raster(found.quality, mask),
            b1=_on_raster(found.b1, mask) if joint else None,
        )

    def matched(make: Callable[[_Clock], tuple[Estimate, Tensor]], *, finite: bool) -> _Found:
        clock = _Clock()
        estimate, mask = make(clock)
        if not bool(mask.any()):
            return _Found(estimate, mask, result.maps, clock.seconds)
        if finite and not bool(torch.isfinite(estimate.coefficients).all()):
            raise FloatingPointError("its images are not finite")
        found = to_maps(estimate.coefficients, mask)
        clock.lap("match")
        return _Found(estimate, mask, found, clock.seconds, known_b1(mask)[1])

    def plain() -> _Found:
        return matched(partial(_plain_images, inputs), finite=False)

    def by(these: _Inputs) -> _Found:
        return matched(partial(_images, these, deadline, told), finite=True)

    done = (0, 0)

    def told(iteration: int, iterations: int) -> None:
        nonlocal done
        done = iteration, iterations
        if progress is not None:
            progress(iteration, iterations)

    ready: _Found | None = None
    if settings.method == "lowrank":
        found = plain()
    else:
        if deadline is not None or on_lowrank is not None:
            ready = plain()
            result.seconds["lowrank"] = sum(ready.seconds.values())
            if on_lowrank is not None:
                on_lowrank(ready.maps)
        tries = [inputs]
        if settings.method == "inr" and settings.fallback == "llr":
            # The LLR has nothing to choose: readouts that were kept aside for that are its own as well.
            tries.append(
                replace(inputs, kspace=replace(kspace, held=None), settings=replace(settings, method="llr"))
            )
        made: _Found | None = None
        given_up: list[tuple[str, str]] = []
        while made is None and tries:
            inputs = tries.pop(0)
            result.method, done = inputs.settings.method, (0, 0)
            name = _NAMES[result.method]
            try:
                if deadline is not None:
                    deadline.check(f"the {name} had not begun")
                asked = partial(by, inputs)
                made = asked() if deadline is None else in_time(asked, deadline, "whorl-fit")
            except Exception as error:
                # Whatever it was: maps that are late or wrong help nobody at the console; others are ready.
                late = isinstance(error, DeadlinePassed)
                why = str(error) or type(error).__name__
                if late and "not begun" not in why:
                    where = f"iteration {done[0]} of {done[1]}" if done[1] else "its start"
                    at = f"at {where}" if result.method == "inr" else "not ready"
                    why = f"it was {at} when its time was over"
                if late:
                    tries.clear()
                _logger.warning("the %s was given up: %s", name, why, exc_info=None if late else error)
                given_up.append((name, why))
        if made is None:
            result.method = "lowrank"
        for name, why in given_up:
            result.remark("fallback", f"{_NAMES[result.method]} maps instead of the {name}: {why}")
        found = made or ready or plain()
    if not bool(found.mask.any()):
        result.remark("degraded", "no object stands out of the slice, its maps are zero")
        return result
    for status, note in (*found.estimate.remarks, *found.remarks):
        result.remark(status, note)
    result.maps = found.maps
    result.seconds |= found.seconds
    estimate, mask = found.estimate, found.mask
    result.diagnostics = estimate.diagnostics
    sd = None if noise_sd is None else noise_sd / scale

    method = result.method  # not the result, which would keep itself

    @cache
    def errors(until: Deadline | None) -> Tensor:
        return repeated_errors(inputs, estimate, mask, sd, method, until)

    def deviations(
        until: Deadline | None, *, noise_only: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        covariance = covariance_of(as_real(errors(until), 1), mask, noise_only=noise_only)
        return _deviations(covariance, estimate, mask, found.maps, dictionary, known_b1(mask)[0])

    result.inside = Inside(
        estimate.coefficients,
        estimate.phase,
        mask,
        partial(to_maps, mask=mask),
        estimate.losses,
        deviations,
        estimate.refit,
    )
    return result


def has_signal(kspace: SubspaceKspace, encoding: Encoding) -> bool:
    """Whether a slice holds an object: its k-space is denser in the middle than outside, noise is not."""
    power = kspace.bins[:, 0].abs().square().sum(1)  # (I, S), first coefficient
    inner, outer = power[encoding.central], power[~encoding.central]
    if not len(inner) or not len(outer):
        return bool(power.any())
    return float(inner.mean()) > 3 * float(outer.mean())


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began = self._latest = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = now - self._latest
        self._latest = now


def _plain_images(inputs: _Inputs, clock: _Clock) -> tuple[Estimate, Tensor]:
    """Low-rank images of all readouts, and the object's mask."""
    kspace, settings = inputs.kspace, inputs.settings
    data, mask = slice_data(
        kspace.bins,
        kspace.gram,
        inputs.encoding,
        inputs.energies,
        "gram",  # no normal operator is applied: it needs no kernel
        settings.nufft,
        settings.coil_maps,
        inputs.given,
    )
    clock.lap("adjoint")
    return methods.lowrank(data), mask


def _images(
    inputs: _Inputs, deadline: Deadline | None, progress: Progress | None, clock: _Clock
) -> tuple[Estimate, Tensor]:
    """Images by the method that is asked for, other than low-rank, and the object's mask `(Y, X)`."""
    kspace, encoding, dictionary, settings = (
        inputs.kspace, inputs.encoding, inputs.dictionary, inputs.settings,
    )  # fmt: skip
    held, bins, gram = kspace.held, kspace.bins, kspace.gram
    if held is not None:
        bins, gram = without(bins, gram, held, dictionary.basis)
    # What applies no normal operator needs no kernel.
    unused = settings.method == "inr" and (settings.start, settings.head) == ("adjoint", "image")
    form = "gram" if unused else settings.normal
    data, mask = slice_data(
        bins, gram, encoding, inputs.energies, form, settings.nufft, settings.coil_maps, inputs.given
    )
    # What is not to be judged is made of all readouts.
    whole = data
    if held is not None:
        normal = GramNormal(kspace.gram, encoding.dcf, data.normal.csm, encoding.nufft)
        coil_images = adjoint_coil_images(kspace.bins, encoding.dcf, encoding.nufft)
        whole = replace(data, coil_images=coil_images, normal=normal)
    clock.lap("adjoint")
    if not bool(mask.any()):
        return methods.lowrank(whole), mask
    if deadline is not None:
        deadline.check("the fit had not begun")
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
        estimate = _tuned_inr(data, whole, judge, settings, deadline, progress, clock)
    else:
        estimate = _inr(data, settings, deadline, progress, clock)
    clock.lap("fit")
    return estimate, mask


def _deviations(
    covariance: Tensor,
    estimate: Estimate,
    mask: Tensor,
    maps: SliceMaps,
    dictionary: Dictionary,
    b1: Tensor | None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Standard deviations of T1 and T2 in ms, `(Y, X)`, from the covariance `(V, J, J)` of coefficients."""
    images, device = estimate.coefficients, mask.device
    inside = mask.cpu().numpy()
    t1_ms, t2_ms = (torch.from_numpy(m[inside]).to(device) for m in (maps.t1_ms, maps.t2_ms))
    joint = maps.b1 is not None
    if maps.b1 is not None:
        b1 = torch.from_numpy(maps.b1[inside]).to(device)
    moved = sensitivity(images[:, mask].T, t1_ms, t2_ms, dictionary, b1=b1, joint=joint)
    relative = relative_sd(moved, covariance)
    return _on_raster(relative[:, 0] * t1_ms, mask), _on_raster(relative[:, 1] * t2_ms, mask)


def repeated_errors(
    inputs: _Inputs,
    estimate: Estimate,
    mask: Tensor,
    noise_sd: float | None,
    method: str,
    deadline: Deadline | None,
) -> Tensor:
    """What the method makes of scans of its own images, less these images, `(N, K, Y, X)`.

    Parameters
    ----------
    noise_sd
        Of a complex sample; ``None``: as the data show it.
    method
        Which one the images are from.
    """
    images, csm = estimate.coefficients, estimate.csm
    assert csm is not None
    seen = images * mask if estimate.phase is None else estimate.phase * images * mask
    scan = SecondScan(
        inputs.kspace, seen.to(csm.dtype), csm, inputs.dictionary.basis, inputs.encoding.nufft
    )  # fmt: skip
    sd = scan.noise_sd() if noise_sd is None else noise_sd
    # It shall choose as if it had the time that it had.
    settings = replace(inputs.settings, tuning_budget_s=math.inf)

    def repeat(seed: int) -> Tensor:
        if deadline is not None:
            deadline.check(f"the uncertainty was at repetition {seed} of {_REPETITIONS}")
        again = replace(inputs, kspace=scan.measured(sd, seed), settings=settings)
        if method == "lowrank":
            found, _ = _plain_images(again, _Clock())
        else:
            found, _ = _images(again, deadline, None, _Clock())
        its = found.coefficients
        if its.is_complex() != images.is_complex():  # only one of the two had a common phase
            its = its.abs() * torch.sign(images) if its.is_complex() else its.to(images.dtype)
        return its - images

    return torch.stack(spread(repeat, range(_REPETITIONS)))


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
    deadline: Deadline | None,
    progress: Progress | None = None,
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
        progress=progress,
        watch=watch,
    )


def _fit_alone(
    start: Start | SliceData,
    preset: Preset,
    settings: Settings,
    deadline: Deadline | None,
    progress: Progress | None,
) -> InrFit:
    """On one core: two are 1.3 times as fast, but 20 times as slow as soon as anything else runs."""
    return spread(lambda given: _fit(given, preset, settings, deadline, progress), [start])[0]


def _inr(
    data: SliceData,
    settings: Settings,
    deadline: Deadline | None,
    progress: Progress | None,
    clock: _Clock,
) -> Estimate:
    """With the settings of a preset."""
    name = settings.preset if settings.preset in PRESETS else USUAL
    preset = _presets(settings)[name]
    start: Start | None = None
    remarks: tuple[tuple[str, str], ...] = ()
    if settings.start == "corrected":
        start, remarks = methods.trusted(corrected_start(data, steps=preset.steps))
        clock.lap("start")
    fit = _fit_alone(start or data, preset, settings, deadline, progress)
    images = fit.coefficients
    # A start that is not trusted leaves the data flow as published.
    if settings.head == "kspace" and (start is not None or settings.start == "adjoint"):
        images = methods.kspace_head(fit.features, images, data, start, steps=settings.head_steps)
    if start is not None:
        images, doubts = methods.plain_where_doubtful(images, start, start.data.x0)
        remarks += doubts
    return Estimate(
        images,
        {"data_term": fit.losses[-1]},
        remarks,
        phase=None if start is None or images.is_complex() else start.phase,
        csm=data.normal.csm if start is None else start.data.normal.csm,
        losses=fit.losses,
        refit=partial(_fit, start or data, preset, settings, None, None),
    )


def _tuned_inr(
    data: SliceData,
    whole: SliceData,
    judge: Judge,
    settings: Settings,
    deadline: Deadline | None,
    progress: Progress | None,
    clock: _Clock,
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
        fit = _fit_alone(whole, presets[USUAL], settings, deadline, progress)
        return Estimate(
            fit.coefficients,
            diagnostics,
            remarks,
            csm=whole.normal.csm,
            losses=fit.losses,
            refit=partial(_fit, whole, presets[USUAL], settings, None, None),
        )

    until = clock.began + settings.tuning_budget_s
    in_time = time.monotonic() < clock.began + settings.tuning_budget_s / 2
    at_a_time = 3 if data.mask.device.type != "cpu" else torch.get_num_threads()
    names = worth_trying(error, at_a_time) if in_time else (USUAL,)

    def fit_preset(start: Start, name: str) -> InrFit:
        its_own = deadline if name == USUAL else Deadline(until, deadline)
        return _fit(start, presets[name], settings, its_own, progress if name == USUAL else None)

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
    return Estimate(
        images,
        diagnostics,
        remarks + doubts,
        phase=None if images.is_complex() else taken.start.phase,
        csm=taken.start.data.normal.csm,
        losses=taken.fit.losses,
        refit=partial(_fit, taken.start, presets[taken.name], settings, None, None),
    )


def _known_b1(
    b1: B1Field | None, mask: Tensor, dictionary: Dictionary
) -> tuple[Tensor, tuple[tuple[str, str], ...]]:
    """Transmit field `(V,)` in the mask, as measured or 1, and remarks on what had to be assumed."""
    inside = mask.cpu().numpy()
    if b1 is None:
        return torch.ones(int(inside.sum()), device=mask.device), ()
    values, measured = b1.values[inside], b1.measured[inside]
    axis = dictionary.grid.b1_axis
    guessed = float(np.mean(~measured))
    beyond = float(np.mean((values < axis[0] - 1e-3) | (values > axis[-1] + 1e-3)))
    remarks = []
    if guessed > _GUESSED_B1:
        remarks.append(
            (
                "degraded",
                f"B1 was not measured in {guessed:.0%} of the object: the nearest value counts",
            )
        )
    if beyond > 0:
        remarks.append(
            (
                "degraded",
                f"B1 is beyond {axis[0]:g} to {axis[-1]:g} in {beyond:.1%} of the object: "
                f"the nearest end counts. Set properties b1_min and b1_max",
            )
        )
    return torch.from_numpy(values).to(mask.device), tuple(remarks)


def _on_raster(values: Tensor, mask: Tensor) -> NDArray[np.float32]:
    image = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    image[mask] = values.float()
    return image.cpu().numpy()
