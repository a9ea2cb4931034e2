"""Dictionary match: an atom finds itself, and the maximum is the maximum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from whorl.physics.dictionary import Dictionary, DictionaryParameters, Grid, build_dictionary
from whorl.physics.matching import Match, match
from whorl.scan.train import Train
from whorl.simulation.signals import Train as PlayedTrain
from whorl.simulation.signals import fisp_signals, jiang_train


def dictionary_of(n_atoms: int, K: int, *, real: bool) -> Dictionary:
    """Atoms of different lengths and different signs, all directions distinct; T1 is 100 plus the number."""
    generator = torch.Generator().manual_seed(K)
    atoms = torch.randn((n_atoms, K), generator=generator, dtype=torch.float32 if real else torch.complex64)
    atoms *= torch.linspace(0.2, 3, n_atoms)[:, None]
    grid = Grid(100.0 + np.arange(n_atoms), np.array([10.0]))
    return Dictionary(grid, atoms, torch.eye(K, dtype=atoms.dtype), (1.0,))


def number(result: Match) -> torch.Tensor:
    """Numbers of the matched atoms."""
    return (result.t1_ms - 100).round().long()


CASES = pytest.mark.parametrize("real", [True, False], ids=["real atoms", "complex atoms"])


@CASES
@pytest.mark.parametrize("refine", [True, False])
def test_an_atom_matches_itself_at_any_complex_scale(real: bool, refine: bool) -> None:
    dictionary = dictionary_of(41, 5, real=real)
    scale = torch.polar(torch.logspace(-30, 30, 41), torch.linspace(-9, 9, 41))
    result = match(dictionary.coefficients * scale[:, None], dictionary, refine=refine)
    # One T2 only: there is nothing to interpolate with.
    torch.testing.assert_close(result.t1_ms, 100.0 + torch.arange(41), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.t2_ms, torch.full((41,), 10.0))
    assert result.b1.tolist() == [1.0] * 41
    # A handful of float32 products.
    torch.testing.assert_close(result.m0, scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.quality, torch.ones(41), rtol=0, atol=1e-6)
    assert float(result.quality.max()) <= 1


@CASES
def test_the_maximum_is_exact(real: bool) -> None:
    dictionary = dictionary_of(300, 4, real=real)
    generator = torch.Generator().manual_seed(3)
    voxels = torch.randn((150, 4), generator=generator, dtype=torch.complex64)
    result = match(voxels, dictionary)
    atoms = dictionary.coefficients.numpy().astype(complex)
    unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    length = np.linalg.norm(voxels.numpy().astype(complex), axis=1)
    correlation = np.abs(voxels.numpy() @ unit.conj().T) / length[:, None]
    # Compared by value: two atoms may be equal to float32 rounding.
    chosen = correlation[np.arange(150), number(result).numpy()]
    np.testing.assert_allclose(chosen, correlation.max(1), atol=1e-6)
    np.testing.assert_allclose(result.quality.numpy(), correlation.max(1), atol=1e-6)
    assert correlation.max(1).min() < 0.95
    # M0 is the least-squares factor of the atom.
    atom = atoms[number(result).numpy()]
    expected = (atom.conj() * voxels.numpy()).sum(1) / (np.abs(atom) ** 2).sum(1)
    np.testing.assert_allclose(result.m0.numpy(), expected, rtol=1e-4)


def test_real_coefficients_match_as_complex_ones_do() -> None:
    dictionary = dictionary_of(60, 4, real=True)
    voxels = torch.randn((37, 4), generator=torch.Generator().manual_seed(5))
    real, wide = match(voxels, dictionary), match(voxels.to(torch.complex64), dictionary)
    torch.testing.assert_close(real.t1_ms, wide.t1_ms, rtol=0, atol=0)
    torch.testing.assert_close(real.m0 + 0j, wide.m0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(real.quality, wide.quality, rtol=0, atol=1e-6)


@CASES
def test_a_voxel_without_signal_has_no_quality(real: bool) -> None:
    dictionary = dictionary_of(20, 3, real=real)
    voxels = torch.zeros((5, 3), dtype=torch.complex64)
    voxels[1] = dictionary.coefficients[7]
    voxels[3, 1], voxels[4, 2] = float("nan"), float("inf")
    result = match(voxels, dictionary)
    for values in (result.t1_ms, result.t2_ms, torch.view_as_real(result.m0), result.quality):
        assert bool(torch.isfinite(values).all())
    assert result.m0[[0, 2, 3, 4]].abs().tolist() == [0, 0, 0, 0]
    assert result.quality.tolist() == pytest.approx([0, 1, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("shape", [(5, 3), (5, 5), (4,)], ids=["too few", "too many", "one voxel"])
def test_coefficients_of_another_basis_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="4 coefficients"):
        match(torch.ones(shape, dtype=torch.complex64), dictionary_of(10, 4, real=True))


def test_each_voxel_needs_its_b1() -> None:
    with pytest.raises(ValueError, match="2 voxels"):
        match(torch.ones((2, 4)), dictionary_of(10, 4, real=True), b1=torch.ones(3))


def test_no_voxels() -> None:
    result = match(torch.empty((0, 4)), dictionary_of(10, 4, real=True))
    assert [len(getattr(result, name)) for name in ("t1_ms", "t2_ms", "b1", "m0", "quality")] == [0] * 5


def test_many_voxels_are_each_what_they_are_alone() -> None:
    # More than are worked on together.
    dictionary = dictionary_of(300, 4, real=True)
    generator = torch.Generator().manual_seed(3)
    which = torch.randint(300, (12_000,), generator=generator)
    result = match(dictionary.coefficients[which], dictionary)
    assert torch.equal(number(result), which)


# --- Between the atoms: signals of the simulator's own EPG, at places that no grid has ----------------------

PLAYED = jiang_train(300)
TRAIN = Train(PLAYED.flip_deg, PLAYED.tr_ms, PLAYED.te_ms, np.zeros(300), PLAYED.ti_ms, "test")


def tissues(n: int, seed: int, t2_ms: tuple[float, float] = (8.0, 2000.0)) -> tuple[np.ndarray, np.ndarray]:
    """T1 and T2 over the whole range, T2 <= T1."""
    rng = np.random.default_rng(seed)
    t1 = np.exp(rng.uniform(np.log(50), np.log(4000), n))
    t2 = np.exp(rng.uniform(np.log(t2_ms[0]), np.log(t2_ms[1]), n))
    return np.maximum(t1, t2), np.minimum(t1, t2)


def project(signals: np.ndarray, dictionary: Dictionary) -> torch.Tensor:
    return torch.from_numpy(signals).to(torch.complex64) @ dictionary.basis.to(torch.complex64).conj()


@pytest.fixture(scope="module")
def fine() -> Dictionary:
    return build_dictionary(DictionaryParameters(TRAIN))


def test_maps_are_not_quantised_by_the_grid(fine: Dictionary) -> None:
    t1, t2 = tissues(250, 0)
    scale = np.exp(2j * np.pi * np.arange(250) / 7) * np.geomspace(1e-3, 1e3, 250)
    voxels = project(fisp_signals(PLAYED, t1, t2) * scale[:, None], fine)
    result, coarse = match(voxels, fine), match(voxels, fine, refine=False)
    # Parabolas over steps of 5 % are exact to 1e-4; the simulator keeps every order, the dictionary 2e-5.
    np.testing.assert_allclose(result.t1_ms, t1, rtol=5e-4)
    np.testing.assert_allclose(result.t2_ms, t2, rtol=1e-3)
    assert np.abs(coarse.t2_ms.numpy() / t2 - 1).max() > 0.02
    assert float(result.quality.min()) > 0.999
    # The simulator's pulse of phase 0 gives -i.
    np.testing.assert_allclose(result.m0.numpy(), -1j * scale, rtol=2e-3)


def test_refinement_finds_the_top_in_noise_too(fine: Dictionary) -> None:
    t1, t2 = tissues(400, 1)
    clean = project(fisp_signals(PLAYED, t1, t2), fine)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.complex64)
    voxels = clean / clean.abs().square().sum(1, keepdim=True).sqrt() + 0.02 * noise
    result, coarse = match(voxels, fine), match(voxels, fine, refine=False)
    assert bool((result.quality >= coarse.quality - 1e-6).all())
    assert bool((result.t2_ms <= result.t1_ms).all())
    # No tissue around the result is better.
    near = torch.linspace(-0.05, 0.05, 11)
    for n in range(0, 400, 40):
        around1, around2 = torch.meshgrid(near, near, indexing="ij")
        grid1 = float(result.t1_ms[n]) * np.exp(around1.flatten().numpy())
        grid2 = float(result.t2_ms[n]) * np.exp(around2.flatten().numpy())
        inside = (grid2 <= grid1) & (grid1 >= 20) & (grid1 <= 5000) & (grid2 >= 4) & (grid2 <= 3000)
        atoms = project(fisp_signals(PLAYED, grid1[inside], grid2[inside]), fine)
        angle = (atoms.conj() @ voxels[n]).abs() / (atoms.norm(dim=1) * voxels[n].norm())
        assert float(angle.max()) <= float(result.quality[n]) + 2e-5


def test_results_stay_within_the_dictionary(fine: Dictionary) -> None:
    # Tissues beyond every edge, and one with T2 > T1, which the EPG allows.
    t1 = np.array([15.0, 7000.0, 900.0, 4900.0, 300.0])
    t2 = np.array([10.0, 80.0, 2.0, 4500.0, 330.0])
    result = match(project(fisp_signals(PLAYED, t1, t2), fine), fine)
    assert result.t1_ms[0].item() == pytest.approx(20)
    assert result.t1_ms[1].item() == pytest.approx(5000)
    assert result.t2_ms[2].item() == pytest.approx(4)
    assert result.t2_ms[3].item() == pytest.approx(3000)
    assert result.t2_ms[4].item() == pytest.approx(result.t1_ms[4].item(), rel=1e-4)


B1_TRUE = np.array([0.83, 0.94, 1.0, 1.09, 1.17])


@pytest.fixture(scope="module")
def with_b1() -> Dictionary:
    return build_dictionary(
        DictionaryParameters(TRAIN, step=0.08, b1_range=(0.8, 1.2), b1_step=0.05, t2_range_ms=(8, 400))
    )


def signals_at_b1(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Signals with T1, T2 and B1 of `n` tissues at each B1."""
    parts = []
    for seed, b1 in enumerate(B1_TRUE):
        t1, t2 = tissues(n, seed, (20.0, 200.0))
        played = PlayedTrain(PLAYED.flip_deg * b1, PLAYED.phase_deg, PLAYED.tr_ms, PLAYED.te_ms, PLAYED.ti_ms)
        parts.append((fisp_signals(played, t1, t2), t1, t2, np.full(n, b1)))
    signals, t1, t2, b1 = (np.concatenate(values) for values in zip(*parts, strict=True))
    return signals, t1, t2, b1


