"""Dictionary of fingerprints and the temporal subspace that holds them.

Letters: T timepoints, N atoms, K coefficients.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.physics.blocks import Blocks
from whorl.physics.epg import SignalModel, fisp_coefficients, fisp_signal
from whorl.runtime.cores import spread
from whorl.scan.train import Train

#: The basis comes from every third T1 and T2, a ninth of the atoms: the subspace of all of
#: them keeps 3e-7 of the energy more.
_COARSE = 3
#: K by energy is at most this: what is beyond is rounding.
MOST_COEFFICIENTS = 64
#: Atoms that are in memory in double precision at a time.
_GRAM_ATOMS = 4096
#: Columns beyond those that the coarse grid needs, in case the fine grid needs more.
_SPARE_COLUMNS = 3


def log_grid(low: float, high: float, step: float) -> NDArray[np.float64]:
    """Values from `low` to `high`, both included, in equal ratios of at most 1 + `step`; three at least,
    because between two there is nothing to interpolate with."""
    count = int(np.ceil(np.log(high / low) / np.log1p(step))) + 1
    grid: NDArray[np.float64] = np.geomspace(low, high, max(count, 3))
    return grid


class Grid:
    """Where the atoms lie: for each B1 all pairs with T2 <= T1, T1 after T1, T2 rising fastest.

    Parameters
    ----------
    t1_axis_ms, t2_axis_ms
        Rising, in equal ratios; ms.
    b1_axis
        Rising, in equal steps; relative transmit field.

    Raises
    ------
    ValueError
        If an axis does not rise or is not positive, or no pair is left.
    """

    def __init__(
        self,
        t1_axis_ms: NDArray[np.float64],
        t2_axis_ms: NDArray[np.float64],
        b1_axis: NDArray[np.float64] | None = None,
    ) -> None:
        self.t1_axis_ms, self.t2_axis_ms = np.asarray(t1_axis_ms), np.asarray(t2_axis_ms)
        self.b1_axis = np.ones(1) if b1_axis is None else np.asarray(b1_axis)
        for name, axis in zip(("T1", "T2", "B1"), self.axes, strict=True):
            if not (len(axis) and np.isfinite(axis).all() and axis[0] > 0 and (np.diff(axis) > 0).all()):
                raise ValueError(f"the {name} values of the dictionary must be positive and rise: got {axis}")
        #: `(A,)`: how many T2 belong to each T1.
        self.counts = np.searchsorted(self.t2_axis_ms, self.t1_axis_ms, side="right")
        #: `(A,)`: number of the first atom of each T1 (in the first B1).
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        if not self.n_pairs:
            raise ValueError(
                f"no T2 from {self.t2_axis_ms[0]:g} ms on is at most a T1 up to {self.t1_axis_ms[-1]:g} ms: "
                f"the dictionary is empty"
            )

    @property
    def axes(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        return self.t1_axis_ms, self.t2_axis_ms, self.b1_axis

    @property
    def n_pairs(self) -> int:
        """Atoms of one B1."""
        return int(self.counts.sum())

    def __len__(self) -> int:
        return self.n_pairs * len(self.b1_axis)

    def atoms(self) -> tuple[Tensor, Tensor, Tensor]:
        """T1 (ms), T2 (ms) and B1 of all atoms, each `(N,)` float32."""
        t1 = np.repeat(self.t1_axis_ms, self.counts)
        t2 = np.concatenate([self.t2_axis_ms[:count] for count in self.counts])
        D = len(self.b1_axis)
        fields = np.repeat(self.b1_axis, self.n_pairs)
        t1_ms, t2_ms, b1 = (
            torch.tensor(values, dtype=torch.float32) for values in (np.tile(t1, D), np.tile(t2, D), fields)
        )
        return t1_ms, t2_ms, b1

    def places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places on the axes of T1 and T2 of one B1's atoms, each `(n_pairs,)`."""
        i = np.repeat(np.arange(len(self.counts)), self.counts)
        return i, np.arange(self.n_pairs) - self.starts[i]

    def thinned(self, step: int) -> Grid:
        """Every `step`-th T1 and T2, the ends included; all B1, with which long T2 change fast."""

        def thin(axis: NDArray[np.float64]) -> NDArray[np.float64]:
            kept = np.unique(np.append(np.arange(0, len(axis), step), len(axis) - 1))
            thinned: NDArray[np.float64] = axis[kept]
            return thinned

        return Grid(thin(self.t1_axis_ms), thin(self.t2_axis_ms), self.b1_axis)


