"""What noise and the method itself do to subspace images: by doing it again.

Noise: the scan is reconstructed again with more noise of the same strength, by the method with what it had
chosen; what changes has the deviation of noise (a parametric bootstrap). Aliasing that is left, and detail
that is lost: the images that were found are encoded as the scan encodes and reconstructed without noise; what
comes out differs by them. A few repetitions suffice, because errors of neighbouring pixels are alike: their
covariance is taken over a neighbourhood.

Letters: N repetitions, K coefficients, C coils, I interleaves, S samples, J real numbers of a pixel, Y X
pixels, V pixels of the mask.

References
----------
Efron & Tibshirani, An Introduction to the Bootstrap, Chapman & Hall (1993), chapter 6 (parametric bootstrap).
"""

from __future__ import annotations

import torch
from torch import Tensor

from whorl.kspace.coils import smooth
from whorl.kspace.nufft import Nufft


def encoded(images: Tensor, csm: Tensor, gram: Tensor, nufft: Nufft) -> Tensor:
    """The folded scan `(I, K, C, S)` of complex images `(K, Y, X)`, without noise.

    Parameters
    ----------
    csm
        `(C, Y, X)`.
    gram
        `(I, K, K)`: ``Σ conj(u_t) u_tᵀ`` by interleaf.
    nufft
        For the I·S samples.
    """
    K, *shape = images.shape
    C, I = len(csm), len(gram)  # noqa: E741 - the field's letter
    samples = nufft.forward((images[:, None] * csm).reshape(K * C, *shape))  # (K·C, I·S)
    by_interleaf = samples.reshape(K, C, I, -1).permute(2, 0, 1, 3)  # (I, K, C, S)
    return torch.bmm(gram, by_interleaf.reshape(I, K, -1)).reshape(by_interleaf.shape)


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


def noise_level(bins: Tensor, predicted: Tensor, gram: Tensor) -> float:
    """Standard deviation of a complex sample that explains what images leave of a scan, all `(I, K, C, S)`.

    For scans without noise readouts; errors of the model count as noise.
    """
    left = float((bins - predicted).abs().square().sum())
    n = float(gram.diagonal(dim1=1, dim2=2).real.sum()) * bins.shape[2] * bins.shape[3]
    return (left / n) ** 0.5 if n > 0 else 0.0


def local_covariance(errors: Tensor, mask: Tensor, sigma: float) -> Tensor:
    """Covariance `(V, J, J)` of errors, whose mean is 0, around each pixel of a mask.

    Parameters
    ----------
    errors
        Real `(N, J, Y, X)`.
    mask
        Boolean `(Y, X)`: only its pixels count.
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
