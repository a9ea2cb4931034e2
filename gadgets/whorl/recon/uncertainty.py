"""What noise and the method itself do to subspace images: by the scan that would have been measured of them.

A parametric bootstrap. The images that were found are encoded as the scan encodes, noise is added, and the
method is applied again, choices and all: what comes out differs from what went in by noise, by aliasing that
is left, and by detail that the method loses. A few such scans suffice, because errors of neighbouring pixels
are alike: their covariance is taken over a neighbourhood.

Letters: N repetitions, K coefficients, C coils, I interleaves, S samples, J real numbers of a pixel,
Y X pixels, V pixels of the mask.

References
----------
Efron & Tibshirani, An Introduction to the Bootstrap, Chapman & Hall (1993), chapter 6 (parametric bootstrap).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from whorl.kspace.coils import smooth
from whorl.kspace.nufft import Nufft
from whorl.kspace.slicebuffer import SubspaceKspace

#: Width of the neighbourhood of a pixel, in pixels, over which errors are averaged. A wider one is less
#: noisy, but blurs what differs at the border of tissues: of a noisy brain 1.5 to 2.5 are about as good.
_SIGMA = 2.0


class SecondScan:
    """Scans of images instead of the object.

    Parameters
    ----------
    kspace
        What was measured.
    images
        Complex `(K, Y, X)`.
    csm
        `(C, Y, X)`.
    nufft
        For the I·S samples.
    """

    def __init__(self, kspace: SubspaceKspace, images: Tensor, csm: Tensor, nufft: Nufft) -> None:
        K, *shape = images.shape
        I, _, C, S = kspace.bins.shape  # noqa: E741 - the field's letter
        samples = nufft.forward((images[:, None] * csm).reshape(K * C, *shape))  # (K·C, I·S)
        samples = samples.reshape(K, C, I, S).permute(2, 0, 1, 3).reshape(I, K, C * S)
        self._kspace = kspace
        self._bins = torch.bmm(kspace.gram, samples).reshape(I, K, C, S)

    def measured(self, noise_sd: float, seed: int) -> SubspaceKspace:
        """With noise of a standard deviation for each complex sample."""
        return replace(self._kspace, bins=self._bins + self._noise(noise_sd, seed))

    def with_noise(self, noise_sd: float, seed: int) -> SubspaceKspace:
        """What was measured, with as much noise again."""
        return replace(self._kspace, bins=self._kspace.bins + self._noise(noise_sd, seed))

    def _noise(self, noise_sd: float, seed: int) -> Tensor:
        _, _, C, S = self._bins.shape
        return folded_noise(self._kspace.gram, C, S, noise_sd, torch.Generator().manual_seed(seed))

    def noise_sd(self) -> float:
        """Standard deviation of a complex sample's noise, for scans without noise readouts.

        Where there is least signal, far from the centre of k-space, or where the images leave least of it.
        """
        left = self._kspace.bins - self._bins
        return min(least_level(self._kspace.bins, self._kspace.gram), least_level(left, self._kspace.gram))


def least_level(bins: Tensor, gram: Tensor) -> float:
    """Root mean square of the samples of folded readouts `(I, K, C, S)`, of the quietest tenth of the sample
    positions."""
    C, S = bins.shape[2:]
    readouts = float(gram.diagonal(dim1=1, dim2=2).real.sum()) * C
    power = bins.abs().square().sum((0, 1, 2)) / max(readouts, 1e-30)  # (S,)
    return float(power.sort().values[: max(1, S // 10)].mean().sqrt())


def folded_noise(gram: Tensor, n_coils: int, n_samples: int, sd: float, generator: torch.Generator) -> Tensor:
    """Noise `(I, K, C, S)` of a folded scan whose complex samples have noise of standard deviation `sd`.

    Folded, noise of an interleaf's readouts has the covariance ``σ² G_i`` over the coefficients.
    """
    I, K, _ = gram.shape  # noqa: E741 - the field's letter
    energies, vectors = torch.linalg.eigh(gram.to(torch.complex128))
    root = (vectors * energies.clamp_min(0).sqrt()[:, None]).to(gram)  # (I, K, K)
    white = torch.randn((I, K, n_coils * n_samples), dtype=torch.complex64, generator=generator)
    noise: Tensor = torch.bmm(root, white.to(gram)) * sd
    return noise.reshape(I, K, n_coils, n_samples)


def covariance_of(errors: Tensor, mask: Tensor, *, noise_only: bool = False) -> Tensor:
    """Covariance `(V, J, J)` of the errors of each pixel of a mask, from N repetitions.

    What all repetitions have in common is systematic: aliasing, and detail that is lost.

    Parameters
    ----------
    errors
        Real `(N, J, Y, X)`, N at least 2.
    mask
        Boolean `(Y, X)`: only its pixels count.
    noise_only
        Without what is systematic.
    """
    N, common = len(errors), errors.mean(0)
    noise = local_products(errors - common, mask) * (N / (N - 1))
    if noise_only:
        return noise
    # The mean of N repetitions still has an N-th of their noise.
    return local_products(common[None], mask) + noise * (1 - 1 / N)


def local_products(errors: Tensor, mask: Tensor, sigma: float = _SIGMA) -> Tensor:
    """Mean of ``e eᵀ`` over repetitions and the pixels of a mask around each of them, `(V, J, J)`.

    Parameters
    ----------
    errors
        Real `(N, J, Y, X)`.
    sigma
        Width of the neighbourhood in pixels.
    """
    N, J = errors.shape[:2]
    inside = mask.to(errors.dtype)
    count = smooth(inside, sigma)[mask] * N
    result = errors.new_empty((int(mask.sum()), J, J))
    for j in range(J):
        products = (errors[:, j : j + 1] * errors[:, j:]).sum(0) * inside  # (J-j, Y, X)
        around = (smooth(products, sigma)[:, mask] / count).T
        result[:, j, j:] = result[:, j:, j] = around
    return result
