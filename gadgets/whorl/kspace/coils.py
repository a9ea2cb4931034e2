"""Receive coils: noise whitening, compression to virtual coils, sensitivity maps.

Letters: C coils, V virtual coils, S samples, Y X pixels, K coefficients.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Numbers of coils that are kept apart: one is the scan's, the others are damaged readouts.
_COIL_NUMBERS = 4


class NoiseStatistics:
    """Covariance of noise readouts, summed up as they arrive.

    What the number of coils is is told by the image data, which come later: noise with another one
    is not used.
    """

    def __init__(self) -> None:
        self.n_readouts = 0
        # By number of coils: sum of n nᴴ, samples, readouts.
        self._sums: dict[int, tuple[np.ndarray, int, int]] = {}

    def add(self, noise: np.ndarray) -> None:
        """Count one readout `(C, S)`."""
        self.n_readouts += 1
        C, S = noise.shape
        if C not in self._sums and len(self._sums) == _COIL_NUMBERS:
            return
        total, samples, n = self._sums.get(C, (np.zeros((C, C), dtype=np.complex128), 0, 0))
        self._sums[C] = (total + noise @ noise.conj().T, samples + S, n + 1)

    def n_usable(self, n_coils: int) -> int:
        """Readouts with this number of coils."""
        return self._sums[n_coils][2] if n_coils in self._sums else 0

    def covariance(self, n_coils: int) -> Tensor:
        """Covariance `(C, C)` of `n_coils` coils.

        Raises
        ------
        ValueError
            If there are fewer than four samples for each coil.
        """
        total, samples, _ = self._sums.get(n_coils, (np.zeros((n_coils, n_coils)), 0, 0))
        if samples < 4 * n_coils:
            raise ValueError(f"the noise readouts hold {samples} usable samples for {n_coils} coils")
        return torch.from_numpy((total / samples).astype(np.complex64))


def whitening_matrix(covariance: Tensor) -> Tensor:
    """`(C, C)` matrix that makes noise of this covariance white with variance 1: the inverse
    Cholesky factor.

    Parameters
    ----------
    covariance
        `(C, C)` Hermitian, ``mean(n nᴴ)`` of noise samples.

    Raises
    ------
    ValueError
        If the covariance is not positive definite (a dead coil, or fewer noise samples than coils).

    References
    ----------
    Pruessmann et al., Magn Reson Med 46:638 (2001), doi:10.1002/mrm.1241.
    """
    factor, info = torch.linalg.cholesky_ex(covariance)
    scale = covariance.diagonal().real
    # What a coil has of its own must stand out from the rounding of the covariance, which hides that
    # one coil is a copy of others.
    rounding = 16 * len(covariance) * torch.finfo(scale.dtype).eps
    least = torch.maximum(rounding * scale, 1e-10 * scale.max())
    if int(info) or not bool((factor.diagonal().real.square() > least).all()):
        raise ValueError(
            f"the noise of {len(covariance)} coils is not positive definite "
            f"(variances {float(scale.min()):.3g} to {float(scale.max()):.3g})"
        )
    white: Tensor = torch.linalg.solve_triangular(
        factor, torch.eye(len(covariance), dtype=factor.dtype, device=factor.device), upper=False
    )
    return white


def compression_matrix(kspace: Tensor, n_virtual: int = 0, *, energy: float = 0.995) -> Tensor:
    """`(V, C)` orthonormal rows: the strongest virtual coils of some readouts.

    Parameters
    ----------
    kspace
        Complex `(..., C, S)`, whitened.
    n_virtual
        V; 0: as many as keep `energy`.
    energy
        Share of the signal energy that is kept.

    References
    ----------
    Buehrer et al., Magn Reson Med 57:1131 (2007), doi:10.1002/mrm.21237.
    """
    C = kspace.shape[-2]
    flat = kspace.transpose(-1, -2).reshape(-1, C)
    # ||x||² over readouts is counted by their conjugate products; eigenvectors come in rising order.
    values, vectors = torch.linalg.eigh(flat.T @ flat.conj())
    values = values.flip(0).clamp_min(0)
    if not n_virtual:
        kept = torch.cumsum(values, 0) / values.sum().clamp_min(1e-30)
        n_virtual = int((kept < energy).sum()) + 1
    strongest: Tensor = vectors.flip(1)[:, : min(n_virtual, C)]
    return strongest.conj().T.contiguous()


def _gaussian(n: int, sigma: float, like: Tensor) -> Tensor:
    """`(n, n)` matrix that smooths along an axis of n pixels; what lies beyond its ends is zero."""
    reach = max(1, int(np.ceil(3 * sigma)))
    distance = torch.arange(-reach, reach + 1, device=like.device)
    total = torch.exp(-0.5 * (distance / sigma) ** 2).sum()
    places = torch.arange(n, device=like.device)
    apart = places[:, None] - places
    return torch.exp(-0.5 * (apart / sigma) ** 2).where(apart.abs() <= reach, 0).to(like.dtype) / total.to(
        like.dtype
    )


def smooth(images: Tensor, sigma: float) -> Tensor:
    """Gaussian smoothing of the last two axes; `sigma` in pixels, zero outside the field of view.

    By two matrix products, which take half the time of a convolution with one channel.
    """
    if images.is_complex():
        return torch.complex(smooth(images.real, sigma), smooth(images.imag, sigma))
    Y, X = images.shape[-2:]
    return _gaussian(Y, sigma, images) @ images @ _gaussian(X, sigma, images)


def coil_maps(coil_images: Tensor, *, sigma: float = 4.0, iterations: int = 4) -> Tensor:
    """Sensitivity maps from subspace images of all coils (Walsh's adaptive combination).

    The map of a pixel is the dominant eigenvector of the coil covariance around it, summed over
    the coefficients, with unit norm. Its free phase is set so that the combined, smoothed first
    coefficient is real and positive: the combined images are smooth where the object is.

    Parameters
    ----------
    coil_images
        Complex `(K, C, Y, X)`.
    sigma
        Width of the neighbourhood in pixels.
    iterations
        Power iterations for the eigenvector.

    Returns
    -------
    Tensor
        `(C, Y, X)`, unit norm over the coils wherever there is signal.

    References
    ----------
    Walsh et al., Magn Reson Med 43:682 (2000),
    doi:10.1002/(SICI)1522-2594(200005)43:5<682::AID-MRM10>3.0.CO;2-G.
    """
    C = coil_images.shape[1]
    rows, columns = torch.triu_indices(C, C, device=coil_images.device)
    upper = torch.zeros(
        (len(rows), *coil_images.shape[2:]), dtype=coil_images.dtype, device=coil_images.device
    )
    for images in coil_images:
        upper += images[rows] * images[columns].conj()
    upper = smooth(upper, sigma)
    covariance = torch.empty((C, C, *upper.shape[1:]), dtype=upper.dtype, device=upper.device)
    covariance[rows, columns] = upper
    covariance[columns, rows] = upper.conj()  # the diagonal is real
    reference = smooth(coil_images[0], sigma)  # (C, Y, X)
    vector = reference
    for _ in range(iterations):
        vector = torch.einsum("cdyx,dyx->cyx", covariance, vector)
        vector = vector / torch.linalg.vector_norm(vector, dim=0).clamp_min(1e-30)
    overlap = (vector.conj() * reference).sum(0)
    return vector * (overlap / overlap.abs().clamp_min(1e-30))


def combine(coil_images: Tensor, csm: Tensor) -> Tensor:
    """Coil combination, the adjoint of the sensitivities: `(K, C, Y, X)` and `(C, Y, X)` to `(K, Y, X)`."""
    return torch.einsum("kcyx,cyx->kyx", coil_images, csm.conj())
