"""The guide: noise goes where pixels are alike, nothing else does; its filter against a double loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from whorl.recon.guide import guide, joint_bilateral, noise_levels


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def raster(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij")
    return y, x


def disc(shape: tuple[int, int], radius: float) -> Tensor:
    y, x = raster(shape)
    return (y - shape[0] // 2) ** 2 + (x - shape[1] // 2) ** 2 < radius**2


def everywhere(shape: tuple[int, int]) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


# --- The level of noise -----------------------------------------------------------------------------------

LEVELS = torch.tensor([1.0, 0.1, 5.0, 1e-3])
LARGE = (120, 131)


@pytest.mark.parametrize("where", [everywhere(LARGE), disc(LARGE, 50)], ids=["all", "disc"])
def test_white_noise_has_its_standard_deviation(where: Tensor) -> None:
    white = LEVELS.reshape(-1, 1, 1) * noise(4, *LARGE, seed=2)
    white[:, ~where] = 1e3  # what lies outside does not count
    found = noise_levels(white, where)
    assert found.shape == (4,)
    # Medians of some 10 000 differences, of which three in a row are alike: 1.5 %.
    torch.testing.assert_close(found, LEVELS, rtol=0.03, atol=0)


def test_steps_and_slopes_are_no_noise() -> None:
    y, x = raster(LARGE)
    anatomy = 100 * (x > 40) + 50.0 * (y > 70) - 80.0 * disc(LARGE, 30) + 3 * x - 2 * y
    # What differs at a step, some 3 % of the pixels, moves the median as far.
    found = noise_levels(anatomy + LEVELS.reshape(-1, 1, 1) * noise(4, *LARGE), everywhere(LARGE))
    torch.testing.assert_close(found, LEVELS, rtol=0.06, atol=0)
    # Sums of float32 numbers of some hundred are exact here.
    assert torch.equal(noise_levels(anatomy[None], everywhere(LARGE)), torch.zeros(1))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (2, 2)], ids=str)
def test_without_three_pixels_in_a_row_there_is_none(shape: tuple[int, int]) -> None:
    assert torch.equal(noise_levels(noise(2, *shape), everywhere(shape)), torch.zeros(2))
    apart = torch.zeros((9, 9), dtype=torch.bool)
    apart[::2] = apart[:, ::4] = True
    apart[1::2] = False
    apart[:, 2::4] = apart[:, 3::4] = False
    assert torch.equal(noise_levels(noise(2, 9, 9), apart), torch.zeros(2))


@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (2, 3)], ids=str)
def test_three_pixels_in_a_row_are_enough(shape: tuple[int, int]) -> None:
    y, x = raster(shape)
    curved = (x if shape[1] == 3 else y) ** 2  # a second difference of 2 everywhere
    found = noise_levels(curved[None], everywhere(shape))
    torch.testing.assert_close(found, torch.tensor([2 / (0.6745 * math.sqrt(6))]))


# --- The filter -------------------------------------------------------------------------------------------

SMALL = (11, 9)


def some_images(K: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, what is compared, its variance and a mask with a hole, at two tissues that differ by much."""
    y, x = raster(SMALL)
    tissue = 6.0 * (x + 0.4 * y > 6)
    images = noise(K, *SMALL) + tissue
    compared = tissue + 0.5 * noise(K, *SMALL, seed=1)
    variance = 0.1 + 0.4 * torch.rand(SMALL, generator=torch.Generator().manual_seed(2))
    mask = disc(SMALL, 5)
    mask[5, 4] = False
    return images, compared, variance, mask


