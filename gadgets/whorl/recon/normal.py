"""Normal operator of the subspace encoding, ``N = A'WA``, in two forms that agree to NUFFT accuracy.

Letters: K coefficients, C coils, I interleaves, S samples, Y X pixels, H W pixels of a box.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from whorl.kspace.coils import combine
from whorl.kspace.nufft import Nufft, make_nufft
from whorl.recon.mask import box_around

#: Of a Toeplitz kernel; what needs more is transformed instead.
_LARGEST_KERNEL = 1 << 30


class Normal(Protocol):
    """``x -> A'WA x`` between subspace images `(K, Y, X)`: self-adjoint, positive semidefinite."""

    csm: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """`(K, Y, X)` to `(K, Y, X)`."""

    def coil_images(self, images: Tensor) -> Tensor:
        """What the coils see of it, before their combination: `(K, Y, X)` to `(K, C, Y, X)`."""

    def with_maps(self, csm: Tensor) -> Normal:
        """The same encoding with other sensitivities `(C, Y, X)`."""


def is_real(gram: Tensor) -> bool:
    """Whether Gram matrices `(I, K, K)` are those of a real basis."""
    return not (gram.is_complex() and bool(gram.imag.any()))


class GramNormal:
    """All readouts of an interleaf lie at the same places, so what the train does to the coefficients
    there is one K×K matrix, ``G_i = Σ_t conj(u_t) u_tᵀ`` over its timepoints, between a forward and
    an adjoint transform of K·C images.

    Memory: 2 K·C·I·S complex samples while it works.

    Parameters
    ----------
    gram
        `(I, K, K)` complex.
    dcf
        `(I, S)`, as in `whorl.recon.lowrank.adjoint_coil_images`.
    csm
        `(C, Y, X)` complex.
    nufft
        Transform for the I·S samples.
    """

    def __init__(self, gram: Tensor, dcf: Tensor, csm: Tensor, nufft: Nufft) -> None:
        self.csm = csm
        self._gram, self._dcf, self._nufft = gram, dcf, nufft

    def with_maps(self, csm: Tensor) -> GramNormal:
        return GramNormal(self._gram, self._dcf, csm, self._nufft)

    def coil_images(self, images: Tensor) -> Tensor:
        K, shape = len(images), images.shape[1:]
        C, (I, S) = len(self.csm), self._dcf.shape  # noqa: E741 - the field's letter
        samples = self._nufft.forward((images[:, None] * self.csm).reshape(K * C, *shape))  # (K·C, I·S)
        samples = samples.reshape(K, C, I, S).permute(2, 0, 1, 3).reshape(I, K, C * S)
        weight = (I * self._dcf).reshape(I, 1, 1, S)
        samples = torch.bmm(self._gram, samples).reshape(I, K, C, S) * weight
        back = self._nufft.adjoint(samples.permute(1, 2, 0, 3).reshape(K * C, I * S))
        return back.reshape(K, C, *shape)

    def __call__(self, images: Tensor) -> Tensor:
        return combine(self.coil_images(images), self.csm)


