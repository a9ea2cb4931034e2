"""Whether readouts agree with the train that was settled.

Letters: T timepoints, R readouts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from whorl.pipeline.protocol import Protocol
from whorl.scan import resolve


class Agreement:
    """Compares readouts with a train, unless a property says what the train is.

    Parameters
    ----------
    protocol
        What was settled.
    overridden
        Whether a property says what the train is.
    heads
        `(R,)` of the slice from which it was settled: what was interpolated there may turn out otherwise
        in another one.
    """

    def __init__(self, protocol: Protocol, overridden: bool, heads: NDArray[np.void]) -> None:
        self._train = protocol.train
        T = self._train.n_timepoints
        self._compared = np.full(T, not overridden and "interpolated" not in self._train.source)
        if not overridden:
            t = protocol.resolved.timepoints(heads)
            self._compared[t[(t >= 0) & (t < T)]] = True

    def check(self, heads: NDArray[np.void], timepoint: NDArray[np.int64]) -> None:
        """Compare readouts `(R,)` with the train.

        Raises
        ------
        ScanError
            If they contradict it.
        """
        inside = (timepoint >= 0) & (timepoint < len(self._compared))
        inside[inside] = self._compared[timepoint[inside]]
        if inside.any():
            resolve.check_agreement(self._train, heads[inside], timepoint[inside])
