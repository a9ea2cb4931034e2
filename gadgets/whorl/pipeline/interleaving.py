"""Which interleaf a readout runs along.

Letters: R readouts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from whorl.kspace.slicebuffer import SliceBuffer
from whorl.pipeline.protocol import Sources
from whorl.scan.arrivals import Placed
from whorl.scan.failure import ScanError
from whorl.scan.readout import Readout


class Interleaving:
    """Numbers interleaves by the trajectories of readouts, or where none are attached, by their timepoints.

    Parameters
    ----------
    sources
        What is known of the scan, its first imaging readout included.
    """

    def __init__(self, sources: Sources) -> None:
        by_timepoint = sources.by_timepoint and sources.trajectories is not None
        self._places = None
        if by_timepoint and sources.trajectories is not None:
            self._places = Placed(sources.trajectories, replaces=sources.replaces)

    def of(self, readout: Readout, timepoint: int | None, buffer: SliceBuffer) -> int:
        """Number of a readout's interleaf in `buffer`; 0 as long as it hangs on an unknown timepoint."""
        if self._places is None:
            return buffer.interleaves.number(readout.trajectory)
        if timepoint is None:
            return 0
        numbers = self.of_timepoints(np.array([timepoint]), buffer)
        assert numbers is not None
        return int(numbers[0])

    def of_timepoints(self, timepoint: NDArray[np.int64], buffer: SliceBuffer) -> NDArray[np.int64] | None:
        """Numbers `(R,)` in `buffer`, 0 where the timepoint is -1; ``None`` where readouts tell them."""
        if self._places is None:
            return None
        table = self._places.of_size(buffer.head)
        numbers = np.zeros(len(timepoint), dtype=np.int64)
        for n, t in enumerate(timepoint.tolist()):
            if t < 0:
                continue
            places = table.interleaf(t)
            if places is None:
                raise ScanError(
                    f"the trajectory ({table.source}) has {len(table)} timepoints, the readouts have "
                    f"timepoint {t}: expected one for each"
                )
            numbers[n] = buffer.interleaves.number(places.astype(np.float32))
        return numbers
