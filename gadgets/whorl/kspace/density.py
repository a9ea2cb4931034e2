"""Density compensation: the area of k-space that each sample stands for.

Letters: I interleaves, S samples.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Rings in which attached weights are looked at, and the samples of an interleaf that the innermost one has.
_RINGS, _FEWEST = 5, 8
#: Rings by which weights can be judged: an apodisation is level up to an eighth of the radius, not a quarter.
_JUDGED = 4
#: How much more weight than area the centre may have, and any ring compared with those inside it.
_LEVEL = 1.25
_TINY = 1e-30


def ring_areas(radius: Tensor) -> Tensor:
    """Area of the ring around each sample of a spiral, `π (r²_{s+½} - r²_{s-½})`.

    For I equal rotations of one interleaf a sample owns this area divided by I: exact, whatever
    the spiral's density. The first ring begins at the centre, the last reaches half a step out.

    Parameters
    ----------
    radius
        `(..., S)` distance of the samples from the centre of k-space, in cycles per pixel.

    Returns
    -------
    Tensor
        `(..., S)` in (cycles per pixel)², not negative.
    """
    middle = (radius[..., 1:] + radius[..., :-1]) / 2
    first = torch.zeros_like(radius[..., :1])
    last = (1.5 * radius[..., -1:] - 0.5 * radius[..., -2:-1]).clamp_min(0)
    edge = torch.cat([first, middle, last], dim=-1)
    return (np.pi * (edge[..., 1:] ** 2 - edge[..., :-1] ** 2)).clamp_min(0)


def is_rotated_spiral(trajectory: Tensor, tolerance: float = 0.02) -> bool:
    """Whether all interleaves have one radius over time, going outwards, at evenly spread angles.

    Parameters
    ----------
    trajectory
        `(I, S, 2)` in cycles per pixel.
    tolerance
        Deviation that is still taken as equal, relative to the largest radius.
    """
    radius = torch.linalg.vector_norm(trajectory, dim=-1)
    largest = float(radius.max())
    same = float((radius - radius.mean(0)).abs().max()) < tolerance * largest
    outwards = float(torch.diff(radius.mean(0)).min()) > -tolerance * largest / 10
    angle = torch.atan2(trajectory[:, -1, 1], trajectory[:, -1, 0]) % (2 * np.pi)
    angle = torch.sort(angle).values
    gaps = torch.diff(angle, append=angle[:1] + 2 * np.pi)
    # Of few interleaves none may be missing. Of many some may, or lie close together.
    widest = max(6 * np.pi / len(angle), np.pi / 8) if len(angle) >= 16 else 3 * np.pi / len(angle)
    even = len(angle) > 1 and float(gaps.max()) < widest
    return same and outwards and even


def density_compensation(trajectory: Tensor, shape: tuple[int, int]) -> Tensor:
    """Weights so that one full set of interleaves covers each area of k-space once.

    Rotated spirals get their exact rings, anything else Pipe and Menon's iteration (SigPy),
    scaled so that the weights add up to the disc that the samples span.

    Parameters
    ----------
    trajectory
        `(I, S, 2)` in cycles per pixel.
    shape
        (Y, X) of the image, for the iteration's kernel.

    Returns
    -------
    Tensor
        `(I, S)` float32 in (cycles per pixel)²; the adjoint of ones has the value of the covered
        area at its centre.

    References
    ----------
    Pipe & Menon, Magn Reson Med 41:179 (1999),
    doi:10.1002/(SICI)1522-2594(199901)41:1<179::AID-MRM25>3.0.CO;2-V.
    Rings: each sample owns the area up to half-way to its neighbours, which is exact for rotations.
    """
    I = len(trajectory)  # noqa: E741 - the field's letter
    radius = torch.linalg.vector_norm(trajectory, dim=-1)
    if is_rotated_spiral(trajectory):
        return ring_areas(radius.mean(0)).expand(I, -1) / I
    from sigpy.mri import pipe_menon_dcf

    scale = np.array([shape[0], shape[1]], dtype=np.float32)
    coord = trajectory.flip(-1).cpu().numpy() * scale
    weights = torch.as_tensor(np.asarray(pipe_menon_dcf(coord, shape, max_iter=30, show_pbar=False)).real)
    weights = weights.to(trajectory).clamp_min(0)
    return weights * (np.pi * float(radius.max()) ** 2 / float(weights.sum()))


def attached_density(weights: Tensor, trajectory: Tensor) -> Tensor:
    """Density weights that came with the trajectory, in the scale of `density_compensation`.

    They suit the trajectory if they add up to the area of k-space in each ring around its centre, one octave
    wide, as an apodisation allows: level at the centre, and not rising towards the edge. With W, the sum of
    the weights in a ring over its area, neither the innermost W over the next one ("centre") nor any W over
    the smallest one inside it ("rise") may exceed 1.25. Calibrated on spirals of uniform and variable
    density (64² to 320², 16 to 96 interleaves), Archimedean ones at constant angular and constant linear
    velocity, and spokes:

    ==========================================  ============  ============
    weights                                     centre        rise
    ==========================================  ============  ============
    areas: exact, Pipe-Menon, Voronoi, Meyer    0.95 to 1.02  1.00 to 1.07
    areas times Hann, Hamming or Gauss          0.97 to 1.12  0.90 to 1.03
    k/kmax where the areas go as k              0.99 to 1.00  1.00 to 1.02
    k/kmax, spirals limited by the slew rate    0.72 to 0.94  1.40 to 2.95
    k/kmax, radius as t^1.5 or t²               1.37 to 1.63  0.71 to 0.80
    constant (a kz), or random                  2.26 to 7.2   0.36 to 0.71
    square roots of the areas                   1.38 to 2.16  0.60 to 0.84
    Voronoi cells that are open at the edge     0.96 to 1.00  1.1 to 125
    ==========================================  ============  ============

    Where the areas are all alike (constant linear velocity) a constant suits, and is accepted. What has less
    than eight samples of an interleaf within an eighth of the radius is not judged.

    Parameters
    ----------
    weights
        `(I, S)`, any positive scale.
    trajectory
        `(I, S, 2)` in cycles per pixel.

    Raises
    ------
    ValueError
        If a weight is negative or not a number, all are 0, or they do not suit the trajectory.
    """
    why = ""
    if not bool(torch.isfinite(weights).all()):
        why = "are not all finite"
    elif float(weights.min()) < 0 or not float(weights.max()) > 0:
        why = f"go from {float(weights.min()):g} to {float(weights.max()):g}, expected positive numbers"
    else:
        weights = weights / weights.max()  # sums of any unit are numbers
        why = _unsuited(weights, trajectory)
    if why:
        raise ValueError(
            f"the density weights in the third trajectory column {why}. If it is none, set density=computed"
        )
    radius = torch.linalg.vector_norm(trajectory, dim=-1)
    return weights * (np.pi * float(radius.max()) ** 2 / float(weights.sum()))


def _unsuited(weights: Tensor, trajectory: Tensor) -> str:
    """Why weights `(I, S)` are none for this trajectory; empty if they can be."""
    level = ring_levels(weights, trajectory)
    if len(level) < _JUDGED:
        return ""
    at_centre = _ratio(level[0], level[1])
    rise = max(_ratio(outer, min(level[: n + 1])) for n, outer in enumerate(level[1:]))
    if max(at_centre, rise) <= _LEVEL:
        return ""
    return (
        f"do not suit it: for the same area they weigh the middle of k-space {at_centre:.2g} times as much "
        f"as what is around it, and some ring {rise:.2g} times as much as one inside it; expected at most "
        f"{_LEVEL:g}"
    )


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else np.inf if above > 0 else 1.0


def ring_levels(weights: Tensor, trajectory: Tensor) -> list[float]:
    """Sum of the weights over area in rings around the centre of k-space, from the centre outwards.

    The outermost ring reaches from half of the radius to the edge, the next one from a quarter to half, as
    long as there are eight samples of each interleaf in what is left, and at most to a sixteenth.

    Parameters
    ----------
    weights
        `(I, S)`, not negative.
    trajectory
        `(I, S, 2)`; its area may be an ellipse.
    """
    edge = trajectory.abs().amax((0, 1)).clamp_min(_TINY)
    radius = torch.linalg.vector_norm(trajectory / edge, dim=-1)
    limits = [1.0]
    while len(limits) < _RINGS and int((radius < limits[-1] / 2).sum()) >= _FEWEST * len(radius):
        limits.append(limits[-1] / 2)
    levels = []
    for inner, outer in zip([0.0, *limits[:0:-1]], limits[::-1], strict=True):
        # The outermost samples belong to the last ring, the corners of a grid to none.
        inside = (radius >= inner) & (radius < outer + (outer == 1) * 1e-5)
        levels.append(float(weights[inside].double().sum()) / (outer**2 - inner**2))
    return levels
