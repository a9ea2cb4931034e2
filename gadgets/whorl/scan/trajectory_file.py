"""STUB"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from whorl.scan.trajectories import Trajectories


def read_trajectories(path: str) -> Trajectories:
    raise NotImplementedError


def rotated(
    points: NDArray[np.float64], n_interleaves: int, rotation_deg: float = 0.0
) -> NDArray[np.float64]:
    raise NotImplementedError
