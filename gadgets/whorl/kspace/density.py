"""Density compensation: the area of k-space that each sample stands for.

Letters: I interleaves, S samples.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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

    Parameters
    ----------
    weights
        `(I, S)`, any positive scale.
    trajectory
        `(I, S, 2)` in cycles per pixel.

    Raises
    ------
    ValueError
        If a weight is negative or all are 0.
    """
    if float(weights.min()) < 0 or not float(weights.sum()) > 0:
        raise ValueError(
            "the density weights in the third trajectory column must be positive, "
            f"got {float(weights.min()):g} to {float(weights.max()):g}: use density=computed"
        )
    radius = torch.linalg.vector_norm(trajectory, dim=-1)
    return weights * (np.pi * float(radius.max()) ** 2 / float(weights.sum()))
