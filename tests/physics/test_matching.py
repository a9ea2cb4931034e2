"""Dictionary match: an atom finds itself, and the maximum is the maximum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from whorl.physics.dictionary import Dictionary
from whorl.physics.matching import match


def dictionary_of(n_atoms: int, K: int, *, real: bool) -> Dictionary:
    """Atoms of different lengths and different signs, all directions distinct."""
    generator = torch.Generator().manual_seed(K)
    atoms = torch.randn((n_atoms, K), generator=generator, dtype=torch.float32 if real else torch.complex64)
    atoms *= torch.linspace(0.2, 3, n_atoms)[:, None]
    t = torch.arange(n_atoms, dtype=torch.float32)
    return Dictionary(100 + t, 10 + t, atoms, torch.eye(K, dtype=atoms.dtype), 1.0)


CASES = pytest.mark.parametrize("real", [True, False], ids=["real atoms", "complex atoms"])


@CASES
@pytest.mark.parametrize("chunk", [7, 512])
def test_an_atom_matches_itself_at_any_complex_scale(real: bool, chunk: int) -> None:
    dictionary = dictionary_of(41, 5, real=real)
    scale = torch.polar(torch.logspace(-4, 4, 41), torch.linspace(-9, 9, 41))
    result = match(dictionary.coefficients * scale[:, None], dictionary, chunk=chunk)
    torch.testing.assert_close(result.t1_ms, dictionary.t1_ms, rtol=0, atol=0)
    torch.testing.assert_close(result.t2_ms, dictionary.t2_ms, rtol=0, atol=0)
    # A handful of float32 products.
    torch.testing.assert_close(result.m0, scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.quality, torch.ones(41), rtol=0, atol=1e-6)
    assert float(result.quality.max()) <= 1


@CASES
def test_the_maximum_is_exact(real: bool) -> None:
    dictionary = dictionary_of(300, 4, real=real)
    generator = torch.Generator().manual_seed(3)
    voxels = torch.randn((150, 4), generator=generator, dtype=torch.complex64)
    result = match(voxels, dictionary, chunk=64)
    atoms = dictionary.coefficients.numpy().astype(complex)
    unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    length = np.linalg.norm(voxels.numpy().astype(complex), axis=1)
    correlation = np.abs(voxels.numpy() @ unit.conj().T) / length[:, None]
    # Compared by value: two atoms may be equal to float32 rounding.
    chosen = correlation[np.arange(150), (result.t1_ms - 100).long().numpy()]
    np.testing.assert_allclose(chosen, correlation.max(1), atol=1e-6)
    np.testing.assert_allclose(result.quality.numpy(), correlation.max(1), atol=1e-6)
    assert correlation.max(1).min() < 0.95
    # M0 is the least-squares factor of the atom.
    atom = atoms[(result.t1_ms - 100).long().numpy()]
    expected = (atom.conj() * voxels.numpy()).sum(1) / (np.abs(atom) ** 2).sum(1)
    np.testing.assert_allclose(result.m0.numpy(), expected, rtol=1e-4)


def test_real_coefficients_match_as_complex_ones_do() -> None:
    dictionary = dictionary_of(60, 4, real=True)
    voxels = torch.randn((37, 4), generator=torch.Generator().manual_seed(5))
    real, wide = match(voxels, dictionary, chunk=16), match(voxels.to(torch.complex64), dictionary)
    torch.testing.assert_close(real.t1_ms, wide.t1_ms, rtol=0, atol=0)
    torch.testing.assert_close(real.m0 + 0j, wide.m0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(real.quality, wide.quality, rtol=0, atol=1e-6)


@CASES
def test_a_voxel_without_signal_has_no_quality(real: bool) -> None:
    dictionary = dictionary_of(20, 3, real=real)
    voxels = torch.zeros((3, 3), dtype=torch.complex64)
    voxels[1] = dictionary.coefficients[7]
    result = match(voxels, dictionary)
    for values in (result.t1_ms, result.t2_ms, torch.view_as_real(result.m0), result.quality):
        assert bool(torch.isfinite(values).all())
    assert result.m0[[0, 2]].abs().tolist() == [0, 0]
    assert result.quality.tolist() == pytest.approx([0, 1, 0], abs=1e-6)


@pytest.mark.parametrize("shape", [(5, 3), (5, 5), (4,)], ids=["too few", "too many", "one voxel"])
def test_coefficients_of_another_basis_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="4 coefficients"):
        match(torch.ones(shape, dtype=torch.complex64), dictionary_of(10, 4, real=True))
