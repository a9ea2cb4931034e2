"""A scan as MRD has it: the header, and the readouts as they lie in HDF5.

Letters: Z slices, T timepoints, C coils, S samples.
"""

from __future__ import annotations

import ismrmrd.xsd as xsd
import numpy as np
from ismrmrd.hdf5 import acquisition_dtype
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from whorl.scan.readout import HEAD_DTYPE, Flag
from whorl.simulation.encoding import Encoding
from whorl.simulation.parameters import Parameters
from whorl.simulation.phantoms import SLICE_MM, slice_heights_mm
from whorl.simulation.spiral import GAMMA_HZ_PER_T

_FIRST_IN_SLICE = 1 << (7 - 1)  # the reconstruction has no use for this flag, other programs have
_FIELD_T = 3.0
# Time between two slices: the next one starts from the equilibrium.
_PAUSE_MS = 10_000.0


def header(p: Parameters, encoding: Encoding) -> bytes:
    """The XML header."""
    train, layout = encoding.train, p.layout
    space = xsd.encodingSpaceType(
        matrixSize=xsd.matrixSizeType(x=p.matrix, y=p.matrix, z=1),
        fieldOfView_mm=xsd.fieldOfViewMm(x=p.fov_mm, y=p.fov_mm, z=SLICE_MM),
    )

    def limit(n: int) -> xsd.limitType:
        return xsd.limitType(minimum=0, maximum=n - 1, center=0)

    def values(of_train: NDArray[np.float64]) -> list[float]:
        found = [float(value) for value in of_train]
        return found if layout.told else found[:1]

    n_counted = p.timepoints
    if not layout.noise_flagged:
        n_counted += encoding.n_prescans

    name = f"nist {p.plate}" if p.phantom == "nist" else p.phantom
    document = xsd.ismrmrdHeader(
        version=1,
        measurementInformation=xsd.measurementInformationType(
            patientPosition=xsd.patientPositionType.HFS,
            protocolName=f"whorl simulation {name}",
            sequenceName="spiral FISP fingerprinting",
        ),
        acquisitionSystemInformation=xsd.acquisitionSystemInformationType(
            systemVendor="whorl",
            systemModel="simulation",
            systemFieldStrength_T=_FIELD_T,
            # The simulated noise is white up to the edges of the receiver's band.
            relativeReceiverNoiseBandwidth=1.0,
            receiverChannels=p.coils,
        ),
        experimentalConditions=xsd.experimentalConditionsType(
            H1resonanceFrequency_Hz=round(GAMMA_HZ_PER_T * _FIELD_T)
        ),
        encoding=[
            xsd.encodingType(
                encodedSpace=space,
                reconSpace=space,
                encodingLimits=xsd.encodingLimitsType(
                    kspace_encoding_step_1=limit(p.interleaves),
                    slice=limit(p.slices),
                    repetition=limit(n_counted if layout.numbered else 1),
                ),
                trajectory=xsd.trajectoryType.SPIRAL,
            )
        ],
        sequenceParameters=xsd.sequenceParametersType(
            TR=values(train.tr_ms),
            TE=values(train.te_ms),
            TI=[float(train.ti_ms)],
            flipAngle_deg=values(train.flip_deg),
        ),
    )
    return str(xsd.ToXML(document)).encode()


