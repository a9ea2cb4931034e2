"""Folding readouts into the temporal subspace while they arrive: ``Uᴴy`` by interleaf.

The adjoint of a whole train needs no transform for each timepoint: readouts of one interleaf lie
at the same places, so their subspace sums are formed first and transformed once.

Letters: T timepoints, K coefficients, C coils, I interleaves, S samples, R readouts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fold(bins: Tensor, kspace: Tensor, timepoint: Tensor, interleaf: Tensor, basis: Tensor) -> None:
    """Add readouts to their interleaves in the subspace: ``bins[i] += conj(U[t]) ⊗ y[t]``, in place.

    Parameters
    ----------
    bins
        Complex `(I, K, C, S)`.
    kspace
        Complex `(R, C, S)`: readouts.
    timepoint, interleaf
        `(R,)` int64: t and i of each readout.
    basis
        `(T, K)`: orthonormal columns.

    References
    ----------
    Tamir et al., Magn Reson Med 77:180 (2017), doi:10.1002/mrm.26102.
    """
    I, K, C, S = bins.shape  # noqa: E741 - the field's letter
    weights = basis.to(bins.dtype).conj()[timepoint]  # (R, K)
    order = torch.argsort(interleaf, stable=True)
    counts = torch.bincount(interleaf, minlength=I).tolist()
    start = 0
    for i, count in enumerate(counts):
        if not count:
            continue
        rows = order[start : start + count]
        start += count
        bins[i].view(K, C * S).addmm_(weights[rows].T, kspace[rows].view(count, C * S))


def fold_gram(gram: Tensor, timepoint: Tensor, interleaf: Tensor, basis: Tensor) -> None:
    """Count readouts in the subspace Gram matrix of their interleaf: ``G[i] += conj(u_t) u_tᵀ``, in place.

    Parameters
    ----------
    gram
        Complex `(I, K, K)`.
    timepoint, interleaf
        `(R,)` int64.
    basis
        `(T, K)`: orthonormal columns; u_t is its row t.
    """
    rows = basis.to(gram.dtype)[timepoint]  # (R, K)
    gram.index_add_(0, interleaf, rows.conj()[:, :, None] * rows[:, None, :])
