"""A scan that could have been measured: an MRD file with the truth beside the data.

The object is given on its own fine grid and transformed to the samples of the spiral at once, tissue by
tissue; each timepoint is then a sum of the tissues' k-space with their signals as weights. Where the
transmit field or the relaxation varies from place to place, components of the signals take the place of
the tissues. Nothing here is shared with the reconstruction.

Letters: Z slices, T timepoints, M tissues, R components, C coils, I interleaves, S samples, Y X pixels,
V U samples of the fine grid.
"""

from __future__ import annotations

import itertools
import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import finufft
import h5py
import ismrmrd.xsd as xsd
import numpy as np
from ismrmrd.hdf5 import acquisition_dtype
from numpy.polynomial import chebyshev
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from whorl.scan.readout import HEAD_DTYPE, Flag
from whorl.simulation.gradients import play
from whorl.simulation.phantoms import (
    FINE,
    SLICE_MM,
    Phantom,
    brain,
    coil_maps,
    fine_positions,
    letters,
    nist_plate,
    off_resonance,
    phase_jump,
    slice_heights_mm,
    textured_brain,
    transmit_field,
    with_fat,
)
from whorl.simulation.pulseq import read_played
from whorl.simulation.signals import Expansion, Train, expand_signals, fisp_signals, jiang_train
from whorl.simulation.spiral import GAMMA_HZ_PER_T, design_spiral

