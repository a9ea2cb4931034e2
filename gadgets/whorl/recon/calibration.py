"""Calibration: images in which the order of the interleaves leaves little trace, for coils, mask and phase.

An order that repeats slowly (sequential) gives each interleaf a share of the train of its own, and x0 bright
side lobes: coil maps and phase that are made of it are wrong. But the coefficients can be told apart within
each interleaf: ``F x`` of interleaf i, given its sum ``b_i = G_i F x + noise``, is
``(I G_i + μ diag(1/e))⁻¹ b_i`` for independent coefficients of energy e. Strong ones come out as from full
sampling, weak ones shrink, which biases maps but no calibration.

Letters: K coefficients, C coils, I interleaves, S samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: μ: noise energy of a coefficient relative to the first one's signal. Between 1e-4 and 1e-2 the coil maps
#: are alike.
_RIDGE = 1e-3


def regress_interleaves(bins: Tensor, gram: Tensor, energies: Tensor, *, ridge: float = _RIDGE) -> Tensor:
    """Coefficients of each interleaf by itself, `(I, K, C, S)` as `bins` and to be transformed as they.

    Parameters
    ----------
    bins
        Complex `(I, K, C, S)`: readouts folded into the subspace.
    gram
        `(I, K, K)`: ``Σ conj(u_t) u_tᵀ`` by interleaf.
    energies
        `(K,)`: energy of each coefficient in the dictionary, relative to the first.
    ridge
        μ, see the head of this module.

    References
    ----------
    Linear minimum mean square error estimate; see any text on Wiener filtering.
    """
    I, K, C, S = bins.shape  # noqa: E741 - the field's letter
    penalty = torch.diag(ridge / energies.double().clamp_min(1e-12))
    inverse = torch.linalg.inv(I * gram.to(torch.complex128) + penalty).to(bins.dtype)
    return torch.bmm(inverse, bins.reshape(I, K, C * S)).reshape(I, K, C, S)
