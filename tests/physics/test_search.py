"""Search for the best atom: blocks of atoms are ruled out, and the result is that of all products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from whorl.physics import search
from whorl.physics.dictionary import Dictionary, DictionaryParameters, Grid, build_dictionary
from whorl.physics.real import as_real, real_views
from whorl.physics.search import best_atoms
from whorl.scan.train import Train
from whorl.simulation.signals import jiang_train

PLAYED = jiang_train(250)


def dictionary_of(*, phase: bool = False, b1: bool = False) -> Dictionary:
    """Atoms of a train; with a quadratic `phase` of its pulses they are complex."""
    n = np.arange(250.0)
    phase_deg = 117 / 2 * n * (n + 1) if phase else np.zeros(250)
    train = Train(PLAYED.flip_deg, PLAYED.tr_ms, PLAYED.te_ms, phase_deg, PLAYED.ti_ms, "test")
    ranges = {"b1_range": (0.8, 1.2), "b1_step": 0.1} if b1 else {}
    return build_dictionary(DictionaryParameters(train, step=0.07, t2_range_ms=(5.0, 1500.0), **ranges))


@pytest.fixture(scope="module")
def real() -> Dictionary:
    return dictionary_of()


@pytest.fixture(scope="module", params=["real", "complex", "with B1"])
def dictionary(request: pytest.FixtureRequest, real: Dictionary) -> Dictionary:
    if request.param == "real":
        return real
    return dictionary_of(phase=request.param == "complex", b1=request.param == "with B1")


def views_of(voxels: Tensor, dictionary: Dictionary) -> Tensor:
    unit = voxels / torch.linalg.vector_norm(voxels, dim=1, keepdim=True).clamp_min(1e-30)
    return real_views(unit, dictionary.directions)


def check_exact(voxels: Tensor, dictionary: Dictionary, b1_place: Tensor | None = None) -> None:
    """No atom's product, in double precision, is larger than that of the one found."""
    found = best_atoms(views_of(voxels, dictionary), dictionary, b1_place).numpy()
    atoms = dictionary.coefficients.numpy().astype(complex)
    wide = voxels.numpy().astype(complex)
    correlation = np.abs(wide @ (atoms / np.linalg.norm(atoms, axis=1, keepdims=True)).conj().T)
    correlation /= np.linalg.norm(wide, axis=1, keepdims=True)
    if b1_place is not None:
        plane = np.arange(len(atoms)) // dictionary.grid.n_pairs
        correlation[b1_place.round().numpy()[:, None] != plane] = 0
    # Rounding of products of 20 terms in float32.
    np.testing.assert_allclose(correlation[np.arange(len(wide)), found], correlation.max(1), atol=1e-6)


def noisy(dictionary: Dictionary, n: int, noise: float, dtype: torch.dtype = torch.complex64) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    atoms = dictionary.directions.T[torch.randint(len(dictionary.grid), (n,), generator=generator)]
    phase = torch.polar(torch.ones(n, 1), 7 * torch.rand((n, 1), generator=generator))
    voxels = (atoms * phase).to(dtype) if dtype.is_complex else atoms
    return voxels + noise * torch.randn(voxels.shape, dtype=dtype, generator=generator)


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.03, 0.3, 100.0])
def test_no_atom_fits_better(dictionary: Dictionary, noise: float) -> None:
    voxels = noisy(dictionary, 400, noise)
    check_exact(voxels, dictionary)
    if len(dictionary.grid.b1_axis) > 1:
        check_exact(voxels, dictionary, torch.linspace(0, len(dictionary.grid.b1_axis) - 1, 400))


def test_real_voxels(real: Dictionary) -> None:
    for noise in (1e-3, 0.3, 100.0):
        check_exact(noisy(real, 400, noise, torch.float32), real)


@pytest.mark.parametrize("turn", [1, -1, 1j], ids=["as it is", "other sign", "turned"])
def test_voxels_between_blocks(dictionary: Dictionary, turn: complex) -> None:
    # Half way between the atoms of neighbouring blocks, and less than rounding to either side of it; and at
    # the centre and at the farthest atom of each block.
    blocks, unit = dictionary.blocks, dictionary.directions.T
    i, j = dictionary.grid.places()
    of = np.empty(len(i), dtype=int)
    for n, number in enumerate(blocks.number[: blocks.n_blocks].tolist()):
        of[number] = n
    number = {place: n for n, place in enumerate(zip(i.tolist(), j.tolist(), strict=True))}
    pairs = [
        (n, number[a + da, b + db])
        for n, (a, b) in enumerate(zip(i.tolist(), j.tolist(), strict=True))
        for da, db in ((1, 0), (0, 1), (1, 1))
        if (a + da, b + db) in number and of[n] != of[number[a + da, b + db]]
    ]
    assert len(pairs) > 200
    left, right = unit[torch.tensor(pairs[::2])].unbind(1)
    between = [left + weight * right for weight in (1 - 1e-6, 1, 1 + 1e-6)]
    nearness = torch.einsum("hls,hl->hs", blocks.atoms, blocks.centres.T)
    every = torch.arange(len(blocks.number))
    ends = [unit[blocks.number[every, place]] for place in (nearness.argmax(1), nearness.argmin(1))]
    check_exact(turn * torch.cat([*between, *ends]).to(torch.complex64), dictionary)