@dataclass(frozen=True, slots=True, eq=False)
class DictionaryParameters:
    """All that a dictionary depends on.

    Parameters
    ----------
    train
        T pulses.
    model
        What the scanner adds to them.
    t1_range_ms, t2_range_ms
        Ends of the grid, included.
    step
        Relative step of T1 and T2.
    b1_range, b1_step
        Ends of the transmit field's axis and its largest step; equal ends: no such axis.
    energy
        Share of the atoms' energy that the basis keeps at least.
    n_coefficients
        K; 0: the smallest that keeps `energy`.
    """

    train: Train
    model: SignalModel = field(default_factory=SignalModel)
    t1_range_ms: tuple[float, float] = (20.0, 5000.0)
    t2_range_ms: tuple[float, float] = (4.0, 3000.0)
    step: float = 0.05
    b1_range: tuple[float, float] = (1.0, 1.0)
    b1_step: float = 0.02
    energy: float = 0.9999
    n_coefficients: int = 0

    def grid(self) -> Grid:
        low, high = self.b1_range
        # Three values at least, as in `log_grid`.
        D = 1 if low == high else max(3, int(np.ceil((high - low) / self.b1_step - 1e-9)) + 1)
        return Grid(
            log_grid(*self.t1_range_ms, self.step),
            log_grid(*self.t2_range_ms, self.step),
            np.linspace(low, high, D),
        )

    def digest(self) -> str:
        """Hash (hex) of all parameters: equal for equal dictionaries."""
        numbers = [
            *self.t1_range_ms,
            *self.t2_range_ms,
            self.step,
            *self.b1_range,
            self.b1_step,
            self.energy,
            float(self.n_coefficients),
        ]
        parts = (self.train.key(), self.model.key(), np.array(numbers).tobytes())
        return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()


@dataclass(frozen=True)
class Dictionary:
    """Atoms in the temporal subspace of their train.

    Parameters
    ----------
    grid
        Where the N atoms lie.
    coefficients
        `(N, K)`: subspace coefficients of each atom for M0 = 1.
    basis
        `(T, K)`: orthonormal columns, signal = ``basis @ coefficients``.
    kept
        `(K,)`: share of the atoms' energy that the first columns keep.
    """

    grid: Grid
    coefficients: Tensor
    basis: Tensor
    kept: tuple[float, ...]

    @property
    def energy(self) -> float:
        """Share of the atoms' energy that the basis keeps."""
        return self.kept[-1]

    @cached_property
    def energies(self) -> Tensor:
        """`(K,)`: energy of each coefficient over all atoms, relative to the first."""
        energies: Tensor = self.coefficients.abs().square().sum(0)
        return energies / energies[0]

    @cached_property
    def lengths(self) -> Tensor:
        """Norm of each atom, `(N,)`."""
        lengths: Tensor = torch.linalg.vector_norm(self.coefficients, dim=1).clamp_min(1e-30)
        return lengths

    @cached_property
    def directions(self) -> Tensor:
        """Atoms of norm 1, `(K, N)` contiguous: what voxels are compared with."""
        return (self.coefficients / self.lengths[:, None]).T.contiguous()

    @cached_property
    def blocks(self) -> Blocks:
        """Directions in blocks of neighbours: what need not be compared with each voxel."""
        return Blocks(self.directions, *self.grid.places())

    def to(self, device: torch.device) -> Dictionary:
        return Dictionary(self.grid, self.coefficients.to(device), self.basis.to(device), self.kept)


