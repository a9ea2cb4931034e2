"""STUB"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from whorl.scan.failure import ScanError
from whorl.scan.train import Train
from whorl.scan.trajectories import Trajectories


@dataclass(frozen=True, slots=True, eq=False)
class PulseqSequence:
    train: Train
    trajectories: Trajectories
    adc: NDArray[np.int64]
    slice_of_adc: NDArray[np.int64]
    n_slices: int
    receiver_deg: NDArray[np.float64]
    measured: NDArray[np.bool_]
    fov_mm: tuple[float, float] | None
    n_samples: int
    warnings: tuple[str, ...]


def read_pulseq(path: str, inversion_time_ms: float | None = None) -> PulseqSequence:
    raise ScanError("Pulseq stub")
