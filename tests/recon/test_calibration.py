"""Calibration: coefficients told apart within each interleaf, and what the order of the interleaves does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kspace.spirals import complex_normal, orthonormal_basis, rotated_spiral
from recon.spiral_slice import map_distance, measure
from whorl.kspace.accumulate import fold_gram
from whorl.kspace.coils import coil_maps
from whorl.recon.calibration import regress_interleaves, unevenness

I, K, C, S = 5, 3, 2, 7  # noqa: E741 - the field's letter
ENERGIES = torch.tensor([1.0, 0.1, 0.004])


def test_of_full_sampling_each_coefficient_comes_back_by_its_factor() -> None:
    bins = complex_normal(I, K, C, S)
    gram = (torch.eye(K) / I).to(torch.complex64).expand(I, K, K)
    found = regress_interleaves(bins, gram, ENERGIES, ridge=0.02)
    assert found.shape == bins.shape
    assert found.dtype == bins.dtype
    factors = 1 / (1 + 0.02 / ENERGIES)
    torch.testing.assert_close(found, bins * factors.reshape(1, K, 1, 1), rtol=1e-5, atol=0)
    # The default shrinks the first by a thousandth, and those of a thousandth of its energy by half.
    half = regress_interleaves(bins, gram, torch.tensor([1.0, 0.1, 1e-3]))
    torch.testing.assert_close(half[:, 2], bins[:, 2] / 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(half[:, 0], bins[:, 0] / 1.001, rtol=1e-5, atol=0)


def test_of_one_interleaf_it_is_the_inverse_of_two_by_two() -> None:
    bins = complex_normal(1, 2, C, S)
    gram = torch.tensor([[[0.5, 0.2 + 0.1j], [0.2 - 0.1j, 0.3]]])
    found = regress_interleaves(bins, gram, torch.tensor([1.0, 0.1]), ridge=0.01)
    a, d, b = 0.5 + 0.01, 0.3 + 0.1, 0.2 + 0.1j
    determinant = a * d - abs(b) ** 2
    first = (d * bins[:, 0] - b * bins[:, 1]) / determinant
    second = (a * bins[:, 1] - b.conjugate() * bins[:, 0]) / determinant
    torch.testing.assert_close(found, torch.stack([first, second], 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("readouts", [12, 30])
def test_samples_come_back_where_the_train_tells_coefficients_apart(readouts: int) -> None:
    basis, samples = orthonormal_basis(I * readouts, K), complex_normal(I, K, C, S)
    gram = torch.zeros((I, K, K), dtype=torch.complex64)
    fold_gram(gram, torch.arange(I * readouts), torch.arange(I * readouts) % I, basis)
    bins = torch.einsum("ikl,ilcs->ikcs", gram, samples)
    found = regress_interleaves(bins, gram, torch.ones(K), ridge=1e-7)
    # Counted as if each readout filled k-space alone, as the adjoint wants them. Ridge against eigenvalues of
    # some tenths; float32 of the data.
    torch.testing.assert_close(I * found, samples, rtol=0, atol=3e-5)


def test_a_scale_goes_through() -> None:
    bins, gram = complex_normal(I, K, C, S), (torch.eye(K) / I).to(torch.complex64).expand(I, K, K)
    one, large = (regress_interleaves(s * bins, gram, ENERGIES) for s in (1.0, 2.0**60))
    assert torch.equal(one * 2.0**60, large)


@pytest.mark.parametrize("case", ["no energy", "seen once", "never seen", "all at once"])
def test_what_cannot_be_told_apart_stays_finite(case: str) -> None:
    basis = orthonormal_basis(I, K)
    gram = torch.zeros((I, K, K), dtype=torch.complex64)
    if case != "never seen":
        fold_gram(gram, torch.arange(I), torch.arange(I), basis)  # of rank one
    samples = complex_normal(I, K, C, S)
    bins = torch.einsum("ikl,ilcs->ikcs", gram, samples)
    energies = torch.tensor([1.0, 0.0, 0.0]) if case in ("no energy", "all at once") else ENERGIES
    found = regress_interleaves(bins, gram, energies)
    assert bool(torch.isfinite(torch.view_as_real(found)).all())
    # Never more than the eigenvalues of the penalty allow.
    assert float(found.abs().max()) <= float(bins.abs().max()) * K / 1e-3
    if case in ("no energy", "all at once"):
        assert float(found[:, 1:].abs().max()) < 1e-6
    if case == "never seen":
        assert float(found.abs().max()) == 0


@pytest.mark.parametrize("leading", [1, 2, 3])
def test_the_leading_ones_are_those_of_all(leading: int) -> None:
    basis, bins = orthonormal_basis(12, K), complex_normal(I, K, C, S)
    gram = torch.zeros((I, K, K), dtype=torch.complex64)
    fold_gram(gram, torch.arange(12), torch.arange(12) % I, basis)
    whole = regress_interleaves(bins, gram, ENERGIES)
    some = regress_interleaves(bins, gram, ENERGIES, leading=leading)
    assert some.shape == (I, leading, C, S)
    # The same products in matrices of another size.
    torch.testing.assert_close(some, whole[:, :leading], rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


def test_coil_maps_of_a_sequential_order_are_those_of_the_object() -> None:
    measured = measure(order="sequential")
    # What smoothing and the edge of the object cost is common to all.
    ideal = coil_maps(measured.truth[:, None] * measured.csm)

    def distance(csm: Tensor) -> float:
        return map_distance(csm, ideal, measured.mask)

    calibrated = measured.slice_data("walsh").csm
    of_x0 = measured.slice_data("x0").csm
    # Measured: 4.2 % and 0.08 %.
    assert distance(of_x0) > 0.03
    assert distance(calibrated) < distance(of_x0) / 20


# --- Whether an order is even -----------------------------------------------------------------------------

N = 96


def grams(order: Tensor, basis: Tensor) -> Tensor:
    """`(N, K, K)` of a train along interleaves in an order `(T,)`."""
    gram = torch.zeros((N, basis.shape[1], basis.shape[1]), dtype=torch.complex64)
    fold_gram(gram, torch.arange(len(order)), order, basis)
    return gram


def arms(n: int = N, *, turned: float = 0.0) -> Tensor:
    """`(n·S, 2)`: spirals whose angles are even, all of them turned."""
    points = rotated_spiral(n, 50, 4).reshape(-1, 2)
    c, s = math.cos(turned), math.sin(turned)
    return points @ torch.tensor([[c, -s], [s, c]])


@pytest.mark.parametrize("T", [200, 300, 480], ids="{} timepoints".format)
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_golden_steps_are_even_and_a_sequence_is_not(T: int, kind: str) -> None:
    t = (torch.arange(T) + 0.5) / T
    lobes = torch.sin(3.3 * math.pi * t).square() + 0.05
    columns = torch.stack([lobes, lobes * torch.exp(-3 * t), lobes * torch.cos(2 * math.pi * t)], 1)
    if kind == "complex":
        columns = torch.polar(columns, 2 * math.pi * t[:, None] * torch.tensor([0.5, 1.0, 1.5]))
    basis = torch.linalg.qr(columns).Q
    energies = torch.tensor([1.0, 0.2, 0.02])

    def of(step: int) -> float:
        return unevenness(grams(torch.arange(T) * step % N, basis), arms(), energies)

    # Measured: 0.005 to 0.013, and 0.18 to 0.64. 59 and 37 are the golden sections of 96.
    assert max(of(59), of(37)) < 0.02
    assert of(1) > 0.15
    assert of(N - 1) == pytest.approx(of(1), rel=0.2)  # backwards is as bad


def test_of_known_waves_it_is_the_amplitude() -> None:
    root = torch.randn((K, K), generator=torch.Generator().manual_seed(3), dtype=torch.complex64)
    mean = root @ root.mH
    angles = torch.arange(N) * (2 * math.pi / N)

    def of(*amplitudes: float) -> float:
        """Waves of 1, 2, 3 ... periods around the circle, each with a phase of its own."""
        waves = sum(a * torch.cos((n + 1) * angles + n) for n, a in enumerate(amplitudes))
        return unevenness((1 + waves)[:, None, None] * mean, arms(), torch.ones(K))

    # Of a cosine one half belongs to either direction of the wave; float32 of the matrices.
    assert of(0.0) < 1e-6
    for n in range(4):
        assert of(*[0.0] * n, 0.3) == pytest.approx(0.15, rel=1e-4)
    assert of(0.3, 0.0, 0.0, 0.4) == pytest.approx(0.25, rel=1e-4)
    # What varies quickly counts as noise.
    assert of(0.0, 0.0, 0.0, 0.0, 0.3) < 1e-6


def test_a_wave_that_turns_a_complex_basis_counts_in_full() -> None:
    one, angles = complex_normal(K, K), torch.arange(N) * (2 * math.pi / N)
    waves = torch.polar(torch.ones(N), 2 * angles)[:, None, None] * one
    gram = torch.eye(K) + 0.05 * (waves + waves.mH)
    expected = 0.05 * float(one.norm()) / K**0.5
    assert unevenness(gram, arms(), torch.ones(K)) == pytest.approx(expected, rel=1e-4)


def test_coefficients_count_by_their_energy() -> None:
    angles = torch.arange(N) * (2 * math.pi / N)
    gram = torch.eye(2, dtype=torch.complex64).repeat(N, 1, 1)
    gram[:, 1, 1] += 0.5 * torch.cos(angles)
    found = unevenness(gram, arms(), torch.tensor([1.0, 0.1]))
    assert found == pytest.approx(0.25 * 0.1 / math.hypot(1, 0.1), rel=1e-4)


def test_neither_labels_nor_a_turn_of_all_matter() -> None:
    basis = orthonormal_basis(200, K)
    gram, energies = grams(torch.arange(200) % N, basis), torch.tensor([1.0, 0.2, 0.02])
    expected = unevenness(gram, arms(), energies)
    assert expected > 0.05
    mixed = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    points = arms().reshape(N, -1, 2)[mixed].reshape(-1, 2)
    assert unevenness(gram[mixed], points, energies) == pytest.approx(expected, rel=1e-6)
    # Angles from float32 points.
    assert unevenness(gram, arms(turned=1.2), energies) == pytest.approx(expected, rel=1e-5)
    assert unevenness(7 * gram, arms(), energies) == pytest.approx(expected, rel=1e-5)


def test_one_interleaf_is_even() -> None:
    assert unevenness(complex_normal(1, K, K), arms(1), ENERGIES) == 0
    assert unevenness(torch.zeros((N, K, K), dtype=torch.complex64), arms(), ENERGIES) == 0
