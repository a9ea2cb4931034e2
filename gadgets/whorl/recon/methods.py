"""The methods: a slice in its subspace to its images.

Each takes `SliceData` and gives an `Estimate`. What a method does where its model does not hold is part of
it: it falls back to a plainer one and says so.

Letters: K coefficients, Y X pixels, F joint features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from whorl.pipeline.deadlines import Deadline
from whorl.recon.corrected import Start, conjugate_gradients, imaginary_around, imaginary_share, joint_phase
from whorl.recon.inr import solve_head
from whorl.recon.llr import locally_low_rank
from whorl.recon.mask import widen
from whorl.recon.slicedata import Estimate, SliceData

#: Energy that a joint phase may leave in the imaginary part before its model is not trusted.
_IMAGINARY = 0.15
#: The same around a single pixel, and what noise adds to it, relative to the object's median. Without
#: disturbance the largest share of a pixel was 0.0015 (noise 1e-3) and 0.04 with a median of 0.0014
#: (5e-3); next to a phase that jumps by π it is 0.03 and more.
_DOUBT, _DOUBT_BY_NOISE = 0.01, 40.0
#: Energy relative to the object's median below which a pixel's phase says nothing.
_FAINT = 0.05
#: Energy share of the residual of the corrected start above which its steps did not converge.
_UNSOLVED = 0.1
#: Share of the object below which such pixels are chance.
_FEW = 0.003


def lowrank(data: SliceData) -> Estimate:
    """Low-rank adjoint: x0 as it is."""
    return Estimate(data.x0, csm=data.normal.csm)


def llr(
    data: SliceData, *, lam: float, block: int, iterations: int, seed: int, deadline: Deadline | None
) -> Estimate:
    """Locally low-rank reconstruction, of real coefficients if they have a common phase.

    Parameters: see `whorl.recon.llr.locally_low_rank`.
    """
    phase = joint_phase(data.calibrated, data.energies)
    share = _share(data, phase)
    why = _no_common_phase(data, share)
    fitted = locally_low_rank(
        data.x0,
        data.normal,
        lam=lam,
        block=block,
        iterations=iterations,
        seed=seed,
        phase=None if why else phase,
        mask=data.mask,
        deadline=deadline,
    )
    remarks = (("fallback", f"{why}: complex coefficients"),) if why else ()
    diagnostics: dict[str, float | str] = {
        "imaginary_share": share,
        "objective": fitted.losses[-1],
    }
    return Estimate(
        fitted.coefficients,
        diagnostics,
        remarks,
        phase=None if why else phase,
        csm=data.normal.csm,
        losses=fitted.losses,
    )


def kspace_head(
    features: Tensor, images: Tensor, data: SliceData, start: Start | None, *, steps: int
) -> Tensor:
    """Images in the span of the joint features that fit the data best: a few hundred unknowns.

    With ``Q = qr([φ, 1])``, V by conjugate gradients on ``Qᵀ N Q V = Qᵀ b``, from the image-domain head on.

    Parameters
    ----------
    features
        `(F+1, Y, X)` with a last one of ones, zero outside the mask.
    images
        `(K, Y, X)`: what the image-domain head gave; real with a `start`, else complex.

    Returns
    -------
    Tensor
        `(K, Y, X)`, of the type of `images`.
    """
    shape = images.shape[1:]
    q: Tensor = torch.linalg.qr(features.flatten(1).T).Q.to(images.dtype)  # (P, F+1)
    operator = data.normal if start is None else start.operator
    right = data.x0 * data.mask if start is None else start.right

    def inner(v: Tensor) -> Tensor:  # (F+1, K)
        right_hand: Tensor = q.mH @ operator((q @ v).T.reshape(-1, *shape)).flatten(1).T
        return right_hand

    v, _ = conjugate_gradients(inner, q.mH @ right.flatten(1).T, q.mH @ images.flatten(1).T, steps)
    fitted: Tensor = (q @ v).T.reshape(images.shape)
    return fitted


def image_head(features: Tensor, images: Tensor, ridge: float) -> Tensor:
    """Images `(K, Y, X)` in the span of the joint features `(F+1, Y, X)` that are nearest to real ones."""
    phi = features.flatten(1)
    return (solve_head(phi, images.flatten(1), ridge) @ phi).reshape(images.shape)


def trusted(start: Start) -> tuple[Start | None, tuple[tuple[str, str], ...]]:
    """The start, or ``None`` and why not: no common phase, or steps that did not converge."""
    if not bool(torch.isfinite(start.z).all()):
        why = "the corrected start is not finite"
    else:
        why = _no_common_phase(start.data, _share(start.data, start.phase))
    if not why and start.residual is not None and not float(start.residual) < _UNSOLVED:
        why = f"the corrected start did not converge ({float(start.residual):.0%} of the energy is left)"
    if why:
        return None, (("fallback", f"{why}: the INR was fitted to x0"),)
    return start, ()


def _share(data: SliceData, phase: Tensor) -> float:
    """Energy share that a phase leaves imaginary, over all coefficients."""
    weighted = data.energies.sqrt().reshape(-1, 1, 1) * data.calibrated
    return imaginary_share(weighted, phase, data.mask)


def _no_common_phase(data: SliceData, share: float) -> str:
    """Why the coefficients cannot be taken as real, given the `_share` that is left; empty if they can."""
    if not data.real_basis:
        return "the basis is complex (RF phases that step by other than 180°)"
    if not math.isfinite(share):
        return "the corrected start is not finite"
    return "" if share < _IMAGINARY else f"no common phase ({share:.0%} of the energy is left over)"


def plain_where_doubtful(
    images: Tensor, start: Start, x0: Tensor
) -> tuple[Tensor, tuple[tuple[str, str], ...]]:
    """Low-rank values where a pixel's coefficients share no phase (an air cavity, fat), and a remark.

    Parameters
    ----------
    images
        Real `(K, Y, X)`, in the unit of z.
    x0
        Complex `(K, Y, X)`.

    Returns
    -------
    Tensor, tuple
        `images` themselves if there is no such pixel, else complex ``p z`` and x0 `(K, Y, X)`.
    """
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
        f"the coefficients share no phase in {share:.1%} of the object: low-rank values there",
    )
    return torch.where(doubtful, x0, start.phase * images), (remark,)
