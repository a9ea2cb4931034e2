"""Locally low-rank reconstruction: its proximal map exactly, the whole on problems with a known solution."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kspace.spirals import complex_normal
from whorl.recon.llr import (
    from_blocks,
    largest_eigenvalue,
    locally_low_rank,
    noise_floor,
    shrink,
    singular_values,
    to_blocks,
)

K, SHAPE = 3, (7, 10)
# One block holds the whole image: the shift then changes nothing.
WHOLE = 10
KINDS = pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["real", "complex"])


def dense_normal(rows: int = 800) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A well-posed complex N = A'A with eigenvalues between about 0.1 and 1.2, and its matrix."""
    size = K * SHAPE[0] * SHAPE[1]
    encoding = complex_normal(rows, size, seed=5) / (2 * rows) ** 0.5
    matrix = encoding.mH @ encoding
    return lambda x: (matrix @ x.flatten()).reshape(x.shape), matrix


def objective(x: Tensor, normal: Callable[[Tensor], Tensor], b: Tensor, lam: float) -> float:
    """Of one block, with singular values from the singular value decomposition."""
    weight = lam * torch.linalg.matrix_norm(b.reshape(K, -1), -2)
    nuclear = torch.linalg.matrix_norm(x.reshape(K, -1), "nuc")
    return float((x.conj() * (normal(x) / 2 - b)).real.sum() + weight * nuclear)


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


@KINDS
def test_shrinking_is_what_the_singular_value_decomposition_does(dtype: torch.dtype) -> None:
    blocks = torch.randn((5, 16, K), dtype=dtype, generator=torch.Generator().manual_seed(0))
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


@KINDS
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_blocks_without_signal_stay_without(dtype: torch.dtype, threshold: float) -> None:
    shrunk, nuclear = shrink(torch.zeros((2, 16, K), dtype=dtype), threshold)
    assert torch.equal(shrunk, torch.zeros_like(shrunk))
    assert float(nuclear) == 0


def test_the_noise_floor_is_that_of_noise() -> None:
    blocks = 0.5 * complex_normal(200, 64, 9, seed=1)
    blocks[:, :, 0] += 1e3  # one strong tissue everywhere
    with_empty = torch.cat([blocks, torch.zeros((300, 64, 9), dtype=torch.complex64)])
    # σ (√Q - √K) of the 64 x 8 that one tissue leaves; matrices that small have a tenth more.
    assert float(noise_floor(with_empty)) == pytest.approx(0.5 * (64**0.5 - 8**0.5), rel=0.12)
    assert float(noise_floor(blocks)) == float(noise_floor(with_empty))
    assert float(noise_floor(torch.zeros((3, 64, 9)))) == 0
    # Blocks with fewer pixels than coefficients have only so many values.
    assert float(noise_floor(torch.ones((3, 1, 9)))) == pytest.approx(3)


def test_the_largest_eigenvalue_is_found() -> None:
    normal, matrix = dense_normal()
    generator = torch.Generator().manual_seed(0)
    found = largest_eigenvalue(normal, complex_normal(K, *SHAPE), iterations=200, generator=generator)
    assert float(found) == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-2)
    # Never more than there is: the norm of N v for a unit v.
    early = largest_eigenvalue(normal, complex_normal(K, *SHAPE), iterations=5, generator=generator)
    assert 0 < float(early) <= float(found) * 1.001


def test_without_a_penalty_it_is_least_squares() -> None:
    normal, matrix = dense_normal()
    truth = complex_normal(K, *SHAPE, seed=6)
    fit = locally_low_rank(normal(truth), normal, lam=0.0, iterations=150)
    assert fit.coefficients.shape == truth.shape
    assert float((fit.coefficients - truth).norm() / truth.norm()) < 1e-4
    assert fit.step < 1 / float(torch.linalg.eigvalsh(matrix)[-1]) * 1.1


def test_with_a_phase_it_is_least_squares_of_real_unknowns() -> None:
    normal, matrix = dense_normal()
    truth = torch.randn((K, *SHAPE), generator=torch.Generator().manual_seed(7))
    phase = torch.polar(torch.ones(SHAPE), 0.3 * torch.arange(70.0).reshape(SHAPE))
    # An imaginary part that real unknowns cannot show: they fit the rest in the least-squares sense.
    b = normal(phase * truth) + 0.1 * complex_normal(K, *SHAPE, seed=8)
    fit = locally_low_rank(b, normal, lam=0.0, iterations=150, phase=phase)
    turn = phase.expand(K, *SHAPE).flatten()
    real_matrix = (turn.conj()[:, None] * matrix * turn).real
    expected = torch.linalg.solve(real_matrix, (turn.conj() * b.flatten()).real).reshape(truth.shape)
    assert fit.coefficients.dtype == torch.float32
    assert float((fit.coefficients - expected).norm() / expected.norm()) < 1e-4


def test_of_the_identity_it_is_one_shrinking() -> None:
    b = complex_normal(K, *SHAPE, seed=9)
    lam = 1.05
    fit = locally_low_rank(b, lambda x: 2 * x, lam=lam, block=WHOLE, iterations=60)
    blocks = to_blocks(b, WHOLE)
    weight = lam * noise_floor(blocks)
    # argmin ‖x‖² - Re<x, b> + λ'‖x‖_* = the shrunken b / 2
    expected = from_blocks(shrink(blocks / 2, weight / 2)[0], SHAPE, WHOLE)
    torch.testing.assert_close(fit.coefficients, expected, rtol=0, atol=1e-4)
    assert int((torch.linalg.svdvals(fit.coefficients.reshape(K, -1)) > 1e-3).sum()) == K - 1


