"""Scans of what was found: their noise is that of the scan, and the errors of a few tell their covariance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whorl.kspace.accumulate import fold, fold_gram
from whorl.kspace.nufft import make_nufft
from whorl.kspace.slicebuffer import SubspaceKspace
from whorl.recon.uncertainty import SecondScan, covariance_of, folded_noise, least_level

T, K, C, I, S, Y, X = 23, 3, 2, 4, 7, 12, 10  # noqa: E741 - the field's letters


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def basis() -> Tensor:
    """Complex, so that a missing conjugate shows."""
    return torch.linalg.qr(normal(T, K))[0]


@pytest.fixture
def interleaf() -> Tensor:
    return torch.arange(T) * 3 % I


def second_scan(basis: Tensor, interleaf: Tensor) -> tuple[SecondScan, SubspaceKspace, Tensor, Tensor]:
    """The scan, what was measured, images, and the readouts `(T, C, S)` that they would have given."""
    points = torch.rand((I * S, 2), generator=torch.Generator().manual_seed(1)) - 0.5
    nufft = make_nufft(points, (Y, X), backend="finufft")
    images, csm = normal(K, Y, X, seed=2), normal(C, Y, X, seed=3)
    samples = nufft.forward((images[:, None] * csm).reshape(K * C, Y, X)).reshape(K, C, I, S)
    readouts = torch.einsum("tk,kcts->tcs", basis, samples[:, :, interleaf])
    gram = torch.zeros((I, K, K), dtype=torch.complex64)
    fold_gram(gram, torch.arange(T), interleaf, basis)
    bins = normal(I, K, C, S, seed=4)
    kspace = SubspaceKspace(bins, gram, torch.arange(I).numpy(), torch.eye(C))
    return SecondScan(kspace, images, csm, nufft), kspace, gram, readouts


def test_without_noise_it_is_the_scan_of_the_images(basis: Tensor, interleaf: Tensor) -> None:
    scan, _, gram, readouts = second_scan(basis, interleaf)
    expected = torch.zeros((I, K, C, S), dtype=torch.complex64)
    fold(expected, readouts, torch.arange(T), interleaf, basis)
    made = scan.measured(0.0, seed=1)
    # Two NUFFTs of single precision, relative to the largest sample.
    scale = float(expected.abs().max())
    torch.testing.assert_close(made.bins, expected, rtol=0, atol=1e-5 * scale)
    assert made.gram is gram
    assert torch.equal(scan.measured(0.0, seed=2).bins, made.bins)


def test_its_noise_is_that_of_its_seed(basis: Tensor, interleaf: Tensor) -> None:
    scan, _, gram, _ = second_scan(basis, interleaf)
    clean = scan.measured(0.0, seed=7).bins
    noisy = scan.measured(3.0, seed=7).bins
    torch.testing.assert_close(
        noisy - clean, folded_noise(gram, C, S, 3.0, torch.Generator().manual_seed(7)), rtol=0, atol=1e-3
    )
    assert torch.equal(scan.measured(3.0, seed=7).bins, noisy)
    assert not torch.equal(scan.measured(3.0, seed=8).bins, noisy)


def test_its_noise_has_the_covariance_of_folded_noise(basis: Tensor, interleaf: Tensor) -> None:
    scan, _, gram, _ = second_scan(basis, interleaf)
    clean, sd, n = scan.measured(0.0, 0).bins, 0.5, 3000
    noise = torch.stack([scan.measured(sd, seed).bins for seed in range(n)]) - clean  # (n, I, K, C, S)
    rows = noise.permute(1, 2, 0, 3, 4).reshape(I, K, -1)
    empirical = rows @ rows.mH / rows.shape[2]
    # n C S = 42 000 draws: 0.5 % of the largest.
    torch.testing.assert_close(empirical, sd**2 * gram, rtol=0, atol=0.02 * sd**2 * float(gram.abs().max()))
    coils = noise[:, 0, 0].permute(1, 0, 2).reshape(C, -1)
    cross = coils @ coils.mH / coils.shape[1]
    assert float(cross[0, 1].abs()) < 0.05 * float(cross[0, 0].abs())


def test_the_level_of_noise_is_what_the_images_leave(basis: Tensor, interleaf: Tensor) -> None:
    scan, kspace, *_ = second_scan(basis, interleaf)
    noisy = scan.measured(0.7, seed=3)
    kspace.bins.copy_(noisy.bins)
    # Of 7 sample positions the quietest, with 24 numbers each.
    assert 0.35 < scan.noise_sd() < 0.8
    kspace.bins.mul_(100)  # the images explain nothing of it any more
    assert scan.noise_sd() > 20


def test_the_quietest_samples_tell_the_level(basis: Tensor, interleaf: Tensor) -> None:
    gram = second_scan(basis, interleaf)[2]
    noise = folded_noise(gram, C, 400, 0.3, torch.Generator().manual_seed(1))
    # Of 400 sample positions with 24 numbers each the quietest forty: some 30 % below the mean.
    level = least_level(noise, gram)
    assert 0.2 < level < 0.3
    signal = torch.zeros_like(noise)
    signal[..., :300] = 100
    # Of the hundred that have no signal.
    assert 0.2 < least_level(noise + signal, gram) < 0.3
    assert least_level(7 * noise, gram) == pytest.approx(7 * level, rel=1e-5)
    assert least_level(0 * noise, 0 * gram) == 0


def test_covariance_of_known_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    N, J, mask = 400, 3, torch.zeros((9, 8), dtype=torch.bool)
    mask[2:7, 1:7] = True
    root = torch.randn((J, J), generator=generator)
    common = torch.tensor([1.0, -2.0, 0.5])
    white = torch.randn((N, J, 9, 8), generator=generator)
    errors = torch.einsum("jk,nkyx->njyx", root, white) + common[:, None, None]
    errors[:, :, ~mask] = 1e6  # does not count
    noise, whole = covariance_of(errors, mask, noise_only=True), covariance_of(errors, mask)
    assert noise.shape == (int(mask.sum()), J, J)
    expected = root @ root.T
    # 400 repetitions and some ten pixels around each.
    size = float(expected.abs().max())
    torch.testing.assert_close(noise, expected.expand_as(noise), rtol=0, atol=0.15 * size)
    torch.testing.assert_close(
        whole, (expected + torch.outer(common, common)).expand_as(whole), rtol=0, atol=0.2 * size + 0.1
    )


def test_few_repetitions_are_not_biased() -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones((40, 40), dtype=torch.bool)
    found = []
    for _ in range(20):
        errors = torch.randn((2, 1, 40, 40), generator=generator)
        found.append([float(covariance_of(errors, mask, noise_only=only).mean()) for only in (True, False)])
    noise, whole = torch.tensor(found).mean(0).tolist()
    # 20 · 1600 pixels.
    assert noise == pytest.approx(1, abs=0.05)
    assert whole == pytest.approx(1, abs=0.05)
