"""From a slice's subspace k-space to its maps: the method's figure, step by step.

Letters: K coefficients, C coils, I interleaves, S samples, Y X pixels, H W pixels of the box around the
object.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.config import Settings
from whorl.kspace.coilmaps import maps_from_centre, polynomial_maps, polynomials
from whorl.kspace.coils import combine
from whorl.kspace.slicebuffer import SubspaceKspace
from whorl.maps import verdict
from whorl.maps.images import SliceMaps
from whorl.physics.dictionary import Dictionary
from whorl.physics.matching import match
from whorl.pipeline.attempts import Attempt, first_success
from whorl.pipeline.deadlines import Deadline
from whorl.pipeline.encoding import Encoding
from whorl.pipeline.errors import Deviations
from whorl.recon import methods
from whorl.recon.calibration import regress_interleaves
from whorl.recon.inr import InrFit, Watch
from whorl.recon.lowrank import adjoint_coil_images
from whorl.recon.mask import box_around, object_mask, widen
from whorl.recon.normal import Sampling
from whorl.recon.slicedata import Estimate, Progress, SliceData
from whorl.runtime.cores import one_thread
from whorl.scan.failure import ScanError

#: Share of the object in which B1 may be taken from the nearest place where it was measured.
_GUESSED_B1 = 0.05
#: Coefficients of which coil maps, mask and phase are made; weaker ones add noise.
_CALIBRATING = 3
#: Pixels around the object in which it may be as well.
_MARGIN = 2

NAMES = {"inr": "INR", "llr": "LLR", "lowrank": "low-rank"}


@dataclass(frozen=True, slots=True, eq=False)
class Inside:
    """What a slice's maps were made of.

    Parameters
    ----------
    images
        Subspace images `(K, Y, X)`; real where a common phase has been taken out.
    scale
        Their unit, in that of the data.
    phase
        That phase as a factor `(Y, X)`; ``None``: none.
    mask
        Boolean `(Y, X)`: the object.
    to_maps
        Matches other subspace images in the same way.
    losses
        Data term of each iteration of the fit, and of its end.
    deviations
        Standard deviations of T1 and T2 in ms, both `(Y, X)`, 0 outside: of noise and what is systematic,
        or, with ``noise_only=True``, of noise alone. Takes a `Deadline` or ``None``, and as long as a few
        slices.
    refit
        Repeats the fit of the INR to be watched; see `whorl.recon.slicedata.Estimate`. Its images and
        features are `(..., Y, X)` too.
    """

    images: Tensor
    scale: float
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
class Given:
    """What is the same for a slice and for repetitions of it.

    Parameters
    ----------
    encoding, dictionary, settings
        Of the scan.
    scale
        Unit of the data, by which they have been divided.
    b1
        Known transmit field; ``None``: not known.
    maps
        Coil maps from elsewhere: of coil images `(K, C, Y, X)`; ``None``: from the data.
    """

    encoding: Encoding
    dictionary: Dictionary
    settings: Settings
    scale: float
    b1: B1Field | None = None
    maps: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """What the methods start from, and where it lies.

    Parameters
    ----------
    data
        In the box around the object.
    box
        Lines and columns of it.
    mask
        Boolean `(Y, X)`: the object, which may be empty; that of the data is wider.
    """

    data: SliceData
    box: tuple[slice, slice]
    mask: Tensor

    def on_raster(self, boxed: Tensor) -> Tensor:
        """`(..., H, W)` to `(..., Y, X)`, 0 outside the box."""
        whole = boxed.new_zeros((*boxed.shape[:-2], *self.mask.shape))
        whole[..., self.box[0], self.box[1]] = boxed
        return whole


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
    progress: Progress | None = None,
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
        Takes what the method is at, from its thread; see `whorl.recon.slicedata.Progress`.
    """
    scale = magnitude(kspace.bins)
    if not (math.isfinite(scale) and bool(torch.isfinite(kspace.bins).all())):
        raise ScanError("the folded data are not finite: expected numbers of at most 1e38")
    own_maps = None if maps is None else partial(maps, kspace.matrix)
    given = Given(encoding, dictionary, settings, scale, b1, own_maps)
    result = SliceResult(no_maps(given), settings.method)
    if kspace.note:
        result.remark("degraded", kspace.note)
    # Data in units of 1e-10 or 1e10 shall not leave the range of float32 where they are squared.
    kspace = kspace.scaled(1 / scale)
    if not has_signal(kspace, encoding):
        result.remark("degraded", "the slice has no signal, its maps are zero")
        return result
    clock = Clock(result.seconds)
    with one_thread():
        its = prepare(kspace, given)
        clock.lap("adjoint")
        if not bool(its.mask.any()):
            result.remark("degraded", "no object stands out of the slice, its maps are zero")
            return result
        attempts = [
            Attempt(name, NAMES[name], partial(images_and_maps, name, its, given, result.seconds))
            for name in wanted(settings)
        ]
        ready = None
        if settings.method != "lowrank" and (deadline is not None or on_lowrank is not None):
            ready = attempts[-1].make(ignore)
            result.seconds["lowrank"] = clock.lap("lowrank")
            if on_lowrank is not None:
                on_lowrank(ready[1])
        taken, (estimate, found), given_up = first_success(attempts, ready, deadline, progress or ignore)
    result.method, result.maps, result.diagnostics = taken.name, found, estimate.diagnostics
    for title, why in given_up:
        result.remark("fallback", f"{taken.title} maps instead of the {title}: {why}")
    for status, note in remarks(taken.name, estimate, found, its, given):
        result.remark(status, note)
    result.inside = inside(taken.name, estimate, found, its, given, kspace, noise_sd)
    return result


