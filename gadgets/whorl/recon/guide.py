"""What guides the joint INR: all coefficients smoothed together where they are alike within their noise.

A joint-bilateral filter. Two pixels are alike if the vectors of their coefficients, in units of the noise
that the images themselves show, differ by no more than noise does; then they are averaged, all coefficients
with the same weight. Where the filter leaves something that is more than noise, as in continuous texture,
that is given back. Nothing is assumed of the anatomy, and nothing is set to the level of noise by hand.

Letters: K coefficients, H W pixels of the box around the object.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from whorl.kspace.coils import smooth
from whorl.runtime.cores import spread

#: Width in pixels of the Gauss that makes the first comparison less noisy.
_FIRST_SIGMA = 0.7
#: Radii in pixels of the discs of the two passes.
_RADII = (4.0, 8.0)
#: What is given back: widths in pixels of the smoothed remainder, and of the neighbourhood in which its
#: energy is compared with what noise leaves, of which so many times count as noise.
_REMAINDERS, _NEIGHBOURHOOD, _NOISE = (1.5, 0.8), 5.0, 1.2
#: Parts that the pairs of pixels are dealt to: their sums do not depend on the number of cores.
_PARTS = 4


def noise_levels(images: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation of the noise of each image, `(K,)`, by what no anatomy looks like.

    Median of absolute second differences along lines and columns, whose pixels are all in the mask.

    Parameters
    ----------
    images
        Real `(K, H, W)`.
    mask
        Boolean `(H, W)`.

    Returns
    -------
    Tensor
        In the unit of the images; 0 where there are no three pixels in a row.

    References
    ----------
    Immerkær, Comput Vis Image Underst 64:300 (1996), doi:10.1006/cviu.1996.0060 (by second differences).
    """
    found = [images.new_full((len(images), 1), torch.nan)]
    for axis in (1, 2):
        if images.shape[axis] < 3:
            continue
        three = [images.narrow(axis, n, images.shape[axis] - 2) for n in range(3)]
        inside = [mask.narrow(axis - 1, n, mask.shape[axis - 1] - 2) for n in range(3)]
        curved = (three[0] - 2 * three[1] + three[2]).abs()
        found.append(curved.where(inside[0] & inside[1] & inside[2], torch.nan).flatten(1))
    # A normal deviate is below 0.6745 half of the time; the difference has six times the variance.
    return torch.cat(found, 1).nanmedian(1).values.nan_to_num(0.0) / (0.6745 * math.sqrt(6))


def guide(images: Tensor, mask: Tensor) -> Tensor:
    """Images whose noise is averaged away where they are alike.

    Parameters
    ----------
    images
        Real `(K, H, W)`, with noise.
    mask
        Boolean `(H, W)`: the object; the result is 0 outside.

    Returns
    -------
    Tensor
        `(K, H, W)`, in the unit of the images.

    References
    ----------
    Tomasi & Manduchi, ICCV 839 (1998), doi:10.1109/ICCV.1998.710815 (bilateral filter); Petschnigg et al.,
    ACM Trans Graph 23:664 (2004), doi:10.1145/1015706.1015777 (joint bilateral filter).
    """
    sd = noise_levels(images, mask)
    # Without any noise nothing is alike but what is equal.
    sd = torch.maximum(sd, 1e-6 * images.abs().amax((1, 2))).clamp_min(1e-30).reshape(-1, 1, 1)
    y = images / sd * mask
    compared, variance = _inside(y, mask, _FIRST_SIGMA), torch.full_like(y[0], _white_noise(_FIRST_SIGMA))
    for radius in _RADII:
        compared, variance = joint_bilateral(y, compared, variance, mask, radius)
    for sigma in _REMAINDERS:
        compared = compared + _more_than_noise(y - compared, mask, sigma)
    return compared * sd