def double_loop(
    images: Tensor, compared: Tensor, variance: Tensor, mask: Tensor, radius: float
) -> tuple[Tensor, Tensor]:
    K, H, W = images.shape
    mean, left = torch.zeros(images.shape, dtype=torch.float64), torch.ones((H, W), dtype=torch.float64)
    inside = torch.nonzero(mask).tolist()
    for y, x in inside:
        total, weights, squares = torch.zeros(K, dtype=torch.float64), 0.0, 0.0
        for v, u in inside:
            if (v - y) ** 2 + (u - x) ** 2 > radius**2:
                continue
            apart = float((compared[:, y, x] - compared[:, v, u]).double().square().sum())
            d = apart / float(variance[y, x] + variance[v, u])
            weight = math.exp(-max(d - K, 0) / (2 * math.sqrt(2 * K)))
            total += weight * images[:, v, u]
            weights += weight
            squares += weight * weight
        mean[:, y, x], left[y, x] = total / weights, squares / weights**2
    return mean.float(), left.float()


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("radius", [1.0, 2.5, 4.0, 20.0])
def test_the_filter_is_the_mean_over_like_pixels_of_a_disc(K: int, radius: float) -> None:
    images, compared, variance, mask = some_images(K)
    mean, left = joint_bilateral(images, compared, variance, mask, radius)
    expected, expected_left = double_loop(images, compared, variance, mask, radius)
    # Sums of some hundred float32 numbers.
    torch.testing.assert_close(mean, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(left, expected_left, rtol=2e-5, atol=0)


Turn = Callable[[Tensor], Tensor]


@pytest.mark.parametrize(
    "turn",
    [lambda a: a.rot90(1, (-2, -1)), lambda a: a.rot90(2, (-2, -1)), lambda a: a.flip(-1), lambda a: a.mT],
    ids=["quarter", "half", "mirror", "transposed"],
)
def test_no_direction_is_another(turn: Turn) -> None:
    given = some_images()
    plain = joint_bilateral(*given, 3.0)
    turned = joint_bilateral(*(turn(part).contiguous() for part in given), 3.0)
    for before, after in zip(plain, turned, strict=True):
        # The same sums in another order.
        torch.testing.assert_close(after, turn(before), rtol=1e-5, atol=1e-5)


def test_coefficients_are_compared_together_and_kept_apart() -> None:
    images, *others = some_images()
    order = torch.tensor([2, 0, 1])
    mean, left = joint_bilateral(images, *others, 3.0)
    compared, variance, mask = others
    other_mean, other_left = joint_bilateral(images[order], compared[order], variance, mask, 3.0)
    torch.testing.assert_close(other_mean, mean[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other_left, left, rtol=1e-5, atol=0)
    alone, _ = joint_bilateral(images * torch.tensor([0.0, 1.0, 0.0]).reshape(3, 1, 1), *others, 3.0)
    torch.testing.assert_close(alone[1], mean[1])
    assert float(alone[[0, 2]].abs().max()) == 0


def test_where_all_are_alike_noise_falls_with_their_number() -> None:
    shape, radius, K = (90, 84), 3.0, 2
    white, alike = noise(K, *shape), torch.zeros((K, *shape))
    mean, left = joint_bilateral(white, alike, torch.ones(shape), everywhere(shape), radius)
    # 29 pixels of a disc of radius 3, at all but the edges.
    inner = (slice(3, -3), slice(3, -3))
    torch.testing.assert_close(left[inner], torch.full_like(left[inner], 1 / 29))
    # 13 000 numbers, 29 of which are alike: 5 %.
    assert float(mean[:, 3:-3, 3:-3].square().mean()) == pytest.approx(1 / 29, rel=0.1)
    corner = float(left[0, 0])
    assert corner == pytest.approx(1 / 11, rel=1e-5)  # a quarter of the disc with its two edges


def test_the_variance_of_what_is_left_is_told() -> None:
    """Of noise that the weights do not know: they come from another measurement of the same."""
    shape, K = (100, 100), 3
    y, x = raster(shape)
    tissue = 5.0 * ((x // 7 + y // 9) % 2)
    compared = tissue + 0.7 * noise(K, *shape, seed=99)
    variance, mask = torch.full(shape, 0.49), disc(shape, 45)
    found = [joint_bilateral(noise(K, *shape, seed=seed), compared, variance, mask, 4.0) for seed in range(8)]
    told = found[0][1]
    measured = torch.stack([mean for mean, _ in found]).square().mean((0, 1))  # zero is the truth
    assert 1 / 49 < float(told[mask].mean()) < 1 / 15
    # 150 000 numbers, some 25 of which are alike: 2 %.
    assert float(measured[mask].mean()) == pytest.approx(float(told[mask].mean()), rel=0.06)
    # Pixel by pixel, where few are alike and where many are.
    few = mask & (told > told[mask].quantile(0.9))
    many = mask & (told < told[mask].quantile(0.1))
    for some in (few, many):
        assert float(measured[some].mean()) == pytest.approx(float(told[some].mean()), rel=0.1)


def test_tissues_that_differ_by_more_than_noise_do_not_mix() -> None:
    shape, K = (40, 40), 3
    left_half = raster(shape)[1] < 20
    # 20 standard deviations in the first coefficient, nothing in the others.
    tissue = torch.stack([torch.where(left_half, 0.0, 20.0), torch.ones(shape), torch.zeros(shape)])
    images = tissue + noise(K, *shape)
    mean, _ = joint_bilateral(images, images, torch.ones(shape), everywhere(shape), 4.0)
    error = mean - tissue
    # Twenty neighbours and more: what is left is noise next to the border as well.
    border = (slice(None), slice(None), slice(18, 22))
    assert float(error[border].square().mean()) < 0.1
    assert abs(float((mean[0] - tissue[0])[:, 18:20].mean())) < 0.1
    assert abs(float((mean[0] - tissue[0])[:, 20:22].mean())) < 0.1


def test_nothing_comes_in_from_outside() -> None:
    images, compared, variance, mask = some_images()
    mean, left = joint_bilateral(images, compared, variance, mask, 4.0)
    assert float(mean[:, ~mask].abs().max()) == 0
    assert torch.equal(left[~mask], torch.ones(int((~mask).sum())))
    other = [part.clone() for part in (images, compared)]
    for part in other:
        part[:, ~mask] = 1e4
    others_variance = torch.where(mask, variance, 9.0)
    again, left_again = joint_bilateral(*other, others_variance, mask, 4.0)
    assert torch.equal(again, mean)
    assert torch.equal(left_again, left)


# --- The whole --------------------------------------------------------------------------------------------

SHAPE = (96, 101)


def tissues() -> tuple[Tensor, Tensor]:
    """`(4, Y, X)` of three tissues whose coefficients have either sign, and the mask."""
    mask = disc(SHAPE, 44)
    y, x = raster(SHAPE)
    kind = (x > 55).long() + (disc(SHAPE, 15) & (y > 40)).long()
    values = torch.tensor([[3.0, 2.0, 4.0], [-1.0, -0.5, 0.4], [0.3, 0.1, -0.2], [0.02, 0.03, 0.0]])
    return values[:, kind] * mask, mask


def texture() -> Tensor:
    """Waves of nine and eleven pixels, of unit amplitude."""
    y, x = raster(SHAPE)
    return torch.sin(2 * math.pi * x / 9) * torch.sin(2 * math.pi * y / 11)


LEVEL = torch.tensor([0.1, 0.05, 0.02, 0.01]).reshape(4, 1, 1)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def test_noise_goes_and_edges_stay() -> None:
    truth, mask = tissues()
    found = guide(truth + LEVEL * noise(4, *SHAPE), mask)
    assert float(found[:, ~mask].abs().max()) == 0
    error = ((found - truth) / LEVEL)[:, mask]
    # Measured: 0.10 to 0.11 of the noise, the edges of the tissues and of the object included.
    assert float(error.square().mean(1).sqrt().max()) < 0.2
    assert float(error.mean(1).abs().max()) < 0.05
    assert float(error.abs().max()) < 1.5  # no pixel goes to another tissue, which is 5 to 10 away


@pytest.mark.parametrize("level", [0.5, 1.0])
def test_texture_is_given_back(level: float) -> None:
    truth, mask = tissues()
    waves = texture()
    parts = torch.tensor([0.3, 0.15, 0.05, 0.0]).reshape(4, 1, 1)
    seen = truth + parts * waves * mask + level * LEVEL * noise(4, *SHAPE, seed=5)
    found = guide(seen, mask)
    rest, before = (found - truth)[:, mask], (seen - truth)[:, mask]
    wave = waves[mask]
    # Measured: 0.99 and 0.96, against 0.95 and 0.83 with its noise.
    kept = correlation(rest[0], wave)
    assert kept > (0.97 if level < 1 else 0.92)
    assert kept > correlation(before[0], wave)
    # Its amplitude: 0.97 and 0.93.
    assert float((rest[0] * wave).sum() / (0.3 * wave.square().sum())) > 0.85
    # The coefficients without texture are not disturbed.
    assert float((rest[3] / (level * LEVEL[3])).square().mean().sqrt()) < 0.3


def test_where_there_is_no_texture_nothing_is_given_back() -> None:
    truth, mask = tissues()
    _, x = raster(SHAPE)
    fine = 0.3 * texture() * mask * (x > 60)
    smooth_side = disc(SHAPE, 40) & (x < 38)
    white = LEVEL * noise(4, *SHAPE, seed=6)
    half = truth.clone()
    half[0] += fine

    def noise_left(images: Tensor) -> Tensor:
        return ((guide(images + white, mask) - images) / LEVEL)[:, smooth_side].square().mean(1).sqrt()

    plain, beside = noise_left(truth), noise_left(half)
    # Measured: 0.10 to 0.11 for both.
    assert float(plain.max()) < 0.15
    assert float((beside - plain).max()) < 0.03


def test_a_scale_goes_through() -> None:
    truth, mask = tissues()
    images = truth + LEVEL * noise(4, *SHAPE)
    plain = guide(images, mask)
    # A power of two changes no digit.
    for scale in (2.0**-30, 2.0**40):
        assert torch.equal(guide(scale * images, mask), scale * plain)
    # Nor does the unit of a single coefficient: all count in units of their noise.
    units = torch.tensor([1.0, 2.0**10, 2.0**-10, -1.0]).reshape(4, 1, 1)
    assert torch.equal(guide(units * images, mask), units * plain)


def test_without_noise_nothing_changes() -> None:
    truth, mask = tissues()
    # Nothing is alike but what is equal, whose mean it is.
    torch.testing.assert_close(guide(truth, mask), truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (9, 1), (7, 6)], ids=str)
def test_of_nothing_comes_nothing(shape: tuple[int, int]) -> None:
    assert float(guide(torch.zeros((3, *shape)), everywhere(shape)).abs().max()) == 0


@pytest.mark.parametrize(
    ("shape", "place"), [((1, 1), (0, 0)), ((9, 8), (4, 3)), ((9, 8), (0, 7)), ((2, 2), (1, 0))], ids=str
)
def test_one_pixel_is_itself(shape: tuple[int, int], place: tuple[int, int]) -> None:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[place] = True
    images = noise(3, *shape)
    torch.testing.assert_close(guide(images, mask), images * mask)


@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (2, 25), (3, 4)], ids=str)
def test_lines_are_filtered_as_well(shape: tuple[int, int]) -> None:
    images = 5 + noise(2, *shape)
    found = guide(images, everywhere(shape))
    assert bool(torch.isfinite(found).all())
    assert float((found - 5).square().mean()) < float((images - 5).square().mean())
