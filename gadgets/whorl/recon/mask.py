"""Where the object is.

Letters: K coefficients, Y X pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from whorl.kspace.coils import smooth

#: Level of the object relative to the 99th percentile, the smallest and the largest one.
_LOWEST, _HIGHEST = 0.12, 0.35
#: Noise and aliasing of the air, as a multiple of their median in the frame of the field of view, and the
#: width of the frame relative to the field of view.
_ABOVE_AIR, _FRAME = 1.5, 1 / 32


def object_mask(coefficients: Tensor, energies: Tensor, *, sigma: float = 1.5) -> Tensor:
    """Pixels of the object, without holes.

    The root mean square of the subspace images, weighted by their energies so that noise and
    aliasing of weak components do not count, is smoothed and compared with its 99th percentile, and with what
    there is in the frame of the field of view, which is air as a rule: noise shall not fill it.

    Parameters
    ----------
    coefficients
        Complex `(K, Y, X)`.
    energies
        `(K,)`: energy of each coefficient in the dictionary, relative to the first.
    sigma
        Smoothing in pixels.

    Returns
    -------
    Tensor
        Boolean `(Y, X)`.
    """
    power = (coefficients.abs().square() * energies.reshape(-1, 1, 1)).sum(0)
    smoothed = smooth(power.sqrt()[None], sigma)[0].cpu().numpy()
    top = float(np.quantile(smoothed.ravel()[:: max(1, smoothed.size // 100_000)], 0.99))
    # Beyond the field of view smoothing sees zeros, which are no air.
    seen = smooth(torch.ones_like(power), sigma).cpu().numpy()
    air = float(np.median((smoothed / seen)[_frame(smoothed.shape)]))
    level = min(max(_LOWEST * top, _ABOVE_AIR * air), _HIGHEST * top)
    # Next to bright tissue the smoothed edge reaches further out than the object.
    rough = (smoothed > level) & (smoothed > 0.3 * ndimage.maximum_filter(smoothed, 7))
    filled = ndimage.binary_fill_holes(ndimage.binary_opening(rough, iterations=1))
    return torch.as_tensor(np.asarray(filled), device=coefficients.device)


def _frame(shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Pixels along the border of the field of view."""
    frame = np.ones(shape, dtype=np.bool_)
    y, x = (max(2, round(n * _FRAME)) for n in shape)
    frame[y:-y, x:-x] = False
    return frame


def widen(mask: Tensor, pixels: int) -> Tensor:
    """The mask and what lies at most `pixels` away from it."""
    wide = ndimage.binary_dilation(mask.cpu().numpy(), iterations=pixels)
    return torch.as_tensor(np.asarray(wide), device=mask.device)


def box_around(mask: Tensor) -> tuple[slice, slice]:
    """Lines and columns that hold a boolean mask `(Y, X)`, which must not be empty."""
    inside = mask.cpu().numpy()
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