class ToeplitzNormal:
    """Without coils the operator is a convolution, ``T_kl(r - r') = Σ_i G_i,kl Σ_s w_is
    exp(i2π k_is·(r - r'))``: a K×K matrix at each point of a grid that is twice as wide. For a real basis
    these matrices are real and symmetric. Images are taken to be zero outside a box, which need not be the
    whole field of view, and nothing is computed outside it.

    Memory: K² real numbers for each of the 4·H·W points (K = 9: 85 MB for a box of 256², 42 MB
    for 180²), and as many complex numbers as 5 times K·C images of the box while it works.

    Parameters
    ----------
    gram
        `(I, K, K)`, real or with a zero imaginary part.
    dcf
        `(I, S)`.
    csm
        `(C, Y, X)` complex.
    trajectory
        `(I·S, 2)` cycles per pixel.
    box
        Lines and columns of the images that may differ from zero.
    backend
        NUFFT for the kernel.

    Raises
    ------
    ValueError
        If the Gram matrices are complex: their imaginary part would be lost.

    References
    ----------
    Fessler et al., IEEE Trans Signal Process 53:3393 (2005), doi:10.1109/TSP.2005.853152 (Toeplitz);
    Tamir et al., Magn Reson Med 77:180 (2017), doi:10.1002/mrm.26102 (with a temporal subspace).
    """

    def __init__(
        self,
        gram: Tensor,
        dcf: Tensor,
        csm: Tensor,
        trajectory: Tensor,
        box: tuple[slice, slice],
        *,
        backend: str = "auto",
    ) -> None:
        if not is_real(gram):
            raise ValueError("the Gram matrices are complex: the Toeplitz form needs a real basis")
        self.csm = csm
        self._box = box
        self._maps = csm[:, box[0], box[1]]
        I, K, _ = gram.shape  # noqa: E741 - the field's letter
        H, W = self._maps.shape[1:]
        rows, columns = torch.triu_indices(K, K, device=gram.device)
        weighted = gram.real[:, rows, columns].T[:, :, None] * (I * dcf)  # (K(K+1)/2, I, S)
        nufft = make_nufft(trajectory, (2 * H, 2 * W), backend=backend)
        spread = nufft.adjoint(weighted.to(csm.dtype).flatten(1))
        # No two pixels of the box are H lines apart; without that line the spectrum is real.
        spread[:, 0], spread[:, :, 0] = 0, 0
        spectrum = torch.fft.fft2(torch.fft.ifftshift(spread, dim=(-2, -1))).real
        kernel = torch.empty((K, K, 4 * H * W), dtype=spectrum.dtype, device=spectrum.device)
        kernel[rows, columns] = spectrum.flatten(1)
        kernel[columns, rows] = spectrum.flatten(1)
        self._kernel = kernel.permute(2, 0, 1).contiguous()  # (4HW, K, K)

    def with_maps(self, csm: Tensor) -> ToeplitzNormal:
        other = object.__new__(ToeplitzNormal)
        other.csm, other._box, other._kernel = csm, self._box, self._kernel
        other._maps = csm[:, self._box[0], self._box[1]]
        return other

    def _apply(self, images: Tensor) -> Tensor:
        """`(K, Y, X)` to the coils' images of the box `(K, C, H, W)`."""
        C, H, W = self._maps.shape
        K = len(images)
        seen = images[:, None, self._box[0], self._box[1]] * self._maps
        spectrum = torch.fft.fft2(seen, s=(2 * H, 2 * W)).reshape(K * C, 4 * H * W).T.contiguous()
        # Real matrices act alike on real and imaginary parts.
        parts = torch.view_as_real(spectrum).reshape(4 * H * W, K, 2 * C)
        mixed = torch.bmm(self._kernel, parts).reshape(4 * H * W, K * C, 2)
        spectrum = torch.view_as_complex(mixed).T.reshape(K, C, 2 * H, 2 * W)
        back: Tensor = torch.fft.ifft2(spectrum)[:, :, :H, :W]
        return back

    def coil_images(self, images: Tensor) -> Tensor:
        return self._on_raster(self._apply(images))

    def __call__(self, images: Tensor) -> Tensor:
        return self._on_raster(combine(self._apply(images), self._maps))

    def _on_raster(self, boxed: Tensor) -> Tensor:
        whole = boxed.new_zeros((*boxed.shape[:-2], *self.csm.shape[1:]))
        whole[..., self._box[0], self._box[1]] = boxed
        return whole


def make_normal(
    gram: Tensor,
    dcf: Tensor,
    csm: Tensor,
    trajectory: Tensor,
    nufft: Nufft,
    mask: Tensor,
    *,
    form: str = "auto",
    backend: str = "auto",
) -> Normal:
    """The normal operator for images that are zero outside `mask`, in the form that is faster.

    Parameters
    ----------
    form
        ``gram``, ``toeplitz`` (gram if the basis is complex), or ``auto``: Toeplitz if its padded box has at
        most twice as many points as there are samples, the basis is real and its kernel takes at most 1 GiB.
        (Two cores, K = 9, C = 4, 85 000 samples: 0.1 s against 0.2 s for a box of 180², 0.3 s against 0.2 s
        for 256².)
    backend
        NUFFT for the Toeplitz kernel.

    Other parameters: see `GramNormal` and `ToeplitzNormal`.
    """
    if form == "auto":
        box = box_around(mask)
        points = 4 * (box[0].stop - box[0].start) * (box[1].stop - box[1].start)
        small = points <= 2 * dcf.numel() and 4 * points * gram.shape[1] ** 2 <= _LARGEST_KERNEL
        form = "toeplitz" if small else "gram"
    if form == "toeplitz" and is_real(gram):
        return ToeplitzNormal(gram, dcf, csm, trajectory, box_around(mask), backend=backend)
    return GramNormal(gram, dcf, csm, nufft)
