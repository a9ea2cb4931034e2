"""Corrected start: what the order of the interleaves did to the subspace images, taken out.

A FISP train is real up to one phase, and so is its basis: all coefficients of a voxel share one
phase. With a smooth estimate p of it the unknowns are real, half as many, and a few
conjugate-gradient steps on ``Re(p* M N M p) z = Re(p* M b)`` suffice (M the object mask, N the
normal operator, b = x0). The side lobes of an uneven order go, the noise halves.

Letters: K coefficients, Y X pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from whorl.kspace.coils import smooth

#: Width in pixels within which the object's phase is taken to be smooth.
_PHASE_SIGMA = 3.0


def joint_phase(images: Tensor, energies: Tensor) -> Tensor:
    """Smooth phase factor `(Y, X)` that all coefficients of a voxel share.

    Half the angle of the smoothed sum of squares is known up to a sign, which the smoothed first
    coefficient decides.

    Parameters
    ----------
    images
        Complex `(K, Y, X)`.
    energies
        `(K,)`: weight of each coefficient.
    """
    squares = smooth((energies.reshape(-1, 1, 1) * images * images).sum(0)[None], _PHASE_SIGMA)[0]
    phase = torch.polar(torch.ones_like(squares.real), squares.angle() / 2)
    first = smooth(images[:1], _PHASE_SIGMA)[0]
    return torch.where((phase.conj() * first).real < 0, -phase, phase)


def imaginary_share(images: Tensor, phase: Tensor, mask: Tensor) -> float:
    """Energy share that a joint phase leaves in the imaginary part, within the mask: 0 to 1; 0.5
    means that there is no common phase."""
    turned = (phase.conj() * images)[:, mask]
    return float(turned.imag.square().sum() / turned.abs().square().sum().clamp_min(1e-30))


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor], right: Tensor, start: Tensor | None, steps: int
) -> Tensor:
    """A fixed number of steps for a symmetric positive semidefinite `operator` on real tensors."""
    z = torch.zeros_like(right) if start is None else start.clone()
    residual = right.clone() if start is None else right - operator(z)
    direction = residual.clone()
    energy = residual.square().sum()
    for _ in range(steps):
        if not float(energy) > 0:
            break
        image = operator(direction)
        length = energy / (direction * image).sum()
        z += length * direction
        residual -= length * image
        previous, energy = energy, residual.square().sum()
        direction = residual + (energy / previous) * direction
    return z


def corrected_start(
    images: Tensor, mask: Tensor, normal: Callable[[Tensor], Tensor], energies: Tensor, *, steps: int = 4
) -> tuple[Tensor, Tensor]:
    """Real coefficients and their joint phase from the adjoint images.

    Parameters
    ----------
    images
        Complex `(K, Y, X)`: x0.
    mask
        Boolean `(Y, X)`: where the object may be.
    normal
        ``A'WA`` on `(K, Y, X)`.
    energies
        `(K,)`: energy of each coefficient in the dictionary, relative to the first.
    steps
        Conjugate-gradient steps after the phase has been refined (two come before).

    Returns
    -------
    Tensor, Tensor
        Real z `(K, Y, X)` and phase factor p `(Y, X)`; the subspace images are ``p z``.

    References
    ----------
    Derivation in the head of this module; joint real subspace: Zhao et al., Magn Reson Med 79:933
    (2018), doi:10.1002/mrm.26701 (low-rank modelling of MRF), with the phase taken out first.
    """
    inside = mask.to(images.real.dtype)
    masked = images * inside

    def real_normal(phase: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: (phase.conj() * inside * normal(inside * phase * z)).real

    phase = joint_phase(images, energies)
    z = conjugate_gradients(real_normal(phase), (phase.conj() * masked).real, None, 2)
    # The complex residual shows what the phase estimate has missed.
    estimate = phase * z * inside
    complex_update = estimate + inside * (images - normal(estimate))
    phase_sum = smooth((z * complex_update).sum(0)[None], _PHASE_SIGMA)[0]
    phase = torch.polar(torch.ones_like(phase_sum.real), phase_sum.angle())
    return conjugate_gradients(real_normal(phase), (phase.conj() * masked).real, z, steps), phase