def test_a_known_transmit_field_is_taken_into_account(with_b1: Dictionary) -> None:
    signals, t1, t2, b1 = signals_at_b1(40)
    voxels = project(signals, with_b1)
    result = match(voxels, with_b1, b1=torch.from_numpy(b1))
    np.testing.assert_allclose(result.b1, b1, rtol=1e-5)
    np.testing.assert_allclose(result.t1_ms, t1, rtol=5e-3)
    np.testing.assert_allclose(result.t2_ms, t2, rtol=1e-2)
    wrong = match(voxels, with_b1, b1=torch.ones(len(b1)))
    assert np.abs(wrong.t2_ms.numpy() / t2 - 1).max() > 0.1
    # Without interpolation the nearest value on the axis counts.
    nearest = match(voxels, with_b1, b1=torch.from_numpy(b1), refine=False)
    np.testing.assert_allclose(nearest.b1, np.round(b1 / 0.05) * 0.05, rtol=1e-5)


def test_an_unknown_transmit_field_is_matched_too(with_b1: Dictionary) -> None:
    signals, t1, t2, b1 = signals_at_b1(40)
    result = match(project(signals, with_b1), with_b1)
    # Without noise the three can be told apart; B1 and T2 least.
    np.testing.assert_allclose(result.b1, b1, rtol=1e-2)
    np.testing.assert_allclose(result.t1_ms, t1, rtol=5e-3)
    np.testing.assert_allclose(result.t2_ms, t2, rtol=2e-2)


