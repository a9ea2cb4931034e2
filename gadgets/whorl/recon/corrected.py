"""Corrected start: what undersampling and the order of the interleaves did to the subspace images, taken out.

A FISP train is real up to one phase, and so is its basis: all coefficients of a voxel share one phase. With a
smooth estimate p of it the unknowns z are real, half as many, and a few preconditioned conjugate-gradient
steps on ``Re(p* M N M p) z = Re(p* M b)`` suffice (M the object mask, N the normal operator, b = x0). They
start from the calibrated images. Where there is no common phase the unknowns are complex and p is 1.

Letters: K coefficients, C coils, J leading coefficients, H W pixels of the box around the object.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whorl.kspace.coilmaps import polynomial_maps
from whorl.kspace.coils import combine, smooth
from whorl.recon.normal import Kernel, Normal
from whorl.recon.slicedata import Progress, SliceData

#: Width within which the object's phase is taken to be smooth, relative to the field of view (of 256 pixels
#: 4.5), and the least in pixels.
_PHASE_SIGMA, _LEAST_SIGMA = 4.5 / 256, 0.7
#: Width in pixels of the neighbourhood in which the phase is judged.
_LOCAL_SIGMA = 1.0


def joint_phase(images: Tensor, energies: Tensor, sigma: float) -> Tensor:
    """Smooth phase factor `(H, W)` that all coefficients of a voxel share.

    Half the angle of the smoothed sum of squares is known up to a sign, which the smoothed first
    coefficient decides. A pixel counts by its magnitude, not by its square, so that bright tissue does not
    impose its phase on dark one next to it.

    Parameters
    ----------
    images
        Complex `(J, H, W)`.
    energies
        `(J,)`: weight of each coefficient.
    sigma
        Width in pixels within which the phase is taken to be smooth.
    """
    squares = (energies.reshape(-1, 1, 1) * images * images).sum(0)
    doubled = _smooth_phase(squares, torch.ones_like(squares), sigma)
    phase = torch.polar(torch.ones_like(squares.real), doubled.angle() / 2)
    first = smooth(images[:1], sigma)[0]
    return torch.where((phase.conj() * first).real < 0, -phase, phase)


def _smooth_phase(images: Tensor, phase: Tensor, sigma: float) -> Tensor:
    """Phase factor `(H, W)` of complex values `(H, W)`, which count by the root of their magnitude: `phase`,
    and what the values have beyond it, smoothed."""
    left = smooth((phase.conj() * images * images.abs().clamp_min(1e-30).rsqrt())[None], sigma)[0]
    return phase * torch.polar(torch.ones_like(left.real), left.angle())


def phase_sigma(data: SliceData) -> float:
    """Width in pixels within which the object's phase is taken to be smooth."""
    return max(_PHASE_SIGMA * max(data.mask.shape) / data.share, _LEAST_SIGMA)


def imaginary_share(images: Tensor, phase: Tensor, mask: Tensor) -> Tensor:
    """Energy share that a joint phase leaves in the imaginary part, within the mask: 0 to 1; 0.5
    means that there is no common phase (0-dimensional)."""
    turned = phase.conj() * images * mask
    return turned.imag.square().sum() / turned.abs().square().sum().clamp_min(1e-30)


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor,
    steps: int,
    *,
    project: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor] | None = None,
    step_done: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """A fixed number of steps on ``project(operator(z)) = project(right)``, whose operator must be Hermitian
    and positive semidefinite.

    Never waits for the device. Where nothing is left of the residual, the rest of the steps change nothing.

    Parameters
    ----------
    operator
        From the unknowns to what is measured.
    right
        What was measured.
    start
        Unknowns to begin with.
    project
        From what is measured to the unknowns.
    precondition
        Approximate inverse, Hermitian and positive definite, on the unknowns.
    step_done
        Takes the number of each step that is done.

    Returns
    -------
    Tensor, Tensor
        The solution, and what it leaves of `right`.
    """
    z, left = start.clone(), right - operator(start)
    residual = project(left)
    direction = torch.zeros_like(z)
    previous: Tensor | None = None
    for step in range(steps):
        nearer = residual if precondition is None else precondition(residual)
        energy = (residual.conj() * nearer).real.sum()
        tiny = torch.finfo(energy.dtype).tiny
        direction = nearer if previous is None else nearer + (energy / previous.clamp_min(tiny)) * direction
        image = operator(direction)
        seen = project(image)
        length = energy / (direction.conj() * seen).real.sum().clamp_min(tiny)
        length = length.where(energy > 0, 0)
        z += length * direction
        left = left - length * image
        # Not projected from what is left: the rounding of what no unknowns explain would grow step by step.
        residual = residual - length * seen
        previous = energy
        if step_done is not None:
            step_done(step + 1)
    return z, left


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """Coefficients z `(K, H, W)` and phase factor p `(H, W)`: the subspace images are ``p z``.

    `z` is real if there is a common phase. `left` is ``M (b - N p z)``, complex `(K, H, W)`.
    """

    data: SliceData
    kernel: Kernel
    z: Tensor
    phase: Tensor
    left: Tensor

    def image(self, z: Tensor) -> Tensor:
        """``M N M p z``."""
        return Normal(self.kernel, self.data.csm)(self.phase * (z * self.data.mask)) * self.data.mask

    def project(self, images: Tensor) -> Tensor:
        """``Re(p* M x)``; without a common phase ``M x``."""
        turned = self.phase.conj() * images * self.data.mask
        return turned if self.z.is_complex() else turned.real

    def precondition(self, z: Tensor) -> Tensor:
        return self.project(self.kernel.invert_roughly(self.phase * z))