def test_the_objective_is_what_it_says_and_falls() -> None:
    normal, _ = dense_normal()
    b = normal(complex_normal(K, *SHAPE, seed=10))
    lam = 0.1
    fits = [locally_low_rank(b, normal, lam=lam, block=WHOLE, iterations=n) for n in range(1, 31)]
    losses = fits[-1].losses
    assert losses[0] == 0
    for fit, loss in zip(fits[:-1], losses[1:], strict=True):
        # Sums of 210 products in float32 whose terms are ten times as large.
        assert objective(fit.coefficients, normal, b, lam) == pytest.approx(loss, abs=1e-5 * abs(losses[-1]))
    # Momentum may let it rise a little near the end, never much.
    falls = [before - after for before, after in pairwise(losses)]
    assert all(fall > 0 for fall in falls[:6])
    assert min(falls) > -1e-3 * abs(losses[-1])


@pytest.mark.parametrize("block", [1, WHOLE], ids=["pixels", "whole"])
def test_where_it_ends_another_step_changes_nothing(block: int) -> None:
    normal, _ = dense_normal()
    b = normal(complex_normal(K, *SHAPE, seed=11))
    lam = 0.1
    fit = locally_low_rank(b, normal, lam=lam, block=block, iterations=200)
    x = fit.coefficients
    weight = float(lam * noise_floor(to_blocks(b, block)))
    moved = to_blocks(x - fit.step * (normal(x) - b), block)
    again = from_blocks(shrink(moved, fit.step * weight)[0], SHAPE, block)
    assert float((again - x).norm() / x.norm()) < 1e-4
    assert float((x - normal(x)).norm()) > 0


@pytest.mark.parametrize("noise", [0.1, 0.3, 0.9])
def test_noise_goes_where_few_tissues_meet(noise: float) -> None:
    y, x = torch.meshgrid(torch.arange(22), torch.arange(26), indexing="ij")
    signals = complex_normal(2, 8, seed=12)
    tissue = ((x - 12) ** 2 + (y - 10) ** 2 < 60).long()
    truth = signals[tissue].permute(2, 0, 1)
    noisy = truth + noise * complex_normal(8, 22, 26, seed=13)
    fit = locally_low_rank(noisy, lambda x: x, lam=1.0, iterations=20)
    before, after = ((images - truth).norm() for images in (noisy, fit.coefficients))
    # The same weight at any noise: two of eight singular values stay, with 1/4 of the noise energy.
    assert float(after) < 0.65 * float(before)


def test_what_lies_outside_is_zero_and_does_not_count() -> None:
    normal, _ = dense_normal()
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[1:5, 2:9] = True
    truth = complex_normal(K, *SHAPE, seed=14) * mask
    b = normal(truth)
    fit = locally_low_rank(torch.where(mask, b, 7.0), normal, lam=0.0, iterations=150, mask=mask)
    assert float(fit.coefficients[:, ~mask].abs().max()) == 0
    assert float((fit.coefficients - truth).norm() / truth.norm()) < 1e-4


def test_scales_go_through() -> None:
    normal, _ = dense_normal()
    b = complex_normal(K, *SHAPE, seed=15)
    plain = locally_low_rank(b, normal, lam=0.1, block=4).coefficients
    # Powers of two change no digit: of the data, and of their weights, which are in N and in b.
    assert torch.equal(locally_low_rank(4 * b, normal, lam=0.1, block=4).coefficients, 4 * plain)
    weighted = locally_low_rank(4 * b, lambda x: 4 * normal(x), lam=0.1, block=4).coefficients
    assert torch.equal(weighted, plain)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lam", 0.2), ("block", 3), ("iterations", 7), ("power_iterations", 2), ("seed", 1)],
)
def test_every_parameter_of_llr_is_used(name: str, value: Any) -> None:
    normal, _ = dense_normal()
    b = complex_normal(K, *SHAPE, seed=16)
    options: dict[str, Any] = {"lam": 0.1, "block": 4, "iterations": 5}
    plain, again = (locally_low_rank(b, normal, **options).coefficients for _ in range(2))
    assert torch.equal(plain, again)
    assert not torch.equal(locally_low_rank(b, normal, **{**options, name: value}).coefficients, plain)


def test_nothing_in_gives_nothing() -> None:
    zero = torch.zeros((K, *SHAPE), dtype=torch.complex64)
    for normal in (dense_normal()[0], torch.zeros_like):
        fit = locally_low_rank(zero, normal, lam=0.1)
        assert float(fit.coefficients.abs().max()) == 0


def test_who_is_told_of_the_progress_may_end_it() -> None:
    normal, _ = dense_normal()
    b = complex_normal(K, *SHAPE)
    told: list[tuple[str, int, int]] = []
    locally_low_rank(b, normal, lam=0.1, iterations=2, progress=lambda *state: told.append(state))
    assert told == [("iteration", 0, 2), ("iteration", 1, 2)]

    def no_time(what: str, done: int, of: int) -> None:
        raise TimeoutError(f"{what} {done} of {of}")

    with pytest.raises(TimeoutError, match="iteration 0 of 2"):
        locally_low_rank(b, normal, lam=0.1, iterations=2, progress=no_time)


def test_bad_values_are_refused() -> None:
    normal, _ = dense_normal()
    b = complex_normal(K, *SHAPE)
    with pytest.raises(ValueError, match=r"lam is -0\.1"):
        locally_low_rank(b, normal, lam=-0.1)
    with pytest.raises(ValueError, match="block, iterations and power_iterations are 0"):
        locally_low_rank(b, normal, lam=0.1, block=0)
    b[1, 2, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="start from are not finite"):
        locally_low_rank(b, normal, lam=0.1)
