"""Density compensation: rings, the general method, and which of them is taken.

Letters: I interleaves, S samples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull, Voronoi
from sigpy.mri import pipe_menon_dcf
from torch import Tensor

from whorl.kspace.density import (
    attached_density,
    density_compensation,
    is_rotated_spiral,
    ring_areas,
    ring_levels,
)
from whorl.kspace.nufft import make_nufft
from whorl.simulation.spiral import design_spiral


def as_designed(matrix: int, interleaves: int) -> Tensor:
    """`(I, S, 2)`: a spiral that a gradient system can play."""
    design = design_spiral(matrix=matrix, interleaves=interleaves, dwell_us=10.0)
    return torch.from_numpy(design.cycles_per_pixel(300 / matrix)).float()


def spiral(
    I: int = 13,  # noqa: E741 - the field's letter
    S: int = 201,
    *,
    edge: float = 0.45,
    turns: float = 4.0,
    power: float = 1.0,
    step_deg: float | None = None,
) -> Tensor:
    """`(I, S, 2)`: an Archimedean arm (or one of varying density), rotated."""
    along = torch.linspace(0, 1, S)
    step = 2 * np.pi / I if step_deg is None else np.deg2rad(step_deg)
    angle = 2 * np.pi * turns * along + step * torch.arange(I)[:, None]
    return edge * (along**power)[:, None] * torch.stack([angle.cos(), angle.sin()], dim=-1)


def spokes(I: int, S: int) -> Tensor:  # noqa: E741 - the field's letter
    """`(I, S, 2)`: full diameters, evenly spread over half a turn; no sample in the centre."""
    angle = np.pi * torch.arange(I) / I
    along = (torch.arange(S) + 0.5) / S - 0.5
    return along[None, :, None] * torch.stack([angle.cos(), angle.sin()], dim=-1)[:, None]


@pytest.mark.parametrize("power", [1.0, 1.7, 0.6])
@pytest.mark.parametrize("I", [2, 13])
def test_rings_fill_the_disc(I: int, power: float) -> None:  # noqa: E741 - the field's letter
    arms = spiral(I, power=power)
    weights = density_compensation(arms, (20, 31))
    assert weights.shape == arms.shape[:2]
    radius = torch.linalg.vector_norm(arms[0], dim=-1).double()
    outer = float(1.5 * radius[-1] - 0.5 * radius[-2])
    assert float(weights.double().sum()) == pytest.approx(np.pi * outer**2, rel=1e-5)  # float32 rounding
    # Each ring goes half-way to its neighbours and is shared by I arms.
    s = 57
    inner, outer = float(radius[s - 1] + radius[s]) / 2, float(radius[s] + radius[s + 1]) / 2
    expected = np.pi * (outer**2 - inner**2) / I
    np.testing.assert_allclose(weights[:, s], expected, rtol=1e-3)  # float32 difference of two squares
    assert float(weights.min()) >= 0


def test_rings_of_plain_numbers() -> None:
    areas = ring_areas(torch.tensor([[0.0, 1.0, 2.0, 4.0]], dtype=torch.float64))
    expected = np.pi * np.array([[0.25, 2.25 - 0.25, 9 - 2.25, 25 - 9]])
    np.testing.assert_allclose(areas.numpy(), expected, rtol=1e-14)


def test_rings_are_never_negative() -> None:
    radius = torch.tensor([0.0, 0.1, 0.09, 0.2, 0.3, 0.25])  # an arm that stumbles
    assert float(ring_areas(radius).min()) >= 0


def test_half_spokes_weigh_as_their_radius() -> None:
    # From the centre outwards a spoke is a rotated arm: an area in proportion to |k|, exactly.
    arms = spiral(16, 50, turns=0.0)
    weights = density_compensation(arms, (32, 32))
    radius = torch.linalg.vector_norm(arms, dim=-1)
    ratio = (weights / radius)[:, 1:-1]
    assert float(ratio.max() / ratio.min()) == pytest.approx(1, abs=1e-3)  # float32 difference of squares


def test_spokes_weigh_as_their_radius() -> None:
    arms = spokes(24, 33)
    assert not is_rotated_spiral(arms)
    weights = density_compensation(arms, (32, 36))
    assert float(weights.min()) >= 0
    radius = torch.linalg.vector_norm(arms, dim=-1)
    middle = (radius > 0.1) & (radius < 0.4)
    ratio = (weights / radius)[middle]
    # The iteration sees density through its kernel only: within it, near the centre and the rim, it differs.
    assert float(ratio.std() / ratio.mean()) < 0.1
    # By area, each half of 24 diameters owns |k| dk π / 24. The sum is right, but the rim takes a tenth
    # of it: it has nothing beyond.
    assert float(ratio.mean()) == pytest.approx(np.pi / 24 / 33, rel=0.15)


def test_constant_on_a_grid() -> None:
    n = 33
    k = (torch.arange(n) - n // 2) / 32 * 0.9
    grid = torch.stack(torch.broadcast_tensors(k[None, :], k[:, None]), dim=-1)  # lines of a grid as arms
    weights = density_compensation(grid, (36, 36))
    inside = weights[5:-5, 5:-5]
    assert float(inside.std() / inside.mean()) < 0.02  # what the kernel's lattice leaves; measured 0.005
    assert float(weights.min()) >= 0


def test_the_general_method_agrees_with_the_rings() -> None:
    exact = spiral(16, 160, turns=1.5)
    radius = torch.linalg.vector_norm(exact, dim=-1)
    rings = ring_areas(radius.mean(0)).expand(16, -1) / 16
    # An arm that runs inwards is sampled at the same places, but not as a rotated spiral.
    turned = exact.clone()
    turned[3] = turned[3].flip(0)
    assert is_rotated_spiral(exact)
    assert not is_rotated_spiral(turned)
    general = density_compensation(turned, (44, 48))
    general[3] = general[3].flip(0)
    interior = (radius > 0.08) & (radius < 0.38)
    ratio = (general / rings)[interior]
    assert float(ratio.std() / ratio.mean()) < 0.08  # ripples with the distance between the turns
    assert float(ratio.mean()) == pytest.approx(1, abs=0.15)  # the rim takes a tenth of the whole
    assert float(general.min()) >= 0


def test_the_point_spread_is_that_of_the_disc() -> None:
    shape = (26, 21)
    arms = spiral(9, 200, edge=0.5, turns=3.0)
    weights = density_compensation(arms, shape).reshape(1, -1)
    nufft = make_nufft(arms.reshape(-1, 2), shape)
    spread = nufft.adjoint(weights.to(torch.complex64))[0]
    assert int(spread.abs().argmax()) == 13 * 21 + 10
    # The covered area, which reaches half a step of 0.5 / 199 beyond the disc; the NUFFT's 1e-4.
    assert complex(spread[13, 10]) == pytest.approx(np.pi / 4 * (1 + 0.5 / 199) ** 2, abs=3e-4)
    y, x = (torch.arange(n) - n // 2 for n in shape)
    blob = torch.exp(-(y[:, None] ** 2 + x**2) / (2 * 2.5**2)).to(torch.complex64)
    back = nufft.adjoint(nufft.forward(blob[None]) * weights)[0]
    # Unit gain: a Gauss of 2.5 pixels has nothing beyond the disc; 200 rings are a sum, not an integral.
    assert float((back - blob).abs().max()) < 5e-3


def test_the_general_method_covers_the_disc() -> None:
    arms = spiral(13, 201)
    arms[2] *= 0.8  # no longer one radius over time
    assert not is_rotated_spiral(arms)
    weights = density_compensation(arms, (31, 20))
    assert weights.shape == (13, 201)
    assert float(weights.double().sum()) == pytest.approx(np.pi * 0.45**2, rel=1e-4)
    assert float(weights.min()) >= 0


@pytest.mark.parametrize("axis", [0, 1], ids=["along x", "along y"])
def test_density_is_seen_on_the_scale_of_each_axis(axis: int) -> None:
    # Lines of a grid that lie twice as dense on one side, in a field of view that is four times as long
    # the other way. On that other scale the lines would be too far apart to know of each other.
    dense = torch.cat([torch.arange(-7, 0) / 16, torch.arange(0, 14) / 32])
    plain = torch.arange(-28, 28) / 64
    lines = torch.stack(torch.broadcast_tensors(dense[:, None], plain[None, :]), dim=-1)
    weights = density_compensation(
        lines if axis == 0 else lines.flip(-1), (64, 16) if axis == 0 else (16, 64)
    )
    ratio = float(weights[2:5, 8:-8].mean() / weights[11:17, 8:-8].mean())
    assert ratio == pytest.approx(2, rel=0.1)  # 1 if the axes were taken for each other


@pytest.mark.parametrize(
    ("arms", "yes"),
    [
        (spiral(13), True),
        (spiral(2), True),
        (spiral(13).flip(0), True),
        (spiral(13, step_deg=111.24), True),
        (spiral(13, power=2.0), True),
        (spiral(1), False),
        (spiral(13)[:, 20:].flip(1), False),
        (spiral(13, step_deg=360 / 26), False),
        (torch.cat([spiral(13)[:12], 0.9 * spiral(13)[12:]]), False),
        (spokes(12, 20), False),
        (spiral(13) + torch.tensor([0.03, 0.0]), False),
    ],
    ids=[
        "even",
        "two",
        "other order",
        "golden",
        "denser centre",
        "one arm",
        "inwards",
        "half a turn only",
        "one shorter arm",
        "diameters",
        "off centre",
    ],
)
def test_rotated_spiral(arms: Tensor, yes: bool) -> None:
    assert is_rotated_spiral(arms) is yes


def test_attached_weights_take_the_same_scale() -> None:
    arms = spiral(13)
    computed = density_compensation(arms, (20, 31))
    attached = attached_density(computed * 731.0, arms)
    assert attached.shape == computed.shape
    np.testing.assert_allclose(attached / attached[2, 7], computed / computed[2, 7], rtol=1e-5)
    # The last ring reaches half a step beyond the last sample: 1 / 200 of the area.
    np.testing.assert_allclose(attached, computed, rtol=0.01)
    radius = float(torch.linalg.vector_norm(arms, dim=-1).max())
    assert float(attached.double().sum()) == pytest.approx(np.pi * radius**2, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_attached_weights_must_be_positive(value: float) -> None:
    weights = torch.full((13, 201), 0.0 if value == 0 else 1.0)
    weights[4, 5] = value
    with pytest.raises(ValueError, match="density=computed"):
        attached_density(weights, spiral(13))


def radius_of(arms: Tensor) -> Tensor:
    return torch.linalg.vector_norm(arms, dim=-1)


def areas(arms: Tensor) -> Tensor:
    return ring_areas(radius_of(arms))


def meyer(arms: Tensor) -> Tensor:
    """Velocity along the radius times the radius (Meyer, Magn Reson Med 28:202, 1992)."""
    velocity = torch.gradient(arms, dim=1)[0]
    return (arms * velocity).sum(-1).abs()


def voronoi(arms: Tensor, beyond: float = 1.02) -> Tensor:
    """Cells of the samples, closed by a ring of points at a radius relative to the edge."""
    places = arms.reshape(-1, 2).double().numpy()
    places, back, count = np.unique(np.round(places, 7), axis=0, return_inverse=True, return_counts=True)
    edge = beyond * float(radius_of(arms).max()) * np.exp(2j * np.pi * np.arange(300) / 300)
    cells = Voronoi(np.concatenate([places, np.stack([edge.real, edge.imag], 1)]))
    size = [
        ConvexHull(cells.vertices[cells.regions[cells.point_region[n]]]).volume for n in range(len(places))
    ]
    return torch.from_numpy((size / count)[back.ravel()]).reshape(arms.shape[:2]).float()


def pipe_menon(arms: Tensor) -> Tensor:
    weights = pipe_menon_dcf(arms.flip(-1).numpy() * 64, (64, 64), max_iter=30, show_pbar=False)
    return torch.from_numpy(np.asarray(weights).real)


#: Spirals of a gradient system, dense in the middle and throughout; of constant angular and linear velocity.
ARMS: dict[str, Tensor] = {
    "variable density": as_designed(128, 24),
    "uniform density": as_designed(64, 16),
    "angular velocity": spiral(16, 200, edge=0.5),
    "linear velocity": spiral(12, 640, edge=0.5, power=0.5),
    "golden angle": spiral(30, 200, edge=0.5, step_deg=222.4922),
    "spokes": spokes(24, 128),
}
SENSIBLE: dict[str, Callable[[Tensor], Tensor]] = {
    "areas": lambda arms: density_compensation(arms, (64, 64)),
    "large": lambda arms: 1e30 * density_compensation(arms, (64, 64)),
    "small": lambda arms: 1e-30 * density_compensation(arms, (64, 64)),
    "Meyer": meyer,
    "Voronoi": voronoi,
    "Pipe and Menon": pipe_menon,
    "Hann": lambda arms: meyer(arms) * (1 + torch.cos(2 * np.pi * radius_of(arms))),
    "Gauss": lambda arms: meyer(arms) * torch.exp(-((radius_of(arms) / 0.3) ** 2)),
    "one byte": lambda arms: (255 * meyer(arms) / meyer(arms).max()).round(),
}
UNSUITED: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": lambda arms: torch.full(arms.shape[:2], 3.0),
    "kz of a tilted slice": lambda arms: 0.3 + arms[..., 0] * 0.2,
    "random": lambda arms: torch.rand(arms.shape[:2], generator=torch.Generator().manual_seed(0)),
    "square": lambda arms: meyer(arms) ** 2,
    "square root": lambda arms: meyer(arms).sqrt(),
    "inverse": lambda arms: 1 / meyer(arms).clamp_min(1e-9),
    "number of the arm": lambda arms: torch.arange(len(arms))[:, None].expand(arms.shape[:2]).float(),
}


@pytest.mark.parametrize("arms", ARMS)
@pytest.mark.parametrize("weights", SENSIBLE)
def test_sensible_weights_are_taken(arms: str, weights: str) -> None:
    taken = attached_density(SENSIBLE[weights](ARMS[arms]), ARMS[arms])
    assert torch.isfinite(taken).all()
    radius = float(radius_of(ARMS[arms]).max())
    assert float(taken.double().sum()) == pytest.approx(np.pi * radius**2, rel=1e-5)


@pytest.mark.parametrize("arms", ["variable density", "uniform density", "angular velocity", "golden angle"])
@pytest.mark.parametrize("weights", UNSUITED)
def test_weights_that_do_not_suit_the_trajectory_are_refused(arms: str, weights: str) -> None:
    with pytest.raises(ValueError, match="third trajectory column do not suit it"):
        attached_density(UNSUITED[weights](ARMS[arms]), ARMS[arms])


@pytest.mark.parametrize("arms", ["variable density", "uniform density", "linear velocity"])
def test_the_radius_is_a_weight_only_where_areas_go_with_it(arms: str) -> None:
    for suited in ("angular velocity", "spokes"):
        attached_density(radius_of(ARMS[suited]), ARMS[suited])
    with pytest.raises(ValueError, match="do not suit it"):
        attached_density(radius_of(ARMS[arms]), ARMS[arms])


def test_cells_that_are_open_at_the_edge_are_refused() -> None:
    with pytest.raises(ValueError, match="do not suit it"):
        attached_density(voronoi(ARMS["variable density"], beyond=3.0), ARMS["variable density"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-3])
def test_one_weight_that_cannot_be_is_enough(value: float) -> None:
    weights = areas(ARMS["variable density"])
    weights[3, 70] = value
    with pytest.raises(ValueError, match="set density=computed"):
        attached_density(weights, ARMS["variable density"])


def test_rings_have_their_level() -> None:
    """1 for exact areas (of an ellipse too, and of a grid with its corners), whatever the number of rings."""
    for arms in ARMS.values():
        levels = np.array(ring_levels(meyer(arms), arms))
        np.testing.assert_allclose(levels / levels[-2], 1, atol=0.1)  # samples of the innermost ring
        flat = arms * torch.tensor([1.0, 0.4])
        np.testing.assert_allclose(ring_levels(meyer(arms), flat), levels, rtol=1e-3)
    k = (torch.arange(64) - 31.5) / 64
    grid = torch.stack(torch.broadcast_tensors(k[None, :], k[:, None]), dim=-1)
    levels = np.array(ring_levels(torch.ones(64, 64), grid))
    np.testing.assert_allclose(levels / levels[0], 1, atol=0.06)  # cells that a circle cuts
    assert len(ring_levels(torch.ones(4, 10), spiral(4, 10))) == 1


@pytest.mark.parametrize("shape", [(24, 36), (36, 24)], ids=str)
def test_constant_on_the_grid_of_an_image_that_is_not_square(shape: tuple[int, int]) -> None:
    ky, kx = ((torch.arange(n, dtype=torch.float32) - n // 2) / n for n in shape)
    grid = torch.stack(torch.broadcast_tensors(kx[None, :], ky[:, None]), dim=-1)
    weights = density_compensation(grid, shape)
    inside = weights[6:-6, 6:-6]
    # One sample in each cell of the image's own raster; with the axes exchanged one of them falls outside it.
    assert float(inside.std() / inside.mean()) < 0.05
    assert float(weights.min()) >= 0


def test_spirals_that_run_inwards_get_the_same_areas() -> None:
    exact = spiral(16, 160, turns=1.5)
    inwards = exact.flip(1)
    # One radius, evenly spread, but rings are counted from the centre outwards.
    assert not is_rotated_spiral(inwards)
    general = density_compensation(inwards, (40, 40)).flip(1)
    rings = density_compensation(exact, (40, 40))
    radius = torch.linalg.vector_norm(exact, dim=-1)
    interior = (radius > 0.08) & (radius < 0.38)
    ratio = (general / rings)[interior]
    # As above: the iteration ripples by some per cent, and counts the edge differently.
    assert float((ratio / ratio.mean() - 1).abs().mean()) < 0.05
    assert float(ratio.mean()) == pytest.approx(1, abs=0.1)
