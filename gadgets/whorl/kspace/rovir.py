"""Region-optimised virtual coils: what lies in a region before what lies around it.

Letters: R readouts, C coils, V virtual coils, S samples, N pixels along an axis of a low-resolution image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg
from torch import Tensor

from whorl.kspace.nufft import make_nufft

#: Radii of the part of k-space that is tried, in steps of the field of view that is shown: images of
#: 32 to 12 pixels.
_RADII = (16, 12, 10, 8, 6)
#: Share of the cells of that part that must have been sampled.
_COVERED = 0.9
#: Signals of readouts below a tenth of the largest are not made larger than that.
_FLOOR = 0.01
#: Interference that is taken to be everywhere, relative to the mean over the coils of the region's signal.
#: Without it the ratio would be that of two noises.
_RIDGE = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class LowResolution:
    """Images of some readouts.

    Parameters
    ----------
    images
        Complex `(C, N, N)`.
    x, y
        `(N,)` places of the pixels as shares of the field of view, which runs from 0 to 1.
    """

    images: Tensor
    x: Tensor
    y: Tensor


def low_resolution_images(
    kspace: Tensor, points: Tensor, shape: tuple[int, int], *, zoom: int = 2
) -> LowResolution | None:
    """Coil images over a wider field of view, of the middle of k-space, as far out as it is dense there.

    The readouts may have any signal, as those of a train do: they are brought to one by what the coils see
    at the centre of k-space. Samples weigh the inverse of their number in a cell of ``1 / (zoom · FOV)``,
    and less towards the edge (Hann), so that little rings from the region into what lies around it.

    Parameters
    ----------
    kspace
        Complex `(R, C, S)`.
    points
        `(R, S, 2)` cycles per pixel.
    shape
        (Y, X) of the field of view.
    zoom
        Width of the images in fields of view.

    Returns
    -------
    LowResolution or None
        ``None`` if not even the innermost cells are sampled densely enough for that width.
    """
    Y, X = shape
    cells = (points * points.new_tensor([X * zoom, Y * zoom])).reshape(-1, 2)  # in cells
    radius = torch.linalg.vector_norm(cells, dim=1)
    for reach in _RADII:
        inner = radius <= reach
        column, row = (cells[inner].round().long() + reach).unbind(1)
        number = row * (2 * reach + 1) + column
        count = torch.bincount(number, minlength=(2 * reach + 1) ** 2)
        steps = torch.arange(-reach, reach + 1, device=points.device)
        within = steps.square()[:, None] + steps.square() <= (reach - 0.5) ** 2
        if float((count.reshape(within.shape)[within] > 0).float().mean()) >= _COVERED:
            break
    else:
        return None
    window = torch.cos(0.5 * torch.pi * radius[inner] / reach).square()
    weights = window / count[number]
    alike = kspace * _to_one_signal(kspace, radius.reshape(kspace.shape[0], -1) <= 1)[:, None, None]
    samples = alike.transpose(0, 1).reshape(kspace.shape[1], -1)[:, inner] * weights
    nufft = make_nufft(cells[inner] / (2 * reach), (2 * reach, 2 * reach))
    places = torch.arange(-reach, reach, device=points.device) * (zoom / (2 * reach))
    return LowResolution(
        nufft.adjoint(samples.contiguous()), places + (X // 2 + 0.5) / X, places + (Y // 2 + 0.5) / Y
    )


def _to_one_signal(kspace: Tensor, central: Tensor) -> Tensor:
    """Factors `(R,)` that give the readouts one signal at the centre of k-space, where `central` `(R, S)`."""
    share = central.to(kspace.dtype)
    seen = torch.einsum("rcs,rs->rc", kspace, share) / share.sum(1, keepdim=True).abs().clamp_min(1)
    values, vectors = torch.linalg.eigh(seen.mH @ seen)
    if not float(values[-1]) > 0:  # no readout goes through the centre
        return torch.ones(len(kspace), dtype=kspace.dtype, device=kspace.device)
    signal = seen @ vectors[:, -1]
    power = signal.abs().square()
    factors: Tensor = signal.conj() / (power + _FLOOR * power.max())
    return factors


def region_energies(low: LowResolution, region: tuple[float, float, float, float]) -> tuple[Tensor, Tensor]:
    """Coil covariances `(C, C)` within a region and around it.

    Parameters
    ----------
    region
        Limits (x0, x1, y0, y1) as shares of the field of view. One pixel around it counts on neither side.
    """
    x0, x1, y0, y1 = region
    margin = float(low.x[1] - low.x[0])

    def box(wider: float) -> Tensor:
        rows = (low.y >= y0 - wider) & (low.y <= y1 + wider)
        return rows[:, None] & ((low.x >= x0 - wider) & (low.x <= x1 + wider))

    inside, outside = low.images[:, box(0)], low.images[:, ~box(margin)]
    return inside @ inside.mH, outside @ outside.mH


def rovir_matrix(inside: Tensor, outside: Tensor, n_virtual: int = 0, *, energy: float = 0.995) -> Tensor:
    """`(V, C)` orthonormal rows: virtual coils in the order of their ratio of signal to interference.

    The weights v of a virtual coil maximise ``vᴴA v / vᴴB v``; what the first ones span is made orthonormal
    in their order, so that white noise stays white.

    Parameters
    ----------
    inside, outside
        A and B: covariances `(C, C)` of the coil images in the region and of the interference.
    n_virtual
        V; 0: as many as keep `energy`.
    energy
        Share of the region's energy that is kept.

    References
    ----------
    Kim et al., Magn Reson Med 86:197 (2021), doi:10.1002/mrm.28706.
    """
    C = len(inside)
    signal = inside.to(torch.complex128).cpu().numpy()
    around = outside.to(torch.complex128).cpu().numpy()
    level = float(np.trace(signal).real) / C
    if not level > 0:
        return torch.eye(C, dtype=inside.dtype, device=inside.device)[: n_virtual or C]
    _, weights = linalg.eigh(signal / level, around / level + _RIDGE * np.eye(C))
    rows, _ = np.linalg.qr(weights[:, ::-1])  # eigenvalues come in rising order
    if not n_virtual:
        kept = np.cumsum(np.einsum("cv,cd,dv->v", rows.conj(), signal, rows).real)
        n_virtual = int((kept < energy * kept[-1]).sum()) + 1
    matrix = torch.from_numpy(np.ascontiguousarray(rows[:, : min(n_virtual, C)].conj().T))
    return matrix.to(inside.device, inside.dtype)