_FIRST_IN_SLICE = 1 << (7 - 1)  # the reconstruction has no use for this flag, other programs have
_NOISE_READOUTS = 4
_FIELD_T = 3.0
# Time between two slices: the next one starts from the equilibrium.
_PAUSE_MS = 10_000.0
# Beyond these there is no head, or no spiral.
_MOST_HZ, _LONGEST_DELAY_US = 2000.0, 50.0
# Largest error of the interpolation of off-resonance in time, relative to the signal.
_SEGMENT_ERROR = 1e-4
_NUFFT_EPS = 1e-8
_SMALL = 100_000
# Parameters that are arrays: datasets in the file, because HDF5 limits attributes to 64 KiB.
_ARRAYS = (
    "noise_covariance",
    "flip_deg",
    "phase_deg",
    "tr_ms",
    "te_ms",
    "slice_profile",
    "turned_deg",
    "centre_mm",
)
# Components that are transformed at once: 16 of 8 coils and 96 interleaves take 0.2 GB.
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file says about its scan beside the samples.

    Parameters
    ----------
    attached
        Whether the trajectory is attached to each readout.
    told
        Whether the train is told: in lists of the header and in `user_int`. If not, the header has values of
        a protocol, as that of a Pulseq scan.
    noise_flagged
        Whether the noise readouts are flagged. If not, the counters run through them too.
    numbered
        Whether `repetition` (and, with `told`, `user_int`) numbers the timepoints.
    """

    attached: bool = True
    told: bool = True
    noise_flagged: bool = True
    numbered: bool = True


#: How a scan of a Pulseq sequence without labels looks.
PULSEQ = Layout(attached=False, told=False, noise_flagged=False)


@dataclass(frozen=True, slots=True)
class Truth:
    """What a simulated scan was made of, on the grid of the image.

    Parameters
    ----------
    t1_ms, t2_ms, m0
        `(Z, Y, X)` float32, of the tissue with the largest share of a pixel; 0 outside. `m0` is the
        proton density.
    b1
        `(Z, Y, X)` float32, transmit field relative to the nominal one; 0 outside.
    b0_hz
        `(Z, Y, X)` float32, off-resonance in Hz without chemical shift; 0 outside.
    labels
        `(Z, Y, X)` int16, number of the region of interest from 1 on, away from its edges; 0 elsewhere.
    mask
        `(Z, Y, X)` bool, the whole object.
    roi_names, roi_t1_ms, roi_t2_ms
        Of each region of interest; label n is entry n - 1. Where the relaxation varies, means of
        `t1_ms` and `t2_ms` over the region.
    parameters
        All parameters of the simulation by name, the train `(T,)` and the covariance of the coils
        `(C, C)` included. In the file they are attributes of the group, arrays are datasets.
    """

    t1_ms: NDArray[np.float32]
    t2_ms: NDArray[np.float32]
    m0: NDArray[np.float32]
    b1: NDArray[np.float32]
    b0_hz: NDArray[np.float32]
    labels: NDArray[np.int16]
    mask: NDArray[np.bool_]
    roi_names: tuple[str, ...]
    roi_t1_ms: NDArray[np.float64]
    roi_t2_ms: NDArray[np.float64]
    parameters: dict[str, Any]


def interleaf_order(order: str, timepoints: int, interleaves: int) -> NDArray[np.int64]:
    """Interleaf of each timepoint, `(T,)`.

    `golden`: steps of nearly the golden section of all interleaves, without a common divisor with their
    number, so that successive timepoints lie far apart and each I timepoints visit every interleaf once.
    `sequential`: one after the other. `golden-angle`: each timepoint has an interleaf of its own, see
    `simulate`.

    Raises
    ------
    ValueError
        For another order.
    """
    if order == "golden-angle":
        return np.arange(timepoints)
    if order == "sequential":
        step = 1
    elif order == "golden":
        golden = interleaves * (math.sqrt(5) - 1) / 2
        coprime = (n for n in range(1, max(interleaves, 2)) if math.gcd(n, interleaves) == 1)
        step = min(coprime, key=lambda n: abs(n - golden))
    else:
        raise ValueError(f'order is "{order}": expected "golden", "sequential" or "golden-angle"')
    return np.arange(timepoints) * step % interleaves


def simulate(
    path: str | os.PathLike[str],
    *,
    phantom: str,
    timepoints: int = 500,
    interleaves: int = 96,
    order: str = "golden",
    coils: int = 8,
    noise: float = 1e-3,
    slices: int = 1,
    matrix: int = 256,
    fov_mm: float = 300.0,
    seed: int = 0,
    plate: str = "t2",
    readout_ms: float = 2.21,
    train: Train | None = None,
    b1: float = 0.0,
    inversion_efficiency: float = 1.0,
    slice_profile: Sequence[float] = (),
    b0_hz: float = 0.0,
    gradient_delay_us: float = 0.0,
    phase_jump_rad: float = 0.0,
    motion_pixels: float = 0.0,
    fat: bool = False,
    sequence: str | os.PathLike[str] | None = None,
    girf: str | os.PathLike[str] | None = None,
    noise_covariance: NDArray[Any] | None = None,
    noise_dwell_us: float | None = None,
    layout: Layout = Layout(),
    turned_deg: Sequence[float] = (0.0, 0.0, 0.0),
    centre_mm: Sequence[float] = (0.0, 0.0, 0.0),
    progress: Callable[[str], None] | None = None,
) -> None:
    """Simulate a spiral MRF scan and write it as an MRD file with its truth.

    Left out, and so not tested by it: decay during the readout, flow, diffusion. The file is written beside
    its place and moved there when it is complete.

    Where the transmit field or the relaxation varies from place to place, each fine sample has the signal
    of its own field, T1 and T2, but for an error of at most 2e-5 of the largest signal (see
    `expand_signals`).

    Off-resonance turns the signal from the pulse on, by ``exp(i 2π df (TE + t))`` at time t of the
    readout. It leaves the echoes as they are: with the same TR throughout, all pathways that are in phase
    at a pulse have seen as much phase in one direction as in the other. Over the readout the field is
    interpolated in time, with an error of at most 1e-4 of the signal (see `_segments`).

    Parameters
    ----------
    path
        HDF5 file to be written, with the groups `dataset` (MRD) and `truth` (`read_truth`).
    phantom
        `nist` (14 spheres in water, see `plate`), `brain` (needs nilearn) or `texture` (a brain whose
        relaxation varies within the tissue, with lesions; see `textured_brain`), `letters` (an object without
        any symmetry).
    timepoints
        Number T of pulses and readouts of the train.
    interleaves
        Number I of rotations of the spiral.
    order
        `golden` or `sequential`, see `interleaf_order`; or `golden-angle`: timepoint t is interleaf 0 turned
        by t · 360° (1 - 1/φ), with φ the golden ratio.
    coils
        Number C of receive coils.
    noise
        Standard deviation of the complex noise, relative to the largest sample of the scan and averaged
        over the coils, which are correlated.
    slices
        Number Z of slices, each with its own inversion and train, 5 mm apart.
    matrix, fov_mm
        Size of the square image.
    seed
        Of the noise and its covariance, and of the texture.
    plate
        Plate of the NIST phantom: `t1` or `t2`.
    readout_ms
        Length of the readout.
    train
        Pulses and times; a train of `jiang_train` if None.
    b1
        Largest deviation of the transmit field from the nominal one: within the object it runs from
        ``1 - b1`` to ``1 + b1``, see `transmit_field`. The header keeps the nominal flip angles.
    inversion_efficiency, slice_profile
        See `fisp_signals`.
    b0_hz
        Largest off-resonance: within the object it runs from -b0_hz to b0_hz, see `off_resonance`.
    gradient_delay_us
        Time by which the gradients lag the samples, -50 to 50 µs: what is played is ``k(t - delay)``. The
        file holds the nominal trajectory.
    phase_jump_rad
        Angle by which the phase of the object jumps at the border of an ellipse, see `phase_jump`.
    motion_pixels
        Way of the object along x, in pixels, between the first and the second half of the train. It takes
        its off-resonance, its phase and the transmit field along; the coils stay. The truth is where it
        was at first.
    fat
        Whether a ring of fat lies around the object, see `with_fat`.
    sequence
        Pulseq file, whose train, trajectory, noise prescans, matrix and field of view take the place of
        `timepoints`, `interleaves`, `order`, `readout_ms`, `train`, `matrix` and `fov_mm`; see `read_played`.
    girf
        File (.npy) with the impulse response of the gradient system, see `whorl.simulation.gradients.play`.
        The scan holds the nominal trajectory.
    noise_covariance
        `(C, C)` of the coils' noise, in any unit; `noise` is the mean over the coils. Random if None.
    noise_dwell_us
        Dwell time of the noise readouts: the variance of a sample goes with the bandwidth. That of the
        others if None.
    layout
        What the file says about the scan.
    turned_deg
        Angles about x, y and z of the patient (LPS), one after the other, by which the stack of slices is
        turned from axial; the object turns with it.
    centre_mm
        Where the middle of the stack lies, LPS. The data are demodulated to each slice's position, as a
        scanner delivers them.
    progress
        Receives one line for each step.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    FileNotFoundError
        If the folder of `path` does not exist.
    ImportError
        If the brain is asked for and nilearn is not installed.
    """
    say = progress if progress is not None else _silent
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target} cannot be written: there is no folder {target.parent}")
    for name, value, low, high in (
        ("timepoints", timepoints, 1, 65535),
        ("interleaves", interleaves, 1, 65535),
        ("matrix", matrix, 16, 2048),
        ("slices", slices, 1, 65535),
        ("coils", coils, 1, 128),
        ("seed", seed, 0, 2**63),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}: expected {low} to {high}")
    if not (noise >= 0 and math.isfinite(noise)):
        raise ValueError(f"noise is {noise}: expected at least 0")
    if not (fov_mm > 0 and math.isfinite(fov_mm)):
        raise ValueError(f"fov_mm is {fov_mm}: expected a positive number")
    if not 0 <= b1 < 1:
        raise ValueError(f"b1 is {b1}: expected at least 0 and less than 1")
    for name, size in (
        ("b0_hz", b0_hz),
        ("phase_jump_rad", phase_jump_rad),
        ("motion_pixels", motion_pixels),
    ):
        if not math.isfinite(size):
            raise ValueError(f"{name} is {size}: expected a finite number")
    if not 0 <= b0_hz <= _MOST_HZ:
        raise ValueError(f"b0_hz is {b0_hz}: expected 0 to {_MOST_HZ:g}")
    if not abs(gradient_delay_us) <= _LONGEST_DELAY_US:
        raise ValueError(
            f"gradient_delay_us is {gradient_delay_us}: expected "
            f"-{_LONGEST_DELAY_US:g} to {_LONGEST_DELAY_US:g}"
        )
    if abs(motion_pixels) > matrix / 4:
        raise ValueError(f"motion_pixels is {motion_pixels}: expected at most a quarter of the matrix")
    file = None
    if sequence is not None:
        file = read_played(sequence)
        train, timepoints, interleaves = file.train, len(file.train), len(file.k_per_m)
        matrix, fov_mm, order = file.matrix, file.fov_mm, "of the sequence"
        readout_ms = file.k_per_m.shape[1] * file.dwell_us * 1e-3
        if girf is not None or gradient_delay_us:
            raise ValueError("girf and gradient_delay_us are of simulated spirals: expected no sequence")
    if train is None:
        train = jiang_train(timepoints)
    elif len(train) != timepoints:
        raise ValueError(
            f"the train has {len(train)} pulses, timepoints is {timepoints}: expected the same number"
        )
    if train.tr_ms.min() < train.te_ms.max() + readout_ms:
        raise ValueError(
            f"readout_ms is {readout_ms:g}: TE {train.te_ms.max():g} ms and the readout do not fit "
            f"into TR {train.tr_ms.min():g} ms"
        )
    if noise_covariance is not None:
        noise_covariance = np.asarray(noise_covariance, dtype=np.complex128)
        if noise_covariance.shape != (coils, coils):
            raise ValueError(
                f"noise_covariance has shape {noise_covariance.shape}: expected {(coils, coils)}"
            )
    arms = interleaf_order(order, timepoints, interleaves) if file is None else file.arms
    if phantom == "nist":
        thing = nist_plate(plate, slices=slices, matrix=matrix, fov_mm=fov_mm)
    elif phantom == "brain":
        thing = brain(slices=slices, matrix=matrix, fov_mm=fov_mm)
    elif phantom == "texture":
        thing = textured_brain(slices=slices, matrix=matrix, fov_mm=fov_mm, seed=seed)
    elif phantom == "letters":
        thing = letters(slices=slices, matrix=matrix, fov_mm=fov_mm)
    else:
        raise ValueError(f'phantom is "{phantom}": expected "nist", "brain", "texture" or "letters"')
    for name, vector in (("turned_deg", turned_deg), ("centre_mm", centre_mm)):
        if len(vector) != 3 or not all(math.isfinite(value) for value in vector):
            raise ValueError(f"{name} is {vector}: expected three numbers")
    if fat:
        thing = with_fat(thing, matrix=matrix, fov_mm=fov_mm)

    say(f"spiral: {interleaves} interleaves of {readout_ms:g} ms")
    field_phase: NDArray[np.float64] | None = None
    inner_radius, slew, dwell_us = 0.0, 0.0, 0.0
    if file is not None:
        trajectory = played = _per_pixel(file.k_per_m, fov_mm / matrix)
        dwell_us = file.dwell_us
    else:
        spiral = design_spiral(matrix=matrix, fov_mm=fov_mm, interleaves=interleaves, readout_ms=readout_ms)
        inner_radius, slew = spiral.inner_radius, spiral.slew_t_per_m_s
        dwell_us = spiral.dwell_us
        if order == "golden-angle":
            turns = np.exp(2j * np.pi * (1 - 2 / (1 + math.sqrt(5))) * np.arange(timepoints))
            spiral = replace(spiral, k_per_m=turns[:, None] * spiral.k_per_m[0])
            if girf is not None or gradient_delay_us:
                raise ValueError("girf and gradient_delay_us need an order of equal rotations")
        trajectory = spiral.cycles_per_pixel(fov_mm / matrix)  # (I, S, 2)
        played = spiral.delayed(gradient_delay_us).cycles_per_pixel(fov_mm / matrix)
        if girf is not None:
            k_per_m, field_phase = play(spiral, np.load(girf, allow_pickle=False))
            played = _per_pixel(k_per_m, fov_mm / matrix)
    n_samples = trajectory.shape[1]

    say(f"signals: {len(thing.names)} tissues, {timepoints} timepoints")
    pulses: dict[str, Any] = {"inversion_efficiency": inversion_efficiency, "slice_profile": slice_profile}
    inside = thing.fractions.max(axis=(0, 1)) > 0  # (V, U)
    field = transmit_field(b1, inside)
    b0 = off_resonance(b0_hz, inside)
    weights, expansion = np.empty((0, 0), dtype=np.complex128), None
    if b1 == 0 and not thing.textured:
        weights = thing.pd[:, None] * fisp_signals(train, thing.t1_ms, thing.t2_ms, **pulses)  # (M, T)
    else:
        expansion = expand_signals(train, thing.t1_ms, thing.t2_ms, *_ranges(thing, field), **pulses)
        say(f"tissues that vary from place to place: {len(expansion.components)} components")

    def sources(z: int, tissues: list[int]) -> Iterator[tuple[NDArray[Any], NDArray[np.complex128]]]:
        """Images of a slice `(N, V, U)` and their weights `(N, T)`, not too many at once."""
        if expansion is None:
            yield thing.fractions[z, tissues], weights[tissues]
            return
        for first in range(0, len(expansion.components), _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            yield _component_images(thing, z, tissues, field, expansion, some), expansion.components[some]

    elapsed_ms = train.te_ms[:, None] + np.arange(n_samples) * (dwell_us * 1e-3)  # (T, S)
    still, always = np.ones((1, 1)), np.ones((timepoints, 1))
    segments = _segments(b0, elapsed_ms) if b0_hz else [(still, always)]
    if b0_hz:
        say(f"off-resonance of up to {b0_hz:g} Hz: {len(segments)} segments of time")
    jump = phase_jump(phase_jump_rad, inside) if phase_jump_rad else still
    halves = [(slice(None), 0.0)]
    if motion_pixels:
        halves = [(slice(0, timepoints // 2), 0.0), (slice(timepoints // 2, None), motion_pixels)]
    # Tissues of one chemical shift are measured together.
    species: dict[float, list[int]] = {}
    for m in range(len(thing.names)):
        species.setdefault(thing.shift_of(m), []).append(m)

    kspace = np.zeros((slices, timepoints, coils, n_samples), dtype=np.complex64)  # (Z, T, C, S)
    for z, height in enumerate(slice_heights_mm(slices)):
        say(f"slice {z + 1} of {slices}: k-space of {coils} coils")
        for half, way in halves:
            maps = jump * coil_maps(coils, matrix=matrix, fov_mm=fov_mm, height_mm=height, moved_pixels=way)
            moved = np.exp(-2j * np.pi * way * played[arms[half], :, 0]) if way else always[half]
            for hz, tissues in species.items():
                turned = moved * (np.exp(2e-3j * np.pi * hz * elapsed_ms[half]) if hz else 1)
                for images, components in sources(z, tissues):
                    for carrier, course in segments:
                        readouts = _acquire(images, carrier * maps, components[:, half], played, arms[half])
                        factor = turned * course[half]  # (T, S), or (T, 1) where it is 1 throughout
                        kspace[z, half] += readouts * factor[:, None].astype(np.complex64)

    rng = np.random.default_rng(seed)
    if field_phase is not None:
        for part in kspace:
            # The field adds to that of the gradients, whose phase is exp(-i 2π k·r).
            part *= np.exp(-1j * field_phase[arms])[:, None].astype(np.complex64)
    if file is not None:
        # The signals are in the frame of the RF phase, the receiver is in its own.
        receiver = np.exp(1j * np.deg2rad(train.phase_deg - file.receiver_deg)).astype(np.complex64)
        for part in kspace:
            part *= receiver[:, None, None]
    covariance = _noise_covariance(coils, rng)
    if noise_covariance is not None:
        covariance = noise_covariance * (coils / np.trace(noise_covariance).real)
    largest = max(float(np.max(np.abs(part))) for part in kspace)
    mixing = np.linalg.cholesky(covariance) * np.complex128(noise * largest)
    n_prescans = _NOISE_READOUTS if file is None else file.n_noise
    wider = math.sqrt(dwell_us / (noise_dwell_us or dwell_us))  # bandwidth of the noise readouts, as a root
    prescan = _noise(mixing * wider, (n_prescans, coils, n_samples), rng)
    for part in kspace:
        part += _noise(mixing, part.shape, rng)

    parameters: dict[str, Any] = {
        "phantom": phantom,
        "plate": plate if phantom == "nist" else "",
        "timepoints": timepoints,
        "interleaves": interleaves,
        "n_prescans": n_prescans,
        "order": order,
        "coils": coils,
        "noise": noise,
        "noise_sd": noise * largest,
        "noise_covariance": covariance,
        "slices": slices,
        "matrix": matrix,
        "fov_mm": fov_mm,
        "seed": seed,
        "readout_ms": readout_ms,
        "spiral_inner_radius": inner_radius,
        "spiral_slew_t_per_m_s": slew,
        "flip_deg": train.flip_deg,
        "phase_deg": train.phase_deg,
        "tr_ms": train.tr_ms,
        "te_ms": train.te_ms,
        "ti_ms": train.ti_ms,
        "b1": b1,
        "inversion_efficiency": inversion_efficiency,
        "slice_profile": np.asarray(slice_profile, dtype=np.float64),
        "b0_hz": b0_hz,
        "gradient_delay_us": gradient_delay_us,
        "phase_jump_rad": phase_jump_rad,
        "motion_pixels": motion_pixels,
        "fat": fat,
        "sequence": "" if sequence is None else str(sequence),
        "girf": "" if girf is None else str(girf),
        "turned_deg": np.asarray(turned_deg, dtype=np.float64),
        "centre_mm": np.asarray(centre_mm, dtype=np.float64),
    }
    header = _header(parameters, layout)
    rows = _rows(prescan, kspace, trajectory.astype(np.float32), arms, train, dwell_us, layout)
    if noise_dwell_us is not None:
        rows["head"]["sample_time_us"][:n_prescans] = noise_dwell_us
    _place(rows["head"], n_prescans, turned_deg, centre_mm)
    say(f"writing {target}")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with h5py.File(temporary, "x") as file:
            group = file.create_group("dataset")
            group.create_dataset("xml", data=[header], dtype=h5py.special_dtype(vlen=bytes))
            # Chunked as the C++ client makes it, so that readouts can be appended.
            group.create_dataset("data", data=rows, maxshape=(None,), chunks=(1024,))
            _write_truth(file.create_group("truth"), thing, {"b1": field, "b0_hz": b0}, parameters)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def read_truth(path: str | os.PathLike[str]) -> Truth:
    """Read the truth of a simulated scan.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file has no truth: it was measured, or written by another program.
    """
    with h5py.File(path, "r") as file:
        if "truth" not in file:
            raise ValueError(f"{path} has no group truth: expected a file written by whorl simulate")
        group = file["truth"]
        mask = group["mask"][()].astype(bool)
        return Truth(
            t1_ms=group["t1_ms"][()],
            t2_ms=group["t2_ms"][()],
            m0=group["m0"][()],
            # Files of older versions have uniform fields and do not say so.
            b1=group["b1"][()] if "b1" in group else mask.astype(np.float32),
            b0_hz=group["b0_hz"][()] if "b0_hz" in group else np.zeros(mask.shape, dtype=np.float32),
            labels=group["labels"][()],
            mask=mask,
            roi_names=tuple(group["roi_names"].asstr()[()]),
            roi_t1_ms=group["roi_t1_ms"][()],
            roi_t2_ms=group["roi_t2_ms"][()],
            parameters={
                "b1": 0.0,
                "inversion_efficiency": 1.0,
                "slice_profile": np.empty(0),
                "turned_deg": np.zeros(3),
                "centre_mm": np.zeros(3),
                "b0_hz": 0.0,
                "gradient_delay_us": 0.0,
                "phase_jump_rad": 0.0,
                "motion_pixels": 0.0,
                "fat": False,
                **{
                    name: value.item() if isinstance(value, np.generic) else value
                    for name, value in group.attrs.items()
                },
                **{name: group[name][()] for name in _ARRAYS if name in group},
            },
        )


def _pixel_means(fine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the fine samples of each pixel, `(V, U, ...)` to `(Y, X, ...)`."""
    v, u, *rest = fine.shape
    return np.asarray(fine.reshape(v // FINE, FINE, u // FINE, FINE, *rest).mean(axis=(1, 3)))


def _silent(_: str) -> None:
    pass


def _factors(thing: Phantom, m: int, z: int, field: NDArray[np.float64]) -> NDArray[np.float64]:
    """Factors of the flip angles, of T1 and of T2 of a tissue in each fine sample, `(V, U, 3)`."""
    return np.concatenate([field[..., None], thing.factors(m, z)], axis=-1)


def _ranges(thing: Phantom, field: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Smallest and largest factors `(M, 3)` of each tissue where there is some of it."""
    n_slices, n_tissues = thing.fractions.shape[:2]
    # Pixels may be so large that a tissue falls between them.
    low, high = np.full((n_tissues, 3), np.inf), np.full((n_tissues, 3), -np.inf)
    for m in range(n_tissues):
        for z in range(n_slices):
            if (inside := thing.fractions[z, m] > 0).any():
                factors = _factors(thing, m, z, field)[inside]
                low[m] = np.minimum(low[m], factors.min(axis=0))
                high[m] = np.maximum(high[m], factors.max(axis=0))
    missing = np.isinf(low)
    return np.where(missing, 1, low), np.where(missing, 1, high)


def _segments(
    b0: NDArray[np.float64], elapsed_ms: NDArray[np.float64]
) -> list[tuple[NDArray[np.complex128], NDArray[np.float64]]]:
    """Off-resonance as a short sum, ``exp(i 2π b0 τ) = Σ_l carrier_l(b0) course_l(τ)``.

    The carriers `(V, U)` are the phase at Chebyshev nodes of the time, the courses `(T, S)` the
    polynomials that interpolate between them: as many as the error of 1e-4 needs.

    References
    ----------
    Noll et al., IEEE Trans Med Imaging 10:629 (1991), doi:10.1109/42.108599: segments of time, here with
    polynomials as their interpolators.
    """
    start, stop = elapsed_ms.min(), elapsed_ms.max()

    def interpolators(n: int, times: NDArray[np.float64]) -> NDArray[np.float64]:
        analysis = 2 / n * chebyshev.chebvander(chebyshev.chebpts1(n), n - 1).T
        analysis[0] /= 2
        place = (2 * times - start - stop) / max(stop - start, 1e-9)
        return np.asarray(chebyshev.chebvander(place, n - 1) @ analysis)

    times = np.linspace(start, stop, 200)
    rates = 2e-3j * np.pi * np.linspace(b0.min(), b0.max(), 50)[:, None]  # of a phase in rad/ms
    for n in itertools.count(1):
        nodes = (start + stop + (stop - start) * chebyshev.chebpts1(n)) / 2
        error = np.exp(rates * nodes) @ interpolators(n, times).T - np.exp(rates * times)
        if np.abs(error).max() < _SEGMENT_ERROR:
            break
    courses = interpolators(n, elapsed_ms)  # (T, S, L)
    return [(np.exp(2e-3j * np.pi * node * b0), courses[..., i]) for i, node in enumerate(nodes)]


def _component_images(
    thing: Phantom,
    z: int,
    tissues: list[int],
    field: NDArray[np.float64],
    expansion: Expansion,
    some: slice,
) -> NDArray[np.complex128]:
    """What each of some components weighs in each fine sample of a slice, `(R, V, U)`, over some tissues."""
    images = np.zeros((len(expansion.components[some]), *field.shape), dtype=np.complex128)
    for m in tissues:
        tissue = thing.fractions[z, m]
        v, u = np.nonzero(tissue)
        amount = thing.pd[m] * tissue[v, u]
        images[:, v, u] += (
            amount[:, None] * expansion.weights(m, _factors(thing, m, z, field)[v, u], some)
        ).T
    return images


def _acquire(
    images: NDArray[np.float32] | NDArray[np.complex128],
    maps: NDArray[np.complex128],
    weights: NDArray[np.complex128],
    trajectory: NDArray[np.float64],
    arms: NDArray[np.int64],
) -> NDArray[np.complex64]:
    """Noiseless readouts `(T, C, S)` of images `(M, V, U)` whose weights are `(M, T)`."""
    n_samples = trajectory.shape[1]
    n_coils, n_images = len(maps), len(images)
    used = np.unique(arms)
    points = trajectory[used].reshape(-1, 2)
    spectra = np.zeros((len(used), n_images, n_coils, n_samples), dtype=np.complex128)
    for m, image in enumerate(images):
        if image.any():
            part = _spectrum(image, maps, points).reshape(n_coils, len(used), n_samples)
            spectra[:, m] = part.swapaxes(0, 1)
    kspace = np.empty((len(arms), n_coils, n_samples), dtype=np.complex64)
    for i, arm in enumerate(used):
        t = np.flatnonzero(arms == arm)
        kspace[t] = (weights[:, t].T @ spectra[i].reshape(n_images, -1)).reshape(len(t), n_coils, n_samples)
    return kspace


def _spectrum(
    image: NDArray[np.float32] | NDArray[np.complex128],
    maps: NDArray[np.complex128],
    points: NDArray[np.float64],
) -> NDArray[np.complex128]:
    """k-space `(C, P)` of one image `(V, U)` seen by the coils `(C, V, U)` at `points` `(P, 2)`.

    ``y(k) = Σ ρ(r) exp(-i 2π k·r) / FINE²``, r in pixels: each fine sample is a point source with the
    share of a pixel that it covers.
    """
    at_y, at_x = fine_positions(image.shape[0] // FINE), fine_positions(image.shape[1] // FINE)
    v, u = np.nonzero(image)
    # Only the box around the object is transformed: a sphere is a thousandth of the field of view.
    rows, columns = slice(v.min(), v.max() + 1), slice(u.min(), u.max() + 1)
    sources = image[rows, columns] * maps[:, rows, columns]
    n_v, n_u = sources.shape[1:]
    values = finufft.nufft2d2(
        2 * np.pi / FINE * points[:, 1],
        2 * np.pi / FINE * points[:, 0],
        np.ascontiguousarray(sources),
        eps=_NUFFT_EPS,
        # A small transform on several threads waits for them longer than it takes; 0: all cores.
        nthreads=1 if sources.size < _SMALL else 0,
        isign=-1,
    )
    # FINUFFT counts from the middle of the box; this is where that sample lies.
    ramp = np.exp(-2j * np.pi * (points @ np.array([at_x[columns][n_u // 2], at_y[rows][n_v // 2]])))
    result: NDArray[np.complex128] = values.reshape(len(maps), -1) * (ramp / FINE**2)
    return result


def _noise_covariance(coils: int, rng: np.random.Generator) -> NDArray[np.complex128]:
    """Random covariance of the coils, `(C, C)`, Hermitian, mean diagonal 1, condition below 10."""
    mixing = rng.standard_normal((coils, coils)) + 1j * rng.standard_normal((coils, coils))
    gains = rng.uniform(0.7, 1.4, coils)
    covariance = gains[:, None] * (np.eye(coils) + 0.5 * mixing @ mixing.conj().T / (2 * coils)) * gains
    result: NDArray[np.complex128] = covariance * (coils / np.trace(covariance).real)
    return result


def correlated_noise(coils: int, correlation: float, noisy: float = 1.0) -> NDArray[np.complex128]:
    """Covariance `(C, C)` of coils of which any two are correlated alike, and the first is noisier.

    Parameters
    ----------
    correlation
        0 to less than 1; its phase differs from pair to pair.
    noisy
        SD of the first coil relative to the others.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """
    if not 0 <= correlation < 1:
        raise ValueError(f"noise_correlation is {correlation:g}: expected 0 to less than 1")
    if not (noisy > 0 and math.isfinite(noisy)):
        raise ValueError(f"noisy_coil is {noisy:g}: expected a positive number")
    turns = np.exp(2.4j * np.arange(coils))
    gains = np.ones(coils)
    gains[0] = noisy
    alike = (1 - correlation) * np.eye(coils) + correlation * np.outer(turns, turns.conj())
    return np.asarray(gains[:, None] * alike * gains, dtype=np.complex128)


def _noise(
    mixing: NDArray[np.complex128], shape: tuple[int, int, int], rng: np.random.Generator
) -> NDArray[np.complex64]:
    """Complex Gaussian noise `(readouts, C, S)` with ``E[n nᴴ] = mixing mixingᴴ``."""
    white = rng.standard_normal((2, *shape))
    result: NDArray[np.complex64] = (mixing @ ((white[0] + 1j * white[1]) / np.sqrt(2))).astype(np.complex64)
    return result


def _per_pixel(k_per_m: NDArray[np.complex128], pixel_mm: float) -> NDArray[np.float64]:
    """kx + i ky `(I, S)` in cycles/m as `(I, S, 2)` in cycles per pixel."""
    k = k_per_m * (pixel_mm * 1e-3)
    return np.stack([k.real, k.imag], axis=-1)


def _header(parameters: dict[str, Any], layout: Layout) -> bytes:
    """The XML header of MRD."""
    matrix, fov_mm = parameters["matrix"], parameters["fov_mm"]
    space = xsd.encodingSpaceType(
        matrixSize=xsd.matrixSizeType(x=matrix, y=matrix, z=1),
        fieldOfView_mm=xsd.fieldOfViewMm(x=fov_mm, y=fov_mm, z=SLICE_MM),
    )

    def limit(n: int) -> xsd.limitType:
        return xsd.limitType(minimum=0, maximum=n - 1, center=0)

    def values(name: str) -> list[float]:
        found = [float(value) for value in np.atleast_1d(parameters[name])]
        return found if layout.told else found[:1]

    n_counted = parameters["timepoints"]
    if not layout.noise_flagged:
        n_counted += parameters["n_prescans"]

    name = f"{parameters['phantom']} {parameters['plate']}".strip()
    header = xsd.ismrmrdHeader(
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
            receiverChannels=parameters["coils"],
        ),
        experimentalConditions=xsd.experimentalConditionsType(
            H1resonanceFrequency_Hz=round(GAMMA_HZ_PER_T * _FIELD_T)
        ),
        encoding=[
            xsd.encodingType(
                encodedSpace=space,
                reconSpace=space,
                encodingLimits=xsd.encodingLimitsType(
                    kspace_encoding_step_1=limit(parameters["interleaves"]),
                    slice=limit(parameters["slices"]),
                    repetition=limit(n_counted if layout.numbered else 1),
                ),
                trajectory=xsd.trajectoryType.SPIRAL,
            )
        ],
        sequenceParameters=xsd.sequenceParametersType(
            TR=values("tr_ms"), TE=values("te_ms"), TI=values("ti_ms"), flipAngle_deg=values("flip_deg")
        ),
    )
    return str(xsd.ToXML(header)).encode()


def _rows(
    prescan: NDArray[np.complex64],
    kspace: NDArray[np.complex64],
    trajectory: NDArray[np.float32],
    arms: NDArray[np.int64],
    train: Train,
    dwell_us: float,
    layout: Layout,
) -> NDArray[np.void]:
    """All acquisitions in the order of measurement, as MRD lays them out in HDF5."""
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
    head["sample_time_us"] = dwell_us
    head["read_dir"], head["phase_dir"], head["slice_dir"] = (1, 0, 0), (0, 1, 0), (0, 0, 1)

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

    rows = np.empty(len(head), dtype=acquisition_dtype)
    rows["head"] = head
    nothing = np.zeros(0, dtype=np.float32)
    for n in range(n_noise):
        rows["traj"][n] = nothing
        rows["data"][n] = prescan[n].view(np.float32).ravel()
    readouts = kspace.reshape(n_scan, n_coils, n_samples)
    for n in range(n_scan):
        rows["traj"][n_noise + n] = trajectory[arms[t[n]]].ravel() if layout.attached else nothing
        rows["data"][n_noise + n] = readouts[n].view(np.float32).ravel()
    return rows


def _place(
    head: NDArray[np.void], n_prescans: int, turned_deg: Sequence[float], centre_mm: Sequence[float]
) -> None:
    """Turn and move an axial stack of slices about the isocentre."""
    turn = Rotation.from_euler("xyz", list(turned_deg), degrees=True).as_matrix()
    for axis, name in enumerate(("read_dir", "phase_dir", "slice_dir")):
        head[name] = turn[:, axis]
    heights = head["position"][n_prescans:, 2].astype(np.float64)
    head["position"][n_prescans:] = np.asarray(centre_mm) + heights[:, None] * turn[:, 2]


def _write_truth(
    group: Any, thing: Phantom, fields: dict[str, NDArray[np.float64]], parameters: dict[str, Any]
) -> None:
    share = thing.on_pixels()  # (Z, M, Y, X)
    mask = share.sum(axis=1) > 0.5
    dominant = share.argmax(axis=1)
    maps = {"t1_ms": thing.t1_ms[dominant], "t2_ms": thing.t2_ms[dominant], "m0": thing.pd[dominant]}
    for z, m in itertools.product(range(len(share)), thing.textured):
        here = dominant[z] == m
        factors = _pixel_means(thing.factors(m, z))
        maps["t1_ms"][z][here] *= factors[here, 0]
        maps["t2_ms"][z][here] *= factors[here, 1]
    for name, field in fields.items():
        maps[name] = np.broadcast_to(_pixel_means(field), mask.shape)
    for name, values in maps.items():
        group.create_dataset(name, data=np.where(mask, values, 0).astype(np.float32))
    labels = thing.labels(share)
    group.create_dataset("labels", data=labels)
    group.create_dataset("mask", data=mask)
    regions = list(thing.regions)
    names = [thing.names[m] for m in regions]
    group.create_dataset("roi_names", data=names, dtype=h5py.string_dtype())
    for name, nominal in (("t1_ms", thing.t1_ms), ("t2_ms", thing.t2_ms)):
        values = nominal[regions]
        for n, m in enumerate(regions):
            inside = labels == n + 1
            if m in thing.textured and inside.any():
                values[n] = maps[name][inside].mean()
        group.create_dataset(f"roi_{name}", data=values)
    for name, value in parameters.items():
        if name in _ARRAYS:
            group.create_dataset(name, data=value)
        else:
            group.attrs[name] = value
