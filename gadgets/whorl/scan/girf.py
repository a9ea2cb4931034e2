"""STUB"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Girf:
    response: NDArray[np.complex128]


def read_girf(path: str, raster_us: float = 10.0) -> Girf:
    raise NotImplementedError


def corrected(
    trajectory: NDArray[np.floating],
    dwell_us: float,
    girf: Girf | None,
    delay_us: tuple[float, float],
    directions: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    raise NotImplementedError