def rows(
    prescan: NDArray[np.complex64], kspace: NDArray[np.complex64], encoding: Encoding, p: Parameters
) -> NDArray[np.void]:
    """All acquisitions in the order of measurement: noise `(readouts, C, S)`, then data `(Z, T, C, S)`."""
    train, layout, arms = encoding.train, p.layout, encoding.arms
    n_slices, n_timepoints, n_coils, n_samples = kspace.shape
    n_noise = len(prescan)
    n_scan = n_slices * n_timepoints
    slice_of, t = np.divmod(np.arange(n_scan), n_timepoints)

    head = np.zeros(n_noise + n_scan, dtype=HEAD_DTYPE)
    head["version"] = 1
    head["measurement_uid"] = 1
    head["scan_counter"] = np.arange(len(head))
    head["number_of_samples"] = n_samples
    head["available_channels"] = head["active_channels"] = n_coils
    for word in range((n_coils + 63) // 64):
        head["channel_mask"][:, word] = (1 << min(n_coils - 64 * word, 64)) - 1
    head["sample_time_us"] = encoding.dwell_us
    head["read_dir"], head["phase_dir"], head["slice_dir"] = (1, 0, 0), (0, 1, 0), (0, 0, 1)

    if p.noise_dwell_us is not None:
        head["sample_time_us"][:n_noise] = p.noise_dwell_us
    if layout.noise_flagged:
        head["flags"][:n_noise] = int(Flag.IS_NOISE_MEASUREMENT)
    first = 0 if layout.noise_flagged else n_noise
    if layout.numbered and first:
        head["idx"]["repetition"][:n_noise] = np.arange(n_noise)
    scan = head[n_noise:]
    # A view of structured fields is written to directly; the readout starts at the centre of k-space.
    scan["trajectory_dimensions"] = 2 if layout.attached else 0
    scan["center_sample"] = 0
    scan["position"][:, 2] = slice_heights_mm(n_slices)[slice_of]
    scan["idx"]["slice"] = slice_of
    if layout.numbered:
        scan["idx"]["repetition"] = first + t
    scan["idx"]["kspace_encode_step_1"] = arms[t]
    if layout.told:
        scan["user_int"][:, 0] = t if layout.numbered else 0
        scan["user_int"][:, 2] = np.rint(train.tr_ms * 1e3)[t]
        scan["user_int"][:, 3] = np.rint(train.te_ms * 1e3)[t]
        scan["user_int"][:, 5] = np.rint(train.flip_deg * 100)[t]
        scan["user_int"][:, 6] = np.rint(train.phase_deg * 100)[t]
    # Sums, because each flag is set once; numpy 1 does not combine uint64 with a Python int by |.
    scan["flags"][t == 0] += np.uint64(_FIRST_IN_SLICE)
    scan["flags"][t == n_timepoints - 1] += np.uint64(Flag.LAST_IN_SLICE)
    scan["flags"][-1] += np.uint64(Flag.LAST_IN_MEASUREMENT)

    # Ticks of 2.5 ms from an arbitrary start, as scanners count them; the prescan comes a second earlier.
    pulse_ms = train.ti_ms + np.concatenate([[0.0], np.cumsum(train.tr_ms[:-1])])
    slice_ms = train.ti_ms + train.tr_ms.sum() + _PAUSE_MS
    start_ms = 1000 + slice_of * slice_ms + (pulse_ms + train.te_ms)[t]
    head["acquisition_time_stamp"][n_noise:] = start_ms / 2.5
    head["acquisition_time_stamp"][:n_noise] = 4 * np.arange(n_noise)

    _place(head, n_noise, p)
    table = np.empty(len(head), dtype=acquisition_dtype)
    table["head"] = head
    nothing = np.zeros(0, dtype=np.float32)
    trajectory = encoding.nominal.astype(np.float32)
    for n in range(n_noise):
        table["traj"][n] = nothing
        table["data"][n] = prescan[n].view(np.float32).ravel()
    readouts = kspace.reshape(n_scan, n_coils, n_samples)
    for n in range(n_scan):
        table["traj"][n_noise + n] = trajectory[arms[t[n]]].ravel() if layout.attached else nothing
        table["data"][n_noise + n] = readouts[n].view(np.float32).ravel()
    return table


def _place(head: NDArray[np.void], n_prescans: int, p: Parameters) -> None:
    """Turn and move an axial stack of slices about the isocentre."""
    turn = Rotation.from_euler("xyz", list(p.turned_deg), degrees=True).as_matrix()
    for axis, name in enumerate(("read_dir", "phase_dir", "slice_dir")):
        head[name] = turn[:, axis]
    heights = head["position"][n_prescans:, 2].astype(np.float64)
    head["position"][n_prescans:] = np.asarray(p.centre_mm) + heights[:, None] * turn[:, 2]
