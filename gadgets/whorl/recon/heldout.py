"""Readouts that are kept out of a fit, to judge it without the truth.

Letters: T timepoints, K coefficients, C coils, I interleaves, S samples, R readouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whorl.kspace.accumulate import fold, fold_gram
from whorl.kspace.nufft import Nufft
from whorl.kspace.slicebuffer import HeldOut


def without(bins: Tensor, gram: Tensor, held: HeldOut, basis: Tensor) -> tuple[Tensor, Tensor]:
    """`(I, K, C, S)` and `(I, K, K)` as if the readouts that are held out had not been measured."""
    theirs, their_gram = torch.zeros_like(bins), torch.zeros_like(gram)
    fold(theirs, held.readouts, held.timepoint, held.interleaf, basis)
    fold_gram(their_gram, held.timepoint, held.interleaf, basis)
    return bins - theirs, gram - their_gram


def held_out_error(
    images: Tensor,
    held: HeldOut,
    basis: Tensor,
    csm: Tensor,
    dcf: Tensor,
    nufft: Nufft,
    *,
    scaled: bool = False,
) -> float:
    """Share of the energy of held-out readouts that images do not predict: ``‖y - A x‖²_W / ‖y‖²_W``.

    Noise is part of it: only differences count.

    Parameters
    ----------
    images
        Complex `(K, Y, X)`.
    csm
        `(C, Y, X)`.
    dcf
        `(R, S)`: area of each held-out sample.
    nufft
        Transform for the R·S samples of the readouts, in their order.
    scaled
        Whether the images may be multiplied by the best common factor first.
    """
    K, C, (R, S) = len(images), len(csm), dcf.shape
    weights = basis[held.timepoint].to(images.dtype)  # (R, K)
    samples = nufft.forward((images[:, None] * csm).reshape(K * C, *images.shape[1:])).reshape(K, C, R, S)
    predicted = torch.einsum("rk,kcrs->rcs", weights, samples)
    area, measured = dcf[:, None], held.readouts
    if scaled:
        overlap = (area * predicted.conj() * measured).sum()
        predicted = predicted * (overlap / (area * predicted.abs().square()).sum().clamp_min(1e-30))
    left = (area * (measured - predicted).abs().square()).sum()
    return float(left / (area * measured.abs().square()).sum().clamp_min(1e-30))
