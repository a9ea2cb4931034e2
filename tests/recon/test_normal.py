"""Normal operator against the encoding of each timepoint, forward and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kspace.spirals import complex_normal, orthonormal_basis, rotated_spiral
from whorl.kspace.accumulate import fold, fold_gram
from whorl.kspace.coils import combine
from whorl.kspace.nufft import make_nufft
from whorl.recon.lowrank import adjoint_coil_images
from whorl.recon.normal import NormalOperator

T, K, C, I, S = 17, 3, 2, 5, 40  # noqa: E741 - the field's letter
# Two NUFFTs that are asked for 1e-4 each.
ERROR = 5e-4


def encoding(
    shape: tuple[int, int], backend: str = "finufft"
) -> tuple[NormalOperator, Tensor, Tensor, Tensor]:
    """The operator with its basis, weights and maps; timepoint t is measured along arm 3 t mod 5."""
    trajectory = rotated_spiral(I, S, 2)
    basis, csm = orthonormal_basis(T, K), complex_normal(C, *shape, seed=3)
    dcf = torch.rand((I, S), generator=torch.Generator().manual_seed(4))
    gram = torch.zeros((I, K, K), dtype=torch.complex64)
    fold_gram(gram, torch.arange(T), 3 * torch.arange(T) % I, basis)
    nufft = make_nufft(trajectory.reshape(-1, 2), shape, backend=backend)
    return NormalOperator(gram, dcf, csm, nufft), basis, dcf, csm


@pytest.mark.parametrize("backend", ["finufft", "sigpy"])
@pytest.mark.parametrize("shape", [(14, 11), (9, 16)], ids=str)
def test_is_the_encoding_forward_and_back(shape: tuple[int, int], backend: str) -> None:
    normal, basis, dcf, csm = encoding(shape, backend)
    x = complex_normal(K, *shape)
    result = normal(x)
    expected = torch.zeros_like(x)
    trajectory = rotated_spiral(I, S, 2)
    for t in range(T):
        i = 3 * t % I
        arm = make_nufft(trajectory[i], shape)
        samples = arm.forward(torch.einsum("k,kyx->yx", basis[t], x) * csm)  # (C, S)
        back = (arm.adjoint(samples * I * dcf[i]) * csm.conj()).sum(0)
        expected += basis[t].conj()[:, None, None] * back
    assert result.shape == x.shape
    assert float((result - expected).norm() / expected.norm()) < ERROR


def test_is_self_adjoint_and_positive() -> None:
    normal = encoding((14, 11))[0]
    x, y = complex_normal(K, 14, 11), complex_normal(K, 14, 11, seed=1)
    nx, ny = normal(x), normal(y)
    assert nx.shape == x.shape
    left, right = torch.vdot(nx.flatten(), y.flatten()), torch.vdot(x.flatten(), ny.flatten())
    assert abs(left - right) < ERROR * nx.norm() * y.norm()
    energy = torch.vdot(x.flatten(), nx.flatten())
    assert float(energy.real) > 0
    assert abs(energy.imag) < ERROR * abs(energy)


def test_agrees_with_what_is_folded_and_transformed_back() -> None:
    shape = (14, 11)
    normal, basis, dcf, csm = encoding(shape)
    nufft = make_nufft(rotated_spiral(I, S, 2).reshape(-1, 2), shape)
    x = complex_normal(K, *shape)
    arms = nufft.forward((x[:, None] * csm).reshape(K * C, *shape)).reshape(K, C, I, S)
    t = torch.arange(T)
    measured = torch.einsum("tk,kcts->tcs", basis, arms[:, :, 3 * t % I])
    bins = torch.zeros((I, K, C, S), dtype=torch.complex64)
    fold(bins, measured, t, 3 * t % I, basis)
    start = combine(adjoint_coil_images(bins, dcf, nufft), csm)
    assert float((normal(x) - start).norm() / start.norm()) < ERROR
