"""Where the object is.

Letters: K coefficients, Y X pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from whorl.kspace.coils import smooth


def object_mask(
    coefficients: Tensor, energies: Tensor, *, sigma: float = 1.5, threshold: float = 0.12
) -> Tensor:
    """Pixels of the object, without holes.

    The root mean square of the subspace images, weighted by their energies so that noise and
    aliasing of weak components do not count, is smoothed and compared with its 99th percentile.

    Parameters
    ----------
    coefficients
        Complex `(K, Y, X)`.
    energies
        `(K,)`: energy of each coefficient in the dictionary, relative to the first.
    sigma
        Smoothing in pixels.
    threshold
        Relative to the 99th percentile of the smoothed image.

    Returns
    -------
    Tensor
        Boolean `(Y, X)`.
    """
    power = (coefficients.abs().square() * energies.reshape(-1, 1, 1)).sum(0)
    magnitude = smooth(power.sqrt()[None], sigma)[0]
    level = torch.quantile(magnitude.flatten()[:: max(1, magnitude.numel() // 100_000)], 0.99)
    # Next to bright tissue the smoothed edge reaches further out than the object.
    smoothed = magnitude.cpu().numpy()
    rough = (smoothed > threshold * float(level)) & (smoothed > 0.3 * ndimage.maximum_filter(smoothed, 7))
    filled = ndimage.binary_fill_holes(ndimage.binary_opening(rough, iterations=1))
    return torch.as_tensor(np.asarray(filled), device=coefficients.device)


def widen(mask: Tensor, pixels: int) -> Tensor:
    """The mask and what lies at most `pixels` away from it."""
    wide = ndimage.binary_dilation(mask.cpu().numpy(), iterations=pixels)
    return torch.as_tensor(np.asarray(wide), device=mask.device)


def box_around(mask: Tensor) -> tuple[slice, slice]:
    """Lines and columns that hold a boolean mask `(Y, X)`, which must not be empty."""
    inside = mask.cpu().numpy()
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
