"""Dictionary match in the subspace: from coefficients to T1, T2 and M0.

Letters: V voxels, N atoms, K coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whorl.physics.dictionary import Dictionary


@dataclass(frozen=True, slots=True)
class Match:
    """Result for V voxels, each `(V,)`: T1 and T2 in ms, complex M0 in the unit of the coefficients,
    and the normalised correlation with the atom in [0, 1]."""

    t1_ms: Tensor
    t2_ms: Tensor
    m0: Tensor
    quality: Tensor


def match(coefficients: Tensor, dictionary: Dictionary, *, chunk: int = 512) -> Match:
    """The atom of largest normalised inner product ``|dᴴc| / (|d||c|)`` for each voxel.

    The maximum is exact, whatever the complex scale of a voxel.

    Parameters
    ----------
    coefficients
        Complex `(V, K)`.
    dictionary
        N atoms in the same subspace.
    chunk
        Voxels that are compared at a time.

    Raises
    ------
    ValueError
        If the numbers of coefficients differ.

    References
    ----------
    Ma et al., Nature 495:187 (2013), doi:10.1038/nature11971.
    """
    if coefficients.ndim != 2 or coefficients.shape[1] != dictionary.coefficients.shape[1]:
        raise ValueError(
            f"coefficients have shape {tuple(coefficients.shape)}, the dictionary has "
            f"{dictionary.coefficients.shape[1]} coefficients: both must come from the same basis"
        )
    atoms = dictionary.coefficients
    norm = torch.linalg.vector_norm(atoms, dim=1, keepdim=True).clamp_min(1e-30)
    unit = atoms / norm  # (N, K)
    best = torch.empty(len(coefficients), dtype=torch.long, device=coefficients.device)
    if unit.is_complex():
        for part, index in zip(coefficients.split(chunk), best.split(chunk), strict=True):
            index.copy_((part @ unit.conj().T).abs().argmax(1))
    else:
        # Real atoms: the squared modulus is the sum of two real products, a quarter of the complex work.
        columns = unit.T.contiguous()
        real = torch.empty((chunk, len(atoms)), device=coefficients.device)
        imag = torch.empty_like(real)
        for part, index in zip(coefficients.split(chunk), best.split(chunk), strict=True):
            n = len(part)
            torch.mm(part.real.contiguous(), columns, out=real[:n])
            torch.mm(part.imag.contiguous(), columns, out=imag[:n])
            torch.argmax(real[:n].square_().addcmul_(imag[:n], imag[:n]), 1, out=index)
    atom = unit[best].to(coefficients.dtype)
    product = (atom.conj() * coefficients).sum(1)  # (V,)
    length = torch.linalg.vector_norm(coefficients, dim=1)
    return Match(
        t1_ms=dictionary.t1_ms[best],
        t2_ms=dictionary.t2_ms[best],
        m0=product / norm[best, 0],
        quality=(product.abs() / length.clamp_min(1e-30)).clamp_max(1),
    )
