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
from whorl.kspace.nufft import make_nufft
from whorl.recon.corrected import (
    Start,
    advance,
    begin,
    conjugate_gradients,
    corrected_start,
    imaginary_around,
    imaginary_share,
    joint_phase,
    phase_sigma,
    refine,
)
from whorl.recon.mask import widen
from whorl.recon.normal import Kernel, Normal, Sampling, make_kernel
from whorl.recon.slicedata import SliceData


def itself(v: Tensor) -> Tensor:
    return v


def hermitian(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Positive definite, with a condition of ten at most."""
    root = torch.randn((n, n), generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return root @ root.mH / n + torch.eye(n, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("n", [1, 3, 8])
def test_conjugate_gradients_solve_a_system_in_as_many_steps_as_unknowns(
    n: int, preconditioned: bool, dtype: torch.dtype
) -> None:
    matrix, inverse = hermitian(n, dtype, n), hermitian(n, dtype, 50 + n)
    generator = torch.Generator().manual_seed(n)
    right, begun = (torch.randn(n, generator=generator, dtype=dtype) for _ in range(2))
    start, told = begun.clone(), []
    found, left = conjugate_gradients(
        lambda v: matrix @ v,
        right,
        start,
        n,
        project=itself,
        precondition=(lambda v: inverse @ v) if preconditioned else None,
        step_done=told.append,
    )
    # float64 and a condition of at most a hundred, that of the product.
    torch.testing.assert_close(found, torch.linalg.solve(matrix, right), rtol=0, atol=1e-9)
    torch.testing.assert_close(left, right - matrix @ found, rtol=0, atol=1e-9)
    assert torch.equal(start, begun)  # not changed in place
    assert told == list(range(1, n + 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_the_first_step_is_the_steepest_descent(dtype: torch.dtype) -> None:
    matrix, inverse = hermitian(6, dtype), hermitian(6, dtype, 1)
    right = torch.randn(6, generator=torch.Generator().manual_seed(2), dtype=dtype)
    found, left = conjugate_gradients(
        lambda v: matrix @ v, right, torch.zeros_like(right), 1, project=itself,
        precondition=lambda v: inverse @ v,
    )  # fmt: skip
    way = inverse @ right
    torch.testing.assert_close(found, way * torch.vdot(way, right) / torch.vdot(way, matrix @ way))
    torch.testing.assert_close(left, right - matrix @ found)
    none, left = conjugate_gradients(lambda v: matrix @ v, right, found, 0, project=itself)
    assert torch.equal(none, found)
    torch.testing.assert_close(left, right - matrix @ found)


def test_a_better_preconditioner_needs_fewer_steps() -> None:
    matrix = hermitian(40, torch.float64) * torch.logspace(0, 2, 40, dtype=torch.float64).sqrt()
    matrix = matrix.T * torch.logspace(0, 2, 40, dtype=torch.float64).sqrt()
    right = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def left_after(steps: int, inverse: Tensor) -> float:
        return float(
            conjugate_gradients(
                lambda v: matrix @ v, right, torch.zeros_like(right), steps, project=itself,
                precondition=lambda v: inverse @ v,
            )[1].norm()
        )  # fmt: skip

    exact, near = torch.linalg.inv(matrix), torch.diag(1 / matrix.diagonal())
    assert left_after(1, exact) < 1e-9 * float(right.norm())
    assert left_after(12, near) < 0.1 * left_after(12, torch.eye(40, dtype=torch.float64))


def test_real_unknowns_of_complex_data_are_the_best_ones() -> None:
    """``Re(p* N p) z = Re(p* b)``: what real unknowns leave of the data is complex, and is told."""
    matrix = hermitian(12, torch.complex128)
    generator = torch.Generator().manual_seed(3)
    p = torch.polar(torch.ones(12, dtype=torch.float64), 6 * torch.rand(12, generator=generator).double())
    right = torch.randn(12, generator=generator, dtype=torch.complex128)
    z, left = conjugate_gradients(
        lambda v: matrix @ (p * v),
        right,
        torch.zeros(12, dtype=torch.float64),
        12,
        project=lambda x: (p.conj() * x).real,
    )
    assert not z.is_complex()
    expected = torch.linalg.solve((p.conj()[:, None] * matrix * p).real, (p.conj() * right).real)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(left, right - matrix @ (p * z), rtol=0, atol=1e-9)
    assert float((p.conj() * left).real.norm()) < 1e-9 < 0.1 < float(left.norm())


@pytest.mark.parametrize("preconditioned", [False, True])
def test_steps_beyond_the_solution_do_no_harm(preconditioned: bool) -> None:
    """Few unknowns in float32, much of the data that they cannot explain, many more steps than unknowns."""
    rows = torch.randn((400, 6), generator=torch.Generator().manual_seed(4))
    right = 1e3 * torch.randn(400, generator=torch.Generator().manual_seed(5))
    found, left = conjugate_gradients(
        lambda v: rows @ v,
        right,
        torch.zeros(6),
        200,
        project=lambda x: rows.T @ x,
        precondition=(lambda v: v / rows.square().sum(0)) if preconditioned else None,
    )
    exact = torch.linalg.lstsq(rows.double(), right.double()[:, None]).solution[:, 0]
    # Float32 with a condition below two; rounding of 200 sums.
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-3)
    torch.testing.assert_close(left, right - rows @ found, rtol=0, atol=1e-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["real", "complex"])
def test_conjugate_gradients_stop_where_nothing_is_left(dtype: torch.dtype) -> None:
    zero = torch.zeros((2, 3), dtype=dtype)
    found, left = conjugate_gradients(lambda v: 2 * v, zero, zero, 5, project=itself)
    assert torch.equal(found, zero)
    assert torch.equal(left, zero)
    # The first step ends it, the others divide nothing by nothing.
    one, left = conjugate_gradients(lambda v: 2 * v, zero + 1, zero, 9, project=itself)
    torch.testing.assert_close(one, zero + 0.5)
    assert torch.equal(left, zero)
    unseen, left = conjugate_gradients(torch.zeros_like, zero + 1, zero, 3, project=torch.zeros_like)
    assert torch.equal(unseen, zero)
    assert torch.equal(left, zero + 1)


def test_joint_phase_follows_the_object_whatever_the_signs() -> None:
    z, mask = real_coefficients()
    phase = phase_factor()
    found = joint_phase(z * phase, ENERGIES, 3.0)
    torch.testing.assert_close(found.abs(), torch.ones(SHAPE), rtol=0, atol=1e-6)
    inner = mask & ((z[0].abs() > 0.7) & (ramps()[0].abs() < 0.6))
    # At the edge the smoothing sees one side only: 3 pixels of 0.02 rad.
    assert float((found * phase.conj()).angle().abs()[inner].max()) < 0.08


def test_joint_phase_ignores_the_sign_of_the_weak_images() -> None:
    z, _ = real_coefficients()
    phase = phase_factor()
    flipped = z * torch.tensor([1.0, -1.0, -1.0]).reshape(3, 1, 1)
    torch.testing.assert_close(
        joint_phase(flipped * phase, ENERGIES, 3.0), joint_phase(z * phase, ENERGIES, 3.0)
    )


def test_bright_tissue_does_not_impose_its_phase_on_dark_one() -> None:
    x = torch.arange(40)
    bright = (x < 20).expand(30, 40)
    image = torch.polar(torch.where(bright, 10.0, 1.0), torch.where(bright, 0.5, 0.0))[None]
    angle = joint_phase(image, torch.ones(1), 2.0).angle()
    # Two widths into the dark a fortieth of the weight lies on the other side, times ten.
    assert float(angle[:, 24:].abs().max()) < 0.15
    assert float((angle[:, :18] - 0.5).abs().max()) < 0.05


def test_the_phase_is_smooth_over_a_share_of_the_field_of_view(sequential: Measured) -> None:
    data = sequential.slice_data("true")

    def width(shape: tuple[int, int], share: float) -> float:
        return phase_sigma(replace(data, mask=torch.ones(shape, dtype=torch.bool), share=share))

    assert width((256, 200), 1.0) == pytest.approx(4.5)
    # Of the same field of view in a box, and in finer pixels.
    assert width((128, 120), 0.5) == width((100, 128), 0.5) == pytest.approx(4.5)
    assert width((512, 400), 1.0) == pytest.approx(9)
    # A pixel's own phase is noisy in any matrix.
    assert width((36, 36), 1.0) == width((30, 30), 1.0) > 0.5


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


# --- A slice of which the truth is known ------------------------------------------------------------------


@pytest.fixture(scope="module")
def sequential() -> Measured:
    return measure(order="sequential")


@pytest.fixture(scope="module")
def kernel(sequential: Measured) -> Kernel:
    return sequential.kernel()


def error_of(start: Start, measured: Measured) -> float:
    return measured.error(start.phase * start.z, start.data.csm)


def test_a_sequential_order_leaves_no_trace(sequential: Measured, kernel: Kernel) -> None:
    data = sequential.slice_data()
    before = sequential.error(data.x0, data.csm)
    starts = {steps: corrected_start(data, kernel, steps=steps) for steps in (0, 2, 4, 8)}
    assert before > 0.3
    # Measured: 0.41 of x0, 0.028, 0.011, 0.0069 and 0.0049.
    assert error_of(starts[0], sequential) < before / 8
    assert error_of(starts[2], sequential) < before / 25
    assert error_of(starts[4], sequential) < before / 40
    assert error_of(starts[8], sequential) < before / 60
    for start in starts.values():
        assert start.z.shape == sequential.truth.shape
        assert not start.z.is_complex()
        assert float(start.z[:, ~sequential.mask].abs().max()) == 0
        torch.testing.assert_close(start.phase.abs(), torch.ones(SHAPE), rtol=0, atol=1e-6)
        assert torch.equal(start.data.csm, data.csm)
        left = (data.x0 - Normal(kernel, data.csm)(start.phase * start.z)) * data.mask
        # Taken off step by step in float32.
        assert float((start.left - left).norm()) < 1e-4 * float(data.x0.norm())
    # The free phase of the coil maps is set so that the images of the first coefficient are positive.
    z = real_coefficients()[0]
    found = starts[8].z * z
    strong = z.abs() > 0.1
    assert float(found[strong].min()) > 0


def test_coefficients_that_were_not_calibrated_are_found(sequential: Measured, kernel: Kernel) -> None:
    data = sequential.slice_data(leading=2)
    begun = begin(data, kernel, real=True)
    assert float(begun.z[2].abs().max()) == 0
    assert float(begun.z[:2].abs().max()) > 0
    # The third image has a tenth of the energy of all. Measured: 0.105 without steps, 0.0073 after 4.
    assert error_of(begun, sequential) > 0.08
    assert error_of(corrected_start(data, kernel, steps=4), sequential) < 0.01


def test_the_preconditioner_saves_steps(sequential: Measured, kernel: Kernel) -> None:
    z, _ = real_coefficients()
    begun = begin(sequential.slice_data("true", leading=2), kernel, real=True)
    begun = replace(begun, phase=phase_factor())

    def error_energy(steps: int, precondition: bool) -> float:
        """What conjugate gradients make small: the energy of what the coils see of the error."""
        found, _ = conjugate_gradients(
            begun.image, begun.data.x0 * begun.data.mask, begun.z, steps, project=begun.project,
            precondition=begun.precondition if precondition else None,
        )  # fmt: skip
        return float(((found - z) * begun.project(begun.image(found - z))).sum())

    # Measured: 0.60 of it after two steps, 0.49 after four, 0.41 after eight.
    for steps in (2, 4, 8):
        assert error_energy(steps, True) < 0.75 * error_energy(steps, False)


@pytest.mark.parametrize(("order", "least"), [("sequential", 0.004), ("mixed", 0.01)])
def test_with_fixed_maps_only_the_phase_is_refined(order: str, least: float) -> None:
    measured = measure(order=order)
    data = measured.slice_data("true")
    assert data.polynomials is None
    start = corrected_start(data, measured.kernel(), steps=12, refined_every=4)
    assert torch.equal(start.data.csm, measured.csm)
    assert not torch.equal(start.phase, begin(data, start.kernel, real=True).phase)
    # Measured: 0.0024 and 0.0072.
    assert error_of(start, measured) < least


def test_with_what_is_true_known_only_steps_are_missing(sequential: Measured, kernel: Kernel) -> None:
    z, mask = real_coefficients()
    data = sequential.slice_data("true")
    truth = Start(data, kernel, z, phase_factor(), torch.zeros_like(data.x0))
    # Nothing is left to do, nothing is done. Two NUFFTs miss some 1e-4.
    done = advance(truth, 4)
    assert relative_error(done.z, z, mask) < 2e-3
    assert float(done.left.norm()) < 1e-3 * float((data.x0 * mask).norm())
    from_nothing = advance(replace(truth, z=torch.zeros_like(z)), 30)
    assert relative_error(from_nothing.z, z, mask) < 0.02
    # Without a common phase there are twice as many unknowns, and still enough samples.
    free = replace(truth, z=torch.zeros_like(sequential.truth), phase=torch.ones_like(truth.phase))
    assert relative_error(advance(free, 30).z, sequential.truth, mask) < 0.02


@pytest.mark.parametrize("real", [True, False], ids=["real", "complex"])
def test_what_a_start_gives_to_the_steps_is_hermitian_and_positive(
    sequential: Measured, kernel: Kernel, real: bool
) -> None:
    start = begin(sequential.slice_data(), kernel, real=real)
    assert start.z.is_complex() != real
    a, b = (torch.randn(start.z.shape, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    if not real:
        a, b = torch.complex(a, b.flip(1)), torch.complex(b, a.flip(2))

    def inner(u: Tensor, v: Tensor) -> complex:
        return complex((u.conj() * v).sum().item())

    for operator in (lambda z: start.project(start.image(z)), start.precondition):
        # On the unknowns, which are those of the object.
        a, b = a * sequential.mask, b * sequential.mask
        na, nb = operator(a), operator(b)
        assert na.dtype == start.z.dtype
        # Sums of thousands of products of float32.
        assert abs(inner(na, b) - inner(a, nb)) < 1e-5 * float(na.norm() * b.norm())
        assert inner(a, na).real > 0
        assert abs(inner(a, na).imag) < 1e-5 * abs(inner(a, na))
        assert float(na[:, ~sequential.mask].abs().max()) == 0
    # What lies outside the object is not seen.
    seen = start.image(a)
    torch.testing.assert_close(start.image(a + 3 * ~sequential.mask), seen, rtol=0, atol=1e-5)
    assert float(seen[:, ~sequential.mask].abs().max()) == 0


# --- Refinement -------------------------------------------------------------------------------------------


def test_the_refinement_mends_the_coil_maps(sequential: Measured, kernel: Kernel) -> None:
    rough = sequential.slice_data("x0")
    start = advance(begin(rough, kernel, real=True), 4)
    refined = refine(start)
    before = map_distance(start.data.csm, sequential.csm, sequential.mask)
    # Measured: from 5.9 to 1.0 %.
    assert before > 0.03
    assert map_distance(refined.data.csm, sequential.csm, sequential.mask) < before / 3
    assert torch.equal(refined.z, start.z)
    assert torch.equal(start.data.csm, rough.csm)  # the old start keeps its own
    # And with them the images: from 0.7 to 0.3 %.
    as_they_were, mended = advance(start, 4), advance(refined, 4)
    assert error_of(mended, sequential) < error_of(as_they_were, sequential) / 1.5


@pytest.mark.parametrize("real", [True, False], ids=["real", "complex"])
def test_the_refinement_leaves_what_the_coils_see(real: bool) -> None:
    """New maps and phase suit the coefficients, which stay, whatever free phase the old maps had."""
    mixed = measure(order="mixed")
    y, x = ramps()
    data = mixed.slice_data()
    turn = torch.polar(torch.ones(SHAPE), 2.0 + y - 0.5 * x)
    data = replace(data, csm=data.csm * turn, calibrated=data.calibrated * turn.conj())
    before = advance(begin(data, mixed.kernel(), real=real), 4)
    after = refine(before)
    seen, again = ((one.phase * one.z)[:, None] * one.data.csm for one in (before, after))
    # What is mended: measured 2.2 % with a common phase, 0.6 % without.
    assert relative_error(again, seen, mixed.mask) < 0.05


def test_the_refinement_mends_the_phase() -> None:
    mixed = measure(order="mixed")
    data, kernel = mixed.slice_data(), mixed.kernel()
    start = advance(begin(data, kernel, real=True), 4)
    refined = refine(start)

    def off(one: Start) -> float:
        """Median of what the phase misses of that of the object as these maps see it."""
        true = (phase_factor() * (one.data.csm.conj() * mixed.csm).sum(0)).sgn()
        return float((one.phase * true.conj()).angle().abs()[mixed.mask].median())

    # Measured: 0.021 and 0.006 rad, and with that the images: 2.7 and 0.9 %.
    assert off(refined) < off(start) / 2
    as_it_was = corrected_start(data, kernel, steps=8)
    assert error_of(corrected_start(data, kernel, steps=8, refined_every=2), mixed) < (
        error_of(as_it_was, mixed) / 2
    )


def test_the_refinement_helps_where_noise_spoilt_the_calibration() -> None:
    noisy = measure(order="mixed", noise=0.1)
    start = advance(begin(noisy.slice_data(), noisy.kernel(), real=True), 4)
    before = map_distance(start.data.csm, noisy.csm, noisy.mask)
    # Measured: 1.3 and 0.4 %.
    assert map_distance(refine(start).data.csm, noisy.csm, noisy.mask) < before / 2


def test_it_is_refined_between_steps_and_never_else(sequential: Measured, kernel: Kernel) -> None:
    data = sequential.slice_data()
    for steps, after in ((4, 0), (4, 4), (4, 9), (0, 1)):
        plain = corrected_start(data, kernel, steps=steps, refined_every=after)
        assert plain.data is data
        assert torch.equal(plain.z, advance(begin(data, kernel, real=True), steps).z)
    told: list[tuple[str, int, int]] = []
    refined = corrected_start(
        data, kernel, steps=3, refined_every=1, progress=lambda *count: told.append(count)
    )
    assert told == [("correction", 1, 3), ("correction", 2, 3), ("correction", 3, 3)]
    by_hand = advance(begin(data, kernel, real=True), 1)
    for _ in range(2):
        by_hand = advance(refine(by_hand), 1)
    assert torch.equal(refined.z, by_hand.z)
    assert torch.equal(refined.left, by_hand.left)
    assert torch.equal(refined.phase, by_hand.phase)


def test_what_progress_raises_ends_it(sequential: Measured, kernel: Kernel) -> None:
    def stop(what: str, done: int, of: int) -> None:
        raise TimeoutError(f"{what} {done} of {of}")

    with pytest.raises(TimeoutError, match="correction 1 of 5"):
        corrected_start(sequential.slice_data(), kernel, steps=5, progress=stop)


def fully_sampled(images: Tensor) -> tuple[SliceData, Kernel]:
    """One coil whose k-space is a full grid that each of many readouts fills: the normal operator is 1."""
    H, W = SHAPE
    row, column = torch.meshgrid(torch.arange(H) - H // 2, torch.arange(W) - W // 2, indexing="ij")
    points = torch.stack([column / W, row / H], -1).reshape(-1, 2)
    dcf = torch.full((1, H * W), 1 / (H * W))
    gram = torch.eye(len(images), dtype=torch.complex64)[None]
    sampling = Sampling(gram, dcf, points, make_nufft(points, SHAPE))
    csm = torch.ones((1, *SHAPE), dtype=torch.complex64)
    mask = torch.ones(SHAPE, dtype=torch.bool)
    return SliceData(images[:, None], csm, images, mask, ENERGIES, sampling), make_kernel(sampling, SHAPE)


def test_the_refined_phase_does_not_follow_the_sign_of_strong_later_images() -> None:
    # The second is stronger than the first, and negative.
    z = torch.stack([torch.ones(SHAPE), torch.full(SHAPE, -2.0), torch.full(SHAPE, 0.5)])
    found = refine(begin(*fully_sampled(phase_factor() * z), real=True))
    # The phase bends by some hundredths of a radian within the pixels of the smoothing.
    assert float((found.phase * phase_factor().conj() - 1).abs().max()) < 0.1
    assert float((found.z - z).abs().max()) < 0.05


@pytest.mark.parametrize("real", [True, False], ids=["real", "complex"])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_of_nothing_comes_nothing(steps: int, real: bool) -> None:
    nothing = fully_sampled(torch.zeros((3, *SHAPE), dtype=torch.complex64))
    found = corrected_start(*nothing, steps=steps, refined_every=2, real=real)
    assert float(found.z.abs().max()) == 0
    assert float(found.left.abs().max()) == 0
    torch.testing.assert_close(found.phase.abs(), torch.ones(SHAPE), rtol=0, atol=1e-6)
    assert bool(torch.isfinite(torch.view_as_real(found.data.csm)).all())


# --- Where the residual says that there is no common phase ------------------------------------------------


def test_the_imaginary_part_around_a_pixel_is_that_of_the_corrected_images() -> None:
    images = phase_factor() * torch.stack([torch.ones(SHAPE), torch.full(SHAPE, 0.3), torch.zeros(SHAPE)])
    turned = torch.zeros(SHAPE, dtype=torch.bool)
    turned[10:30, 8:28] = True
    angle = torch.polar(torch.ones(()), torch.tensor(0.4))
    data, kernel = fully_sampled(torch.where(turned, angle * images, images))
    start = Start(data, kernel, (phase_factor().conj() * images).real, phase_factor(), data.x0 - images)
    around = imaginary_around(start)
    assert around.shape == SHAPE
    # Deep in either part, three pixels and more from the other.
    torch.testing.assert_close(
        around[14:26, 12:24], torch.full((12, 12), math.sin(0.4) ** 2), rtol=0, atol=1e-5
    )
    outside = ~widen(turned, 6)
    assert float(around[outside].max()) < 1e-6
    # Without the residual nothing tells.
    assert float(imaginary_around(replace(start, left=torch.zeros_like(start.left))).max()) < 1e-6
