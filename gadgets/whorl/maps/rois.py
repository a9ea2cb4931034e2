"""Accuracy and precision of maps in regions of known truth.

Letters: R regions, Y X pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Regions with fewer pixels say nothing about a spread.
_FEWEST = 10


@dataclass(frozen=True, slots=True)
class RegionStatistics:
    """One quantity in one region, in the unit of the map; the standard deviation is over its pixels."""

    name: str
    truth: float
    mean: float
    sd: float
    n_pixels: int

    @property
    def cov_percent(self) -> float:
        """Coefficient of variation, SD / mean."""
        return 100 * self.sd / self.mean if self.mean else float("inf")

    @property
    def bias_percent(self) -> float:
        return 100 * (self.mean / self.truth - 1)


def region_statistics(
    values: NDArray[np.float32], labels: NDArray[np.int16], names: Sequence[str], truth: NDArray[np.float64]
) -> list[RegionStatistics]:
    """Statistics of a map in each region with enough pixels.

    Parameters
    ----------
    values
        `(..., Y, X)`.
    labels
        Same shape; region n has label n + 1.
    names, truth
        `(R,)`.
    """
    rows = []
    for number, (name, value) in enumerate(zip(names, truth, strict=True), start=1):
        inside = values[labels == number]
        if len(inside) >= _FEWEST:
            rows.append(
                RegionStatistics(name, float(value), float(inside.mean()), float(inside.std()), len(inside))
            )
    return rows


def mean_cov_percent(rows: Sequence[RegionStatistics]) -> float:
    """Mean coefficient of variation over regions."""
    return float(np.mean([row.cov_percent for row in rows]))


def r_squared(rows: Sequence[RegionStatistics]) -> float:
    """Coefficient of determination of the regions' means against their truth: the share of the
    truth's variance that the identity line explains (not that of a fitted line)."""
    truth, mean = np.array([row.truth for row in rows]), np.array([row.mean for row in rows])
    spread = float(np.sum((truth - truth.mean()) ** 2))
    return 1 - float(np.sum((mean - truth) ** 2)) / spread if spread else float("nan")
