"""Temporal basis and grid of the dictionary: what holds for any train."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from whorl.physics.dictionary import DictionaryParameters, Grid, build_dictionary, log_grid, temporal_basis
from whorl.physics.epg import SignalModel, fisp_signal
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
    assert kept[-1] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_fewest_columns_that_keep_the_energy(energy: float) -> None:
    signals = random_signals(31, 17)
    basis, kept = temporal_basis(signals, energy)
    values = torch.linalg.svdvals(signals).square()
    shares = (values.cumsum(0) / values.sum()).tolist()
    K = basis.shape[1]
    assert kept[-1] >= energy
    assert kept == pytest.approx(shares[:K], abs=1e-12)
    assert K == 1 or shares[K - 2] < energy
    projected = (signals @ basis.conj()).abs().square().sum() / signals.abs().square().sum()
    assert float(projected) == pytest.approx(kept[-1], abs=1e-12)


def test_number_of_columns_can_be_chosen_and_has_its_limit() -> None:
    signals = random_signals(12, 17)
    assert temporal_basis(signals, 0.5, 4)[0].shape == (17, 4)
    assert temporal_basis(signals, 0.5, 99)[0].shape == (17, 12)
    assert temporal_basis(signals, 0.5, 4, spare=3)[0].shape == (17, 7)


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
    assert len(grid) == 3 or (high / low) ** (1 / (len(grid) - 2)) > 1 + step


def test_pairs_are_all_physical_ones() -> None:
    grid1, grid2 = log_grid(50, 800, 0.2), log_grid(20, 200, 0.2)
    grid = Grid(grid1, grid2, np.array([0.9, 1.1]))
    t1, t2, b1 = grid.atoms()
    assert len(grid) == len(t1) == 2 * sum(b <= a for a in grid1 for b in grid2)
    assert bool((t2 <= t1).all())
    atoms = set(zip(t1.tolist(), t2.tolist(), b1.tolist(), strict=True))
    assert len(atoms) == len(t1)
    for field in np.float32([0.9, 1.1]).tolist():
        assert (800.0, 200.0, field) in atoms
        assert (50.0, 20.0, field) in atoms
    # Atoms can be found by their places on the axes.
    i, j = grid.places()
    np.testing.assert_allclose(t1[: grid.n_pairs], grid1[i], rtol=1e-6)
    np.testing.assert_allclose(t2[grid.n_pairs :], grid2[j], rtol=1e-6)
    assert (grid.starts[i] + j == np.arange(grid.n_pairs)).all()


def test_a_thinner_grid_keeps_the_ends_and_every_b1() -> None:
    grid = Grid(log_grid(50, 800, 0.1), log_grid(20, 200, 0.1), np.array([0.9, 1.0, 1.1]))
    thin = grid.thinned(3)
    for axis, thinned in zip(grid.axes[:2], thin.axes[:2], strict=True):
        assert (thinned[0], thinned[-1]) == (axis[0], axis[-1])
        assert len(thinned) == len(axis) // 3 + 1 + (len(axis) % 3 != 1)
    assert thin.b1_axis.tolist() == [0.9, 1.0, 1.1]


@pytest.mark.parametrize(
    ("t1", "t2", "b1", "says"),
    [
        ([20.0, 50.0], [60.0, 100.0], [1.0], "empty"),
        ([50.0, 20.0], [10.0], [1.0], "T1 values .* rise"),
        ([20.0, 50.0], [0.0, 10.0], [1.0], "T2 values .* positive"),
        ([20.0, 50.0], [10.0], [1.0, float("nan")], "B1 values"),
    ],
    ids=["T1 below T2", "falling", "zero", "NaN"],
)
def test_an_impossible_grid_says_so(t1: list[float], t2: list[float], b1: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Grid(np.array(t1), np.array(t2), np.array(b1))


SMALL = {"t1_range_ms": (200.0, 2000.0), "t2_range_ms": (30.0, 300.0), "step": 0.1, "energy": 0.999}


@pytest.mark.parametrize("phase_deg", [0.0, 50.0], ids=["real", "complex"])
@pytest.mark.parametrize("b1_range", [(1.0, 1.0), (0.8, 1.2)], ids=["one B1", "B1 axis"])
def test_atoms_come_back_from_their_coefficients(phase_deg: float, b1_range: tuple[float, float]) -> None:
    train = train_of(40, phase_deg)
    dictionary = build_dictionary(DictionaryParameters(train, b1_range=b1_range, b1_step=0.1, **SMALL))
    grid = dictionary.grid
    assert len(grid.b1_axis) == (1 if b1_range[0] == b1_range[1] else 5)
    assert dictionary.coefficients.is_complex() == (phase_deg != 0)
    signals = fisp_signal(train, *grid.atoms())
    energies = signals.abs().square()
    error = (dictionary.coefficients @ dictionary.basis.T - signals).abs().square().sum()
    # What is missing is the energy that the basis does not keep; float32 counts 1e-6 of it.
    assert float(error / energies.sum()) == pytest.approx(1 - dictionary.energy, abs=2e-6)
    assert 0.999 <= dictionary.energy < 1
    # The basis of a coarser grid is as good as the best one.
    best, _ = temporal_basis(signals, 1.0, dictionary.basis.shape[1])
    lost = 1 - (signals @ best.conj()).abs().square().sum() / energies.sum()
    assert 1 - dictionary.energy < 1.05 * float(lost) + 2e-6
    identity = torch.eye(dictionary.basis.shape[1], dtype=dictionary.basis.dtype)
    torch.testing.assert_close(dictionary.basis.conj().T @ dictionary.basis, identity, rtol=0, atol=1e-5)
    moved = dictionary.to(torch.device("cpu"))
    assert moved.energy == dictionary.energy
    assert torch.equal(moved.coefficients, dictionary.coefficients)


def test_one_coefficient_is_never_enough() -> None:
    dictionary = build_dictionary(DictionaryParameters(train_of(3), energy=0.5))
    assert dictionary.basis.shape == (3, 2)
    assert dictionary.energy >= 0.5


def test_a_profile_that_cancels_says_so() -> None:
    model = SignalModel(profile=np.array([[1.0], [-1.0]]))
    with pytest.raises(ValueError, match="no signal"):
        build_dictionary(DictionaryParameters(train_of(12), model, **SMALL))


def test_directions_are_atoms_of_norm_one() -> None:
    dictionary = build_dictionary(DictionaryParameters(train_of(40, 50.0), **SMALL))
    torch.testing.assert_close(dictionary.directions.T * dictionary.lengths[:, None], dictionary.coefficients)
    torch.testing.assert_close(dictionary.directions.norm(dim=0), torch.ones(len(dictionary.grid)))


def test_parameters_with_other_signals_have_other_hashes() -> None:
    train = train_of(12)
    others = [
        DictionaryParameters(train),
        DictionaryParameters(train_of(13)),
        DictionaryParameters(train_of(12, 50.0)),
        DictionaryParameters(train, SignalModel(inversion_efficiency=0.9)),
        DictionaryParameters(train, SignalModel(diffusion_per_ms=1e-3)),
        DictionaryParameters(train, SignalModel(profile=np.array([[1.0], [0.5]]))),
        DictionaryParameters(train, SignalModel(profile=np.array([[1.0, 0.5]] * 6).reshape(1, 12))),
        DictionaryParameters(train, t1_range_ms=(21.0, 5000.0)),
        DictionaryParameters(train, t2_range_ms=(4.0, 2999.0)),
        DictionaryParameters(train, step=0.06),
        DictionaryParameters(train, b1_range=(0.9, 1.1)),
        DictionaryParameters(train, b1_range=(0.9, 1.1), b1_step=0.05),
        DictionaryParameters(train, energy=0.999),
        DictionaryParameters(train, n_coefficients=4),
    ]
    assert len({parameters.digest() for parameters in others}) == len(others)
    assert DictionaryParameters(train_of(12)).digest() == others[0].digest()
