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
    """Result for V voxels, each `(V,)`: T1 and T2 in ms, M0 (with the phase of the coefficients, in
    their unit) and the normalised correlation with the atom in [0, 1]."""

    t1_ms: Tensor
    t2_ms: Tensor
    m0: Tensor
    quality: Tensor


def match(coefficients: Tensor, dictionary: Dictionary, *, chunk: int = 32) -> Match:
    """The atom of largest normalised inner product ``|dᴴc| / (|d||c|)`` for each voxel.

    The maximum is exact, whatever the complex scale of a voxel.

    Parameters
    ----------
    coefficients
        `(V, K)`, complex or real.
    dictionary
        N atoms in the same subspace.
    chunk
        Voxels that are compared at a time; on a CPU their products with all atoms should fit the cache.

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
        for start in range(0, len(coefficients), chunk):
            part = coefficients[start : start + chunk].to(unit.dtype)
            best[start : start + chunk] = (part @ unit.conj().T).abs().argmax(1)
    else:
        # Real atoms: the squared modulus is the sum of two real products, a quarter of the complex work;
        # for real coefficients it is one.
        columns = unit.T.contiguous()
        parts = [coefficients.real, coefficients.imag] if coefficients.is_complex() else [coefficients]
        products = [torch.empty((chunk, len(atoms)), device=coefficients.device) for _ in parts]
        for start in range(0, len(coefficients), chunk):
            n = min(chunk, len(coefficients) - start)
            for part, product in zip(parts, products, strict=True):
                torch.mm(part[start : start + n].contiguous(), columns, out=product[:n])
            power = products[0][:n].square_()
            for product in products[1:]:
                power.addcmul_(product[:n], product[:n])
            torch.argmax(power, 1, out=best[start : start + n])
    product = (unit[best].conj() * coefficients).sum(1)  # (V,)
    length = torch.linalg.vector_norm(coefficients, dim=1)
    return Match(
        t1_ms=dictionary.t1_ms[best],
        t2_ms=dictionary.t2_ms[best],
        m0=product / norm[best, 0],
        quality=(product.abs() / length.clamp_min(1e-30)).clamp_max(1),
    )
