"""Corrected start: a known object comes back, real and with its phase."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kspace.spirals import rotated_spiral
from whorl.kspace.accumulate import fold_gram
from whorl.kspace.density import density_compensation
from whorl.kspace.nufft import make_nufft
from whorl.recon.corrected import conjugate_gradients, corrected_start, imaginary_share, joint_phase
from whorl.recon.normal import NormalOperator

SHAPE = (30, 25)
ENERGIES = torch.tensor([1.0, 0.3, 0.05])


def ramps() -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, SHAPE[0])[:, None], torch.linspace(-1, 1, SHAPE[1])[None, :]


def phase_factor() -> Tensor:
    """As steep as some turns across 256 pixels, and across π/2, where half the angle of the square jumps."""
    y, x = ramps()
    return torch.polar(torch.ones(SHAPE), 0.25 * x - 0.15 * y**2 + 1.6)


def real_coefficients() -> tuple[Tensor, Tensor]:
    """Three images, the weaker ones of both signs, and the mask."""
    y, x = ramps()
    mask = (y / 0.8) ** 2 + (x / 0.75) ** 2 < 1
    edge = torch.sigmoid(12 * (1 - (y / 0.8) ** 2 - (x / 0.75) ** 2))
    z = torch.stack(
        [1 + 0.3 * y * x, torch.where(x + 0 * y > 0.1, 0.5, -0.4), 0.2 * torch.sin(4 * y) + 0 * x]
    )
    return z * edge * mask, mask


@pytest.mark.parametrize("n", [3, 8])
def test_conjugate_gradients_solve_a_system_in_as_many_steps_as_unknowns(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    root = torch.randn((n, n), generator=generator, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(n, dtype=torch.float64)
    right = torch.randn(n, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(matrix, right)
    start = torch.ones(n, dtype=torch.float64)
    for begin in (None, start):
        # float64 and a condition of at most some hundred.
        result = conjugate_gradients(lambda v: matrix @ v, right, begin, n + 1)
        torch.testing.assert_close(result, exact, rtol=0, atol=1e-9)
    assert torch.equal(start, torch.ones(n, dtype=torch.float64))  # not changed in place
    # The first step is the steepest descent.
    first = conjugate_gradients(lambda v: matrix @ v, right, None, 1)
    torch.testing.assert_close(first, right * (right @ right) / (right @ matrix @ right))
    assert torch.equal(conjugate_gradients(lambda v: matrix @ v, right, exact, 0), exact)


def test_conjugate_gradients_stop_where_nothing_is_left() -> None:
    zero = torch.zeros((2, 3))
    assert torch.equal(conjugate_gradients(lambda v: 2 * v, zero, None, 5), zero)
    one = conjugate_gradients(lambda v: 2 * v, torch.ones((2, 3)), None, 9)
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


def test_corrected_start_takes_the_side_lobes_out() -> None:
    z, mask = real_coefficients()
    phase = phase_factor()
    T, I, S = 240, 16, 120  # noqa: E741 - the field's letter
    trajectory = rotated_spiral(I, S, 1.2)
    # Sequential arms and a basis that varies slowly: the uneven order that this step is for.
    t = torch.arange(T)
    basis = torch.linalg.qr(torch.stack([torch.cos(math.pi * j * t / T) + 0.2 for j in range(3)], 1)).Q
    y, x = ramps()
    csm = torch.stack([torch.exp(0.5 * y + 0.4j * x), torch.exp(-0.5 * y - 0.6j * y + 0 * x)])
    csm = csm / csm.norm(dim=0)
    gram = torch.zeros((I, 3, 3), dtype=torch.complex64)
    fold_gram(gram, t, t * I // T, basis)  # each arm in one block of the train
    nufft = make_nufft(trajectory.reshape(-1, 2), SHAPE)
    normal = NormalOperator(gram, density_compensation(trajectory, SHAPE), csm, nufft)
    images = normal(phase * z)  # exactly what noise-free data would give

    def error(candidate: Tensor) -> float:
        return float((candidate - phase * z)[:, mask].norm() / z[:, mask].norm())

    found, found_phase = corrected_start(images, mask, normal, ENERGIES, steps=10)
    assert found.shape == z.shape
    assert not found.is_complex()
    before, after = error(images), error(found_phase * found)
    shorter = corrected_start(images, mask, normal, ENERGIES, steps=0)
    assert before > 0.8
    # Measured: 5.7 times; what is left is the phase at the edge. Were it known, all would come back.
    assert after < before / 4
    assert error(shorter[1] * shorter[0]) > 1.3 * after  # the number of steps is used
    known = conjugate_gradients(
        lambda v: (phase.conj() * mask * normal(mask * phase * v)).real,
        (phase.conj() * mask * images).real,
        None,
        20,
    )
    assert error(phase * known) < before / 40
    assert float(found[:, ~mask].abs().max()) == 0
    # The phase is that of the object where there is signal, sign included; near the edge the smoothing
    # sees one side only, and takes over the slope of the phase (0.18 rad per pixel) from there.
    strong = (y / 0.5) ** 2 + (x / 0.45) ** 2 < 1
    assert float((found_phase * phase.conj()).angle().abs()[strong].max()) < 0.3
    assert float((found[0] * z[0])[strong].min()) > 0


def test_the_refined_phase_does_not_follow_the_sign_of_strong_later_images() -> None:
    # Fully sampled: the adjoint images are the truth. The second is stronger than the first, and negative.
    z = torch.stack([torch.ones(SHAPE), torch.full(SHAPE, -2.0), torch.full(SHAPE, 0.5)])
    phase, everywhere = phase_factor(), torch.ones(SHAPE, dtype=torch.bool)
    found, found_phase = corrected_start(phase * z, everywhere, lambda x: x, ENERGIES, steps=2)
    # The phase bends by some hundredths of a radian within the 3 pixels of the smoothing.
    assert float((found_phase * phase.conj() - 1).abs().max()) < 0.1
    assert float((found - z).abs().max()) < 0.05
