"""One readout of a scan, as MRD describes it: the unit that travels through the program.

Letters: C coils, S samples, D trajectory columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

import numpy as np
from ismrmrd.hdf5 import acquisition_header_dtype
from numpy.typing import NDArray

#: The 340-byte AcquisitionHeader of MRD version 1, as it lies on the wire and in HDF5 files.
HEAD_DTYPE: np.dtype[np.void] = acquisition_header_dtype
assert HEAD_DTYPE.itemsize == 340


class Flag(IntFlag):
    """Acquisition flags that whorl reads; flag number n is bit n - 1 (ismrmrd.h)."""

    LAST_IN_SLICE = 1 << (8 - 1)
    IS_NOISE_MEASUREMENT = 1 << (19 - 1)
    IS_PARALLEL_CALIBRATION = 1 << (20 - 1)
    IS_NAVIGATION_DATA = 1 << (23 - 1)
    IS_PHASECORR_DATA = 1 << (24 - 1)
    LAST_IN_MEASUREMENT = 1 << (25 - 1)
    IS_HPFEEDBACK_DATA = 1 << (26 - 1)
    IS_DUMMYSCAN_DATA = 1 << (27 - 1)
    IS_RTFEEDBACK_DATA = 1 << (28 - 1)
    IS_SURFACECOILCORRECTIONSCAN_DATA = 1 << (29 - 1)
    IS_PHASE_STABILIZATION_REFERENCE = 1 << (30 - 1)
    IS_PHASE_STABILIZATION = 1 << (31 - 1)


#: Readouts with one of these flags carry no image data.
NOT_IMAGING = (
    Flag.IS_NOISE_MEASUREMENT
    | Flag.IS_PARALLEL_CALIBRATION
    | Flag.IS_NAVIGATION_DATA
    | Flag.IS_PHASECORR_DATA
    | Flag.IS_DUMMYSCAN_DATA
    | Flag.IS_RTFEEDBACK_DATA
    | Flag.IS_HPFEEDBACK_DATA
    | Flag.IS_SURFACECOILCORRECTIONSCAN_DATA
    | Flag.IS_PHASE_STABILIZATION_REFERENCE
    | Flag.IS_PHASE_STABILIZATION
)


@dataclass(frozen=True, slots=True)
class Readout:
    """One acquisition: header, samples and the places in k-space where they lie.

    The arrays may be views of a receive buffer: they are valid until the next readout is taken
    from the same source. Whoever keeps one copies it.

    Parameters
    ----------
    head
        Record of type `HEAD_DTYPE`, with MRD's own field names.
    trajectory
        `(S, D)` float32 in the unit of the sender; `D` is 0 where none is attached.
    data
        `(C, S)` complex64, arbitrary unit.
    placed
        Whether the trajectory did not come with the data.
    """

    head: np.void
    trajectory: NDArray[np.float32]
    data: NDArray[np.complex64]
    placed: bool = False

    @property
    def flags(self) -> int:
        return int(self.head["flags"])
