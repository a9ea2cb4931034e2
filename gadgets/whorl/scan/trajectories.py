"""Trajectories that do not come with the data.

Letters: I interleaves, S samples, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from whorl.scan.failure import ScanError

#: Relative difference of two dwell times that is rounding.
_SAME_DWELL = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Trajectories:
    """Where the samples of readouts lie whose data do not say it.

    Parameters
    ----------
    points
        `(I, S, D)` float64: kx, ky and perhaps a density weight, of each distinct interleaf.
    units
        A name of `whorl.scan.trajectory.unit_scales`, or ``auto``: to be told by the largest radius.
    source
        Where they come from, for the operator.
    by
        What numbers them: ``arm`` (kspace_encode_step_1), ``timepoint``, or ``auto``: not told.
    which
        `(N,)` int64, interleaf of each arm or timepoint; ``None``: they are numbered directly.
    dwell_us
        Time between two samples; ``None``: not known, then it is that of the readouts.
    """

    points: NDArray[np.float64]
    units: str
    source: str
    by: Literal["auto", "arm", "timepoint"] = "auto"
    which: NDArray[np.int64] | None = None
    dwell_us: float | None = None

    def __len__(self) -> int:
        """Arms or timepoints that have a trajectory."""
        return len(self.points if self.which is None else self.which)

    def interleaf(self, number: int) -> NDArray[np.float64] | None:
        """Trajectory `(S, D)` of an arm or timepoint; ``None`` if there is none."""
        if not 0 <= number < len(self):
            return None
        return np.asarray(self.points[number if self.which is None else self.which[number]])

    def sampled(self, n_samples: int, dwell_us: float) -> Trajectories:
        """The same for readouts of another number of samples, as where oversampling was removed.

        Both begin with the same sample: a receiver that removes oversampling keeps the time of the first.

        Raises
        ------
        ScanError
            If the readouts are longer, or their sizes differ and a dwell time is not known.
        """
        S = self.points.shape[1]
        known = self.dwell_us is not None and dwell_us > 0
        same = not known or abs(dwell_us / (self.dwell_us or 1) - 1) < _SAME_DWELL
        if n_samples == S and same:
            return self
        step = dwell_us / self.dwell_us if known and self.dwell_us else 0.0
        last = (n_samples - 1) * step
        if not step or last > S - 1 + 0.5:
            has = f"{S} samples" + (f" of {self.dwell_us:g} µs" if self.dwell_us else "")
            raise ScanError(
                f"the trajectory ({self.source}) has {has}, the readouts have {n_samples} "
                f"of {dwell_us:g} µs: expected one place for each sample"
            )
        spline = CubicSpline(np.arange(S), self.points, axis=1)
        return replace(self, points=spline(np.arange(n_samples) * step), dwell_us=dwell_us)
