"""Normal operator of the subspace encoding, ``N = A'WA``, as a convolution, and what inverts it roughly.

All readouts of an interleaf lie at the same places, so what the train does to the coefficients there is one
K×K matrix, ``G_i = Σ_t conj(u_t) u_tᵀ`` over its timepoints. Without coils the operator is then a
convolution, ``T_kl(r) = Σ_i G_i,kl Σ_s w_is exp(i2π k_is·r)``: a K×K matrix at each point of a grid that is
twice as wide. Images are zero outside a box, which need not be the whole field of view, and nothing is
computed outside it.

Letters: K coefficients, C coils, I interleaves, S samples, H W pixels of the box, F frequencies, Q pairs of
coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.fft import next_fast_len
from torch import Tensor

from whorl.kspace.nufft import Nufft, make_nufft
from whorl.runtime.cores import pieces, spread

#: Frequencies that are mixed together: on a CPU they stay in the cache of a core.
_CHUNK = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Sampling:
    """Where k-space was sampled, and what the train did there.

    Parameters
    ----------
    gram
        `(I, K, K)` complex: ``G_i``.
    dcf
        `(I, S)`: area of each sample, as in `whorl.recon.lowrank.adjoint_coil_images`.
    points
        `(I·S, 2)` cycles per pixel.
    nufft
        Transform for these samples.
    backend
        NUFFT of the convolution's kernel, see `whorl.kspace.nufft.make_nufft`.
    """

    gram: Tensor
    dcf: Tensor
    points: Tensor
    nufft: Nufft
    backend: str = "auto"


def is_real(gram: Tensor) -> bool:
    """Whether Gram matrices `(I, K, K)` are those of a real basis."""
    return not (gram.is_complex() and bool(gram.imag.any()))


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """The convolution.

    Parameters
    ----------
    spectrum
        `(F, K, K)` Hermitian matrices on the padded grid; real ones for a real basis.
    padded
        Lines and columns of that grid; F is their product.
    inverse
        `(H·W, K, K)`: of the circulant matrices that are nearest to the convolution (T. Chan), regularised.
    shape
        (H, W).

    References
    ----------
    Fessler et al., IEEE Trans Signal Process 53:3393 (2005), doi:10.1109/TSP.2005.853152 (Toeplitz);
    Tamir et al., Magn Reson Med 77:180 (2017), doi:10.1002/mrm.26102 (with a temporal subspace);
    T. F. Chan, SIAM J Sci Stat Comput 9:766 (1988), doi:10.1137/0909051 (circulant preconditioner).
    """

    spectrum: Tensor
    padded: tuple[int, int]
    inverse: Tensor
    shape: tuple[int, int]

    def convolve(self, coil_images: Tensor) -> Tensor:
        """``F'W G F``: `(C, K, H, W)` complex to the same."""
        return torch.cat(self.convolve_each(len(coil_images), lambda coils: coil_images[coils], _as_they_are))

    def convolve_each(
        self,
        n_coils: int,
        before: Callable[[slice], Tensor],
        after: Callable[[slice, Tensor], Tensor],
    ) -> list[Tensor]:
        """The same of images that are made and used up coil by coil, on all cores.

        Parameters
        ----------
        before
            Images `(c, K, H, W)` of some coils.
        after
            Takes them convolved; what it gives is returned, in the order of the coils.
        """
        (H, W), (P, Q), K = self.shape, self.padded, self.spectrum.shape[1]
        device = self.spectrum.device
        seen = torch.empty((n_coils, K, P * Q), dtype=self.spectrum.dtype.to_complex(), device=device)

        def transform(coils: slice) -> None:
            seen[coils] = torch.fft.fft2(before(coils), s=(P, Q)).flatten(2)

        def mix(some: slice) -> None:
            seen[:, :, some] = _multiply(self.spectrum[some], seen[:, :, some])

        def back(coils: slice) -> Tensor:
            return after(coils, torch.fft.ifft2(seen[coils].reshape(-1, K, P, Q))[..., :H, :W])

        spread(transform, pieces(n_coils, 1, device))
        spread(mix, pieces(P * Q, _CHUNK, device))
        return spread(back, pieces(n_coils, 1, device))

    def invert_roughly(self, images: Tensor) -> Tensor:
        """The regularised inverse of the circulant approximation, coils left out: `(K, H, W)` complex."""
        K, (H, W) = len(images), self.shape
        seen = torch.fft.fft2(images).reshape(1, K, H * W)

        def mix(some: slice) -> None:
            seen[:, :, some] = _multiply(self.inverse[some], seen[:, :, some])

        spread(mix, pieces(H * W, _CHUNK, seen.device))
        back: Tensor = torch.fft.ifft2(seen.reshape(K, H, W))
        return back


def _multiply(matrices: Tensor, spectra: Tensor) -> Tensor:
    """`(F, K, K)` times complex `(C, K, F)`, frequency by frequency."""
    C, K, F = spectra.shape
    columns = spectra.permute(2, 1, 0).contiguous()  # (F, K, C)
    if matrices.is_complex():
        mixed = torch.bmm(matrices, columns)
    else:  # real matrices act alike on real and imaginary parts
        mixed = torch.bmm(matrices, torch.view_as_real(columns).reshape(F, K, 2 * C))
        mixed = torch.view_as_complex(mixed.reshape(F, K, C, 2))
    return mixed.permute(2, 1, 0)


