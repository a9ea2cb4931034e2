"""Similar atoms of a dictionary in blocks, each with an angle that bounds how far they lie apart.

Letters: N atoms, K coefficients, L = K or 2 K real numbers of an atom, H blocks, S atoms of each.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.physics.real import as_real

# T1 and T2 of a block, in steps of the grid. Smaller ones: more blocks to rule out; larger ones: more atoms
# to compare. Half or twice the size costs a tenth more time.
_BLOCK = (8, 10)


class Blocks:
    """Blocks of neighbours in T1 and T2, all of one B1 before the next.

    Parameters
    ----------
    directions
        `(K, N)`: atoms of norm 1.
    i, j
        Places of the atoms of one B1 on the axes of T1 and T2.
    """

    def __init__(self, directions: Tensor, i: NDArray[np.int64], j: NDArray[np.int64]) -> None:
        device = directions.device
        key = torch.from_numpy(i // _BLOCK[0] * (j.max() + 1) + j // _BLOCK[1]).to(device)
        _, block, count = torch.unique(key, return_inverse=True, return_counts=True)
        # Blocks at the edge are filled with their last atom.
        nth = torch.arange(int(count.max()), device=device).minimum(count[:, None] - 1)
        number = block.argsort(stable=True)[(count.cumsum(0) - count)[:, None] + nth]
        first = torch.arange(0, directions.shape[1], len(i), device=device)
        #: Blocks of one B1.
        self.n_blocks = len(count)
        #: `(H, S)`: numbers of the atoms.
        self.number = (first[:, None, None] + number).flatten(0, 1)
        atoms = directions.T[self.number]  # (H, S, K)
        #: `(H, L, S)`.
        self.atoms = as_real(atoms, 2).mT.contiguous()
        atoms = atoms.to(torch.complex128 if atoms.is_complex() else torch.float64)
        atoms = atoms / torch.linalg.vector_norm(atoms, dim=2, keepdim=True).clamp_min(1e-30)
        middle = (atoms.conj() @ atoms.mean(1)[:, :, None]).abs()[:, :, 0].argmax(1)
        every = torch.arange(len(middle), device=device)
        #: `(L, H)`: an atom of each block, so what it reaches a voxel reaches.
        self.centres = self.atoms[every, :, middle].T.contiguous()
        nearness = (atoms.conj() @ atoms[every, middle][:, :, None]).abs()[:, :, 0]
        #: `(H,)`: cosine and sine of an angle that no atom of a block exceeds. What is taken off is far more
        #: than rounding and adds 0.1° at most; it keeps the sine away from 0.
        self.cos = (nearness.amin(1) - 1e-6).clamp_min(0).float()
        self.sin = ((1 - self.cos) * (1 + self.cos)).sqrt()
