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


def told(points: Tensor, n_readouts: int, K: int = 9, *, order: str = "golden", n_coils: int = 8) -> str:
    """Of a train whose readouts go round the arms: quickly, or once in the whole train."""
    I, t = len(points), torch.arange(n_readouts)  # noqa: E741 - the field's letter
    turn = 2 * math.pi * t / n_readouts
    basis = torch.stack([torch.ones_like(turn), turn.cos()][: min(K, 2)], 1) / math.sqrt(n_readouts)
    basis = torch.cat([basis, torch.zeros(n_readouts, K - basis.shape[1])], 1).to(torch.complex64)
    arm = (t * 7) % I if order == "golden" else t * I // n_readouts
    gram = torch.zeros((I, K, K), dtype=torch.complex64)
    gram.index_add_(0, arm, basis[:, :, None] * basis[:, None])
    return few_readouts(gram, points, 128, n_readouts, 0.4 ** torch.arange(K), n_coils)


def test_few_readouts_are_named_and_enough_are_not() -> None:
    points = archimedean(16, 4)  # 16 arms fill k-space of 128 pixels
    assert told(points, 16 * 5) == ""
    sentence = told(points, 16 * 3)
    assert sentence.startswith(
        "48 readouts fill k-space 3.0 times, for 9 coefficients: expected 4.2 times or more"
    )
    assert told(points, 16 * 3, 6) == ""


def test_an_uneven_order_and_a_single_coil_need_more() -> None:
    points = archimedean(16, 4)
    sentence = told(points, 16 * 5, order="sequential")
    assert sentence.startswith(
        "80 readouts in an uneven order fill k-space 5.0 times, for 9 coefficients: expected 6.8 times"
    )
    assert told(points, 16 * 7, order="sequential") == ""
    assert "of a single coil fill k-space 5.0 times" in told(points, 16 * 5, n_coils=1)
    assert told(points, 16 * 7, n_coils=1) == ""


def test_coefficients_that_no_signal_needs_do_not_count() -> None:
    points = archimedean(16, 4)
    # Of 40 that fall by 0.4 each, 11 hold all but a share of 5e-5 of the energy.
    assert "for 11 coefficients" in told(points, 16 * 3, 40)
    assert told(points, 16 * 6, 40) == ""


@pytest.mark.parametrize("samples", [1, 2, 50])
def test_what_has_no_turns_says_nothing(samples: int) -> None:
    line = torch.stack([torch.linspace(0, 0.5, samples), torch.zeros(samples)], -1)[None]
    assert fillings(line, 128, 10) == math.inf
    assert told(line, 10) == ""
