"""The methods: a slice in its subspace to its images.

Each takes `SliceData` and gives an `Estimate`. What a method does where its model does not hold is part of
it: it takes a plainer one and says so.

Letters: K coefficients, J leading coefficients, H W pixels of the box around the object, F joint features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whorl.recon.calibration import is_uneven
from whorl.recon.corrected import (
    Start,
    conjugate_gradients,
    corrected_start,
    imaginary_around,
    imaginary_share,
    joint_phase,
    phase_sigma,
)
from whorl.recon.guide import guide
from whorl.recon.inr import InrFit, fit_inr
from whorl.recon.llr import locally_low_rank
from whorl.recon.mask import widen
from whorl.recon.normal import is_real, make_kernel
from whorl.recon.slicedata import Estimate, Progress, SliceData

#: Steps of the corrected start: of an even order; of an uneven one, and between how many of them coil maps
#: and phase are refined.
_STEPS, _UNEVEN_STEPS, _REFINED_EVERY = 4, 12, 3
#: Steps of the k-space head for an uneven order.
_HEAD_STEPS = 2
#: Energy that a joint phase may leave in the imaginary part before its model is not trusted; 0.5 if there is
#: none. Clean scans: up to 0.10 (plate, noise 1e-2). Fat, of which a part only is out of phase: 0.13 to 0.15.
_IMAGINARY = 0.15
#: The same around a single pixel, and what noise adds to it, relative to the object's median. What the share
#: `_FEW` of the pixels exceeds was, relative to this bound, up to 0.46 in 51 clean scans (brain, noise 1e-2),
#: up to 1.0 and 2.9 at ±50 and ±100 Hz, 1.05 to 8.8 next to a phase that jumps by 1 rad or π/2, 1.5 to 10
#: with fat; up to 18 where an object reaches between the coils, whose phase is not smooth there. A jump by π
#: leaves the coefficients real: up to 0.2.
_DOUBT, _DOUBT_BY_NOISE = 0.01, 40.0
#: Energy relative to the object's median below which a pixel's phase says nothing.
_FAINT = 0.05
#: Share of the object below which such pixels are chance.
_FEW = 0.003


def lowrank(data: SliceData) -> Estimate:
    """Low-rank adjoint: x0 as it is."""
    return Estimate(data.x0, data.csm)


def llr(
    data: SliceData, *, lam: float, block: int, iterations: int, progress: Progress | None = None
) -> Estimate:
    """Locally low-rank reconstruction from the corrected start on, of real coefficients if they have a common
    phase.

    Parameters: see `whorl.recon.llr.locally_low_rank`.

    Raises
    ------
    FloatingPointError
        If the images are not finite, those to start from or those that were found.
    """
    begun, _, remarks = _begun(data, progress=progress)
    fitted = locally_low_rank(
        lambda z: begun.project(begun.image(z)),
        begun.project(begun.data.x0),
        begun.z,
        begun.project(begun.left),
        precondition=begun.precondition,
        lam=lam,
        block=block,
        iterations=iterations,
        progress=progress,
    )
    # What is outside stays 0 but for rounding.
    images, doubts = as_measured_where_doubtful(fitted.coefficients * data.mask, begun)
    return Estimate(
        images,
        begun.data.csm,
        {"objective": fitted.losses[-1]},
        remarks + doubts,
        phase=None if images.is_complex() else begun.phase,
        losses=fitted.losses,
    )


def inr(
    data: SliceData,
    *,
    start: str = "corrected",
    correction_steps: int = -1,
    guided: bool = True,
    head: str = "kspace",
    fit: Mapping[str, Any],
    progress: Progress | None = None,
) -> Estimate:
    """Joint INR.

    Parameters
    ----------
    start
        What is fitted: ``corrected`` images, or x0 (``adjoint``).
    correction_steps
        Conjugate-gradient steps of the corrected start; -1: by the order of the interleaves.
    guided
        Whether the encoder begins with the guide.
    head
        ``kspace``: the head is fitted to the data at last, if the order is uneven; ``image``: never.
    fit
        Other parameters of `whorl.recon.inr.fit_inr`.

    Raises
    ------
    FloatingPointError
        If the images are not finite, those to start from or those of the fit.
    """
    if start == "adjoint":
        _assert_finite(data)
        return _fitted(data.x0, data, guided=guided, fit=fit, progress=progress)[1]
    begun, uneven, remarks = _begun(data, steps=correction_steps, progress=progress)
    found, estimate = _fitted(begun.z, begun.data, guided=guided, fit=fit, progress=progress)
    images = estimate.coefficients
    if head == "kspace" and uneven:
        images = kspace_head(found.features, images, begun, steps=_HEAD_STEPS)
    images, doubts = as_measured_where_doubtful(images, begun)
    return Estimate(
        images,
        begun.data.csm,
        estimate.diagnostics,
        remarks + doubts,
        phase=None if images.is_complex() else begun.phase,
        losses=estimate.losses,
        refit=estimate.refit,
    )


def _begun(
    data: SliceData, *, steps: int = -1, progress: Progress | None
) -> tuple[Start, bool, tuple[tuple[str, str], ...]]:
    """The corrected start, whether the order of the interleaves is uneven, and remarks; steps of -1: by that
    order."""
    _assert_finite(data)
    sampling, J = data.sampling, len(data.calibrated)
    why = _no_common_phase(data, joint_phase(data.calibrated, data.energies[:J], phase_sigma(data)))
    uneven = is_uneven(sampling.gram, sampling.points, data.energies)
    begun = corrected_start(
        data,
        make_kernel(sampling, (data.mask.shape[0], data.mask.shape[1])),
        steps=steps if steps >= 0 else (_UNEVEN_STEPS if uneven else _STEPS),
        refined_every=_REFINED_EVERY if uneven else 0,
        real=not why,
        progress=progress,
    )
    return begun, uneven, (("fallback", f"{why}: complex coefficients"),) if why else ()


def _assert_finite(data: SliceData) -> None:
    if not bool(torch.isfinite(data.x0).all() & torch.isfinite(data.calibrated).all()):
        raise FloatingPointError("the images to start from are not finite")


def _fitted(
    images: Tensor, data: SliceData, *, guided: bool, fit: Mapping[str, Any], progress: Progress | None
) -> tuple[InrFit, Estimate]:
    """The INR of images `(K, H, W)`, real or complex."""
    parts = torch.cat([images.real, images.imag]) if images.is_complex() else images
    guided_by = guide(parts, data.mask) if guided else None
    refit = partial(fit_inr, images, data.mask, guide=guided_by, share=data.share, **fit)
    found = refit(progress=None if progress is None else partial(progress, "iteration"))
    diagnostics: dict[str, float | str] = {"data_term": found.losses[-1]}
    return found, Estimate(
        found.coefficients,
        data.csm,
        diagnostics,
        losses=found.losses,
        refit=lambda watch: refit(watch=watch),
    )


def kspace_head(features: Tensor, images: Tensor, start: Start, *, steps: int) -> Tensor:
    """Images in the span of the joint features that fit the data best: a few hundred unknowns.

    With orthonormal Q that span [φ, 1], V by conjugate gradients on ``Qᵀ N Q V = Qᵀ b``, from the
    image-domain head on.

    Parameters
    ----------
    features
        `(F+1, H, W)` with a last one of ones, zero outside the mask.
    images
        `(K, H, W)`: what the image-domain head gave, of the type of the start.

    Returns
    -------
    Tensor
        `(K, H, W)`, of the type of `images`.
    """
    shape = images.shape
    phi = features.flatten(1).double()  # (F+1, P)
    gram = phi @ phi.T
    gram.diagonal().add_(1e-10 * gram.diagonal().mean())
    factor = torch.linalg.cholesky_ex(gram)[0]
    q = torch.linalg.solve_triangular(factor, phi, upper=False).to(images.dtype)

    def of_features(v: Tensor) -> Tensor:  # (K, F+1) to (K, H, W)
        whole: Tensor = v @ q
        return whole.reshape(shape)

    def project(measured: Tensor) -> Tensor:
        unknowns: Tensor = start.project(measured).flatten(1) @ q.mH
        return unknowns

    v, _ = conjugate_gradients(
        lambda v: start.image(of_features(v)),
        start.data.x0 * start.data.mask,
        images.flatten(1) @ q.mH,
        steps,
        project=project,
    )
    return of_features(v)


def _no_common_phase(data: SliceData, phase: Tensor) -> str:
    """Why the coefficients cannot be taken as real; empty if they can."""
    if not is_real(data.sampling.gram):
        return "the basis is complex (RF phases that step by other than 180°)"
    J = len(data.calibrated)
    weighted = data.energies[:J].sqrt().reshape(-1, 1, 1) * data.calibrated
    share = float(imaginary_share(weighted, phase, data.mask))
    if not math.isfinite(share):
        return "the images to start from are not finite"
    return "" if share < _IMAGINARY else f"no common phase ({share:.0%} of the energy is left over)"


def as_measured_where_doubtful(images: Tensor, start: Start) -> tuple[Tensor, tuple[tuple[str, str], ...]]:
    """Complex values as the data have them where a pixel's coefficients share no phase (an air cavity, fat),
    and a remark.

    Parameters
    ----------
    images
        `(K, H, W)`, in the unit of z.

    Returns
    -------
    Tensor, tuple
        `images` themselves if there is no such pixel, else complex ``p z`` there corrected by the residual.
        Complex images are left as they are.
    """
    if images.is_complex():
        return images, ()
    mask, imaginary = start.data.mask, imaginary_around(start)
    usual = imaginary[mask].median()
    # Around the object there is nothing but noise, whose phase is any.
    signal = (start.data.energies.reshape(-1, 1, 1) * start.z.square()).sum(0)
    doubtful = (
        mask & (imaginary > _DOUBT + _DOUBT_BY_NOISE * usual) & (signal > _FAINT * signal[mask].median())
    )
    if not float(doubtful.sum() / mask.sum()) > _FEW:
        return images, ()
    doubtful = widen(doubtful, 1) & mask
    share = float(doubtful.sum() / mask.sum())
    remark = (
        "degraded",
        f"the coefficients share no phase in {share:.1%} of the object: unsmoothed complex values there",
    )
    return torch.where(doubtful, start.phase * start.z + start.left, start.phase * images), (remark,)
