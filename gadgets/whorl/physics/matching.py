"""Dictionary match in the subspace: from coefficients to T1, T2, B1 and M0.

Letters: V voxels, N atoms, K coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whorl.physics.dictionary import Dictionary
from whorl.physics.interpolation import Surface, climb
from whorl.runtime.cores import spread

# Products of some voxels with some atoms that are made at a time: on a CPU they stay in the cache of a core.
_CHUNK_PRODUCTS = 330_000
_GPU_CHUNK_PRODUCTS = 128_000_000
#: Voxels that a core works on at a time: few, and it spends its time on starting operations; many, and they
#: leave the cache. A GPU takes all at once.
_CHUNK_VOXELS = 5500


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
    place = surface.b1_place(b1) if b1 is not None else None

    def fit(voxels: Tensor) -> tuple[Tensor, ...]:
        return _match_some(
            coefficients[voxels], surface, place[voxels] if place is not None else None, refine
        )

    # Voxels of one B1 are compared with the atoms of one B1.
    order = torch.arange(V, device=device) if place is None else place.round().argsort(stable=True)
    if device.type == "cpu":
        parts = spread(fit, order.tensor_split(-(-V // _CHUNK_VOXELS)) if V else [order])
    else:
        parts = [fit(order)]
    result = []
    for values in zip(*parts, strict=True):
        ordered = torch.cat(values)
        result.append(torch.empty_like(ordered).index_copy_(0, order, ordered))
    return Match(*result)


def _match_some(
    coefficients: Tensor, surface: Surface, b1_place: Tensor | None, refine: bool
) -> tuple[Tensor, ...]:
    """The parts of a `Match` for some voxels, in the order of its fields."""
    # Squares of very small or large values would leave float32; what is not finite is no signal.
    size = coefficients.abs().amax(1)
    size = torch.where(torch.isfinite(size), size, 0)
    coefficients = torch.where(size[:, None] > 0, coefficients / size[:, None], 0)
    place = surface.place(_best_atoms(coefficients, surface.dictionary, b1_place))  # (V, 3)
    if refine:
        place = climb(coefficients, surface, place, b1_place)
    t1_ms, t2_ms, b1 = surface.values(place)
    atom = surface.at(place)  # (V, K)
    length = torch.linalg.vector_norm(atom, dim=1).clamp_min(1e-30)
    product = (atom.conj() * coefficients).sum(1) / length
    total = torch.linalg.vector_norm(coefficients, dim=1)
    quality = (product.abs() / total.clamp_min(1e-30)).clamp_max(1)
    return t1_ms, torch.minimum(t2_ms, t1_ms), b1, product / length * size, quality


def _best_atoms(coefficients: Tensor, dictionary: Dictionary, b1_place: Tensor | None) -> Tensor:
    """Number `(V,)` of the best atom, among those of the nearest B1 where `b1_place` `(V,)` is known."""
    n_pairs = dictionary.grid.n_pairs
    best = torch.zeros(len(coefficients), dtype=torch.long, device=coefficients.device)
    power = torch.full((len(coefficients),), -1.0, device=coefficients.device)
    for n in range(len(dictionary.grid.b1_axis)):
        atoms = dictionary.directions[:, n * n_pairs : (n + 1) * n_pairs]
        if b1_place is None:
            part, reached = _search(coefficients, atoms)
            better = reached > power
            best = torch.where(better, part + n * n_pairs, best)
            power = torch.where(better, reached, power)
            continue
        voxels = torch.nonzero(b1_place.round() == n)[:, 0]
        if len(voxels):
            best[voxels] = _search(coefficients[voxels], atoms)[0] + n * n_pairs
    return best


def _search(coefficients: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Best column of `directions` `(K, n)` for each voxel, and its squared product, both `(V,)`."""
    V, n = len(coefficients), directions.shape[1]
    device = coefficients.device
    most = _CHUNK_PRODUCTS if device.type == "cpu" else _GPU_CHUNK_PRODUCTS
    chunk = min(max(1, most // n), max(V, 1))
    best = torch.empty(V, dtype=torch.long, device=device)
    power = torch.empty(V, device=device)
    if directions.is_complex():
        for start in range(0, V, chunk):
            product = (coefficients[start : start + chunk] @ directions.conj()).abs().square_()
            torch.max(product, 1, out=(power[start : start + chunk], best[start : start + chunk]))
        return best, power
    # Real atoms: the squared modulus is the sum of two real products, a quarter of the complex work;
    # for real coefficients it is one. |·| is needed all the same: some atoms have the other sign.
    parts = [coefficients.real, coefficients.imag] if coefficients.is_complex() else [coefficients]
    parts = [part.contiguous() for part in parts]
    products = [torch.empty((chunk, n), device=device) for _ in parts]
    for start in range(0, V, chunk):
        rows = slice(start, min(start + chunk, V))
        count = rows.stop - start
        for part, product in zip(parts, products, strict=True):
            torch.mm(part[rows], directions, out=product[:count])
        squares = products[0][:count].square_()
        for product in products[1:]:
            squares.addcmul_(product[:count], product[:count])
        torch.max(squares, 1, out=(power[rows], best[rows]))
    return best, power
