"""Object mask: all of the object, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whorl.recon.mask import box_around, object_mask, widen

ONE = torch.ones(1)
SHAPES = pytest.mark.parametrize("shape", [(64, 48), (51, 63)], ids=str)


def distance(shape: tuple[int, int], y: float = 0.0, x: float = 0.0) -> Tensor:
    """Pixels from a place `(y, x)` off the centre."""
    rows, columns = (torch.arange(n, dtype=torch.float32) - n // 2 for n in shape)
    return torch.hypot(rows[:, None] - y, columns[None, :] - x)


@SHAPES
@pytest.mark.parametrize("signal", [0.0, 0.05], ids=["empty hole", "weak hole"])
def test_a_disc_with_a_hole_is_a_disc(shape: tuple[int, int], signal: float) -> None:
    r = distance(shape, -2, 3)
    object_, hole = r < 17, distance(shape, 2, 5) < 6
    image = torch.where(object_, 1.0, 0.0) * torch.where(hole, signal, 1.0)
    phase = torch.polar(torch.ones(shape), 0.2 * r)
    noise = torch.randn((3, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.complex64)
    coefficients = torch.stack([image, -0.3 * image, 0.1 * image]) * phase + 0.01 * noise
    mask = object_mask(coefficients, torch.tensor([1.0, 0.1, 0.01]))
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    assert bool(mask[r < 16].all())
    # The threshold of 12 % lies less than 2 pixels out on an edge that is smoothed by 1.5.
    assert not bool(mask[r > 19.5].any())


@SHAPES
def test_weak_components_full_of_noise_do_not_count(shape: tuple[int, int]) -> None:
    r = distance(shape)
    noise = torch.randn((6, *shape), generator=torch.Generator().manual_seed(2), dtype=torch.complex64)
    coefficients = 1.2 * noise
    coefficients[0] = torch.where(r < 15, 1.0, 0.0)
    mask = object_mask(coefficients, torch.tensor([1.0, *[1e-3] * 5]))
    assert bool(mask[r < 14].all())
    assert not bool(mask[r > 17.5].any())
    # The weights are used: as strong as the first one, they hide the object.
    assert bool(object_mask(coefficients, torch.ones(6))[r > 17.5].any())


def test_without_energy_a_component_says_nothing() -> None:
    r = distance((64, 48))
    strange = torch.full((64, 48), torch.finfo(torch.float32).max ** 0.25)
    images = torch.stack([torch.where(r < 15, 1.0, 0.0), strange]) * (1 + 0j)
    assert torch.equal(object_mask(images, torch.tensor([1.0, 0.0])), object_mask(images[:1], ONE))


@pytest.mark.parametrize("floor", [0.05, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("shape", [(64, 48), (51, 63), (128, 120)], ids=str)
def test_noise_does_not_fill_the_field_of_view(shape: tuple[int, int], floor: float) -> None:
    r = distance(shape, -2, 3)
    radius = shape[0] / 4
    noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(3), dtype=torch.complex64)
    mask = object_mask(torch.where(r < radius, 1.0, 0.0) + floor * noise, ONE)
    assert bool(mask[r < radius - 1].all())
    # Smoothed over 1.5 pixels, noise of 0.3 is 0.27 ± 0.03 of the object; its level is 0.35 at most.
    assert float(mask[r > radius + 3].float().mean()) < 2e-3


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("part", [1.0, 0.5], ids=["all", "half"])
def test_an_object_up_to_the_edge_is_no_air(part: float, floor: float) -> None:
    shape = (64, 48)
    noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(4), dtype=torch.complex64)
    edge = round(part * shape[1])
    mask = object_mask((torch.arange(shape[1]) < edge) + floor * noise, ONE)
    # The opening rounds the corners off.
    assert int((~mask[:, : edge - 1]).sum()) <= 4
    assert not bool(mask[:, edge + 3 :].any())


def test_aliasing_counts_as_air() -> None:
    """Side lobes all around, a quarter of the object: stronger than the lowest level."""
    r = distance((64, 48))
    waves = 0.25 * torch.cos(1.3 * r) * (r > 18)
    mask = object_mask((torch.where(r < 15, 1.0, 0.0) + waves)[None] * (1 + 0j), ONE)
    assert bool(mask[r < 14].all())
    assert not bool(mask[r > 19].any())


def test_scale_does_not_matter_and_parameters_do() -> None:
    r = distance((64, 48))
    image = torch.where(r < 15, 1.0, 0.0)[None] * (1 + 0j)
    mask = object_mask(image, ONE)
    assert torch.equal(object_mask(image * 3e-5j, ONE), mask)
    assert int(object_mask(image, ONE, sigma=4.0).sum()) > int(mask.sum())


def test_two_objects_stay_two() -> None:
    left, right = distance((64, 48), 0, -12) < 7, distance((64, 48), 0, 12) < 7
    mask = object_mask((left | right)[None] * (1 + 0j), ONE)
    assert bool(mask[left].all())
    assert bool(mask[right].all())
    assert not bool(mask[:, 24].any())


def test_specks_are_not_objects() -> None:
    image = (distance((64, 48)) < 15) * (1 + 0j)
    image[3, 4] = 1.2  # a single pixel, below the threshold once it is smoothed
    assert not bool(object_mask(image[None], ONE)[:6, :8].any())


def test_an_object_may_reach_the_edge() -> None:
    mask = object_mask(torch.ones((1, 40, 31), dtype=torch.complex64), ONE)
    # The opening rounds the four corners off.
    assert int((~mask).sum()) <= 4


def test_nothing_has_no_mask() -> None:
    assert not bool(object_mask(torch.zeros((2, 20, 17), dtype=torch.complex64), torch.ones(2)).any())


@pytest.mark.parametrize("pixels", [1, 2, 5])
def test_widening_goes_so_many_steps(pixels: int) -> None:
    mask = torch.zeros((20, 17), dtype=torch.bool)
    mask[9, 7] = True
    rows, columns = torch.arange(20)[:, None] - 9, torch.arange(17)[None, :] - 7
    assert torch.equal(widen(mask, pixels), rows.abs() + columns.abs() <= pixels)


def test_the_box_is_the_smallest() -> None:
    mask = torch.zeros((20, 17), dtype=torch.bool)
    mask[3, 5] = mask[9, 5] = mask[4, 16] = True
    assert box_around(mask) == (slice(3, 10), slice(5, 17))
