"""Coordinate encoders of the INR: from the place of a pixel to features.

The places are always those of one fixed raster, so each encoder prepares at the start whatever depends on
them alone. All are used in the same way: `encoder(lines)` gives the features `(F, P)` of the pixels in some
lines of the raster, `encoder.n_features` is F.

Resolutions and frequencies are given for the whole field of view. The raster is a box in it; `share` is the
length of the box's longest side relative to the field of view.

Letters: Z Y X pixels of the raster, P pixels that are asked for, L levels, D features of a level, F features.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor

#: Names for `make_encoder`.
ENCODERS = ("grid", "hash", "fourier", "siren")

#: Multipliers of the spatial hash, the last axis first (Müller et al., equation 4).
_PRIMES = (1, 2_654_435_761, 805_459_861)


class Encoder(torch.nn.Module):
    """What all encoders have in common."""

    n_features: int

    def forward(self, lines: slice) -> Tensor:
        """Features `(F, P)` of the pixels in some lines (of the first axis) of the raster."""
        raise NotImplementedError


def _interpolation_places(points: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Left neighbour and distance from it, `(pixels,)` each, of pixels among equidistant grid points.

    The first and last grid point lie on the first and last pixel.
    """
    place = torch.linspace(0, points - 1, pixels, dtype=torch.float64)
    left = place.floor().clamp(max=max(points - 2, 0)).long()
    return left, place - left


def interpolation_matrix(points: int, pixels: int, device: torch.device | None = None) -> Tensor:
    """Linear interpolation from `points` equidistant grid points to a raster: `(pixels, points)`.

    The first and last grid point lie on the first and last pixel.
    """
    left, part = _interpolation_places(points, pixels)
    matrix = torch.zeros((pixels, points), dtype=torch.float64)
    matrix[torch.arange(pixels), left] = 1 - part
    if points > 1:
        matrix[torch.arange(pixels), left + 1] += part
    return matrix.to(torch.float32).to(device)


def level_sizes(
    shape: tuple[int, ...], *, share: float, levels: int, base: int, finest: int
) -> list[list[int]]:
    """Grid points along each axis of the raster, for each level: geometrically from `base` to `finest`."""
    coarse, fine = (max(2, round(points * share)) for points in (base, finest))
    growth = (fine / coarse) ** (1 / max(levels - 1, 1))
    return [
        [max(2, min(n, round(coarse * growth**level * n / max(shape)))) for n in shape]
        for level in range(levels)
    ]


