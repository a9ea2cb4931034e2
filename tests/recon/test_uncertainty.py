"""Scans of what was found: their noise is that of the scan, and the errors of a few tell their covariance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whorl.kspace.accumulate import fold, fold_gram
from whorl.kspace.nufft import make_nufft
from whorl.kspace.slicebuffer import SubspaceKspace
from whorl.recon.uncertainty import (
    SecondScan,
    Tissues,
    folded_noise,
    least_level,
    noise_variance,
    systematic_variance,
)

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


# --- Deviations of few repetitions ------------------------------------------------------------------------


def two_tissues() -> tuple[Tissues, Tensor, Tensor]:
    """Left and right half of a disc with odd T1 and T2; the mask, and which of its pixels are on the left."""
    y, x = torch.meshgrid(torch.arange(30.0), torch.arange(28.0), indexing="ij")
    mask = (y - 14) ** 2 + (x - 13) ** 2 < 12**2
    left = (x < 13)[mask]
    return Tissues(torch.where(left, 800.0, 1400.0), torch.where(left, 60.0, 75.0), mask), mask, left


def test_a_mean_over_alike_pixels_stays_within_the_tissue() -> None:
    tissues, mask, left = two_tissues()
    ramp = torch.arange(30.0)[:, None].expand(30, 28)[mask]
    found = tissues.average(torch.stack([torch.where(left, 1.0, 100.0), torch.ones(len(left)), ramp]))
    # Tissues are (ln 1.75 / 0.05)² apart.
    torch.testing.assert_close(found[0], torch.where(left, 1.0, 100.0))
    torch.testing.assert_close(found[1], torch.ones(len(left)))
    # Far from the edge a ramp is its own mean.
    inner = (ramp - 14).abs() < 3
    inner &= (torch.arange(28.0).expand(30, 28)[mask] - 13).abs() < 20
    assert float((found[2] - ramp)[inner].abs().median()) < 0.5


def test_the_mean_is_that_of_its_weights() -> None:
    mask = torch.ones((5, 4), dtype=torch.bool)
    mask[0, 0] = False
    t1, t2 = torch.linspace(900, 1100, 19), torch.linspace(80, 70, 19)
    values = torch.randn((2, 19), generator=torch.Generator().manual_seed(3))
    places = torch.nonzero(mask).double()
    apart = (places[:, None] - places).square().sum(2) / (2 * 3.0**2)
    for logarithm, width in ((t1.double().log(), 0.05), (t2.double().log(), 0.1)):
        apart = apart + ((logarithm[:, None] - logarithm) / width) ** 2
    weights = (-apart).exp()
    expected = (values.double() @ weights / weights.sum(0)).float()
    torch.testing.assert_close(Tissues(t1, t2, mask).average(values), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [2, 12])
def test_few_repetitions_are_not_biased(n: int) -> None:
    tissues, _, left = two_tissues()
    sd = torch.stack([torch.where(left, 0.01, 0.05), torch.where(left, 0.2, 0.03)])
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(40):
        moves = sd * torch.randn((n, *sd.shape), generator=generator) + 0.1
        found.append(noise_variance(moves, tissues))
    ratio = torch.stack(found).sqrt() / sd
    # The root of a mean of logarithms of two draws is a third too small (of one degree of freedom the
    # correction is no more than its first term), of twelve within 2 %.
    assert (1 - 0.34 if n == 2 else 0.97) < float(ratio.mean()) < 1.03
    if n == 12:
        # Neighbours tell: 12 draws alone have a spread of 21 %.
        assert float(ratio.std()) < 0.06


def test_what_repetitions_have_in_common_is_systematic() -> None:
    tissues, _, left = two_tissues()
    common = torch.stack([torch.where(left, 0.02, -0.04), torch.where(left, 0.0, 0.1)])
    found = systematic_variance(common.expand(3, 2, -1), tissues)
    torch.testing.assert_close(found, common.square(), rtol=1e-4, atol=1e-9)
    noise = 0.3 * torch.randn((3, 2, len(left)), generator=torch.Generator().manual_seed(1))
    with_noise = systematic_variance(common + noise, tissues) - common.square()
    assert float(with_noise.mean()) == pytest.approx(0.3**2 / 3, rel=0.1)


def test_what_does_not_move_has_no_deviation() -> None:
    tissues, _, left = two_tissues()
    assert float(noise_variance(torch.zeros((4, 2, len(left))), tissues).max()) < 1e-7
