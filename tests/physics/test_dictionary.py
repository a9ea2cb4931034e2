"""Temporal basis and grid of the dictionary: what holds for any train."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from whorl.physics.dictionary import build_dictionary, log_grid, relaxation_grid, temporal_basis
from whorl.physics.epg import fisp_signal
from whorl.scan.train import Train


def train_of(n: int, phase_deg: float = 0.0) -> Train:
    t = np.arange(n)
    return Train(
        10 + 40 * np.sin(np.pi * t / n) ** 2,
        np.full(n, 10.0),
        np.full(n, 2.0),
        phase_deg * t * (t + 1) / 2,
        20.0,
        "test",
    )


def random_signals(n_atoms: int, n_timepoints: int, *, real: bool = False) -> torch.Tensor:
    """Atoms `(N, T)` whose singular values fall, with a mean that is not 0."""
    generator = torch.Generator().manual_seed(n_atoms)
    dtype = torch.float64 if real else torch.complex128
    left = torch.randn((n_atoms, 9), generator=generator, dtype=dtype) + (0.4 if real else 0.4 + 0.2j)
    right = torch.randn((9, n_timepoints), generator=generator, dtype=dtype)
    return (left * 0.5 ** torch.arange(9)) @ right


@pytest.mark.parametrize("real", [True, False], ids=["real", "complex"])
def test_basis_is_orthonormal_and_holds_the_signals(real: bool) -> None:
    signals = random_signals(40, 23, real=real)
    basis, kept = temporal_basis(signals, 1.0, 9)
    assert basis.shape == (23, 9)
    assert basis.dtype == signals.dtype
    identity = torch.eye(9, dtype=signals.dtype)
    torch.testing.assert_close(basis.conj().T @ basis, identity, rtol=0, atol=1e-13)
    # Nine directions were put in: the round trip of all atoms is exact. The eigenvectors of sᴴs carry
    # eps times its condition number, 256² here.
    coefficients = signals @ basis.conj()
    torch.testing.assert_close(coefficients @ basis.T, signals, rtol=0, atol=1e-10)
    assert kept == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_fewest_columns_that_keep_the_energy(energy: float) -> None:
    signals = random_signals(31, 17)
    basis, kept = temporal_basis(signals, energy)
    values = torch.linalg.svdvals(signals).square()
    shares = (values.cumsum(0) / values.sum()).tolist()
    K = basis.shape[1]
    assert kept >= energy
    assert kept == pytest.approx(shares[K - 1], abs=1e-12)
    assert K == 1 or shares[K - 2] < energy
    projected = (signals @ basis.conj()).abs().square().sum() / signals.abs().square().sum()
    assert float(projected) == pytest.approx(kept, abs=1e-12)


def test_number_of_columns_can_be_chosen_and_has_its_limit() -> None:
    signals = random_signals(12, 17)
    assert temporal_basis(signals, 0.5, 4)[0].shape == (17, 4)
    assert temporal_basis(signals, 0.5, 99)[0].shape == (17, 12)


@pytest.mark.parametrize("real", [True, False], ids=["real", "complex"])
def test_the_basis_of_one_dictionary_is_always_the_same(real: bool) -> None:
    signals = random_signals(40, 23, real=real)
    basis, _ = temporal_basis(signals, 1.0, 5)
    total = (signals @ basis.conj()).sum(0)
    torch.testing.assert_close(total, total.abs().to(total.dtype), rtol=0, atol=1e-10)
    assert float(total.abs().min()) > 1
    # Neither the order of the atoms nor a common scale is part of it.
    again, _ = temporal_basis(3 * signals.flip(0), 1.0, 5)
    torch.testing.assert_close(again, basis, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("low", "high", "step"), [(20, 5000, 0.05), (4, 3000, 0.07), (10, 10.1, 0.5)])
def test_grid_includes_both_ends_in_equal_small_steps(low: float, high: float, step: float) -> None:
    grid = log_grid(low, high, step)
    assert grid[0] == pytest.approx(low, rel=1e-12)
    assert grid[-1] == pytest.approx(high, rel=1e-12)
    ratios = grid[1:] / grid[:-1]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-12)
    assert 1 < ratios[0] <= 1 + step + 1e-12
    # One point fewer would step too far.
    assert len(grid) == 2 or (high / low) ** (1 / (len(grid) - 2)) > 1 + step


def test_pairs_are_all_physical_ones() -> None:
    t1, t2 = relaxation_grid((50, 800), (20, 200), 0.2)
    assert bool((t2 <= t1).all())
    grid1, grid2 = log_grid(50, 800, 0.2), log_grid(20, 200, 0.2)
    assert len(t1) == sum(b <= a for a in grid1 for b in grid2)
    pairs = set(zip(t1.tolist(), t2.tolist(), strict=True))
    assert len(pairs) == len(t1)
    assert (800.0, 200.0) in pairs
    assert (50.0, 20.0) in pairs


def test_an_empty_grid_says_so() -> None:
    with pytest.raises(ValueError, match="empty"):
        relaxation_grid((20, 50), (60, 100), 0.1)


@pytest.mark.parametrize("phase_deg", [0.0, 50.0], ids=["real", "complex"])
def test_atoms_come_back_from_their_coefficients(phase_deg: float) -> None:
    train = train_of(40, phase_deg)
    dictionary = build_dictionary(
        train, t1_range_ms=(200, 2000), t2_range_ms=(30, 300), step=0.2, energy=0.999
    )
    assert dictionary.coefficients.is_complex() == (phase_deg != 0)
    signals = fisp_signal(train, dictionary.t1_ms, dictionary.t2_ms)
    error = (dictionary.coefficients @ dictionary.basis.T - signals).abs().square().sum()
    # What is missing is the energy that the basis does not keep; float32 counts 1e-6 of it.
    assert float(error / signals.abs().square().sum()) == pytest.approx(1 - dictionary.energy, abs=2e-6)
    assert 0.999 <= dictionary.energy < 1
    moved = dictionary.to(torch.device("cpu"))
    assert moved.energy == dictionary.energy
    assert torch.equal(moved.t2_ms, dictionary.t2_ms)
