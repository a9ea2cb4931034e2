"""The best atom of each voxel: exact, though few atoms are looked at.

The angle between two signals, ``arccos |xᴴy|`` for |x| = |y| = 1, is a distance. So if all atoms of a block
lie within r of one of them, its centre, and a voxel lies θ > r from the centre, then no atom of the block is
nearer to the voxel than θ - r. Where another atom is, the block is ruled out; that other one is the nearest
of all centres. At 1 % of noise 143 of 148 blocks are ruled out, for noise without signal 120.

Blocks of similar atoms are an idea of Cauley et al., Magn Reson Med 74:523 (2015), doi:10.1002/mrm.25439.

Letters: V voxels, P views and L real numbers of a voxel (`whorl.physics.real`), H blocks, S atoms of each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from whorl.physics.blocks import Blocks
from whorl.physics.dictionary import Dictionary
from whorl.physics.real import as_real

# Voxels that are compared with a block at a time.
_TILE = 32
# Products, and bounds, that are made at a time: on a CPU they stay in the cache of a core.
_CHUNK_PRODUCTS = 330_000
_CHUNK_BOUNDS = 1_000_000
_GPU_CHUNK_PRODUCTS = 128_000_000
# Relative rounding of float32.
_EPS = 2.0**-24


def best_atoms(views: Tensor, dictionary: Dictionary, b1_place: Tensor | None) -> Tensor:
    """Number `(V,)` of the best atom, among those of the nearest B1 where `b1_place` `(V,)` is known.

    Parameters
    ----------
    views
        `(P, V, L)` of coefficients of norm 1 or 0, see `real_views`.
    """
    n_pairs, V, device = dictionary.grid.n_pairs, views.shape[1], views.device
    search: Callable[[Tensor, Dictionary, int, Tensor], tuple[Tensor, Tensor]]
    if device.type == "cpu":
        search, most = _search_blocks, _CHUNK_BOUNDS // dictionary.blocks.n_blocks
    else:
        search, most = _search_all, _GPU_CHUNK_PRODUCTS // n_pairs
    every = torch.arange(V, device=device)
    plane = None if b1_place is None else b1_place.round().long()
    best = torch.zeros_like(every) if plane is None else plane * n_pairs
    power = torch.zeros(V, device=device)
    for n in range(len(dictionary.grid.b1_axis)):
        chosen = every if plane is None else torch.nonzero(plane == n)[:, 0]
        for voxels in torch.split(chosen, max(1, most)):
            if len(voxels):
                so_far = power[voxels]
                number, reached = search(views.index_select(1, voxels), dictionary, n, so_far)
                best[voxels] = torch.where(reached > so_far, number, best[voxels])
                power[voxels] = torch.maximum(reached, so_far)
    return best


def _squares(views: Tensor, atoms: Tensor) -> Tensor:
    """Squared products ``|dᴴc|²`` `(..., V, n)` of views `(P, ..., V, L)` with atoms `(..., L, n)`."""
    squares = (views[0] @ atoms).square_()
    for view in views[1:]:
        product = view @ atoms
        squares.addcmul_(product, product)
    return squares


def _search_all(views: Tensor, dictionary: Dictionary, n: int, _: Tensor) -> tuple[Tensor, Tensor]:
    """As `_search_blocks`, by all products: no size depends on the data, so a GPU need not wait for it."""
    n_pairs = dictionary.grid.n_pairs
    atoms = as_real(dictionary.directions[:, n * n_pairs : (n + 1) * n_pairs], 0)
    reached, number = _squares(views, atoms).max(1)
    return number + n * n_pairs, reached


def _search_blocks(views: Tensor, dictionary: Dictionary, n: int, power: Tensor) -> tuple[Tensor, Tensor]:
    """Best atom of the n-th B1 for each voxel, and its squared product, both `(V,)`; 0 where that is below
    `power` `(V,)`."""
    blocks = dictionary.blocks
    block, voxel = _near(views, blocks, slice(n * blocks.n_blocks, (n + 1) * blocks.n_blocks), power)
    reached, number = _compare(views, blocks, block, voxel)
    top = torch.zeros_like(power).scatter_reduce_(0, voxel, reached, "amax")
    wins = reached == top[voxel]
    best = torch.zeros(len(power), dtype=torch.long)
    best.scatter_reduce_(0, voxel[wins], number[wins], "amin", include_self=False)  # of equal ones the first
    return best, top


def _near(views: Tensor, blocks: Blocks, plane: slice, power: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of a block of `plane` and a voxel that may have a product above all centres' and `power`, in the
    order of the blocks."""
    seen = _squares(views, blocks.centres[:, plane]).sqrt_()  # (V, H')
    least = torch.maximum(seen.amax(1), power.sqrt())
    # A product of L terms is wrong by L eps at most, the lengths of voxel and atom by (L / 2 + 2) eps, and a
    # few eps come from the rest. The bound rises by no more than the product it is made of.
    least = least - 4 * (views.shape[2] + 5) * _EPS
    least = torch.where(views.any(2).any(0), least, 2)  # without signal: none
    cos = torch.minimum(seen, blocks.cos[plane])
    bound = (1 - cos.square()).sqrt_().mul_(blocks.sin[plane]).addcmul_(cos, blocks.cos[plane])
    near = (bound > least[:, None]).T.contiguous()
    pairs = torch.from_numpy(np.flatnonzero(near.numpy()))  # faster than PyTorch's by far
    block = pairs // len(power)
    return block + plane.start, pairs - block * len(power)


def _compare(views: Tensor, blocks: Blocks, block: Tensor, voxel: Tensor) -> tuple[Tensor, Tensor]:
    """Largest squared product in each pair of a block and a voxel, and the number of its atom.

    The pairs come in the order of the blocks, each of which fills its own tiles of voxels.
    """
    count = torch.bincount(block, minlength=len(blocks.number))
    n_tiles = (count + (_TILE - 1)) // _TILE
    skipped = (n_tiles.cumsum(0) - n_tiles) * _TILE - (count.cumsum(0) - count)
    place = torch.arange(len(block)) + skipped[block]
    tiles = torch.repeat_interleave(n_tiles)  # block of each
    voxels = torch.zeros((len(tiles), _TILE), dtype=torch.long)  # where there is no pair voxel 0, in vain
    voxels.view(-1)[place] = voxel
    reached, number = [], []
    at_a_time = max(1, _CHUNK_PRODUCTS // (_TILE * blocks.number.shape[1]))
    for tile, who in zip(torch.split(tiles, at_a_time), torch.split(voxels, at_a_time), strict=True):
        some = views.index_select(1, who.flatten()).view(len(views), *who.shape, views.shape[2])
        squares = _squares(some, blocks.atoms.index_select(0, tile))
        nth = torch.from_numpy(squares.numpy().argmax(2))  # faster than PyTorch's by far
        reached.append(squares.gather(2, nth[:, :, None]).flatten())
        number.append(blocks.number[tile[:, None], nth].flatten())
    return torch.cat(reached)[place], torch.cat(number)[place]
