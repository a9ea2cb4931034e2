"""Locally low-rank reconstruction: its proximal map exactly, the whole on problems with a known solution."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kspace.spirals import complex_normal
from recon.spiral_slice import Measured, measure, phase_factor
from whorl.recon.corrected import corrected_start
from whorl.recon.llr import (
    LlrFit,
    from_blocks,
    grids,
    locally_low_rank,
    noise_sd,
    shrink,
    singular_values,
    to_blocks,
)
from whorl.recon.methods import llr
from whorl.recon.normal import Kernel
from whorl.recon.slicedata import Estimate

K, SHAPE = 3, (7, 10)
# One block holds the whole image, wherever its grid lies.
WHOLE = 10
KINDS = pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["real", "complex"])
SIDES = pytest.mark.parametrize("pixels", [16, 2], ids=["tall", "wide"])

Operator = Callable[[Tensor], Tensor]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def dense_normal(dtype: torch.dtype = torch.complex64, rows: int = 800) -> tuple[Operator, Tensor]:
    """A well-posed N = A'A with eigenvalues between about 0.1 and 1.2, and its matrix."""
    size = K * SHAPE[0] * SHAPE[1]
    encoding = randn(rows, size, dtype=dtype, seed=5) / (2 * rows) ** 0.5
    matrix = encoding.mH @ encoding
    return lambda x: (matrix @ x.flatten()).reshape(x.shape), matrix


def solve(normal: Operator, b: Tensor, *, start: Tensor | None = None, **options: Any) -> LlrFit:
    start = torch.zeros_like(b) if start is None else start
    return locally_low_rank(normal, b, start, b - normal(start), **options)


def weight_of(b: Tensor, lam: float, block: int) -> float:
    return lam * float(noise_sd(b)) * (block + len(b) ** 0.5)


def objective(x: Tensor, normal: Operator, b: Tensor, lam: float, block: int) -> float:
    """With singular values from the singular value decomposition."""
    data = float((x.conj() * (normal(x) / 2 - b)).real.sum())
    nuclear = [float(torch.linalg.svdvals(to_blocks(x, block, shift)).sum()) for shift in grids(block)]
    return data + weight_of(b, lam, block) * sum(nuclear) / 4