def joint_bilateral(
    images: Tensor, compared: Tensor, variance: Tensor, mask: Tensor, radius: float
) -> tuple[Tensor, Tensor]:
    """Mean over the pixels of a disc that are alike.

    Weights are ``exp(-(d - K)₊ / (2 √(2K)))`` with ``d = |g(r) - g(r')|² / (v(r) + v(r'))``: if g differs by
    noise alone, d has the mean K and the standard deviation √(2K).

    Parameters
    ----------
    images
        Real `(K, H, W)`, whose noise has a standard deviation of 1.
    compared, variance
        g `(K, H, W)` and the variance v `(H, W)` of its noise.
    mask
        Boolean `(H, W)`: pixels that count.
    radius
        Of the disc in pixels.

    Returns
    -------
    Tensor, Tensor
        Means `(K, H, W)`, 0 outside the mask, and the variance of their noise `(H, W)`, 1 outside.
    """
    K, H, W = images.shape
    inside = mask.to(images.dtype)

    def add_up(offsets: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        total, weights, squares = (torch.zeros_like(part) for part in (images, inside, inside))
        for down, right in offsets:
            here, there = side_by_side(down, right, (H, W))
            apart = (compared[:, here[0], here[1]] - compared[:, there[0], there[1]]).square_().sum(0)
            distance = apart / (variance[here] + variance[there])
            weight = (distance - K).clamp_min_(0).mul_(-1 / (2 * math.sqrt(2 * K))).exp_()
            weight *= inside[here] * inside[there]
            total[:, here[0], here[1]].addcmul_(weight, images[:, there[0], there[1]])
            total[:, there[0], there[1]].addcmul_(weight, images[:, here[0], here[1]])
            weights[here] += weight
            weights[there] += weight
            weight = weight.square_()
            squares[here] += weight
            squares[there] += weight
        return total, weights, squares

    offsets = [o for o in _half_disc(radius) if o[0] < H and abs(o[1]) < W]
    parts = spread(add_up, [offsets[n::_PARTS] for n in range(_PARTS)])
    # A pixel is alike itself.
    total, weights, squares = (sum(part, own) for part, own in zip(
        zip(*parts, strict=True), (images * inside, inside, inside), strict=True
    ))  # fmt: skip
    weights = weights.where(mask, 1)
    return total / weights * inside, (squares / weights.square()).where(mask, 1)


def side_by_side(
    down: int, right: int, shape: tuple[int, int]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Pixels of a raster that have one so far down (0 or more) and to the right, and these."""
    H, W = shape
    here = slice(0, H - down), slice(max(0, -right), W - max(0, right))
    there = slice(down, H), slice(max(0, right), W + min(0, right))
    return here, there


def _half_disc(radius: float) -> list[tuple[int, int]]:
    """Offsets (down, right) of one of each two neighbours that lie opposite each other."""
    reach = range(-int(radius), int(radius) + 1)
    return [(y, x) for y in reach for x in reach if (y, x) > (0, 0) and y * y + x * x <= radius * radius]


def _inside(images: Tensor, mask: Tensor, sigma: float) -> Tensor:
    """Gaussian mean over pixels of the mask alone, 0 outside."""
    weight = mask.to(images.dtype)
    return smooth(images * weight, sigma) / smooth(weight[None], sigma).clamp_min(1e-6) * weight


def _white_noise(sigma: float) -> float:
    """Variance that a Gauss leaves of white noise of variance 1."""
    reach = max(1, math.ceil(3 * sigma))
    weights = [math.exp(-0.5 * (n / sigma) ** 2) for n in range(-reach, reach + 1)]
    return (sum(w * w for w in weights) / sum(weights) ** 2) ** 2


def _more_than_noise(remainder: Tensor, mask: Tensor, sigma: float) -> Tensor:
    """What is more than noise in a remainder `(K, H, W)`, smoothed: each coefficient weighted by 1 - (energy
    that noise leaves) / (energy around the pixel), at least 0.

    What noise leaves is told by the coefficients themselves: most of them are hardly more than noise.
    """
    smoothed = _inside(remainder, mask, sigma)
    around = _inside(smoothed.square(), mask, _NEIGHBOURHOOD)
    of_noise = _NOISE * ((around.sum((1, 2)) / mask.sum()).median())
    return smoothed * (1 - of_noise / around.clamp_min(1e-30)).clamp_min(0)
