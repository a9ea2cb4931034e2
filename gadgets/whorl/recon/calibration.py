"""Calibration: images in which the order of the interleaves leaves little trace, for coils, mask and phase.

An order that repeats slowly (sequential) gives each interleaf a share of the train of its own, and x0 bright
side lobes: coil maps and phase that are made of it are wrong. But the coefficients can be told apart within
each interleaf: ``F x`` of interleaf i, given its sum ``b_i = G_i F x + noise``, is
``(I G_i + μ diag(1/e))⁻¹ b_i`` for independent coefficients of energy e. Strong ones come out as from full
sampling, weak ones shrink, which biases maps but no calibration.

Letters: K coefficients, C coils, I interleaves, S samples, J leading coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: μ: noise energy of a coefficient relative to the first one's signal. Between 1e-4 and 1e-2 the coil maps
#: are alike.
_RIDGE = 1e-3
#: Fillings of k-space for each coefficient below which readouts are too few. Plate and brain of 256², T2
#: (rms): 0.59 5 and 3 %, 0.49 7 and 5 %, 0.45 13 and 7 %, 0.39 14 %, 0.26 31 %. An uneven order, or a single
#: coil, needs more: 0.6 19 and 16 %, or 38 and 13 %; 0.7 10 to 12 %, or 18 %; 0.89 3 %, or 7 %.
_FEW, _FEW_UNEVEN = 0.47, 0.75
#: Share of the energy in the dictionary that makes the coefficients which count.
_NEARLY_ALL = 0.99995
#: Slow harmonics of the interleaves' trains above which their order is uneven.
_UNEVEN = 0.05
#: Harmonics over the angle of the interleaves that count as slow.
_SLOW = 4


def regress_interleaves(
    bins: Tensor, gram: Tensor, energies: Tensor, *, leading: int = 0, ridge: float = _RIDGE
) -> Tensor:
    """Coefficients of each interleaf by itself, `(I, J, C, S)`, to be transformed as `bins`.

    Parameters
    ----------
    bins
        Complex `(I, K, C, S)`: readouts folded into the subspace.
    gram
        `(I, K, K)`: ``Σ conj(u_t) u_tᵀ`` by interleaf.
    energies
        `(K,)`: energy of each coefficient in the dictionary, relative to the first.
    leading
        J: how many of the coefficients; 0: all.
    ridge
        μ, see the head of this module.

    References
    ----------
    Linear minimum mean square error estimate; see any text on Wiener filtering.
    """
    I, K, C, S = bins.shape  # noqa: E741 - the field's letter
    penalty = torch.diag(ridge / energies.double().clamp_min(1e-12))
    inverse = torch.linalg.inv_ex(I * gram.to(torch.complex128) + penalty)[0].to(bins.dtype)
    wanted = inverse[:, : leading or K]
    return torch.bmm(wanted, bins.reshape(I, K, C * S)).reshape(I, -1, C, S)


def unevenness(gram: Tensor, points: Tensor, energies: Tensor) -> float:
    """How much of the trains that the interleaves see varies slowly with their angle.

    What varies slowly spreads each point into side lobes next to it, a bias of x0 that looks like anatomy;
    what varies quickly spreads it far, like noise. Amplitude of the first four harmonics over the angle of
    the matrices G, weighted with the energies of the coefficients, relative to their mean. 96 interleaves and
    200 to 500 timepoints: golden steps 0.005, sequential order 0.12.

    Parameters
    ----------
    gram
        `(I, K, K)`.
    points
        `(I·S, 2)` cycles per pixel.
    energies
        `(K,)`: energy of each coefficient in the dictionary, relative to the first.
    """
    I, K, _ = gram.shape  # noqa: E741 - the field's letter
    middle = points.reshape(I, -1, 2)[:, points.shape[0] // I // 2].double()
    angles = torch.atan2(middle[:, 1], middle[:, 0])
    root = energies.double().sqrt()
    weighted = gram.to(torch.complex128) * root[:, None] * root
    mean = weighted.mean(0)
    harmonics = torch.arange(1, _SLOW + 1, dtype=torch.float64, device=gram.device)
    waves = torch.polar(torch.ones_like(angles).expand(_SLOW, I), -harmonics[:, None] * angles)
    slow = (waves @ (weighted - mean).reshape(I, K * K)) / I
    return float(torch.linalg.vector_norm(slow) / torch.linalg.vector_norm(mean).clamp_min(1e-30))


def is_uneven(gram: Tensor, points: Tensor, energies: Tensor) -> bool:
    """Whether the order of the interleaves is uneven; parameters: see `unevenness`."""
    return unevenness(gram, points, energies) > _UNEVEN


def fillings(points: Tensor, n_pixels: int, n_readouts: int) -> float:
    """How many times readouts along spirals fill k-space.

    From turn to turn a spiral moves outwards by ``2π dr/dθ`` cycles per pixel, and so many arms fill the gap
    as that has cycles per field of view. By the median over the outer half of the first arm.

    Parameters
    ----------
    points
        `(I, S, 2)` cycles per pixel.
    n_pixels
        Along the field of view.

    Returns
    -------
    float
        Infinite if the arm has no turns to tell it by.
    """
    k = points[0].double().cpu()
    radius, angle = torch.linalg.vector_norm(k, dim=1), torch.atan2(k[:, 1], k[:, 0])
    turned = torch.remainder(angle[1:] - angle[:-1] + torch.pi, 2 * torch.pi) - torch.pi
    outwards, outer = radius[1:] - radius[:-1], radius[1:] > 0.5 * radius.max()
    pitch = (2 * torch.pi * outwards / turned).abs()[outer & (turned.abs() > 1e-4)]
    arms = float(pitch.median()) * n_pixels if len(pitch) else 0.0
    return n_readouts / arms if arms > 0 else float("inf")


def few_readouts(
    gram: Tensor, points: Tensor, n_pixels: int, n_readouts: int, energies: Tensor, n_coils: int
) -> str:
    """Why the readouts are too few for their coefficients, told by the protocol alone; empty if they are not.

    Parameters
    ----------
    gram
        `(I, K, K)`: what the train did at each interleaf.
    points
        `(I, S, 2)` cycles per pixel.
    n_pixels
        Along the field of view.
    n_readouts
        That were measured.
    energies
        `(K,)`: energy of each coefficient in the dictionary, relative to the first.
    n_coils
        Virtual coils.
    """
    # Coefficients that hardly any signal needs do not count.
    share = (energies / energies.sum()).cumsum(0)
    n = min(int((share < _NEARLY_ALL).sum()) + 1, len(energies))
    uneven = is_uneven(gram, points.reshape(-1, 2), energies)
    needed = n * (_FEW_UNEVEN if uneven or n_coils < 2 else _FEW)
    filled = fillings(points, n_pixels, n_readouts)
    if not filled < needed:
        return ""
    what = " in an uneven order" if uneven else " of a single coil" if n_coils < 2 else ""
    return (
        f"{n_readouts} readouts{what} fill k-space {filled:.1f} times, for {n} coefficients: expected "
        f"{needed:.1f} times or more, else T2 is wrong by 10 % and more. Measure more timepoints"
    )