def _small_values(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Features to start from: small ones let the first iterations shape them rather than remember them."""
    return (torch.rand(size, generator=generator) * 2 - 1) * 1e-4


def raster(shape: tuple[int, ...], share: float) -> Tensor:
    """Places of all pixels `(axes, *shape)` in fields of view, around the centre of the box."""
    axes = [(torch.arange(n) - (n - 1) / 2) * (share / max(shape)) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


class GridEncoder(Encoder):
    """Multi-resolution feature grids, each dense, read out on the fixed pixel raster.

    Because the places are always the pixels, a level is ``W_y · G · W_xᵀ`` with two small constant
    matrices: exact bilinear interpolation, with a backward pass that is two matrix products.

    Parameters
    ----------
    shape
        (Y, X) of the raster.
    share
        Longest side of the raster in fields of view.
    levels, features
        L, D; F = L·D.
    base, finest
        Grid points along the field of view of the first and last level.
    generator
        On the CPU; draws the first values.
    device
        Of the grids.

    References
    ----------
    Müller et al., ACM Trans Graph 41:102 (2022), doi:10.1145/3528223.3530127.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        share: float,
        levels: int,
        features: int,
        base: int,
        finest: int,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.n_features = levels * features
        self.grids = torch.nn.ParameterList()
        self._read: list[tuple[Tensor, Tensor]] = []
        for sizes in level_sizes(shape, share=share, levels=levels, base=base, finest=finest):
            grid = _small_values((features, *sizes), generator)
            self.grids.append(torch.nn.Parameter(grid.to(device)))
            rows, columns = (
                interpolation_matrix(size, n, device) for size, n in zip(sizes, shape, strict=True)
            )
            self._read.append((rows, columns.T.contiguous()))

    def forward(self, lines: slice) -> Tensor:
        """Features `(L·D, P)` of the pixels in some lines of the raster."""
        return torch.cat(
            [
                (rows[lines] @ grid @ columns).flatten(1)
                for grid, (rows, columns) in zip(self.grids, self._read, strict=True)
            ]
        )

    def fill(self, images: Tensor, mask: Tensor) -> None:
        """Let the levels add up to images: each takes what the coarser ones have left (a Laplacian pyramid).

        Parameters
        ----------
        images
            `(D, Y, X)`.
        mask
            Boolean `(Y, X)`: pixels that count.

        References
        ----------
        Burt & Adelson, IEEE Trans Commun 31:532 (1983), doi:10.1109/TCOM.1983.1095851.
        """
        weight = mask.to(images.dtype)
        left = images * weight
        with torch.no_grad():
            for grid, (rows, columns) in zip(self.grids, self._read, strict=True):
                near = rows.T @ weight @ columns.T
                grid.copy_((rows.T @ left @ columns.T) / near.clamp_min(1e-3))
                left = (left - rows @ grid @ columns) * weight


class _SparseMatrix:
    """Constant matrix `(rows, columns)` with as many entries in each row, and its transpose.

    Both products with `(columns, D)` and `(rows, D)` are sums of weighted rows, for which PyTorch has
    `embedding_bag`. Its own backward pass takes 90 ms where the transpose takes one (one CPU core, 8 levels
    of 4 features, 15 000 pixels), `index_add` 24 ms.
    """

    def __init__(self, index: Tensor, weight: Tensor, columns: int) -> None:
        self.index, self.weight = index, weight  # (rows, entries) each
        entries = index.shape[1]
        order = torch.argsort(index.flatten(), stable=True)
        self.rows = order // entries
        self.row_weight = weight.flatten()[order]
        counts = torch.bincount(index.flatten(), minlength=columns)
        self.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def times(self, table: Tensor) -> Tensor:
        result: Tensor = torch.nn.functional.embedding_bag(
            self.index, table, per_sample_weights=self.weight, mode="sum"
        )
        return result

    def transpose_times(self, values: Tensor) -> Tensor:
        result: Tensor = torch.nn.functional.embedding_bag(
            self.rows,
            values,
            self.offsets,
            per_sample_weights=self.row_weight,
            mode="sum",
            include_last_offset=True,
        )
        return result


class _Product(torch.autograd.Function):
    """``M · table`` for a `_SparseMatrix` M."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, matrix: _SparseMatrix) -> Tensor:
        ctx.matrix = matrix
        return matrix.times(table)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        matrix: _SparseMatrix = ctx.matrix
        return matrix.transpose_times(gradients[0].contiguous()), None


class HashEncoder(Encoder):
    """Multi-resolution hash grid in two or three dimensions, read out on the fixed pixel raster.

    A level whose grid fits into a table of 2^`log2_table` entries is dense, a finer one shares the entries of
    the table among its grid points by a hash; collisions are not resolved. As long as all levels fit, it is
    the `GridEncoder` from the same first values.

    Parameters
    ----------
    shape
        (Y, X) or (Z, Y, X) of the raster.
    log2_table
        Largest number of entries of a level, as a power of two.

    Other parameters: see `GridEncoder`.

    References
    ----------
    Müller et al., ACM Trans Graph 41:102 (2022), doi:10.1145/3528223.3530127, section 3.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        share: float,
        levels: int,
        features: int,
        base: int,
        finest: int,
        log2_table: int,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.n_features = levels * features
        self._shape, self._table_size = shape, 2**log2_table
        self._sizes = level_sizes(shape, share=share, levels=levels, base=base, finest=finest)
        tables = [
            _small_values((features, min(math.prod(sizes), self._table_size)), generator).T
            for sizes in self._sizes
        ]
        self._starts = [sum(len(table) for table in tables[:level]) for level in range(levels)]
        self.table = torch.nn.Parameter(torch.cat(tables).to(device))  # (all entries, D)
        self._matrices: dict[tuple[int, int, int], _SparseMatrix] = {}

    def _entries(self, corner: list[Tensor], sizes: list[int]) -> Tensor:
        """Table entry of grid points, given by their index along each axis (tensors that broadcast)."""
        entry = corner[0]
        if math.prod(sizes) <= self._table_size:
            for index, size in zip(corner[1:], sizes[1:], strict=True):
                entry = entry * size + index
            return entry
        entry = torch.zeros_like(corner[0])
        for index, prime in zip(reversed(corner), _PRIMES, strict=False):
            # As in the paper's 32 bits: of the products only the lowest bits are kept.
            entry = entry ^ (index * prime)
        return entry.remainder(self._table_size)

    def _matrix(self, lines: slice) -> _SparseMatrix:
        """Interpolation of some lines from the table, one row for each level and pixel; prepared once."""
        key = lines.indices(self._shape[0])
        if key not in self._matrices:
            indices, weights = [], []
            for sizes, start in zip(self._sizes, self._starts, strict=True):
                lefts, parts = [], []
                for axis, (size, n) in enumerate(zip(sizes, self._shape, strict=True)):
                    along = [1] * len(sizes)
                    along[axis] = -1
                    left, part = _interpolation_places(size, n)
                    some = lines if axis == 0 else slice(None)
                    lefts.append(left[some].reshape(along))
                    parts.append(part[some].reshape(along))
                level_indices, level_weights = [], []
                for steps in product((0, 1), repeat=len(sizes)):
                    corner = [left + step for left, step in zip(lefts, steps, strict=True)]
                    weight = torch.ones((), dtype=torch.float64)
                    for part, step in zip(parts, steps, strict=True):
                        weight = weight * (part if step else 1 - part)
                    level_indices.append((start + self._entries(corner, sizes)).flatten())
                    level_weights.append(weight.flatten())
                indices.append(torch.stack(level_indices, 1))
                weights.append(torch.stack(level_weights, 1))
            index, weight = torch.cat(indices), torch.cat(weights).to(self.table.dtype)  # (L·P, corners)
            device = self.table.device
            self._matrices[key] = _SparseMatrix(index.to(device), weight.to(device), len(self.table))
        return self._matrices[key]

    def forward(self, lines: slice) -> Tensor:
        """Features `(L·D, P)` of the pixels in some lines of the raster."""
        features: Tensor = _Product.apply(self.table, self._matrix(lines))  # type: ignore[no-untyped-call]
        by_level = features.reshape(len(self._sizes), -1, features.shape[1])  # (L, P, D)
        return by_level.transpose(1, 2).flatten(0, 1)


class FourierEncoder(Encoder):
    """Random Fourier features: sines and cosines of random fixed frequencies; nothing here is trained.

    Parameters
    ----------
    shape
        Of the raster, any number of axes.
    share
        Longest side of the raster in fields of view.
    frequencies
        Number m; F = 2m: all cosines, then all sines.
    sigma
        Standard deviation of the frequencies along each axis, in cycles per field of view.
    generator
        On the CPU; draws the frequencies.

    References
    ----------
    Tancik et al., NeurIPS 33:7537 (2020), arXiv:2006.10739.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        share: float,
        frequencies: int,
        sigma: float,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.n_features = 2 * frequencies
        #: `(m, axes)`, cycles per field of view.
        self.frequencies = sigma * torch.randn((frequencies, len(shape)), generator=generator)
        cycles = torch.tensordot(self.frequencies, raster(shape, share), dims=1)
        angle = 2 * math.pi * cycles
        self._features = torch.cat([angle.cos(), angle.sin()]).to(device)  # (2m, *shape)

    def forward(self, lines: slice) -> Tensor:
        """Features `(2m, P)` of the pixels in some lines of the raster."""
        return self._features[:, lines].flatten(1)


class SirenEncoder(Encoder):
    """Layers of sines from the coordinates on: the features are those of the last layer.

    No other layer needs to follow: the images are linear in these features.

    Parameters
    ----------
    shape
        Of the raster, any number of axes.
    share
        Longest side of the raster in fields of view. The field of view has the coordinates -1 to 1.
    layers, hidden
        Number of layers and their width; F = hidden.
    omega
        Factor ω of the angle of each sine.
    generator
        On the CPU; draws the first weights.
    device
        Of the weights.

    References
    ----------
    Sitzmann et al., NeurIPS 33:7462 (2020), arXiv:2006.09661, section 3.2.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        share: float,
        layers: int,
        hidden: int,
        omega: float,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.n_features, self._omega = hidden, omega
        self._places = 2 * raster(shape, share).to(device)
        self.weights, self.biases = torch.nn.ParameterList(), torch.nn.ParameterList()
        for layer in range(layers):
            n_in = hidden if layer else len(shape)
            # The first layer sets frequencies; at each other one the angles have a standard deviation of 1.
            bound = math.sqrt(6 / n_in) / omega if layer else 1 / n_in
            weight = (torch.rand((hidden, n_in), generator=generator) * 2 - 1) * bound
            bias = (torch.rand((hidden, 1), generator=generator) * 2 - 1) / math.sqrt(n_in)
            self.weights.append(torch.nn.Parameter(weight.to(device)))
            self.biases.append(torch.nn.Parameter(bias.to(device)))

    def forward(self, lines: slice) -> Tensor:
        """Features `(hidden, P)` of the pixels in some lines of the raster."""
        x = self._places[:, lines].flatten(1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = torch.sin(self._omega * (weight @ x + bias))
        return x


def make_encoder(
    name: str,
    shape: tuple[int, int],
    *,
    share: float,
    levels: int,
    features: int,
    base: int,
    finest: int,
    log2_table: int,
    frequencies: int,
    sigma: float,
    layers: int,
    hidden: int,
    omega: float,
    generator: torch.Generator,
    device: torch.device,
) -> Encoder:
    """Encoder by name, with those of the parameters that it has.

    Raises
    ------
    ValueError
        For another name than those of `ENCODERS`.
    """
    if name == "grid":
        return GridEncoder(
            shape, share=share, levels=levels, features=features, base=base, finest=finest,
            generator=generator, device=device,
        )  # fmt: skip
    if name == "hash":
        return HashEncoder(
            shape, share=share, levels=levels, features=features, base=base, finest=finest,
            log2_table=log2_table, generator=generator, device=device,
        )  # fmt: skip
    if name == "fourier":
        return FourierEncoder(
            shape, share=share, frequencies=frequencies, sigma=sigma, generator=generator, device=device
        )
    if name == "siren":
        return SirenEncoder(
            shape, share=share, layers=layers, hidden=hidden, omega=omega, generator=generator, device=device
        )
    raise ValueError(f'encoder is "{name}": expected one of {", ".join(ENCODERS)}')