def test_atoms_that_resemble_nothing() -> None:
    # No block can be ruled out.
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.complex64):
        atoms = torch.randn((700, 6), generator=generator, dtype=dtype)
        grid = Grid(100.0 + np.arange(100), 10.0 + np.arange(7))
        dictionary = Dictionary(grid, atoms, torch.eye(6, dtype=dtype), (1.0,))
        check_exact(torch.randn((300, 6), generator=generator, dtype=torch.complex64), dictionary)
        check_exact(atoms, dictionary)


def test_of_equal_atoms_the_first_counts() -> None:
    atoms = torch.randn((350, 6), generator=torch.Generator().manual_seed(1))
    grid = Grid(100.0 + np.arange(100), 10.0 + np.arange(7))
    dictionary = Dictionary(grid, torch.cat([atoms, -atoms]), torch.eye(6), (1.0,))
    assert torch.equal(best_atoms(views_of(-atoms, dictionary), dictionary, None), torch.arange(350))


def test_a_voxel_without_signal_gets_the_first_atom(dictionary: Dictionary) -> None:
    voxels = torch.zeros((3, dictionary.coefficients.shape[1]))
    voxels[1] = noisy(dictionary, 1, 0.0)[0].real
    views = views_of(voxels, dictionary)
    assert best_atoms(views, dictionary, None)[[0, 2]].tolist() == [0, 0]
    last = len(dictionary.grid.b1_axis) - 1
    of_last = best_atoms(views, dictionary, torch.full((3,), float(last)))
    assert of_last[[0, 2]].tolist() == [last * dictionary.grid.n_pairs] * 2


def test_blocks_hold_all_atoms_within_their_angle(dictionary: Dictionary) -> None:
    blocks = dictionary.blocks
    assert torch.equal(torch.unique(blocks.number), torch.arange(len(dictionary.grid)))
    unit = dictionary.directions.T.to(torch.complex128)[blocks.number]
    torch.testing.assert_close(as_real(dictionary.directions.T[blocks.number], 2).mT, blocks.atoms)
    # The centre is one of the atoms.
    apart = (blocks.atoms - blocks.centres.T[:, :, None]).abs().amax(1)
    assert apart.amin(1).max() == 0
    centre = unit[torch.arange(len(unit)), apart.argmin(1)]
    cos = (unit.conj() @ centre[:, :, None]).abs()[:, :, 0]
    assert bool((cos.amin(1) >= blocks.cos).all())
    torch.testing.assert_close(blocks.cos.square() + blocks.sin.square(), torch.ones(len(blocks.cos)))


def test_few_blocks_are_looked_at(real: Dictionary) -> None:
    # Else the search is right and slow.
    views = views_of(noisy(real, 1000, 0.01, torch.float32), real)
    block, voxel = search._near(views, real.blocks, slice(0, real.blocks.n_blocks), torch.zeros(1000))
    assert real.blocks.n_blocks > 70
    assert len(block) < 10 * 1000
    assert len(torch.unique(voxel)) == 1000


def test_a_gpu_finds_the_same_by_all_products(dictionary: Dictionary) -> None:
    views = views_of(noisy(dictionary, 300, 0.1), dictionary)
    for n in range(len(dictionary.grid.b1_axis)):
        number, power = search._search_all(views, dictionary, n, torch.zeros(300))
        found, reached = search._search_blocks(views, dictionary, n, torch.zeros(300))
        # Rounding of 20 products.
        torch.testing.assert_close(reached, power, rtol=0, atol=2e-6)
        assert (found == number).float().mean() > 0.99


def test_voxels_in_small_lots(dictionary: Dictionary, monkeypatch: pytest.MonkeyPatch) -> None:
    views = views_of(noisy(dictionary, 100, 0.1), dictionary)
    together = best_atoms(views, dictionary, None)
    monkeypatch.setattr(search, "_CHUNK_BOUNDS", 27 * dictionary.blocks.n_blocks)
    monkeypatch.setattr(search, "_CHUNK_PRODUCTS", 8000)
    assert (best_atoms(views, dictionary, None) == together).float().mean() > 0.99