# --- Blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [(0, 0), (3, 1)], ids=str)
@pytest.mark.parametrize("shape", [(8, 12), (7, 10), (3, 2)], ids=str)
def test_blocks_cover_each_pixel_once(shape: tuple[int, int], shift: tuple[int, int]) -> None:
    images = torch.arange(1.0, K * shape[0] * shape[1] + 1).reshape(K, *shape)
    blocks = to_blocks(images, 4, shift)
    assert blocks.shape == (-(-shape[0] // 4) * -(-shape[1] // 4), 16, K)
    assert torch.equal(from_blocks(blocks, shape, 4, shift), images)
    assert int((blocks > 0).sum()) == images.numel()
    moved = torch.roll(images, shift, (1, 2))
    first = moved[:, :4, :4].flatten(1).T
    assert torch.equal(blocks[0][blocks[0, :, 0] > 0], first)


@pytest.mark.parametrize("block", [2, 3, 4, 5])
def test_no_neighbours_are_kept_apart_by_all_grids(block: int) -> None:
    pixels = torch.arange(1, 12 * 13 + 1, dtype=torch.float32).reshape(1, 12, 13)
    together: set[tuple[int, int]] = set()
    for shift in grids(block):
        for row in to_blocks(pixels, block, shift)[:, :, 0].int().tolist():
            together |= {(one, other) for one in row for other in row}
    # But in the last lines and columns, which a shift puts at the opposite edge.
    for y in range(11 - block // 2):
        for x in range(1, 12 - block // 2):
            one = 13 * y + x + 1
            for step in (1, 12, 13, 14):  # right, and the three below
                assert (one, one + step) in together


@SIDES
@KINDS
def test_shrinking_is_what_the_singular_value_decomposition_does(dtype: torch.dtype, pixels: int) -> None:
    blocks = randn(5, pixels, K, dtype=dtype)
    blocks *= torch.tensor([1.0, 1e-2, 1e-4])  # coefficients are that uneven
    left, values, right = torch.linalg.svd(blocks, full_matrices=False)
    torch.testing.assert_close(singular_values(blocks).flip(1).float(), values, rtol=1e-4, atol=1e-8)
    for threshold in (0.0, 3e-4, 0.03, 3.0):
        shrunk, nuclear = shrink(blocks, threshold)
        left_over = (values - threshold).clamp_min(0)
        expected = (left * left_over[:, None].to(dtype)) @ right
        assert shrunk.dtype == dtype
        # Singular values of float32 matrices of norm 5.
        torch.testing.assert_close(shrunk, expected, rtol=0, atol=3e-6)
        assert float(nuclear) == pytest.approx(float(left_over.sum()), abs=1e-5)


@SIDES
@KINDS
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_blocks_without_signal_stay_without(dtype: torch.dtype, threshold: float, pixels: int) -> None:
    shrunk, nuclear = shrink(torch.zeros((2, pixels, K), dtype=dtype), threshold)
    assert torch.equal(shrunk, torch.zeros_like(shrunk))
    assert float(nuclear) == 0


@KINDS
def test_the_noise_is_measured(dtype: torch.dtype) -> None:
    images = 0.5 * randn(9, 80, 160, dtype=dtype, seed=1)
    images[0] += 1e3  # one strong tissue everywhere
    with_empty = torch.cat([images, torch.zeros_like(images)], 1)
    # The tissue leaves a block 8 coefficients of noise, and matrices that small have a tenth more.
    assert float(noise_sd(images)) == pytest.approx(0.5, rel=0.2)
    assert float(noise_sd(with_empty)) == float(noise_sd(images))
    assert float(noise_sd(torch.zeros((9, 16, 16)))) == 0
    # With more coefficients than 8 by 8 pixels the blocks are larger.
    assert float(noise_sd(randn(70, 80, 80, dtype=dtype, seed=2))) == pytest.approx(1, rel=0.1)


# --- The minimum ------------------------------------------------------------------------------------------


@KINDS
def test_without_a_penalty_it_is_least_squares(dtype: torch.dtype) -> None:
    normal, _ = dense_normal(dtype)
    truth = randn(K, *SHAPE, dtype=dtype, seed=6)
    fit = solve(normal, normal(truth), lam=0.0, iterations=200)
    assert fit.coefficients.shape == truth.shape
    assert fit.coefficients.dtype == dtype
    assert float((fit.coefficients - truth).norm() / truth.norm()) < 1e-4


def test_of_the_identity_it_is_one_shrinking() -> None:
    b = complex_normal(K, *SHAPE, seed=9)
    smallest = float(torch.linalg.svdvals(b.reshape(K, -1))[-1])
    lam = 1.05 * smallest / weight_of(b, 1.0, WHOLE)
    fit = solve(lambda x: 2 * x, b, lam=lam, block=WHOLE, iterations=60)
    # argmin ‖x‖² - Re<x, b> + λ'‖x‖_* = the shrunken b / 2
    expected = from_blocks(shrink(to_blocks(b / 2, WHOLE), 1.05 * smallest / 2)[0], SHAPE, WHOLE)
    torch.testing.assert_close(fit.coefficients, expected, rtol=0, atol=1e-4)
    assert int((torch.linalg.svdvals(fit.coefficients.reshape(K, -1)) > 1e-3).sum()) == K - 1


def generic_minimum(matrix: Tensor, b: Tensor, weight: float, block: int) -> Tensor:
    """By a solver that knows nothing of blocks: BFGS on the objective, its corners rounded, in float64."""
    rounded = 1e-3
    x = torch.zeros_like(b).requires_grad_()
    solver = torch.optim.LBFGS(
        [x],
        max_iter=3000,
        history_size=60,
        tolerance_grad=1e-8,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = (x.conj() * ((matrix @ x.flatten()).reshape(b.shape) / 2 - b)).real.sum()
        for shift in grids(block):
            cut = to_blocks(x, block, shift)
            gram = cut.mH @ cut if cut.shape[1] >= K else cut @ cut.mH
            energies = torch.linalg.eigvalsh(gram + rounded**2 * torch.eye(gram.shape[1], dtype=gram.dtype))
            value = value + weight / 4 * energies.clamp_min(0).sqrt().sum()
        value.backward()
        return value

    solver.step(loss)
    return x.detach()


@KINDS
@pytest.mark.parametrize("block", [2, 3, WHOLE])
def test_it_ends_where_a_generic_solver_does(block: int, dtype: torch.dtype) -> None:
    normal, matrix = dense_normal(dtype)
    b, lam = randn(K, *SHAPE, dtype=dtype, seed=11), 0.3
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = generic_minimum(matrix.to(wide), b.to(wide), weight_of(b, lam, block), block).to(dtype)
    found = solve(normal, b, lam=lam, block=block, iterations=300).coefficients
    # What rounding the corners moves, along the flattest directions of N.
    assert float((found - expected).norm() / expected.norm()) < 0.01
    ours, theirs = (objective(x, normal, b, lam, block) for x in (found, expected))
    assert ours <= theirs + 1e-5 * abs(theirs)  # sums of 210 products in float32
    # It is the penalty that was solved for: without it the minimum is elsewhere.
    free = solve(normal, b, lam=0.0, iterations=300).coefficients
    assert float((free - found).norm() / found.norm()) > 0.1


@pytest.mark.parametrize("block", [2, 4, WHOLE])
def test_the_objective_falls_to_its_minimum(block: int) -> None:
    normal, _ = dense_normal()
    b, lam = normal(complex_normal(K, *SHAPE, seed=10)), 0.3
    found = [solve(normal, b, lam=lam, block=block, iterations=n).coefficients for n in (1, 2, 3, 4, 6, 200)]
    above = [objective(x, normal, b, lam, block) for x in (torch.zeros_like(b), *found)]
    least = above.pop()
    # Towards the end the method of multipliers may let it rise again, but by little.
    slack = 1e-3 * abs(least)
    assert above[1] < above[0] - slack
    assert all(value > least - 1e-5 * abs(least) for value in above)
    assert all(later < max(earlier, least + slack) for earlier, later in pairwise(above))


def test_the_losses_are_the_objective() -> None:
    normal, _ = dense_normal()
    b, lam = normal(complex_normal(K, *SHAPE, seed=10)), 0.3
    start = 0.7 * complex_normal(K, *SHAPE, seed=10)
    fit = solve(normal, b, lam=lam, start=start, block=4, iterations=200)
    assert len(fit.losses) == 200
    # Of x and v, which are the same in the end.
    assert fit.losses[-1] == pytest.approx(objective(fit.coefficients, normal, b, lam, 4), rel=1e-4)
    # At first what the start leaves, and the penalty of its shrunken blocks: less than its own.
    data = float((start.conj() * (normal(start) / 2 - b)).real.sum())
    assert data <= fit.losses[0] < objective(start, normal, b, lam, 4)


def test_where_it_starts_changes_its_speed_alone() -> None:
    normal, _ = dense_normal()
    truth = complex_normal(K, *SHAPE, seed=17)
    b = normal(truth)
    end = solve(normal, b, lam=0.3, iterations=300).coefficients
    for start in (truth, 0.1 * complex_normal(K, *SHAPE, seed=18)):
        fit = solve(normal, b, lam=0.3, start=start, iterations=300)
        torch.testing.assert_close(fit.coefficients, end, rtol=0, atol=2e-3)
    far, near = (solve(normal, b, lam=0.3, start=x, iterations=2).coefficients for x in (0 * truth, truth))
    assert float((near - end).norm()) < 0.5 * float((far - end).norm())


def test_a_preconditioner_changes_its_speed_alone() -> None:
    """Of an operator that sees the coefficients unequally well."""
    seen = torch.tensor([1.0, 0.1, 0.01]).reshape(K, 1, 1)
    b = complex_normal(K, *SHAPE, seed=19) * seen
    ways: tuple[dict[str, Any], ...] = ({}, {"precondition": lambda x: x / (seen + 0.01)})
    (plain, late), (quick, end) = (
        [solve(lambda x: seen * x, b, start=b, lam=0.3, iterations=n, **way).coefficients for n in (100, 600)]
        for way in ways
    )
    torch.testing.assert_close(late, end, rtol=0, atol=1e-3)
    assert float((quick - end).norm()) < 0.1 * float((plain - end).norm())


@pytest.mark.parametrize("noise", [0.1, 0.3, 0.9])
def test_noise_goes_where_few_tissues_meet(noise: float) -> None:
    y, x = torch.meshgrid(torch.arange(22), torch.arange(26), indexing="ij")
    signals = complex_normal(2, 8, seed=12)
    tissue = ((x - 12) ** 2 + (y - 10) ** 2 < 60).long()
    truth = signals[tissue].permute(2, 0, 1)
    noisy = truth + noise * complex_normal(8, 22, 26, seed=13)
    fit = solve(lambda x: x, noisy, start=noisy, lam=0.5, iterations=20)
    before, after = ((images - truth).norm() for images in (noisy, fit.coefficients))
    # The same weight at any noise: of four singular values one or two stay.
    assert float(after) < 0.72 * float(before)


# --- What it costs, and what goes in ----------------------------------------------------------------------


def test_each_iteration_applies_the_operator_once() -> None:
    normal, _ = dense_normal()
    b = complex_normal(K, *SHAPE)
    applied: list[Tensor] = []

    def counted(x: Tensor) -> Tensor:
        applied.append(x)
        return normal(x)

    locally_low_rank(counted, b, torch.zeros_like(b), b, lam=0.1, iterations=5)
    assert len(applied) == 5


def test_scales_go_through() -> None:
    normal, _ = dense_normal()
    b = complex_normal(K, *SHAPE, seed=15)
    plain = solve(normal, b, start=b, lam=0.1, block=4).coefficients
    # Powers of two change no digit: of the data, and of their weights, which are in N and in b.
    assert torch.equal(solve(normal, 4 * b, start=4 * b, lam=0.1, block=4).coefficients, 4 * plain)
    weighted = solve(lambda x: 4 * normal(x), 4 * b, start=b, lam=0.1, block=4).coefficients
    assert torch.equal(weighted, plain)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lam", 0.2),
        ("block", 3),
        ("iterations", 6),
        ("precondition", lambda x: x * torch.tensor([1.0, 2.0, 3.0]).reshape(K, 1, 1)),
    ],
    ids=["lam", "block", "iterations", "precondition"],
)
def test_every_parameter_of_llr_is_used(name: str, value: Any) -> None:
    normal, _ = dense_normal()
    b = complex_normal(K, *SHAPE, seed=16)
    options: dict[str, Any] = {"lam": 0.1, "block": 4, "iterations": 5}
    plain, again = (solve(normal, b, **options).coefficients for _ in range(2))
    assert torch.equal(plain, again)
    assert not torch.equal(solve(normal, b, **{**options, name: value}).coefficients, plain)


def test_nothing_in_gives_nothing() -> None:
    zero = torch.zeros((K, *SHAPE), dtype=torch.complex64)
    for normal in (dense_normal()[0], torch.zeros_like):
        fit = solve(normal, zero, lam=0.1)
        assert float(fit.coefficients.abs().max()) == 0


def test_who_is_told_of_the_progress_may_end_it() -> None:
    normal, _ = dense_normal()
    b = complex_normal(K, *SHAPE)
    told: list[tuple[str, int, int]] = []
    solve(normal, b, lam=0.1, iterations=2, progress=lambda *state: told.append(state))
    assert told == [("iteration", 0, 2), ("iteration", 1, 2)]

    def no_time(what: str, done: int, of: int) -> None:
        raise TimeoutError(f"{what} {done} of {of}")

    with pytest.raises(TimeoutError, match="iteration 0 of 2"):
        solve(normal, b, lam=0.1, iterations=2, progress=no_time)


def test_bad_values_are_refused() -> None:
    normal, _ = dense_normal()
    b = complex_normal(K, *SHAPE)
    with pytest.raises(ValueError, match=r"lam is -0\.1"):
        solve(normal, b, lam=-0.1)
    with pytest.raises(ValueError, match="block and iterations are 0 and 4: expected 1 or more"):
        solve(normal, b, lam=0.1, block=0)
    with pytest.raises(FloatingPointError, match="of the low-rank reconstruction are not finite"):
        locally_low_rank(lambda x: x * math.nan, b, b, b, lam=0.1)
    bad = b.clone()
    bad[1, 2, 3] = float("nan")
    for right, start, left in ((bad, b, b), (b, bad, b), (b, b, bad)):
        with pytest.raises(FloatingPointError, match="start from are not finite"):
            locally_low_rank(normal, right, start, left, lam=0.1)


# --- The method -------------------------------------------------------------------------------------------

# A small weight: these objects have as many tissues as coefficients, and the least is taken for noise.
OPTIONS: dict[str, Any] = {"lam": 0.2, "block": 2, "iterations": 4}


def error_of(estimate: Estimate, measured: Measured) -> float:
    phase = 1 if estimate.phase is None else estimate.phase
    return measured.error(phase * estimate.coefficients, estimate.csm)


@pytest.mark.parametrize("order", ["golden", "sequential", "mixed"])
def test_it_is_better_than_the_corrected_start(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measure(order=order, noise=0.05)
    data = measured.slice_data()
    steps, refined_every = (4, 0) if order == "golden" else (12, 3)
    begun = corrected_start(data, measured.kernel(), steps=steps, refined_every=refined_every)
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        plain = getattr(Kernel, name)

        def count(self: Kernel, *arguments: Any) -> Any:
            calls[name] += 1
            return plain(self, *arguments)

        return count

    for name in ("convolve_each", "invert_roughly"):
        monkeypatch.setattr(Kernel, name, counted(name))
    told: list[tuple[str, int, int]] = []
    found = llr(data, **OPTIONS, progress=lambda *count: told.append(count))
    corrections = [("correction", n, steps) for n in range(1, steps + 1)]
    assert told == corrections + [("iteration", n, 4) for n in range(4)]
    # One more for what each of one or two starts leaves, and one for what new maps are made of.
    assert calls == {"convolve_each": steps + 4 + (7 if refined_every else 1), "invert_roughly": steps + 4}
    assert not found.coefficients.is_complex()
    assert found.phase is not None
    assert found.remarks == ()
    assert float(found.coefficients[:, ~measured.mask].abs().max()) == 0
    assert found.diagnostics == {"objective": found.losses[-1]}
    assert torch.equal(begun.data.csm, found.csm)
    before = replace(found, coefficients=begun.z, phase=begun.phase)
    # Measured: 0.78 by golden steps, 0.63 for uneven orders.
    assert error_of(found, measured) < 0.85 * error_of(before, measured)


def test_without_a_common_phase_its_coefficients_are_complex() -> None:
    phases = phase_factor() * torch.tensor([1, 3j, 1]).reshape(3, 1, 1)
    measured = measure(order="sequential", phase=phases)
    found = llr(measured.slice_data(), **{**OPTIONS, "lam": 0.02})
    ((status, why),) = found.remarks
    assert status == "fallback"
    assert "no common phase (" in why
    assert why.endswith("complex coefficients")
    assert found.coefficients.is_complex()
    assert found.phase is None
    assert error_of(found, measured) < 0.02


def test_pixels_whose_phase_jumps_are_as_measured() -> None:
    turn = torch.ones((44, 35), dtype=torch.complex64)
    turn[18:25, 12:19] = 1j
    found = llr(measure(order="golden", phase=phase_factor() * turn).slice_data(), **OPTIONS)
    ((status, why),) = found.remarks
    assert status == "degraded"
    assert "the coefficients share no phase in" in why
    assert found.coefficients.is_complex()
    assert found.phase is None


@pytest.mark.parametrize("place", ["coil_images", "calibrated"])
def test_data_that_are_not_finite_are_refused(place: str) -> None:
    data = measure(order="golden").slice_data()
    changed: dict[str, Any] = {place: getattr(data, place).clone()}
    changed[place][..., 20, 17] = math.inf
    with pytest.raises(FloatingPointError, match="to start from are not finite"):
        llr(replace(data, **changed), **OPTIONS)
