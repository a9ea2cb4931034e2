"""Where the object is.

Letters: K coefficients, Y X pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from whorl.kspace.coils import smooth


def object_mask(coefficients: Tensor, *, sigma: float = 1.5, threshold: float = 0.12) -> Tensor:
    """Pixels of the object, without holes.

    The root mean square of the subspace images, weighted by their energies so that noise and
    aliasing of weak components do not count, is smoothed and compared with its 99th percentile.

    Parameters
    ----------
    coefficients
        Complex `(K, Y, X)`.
    sigma
        Smoothing in pixels.
    threshold
        Relative to the 99th percentile of the smoothed image.

    Returns
    -------
    Tensor
        Boolean `(Y, X)`.
    """
    power = coefficients.abs().square()
    weight = power.mean(dim=(1, 2))
    weight = weight / weight[0].clamp_min(1e-30)
    magnitude = smooth((power * weight.reshape(-1, 1, 1)).sum(0).sqrt()[None], sigma)[0]
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