# --- The steps of the figure -----------------------------------------------------------------------


def prepare(kspace: SubspaceKspace, given: Given) -> Slice:
    """Low-rank images of each coil, coil maps and the object's mask: what each method starts from."""
    encoding, energies = given.encoding, given.dictionary.energies
    leading = energies[:_CALIBRATING]
    coil_images = adjoint_coil_images(kspace.bins, encoding.dcf, encoding.nufft)  # (K, C, Y, X)
    told_apart = regress_interleaves(kspace.bins, kspace.gram, energies, leading=len(leading))
    clean = adjoint_coil_images(told_apart, encoding.dcf, encoding.nufft)  # (J, C, Y, X)
    way = given.settings.coil_maps
    csm = maps_from_centre(clean, "espirit" if way == "espirit" else "walsh")
    if given.maps is not None:
        csm = given.maps(clean)
    mask = object_mask(combine(clean, csm), leading)
    around = widen(mask, _MARGIN)
    found = bool(mask.any())
    rows, columns = box_around(around) if found else (slice(0, 1), slice(0, 1))
    coil_images, clean, csm, around = (
        whole[..., rows, columns] for whole in (coil_images, clean, csm, around)
    )  # fmt: skip
    refined = given.maps is None and way != "espirit"
    basis = polynomials(around) if refined else None
    if basis is not None and way == "polynomial":
        csm = polynomial_maps(clean, basis, csm)
    data = SliceData(
        coil_images,
        csm,
        combine(clean, csm),
        around,
        energies,
        Sampling(kspace.gram, encoding.dcf, encoding.points, encoding.nufft, given.settings.nufft),
        share=max(around.shape) / max(mask.shape),
        polynomials=basis,
    )
    return Slice(data, (rows, columns), mask)


def _lowrank(data: SliceData, settings: Settings, progress: Progress) -> Estimate:
    return methods.lowrank(data)


def _llr(data: SliceData, settings: Settings, progress: Progress) -> Estimate:
    return methods.llr(
        data,
        lam=settings.llr_lambda,
        block=settings.llr_block,
        iterations=settings.llr_iterations,
        progress=progress,
    )


