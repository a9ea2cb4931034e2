"""Too few readouts are told by the protocol alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from whorl.recon.calibration import few_readouts, fillings


def archimedean(arms: int, turns: float, samples: int = 2000) -> Tensor:
    """`(I, S, 2)`: arms whose turns lie 0.5 / turns cycles per pixel apart."""
    t = torch.linspace(0, 1, samples)
    angle = 2 * math.pi * (turns * t + torch.arange(arms)[:, None] / arms)
    return 0.5 * t[:, None] * torch.stack([angle.cos(), angle.sin()], -1)


@pytest.mark.parametrize("readouts", [16, 40])
@pytest.mark.parametrize(("arms", "turns", "n_pixels"), [(16, 4, 128), (8, 16, 256), (32, 1, 64)])
def test_an_even_spiral_is_filled_by_the_arms_that_it_is_made_of(
    arms: int, turns: float, n_pixels: int, readouts: int
) -> None:
    # A turn moves outwards by 0.5 / turns cycles per pixel; the arms between fill it if they are one cycle
    # per field of view apart.
    needed = 0.5 / turns * n_pixels
    found = fillings(archimedean(arms, turns), n_pixels, readouts)
    assert found == pytest.approx(readouts / needed, rel=0.01)
    # Turned the other way, and whatever its first sample.
    mirrored = archimedean(arms, turns) * torch.tensor([1.0, -1.0])
    assert fillings(mirrored, n_pixels, readouts) == pytest.approx(found, rel=1e-3)


def test_few_readouts_are_named_and_enough_are_not() -> None:
    points = archimedean(16, 4)  # 16 arms fill k-space of 128 pixels
    assert few_readouts(points, 128, 16 * 5, 9) == ""
    sentence = few_readouts(points, 128, 16 * 3, 9)
    assert sentence.startswith(
        "48 readouts fill k-space 3.0 times, for 9 coefficients: expected 4.2 times or more"
    )
    assert few_readouts(points, 128, 16 * 3, 6) == ""


@pytest.mark.parametrize("samples", [1, 2, 50])
def test_what_has_no_turns_says_nothing(samples: int) -> None:
    line = torch.stack([torch.linspace(0, 0.5, samples), torch.zeros(samples)], -1)[None]
    assert fillings(line, 128, 10) == math.inf
    assert few_readouts(line, 128, 10, 9) == ""