def test_a_field_beyond_the_axis_counts_as_its_end(with_b1: Dictionary) -> None:
    voxels = project(signals_at_b1(2)[0], with_b1)[:2]
    beyond = match(voxels, with_b1, b1=torch.tensor([0.1, 7.0]))
    at_ends = match(voxels, with_b1, b1=torch.tensor([0.8, 1.2]))
    assert torch.equal(beyond.t2_ms, at_ends.t2_ms)
    np.testing.assert_allclose(beyond.b1, [0.8, 1.2], rtol=1e-6)


def test_complex_signals_are_refined_too() -> None:
    phase = 117 / 2 * np.arange(120.0) * np.arange(1, 121)
    played = replace(jiang_train(120), phase_deg=phase)
    train = Train(played.flip_deg, played.tr_ms, played.te_ms, phase, played.ti_ms, "test")
    dictionary = build_dictionary(DictionaryParameters(train, t2_range_ms=(8, 400)))
    assert dictionary.coefficients.is_complex()
    t1, t2 = tissues(60, 3, (12.0, 200.0))
    result = match(project(fisp_signals(played, t1, t2), dictionary), dictionary)
    np.testing.assert_allclose(result.t1_ms, t1, rtol=1e-3)
    np.testing.assert_allclose(result.t2_ms, t2, rtol=3e-3)