def _inr(data: SliceData, settings: Settings, progress: Progress) -> Estimate:
    fit = {
        "fit": settings.fit,
        "encoder": settings.encoder,
        "iterations": settings.iterations,
        "levels": settings.levels,
        "features": settings.features,
        "base_resolution": settings.base_resolution,
        "finest_resolution": settings.finest_resolution,
        "log2_table": settings.log2_table,
        "frequencies": settings.frequencies,
        "sigma": settings.frequency_sigma,
        "layers": settings.sine_layers,
        "omega": settings.sine_omega,
        "hidden": settings.hidden,
        "learning_rate": settings.learning_rate,
        "lambda_enc": settings.lambda_enc,
        "lambda_mlp": settings.lambda_mlp,
        "ridge": settings.ridge,
        "seed": settings.seed,
    }
    return methods.inr(
        data,
        start=settings.start,
        correction_steps=settings.correction_steps,
        guided=settings.guide == "on",
        head=settings.head,
        fit=fit,
        progress=progress,
    )


#: Each takes a slice and gives its subspace images.
METHODS: dict[str, Callable[[SliceData, Settings, Progress], Estimate]] = {
    "lowrank": _lowrank,
    "llr": _llr,
    "inr": _inr,
}


def wanted(settings: Settings) -> tuple[str, ...]:
    """The method, and what stands in for it if it fails."""
    order = [settings.method]
    if settings.method == "inr" and settings.fallback == "llr":
        order.append("llr")
    return tuple(dict.fromkeys([*order, "lowrank"]))


def is_corrected(method: str, settings: Settings) -> bool:
    """Whether a method takes out what undersampling does to the images. A fit from random values may not have
    come so far."""
    corrects = settings.start == "corrected" and settings.correction_steps != 0
    return method == "llr" or (method == "inr" and corrects and settings.guide == "on")


def images_and_maps(
    name: str, its: Slice, given: Given, seconds: dict[str, float], progress: Progress
) -> tuple[Estimate, SliceMaps]:
    """What a method makes of a slice, and its maps.

    Raises
    ------
    FloatingPointError
        If the images are not finite; low-rank ones have no stand-in and are matched as they are.
    """
    clock = Clock(seconds)
    estimate = METHODS[name](its.data, given.settings, progress)
    if name != "lowrank" and not bool(torch.isfinite(estimate.coefficients).all()):
        raise FloatingPointError("its images are not finite")
    clock.lap("fit")
    found = to_maps(estimate.coefficients, its, given, estimate.phase)
    clock.lap("match")
    return estimate, found


def to_maps(images: Tensor, its: Slice, given: Given, phase: Tensor | None = None) -> SliceMaps:
    """Match of subspace images `(K, H, W)`, which may lack a phase factor `(H, W)`."""
    joint, mask = given.settings.b1 == "match", its.mask
    there = mask[its.box]
    found = match(
        images[:, there].T.contiguous(),
        given.dictionary,
        b1=_known_b1(given, mask)[0],
        refine=given.settings.refine == "on",
    )
    turn = found.m0.sgn().to(torch.complex64)
    return SliceMaps(
        t1_ms=_on_raster(found.t1_ms, mask),
        t2_ms=_on_raster(found.t2_ms, mask),
        m0=_on_raster(found.m0.abs() * given.scale, mask),
        quality=_on_raster(found.quality, mask),
        b1=_on_raster(found.b1, mask) if joint else None,
        turn=_on_raster(turn if phase is None else turn * phase[there], mask),
    )


def remarks(
    name: str, estimate: Estimate, found: SliceMaps, its: Slice, given: Given
) -> list[tuple[str, str]]:
    """Pairs of status and why: of the method, of a known transmit field, and of how the maps look."""
    t1_axis, t2_axis, _ = given.dictionary.grid.axes
    looks = verdict.remarks(
        found,
        (t1_axis[0], t1_axis[-1]),
        (t2_axis[0], t2_axis[-1]),
        corrected=is_corrected(name, given.settings),
    )
    return [*estimate.remarks, *_known_b1(given, its.mask)[1], *looks]


