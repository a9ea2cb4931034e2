"""Receive coils: noise whitening, compression to virtual coils, sensitivity maps.

Letters: C coils, V virtual coils, S samples, Y X pixels, K coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Numbers of coils that are kept apart: one is the scan's, the others are damaged readouts.
_COIL_NUMBERS = 4
#: What takes longer from one sample to the next is no dwell time.
_LONGEST_DWELL_US = 1e6
#: Variance relative to the largest one, below which a coil is dead.
_DEAD = 1e-10
#: Share of a coil's variance that it must have for itself: below lies the rounding of a covariance in
#: single precision, and what noise readouts of a few hundred samples cannot tell.
_OWN = 1e-5


@dataclass(slots=True)
class _Sum:
    """Noise readouts of one number of coils: ``Σ n nᴴ``, as if all had the dwell time of the first."""

    total: NDArray[np.complex128]
    dwell_us: float
    samples: int = 0
    n_readouts: int = 0


class NoiseStatistics:
    """Covariance of noise readouts, summed up as they arrive.

    What the number of coils is is told by the image data, which come later: noise with another one
    is not used.
    """

    def __init__(self) -> None:
        self.n_readouts = 0
        self._sums: dict[int, _Sum] = {}  # by number of coils

    def add(self, noise: NDArray[np.complex64], dwell_us: float) -> None:
        """Count one readout `(C, S)`; a dwell time of 0, or one that cannot be, is not known."""
        self.n_readouts += 1
        C, S = noise.shape
        if C not in self._sums and len(self._sums) == _COIL_NUMBERS:
            return
        dwell_us = dwell_us if 0 < dwell_us < _LONGEST_DWELL_US else 0.0
        # A linear copy of other coils is told by what is left of it, which single precision would hide.
        samples = noise.astype(np.complex128)
        product = samples @ samples.conj().T
        known = self._sums.setdefault(C, _Sum(np.zeros_like(product), dwell_us))
        if dwell_us and known.dwell_us:
            product *= dwell_us / known.dwell_us
        else:
            known.dwell_us = 0.0
        known.total += product
        known.samples += S
        known.n_readouts += 1

    def n_usable(self, n_coils: int) -> int:
        """Readouts with this number of coils."""
        return self._sums[n_coils].n_readouts if n_coils in self._sums else 0

    def dwell_us(self, n_coils: int) -> float:
        """Time between two samples of the noise of `n_coils` coils; 0 if a readout does not say it."""
        return self._sums[n_coils].dwell_us if n_coils in self._sums else 0.0

    def covariance(self, n_coils: int, dwell_us: float = 0.0, bandwidth: float = 1.0) -> Tensor:
        """Covariance `(C, C)` of the noise of readouts with another dwell time: ``mean(n nᴴ)`` of complex
        samples.

        White noise that a receiver samples has a variance in proportion to its bandwidth, the inverse of
        the dwell time. The noise readouts have a little less, by the share of the band that the receiver's
        filters let through. Whitened by this, the imaging noise has variance 1 for each complex sample;
        Gadgetron's prewhitening differs by a factor √2 (variance 1 for real and imaginary part each).

        Parameters
        ----------
        dwell_us
            Of the readouts that are to be whitened; 0: not known. Then, and if that of the noise is not
            known, the covariance is that of the noise readouts.
        bandwidth
            Of the receiver's noise relative to the inverse of the dwell time.

        Raises
        ------
        ValueError
            If there are fewer than four samples for each coil.

        References
        ----------
        Kellman & McVeigh, Magn Reson Med 54:1439 (2005), doi:10.1002/mrm.20713 (noise bandwidth).
        """
        known = self._sums.get(n_coils)
        if known is None or known.samples < 4 * n_coils:
            n_samples = known.samples if known else 0
            raise ValueError(f"the noise readouts hold {n_samples} usable samples for {n_coils} coils")
        scale = 1.0
        if known.dwell_us and 0 < dwell_us < _LONGEST_DWELL_US:
            scale = known.dwell_us / dwell_us / bandwidth
        return torch.from_numpy(known.total * (scale / known.samples))


def dependent_coils(covariance: Tensor) -> list[int]:
    """Coils that cannot be whitened: dead ones, and linear copies of coils before them.

    Parameters
    ----------
    covariance
        `(C, C)` Hermitian.
    """
    left = covariance.to(torch.complex128).clone()
    variance = left.diagonal().real.clone()
    dead = ~(variance > _DEAD * variance.max())
    dropped = []
    # Cholesky's elimination: the diagonal holds what a coil has that those before it lack.
    for coil in range(len(left)):
        own = left[coil, coil].real
        if bool(dead[coil]) or not bool(own > _OWN * variance[coil]):
            dropped.append(coil)
            continue
        left -= torch.outer(left[:, coil], left[coil]) / own
    return dropped


def whitening_matrix(covariance: Tensor) -> Tensor:
    """`(V, C)` matrix that makes noise of this covariance white with variance 1: the inverse
    Cholesky factor of the V coils that are alive and no copies; the others have weight 0.

    Parameters
    ----------
    covariance
        `(C, C)` Hermitian, ``mean(n nᴴ)`` of noise samples.

    Raises
    ------
    ValueError
        If the covariance is not finite, or no coil has any noise.

    References
    ----------
    Pruessmann et al., Magn Reson Med 46:638 (2001), doi:10.1002/mrm.1241.
    """
    C = len(covariance)
    variance = covariance.diagonal().real
    finite = bool(torch.isfinite(torch.view_as_real(covariance)).all())
    if not finite or not bool((variance > 0).any()):
        raise ValueError(
            f"the noise of {C} coils has variances of {float(variance.min()):.3g} to "
            f"{float(variance.max()):.3g}: expected finite ones, and more than 0"
        )
    dropped = dependent_coils(covariance)
    kept = [coil for coil in range(C) if coil not in dropped]
    factor = torch.linalg.cholesky(covariance[kept][:, kept])
    white = torch.zeros((len(kept), C), dtype=covariance.dtype, device=covariance.device)
    white[:, kept] = torch.linalg.solve_triangular(
        factor, torch.eye(len(kept), dtype=factor.dtype, device=factor.device), upper=False
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
