"""Corrected start: a known object comes back, real, with its phase and its coil maps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from recon.spiral_slice import (
    ENERGIES,
    SHAPE,
    Measured,
    map_distance,
    measure,
    phase_factor,
    ramps,
    real_coefficients,
    relative_error,
)
from whorl.kspace.coils import coil_maps
from whorl.recon.corrected import (
    Start,
    advance,
    begin,
    conjugate_gradients,
    corrected_start,
    imaginary_share,
    joint_phase,
    refine,
)
from whorl.recon.slicedata import SliceData


@pytest.mark.parametrize("n", [3, 8])
def test_conjugate_gradients_solve_a_system_in_as_many_steps_as_unknowns(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    root = torch.randn((n, n), generator=generator, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(n, dtype=torch.float64)
    right = torch.randn(n, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(matrix, right)
    start = torch.ones(n, dtype=torch.float64)
    for first in (None, start):
        # float64 and a condition of at most some hundred.
        result, left = conjugate_gradients(lambda v: matrix @ v, right, first, n + 1)
        assert float(left) < 1e-16
        torch.testing.assert_close(result, exact, rtol=0, atol=1e-9)
    assert torch.equal(start, torch.ones(n, dtype=torch.float64))  # not changed in place
    # The first step is the steepest descent.
    first, left = conjugate_gradients(lambda v: matrix @ v, right, None, 1)
    residual = right - matrix @ first
    torch.testing.assert_close(left, (residual @ residual) / (right @ right))
    torch.testing.assert_close(first, right * (right @ right) / (right @ matrix @ right))
    assert torch.equal(conjugate_gradients(lambda v: matrix @ v, right, exact, 0)[0], exact)


def test_conjugate_gradients_stop_where_nothing_is_left() -> None:
    zero = torch.zeros((2, 3))
    assert torch.equal(conjugate_gradients(lambda v: 2 * v, zero, None, 5)[0], zero)
    one, _ = conjugate_gradients(lambda v: 2 * v, torch.ones((2, 3)), None, 9)
    torch.testing.assert_close(one, torch.full((2, 3), 0.5))


def test_joint_phase_follows_the_object_whatever_the_signs() -> None:
    z, mask = real_coefficients()
    phase = phase_factor()
    found = joint_phase(z * phase, ENERGIES)
    torch.testing.assert_close(found.abs(), torch.ones(SHAPE), rtol=0, atol=1e-6)
    inner = mask & ((z[0].abs() > 0.7) & (ramps()[0].abs() < 0.6))
    # At the edge the smoothing sees one side only: 3 pixels of 0.02 rad.
    assert float((found * phase.conj()).angle().abs()[inner].max()) < 0.08


def test_joint_phase_ignores_the_sign_of_the_weak_images() -> None:
    z, _ = real_coefficients()
    phase = phase_factor()
    flipped = z * torch.tensor([1.0, -1.0, -1.0]).reshape(3, 1, 1)
    torch.testing.assert_close(joint_phase(flipped * phase, ENERGIES), joint_phase(z * phase, ENERGIES))


def test_imaginary_share() -> None:
    z, mask = real_coefficients()
    phase = phase_factor()
    assert imaginary_share(z * phase, phase, mask) == pytest.approx(0, abs=1e-12)
    assert imaginary_share(z * phase, 1j * phase, mask) == pytest.approx(1, abs=1e-6)
    turned = torch.polar(torch.ones(()), torch.tensor(0.3))
    assert imaginary_share(z * phase * turned, phase, mask) == pytest.approx(math.sin(0.3) ** 2, abs=1e-6)
    # Without a common phase both parts are alike: 3 · 290 samples estimate a half to 2 %.
    noise = torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(1), dtype=torch.complex64)
    assert imaginary_share(noise, phase, mask) == pytest.approx(0.5, abs=0.05)
    outside = torch.where(mask, z * phase, 99j)
    assert imaginary_share(outside, phase, mask) == pytest.approx(0, abs=1e-12)
    assert imaginary_share(torch.zeros((3, *SHAPE), dtype=torch.complex64), phase, mask) == 0


@pytest.fixture(scope="module")
def sequential() -> Measured:
    return measure(order="sequential")


@pytest.fixture(scope="module")
def ideal(sequential: Measured) -> Tensor:
    """Coil maps of the true images: what smoothing and the object's edge cost is common to all."""
    return coil_maps(sequential.truth[:, None] * sequential.csm)


def test_a_sequential_order_leaves_no_trace(sequential: Measured) -> None:
    data = sequential.slice_data()

    def error(start: Start) -> float:
        return sequential.error(start.images, start.data.normal.csm)

    before = sequential.error(data.x0, data.normal.csm)
    starts = {steps: corrected_start(data, steps=steps) for steps in (0, 2, 8)}
    assert before > 0.3
    # Measured: 0.41 of x0, 0.028, 0.015 and 0.0067.
    assert error(starts[0]) < before / 8
    assert error(starts[2]) < before / 16
    assert error(starts[8]) < before / 30
    assert error(starts[8]) < error(starts[2]) / 1.5
    for start in starts.values():
        assert start.z.shape == sequential.truth.shape
        assert not start.z.is_complex()
        assert float(start.z[:, ~sequential.mask].abs().max()) == 0
        torch.testing.assert_close(start.phase.abs(), torch.ones(SHAPE), rtol=0, atol=1e-6)
        torch.testing.assert_close(start.images, start.z * start.phase, rtol=0, atol=0)
    # The free phase of the coil maps is set so that the images of the first coefficient are positive.
    z = real_coefficients()[0]
    found = starts[8].z * z
    strong = z.abs() > 0.1
    assert float(found[strong].min()) > 0