def inside(
    name: str,
    estimate: Estimate,
    found: SliceMaps,
    its: Slice,
    given: Given,
    kspace: SubspaceKspace,
    noise_sd: float | None,
) -> Inside:
    """What the maps were made of, on the whole raster."""
    images, csm = (its.on_raster(part) for part in (estimate.coefficients, estimate.csm))
    phase = None if estimate.phase is None else its.on_raster(estimate.phase)
    deviations = Deviations(
        kspace,
        images,
        phase,
        csm,
        its.mask,
        found,
        _known_b1(given, its.mask)[0],
        given.encoding.nufft,
        given.dictionary,
        None if noise_sd is None else noise_sd / given.scale,
        partial(_images_again, given=given, method=name),
    )
    return Inside(
        images,
        given.scale,
        phase,
        its.mask,
        lambda images: to_maps(images[:, its.box[0], its.box[1]], its, given),
        estimate.losses,
        deviations,
        None if estimate.refit is None else partial(_refit_on_raster, its, estimate.refit),
    )


# --- What the steps need ---------------------------------------------------------------------------


def magnitude(bins: Tensor) -> float:
    """The unit of folded data `(I, K, C, S)`: the largest sample of the first coefficient, of the median
    interleaf, so that no single one sets it."""
    largest = bins[:, 0].abs().amax((1, 2))
    usual = float(largest.median())
    return usual if usual > 0 and math.isfinite(usual) else float(bins.abs().max()) or 1.0


def has_signal(kspace: SubspaceKspace, encoding: Encoding) -> bool:
    """Whether a slice holds an object: its k-space is denser in the middle than outside, noise is not.

    All coefficients count, since an inversion can leave next to nothing in the first one (a brain in 200
    timepoints: 1.2 times as much in the middle as outside, in all together 215 times). That of the median
    interleaf counts, so that no single readout decides.
    """
    power = kspace.bins.abs().square().sum((1, 2))  # (I, S)
    inner, outer = encoding.central, ~encoding.central
    if not bool(inner.any()) or not bool(outer.any()):
        return bool(power.any())
    means = [
        ((power * part).sum(1) / part.sum(1).clamp_min(1))[part.any(1)].median() for part in (inner, outer)
    ]  # fmt: skip
    return float(means[0]) > 3 * float(means[1])


def no_maps(given: Given) -> SliceMaps:
    """Maps of zeros."""
    empty = np.zeros(given.encoding.shape, dtype=np.float32)
    return SliceMaps(empty, empty, empty, empty, empty if given.settings.b1 == "match" else None)


class Clock:
    """Seconds by stage, added to a table."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._latest = seconds, time.monotonic()

    def lap(self, name: str) -> float:
        now = time.monotonic()
        self._seconds[name] = now - self._latest
        self._latest = now
        return self._seconds[name]


def ignore(what: str, done: int, of: int) -> None:
    """Progress that nobody asked for."""


def _images_again(kspace: SubspaceKspace, *, given: Given, method: str) -> Tensor:
    """Images `(K, Y, X)` of another scan of the same slice."""
    its = prepare(kspace, given)
    return its.on_raster(METHODS[method](its.data, given.settings, ignore).coefficients)


def _refit_on_raster(its: Slice, refit: Callable[[Watch], InrFit], watch: Watch) -> InrFit:
    def whole(fit: InrFit) -> InrFit:
        return replace(
            fit, coefficients=its.on_raster(fit.coefficients), features=its.on_raster(fit.features)
        )

    return whole(refit(lambda iteration, current: watch(iteration, lambda: whole(current()))))


def _known_b1(given: Given, mask: Tensor) -> tuple[Tensor | None, tuple[tuple[str, str], ...]]:
    """Transmit field `(V,)` in the mask, as measured or 1, and remarks on what had to be assumed; ``None``
    where the dictionary has none, or it is matched."""
    b1, dictionary = given.b1, given.dictionary
    if len(dictionary.grid.b1_axis) == 1 or given.settings.b1 == "match":
        return None, ()
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


def _on_raster(values: Tensor, mask: Tensor) -> NDArray[Any]:
    """`(V,)` to `(Y, X)`: float32 or complex64."""
    kind = torch.complex64 if values.is_complex() else torch.float32
    image = torch.zeros(mask.shape, dtype=kind, device=mask.device)
    image[mask] = values.to(kind)
    return image.cpu().numpy()
