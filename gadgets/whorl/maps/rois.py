"""Accuracy and precision of maps in regions of known truth.

Letters: R regions, Y X pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Regions with fewer pixels say nothing about a spread.
_FEWEST = 10
#: Quantities that have a truth, with their names in maps and truths.
QUANTITIES = (("T1", "t1_ms"), ("T2", "t2_ms"))
#: What a train of 9 ms pulses can hardly see is shorter.
SHORTEST_T2_MS = 15.0


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
    return determination(np.array([row.truth for row in rows]), np.array([row.mean for row in rows]))


def determination(truth: NDArray[np.floating], values: NDArray[np.floating]) -> float:
    """Coefficient of determination of values against their truth, both `(N,)`; NaN where the truth has no
    variance."""
    spread = float(np.sum((truth - truth.mean()) ** 2)) if len(truth) else 0.0
    return 1 - float(np.sum((values - truth) ** 2)) / spread if spread else float("nan")


def largest_bias_percent(rows: Sequence[RegionStatistics]) -> float:
    """The bias that is farthest from 0, with its sign; NaN without regions."""
    return max((row.bias_percent for row in rows), key=abs, default=float("nan"))


def well_seen(rows: Mapping[str, Sequence[RegionStatistics]]) -> dict[str, list[RegionStatistics]]:
    """By quantity, the regions whose T2 is at least `SHORTEST_T2_MS`."""
    names = {row.name for row in rows["T2"] if row.truth >= SHORTEST_T2_MS}
    return {quantity: [row for row in of_all if row.name in names] for quantity, of_all in rows.items()}
