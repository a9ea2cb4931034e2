"""A small slice with its truth: a known object, measured along spirals by a train with a real basis.

All images are those of the box around the object, which lies in a field of view that is larger.

Letters: T timepoints, K coefficients, C coils, I interleaves, S samples, H W pixels of the box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kspace.spirals import complex_normal, rotated_spiral
from whorl.kspace.accumulate import fold, fold_gram
from whorl.kspace.coilmaps import polynomial_maps, polynomials
from whorl.kspace.coils import coil_maps, combine
from whorl.kspace.density import density_compensation
from whorl.kspace.nufft import Nufft, make_nufft
from whorl.recon.calibration import regress_interleaves
from whorl.recon.lowrank import adjoint_coil_images
from whorl.recon.normal import Kernel, Sampling, make_kernel
from whorl.recon.slicedata import SliceData

T, K, C, I, S = 160, 3, 4, 32, 200  # noqa: E741 - the field's letter
FIELD = (60, 51)
#: The object touches the edges of its box, which is even by odd and not in the middle.
BOX = (slice(8, 52), slice(8, 43))
SHAPE = (44, 35)
ENERGIES = torch.tensor([1.0, 0.2, 0.02])


def ramps() -> tuple[Tensor, Tensor]:
    """y `(H, 1)` and x `(1, W)`, -1 and 1 at the edges of the field of view."""
    y, x = (torch.linspace(-1, 1, n)[part] for n, part in zip(FIELD, BOX, strict=True))
    return y[:, None], x[None, :]


def in_the_field(boxed: Tensor) -> Tensor:
    """`(..., H, W)` with zeros around."""
    whole = boxed.new_zeros((*boxed.shape[:-2], *FIELD))
    whole[..., BOX[0], BOX[1]] = boxed
    return whole


def slow_basis() -> Tensor:
    """`(T, K)`, real: a train whose signal changes slowly, so that each interleaf sees a share of its own."""
    t = (torch.arange(T) + 0.5) / T
    lobes = torch.sin(3.3 * math.pi * t).square() + 0.05
    shapes = [lobes, lobes * torch.exp(-3 * t), lobes * torch.cos(2 * math.pi * t)]
    return torch.linalg.qr(torch.stack(shapes, 1)).Q


def coils() -> Tensor:
    """`(C, H, W)` smooth maps of unit norm."""
    y, x = ramps()
    places = [(math.cos(0.3 + c * math.pi / 2), math.sin(0.3 + c * math.pi / 2)) for c in range(C)]
    maps = torch.stack(
        [
            torch.polar(torch.exp(-((y - v) ** 2 + (x - u) ** 2) / 4), 0.3 * u * x - 0.4 * v * y + c)
            for c, (v, u) in enumerate(places)
        ]
    )
    return maps / torch.linalg.vector_norm(maps, dim=0)


def phase_factor() -> Tensor:
    """As steep as some turns across 256 pixels, and across π/2, where half the angle of the square jumps."""
    y, x = ramps()
    return torch.polar(torch.ones(SHAPE), 0.25 * x - 0.15 * y**2 + 1.6)


def real_coefficients() -> tuple[Tensor, Tensor]:
    """Three images `(K, H, W)`, the weaker ones of both signs, and the mask `(H, W)`."""
    y, x = ramps()
    r = (y / 0.75) ** 2 + (x / 0.7) ** 2
    z = torch.stack(
        [1 + 0.3 * y * x, torch.where(x + 0 * y > 0.1, 0.5, -0.4), 0.15 * torch.sin(4 * y) + 0 * x]
    )
    return z * torch.sigmoid(12 * (1 - r)) * (r < 1), r < 1


@dataclass(frozen=True)
class Measured:
    """What was measured of an object, and what it is."""

    truth: Tensor  # (K, H, W)
    mask: Tensor
    csm: Tensor
    basis: Tensor
    trajectory: Tensor  # (I, S, 2)
    dcf: Tensor
    nufft: Nufft
    timepoint: Tensor  # (T,)
    interleaf: Tensor
    readouts: Tensor  # (T, C, S)

    def folded(self) -> tuple[Tensor, Tensor]:
        """`(I, K, C, S)` and `(I, K, K)`."""
        bins = torch.zeros((I, K, *self.readouts.shape[1:]), dtype=torch.complex64)
        gram = torch.zeros((I, K, K), dtype=torch.complex64)
        fold(bins, self.readouts, self.timepoint, self.interleaf, self.basis)
        fold_gram(gram, self.timepoint, self.interleaf, self.basis)
        return bins, gram

    def sampling(self) -> Sampling:
        return Sampling(self.folded()[1], self.dcf, self.trajectory.reshape(-1, 2), self.nufft)

    def kernel(self) -> Kernel:
        return make_kernel(self.sampling(), SHAPE)

    def slice_data(self, maps: str = "polynomial", *, leading: int = K) -> SliceData:
        """As the pipeline prepares it, but for the mask, which is as known.

        `maps` are those of the calibrated images (`polynomial`; `walsh`), of the coil images as they are
        (`x0`), or as known (`true`).
        """
        bins, gram = self.folded()
        coil_images = adjoint_coil_images(bins, self.dcf, self.nufft)[..., BOX[0], BOX[1]]
        told_apart = regress_interleaves(bins, gram, ENERGIES, leading=leading)
        clean = adjoint_coil_images(told_apart, self.dcf, self.nufft)[..., BOX[0], BOX[1]]
        csm = coil_maps(coil_images if maps == "x0" else clean)
        if maps == "polynomial":
            csm = polynomial_maps(clean, polynomials(self.mask), csm)
        elif maps == "true":
            csm = self.csm
        return SliceData(
            coil_images,
            csm,
            combine(clean, csm),
            self.mask,
            ENERGIES,
            self.sampling(),
            share=SHAPE[0] / FIELD[0],
            polynomials=None if maps == "true" else polynomials(self.mask),
        )

    def error(self, images: Tensor, csm: Tensor) -> float:
        """Relative error of images within the mask; the phase of a pixel, which maps leave free, is none."""
        phase = (csm.conj() * self.csm).sum(0).sgn()
        return relative_error(images * phase.conj(), self.truth, self.mask)


def relative_error(images: Tensor, truth: Tensor, mask: Tensor) -> float:
    difference = (images - truth)[..., mask]
    return float(difference.norm() / truth[..., mask].norm())


def measure(*, order: str = "sequential", noise: float = 0.0, phase: Tensor | None = None) -> Measured:
    """The slice, its interleaves in a `sequential` order, by `golden` steps, or `mixed` by chance.

    `noise` is the standard deviation of a sample relative to the root mean square of the data.
    """
    z, mask = real_coefficients()
    truth = z * (phase_factor() if phase is None else phase)
    csm, basis = coils(), slow_basis()
    trajectory = rotated_spiral(I, S, 2)
    nufft = make_nufft(trajectory.reshape(-1, 2), FIELD, backend="finufft")
    timepoint = torch.arange(T)
    interleaf = timepoint * (19 if order == "golden" else 1) % I
    if order == "mixed":
        interleaf = interleaf[torch.randperm(T, generator=torch.Generator().manual_seed(1))]
    arms = nufft.forward(in_the_field(truth[:, None] * csm).reshape(K * C, *FIELD)).reshape(K, C, I, S)
    readouts = torch.einsum("tk,kcts->tcs", basis.to(arms.dtype), arms[:, :, interleaf])
    readouts = readouts + noise * readouts.abs().square().mean().sqrt() * complex_normal(T, C, S, seed=9)
    return Measured(
        truth, mask, csm, basis, trajectory, density_compensation(trajectory, FIELD), nufft,
        timepoint, interleaf, readouts,
    )  # fmt: skip


def map_distance(csm: Tensor, other: Tensor, mask: Tensor) -> float:
    """What coil maps miss of others within the mask, root mean square; their phases do not count."""
    overlap = (csm.conj() * other).sum(0)[mask].abs().double()
    return float((1 - overlap.square()).clamp_min(0).mean().sqrt())
