"""Folding into the subspace against sums that are written out.

Letters: T timepoints, K coefficients, C coils, I interleaves, S samples, R readouts.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whorl.kspace.accumulate import fold, fold_gram

T, K, C, I, S, R = 17, 4, 3, 5, 11, 29  # noqa: E741 - the field's letter


def random_complex(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.complex64)


def random_basis(is_complex: bool) -> Tensor:
    wide = random_complex(T, K, seed=7)
    return torch.linalg.qr(wide if is_complex else wide.real).Q


def readouts() -> tuple[Tensor, Tensor, Tensor]:
    """`(R, C, S)`, timepoints and interleaves; interleaf 2 is never visited, the last one is."""
    generator = torch.Generator().manual_seed(3)
    timepoint = torch.randint(0, T, (R,), generator=generator)
    interleaf = torch.randint(0, I, (R,), generator=generator)
    interleaf[interleaf == 2] = 4
    return random_complex(R, C, S), timepoint, interleaf


def naive(kspace: Tensor, timepoint: Tensor, interleaf: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    bins = torch.zeros(I, K, C, S, dtype=torch.complex128)
    gram = torch.zeros(I, K, K, dtype=torch.complex128)
    for y, t, i in zip(kspace, timepoint.tolist(), interleaf.tolist(), strict=True):
        for k in range(K):
            bins[i, k] += basis[t, k].conj() * y
            for other in range(K):
                gram[i, k, other] += basis[t, k].conj() * basis[t, other]
    return bins, gram


@pytest.mark.parametrize("is_complex", [False, True], ids=["real basis", "complex basis"])
@pytest.mark.parametrize("block", [R, 7, 1], ids=lambda block: f"blocks of {block}")
def test_folding_is_the_sum_over_readouts(is_complex: bool, block: int) -> None:
    kspace, timepoint, interleaf = readouts()
    basis = random_basis(is_complex)
    bins, gram = torch.zeros(I, K, C, S, dtype=torch.complex64), torch.zeros(I, K, K, dtype=torch.complex64)
    order = torch.randperm(R, generator=torch.Generator().manual_seed(block))
    for part in order.split(block):
        fold(bins, kspace[part], timepoint[part], interleaf[part], basis)
        fold_gram(gram, timepoint[part], interleaf[part], basis)
    expected_bins, expected_gram = naive(kspace, timepoint, interleaf, basis)
    # float32 rounding of sums of at most 29 products of about 1
    assert float((bins - expected_bins).abs().max()) < 1e-5
    assert float((gram - expected_gram).abs().max()) < 1e-5
    assert not bool(bins[2].any())
    assert not bool(gram[2].any())


def test_no_readouts_change_nothing() -> None:
    bins, gram = random_complex(I, K, C, S), random_complex(I, K, K)
    before = bins.clone(), gram.clone()
    nothing = torch.zeros(0, dtype=torch.long)
    fold(bins, torch.zeros(0, C, S, dtype=torch.complex64), nothing, nothing, random_basis(True))
    fold_gram(gram, nothing, nothing, random_basis(True))
    assert torch.equal(bins, before[0])
    assert torch.equal(gram, before[1])


def test_a_complete_train_has_the_identity_as_gram_matrix() -> None:
    # Orthonormal columns: all timepoints together are one unit of energy for each coefficient.
    gram = torch.zeros(I, K, K, dtype=torch.complex64)
    fold_gram(gram, torch.arange(T), torch.arange(T) % I, random_basis(True))
    assert float((gram.sum(0) - torch.eye(K)).abs().max()) < 1e-6  # float32 rounding
    assert float((gram - gram.mH).abs().max()) < 1e-7
    assert float(torch.linalg.eigvalsh(gram).min()) > -1e-6
