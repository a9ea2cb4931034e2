"""The methods: what they give where their model holds, and what they say where it does not."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from recon.spiral_slice import (
    SHAPE,
    Measured,
    measure,
    phase_factor,
    real_coefficients,
    relative_error,
)
from whorl.recon.corrected import Start, begin, corrected_start, imaginary_around
from whorl.recon.methods import image_head, kspace_head, llr, lowrank, plain_where_doubtful, trusted
from whorl.recon.slicedata import SliceData

LLR = {"lam": 0.2, "block": 6, "iterations": 6, "seed": 0, "deadline": None}


@pytest.fixture(scope="module")
def measured() -> Measured:
    return measure(order="sequential", noise=0.02)


@pytest.fixture(scope="module")
def data(measured: Measured) -> SliceData:
    return measured.slice_data()


@pytest.fixture(scope="module")
def scattered() -> Measured:
    """The same object with a phase that no neighbours share."""
    angle = 2 * math.pi * torch.rand(SHAPE, generator=torch.Generator().manual_seed(2))
    return measure(order="sequential", phase=torch.polar(torch.ones(SHAPE), angle))


def without_phase(data: SliceData) -> SliceData:
    """The first coefficient has no phase that its neighbours share; the operator is as it was."""
    angle = 2 * math.pi * torch.rand(SHAPE, generator=torch.Generator().manual_seed(2))
    turn = torch.polar(torch.ones(SHAPE), angle)
    return replace(data, calibrated=data.calibrated * turn, coil_images=data.coil_images * turn)


def test_low_rank_is_x0(data: SliceData) -> None:
    estimate = lowrank(data)
    assert torch.equal(estimate.coefficients, data.x0)
    assert estimate.remarks == ()


# --- LLR -------------------------------------------------------------------------------------------------


def test_llr_is_real_where_there_is_a_common_phase(data: SliceData, measured: Measured) -> None:
    estimate = llr(data, **LLR)  # type: ignore[arg-type]
    assert not estimate.coefficients.is_complex()
    assert estimate.remarks == ()
    assert float(estimate.diagnostics["imaginary_share"]) < 0.01
    assert float(estimate.coefficients[:, ~measured.mask].abs().max()) == 0
    # Better than what it starts from.
    phase = begin(data).phase
    error = measured.error(phase * estimate.coefficients, data.normal.csm)
    assert error < measured.error(data.x0, data.normal.csm) / 3


def test_llr_stays_complex_where_there_is_none_and_says_so(scattered: Measured) -> None:
    # Maps as they are: such a phase leaves none to be found.
    data = without_phase(scattered.slice_data().with_maps(scattered.csm))
    estimate = llr(data, **LLR)  # type: ignore[arg-type]
    assert estimate.coefficients.is_complex()
    ((status, why),) = estimate.remarks
    assert status == "fallback"
    assert "no common phase" in why
    assert "complex coefficients" in why
    assert bool(torch.isfinite(torch.view_as_real(estimate.coefficients)).all())
    assert float(estimate.diagnostics["imaginary_share"]) > 0.15
    assert float(estimate.coefficients.imag.norm()) > 0.1 * float(estimate.coefficients.norm())


# --- Whether a corrected start is trusted ------------------------------------------------------------


def test_a_start_with_a_common_phase_is_trusted(data: SliceData) -> None:
    start = begin(data)
    assert trusted(start) == (start, ())


def test_without_a_common_phase_it_is_not(data: SliceData) -> None:
    start, remarks = trusted(begin(without_phase(data)))
    assert start is None
    ((status, why),) = remarks
    assert status == "fallback"
    assert "no common phase" in why
    assert "fitted to x0" in why


@pytest.mark.parametrize("place", ["z", "calibrated"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_trusted(data: SliceData, place: str, value: float) -> None:
    start = begin(data)
    z, calibrated = start.z.clone(), data.calibrated.clone()
    (z if place == "z" else calibrated)[0, SHAPE[0] // 2, SHAPE[1] // 2] = value
    found, remarks = trusted(replace(start, z=z, data=replace(data, calibrated=calibrated)))
    assert found is None
    ((status, why),) = remarks
    assert status == "fallback"
    assert why == "the corrected start is not finite: the INR was fitted to x0"


# --- Where a phase jumps ----------------------------------------------------------------------


def test_a_smooth_phase_is_not_doubted() -> None:
    for noise in (0.0, 0.1):
        smooth = measure(order="mixed", noise=noise).slice_data()
        start = corrected_start(smooth, steps=4)
        images, remarks = plain_where_doubtful(start.z, start, start.data.x0)
        assert images is start.z
        assert remarks == ()


def test_where_the_phase_jumps_the_values_are_those_of_x0() -> None:
    cavity = torch.zeros(SHAPE, dtype=torch.bool)
    cavity[26:33, 20:27] = True
    turn = torch.polar(torch.ones(SHAPE), torch.where(cavity, math.pi / 3, 0.0))
    jumped = measure(order="mixed", phase=phase_factor() * turn)
    # The best real images for a phase that does not jump, with the coil maps as they are.
    z = real_coefficients()[0] * turn.real
    start = Start(jumped.slice_data().with_maps(jumped.csm), z, phase_factor())
    around = imaginary_around(start)
    assert around.shape == SHAPE
    assert float(around.min()) >= 0
    assert float(around.max()) <= 1 + 1e-5
    assert float(around[28:31, 22:25].median()) > 0.1
    assert float(around[10:18, 15:35].median()) < 0.01
    marker = torch.full_like(start.data.x0, 7.0)  # not to be taken for anything else
    images, ((status, why),) = plain_where_doubtful(start.z, start, marker)
    taken = (images == marker).all(0)
    assert status == "degraded"
    assert (
        f"the coefficients share no phase in {float(taken.sum() / jumped.mask.sum()):.1%} of the object"
        in why
    )
    assert float(taken[cavity].float().mean()) > 0.5
    assert not bool(taken[~jumped.mask].any())
    assert float(taken.sum()) < 0.3 * float(jumped.mask.sum())
    assert torch.equal(images[:, ~taken], (start.phase * start.z)[:, ~taken])


# --- Heads --------------------------------------------------------------------------------


def features_of(z: Tensor, mask: Tensor, n_others: int) -> Tensor:
    """`(F+1, Y, X)`: mixtures of the images and of others, with a last one of ones, zero outside."""
    generator = torch.Generator().manual_seed(5)
    others = torch.randn((n_others, *z.shape[1:]), generator=generator)
    mixing = torch.randn((len(z) + n_others,) * 2, generator=generator)
    mixed = torch.einsum("fg,gyx->fyx", mixing, torch.cat([z, others]))
    return torch.cat([mixed, torch.ones((1, *z.shape[1:]))]) * mask


def residual(images: Tensor, start: Start) -> float:
    """``½⟨x, Nx⟩ - Re⟨x, b⟩``: half the energy of the k-space residual, but for a constant."""
    return float((images * (start.operator(images) / 2 - start.right)).sum(dtype=torch.float64))


@pytest.fixture(scope="module")
def known() -> Start:
    """Data without noise whose coil maps and phase are known, and images from which the head begins."""
    clean = measure(order="sequential")
    z, mask = real_coefficients()
    data = replace(clean.slice_data().with_maps(clean.csm), mask=mask)
    return Start(data, 0.5 * z, phase_factor())


def test_the_kspace_head_finds_the_truth_in_its_features(known: Start) -> None:
    z, mask = real_coefficients()
    features = features_of(z, mask, 5)
    rough = z * torch.tensor([0.8, 1.3, 0.0]).reshape(3, 1, 1)
    found = kspace_head(features, rough, known.data, known, steps=40)
    assert found.shape == z.shape
    assert not found.is_complex()
    assert float(found[:, ~mask].abs().max()) < 1e-3  # rounding of the QR decomposition
    # Nine features: a hundredfold fewer unknowns than pixels. What NUFFTs miss is left.
    assert relative_error(found, z, mask) < 0.01


def test_a_complex_kspace_head_finds_the_truth_as_well(known: Start) -> None:
    z, mask = real_coefficients()
    truth = known.phase * z
    data = known.data
    features = features_of(torch.cat([truth.real, truth.imag]), mask, 3)
    found = kspace_head(features, 0.7 * truth, data, None, steps=60)
    assert found.is_complex()
    assert relative_error(found, truth, mask) < 0.02


def test_the_kspace_head_never_fits_the_data_worse(known: Start) -> None:
    z, mask = real_coefficients()
    features = features_of(z[:2], mask, 12)  # the third image is not among them
    rough = image_head(
        features, z + 0.1 * torch.randn(z.shape, generator=torch.Generator().manual_seed(3)), 1e-4
    )
    residuals = [
        residual(kspace_head(features, rough, known.data, known, steps=n), known) for n in (0, 1, 2, 3, 5, 8)
    ]
    assert residuals[0] == pytest.approx(residual(rough, known), rel=1e-4)
    slack = 1e-5 * abs(residuals[0])  # rounding
    assert all(later <= earlier + slack for earlier, later in pairwise(residuals))
    assert residuals[-1] < residuals[0]
    # Conjugate gradients end where nothing in the span of the features is better.
    best = kspace_head(features, rough, known.data, known, steps=60)
    assert residual(best, known) <= residuals[-1] + slack
    for n in range(3):
        other = best + 0.02 * image_head(features, torch.roll(z, n, 1), 1e-4)
        assert residual(other, known) > residual(best, known)


def test_the_image_head_is_the_nearest_in_the_span(known: Start) -> None:
    z, mask = real_coefficients()
    features = features_of(z, mask, 5)
    # Ridge and float32.
    assert relative_error(image_head(features, z, 1e-8), z, mask) < 1e-3
    noisy = (z + 0.3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(4))) * mask
    found = image_head(features, noisy, 1e-8)
    # What is left is orthogonal to each feature.
    left = torch.einsum("kyx,fyx->kf", noisy - found, features)
    size = features.flatten(1).norm(dim=1) * noisy.flatten(1).norm(dim=1)[:, None]
    assert float((left.abs() / size).max()) < 1e-3
    assert float(found[:, ~mask].abs().max()) == 0
    # A ridge shrinks.
    assert float(image_head(features, noisy, 10.0).norm()) < 0.8 * float(found.norm())


# --- A basis that is not real ----------------------------------------------------------------------------


def test_a_complex_basis_has_no_real_coefficients(data: SliceData) -> None:
    complex_basis = replace(data, real_basis=False)
    start, remarks = trusted(corrected_start(complex_basis, steps=2))
    assert start is None
    assert "the basis is complex" in remarks[0][1]
    estimate = llr(complex_basis, **LLR)
    assert estimate.coefficients.is_complex()
    assert "the basis is complex" in estimate.remarks[0][1]


def test_steps_that_leave_too_much_are_not_trusted(data: SliceData) -> None:
    start = corrected_start(data, steps=4)
    assert trusted(start)[0] is start
    start, remarks = trusted(replace(start, residual=torch.tensor(0.3)))
    assert start is None
    assert remarks == (
        (
            "fallback",
            "the corrected start did not converge (30% of the energy is left): the INR was fitted to x0",
        ),
    )
