"""The methods: what they give where their model holds, and what they say where it does not."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

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
from whorl.recon.corrected import Start, advance, corrected_start, imaginary_around
from whorl.recon.inr import InrFit
from whorl.recon.methods import as_measured_where_doubtful, inr, kspace_head, lowrank
from whorl.recon.slicedata import Estimate, SliceData


@pytest.fixture(scope="module")
def measured() -> Measured:
    return measure(order="sequential", noise=0.02)


@pytest.fixture(scope="module")
def data(measured: Measured) -> SliceData:
    return measured.slice_data()


@pytest.fixture(scope="module")
def estimate(data: SliceData) -> Estimate:
    return inr(data, fit={})


@pytest.fixture(scope="module")
def two_phases() -> Measured:
    """An object whose second image is strong and has a phase of its own."""
    return measure(order="sequential", phase=phase_factor() * torch.tensor([1, 3j, 1]).reshape(3, 1, 1))


def error_of(estimate: Estimate, measured: Measured) -> float:
    phase = 1 if estimate.phase is None else estimate.phase
    return measured.error(phase * estimate.coefficients, estimate.csm)


def test_low_rank_is_x0(data: SliceData) -> None:
    estimate = lowrank(data)
    assert torch.equal(estimate.coefficients, data.x0)
    assert torch.equal(estimate.csm, data.csm)
    assert estimate.phase is None
    assert estimate.remarks == ()


# --- The joint INR ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "least"),
    # Measured: 0.011 of 0.13 in x0, 0.013 of 0.41, 0.014 of 0.34.
    [("golden", 0.015), ("sequential", 0.018), ("mixed", 0.02)],
)
def test_the_object_comes_back_whatever_the_order(order: str, least: float) -> None:
    measured = measure(order=order, noise=0.02)
    data = measured.slice_data()
    told: list[tuple[str, int, int]] = []
    found = inr(data, fit={}, progress=lambda *count: told.append(count))
    assert error_of(found, measured) < least
    assert not found.coefficients.is_complex()
    assert found.coefficients.shape == measured.truth.shape
    assert float(found.coefficients[:, ~measured.mask].abs().max()) < 1e-5
    assert found.phase is not None
    torch.testing.assert_close(found.phase.abs(), torch.ones(SHAPE), rtol=0, atol=1e-6)
    assert found.remarks == ()
    # An uneven order needs more steps, and coil maps anew.
    steps = 4 if order == "golden" else 12
    assert told == [("correction", n, steps) for n in range(1, steps + 1)]
    assert torch.equal(found.csm, data.csm) == (order == "golden")


def test_maps_that_are_given_stay(measured: Measured) -> None:
    found = inr(measured.slice_data("true"), fit={})
    assert torch.equal(found.csm, measured.csm)
    assert error_of(found, measured) < 0.02


@pytest.mark.parametrize(
    "changed",
    [
        {"start": "adjoint"},
        {"correction_steps": 0},
        {"correction_steps": 3},
        {"guided": False},
        {"head": "image"},
        {"fit": {"iterations": 2}},
        {"fit": {"hidden": 4}},
    ],
    ids=str,
)
def test_every_parameter_is_used(data: SliceData, estimate: Estimate, changed: dict[str, Any]) -> None:
    few = {"fit": {"iterations": 2}} if changed == {"guided": False} else {"fit": {}}
    plain = estimate if few == {"fit": {}} else inr(data, **few)
    other = inr(data, **{**few, **changed})
    same = other.coefficients.dtype == plain.coefficients.dtype
    assert not (same and torch.equal(other.coefficients, plain.coefficients))


def test_the_same_data_give_the_same_images(data: SliceData, estimate: Estimate) -> None:
    again = inr(data, fit={})
    assert torch.equal(again.coefficients, estimate.coefficients)
    assert again.phase is not None
    assert estimate.phase is not None
    assert torch.equal(again.phase, estimate.phase)


def test_from_the_adjoint_nothing_is_corrected(data: SliceData, measured: Measured) -> None:
    told: list[tuple[str, int, int]] = []
    found = inr(data, start="adjoint", fit={"iterations": 1}, progress=lambda *count: told.append(count))
    assert told == [("iteration", 1, 1)]
    assert found.coefficients.is_complex()
    assert found.phase is None
    assert torch.equal(found.csm, data.csm)
    # It shows x0, side lobes and all.
    assert relative_error(found.coefficients, data.x0, data.mask) < 0.1
    assert error_of(found, measured) > 0.3


def test_the_fit_can_be_watched_again(data: SliceData) -> None:
    found = inr(data, head="image", fit={"iterations": 3})
    seen: list[tuple[int, InrFit]] = []
    assert found.refit is not None
    again = found.refit(lambda n, current: seen.append((n, current())))
    assert [n for n, _ in seen] == [1, 2, 3]
    assert torch.equal(again.coefficients, found.coefficients)
    assert again.losses == found.losses
    assert len(found.losses) == 4
    assert found.diagnostics == {"data_term": found.losses[-1]}


# --- Where its model does not hold ------------------------------------------------------------------------


def test_without_a_common_phase_the_coefficients_are_complex(two_phases: Measured) -> None:
    found = inr(two_phases.slice_data(), fit={})
    ((status, why),) = found.remarks
    assert status == "fallback"
    assert "no common phase (" in why
    assert why.endswith("complex coefficients")
    assert found.coefficients.is_complex()
    assert found.phase is None
    # Measured: 0.011.
    assert error_of(found, two_phases) < 0.02


def test_of_a_complex_basis_the_coefficients_are_complex(measured: Measured, data: SliceData) -> None:
    """Each coefficient in a phase of its own: the same data in another basis."""
    turn = torch.polar(torch.ones(3), torch.tensor([0.0, 1.0, 2.0]))
    gram = turn.conj()[:, None] * data.sampling.gram * turn
    turned = turn.conj().reshape(3, 1, 1)
    other = replace(
        data,
        coil_images=turned[:, None] * data.coil_images,
        calibrated=turned * data.calibrated,
        sampling=replace(data.sampling, gram=gram),
    )
    found = inr(other, fit={})
    ((status, why),) = found.remarks
    assert status == "fallback"
    assert "the basis is complex" in why
    assert found.coefficients.is_complex()
    back = replace(found, coefficients=turned.conj() * found.coefficients)
    # Measured: 0.022, where real coefficients have 0.013.
    assert error_of(back, measured) < 0.03


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_said_or_raised(data: SliceData, value: float) -> None:
    coil_images, calibrated = data.coil_images.clone(), data.calibrated.clone()
    calibrated[0, 20, 17] = value
    with pytest.raises(FloatingPointError, match="to start from are not finite"):
        inr(replace(data, calibrated=calibrated), fit={})
    coil_images[0, 0, 20, 17] = value
    with pytest.raises(FloatingPointError, match="to start from are not finite"):
        inr(replace(data, coil_images=coil_images), fit={})


@pytest.mark.parametrize("order", ["golden", "mixed"])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_smooth_phase_is_not_doubted(order: str, noise: float) -> None:
    smooth = measure(order=order, noise=noise)
    start = corrected_start(smooth.slice_data(), smooth.kernel(), steps=4)
    images, remarks = as_measured_where_doubtful(start.z, start)
    assert images is start.z
    assert remarks == ()


def test_where_the_phase_jumps_the_values_are_as_measured() -> None:
    cavity = torch.zeros(SHAPE, dtype=torch.bool)
    cavity[18:25, 12:19] = True
    turn = torch.polar(torch.ones(SHAPE), torch.where(cavity, math.pi / 3, 0.0))
    jumped = measure(order="mixed", phase=phase_factor() * turn)
    # The best real images for a phase that does not jump, with the coil maps as they are.
    z = real_coefficients()[0] * turn.real
    data = jumped.slice_data("true")
    start = advance(Start(data, jumped.kernel(), z, phase_factor(), torch.zeros_like(data.x0)), 0)
    around = imaginary_around(start)
    assert around.shape == SHAPE
    assert float(around.min()) >= 0
    assert float(around.max()) <= 1 + 1e-5
    assert float(around[20:23, 14:17].median()) > 0.1
    # Aliasing of what the cavity leaves is everywhere.
    assert float(around[2:10, 10:25].median()) < 0.02
    marker = torch.full_like(start.z, 7.0)  # not to be taken for anything else
    images, ((status, why),) = as_measured_where_doubtful(marker, start)
    taken = ~torch.isclose(images, start.phase * marker).all(0)
    assert status == "degraded"
    share = float(taken.sum() / jumped.mask.sum())
    assert f"the coefficients share no phase in {share:.1%} of the object" in why
    assert float(taken[cavity].float().mean()) > 0.5
    assert not bool(taken[~jumped.mask].any())
    assert share < 0.3
    assert torch.equal(images[:, taken], (start.phase * start.z + start.left)[:, taken])
    # Which is nearer to the truth than real values can be.
    inside = taken & cavity
    real = relative_error(start.phase * start.z, jumped.truth, inside)
    assert relative_error(images, jumped.truth, inside) < 0.6 * real


# --- The head in k-space ----------------------------------------------------------------------------------


def features_of(z: Tensor, mask: Tensor, n_others: int) -> Tensor:
    """`(F+1, H, W)`: mixtures of the images and of others, with a last one of ones, zero outside."""
    generator = torch.Generator().manual_seed(5)
    others = torch.randn((n_others, *z.shape[1:]), generator=generator)
    mixing = torch.randn((len(z) + n_others,) * 2, generator=generator)
    mixed = torch.einsum("fg,gyx->fyx", mixing, torch.cat([z, others]))
    return torch.cat([mixed, torch.ones((1, *z.shape[1:]))]) * mask


def nearest_in(features: Tensor, images: Tensor) -> Tensor:
    """Images in the span of the features that are nearest to others."""
    phi, wanted = (part.flatten(1).to(torch.complex128) for part in (features, images))
    found = (torch.linalg.lstsq(phi.T, wanted.T).solution.T @ phi).reshape(images.shape)
    return found.to(images.dtype) if images.is_complex() else found.real.to(images.dtype)


def misfit(images: Tensor, start: Start) -> float:
    """``½⟨x, Nx⟩ - Re⟨x, b⟩``: half the energy of the k-space residual, but for a constant."""
    seen = start.image(images) / 2 - start.data.x0 * start.data.mask
    product: Tensor = (start.phase * images).conj() * seen
    return float(product.real.sum(dtype=torch.float64))


@pytest.fixture(scope="module")
def known() -> Start:
    """Data without noise whose coil maps and phase are known."""
    clean = measure(order="sequential")
    z, _ = real_coefficients()
    data = clean.slice_data("true")
    return Start(data, clean.kernel(), 0 * z, phase_factor(), torch.zeros_like(data.x0))


def without_phase(start: Start) -> Start:
    return replace(start, z=torch.zeros_like(start.data.x0), phase=torch.ones_like(start.phase))


def test_the_kspace_head_finds_the_truth_in_its_features(known: Start) -> None:
    z, mask = real_coefficients()
    features = features_of(z, mask, 5)
    rough = z * torch.tensor([0.8, 1.3, 0.0]).reshape(3, 1, 1)
    found = kspace_head(features, rough, known, steps=40)
    assert found.shape == z.shape
    assert found.dtype == z.dtype
    assert float(found[:, ~mask].abs().max()) == 0
    # Nine features: a hundredfold fewer unknowns than pixels. What NUFFTs miss is left.
    assert relative_error(found, z, mask) < 1e-3


def test_a_complex_kspace_head_finds_the_truth_as_well(known: Start) -> None:
    z, mask = real_coefficients()
    truth = known.phase * z
    features = features_of(torch.cat([truth.real, truth.imag]), mask, 3)
    found = kspace_head(features, 0.7 * truth, without_phase(known), steps=60)
    assert found.is_complex()
    assert relative_error(found, truth, mask) < 2e-3


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_the_kspace_head_never_fits_the_data_worse(known: Start, kind: str) -> None:
    z, mask = real_coefficients()
    features = features_of(z[:2], mask, 12)  # the third image is not among them
    noisy = z + 0.1 * torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    start = known if kind == "real" else without_phase(known)
    rough = nearest_in(features, noisy if kind == "real" else known.phase * noisy)
    heads = [kspace_head(features, rough, start, steps=n) for n in (0, 1, 2, 3, 5, 8)]
    # It begins with the images that it was given, as far as the features hold them.
    torch.testing.assert_close(heads[0], rough, rtol=0, atol=1e-4)
    misfits = [misfit(head, start) for head in heads]
    slack = 1e-5 * abs(misfits[0])  # rounding
    assert all(later <= earlier + slack for earlier, later in pairwise(misfits))
    assert misfits[-1] < misfits[0]
    # Conjugate gradients end where nothing in the span of the features is better.
    best = kspace_head(features, rough, start, steps=60)
    assert misfit(best, start) <= misfits[-1] + slack
    for n in range(3):
        other = best + 0.02 * nearest_in(features, torch.roll(z, n, 1).to(best.dtype))
        assert misfit(other, start) > misfit(best, start)


def test_features_that_depend_on_each_other_do_no_harm(known: Start) -> None:
    z, mask = real_coefficients()
    features = features_of(z, mask, 2)
    twice = torch.cat([features[:-1], 3 * features[:1], 0 * features[:1], features[-1:]])
    rough = 0.9 * z
    one, two = (kspace_head(phi, rough, known, steps=20) for phi in (features, twice))
    # The same span: the ridge of the orthonormalisation is 1e-10, features are float32.
    torch.testing.assert_close(two, one, rtol=0, atol=1e-3)
