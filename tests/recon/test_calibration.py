"""Calibration: coefficients told apart within each interleaf, exactly where that is possible."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kspace.spirals import complex_normal, orthonormal_basis
from recon.spiral_slice import map_distance, measure
from whorl.kspace.accumulate import fold_gram
from whorl.kspace.coils import coil_maps
from whorl.recon.calibration import regress_interleaves

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


def test_coil_maps_of_a_sequential_order_are_those_of_the_object() -> None:
    measured = measure(order="sequential")
    # What smoothing and the edge of the object cost is common to all.
    ideal = coil_maps(measured.truth[:, None] * measured.csm)

    def distance(csm: Tensor) -> float:
        return map_distance(csm, ideal, measured.mask)

    calibrated = measured.slice_data().normal.csm
    of_x0 = measured.slice_data(calibrate=False).normal.csm
    # Measured: 4.2 % and 0.09 %.
    assert distance(of_x0) > 0.03
    assert distance(calibrated) < distance(of_x0) / 20
