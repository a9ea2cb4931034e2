"""Normal operator of the subspace encoding, ``N = A'WA``.

Letters: K coefficients, C coils, I interleaves, S samples, Y X pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whorl.kspace.coils import combine
from whorl.kspace.nufft import Nufft


class NormalOperator:
    """``x -> A'WA x`` between subspace images `(K, Y, X)`.

    All readouts of an interleaf lie at the same places, so what the train does to the coefficients
    there is one K×K matrix, ``G_i = Σ_t conj(u_t) u_tᵀ`` over its timepoints, between a forward and
    an adjoint transform. The operator is self-adjoint and positive semidefinite.

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
        self._gram, self._csm, self._nufft = gram, csm, nufft
        self._weight = len(dcf) * dcf

    def __call__(self, images: Tensor) -> Tensor:
        K, shape = len(images), images.shape[1:]
        C, (I, S) = len(self._csm), self._weight.shape  # noqa: E741 - the field's letter
        samples = self._nufft.forward((images[:, None] * self._csm).reshape(K * C, *shape))  # (K·C, I·S)
        samples = samples.reshape(K, C, I, S).permute(2, 0, 1, 3).reshape(I, K, C * S)
        samples = torch.bmm(self._gram, samples).reshape(I, K, C, S) * self._weight.reshape(I, 1, 1, S)
        back = self._nufft.adjoint(samples.permute(1, 2, 0, 3).reshape(K * C, I * S))
        return combine(back.reshape(K, C, *shape), self._csm)
