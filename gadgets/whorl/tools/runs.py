"""The runs of a comparison of methods on one scan, and all of them together.

Letters: Z slices, V voxels, K coefficients, Y X pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from whorl.config import Settings
from whorl.maps.images import Frame
from whorl.maps.rois import RegionStatistics
from whorl.pipeline.scan import Outcome
from whorl.pipeline.slices import SliceResult
from whorl.simulation.truth import Truth


@dataclass(slots=True, eq=False)
class Run:
    """One method on one scan.

    Parameters
    ----------
    key, title
        Name in `compare.json` and in figures.
    maps
        `(Z, Y, X)` float32 by quantity; slices that failed are 0.
    images
        Magnitude of the subspace images `(K, Y, X)` of the slice that is shown; no coefficient if it failed.
    results
        What is known about each slice; the inside only of the one that is shown.
    """

    key: str
    title: str
    n_timepoints: int
    settings: Settings
    outcome: Outcome
    maps: dict[str, NDArray[np.float32]]
    images: NDArray[np.float32]
    results: dict[int, SliceResult]

    @property
    def seconds(self) -> float:
        """Mean time of a slice after its last readout, without the dictionary."""
        times = [result.seconds["slice"] for result in self.results.values() if "slice" in result.seconds]
        return float(np.mean(times)) if times else math.nan

    @property
    def fell_back(self) -> bool:
        return any(result.status == "fallback" for result in self.results.values())


@dataclass(slots=True)
class Search:
    """Grid search for the weight of llr.

    Parameters
    ----------
    criterion
        What the errors are, or why there are none.
    errors
        By weight, ascending; infinite where the method fell back.
    chosen
        The weight with the smallest error.
    seconds
        Time of the slice summed over the grid.
    """

    criterion: str
    chosen: float
    errors: dict[float, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(slots=True, eq=False)
class Comparison:
    """All runs on one scan.

    Parameters
    ----------
    runs
        By key, in the order of tables and figures; the last is the INR with default settings.
    truth
        Of a simulated scan.
    reference, reference_maps
        What the runs are compared with: the truth, or the low-rank maps of all timepoints.
    rows
        Statistics of the regions by run and quantity; no rows without regions of some size.
    summaries
        Figures by run and name.
    frames
        Of the fit of the INR as published on slice `shown`, while it develops: by default the INR begins
        where that ends. Empty if it fell back.
    """

    runs: dict[str, Run]
    truth: Truth | None
    reference: str
    reference_maps: dict[str, NDArray[np.float32]]
    n_timepoints: int
    n_slices: int
    shown: int
    search: Search
    rows: dict[str, dict[str, list[RegionStatistics]]]
    summaries: dict[str, dict[str, float]]
    frames: list[Frame]

    @property
    def has_regions(self) -> bool:
        return any(of["T2"] for of in self.rows.values())

    @property
    def exit_code(self) -> int:
        """0, or 3 if something was degraded, a fall-back, or missing."""
        return 3 if any(run.outcome.exit_code for run in self.runs.values()) else 0


def voxels(
    ours: NDArray[np.float32], theirs: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Values `(V,)` of two maps where both have one."""
    both = (theirs > 0) & (ours > 0)
    return ours[both], theirs[both]
