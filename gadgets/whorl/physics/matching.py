"""Dictionary match in the subspace: from coefficients to T1, T2, B1 and M0.

Letters: V voxels, N atoms, K coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from whorl.physics.dictionary import Dictionary
from whorl.physics.interpolation import Surface, climb
from whorl.physics.real import real_views
from whorl.physics.search import best_atoms
from whorl.runtime.cores import spread

# Voxels that a core works on at a time: few, and it spends its time on starting operations; many, and they
# leave the cache. It does not depend on the number of cores, nor does the result. A GPU takes all at once.
_CHUNK_VOXELS = 5500
# Sets of parabolas that the way up may take. Of 22 000 noisy voxels one in a hundred takes more than two.
_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Match:
    """Result for V voxels, each `(V,)`: T1 and T2 in ms, relative transmit field, M0 (with the phase of the
    coefficients, in their unit) and the normalised correlation with the atom in [0, 1]."""

    t1_ms: Tensor
    t2_ms: Tensor
    b1: Tensor
    m0: Tensor
    quality: Tensor


def match(
    coefficients: Tensor, dictionary: Dictionary, *, b1: Tensor | None = None, refine: bool = True
) -> Match:
    """The tissue whose signal has the largest normalised inner product ``|dᴴc| / (|d||c|)`` with each voxel.

    First the best atom: each voxel is compared with each atom, so it is exact to the rounding of float32, by
    which two that differ by less than 1e-6 in correlation may change places. Then, with `refine`, the
    maximum on the surface that interpolates the atoms around it (`whorl.physics.interpolation`), so that maps
    are not quantised by the grid. The result does not depend on the complex scale of a voxel. A voxel that is
    0 or not finite has quality and M0 0.

    Parameters
    ----------
    coefficients
        `(V, K)`, complex or real.
    dictionary
        N atoms in the same subspace.
    b1
        `(V,)` known relative transmit field. Values beyond the dictionary's axis count as its ends. If
        absent, the B1 axis of the dictionary is searched like T1 and T2.
    refine
        Whether to go beyond the grid; else a known `b1` counts as the nearest value on the axis.

    Raises
    ------
    ValueError
        If the numbers of coefficients or voxels differ.

    References
    ----------
    Ma et al., Nature 495:187 (2013), doi:10.1038/nature11971.
    """
    V, K, device = len(coefficients), dictionary.coefficients.shape[1], coefficients.device
    if coefficients.ndim != 2 or coefficients.shape[1] != K:
        raise ValueError(
            f"coefficients have shape {tuple(coefficients.shape)}, the dictionary has "
            f"{K} coefficients: both must come from the same basis"
        )
    if b1 is not None and b1.shape != coefficients.shape[:1]:
        raise ValueError(f"b1 has shape {tuple(b1.shape)}, there are {V} voxels: expected one for each")
    if dictionary.directions.is_complex():
        coefficients = coefficients.to(dictionary.directions.dtype)
    surface = Surface(dictionary)
    b1_place = surface.b1_place(b1) if b1 is not None else None
    free = 3 if surface.has_b1 and b1 is None else 2
    on_cpu = device.type == "cpu"

    def each(work: Callable[[Tensor], tuple[Tensor, ...]], voxels: Tensor) -> list[Tensor]:
        chunks = torch.split(voxels, _CHUNK_VOXELS) if on_cpu else [voxels]
        parts = spread(work, chunks) if on_cpu else [work(voxels)]
        return [torch.cat(values, -1) for values in zip(*parts, strict=True)]

    def begin(voxels: Tensor) -> tuple[Tensor, ...]:
        unit, size = _normalised(coefficients[voxels])
        views = real_views(unit, dictionary.directions)
        known = b1_place[voxels] if b1_place is not None else None
        place = surface.place(best_atoms(views, dictionary, known))
        views = views.mT.contiguous()  # (P, L, V)
        if not refine:
            return views, size, place
        if known is not None:
            place[2] = known
        return views, size, *climb(views, surface, place, free, 1)

    def go_on(voxels: Tensor) -> tuple[Tensor, ...]:
        return climb(views.index_select(2, voxels), surface, place[:, voxels], free, _ROUNDS - 1)

    def finish(voxels: Tensor) -> tuple[Tensor, ...]:
        return _evaluate(views.index_select(2, voxels), size[voxels], surface, place[:, voxels])

    # Voxels of one B1 are compared with the atoms of one B1.
    order = torch.arange(V, device=device) if b1_place is None else b1_place.round().argsort(stable=True)
    views, size, place, *goes_on = each(begin, order)
    if goes_on:
        # One in ten takes more than one round. Together, because operations on few voxels cost their start.
        left = torch.nonzero(goes_on[0])[:, 0]
        place[:, left] = each(go_on, left)[0]
    back = order.argsort()
    return Match(*(values[back] for values in each(finish, torch.arange(V, device=device))))


def _normalised(coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients `(V, K)` of norm 1, and what the norms were."""
    # Squares of very small or large values would leave float32; what is not finite is no signal.
    largest = coefficients.abs().amax(1)
    largest = torch.where(torch.isfinite(largest), largest, 0)
    coefficients = torch.where(largest[:, None] > 0, coefficients / largest[:, None], 0)
    norm = torch.linalg.vector_norm(coefficients, dim=1)
    return coefficients / norm.clamp_min(1e-30)[:, None], norm * largest


def _evaluate(views: Tensor, size: Tensor, surface: Surface, place: Tensor) -> tuple[Tensor, ...]:
    """The parts of a `Match`, in the order of its fields, for voxels of norm `size` at places."""
    t1_ms, t2_ms, b1 = surface.values(place)
    atom = surface.at(place)  # (L, V)
    norm = torch.linalg.vector_norm(atom, dim=0).clamp_min(1e-30)
    product = (atom * views).sum(1) / norm  # (P, V)
    quality = torch.linalg.vector_norm(product, dim=0).clamp_max(1)
    m0 = (product[0] if len(product) == 1 else torch.complex(product[0], product[1])) / norm * size
    return t1_ms, torch.minimum(t2_ms, t1_ms), b1, m0, quality