def begin(data: SliceData, kernel: Kernel, *, real: bool) -> Start:
    """The calibrated images; coefficients beyond theirs are 0."""
    J = len(data.calibrated)
    one = torch.ones_like(data.csm[0])
    phase = joint_phase(data.calibrated, data.energies[:J], phase_sigma(data)) if real else one
    turned = phase.conj() * data.calibrated * data.mask
    z = (turned.real if real else turned).new_zeros(len(data.energies), *data.mask.shape)
    z[:J] = turned.real if real else turned
    return Start(data, kernel, z, phase, torch.zeros_like(data.coil_images[:, 0]))


def advance(start: Start, steps: int, step_done: Callable[[int], None] | None = None) -> Start:
    """Some preconditioned conjugate-gradient steps."""
    z, left = conjugate_gradients(
        start.image,
        start.data.x0 * start.data.mask,
        start.z,
        steps,
        project=start.project,
        precondition=start.precondition,
        step_done=step_done,
    )
    return replace(start, z=z, left=left)


def refine(start: Start) -> Start:
    """New coil maps and phase: of the images of each coil, which the residual has corrected."""
    data, J = start.data, len(start.data.calibrated)
    estimate = start.phase * start.z * data.mask
    missed = data.coil_images - Normal(start.kernel, data.csm).coil_images(estimate)
    corrected = estimate[:, None] * data.csm + data.mask * missed  # (K, C, H, W)
    basis = data.polynomials
    csm = data.csm if basis is None else polynomial_maps(corrected[:J], basis, data.csm)
    phase = start.phase
    if start.z.is_complex():  # z is turned as the old maps are
        csm = csm * (csm.conj() * data.csm).sum(0).sgn()
    else:
        together = (start.z * combine(corrected, csm)).sum(0)
        phase = _smooth_phase(together, phase, phase_sigma(data))
    return replace(start, data=replace(data, csm=csm), phase=phase)


def corrected_start(
    data: SliceData,
    kernel: Kernel,
    *,
    steps: int,
    refined_every: int = 0,
    real: bool = True,
    progress: Progress | None = None,
) -> Start:
    """Coefficients and their joint phase.

    Parameters
    ----------
    kernel
        Of the box, see `whorl.recon.normal.make_kernel`.
    steps
        Conjugate-gradient steps.
    refined_every
        Steps between which coil maps and phase are estimated anew; 0: never.
    real
        Whether the coefficients have a common phase.

    References
    ----------
    Derivation in the head of this module; joint real subspace: Zhao et al., Magn Reson Med 79:933
    (2018), doi:10.1002/mrm.26701 (low-rank modelling of MRF), with the phase taken out first.
    """
    every = refined_every or max(steps, 1)
    start = begin(data, kernel, real=real)
    for done in range(0, max(steps, 1), every):
        if done:
            start = refine(start)

        def told(step: int, before: int = done) -> None:
            if progress is not None:
                progress("correction", before + step, steps)

        start = advance(start, min(every, steps - done), told)
    return start


def imaginary_around(start: Start) -> Tensor:
    """Share `(H, W)` of the energy around each pixel that the phase leaves imaginary, once the residual has
    corrected the images."""
    turned = start.phase.conj() * (start.phase * start.z + start.left) * start.data.mask
    weights = start.data.energies.reshape(-1, 1, 1)
    parts = torch.stack([turned.imag.square(), turned.abs().square()])  # (2, K, H, W)
    imaginary, both = smooth((weights * parts).sum(1), _LOCAL_SIGMA)
    share: Tensor = imaginary / both.clamp_min(torch.finfo(both.dtype).tiny)
    return share
