"""Spirals for tests: small, and dense enough for the images that they are used with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotated_spiral(n_interleaves: int, n_samples: int, turns: float, *, radius: float = 0.5) -> Tensor:
    """Archimedean interleaves `(I, S, 2)` float32 in cycles per pixel."""
    r = torch.linspace(0, 1, n_samples, dtype=torch.float64)
    arm = torch.arange(n_interleaves, dtype=torch.float64)[:, None] / n_interleaves
    angle = 2 * math.pi * (turns * r + arm)
    return torch.stack([radius * r * angle.cos(), radius * r * angle.sin()], -1).to(torch.float32)


def complex_normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.complex64)


def orthonormal_basis(n_timepoints: int, n_coefficients: int, *, seed: int = 0) -> Tensor:
    """Complex `(T, K)`: a real one would hide a missing conjugate."""
    return torch.linalg.qr(complex_normal(n_timepoints, n_coefficients, seed=seed)).Q
