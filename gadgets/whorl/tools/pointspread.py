"""What the order of the interleaves does to x0 = A'W(U'y), predicted without the object.

Each interleaf i sees a train of its own and maps coefficients c to ``G_i c``, ``G_i = Σ conj(u_t) u_tᵀ``.
If all G_i are alike, x0 shows each point as full sampling does. If they vary slowly with the angle of the
interleaf, as where one follows the other, they spread each point into side lobes next to it.

Homogeneous tissue around a place has its energy where its phase varies in k-space: at 0 for a constant phase,
where all interleaves meet, and next to it for the phases of real coils and objects, where few interleaves
pass. There x0 has ``Σ a_i G_i c / Σ a_i`` instead of the mean of G: a bias that looks like anatomy.

Letters: K coefficients, I interleaves, S samples, Y X pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import j1
from torch import Tensor

from whorl.kspace.nufft import Nufft
from whorl.physics.dictionary import Dictionary
from whorl.physics.matching import match

#: Tissues that are looked at: name, T1 and T2 in ms (white and grey matter, muscle; 3 T).
TISSUES = (("white matter", 832.0, 60.0), ("grey matter", 1350.0, 85.0), ("muscle", 1200.0, 35.0))
#: Radius of the tissue and of the place that is looked at, in fields of view.
_RADIUS, _INNER = 1 / 6, 0.1
#: Slope of the phase in cycles per field of view, and the directions that it may have. Receive coils have
#: about one: then a bias of white matter of +39 % is predicted for sequential order, on average over the
#: directions, and maps of a simulated brain have one of that size.
_SLOPE, _DIRECTIONS = 1.0, 8
#: Pixels around a point within which side lobes count.
_NEAR = 16
#: Bias of T2 from which on an order is not harmless.
_BIASED = 0.05


@dataclass(frozen=True, slots=True)
class TissueBias:
    """Predicted relative bias of low-rank maps of a tissue whose phase has a slope.

    Parameters
    ----------
    tissue
        Its name.
    t1, t2
        Mean over the directions of the slope.
    t2_largest
        That of T2 in the direction where it is largest, with its sign.
    """

    tissue: str
    t1: float
    t2: float
    t2_largest: float


@dataclass(frozen=True, slots=True)
class OrderCheck:
    """What an order of interleaves does.

    Parameters
    ----------
    side_lobe
        Largest side lobe that the order adds to a point of white matter within 16 pixels, relative to its
        peak, over all coefficients.
    side_lobe_pixels
        Its distance from the point.
    bias
        Of low-rank maps, by tissue.
    """

    side_lobe: float
    side_lobe_pixels: float
    bias: tuple[TissueBias, ...]

    @property
    def biased(self) -> bool:
        """Whether T2 of a tissue may be off by more than 5 %."""
        return max(abs(one.t2_largest) for one in self.bias) > _BIASED

    def lines(self) -> Iterator[str]:
        """For people."""
        yield (
            f"it adds side lobes of up to {self.side_lobe:.1%} of the peak to a point, "
            f"{self.side_lobe_pixels:.0f} pixels away"
        )
        yield f"predicted bias of low-rank maps where the phase turns by {_SLOPE:g} cycle per field of view:"
        for one in self.bias:
            yield (
                f"  {one.tissue}: T1 {one.t1:+.1%}, T2 {one.t2:+.1%} on average over the directions, up to "
                f"{one.t2_largest:+.1%}"
            )

    def warning(self) -> str:
        """For the operator."""
        worst = max(self.bias, key=lambda b: abs(b.t2_largest))
        return (
            f"the order of the interleaves biases low-rank T2 (predicted for {worst.tissue}: "
            f"{worst.t2:+.0%}, up to {worst.t2_largest:+.0%}); method=inr corrects for most of it. "
            f"Measure successive interleaves far apart (golden-step or golden-angle order)"
        )


def spread(gram: Tensor, dcf: Tensor, nufft: Nufft, c: Tensor) -> Tensor:
    """x0 `(K, Y, X)` of a point of one tissue in the middle pixel, seen by one coil.

    Parameters
    ----------
    gram
        `(I, K, K)`: ``Σ conj(u_t) u_tᵀ`` by interleaf.
    dcf
        `(I, S)`, see `whorl.recon.lowrank.adjoint_coil_images`.
    nufft
        For the I·S samples.
    c
        `(K,)` coefficients of the tissue.
    """
    I, S = dcf.shape  # noqa: E741 - the field's letter
    seen = gram @ c.to(gram.dtype)  # (I, K)
    samples = seen.T[:, :, None] * (I * dcf).to(gram.dtype)  # (K, I, S)
    return nufft.adjoint(samples.reshape(-1, I * S).contiguous())


def disc(points: Tensor, radius: float) -> Tensor:
    """k-space `(...)` of a disc of value 1 and a radius in pixels, ``r J1(2π r k) / k``, at `(..., 2)`."""
    k = torch.linalg.vector_norm(points, dim=-1).double().cpu().numpy()
    argument = 2 * np.pi * radius * np.maximum(k, 1e-9)
    return torch.from_numpy(2 * np.pi * radius**2 * j1(argument) / argument).to(points)


def check_order(
    gram: Tensor, dcf: Tensor, points: Tensor, nufft: Nufft, shape: tuple[int, int], dictionary: Dictionary
) -> OrderCheck:
    """Predict what the order of the interleaves does, beside an order in which all see the same.

    Parameters
    ----------
    gram, dcf, nufft
        See `spread`.
    points
        `(I, S, 2)` in cycles per pixel.
    shape
        (Y, X).
    dictionary
        Of the train.
    """
    Y, X = shape
    mean = gram.mean(0)
    seen = [mean]  # what the tissue's coefficients become, for each direction
    size = points.new_tensor([X, Y])
    for angle in 2 * np.pi * np.arange(_DIRECTIONS) / _DIRECTIONS:
        away = points - points.new_tensor([np.cos(angle), np.sin(angle)]) * (_SLOPE / size)
        parts = dcf * disc(away, _RADIUS * min(shape)) * disc(away, _INNER * min(shape))
        share = parts.sum(1) / parts.sum()
        seen.append(torch.einsum("i,ikl->kl", share.to(gram.dtype), gram))
    bias = []
    for name, t1_ms, t2_ms in TISSUES:
        c = _coefficients(dictionary, t1_ms, t2_ms).to(gram.dtype)
        found = match(torch.stack([g @ c for g in seen]), dictionary)
        t1, t2 = (values[1:] / values[0] - 1 for values in (found.t1_ms, found.t2_ms))
        bias.append(TissueBias(name, float(t1.mean()), float(t2.mean()), float(t2[t2.abs().argmax()])))
    c = white_matter(dictionary)
    point = spread(gram, dcf, nufft, c)
    added = torch.linalg.vector_norm(point - spread(mean.expand_as(gram), dcf, nufft, c), dim=0)
    peak = torch.linalg.vector_norm(point[:, Y // 2, X // 2])
    rows, columns = torch.meshgrid(torch.arange(Y) - Y // 2, torch.arange(X) - X // 2, indexing="ij")
    distance = torch.hypot(rows.double(), columns.double()).to(points.device)
    near = torch.where((distance > 1.5) & (distance <= _NEAR), added, 0)
    place = int(near.argmax())
    return OrderCheck(float(near.flatten()[place] / peak), float(distance.flatten()[place]), tuple(bias))


def white_matter(dictionary: Dictionary) -> Tensor:
    """Coefficients of white matter, `(K,)`."""
    return _coefficients(dictionary, *TISSUES[0][1:])


def _coefficients(dictionary: Dictionary, t1_ms: float, t2_ms: float) -> Tensor:
    """Of the atom nearest to a tissue, `(K,)`."""
    grid = dictionary.grid
    a = int(np.abs(np.log(grid.t1_axis_ms / t1_ms)).argmin())
    b = int(np.abs(np.log(grid.t2_axis_ms / t2_ms)).argmin())
    d = int(np.abs(grid.b1_axis - 1).argmin())
    return dictionary.coefficients[d * grid.n_pairs + grid.starts[a] + min(b, grid.counts[a] - 1)]
