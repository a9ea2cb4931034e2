"""Complex coefficients as real numbers: products of matrices of real numbers are the fastest there are.

Letters: V voxels, K coefficients, P views of a voxel, L real numbers of each.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_real(values: Tensor, dim: int) -> Tensor:
    """Real numbers themselves, or real and imaginary parts one after the other along `dim`."""
    return torch.cat([values.real, values.imag], dim) if values.is_complex() else values


def real_views(coefficients: Tensor, atoms: Tensor) -> Tensor:
    """Real numbers `(P, V, L)` of coefficients c `(V, K)`, whose products with the real numbers of an atom d
    (`as_real`) are the real and the imaginary part of ``dᴴc``.

    P = 1 and L = K if all are real; P = 2 if the coefficients or the atoms are complex, and L = 2 K if the
    atoms are.
    """
    if atoms.is_complex():
        coefficients = coefficients.to(atoms.dtype)
        return torch.stack([as_real(coefficients, 1), as_real(-1j * coefficients, 1)])
    if coefficients.is_complex():
        return torch.stack([coefficients.real, coefficients.imag])
    return coefficients[None]
