"""Dictionary of fingerprints and the temporal subspace that holds them.

Letters: T timepoints, N atoms, K coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from whorl.physics.epg import fisp_signal
from whorl.scan.train import Train


@dataclass(frozen=True, slots=True)
class Dictionary:
    """Atoms in the temporal subspace of their train.

    Parameters
    ----------
    t1_ms, t2_ms
        `(N,)` float32 in ms.
    coefficients
        `(N, K)`: subspace coefficients of each atom for M0 = 1.
    basis
        `(T, K)`: orthonormal columns, signal = ``basis @ coefficients``.
    energy
        Share of the atoms' energy that the basis keeps.
    """

    t1_ms: Tensor
    t2_ms: Tensor
    coefficients: Tensor
    basis: Tensor
    energy: float

    def to(self, device: torch.device) -> Dictionary:
        return Dictionary(
            t1_ms=self.t1_ms.to(device),
            t2_ms=self.t2_ms.to(device),
            coefficients=self.coefficients.to(device),
            basis=self.basis.to(device),
            energy=self.energy,
        )


def log_grid(low: float, high: float, step: float) -> np.ndarray:
    """Values from `low` to `high`, both included, in equal ratios of at most 1 + `step`."""
    count = int(np.ceil(np.log(high / low) / np.log1p(step))) + 1
    return np.geomspace(low, high, max(count, 2))


def relaxation_grid(
    t1_range_ms: tuple[float, float], t2_range_ms: tuple[float, float], step: float
) -> tuple[Tensor, Tensor]:
    """All pairs with T2 <= T1 of two logarithmic grids: two lists `(N,)` in ms.

    Raises
    ------
    ValueError
        If no pair is left.
    """
    t1, t2 = np.meshgrid(log_grid(*t1_range_ms, step), log_grid(*t2_range_ms, step), indexing="ij")
    physical = t2 <= t1
    if not physical.any():
        raise ValueError(
            f"no T2 of {t2_range_ms} ms is at most a T1 of {t1_range_ms} ms: the dictionary is empty"
        )
    return torch.tensor(t1[physical], dtype=torch.float32), torch.tensor(t2[physical], dtype=torch.float32)


def temporal_basis(signals: Tensor, energy: float, n_coefficients: int = 0) -> tuple[Tensor, float]:
    """Left singular vectors of a dictionary: the temporal subspace.

    The columns come from the eigenvectors of ``sᴴs`` in float64; each is given the phase that
    makes the sum of the atoms' coefficients real and positive, so the basis of one dictionary
    is always the same.

    Parameters
    ----------
    signals
        Atoms `(N, T)`, real or complex.
    energy
        Share of Σ|signals|² that the basis keeps at least.
    n_coefficients
        K; 0: the smallest that keeps `energy`.

    Returns
    -------
    Tensor, float
        Basis `(T, K)` in the dtype of `signals`, and the share of energy that it keeps.

    References
    ----------
    McGivney et al., IEEE Trans Med Imaging 33:2311 (2014), doi:10.1109/TMI.2014.2337321.
    """
    wide = signals.to(torch.complex128 if signals.is_complex() else torch.float64)
    values, vectors = torch.linalg.eigh(wide.T @ wide.conj())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    kept = torch.cumsum(values, 0) / values.sum()
    K = n_coefficients or int((kept < energy).sum()) + 1
    K = min(K, signals.shape[1], signals.shape[0])
    basis = vectors[:, :K]
    total = (wide @ basis.conj()).sum(0)
    basis = basis * torch.where(
        total.abs() > 0, total / total.abs().clamp_min(1e-300), torch.ones_like(total)
    )
    return basis.to(signals.dtype), float(kept[K - 1])


def build_dictionary(
    train: Train,
    *,
    t1_range_ms: tuple[float, float] = (20.0, 5000.0),
    t2_range_ms: tuple[float, float] = (4.0, 3000.0),
    step: float = 0.05,
    energy: float = 0.9999,
    n_coefficients: int = 0,
) -> Dictionary:
    """Simulate all atoms of a logarithmic grid and compress them into their own subspace.

    Parameters
    ----------
    train
        T pulses.
    t1_range_ms, t2_range_ms
        Ends of the grid, included.
    step
        Relative step of the grid.
    energy, n_coefficients
        As in `temporal_basis`.
    """
    t1_ms, t2_ms = relaxation_grid(t1_range_ms, t2_range_ms, step)
    signals = fisp_signal(train, t1_ms, t2_ms)  # (N, T)
    basis, kept = temporal_basis(signals, energy, n_coefficients)
    return Dictionary(t1_ms, t2_ms, signals @ basis.conj(), basis, kept)


#: The same, remembered for the latest trains: a warm server builds a dictionary once.
cached_dictionary = lru_cache(maxsize=4)(build_dictionary)
