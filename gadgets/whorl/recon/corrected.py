"""Corrected start: what the order of the interleaves did to the subspace images, taken out.

A FISP train is real up to one phase, and so is its basis: all coefficients of a voxel share one
phase. With a smooth estimate p of it the unknowns are real, half as many, and a few
conjugate-gradient steps on ``Re(p* M N M p) z = Re(p* M b)`` suffice (M the object mask, N the
normal operator, b = x0). They start from the calibrated images. The side lobes of an uneven order go,
the noise halves. Half-way the coil maps and the phase are estimated anew: by the images of the coils that
the estimate and its residual give.

Letters: K coefficients, C coils, Y X pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from whorl.kspace.coils import combine, smooth
from whorl.recon.slicedata import SliceData

#: Width in pixels within which the object's phase is taken to be smooth.
_PHASE_SIGMA = 3.0
#: Width in pixels of the neighbourhood in which the phase is judged.
_LOCAL_SIGMA = 1.0


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
) -> tuple[Tensor, Tensor]:
    """A fixed number of steps for a Hermitian positive semidefinite `operator`, real or complex.

    Never waits for the device. Where nothing is left of the residual, the rest of the steps change nothing.

    Returns
    -------
    Tensor, Tensor
        The solution, and the energy of the residual relative to that of `right` (0-dimensional).
    """
    z = torch.zeros_like(right) if start is None else start.clone()
    residual = right.clone() if start is None else right - operator(z)
    direction = residual.clone()
    energy = residual.abs().square().sum()
    tiny = torch.finfo(energy.dtype).tiny
    for _ in range(steps):
        image = operator(direction)
        length = energy / (direction.conj() * image).real.sum().clamp_min(tiny)
        length = length.where(energy > 0, 0)
        z += length * direction
        residual -= length * image
        previous, energy = energy, residual.abs().square().sum()
        direction = residual + (energy / previous.clamp_min(tiny)) * direction
    return z, energy / right.abs().square().sum().clamp_min(tiny)


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """Real coefficients z `(K, Y, X)` and phase factor p `(Y, X)`: the subspace images are ``p z``.

    `residual` is the energy share that the latest steps left of the right side (0-dimensional).
    """

    data: SliceData
    z: Tensor
    phase: Tensor
    residual: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """``p z``, `(K, Y, X)`."""
        return self.phase * self.z

    def operator(self, z: Tensor) -> Tensor:
        """``Re(p* M N M p) z``."""
        inside = self.data.mask.to(z.dtype)
        return (self.phase.conj() * self.data.normal(self.phase * (inside * z))).real * inside

    @property
    def right(self) -> Tensor:
        """``Re(p* M b)``."""
        return (self.phase.conj() * self.data.x0).real * self.data.mask.to(self.z.dtype)


def begin(data: SliceData) -> Start:
    """The calibrated images, real."""
    phase = joint_phase(data.calibrated, data.energies)
    return Start(data, (phase.conj() * data.calibrated).real * data.mask, phase)


def advance(start: Start, steps: int) -> Start:
    """Some conjugate-gradient steps."""
    z, residual = conjugate_gradients(start.operator, start.right, start.z, steps)
    return replace(start, z=z, residual=residual)


def refine(start: Start) -> Start:
    """New coil maps and phase: of the images of each coil, which the residual has corrected."""
    data, estimate = start.data, start.images * start.data.mask
    inside = data.mask.to(start.z.dtype)
    missed = data.coil_images - data.normal.coil_images(estimate)
    corrected = estimate[:, None] * data.normal.csm + inside * missed  # (K, C, Y, X)
    csm = data.normal.csm if data.estimate_maps is None else data.estimate_maps(corrected)
    images = combine(corrected, csm)
    together = smooth((start.z * images).sum(0)[None], _PHASE_SIGMA)[0]
    phase = torch.polar(torch.ones_like(together.real), together.angle())
    return replace(start, data=data.with_maps(csm), phase=phase)


def imaginary_around(start: Start) -> Tensor:
    """Share `(Y, X)` of the energy around each pixel that the phase leaves imaginary, once the residual has
    corrected the images."""
    data, inside = start.data, start.data.mask.to(start.z.dtype)
    estimate = start.images * inside
    turned = start.phase.conj() * (estimate + inside * (data.x0 - data.normal(estimate)))
    weights = data.energies.reshape(-1, 1, 1)
    parts = torch.stack([turned.imag.square(), turned.abs().square()])  # (2, K, Y, X)
    imaginary, both = smooth((weights * parts).sum(1), _LOCAL_SIGMA)
    share: Tensor = imaginary / both.clamp_min(torch.finfo(both.dtype).tiny)
    return share


def corrected_starts(data: SliceData, steps: Sequence[int]) -> dict[int, Start]:
    """Corrected starts by number of steps (ascending), each going on from the one before.

    Coil maps and phase are refined after the first of several, or after half of the steps of a single one.
    """
    stages = [steps[0] // 2, *steps] if len(steps) == 1 and steps[0] > 1 else list(steps)
    start = advance(begin(data), stages[0])
    starts = {stages[0]: start}
    if len(stages) > 1:
        start = refine(start)
    for before, goal in pairwise(stages):
        start = advance(start, goal - before)
        starts[goal] = start
    return starts


def corrected_start(data: SliceData, *, steps: int = 8) -> Start:
    """Real coefficients and their joint phase.

    Parameters
    ----------
    steps
        Conjugate-gradient steps; coil maps and phase are refined after half of them.

    References
    ----------
    Derivation in the head of this module; joint real subspace: Zhao et al., Magn Reson Med 79:933
    (2018), doi:10.1002/mrm.26701 (low-rank modelling of MRF), with the phase taken out first.
    """
    return corrected_starts(data, [steps])[steps]
