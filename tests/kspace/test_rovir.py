"""Region-optimised virtual coils: what lies in the region is kept, what lies around it is not.

Letters: R readouts, C coils, V virtual coils, S samples, Y X pixels.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kspace.spirals import complex_normal, rotated_spiral
from whorl.kspace.coils import compression_matrix
from whorl.kspace.rovir import LowResolution, low_resolution_images, region_energies, rovir_matrix

C, SHAPE = 6, (60, 51)
#: Points in pixels from the centre (x, y), their signals and their places: two within the field of view, one
#: beyond its right edge, which would fold to the left.
PLACES = torch.tensor([[-10.0, 4.0], [6.0, -13.0], [40.0, 8.0]])
SIGNALS = torch.tensor([1.0 + 0.5j, -0.8j, 2.0])


def sensitivities() -> Tensor:
    """`(C, 3)`: what the coils see of the points; no two are alike."""
    return complex_normal(C, 3, seed=3)


def spirals(n_readouts: int = 48) -> Tensor:
    return rotated_spiral(n_readouts, 300, 3)  # (R, S, 2)


def measured(points: Tensor, sources: Tensor) -> Tensor:
    """Readouts `(R, C, S)`, each with a signal of its own, one of them next to none, by the direct sum."""
    waves = torch.exp(-2j * math.pi * (points.double() @ PLACES.double().T))  # (R, S, P)
    signal = complex_normal(len(points), 1, 1, seed=5)
    signal[min(7, len(points) - 1)] *= 1e-3
    return (signal * torch.einsum("cp,rsp->rcs", sources.to(waves.dtype), waves)).to(torch.complex64)


def share_of(x: float, y: float) -> tuple[float, float]:
    return (x + SHAPE[1] // 2 + 0.5) / SHAPE[1], (y + SHAPE[0] // 2 + 0.5) / SHAPE[0]


def test_points_show_where_they_are_and_as_the_coils_see_them() -> None:
    seen = sensitivities()
    points = spirals()
    for number in range(3):
        source = torch.zeros(C, 3, dtype=torch.complex64)
        source[:, number] = seen[:, number]
        low = low_resolution_images(measured(points, source), points, SHAPE)
        assert low is not None
        power = low.images.abs().square().sum(0)
        row, column = divmod(int(power.argmax()), power.shape[1])
        x, y = share_of(*PLACES[number].tolist())
        pixel = float(low.x[1] - low.x[0])
        # Within half a pixel, and a bit for the mask of the trajectory.
        assert abs(float(low.x[column]) - x) < 0.6 * pixel
        assert abs(float(low.y[row]) - y) < 0.6 * pixel
        at = low.images[:, row, column]
        overlap = (at.conj() * seen[:, number]).sum().abs() / at.norm() / seen[:, number].norm()
        assert float(overlap) > 0.9999  # float32 and NUFFT
        # Little of it where it is not: Hann's side lobes, and the cells of k-space that nothing has sampled.
        far = (low.y[:, None] - y).abs().maximum((low.x - x).abs()) > 3 * pixel
        assert float(power[far].max() / power.max()) < 0.2**2


def test_too_few_readouts_for_a_wide_field_are_refused() -> None:
    points = spirals()[::24]
    assert low_resolution_images(measured(points, sensitivities()), points, SHAPE) is None


def test_readouts_that_never_see_the_centre_have_images() -> None:
    points = spirals()
    kspace = measured(points, sensitivities())
    away = torch.linalg.vector_norm(points[0], dim=-1) > 1.5 / 2 / 51
    low = low_resolution_images(kspace[..., away], points[:, away], SHAPE)
    assert low is None or bool(torch.isfinite(low.images.abs()).all())
    nothing = low_resolution_images(torch.zeros_like(kspace), points, SHAPE)
    assert nothing is not None
    assert not nothing.images.any()


def test_what_lies_outside_is_suppressed_and_the_region_kept() -> None:
    seen, points = sensitivities(), spirals()
    kspace = measured(points, seen * SIGNALS) + 1e-3 * complex_normal(len(points), C, 300, seed=8)
    low = low_resolution_images(kspace, points, SHAPE)
    assert low is not None
    matrix = rovir_matrix(*region_energies(low, (0, 1, 0, 1)), 2)
    product = matrix @ matrix.mH
    assert matrix.shape == (2, C)
    assert float((product - torch.eye(2)).abs().max()) < 1e-5  # float32 rounding
    inside, outside = matrix @ seen[:, :2], matrix @ seen[:, 2]
    svd = compression_matrix(kspace, 2)
    # The stronger signal beyond the edge is one of the two that are the strongest.
    assert float((svd @ seen[:, 2]).norm() / seen[:, 2].norm()) > 0.9
    assert float(outside.norm() / seen[:, 2].norm()) < 0.1
    # Both points of the region can still be told apart, with most of what is orthogonal to the interference.
    away = seen[:, 2:] / seen[:, 2:].norm()
    possible = seen[:, :2] - away @ (away.mH @ seen[:, :2])
    assert float(torch.linalg.svdvals(inside)[-1]) > 0.9 * float(torch.linalg.svdvals(possible)[-1])


def test_a_region_within_the_field_of_view() -> None:
    seen, points = sensitivities(), spirals()
    low = low_resolution_images(measured(points, seen * SIGNALS), points, SHAPE)
    assert low is not None
    x, y = share_of(*PLACES[0].tolist())
    left = rovir_matrix(*region_energies(low, (0.0, 0.5, 0.5, 1.0)), 1)[0]
    assert 0 < x < 0.5 < y < 1
    gains = (left @ seen).abs() / seen.norm(dim=0)
    # Six coils can be blind for two points.
    assert float(gains[1:].max()) < 0.15
    x1, y1 = share_of(*PLACES[1].tolist())
    other = rovir_matrix(*region_energies(low, (0.5, 1.0, 0.0, 0.5)), 1)[0]
    assert x1 > 0.5 > y1
    gains = (other @ seen).abs() / seen.norm(dim=0)
    assert float(gains[[0, 2]].max()) < 0.15


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_as_many_as_the_energy_of_the_region_needs(energy: float) -> None:
    images = complex_normal(C, 40, seed=1) * torch.logspace(0, -2, C)[:, None]
    around = complex_normal(C, 30, seed=2)
    inside, outside = images @ images.mH, around @ around.mH
    matrix = rovir_matrix(inside, outside, energy=energy)
    kept = torch.einsum("vc,cd,vd->v", matrix, inside, matrix.conj()).real
    total = float(inside.diagonal().real.sum())
    assert float(kept.sum()) >= energy * total * (1 - 1e-5)
    assert len(matrix) == 1 or float(kept[:-1].sum()) < energy * total
    whole = rovir_matrix(inside, outside, C)
    ratio = (
        torch.einsum("vc,cd,vd->v", whole, inside, whole.conj()).real
        / torch.einsum("vc,cd,vd->v", whole, outside, whole.conj()).real
    )
    assert float(ratio[0]) == pytest.approx(float(ratio.max()))  # no other has a better one
    torch.testing.assert_close(whole[: len(matrix)], matrix)


def test_without_interference_the_strongest_come_first() -> None:
    images = complex_normal(C, 40, seed=1) * torch.logspace(0, -2, C)[:, None]
    inside = images @ images.mH
    ours = rovir_matrix(inside, torch.zeros_like(inside), 2)
    theirs = compression_matrix(images, 2)
    # The same directions up to a phase (float32 rounding).
    overlap = (ours @ theirs.mH).abs()
    assert float((overlap - torch.eye(2)).abs().max()) < 1e-3
    nothing = rovir_matrix(torch.zeros_like(inside), torch.zeros_like(inside), 2)
    assert nothing.shape == (2, C)


def test_one_pixel_around_the_region_counts_on_neither_side() -> None:
    places = torch.arange(8) / 8 + 1 / 16
    images = torch.zeros(1, 8, 8, dtype=torch.complex64)
    images[0, 2] = torch.arange(8) + 1.0  # a line of its own, along x
    low = LowResolution(images, places, places)
    inside, outside = region_energies(low, (0.25, 0.5, 0.25, 0.5))
    assert float(inside.real) == 3**2 + 4**2
    assert float(outside.real) == 1 + 6**2 + 7**2 + 8**2