def make_kernel(sampling: Sampling, shape: tuple[int, int], *, ridge: float = 1.0) -> Kernel:
    """The convolution for images of a box.

    Parameters
    ----------
    sampling
        Of k-space.
    shape
        (H, W) of the box. Memory: K² numbers for each of some 4·H·W points (K = 9: 57 MB for a box of 210²).
    ridge
        Of the inverse of the circulant matrices, relative to their mean diagonal. Coils, which the matrices
        leave out, fill the gaps of k-space: a small ridge takes gaps for signal. Of 0.1 to 4, 1 to 4 needed
        the fewest steps of conjugate gradients on simulated plates and brains.
    """
    gram, (H, W) = sampling.gram, shape
    I, K, _ = gram.shape  # noqa: E741 - the field's letter
    rows, columns = torch.triu_indices(K, K, device=gram.device)
    pairs = gram[:, rows, columns].T  # (Q, I)
    real = is_real(gram)
    if real:
        # Spectra of real weights are real: two of them go through one complex transform.
        pairs = pairs.real if gram.is_complex() else pairs
        padded_pairs = torch.cat([pairs, torch.zeros_like(pairs[: len(pairs) % 2])])
        pairs = torch.complex(padded_pairs[0::2], padded_pairs[1::2])
    weighted = (pairs[:, :, None] * (I * sampling.dcf)).flatten(1)
    nufft = make_nufft(sampling.points, (2 * H, 2 * W), backend=sampling.backend)
    # No two pixels of the box are H lines or W columns apart.
    spread_points = nufft.adjoint(weighted)[:, 1:, 1:]  # (Q, 2H-1, 2W-1)
    padded = tuple(int(next_fast_len(2 * n - 1)) for n in shape)

    # Which of the pairs stands at each place of a matrix.
    places = torch.empty((K, K), dtype=torch.long, device=gram.device)
    places[rows, columns] = torch.arange(len(rows), device=gram.device)
    places[columns, rows] = places[rows, columns]
    below = torch.ones((K, K), dtype=torch.bool, device=gram.device).tril(-1)

    def matrices(values: Tensor, size: tuple[int, ...]) -> Tensor:
        """`(F, K, K)` from values at the distances -(H-1) to H-1, -(W-1) to W-1, which wrap at a size."""
        wrapped = _wrap(_wrap(values, 1, size[0]), 2, size[1])
        spectrum = torch.cat(
            spread(lambda some: torch.fft.fft2(wrapped[some]), pieces(len(wrapped), 4, wrapped.device))
        ).flatten(1)
        F = spectrum.shape[1]
        table = spectrum.real.new_empty((F, K, K)) if real else spectrum.new_empty((F, K, K))

        def fill(some: slice) -> None:
            pairs = spectrum[:, some].T.contiguous()
            pairs = torch.view_as_real(pairs).flatten(1) if real else pairs
            table[some] = pairs[:, places]
            if not real:
                table[some, below] = table[some, below].conj()

        spread(fill, pieces(F, _CHUNK, table.device))
        return table

    weights = [1 - torch.arange(1 - n, n, device=gram.device).abs() / n for n in shape]
    nearest = matrices(spread_points * (weights[0][:, None] * weights[1]), shape)
    level = ridge * nearest.diagonal(dim1=1, dim2=2).real.mean()
    wide = torch.complex128 if nearest.is_complex() else torch.float64
    ridges = level * torch.eye(K, dtype=wide, device=gram.device)
    inverse = torch.empty_like(nearest)

    def invert(some: slice) -> None:
        inverse[some] = torch.linalg.inv_ex(nearest[some].to(wide) + ridges)[0].to(nearest.dtype)

    spread(invert, pieces(len(nearest), _CHUNK, nearest.device))
    return Kernel(matrices(spread_points, padded), (padded[0], padded[1]), inverse, shape)


def _wrap(values: Tensor, axis: int, size: int) -> Tensor:
    """Values at the distances -(n-1) to n-1 along an axis, added up at their places modulo `size`."""
    n = (values.shape[axis] + 1) // 2
    places = torch.arange(1 - n, n, device=values.device) % size
    shape = list(values.shape)
    shape[axis] = size
    return values.new_zeros(shape).index_add_(axis, places, values)


@dataclass(frozen=True, slots=True, eq=False)
class Normal:
    """``x -> A'WA x`` between subspace images `(K, H, W)`, with coil maps `(C, H, W)`: self-adjoint, positive
    semidefinite."""

    kernel: Kernel
    csm: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """`(K, H, W)` to `(K, H, W)`."""
        csm = self.csm[:, None]  # (C, 1, H, W)
        parts = self.kernel.convolve_each(
            len(csm),
            lambda coils: csm[coils] * images,
            lambda coils, seen: (csm[coils].conj() * seen).sum(0),
        )
        return torch.stack(parts).sum(0)

    def coil_images(self, images: Tensor) -> Tensor:
        """What the coils see of it, before their combination: `(K, H, W)` to `(K, C, H, W)`."""
        return self.kernel.convolve(self.csm[:, None] * images).transpose(0, 1)


def _as_they_are(coils: slice, seen: Tensor) -> Tensor:
    return seen