def test_with_what_is_true_known_only_steps_are_missing(sequential: Measured) -> None:
    data = sequential.slice_data().with_maps(sequential.csm)
    z, mask = real_coefficients()
    truth = Start(data, z, phase_factor())
    # Nothing is left to do, nothing is done. Two NUFFTs miss some 1e-4.
    assert relative_error(advance(truth, 4).z, z, mask) < 2e-3
    from_nothing = advance(replace(truth, z=torch.zeros_like(z)), 30)
    assert relative_error(from_nothing.z, z, mask) < 0.02


def test_the_operator_of_a_start_is_self_adjoint_and_real(sequential: Measured) -> None:
    start = begin(sequential.slice_data())
    a, b = (torch.randn(start.z.shape, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    na, nb = start.operator(a), start.operator(b)
    assert not na.is_complex()
    assert abs(float((na * b).sum() - (a * nb).sum())) < 1e-3 * float(na.norm() * b.norm())
    assert float((a * na).sum()) > 0
    assert float(na[:, ~sequential.mask].abs().max()) == 0
    # What lies outside the object is not seen.
    outside = a + 3 * ~sequential.mask
    torch.testing.assert_close(start.operator(outside), na, rtol=0, atol=1e-3 * float(na.abs().max()))


def test_the_refinement_mends_the_coil_maps(sequential: Measured, ideal: Tensor) -> None:
    rough = sequential.slice_data(calibrate=False)
    start = advance(begin(rough), 4)
    refined = refine(start)
    mask = sequential.mask
    before = map_distance(start.data.normal.csm, ideal, mask)
    # Measured: from 4.2 to 0.8 %.
    assert before > 0.03
    assert map_distance(refined.data.normal.csm, ideal, mask) < before / 3
    assert torch.equal(refined.z, start.z)
    assert torch.equal(start.data.normal.csm, rough.normal.csm)  # the old start keeps its own
    # And with them the images: from 2.6 to 0.7 %.
    as_they_were, mended = advance(start, 4), advance(refined, 4)
    error = sequential.error(mended.images, mended.data.normal.csm)
    assert error < sequential.error(as_they_were.images, as_they_were.data.normal.csm) / 2


def test_the_refinement_helps_where_noise_spoilt_the_calibration(ideal: Tensor) -> None:
    noisy = measure(order="mixed", noise=0.1)
    start = advance(begin(noisy.slice_data()), 4)
    before = map_distance(start.data.normal.csm, ideal, noisy.mask)
    # Measured: 1.3 and 0.4 %.
    assert map_distance(refine(start).data.normal.csm, ideal, noisy.mask) < before / 2


def test_few_steps_refine_nothing(sequential: Measured) -> None:
    data = sequential.slice_data()
    start = begin(data)
    torch.testing.assert_close(start.images.abs(), start.z.abs())
    for steps in (0, 1):
        short = corrected_start(data, steps=steps)
        assert short.data is data
        assert torch.equal(short.phase, start.phase)
        assert torch.equal(short.z, advance(start, steps).z) or steps
    assert torch.equal(advance(start, 0).z, start.z)
    assert corrected_start(data, steps=2).data is not data


class FullSampling:
    """The normal operator of one coil where nothing is missing: the identity."""

    def __init__(self, csm: Tensor) -> None:
        self.csm = csm

    def __call__(self, images: Tensor) -> Tensor:
        return images

    def coil_images(self, images: Tensor) -> Tensor:
        return images[:, None] * self.csm

    def with_maps(self, csm: Tensor) -> FullSampling:
        return FullSampling(csm)


def fully_sampled(images: Tensor) -> SliceData:
    csm = torch.ones((1, *SHAPE), dtype=torch.complex64)
    return SliceData(
        images[:, None], FullSampling(csm), images, torch.ones(SHAPE, dtype=torch.bool), ENERGIES
    )


def test_the_refined_phase_does_not_follow_the_sign_of_strong_later_images() -> None:
    # The second is stronger than the first, and negative.
    z = torch.stack([torch.ones(SHAPE), torch.full(SHAPE, -2.0), torch.full(SHAPE, 0.5)])
    found = refine(begin(fully_sampled(phase_factor() * z)))
    together = found.phase * found.data.normal.csm[0]  # of the free phase of the maps nothing is left
    # The phase bends by some hundredths of a radian within the pixels of the smoothing.
    assert float((together * phase_factor().conj() - 1).abs().max()) < 0.1
    assert float((found.z - z).abs().max()) < 0.05


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_of_nothing_comes_nothing(steps: int) -> None:
    found = corrected_start(fully_sampled(torch.zeros((3, *SHAPE), dtype=torch.complex64)), steps=steps)
    assert float(found.z.abs().max()) == 0
    torch.testing.assert_close(found.phase.abs(), torch.ones(SHAPE), rtol=0, atol=1e-6)
    assert bool(torch.isfinite(torch.view_as_real(found.data.normal.csm)).all())