@pytest.mark.parametrize(
    "ranges",
    [
        {"t2_range_ms": (78.0, 80.0)},
        {"t1_range_ms": (1000.0, 1000.1), "t2_range_ms": (20.0, 200.0)},
        {"t1_range_ms": (60.0, 70.0), "t2_range_ms": (62.0, 69.0)},
    ],
    ids=["one T2", "one T1", "near T2 = T1"],
)
@pytest.mark.parametrize("b1_known", [True, False])
def test_refinement_on_narrow_axes_is_never_worse_than_the_grid(
    ranges: dict[str, tuple[float, float]], b1_known: bool
) -> None:
    parameters = DictionaryParameters(TRAIN, b1_range=(0.9, 1.1), step=0.1, **ranges)
    dictionary = build_dictionary(parameters)
    t1_ms, t2_ms, _ = dictionary.grid.atoms()
    some = slice(0, dictionary.grid.n_pairs, max(1, dictionary.grid.n_pairs // 40))
    t1, t2 = t1_ms[some].numpy().astype(float), t2_ms[some].numpy().astype(float)
    b1 = 0.93 + 0.14 * np.arange(len(t1)) / len(t1)
    voxels = project(fisp_signals(PLAYED, t1, t2, b1=b1), dictionary)
    known = torch.from_numpy(b1) if b1_known else None
    result, grid = match(voxels, dictionary, b1=known), match(voxels, dictionary, b1=known, refine=False)
    # On the grid a B1 counts as the nearest value, which may fit better by chance.
    assert bool((result.quality >= grid.quality - 1e-4).all())
    # Not more than a step, or two where B1 is not known.
    np.testing.assert_allclose(result.t1_ms, t1, rtol=0.1 if b1_known else 0.2)
    np.testing.assert_allclose(result.t2_ms, t2, rtol=0.1 if b1_known else 0.2)


def test_tissues_with_t2_equal_to_t1(fine: Dictionary) -> None:
    t1 = np.geomspace(60, 2500, 40)
    generator = torch.Generator().manual_seed(4)
    clean = project(fisp_signals(PLAYED, t1, t1), fine)
    exact = match(clean, fine)
    np.testing.assert_allclose(exact.t1_ms, t1, rtol=2e-3)
    np.testing.assert_allclose(exact.t2_ms, t1, rtol=2e-3)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.complex64)
    voxels = clean / clean.abs().square().sum(1, keepdim=True).sqrt() + 0.01 * noise
    result, grid = match(voxels, fine), match(voxels, fine, refine=False)
    assert bool((result.t2_ms <= result.t1_ms).all())
    assert bool((result.quality >= grid.quality - 1e-6).all())
    # Noise drives half of them beyond the edge, along which the best T1 is found all the same.
    on_edge = result.t2_ms > 0.999 * result.t1_ms
    assert int(on_edge.sum()) > 5
    for n in torch.nonzero(on_edge)[:, 0].tolist():
        near = float(result.t1_ms[n]) * np.geomspace(0.97, 1.03, 25)
        atoms = project(fisp_signals(PLAYED, near, near), fine)
        angle = (atoms.conj() @ voxels[n]).abs() / (atoms.norm(dim=1) * voxels[n].norm())
        assert float(angle.max()) <= float(result.quality[n]) + 3e-6


@pytest.mark.parametrize("b1", ["none", "known", "searched"])
def test_the_number_of_cores_changes_no_bit(b1: str, fine: Dictionary, with_b1: Dictionary) -> None:
    dictionary = fine if b1 == "none" else with_b1
    generator = torch.Generator().manual_seed(7)
    which = torch.randint(len(dictionary.grid), (12_000,), generator=generator)
    voxels = dictionary.directions.T[which].to(torch.complex64)
    voxels = voxels + 0.02 * torch.randn(voxels.shape, generator=generator, dtype=torch.complex64)
    known = 0.8 + 0.4 * torch.rand(12_000, generator=generator) if b1 == "known" else None
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(match(voxels, dictionary, b1=known))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name in ("t1_ms", "t2_ms", "b1", "m0", "quality"):
            assert torch.equal(getattr(other, name), getattr(results[0], name)), name


def test_a_power_of_two_changes_no_bit(fine: Dictionary) -> None:
    generator = torch.Generator().manual_seed(8)
    voxels = fine.directions.T[torch.randint(len(fine.grid), (200,), generator=generator)]
    voxels = voxels + 0.02 * torch.randn(voxels.shape, generator=generator)
    results = [match(voxels * 2.0**n, fine) for n in (0, -100, 100)]
    for other in results[1:]:
        for name in ("t1_ms", "t2_ms", "quality"):
            assert torch.equal(getattr(other, name), getattr(results[0], name)), name
