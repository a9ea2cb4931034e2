"""What noise and the method itself do to subspace images: by repetitions of the scan.

Of two kinds, see `whorl.pipeline.errors`; to each the method is applied again, choices and all. Most add
noise to the measured data: what comes out differs from the images that were found by noise alone. A few are
a parametric bootstrap: the images that were found are encoded as the scan encodes, and noise is added. What
comes out differs from what went in by noise, by aliasing that is left, and by detail that the method loses.
A few suffice, because pixels of one tissue that are near each other are moved alike: their variances are
averaged.

Letters: N repetitions, K coefficients, C coils, I interleaves, S samples, Q quantities (T1, T2), Y X pixels,
V pixels of the mask.

References
----------
Efron & Tibshirani, An Introduction to the Bootstrap, Chapman & Hall (1993), chapter 6 (parametric bootstrap).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from whorl.kspace.nufft import Nufft
from whorl.kspace.slicebuffer import SubspaceKspace
from whorl.recon.guide import side_by_side

#: Width in pixels, and radius, of the neighbourhood of a pixel over which variances are averaged, and widths
#: in log T1 and log T2 of what counts as one tissue. Of simulated brains and plates (low-rank and INR),
#: without an average 72 to 82 % of the voxels had a deviation within 0.7 to 1.4 of the empirical one, with it
#: 82 to 94 %; an average over all pixels around, whatever their tissue, left 37 to 75 %.
_SIGMA, _RADIUS, _ALIKE = 3.0, 6, (0.05, 0.1)
#: Least variance of log T1 and log T2: what is at the end of a dictionary does not move.
_LEAST = 1e-8


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


class Tissues:
    """Which pixels of a mask are near each other and of one tissue.

    Parameters
    ----------
    t1_ms, t2_ms
        `(V,)`.
    mask
        Boolean `(Y, X)` with V pixels.
    """

    def __init__(self, t1_ms: Tensor, t2_ms: Tensor, mask: Tensor) -> None:
        self._mask = mask
        self._places = torch.zeros((2, *mask.shape), device=mask.device)
        for place, values, width in zip(self._places, (t1_ms, t2_ms), _ALIKE, strict=True):
            place[mask] = values.float().log() / width

    def average(self, values: Tensor) -> Tensor:
        """Mean over the pixels that are near and of one tissue, `(Q, V)` to the same."""
        Y, X = self._mask.shape
        inside = self._mask.to(values.dtype)
        image = torch.zeros((len(values), Y, X), dtype=values.dtype, device=values.device)
        image[:, self._mask] = values
        total, weights = image.clone(), inside.clone()  # a pixel is near itself
        reach = range(-_RADIUS, _RADIUS + 1)
        # One of each two neighbours that lie opposite each other.
        for down, right in ((y, x) for y in reach for x in reach if (y, x) > (0, 0)):
            if down >= Y or abs(right) >= X:
                continue
            here, there = ((..., *part) for part in side_by_side(down, right, (Y, X)))
            apart = (self._places[here] - self._places[there]).square().sum(0)
            weight = (-apart - (down**2 + right**2) / (2 * _SIGMA**2)).exp() * inside[here] * inside[there]
            total[here] += weight * image[there]
            total[there] += weight * image[here]
            weights[here] += weight
            weights[there] += weight
        return (total / weights)[:, self._mask]


def noise_variance(moves: Tensor, tissues: Tissues) -> Tensor:
    """Variance `(Q, V)` of log T1 and log T2, from N repetitions.

    The logarithms of the pixels' variances are averaged, so that a pixel in which the method is at odds does
    not tell for its neighbours; of N - 1 degrees of freedom they are on average ``1 / (N - 1)`` too small.

    Parameters
    ----------
    moves
        `(N, Q, V)`: what each repetition moved; N at least 2.
    """
    logarithms = moves.var(0).clamp_min(_LEAST).log()
    return (tissues.average(logarithms) + 1 / (len(moves) - 1)).exp()


def systematic_variance(moves: Tensor, tissues: Tissues) -> Tensor:
    """Mean square `(Q, V)` of what all M repetitions `(M, Q, V)` have in common: aliasing, and detail that is
    lost. It still has an M-th of their noise."""
    return tissues.average(moves.mean(0).square())
