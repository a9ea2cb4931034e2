"""The whitening of a scan, by the noise readouts that come before its first image data.

Letters: C coils.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whorl.config import Settings
from whorl.kspace.coils import NoiseStatistics, dependent_coils, whitening_matrix


@dataclass(frozen=True, slots=True, eq=False)
class Whitening:
    """How a scan's coils are whitened.

    Parameters
    ----------
    matrix
        `(C', C)` complex64, C' smaller than C where coils are dead; ``None``: not at all.
    how
        For the log.
    note
        What could not be made as asked for, or of all coils; empty if all could.
    """

    matrix: Tensor | None
    how: str = ""
    note: str = ""


def make_whitening(
    noise: NoiseStatistics, n_coils: int, dwell_us: float, bandwidth: float, settings: Settings
) -> Whitening:
    """Whitening of the image data.

    Parameters
    ----------
    noise
        Of the noise readouts.
    n_coils, dwell_us
        Coils C of the image data, and the time between two samples.
    bandwidth
        Relative noise bandwidth of the receiver, by the header; 0: not told.
    """
    if settings.whiten == "off" or not noise.n_readouts:
        why = "whiten=off" if settings.whiten == "off" else "no noise readouts"
        return Whitening(None, f"not whitened: {why}")
    bandwidth = settings.noise_bandwidth or bandwidth or 1.0
    try:
        covariance = noise.covariance(n_coils, dwell_us, bandwidth)
        matrix = whitening_matrix(covariance).to(torch.complex64)
    except ValueError as error:
        return Whitening(None, note=f"{error}: not whitened")
    noise_dwell_us = noise.dwell_us(n_coils)
    scaled = (
        f"noise of {noise_dwell_us:g} µs scaled to {dwell_us:g} µs, relative bandwidth {bandwidth:g}"
        if noise_dwell_us and dwell_us > 0
        else "noise not scaled, its dwell time or that of the data is not known"
    )
    how = f"{n_coils} coils whitened by {noise.n_usable(n_coils)} noise readouts; {scaled}"
    note = ""
    if dropped := dependent_coils(covariance):
        listed = ", ".join(str(coil) for coil in dropped)
        note = (
            f"of {n_coils} coils, {listed} (counted from 0) {'was' if len(dropped) == 1 else 'were'} "
            f"dropped: without noise of their own, they are dead or copies of others"
        )
    return Whitening(matrix, how, note)