def temporal_basis(
    signals: Tensor, energy: float, n_coefficients: int = 0, *, spare: int = 0
) -> tuple[Tensor, tuple[float, ...]]:
    """Left singular vectors of a dictionary: the temporal subspace.

    The columns come from the eigenvectors of ``sᴴs`` in float64, so they are exact where a randomised
    decomposition would not be, at 0.1 s for 500 timepoints. The most energetic comes first; each has the
    phase that makes the sum of the atoms' coefficients real and positive, so the basis of one dictionary
    is always the same.

    Parameters
    ----------
    signals
        Atoms `(N, T)`, real or complex.
    energy
        Share of Σ|signals|² that the basis keeps at least.
    n_coefficients
        K; 0: the smallest that keeps `energy`.
    spare
        Columns beyond these.

    Returns
    -------
    Tensor, tuple of float
        Basis `(T, K)` in the dtype of `signals`, and the share of energy that the first 1 … K columns keep.

    References
    ----------
    McGivney et al., IEEE Trans Med Imaging 33:2311 (2014), doi:10.1109/TMI.2014.2337321.
    """
    wide = torch.complex128 if signals.is_complex() else torch.float64
    T = signals.shape[1]
    gram = torch.zeros((T, T), dtype=wide, device=signals.device)
    for part in torch.split(signals, _GRAM_ATOMS):
        gram += part.to(wide).T @ part.to(wide).conj()
    values, vectors = spread(torch.linalg.eigh, [gram])[0]
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    kept = torch.cumsum(values, 0) / values.sum()
    K = (n_coefficients or int((kept < energy).sum()) + 1) + spare
    K = min(K, signals.shape[1], signals.shape[0])
    basis = vectors[:, :K]
    total = signals.sum(0).to(wide) @ basis.conj()
    basis = basis * torch.where(
        total.abs() > 0, total / total.abs().clamp_min(1e-300), torch.ones_like(total)
    )
    return basis.to(signals.dtype), tuple(kept[:K].tolist())


def build_dictionary(parameters: DictionaryParameters, device: torch.device | None = None) -> Dictionary:
    """Simulate all atoms, straight into the subspace that a coarser grid of them spans.

    The full signals of the fine grid are never kept.

    Raises
    ------
    ValueError
        If a parameter cannot be used.
    """
    train, model, grid = parameters.train, parameters.model, parameters.grid()
    wanted = parameters.n_coefficients
    coarse = grid.thinned(_COARSE)
    if len(coarse) <= train.n_timepoints:  # few atoms span few directions
        coarse = grid
    t1_ms, t2_ms, b1 = (values.to(device) for values in coarse.atoms())
    signals = fisp_signal(train, t1_ms, t2_ms, b1, model=model)
    basis, _ = temporal_basis(signals, parameters.energy, wanted, spare=0 if wanted else _SPARE_COLUMNS)
    del signals
    t1_ms, t2_ms, b1 = (values.to(device) for values in grid.atoms())
    coefficients, energies = fisp_coefficients(train, t1_ms, t2_ms, b1, basis, model=model)
    total = float(energies.double().sum())
    if not 0 < total < float("inf"):
        raise ValueError("the atoms have no signal: the slice profile cancels, or all flip angles vanish")
    # What the columns keep of the fine grid, which is what was asked for.
    columns = coefficients.abs().double().square().sum(0)
    kept = (torch.cumsum(columns, 0) / total).clamp_max(1)
    # With one coefficient all atoms would be the same direction.
    K = wanted or min(max(2, int((kept < parameters.energy).sum()) + 1), MOST_COEFFICIENTS)
    K = min(K, basis.shape[1])
    return Dictionary(
        grid, coefficients[:, :K].contiguous(), basis[:, :K].contiguous(), tuple(kept[:K].tolist())
    )
