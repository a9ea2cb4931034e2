"""Noise of the receive coils.

Letters: C coils, S samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from whorl.simulation.encoding import Encoding
from whorl.simulation.parameters import Parameters


@dataclass(frozen=True, slots=True, eq=False)
class Noise:
    """What a scan's noise is.

    Parameters
    ----------
    prescan
        Readouts of noise alone, `(readouts, C, S)`.
    covariance
        Of the coils, `(C, C)`, mean diagonal 1.
    sd
        Of a complex sample, mean over the coils.
    """

    prescan: NDArray[np.complex64]
    covariance: NDArray[np.complex128]
    sd: float


def add_noise(kspace: NDArray[np.complex64], encoding: Encoding, p: Parameters) -> Noise:
    """Add noise to the readouts `(Z, T, C, S)`, and measure some without an object."""
    rng = np.random.default_rng(p.seed)
    covariance = _random_covariance(p.coils, rng)
    if p.noise_covariance is not None:
        told = np.asarray(p.noise_covariance, dtype=np.complex128)
        covariance = told * (p.coils / np.trace(told).real)
    sd = p.noise * max(float(np.max(np.abs(part))) for part in kspace)
    mixing = np.linalg.cholesky(covariance) * np.complex128(sd)
    dwell_us = encoding.dwell_us
    wider = math.sqrt(dwell_us / (p.noise_dwell_us or dwell_us))  # bandwidth of the prescan, as a root
    prescan = _noise(mixing * wider, (encoding.n_prescans, *kspace.shape[2:]), rng)
    for part in kspace:
        part += _noise(mixing, part.shape, rng)
    return Noise(prescan, covariance, sd)


def _random_covariance(coils: int, rng: np.random.Generator) -> NDArray[np.complex128]:
    """Random covariance of the coils, `(C, C)`, Hermitian, mean diagonal 1, condition below 10."""
    mixing = rng.standard_normal((coils, coils)) + 1j * rng.standard_normal((coils, coils))
    gains = rng.uniform(0.7, 1.4, coils)
    covariance = gains[:, None] * (np.eye(coils) + 0.5 * mixing @ mixing.conj().T / (2 * coils)) * gains
    result: NDArray[np.complex128] = covariance * (coils / np.trace(covariance).real)
    return result


def correlated_noise(coils: int, correlation: float, noisy: float = 1.0) -> NDArray[np.complex128]:
    """Covariance `(C, C)` of coils of which any two are correlated alike, and the first is noisier.

    Parameters
    ----------
    correlation
        0 to less than 1; its phase differs from pair to pair.
    noisy
        SD of the first coil relative to the others.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """
    if not 0 <= correlation < 1:
        raise ValueError(f"noise_correlation is {correlation:g}: expected 0 to less than 1")
    if not (noisy > 0 and math.isfinite(noisy)):
        raise ValueError(f"noisy_coil is {noisy:g}: expected a positive number")
    turns = np.exp(2.4j * np.arange(coils))
    gains = np.ones(coils)
    gains[0] = noisy
    alike = (1 - correlation) * np.eye(coils) + correlation * np.outer(turns, turns.conj())
    return np.asarray(gains[:, None] * alike * gains, dtype=np.complex128)


def _noise(
    mixing: NDArray[np.complex128], shape: tuple[int, int, int], rng: np.random.Generator
) -> NDArray[np.complex64]:
    """Complex Gaussian noise `(readouts, C, S)` with ``E[n nᴴ] = mixing mixingᴴ``."""
    white = rng.standard_normal((2, *shape))
    result: NDArray[np.complex64] = (mixing @ ((white[0] + 1j * white[1]) / np.sqrt(2))).astype(np.complex64)
    return result
