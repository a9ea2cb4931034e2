"""The train and the trajectory of a Pulseq sequence.

The file is read by PyPulseq; what it means is worked out here: which ADC belongs to which pulse, flip
angles, times, and the places of the samples by integrating the gradients from the centre of each pulse.

Letters: T timepoints (pulses on one slice), A ADCs, I interleaves, S samples.

References
----------
Layton et al., Magn Reson Med 77:1544 (2017), doi:10.1002/mrm.26235.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import trapezoid

from whorl.scan.failure import ScanError
from whorl.scan.train import Train
from whorl.scan.trajectories import Trajectories

_LARGEST_BYTES = 256 << 20
#: A pulse of this angle or more is an inversion, where the file does not say what a pulse is for.
_INVERSION_DEG = 140.0
#: Trajectories that differ by less, relative to their largest radius, are one interleaf (digits of the file).
_SAME = 1e-4
#: Variation of kz, relative to the largest radius in the plane, from which on a scan is not 2D.
_FLAT = 0.02
#: Inversion times (ms) that are the same, and imaging ADCs that may be odd ones out.
_SAME_MS, _ODD = 0.01, 0.02
_TIME = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class PulseqSequence:
    """What a Pulseq file says about a scan.

    Parameters
    ----------
    train
        Of the excitations of one slice, with their RF phases.
    trajectories
        Of the ADCs by timepoint, in 1/m.
    adc
        `(A,)` timepoint of each ADC in the order of the file, -1 for noise: ADCs before any excitation, or
        labelled so.
    slice_of_adc
        `(A,)` slice of each ADC, told by the label SLC or else by the frequency of the RF; 0 for noise.
    n_slices
        Number of slices.
    receiver_deg
        `(T,)` phase of the receiver relative to the RF phase but for a constant, -180 to 180; 0 where it
        follows.
    measured
        `(T,)` whether a pulse is followed by an ADC; a dummy pulse is not.
    fov_mm
        Field of view along x and y, if the file tells it.
    n_samples
        Samples of an imaging ADC.
    warnings
        What had to be assumed.
    """

    train: Train
    trajectories: Trajectories
    adc: NDArray[np.int64]
    slice_of_adc: NDArray[np.int64]
    n_slices: int
    receiver_deg: NDArray[np.float64]
    measured: NDArray[np.bool_]
    fov_mm: tuple[float, float] | None
    n_samples: int
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class _Pulse:
    """An excitation with its ADC."""

    at: float  # centre, s
    flip_deg: float
    phase_deg: float
    slice_key: float
    inverted_at: float | None
    adc: _Adc | None = None


@dataclass(slots=True)
class _Adc:
    number: int
    at: float  # first sample, s
    n_samples: int
    dwell: float
    phase_deg: float
    k: NDArray[np.float64]  # (S, 3), 1/m


@dataclass(slots=True)
class _Walk:
    """Where the sequence is while its blocks are gone through."""

    now: float = 0.0
    k: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    labels: dict[str, int] = field(default_factory=dict)
    pulses: list[_Pulse] = field(default_factory=list)
    inverted_at: float | None = None
    n_adcs: int = 0
    noise: list[int] = field(default_factory=list)


def read_pulseq(path: str, inversion_time_ms: float | None = None) -> PulseqSequence:
    """Read a Pulseq file of a spiral FISP fingerprint.

    Parameters
    ----------
    path
        File of format 1.2 to 1.5.
    inversion_time_ms
        Counts more than that of the file; 0: no inversion; ``None``: as the file has it.

    Raises
    ------
    ScanError
        If the file cannot be read, or is no train of excitations with one ADC each in a plane.
    """
    sequence = _read(path)
    told: list[str] = []
    walk = _walk(sequence, path, told)
    if not walk.pulses:
        raise ScanError(f"{path} has no excitation: expected the pulses of a fingerprint train")
    if not any(pulse.adc for pulse in walk.pulses):
        raise ScanError(f"{path} has no ADC behind an excitation: expected one for each timepoint")
    keys = list(dict.fromkeys(pulse.slice_key for pulse in walk.pulses))
    slices = [[pulse for pulse in walk.pulses if pulse.slice_key == key] for key in keys]
    lengths = [len(pulses) for pulses in slices]
    if len(set(lengths)) > 1:
        raise ScanError(f"{path}: its slices have {lengths} excitations: expected the same train for each")
    if len({tuple(p.adc is not None for p in pulses) for pulses in slices}) > 1:
        raise ScanError(f"{path}: its slices have their ADCs behind different pulses: expected one train")
    size = _common_size(walk, path, told)
    end = walk.now
    trains = [_train(pulses, path, end) for pulses in slices]
    first = trains[0]
    for number, other in enumerate(trains[1:], start=1):
        for name in ("flip_deg", "tr_ms", "te_ms"):
            mine, its = getattr(first, name), getattr(other, name)
            if not np.allclose(mine[:-1], its[:-1], atol=0.02):
                t = int(np.argmax(np.abs(mine[:-1] - its[:-1])))
                raise ScanError(
                    f"{path}: slices 0 and {number} have {name} {mine[t]:g} and {its[t]:g} at timepoint {t}: "
                    f"expected the same train"
                )
        mine_ti, its_ti = first.inversion_time_ms or 0.0, other.inversion_time_ms or 0.0
        if abs(mine_ti - its_ti) > _SAME_MS:
            raise ScanError(
                f"{path}: slices 0 and {number} have inversion times {mine_ti:g} and {its_ti:g} ms: "
                f"expected the same"
            )
    if inversion_time_ms is not None:
        own = first.inversion_time_ms
        if own is not None and abs(inversion_time_ms - own) > _SAME_MS:
            told.append(
                f"property inversion_time_ms is {inversion_time_ms:g} ms, the Pulseq file has {own:g} ms: "
                f"the property counts"
            )
        first = Train(
            first.flip_deg,
            first.tr_ms,
            first.te_ms,
            first.phase_deg,
            inversion_time_ms or None,
            first.source,
        )
    adc = np.full(walk.n_adcs, -1, dtype=np.int64)
    slice_of_adc = np.zeros(walk.n_adcs, dtype=np.int64)
    for number, pulses in enumerate(slices):
        for t, pulse in enumerate(pulses):
            if pulse.adc is not None:
                adc[pulse.adc.number], slice_of_adc[pulse.adc.number] = t, number
    return PulseqSequence(
        train=first,
        trajectories=_trajectories(slices[0], path, size),
        adc=adc,
        slice_of_adc=slice_of_adc,
        n_slices=len(slices),
        receiver_deg=_receiver(slices[0]),
        measured=np.array([pulse.adc is not None for pulse in slices[0]]),
        fov_mm=_fov(sequence),
        n_samples=size[0],
        warnings=tuple(told),
    )


def _read(path: str) -> Any:
    """The sequence as PyPulseq has it."""
    try:
        size = Path(path).stat().st_size
        if not Path(path).is_file() or size > _LARGEST_BYTES:
            raise ScanError(
                f"{path} is no file of at most {_LARGEST_BYTES >> 20} MiB: expected a Pulseq file"
            )
    except OSError as error:
        raise ScanError(f"the Pulseq file {path} cannot be read: {error}") from error
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import pypulseq

        sequence, why = pypulseq.Sequence(), ""
        try:
            sequence.read(path)
        except Exception as error:  # a malformed file raises whatever its reader comes across
            why = _why(error)
    if not why and not sequence.block_events:
        why = "it has no blocks"
    if why:
        # Not from that error, which would hold PyPulseq's open file.
        raise ScanError(f"{path} cannot be read as a Pulseq file: {why}")
    return sequence


def _why(error: Exception) -> str:
    """What an error of PyPulseq says; of a key alone nobody would know what it is."""
    name = type(error).__name__
    return f"{name} {error}" if isinstance(error, LookupError) else str(error) or name


def _walk(sequence: Any, path: str, told: list[str]) -> _Walk:
    walk = _Walk()
    blocks: dict[bytes, Any] = {}  # blocks repeat, and are decoded once
    gradients: dict[tuple[int, ...], tuple[NDArray[np.float64], ...]] = {}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for number, events in sequence.block_events.items():
            ids = tuple(int(value) for value in events)
            key = np.array([*ids, round(sequence.block_durations[number] * 1e9)]).tobytes()
            try:
                if key not in blocks:
                    blocks[key] = sequence.get_block(number)
                block = blocks[key]
                # Extensions keep counters, so that equal blocks may mean other labels.
                labels = block.label.values() if getattr(block, "label", None) else ()
                for label in labels:
                    _set_label(walk, label)
                gradient = gradients.setdefault(ids[2:5], ()) or _gradients(block)
                gradients[ids[2:5]] = gradient
                _go_through(walk, block, gradient, path, told)
            except ScanError:
                raise
            except Exception as error:
                raise ScanError(f"block {number} of {path} cannot be understood: {_why(error)}") from error
            walk.now += float(block.block_duration)
    return walk


def _set_label(walk: _Walk, label: Any) -> None:
    before = walk.labels.get(label.label, 0)
    walk.labels[label.label] = int(label.value) + (before if label.type == "labelinc" else 0)


def _go_through(
    walk: _Walk, block: Any, gradient: tuple[NDArray[np.float64], ...], path: str, told: list[str]
) -> None:
    """Take notice of a block's pulse and ADC, and go on to the end of its gradients."""
    if getattr(block, "rotation", None) is not None:
        raise ScanError(
            f"{path} rotates blocks by an extension, which is not read: expected written gradients"
        )
    start, rf, adc = walk.k.copy(), block.rf, block.adc
    if rf is not None:
        centre = float(rf.delay) + _centre_of(rf)
        flip_deg, phase_deg = _flip(rf)
        use = str(getattr(rf, "use", "undefined") or "undefined")[:1]
        if use == "u":  # undefined, as in files before version 1.5
            use = "i" if flip_deg >= _INVERSION_DEG else "e"
            if use == "i" and (text := f"a pulse of {flip_deg:.0f}° is taken for the inversion") not in told:
                told.append(text)
        if use == "i":
            walk.inverted_at = walk.now + centre
        elif use == "e":
            key = float(walk.labels["SLC"]) if "SLC" in walk.labels else round(float(rf.freq_offset), 1)
            walk.pulses.append(_Pulse(walk.now + centre, flip_deg, phase_deg, key, walk.inverted_at))
            walk.inverted_at = None
            # The echo's k begins at the centre of the pulse.
            start = -_moment(gradient, np.array([centre]))[0]
        elif use == "r":
            raise ScanError(
                f"{path} has a refocusing pulse: expected a FISP train, excitations after an inversion"
            )
        # Saturation of fat or of other slices, and preparations, are left out; they are before the train.
        elif walk.pulses:
            raise ScanError(f"{path} has a preparation pulse within the train: expected excitations only")
        else:
            told.append(f"a pulse for '{rf.use}' before the train is left out")
    if adc is not None:
        number, walk.n_adcs = walk.n_adcs, walk.n_adcs + 1
        pulse = walk.pulses[-1] if walk.pulses else None
        # After an inversion there is nothing to measure before the next excitation.
        if pulse is None or walk.labels.get("NOISE") or walk.inverted_at is not None:
            walk.noise.append(number)
        else:
            if pulse.adc is not None:
                raise ScanError(
                    f"{path} has two ADCs behind the excitation at {pulse.at * 1e3:.2f} ms: expected one"
                )
            n, dwell = int(adc.num_samples), float(adc.dwell)
            times = float(adc.delay) + (np.arange(n) + 0.5) * dwell
            phase = np.rad2deg(float(adc.phase_offset))
            k = start + _moment(gradient, times)
            pulse.adc = _Adc(number, walk.now + times[0], n, dwell, float(phase), k)
    walk.k = start + _moment(gradient, np.array([np.inf]))[0]


def _centre_of(rf: Any) -> float:
    centre = getattr(rf, "center", None)
    if centre is not None and np.isfinite(centre):
        return float(centre)
    from pypulseq import calc_rf_center

    return float(calc_rf_center(rf)[0])


def _flip(rf: Any) -> tuple[float, float]:
    """Flip angle on resonance, and phase, of a pulse in degrees.

    The angle of a pulse whose phase is modulated (adiabatic) has no meaning; its largest turn counts.
    """
    signal, times = np.asarray(rf.signal), np.asarray(rf.t, dtype=float)
    if len(times) > 1 and times[0] < _TIME:  # a time shape: the corners of a polygon, from its start on
        integral, sweep = trapezoid(signal, times), trapezoid(np.abs(signal), times)
    else:  # in the middle of raster intervals
        step = times[1] - times[0] if len(times) > 1 else float(rf.shape_dur)
        integral, sweep = signal.sum() * step, np.abs(signal).sum() * step
    area = abs(integral)
    strongest = signal[np.argmax(np.abs(signal))] if len(signal) else 0.0
    phase = np.rad2deg(float(rf.phase_offset))
    shape = np.rad2deg(np.angle(integral)) if area > 0.1 * sweep else np.rad2deg(np.angle(strongest))
    # A sinc may begin with a negative lobe, and real shapes may be stored as magnitude with a phase of pi.
    flip = 360.0 * float(area if area > 0.1 * sweep else sweep)
    return flip, float(phase + shape)


def _gradients(block: Any) -> tuple[NDArray[np.float64], ...]:
    """Corners of each axis' polygon, (time, value) `(2, N)` in s and Hz/m; empty where there is none."""
    found = []
    for axis in ("gx", "gy", "gz"):
        event = getattr(block, axis)
        if event is None:
            found.append(np.zeros((2, 0)))
        elif event.type == "trap":
            steps = [event.delay, event.rise_time, event.flat_time, event.fall_time]
            found.append(np.array([np.cumsum(steps), event.amplitude * np.array([0.0, 1.0, 1.0, 0.0])]))
        else:
            times, values = np.asarray(event.tt, dtype=float), np.asarray(event.waveform, dtype=float)
            # Samples in the middle of the raster do not reach the ends; the file tells the values there.
            if times[0] > _TIME:
                times, values = np.r_[0.0, times], np.r_[float(event.first), values]
            if float(event.shape_dur) - times[-1] > _TIME:
                times, values = np.r_[times, float(event.shape_dur)], np.r_[values, float(event.last)]
            found.append(np.array([times + event.delay, values]))
    return tuple(found)


def _moment(gradients: tuple[NDArray[np.float64], ...], times: NDArray[Any]) -> NDArray[np.float64]:
    """Integral of the gradients from the start of their block to some times, `(N, 3)` in 1/m.

    Exact: a gradient is linear between its corners.
    """
    k = np.zeros((len(times), 3))
    for axis, (at, value) in enumerate(gradients):
        if not len(at):
            continue
        whole = np.concatenate([[0.0], np.cumsum(np.diff(at) * (value[1:] + value[:-1]) / 2)])
        t = np.clip(times, at[0], at[-1])
        i = np.clip(np.searchsorted(at, t, side="right") - 1, 0, len(at) - 2)
        part, length = t - at[i], np.maximum(at[i + 1] - at[i], 1e-15)
        k[:, axis] = whole[i] + part * (value[i] + (value[i + 1] - value[i]) * part / length / 2)
    return k


def _common_size(walk: _Walk, path: str, told: list[str]) -> tuple[int, float]:
    """Samples and dwell time (s) of the imaging ADCs; a few that differ are left out."""
    sizes = Counter((p.adc.n_samples, round(p.adc.dwell, 10)) for p in walk.pulses if p.adc is not None)
    (size, count), total = sizes.most_common(1)[0], sum(sizes.values())
    if count < total:
        listed = ", ".join(f"{n} × {dwell * 1e6:g} µs ({c} times)" for (n, dwell), c in sizes.items())
        if total - count > _ODD * total:
            raise ScanError(f"{path} has imaging ADCs of {listed}: expected one size")
        told.append(f"of imaging ADCs of {listed}, only the most frequent are used")
        for pulse in walk.pulses:
            if pulse.adc is not None and (pulse.adc.n_samples, round(pulse.adc.dwell, 10)) != size:
                pulse.adc = None
    return size


def _train(pulses: list[_Pulse], path: str, end: float) -> Train:
    at = np.array([pulse.at for pulse in pulses])
    later = [t for t, pulse in enumerate(pulses) if t and pulse.inverted_at is not None]
    if later:
        raise ScanError(
            f"{path} inverts again before excitation {later[0]} of a slice: expected one inversion, before "
            f"the first. Repetitions of the scan are not to be in the file"
        )
    # TE: from the centre of the pulse to the sample nearest to the centre of k-space.
    te = np.full(len(pulses), np.nan)
    for t, pulse in enumerate(pulses):
        if pulse.adc is not None:
            nearest = int(np.argmin(np.square(pulse.adc.k[:, :2]).sum(1)))
            # Half a dwell before its middle, where a spiral that begins with its first sample begins.
            te[t] = pulse.adc.at - pulse.at + (nearest - (0.5 if nearest == 0 else 0.0)) * pulse.adc.dwell
    te[np.isnan(te)] = np.nanmedian(te)
    tr = np.diff(at, append=end)
    # What comes after the last readout does not count, but its echo must lie within it.
    if len(tr) > 1 and tr[-1] < te[-1]:
        tr[-1] = max(tr[-2], te[-1])
    inverted = pulses[0].inverted_at
    try:
        return Train(
            flip_deg=np.array([pulse.flip_deg for pulse in pulses]),
            tr_ms=np.round(tr * 1e3, 6),
            te_ms=np.round(te * 1e3, 6),
            phase_deg=np.array([pulse.phase_deg for pulse in pulses]),
            inversion_time_ms=None if inverted is None else round((at[0] - inverted) * 1e3, 6),
            source=f"Pulseq file {path}",
        )
    except ValueError as error:
        raise ScanError(f"the train in {path}: {error}") from error


def _trajectories(pulses: list[_Pulse], path: str, size: tuple[int, float]) -> Trajectories:
    """The distinct interleaves of one slice, and which of them each timepoint has."""
    measured = [pulse.adc for pulse in pulses if pulse.adc is not None]
    largest = max(float(np.hypot(adc.k[:, 0], adc.k[:, 1]).max()) for adc in measured)
    if not largest > 0:
        raise ScanError(f"{path} has no gradient along x or y during its ADCs: expected spirals")
    kz = np.concatenate([adc.k[:: max(1, size[0] // 16), 2] for adc in measured])
    if np.ptp(kz) > _FLAT * largest:
        raise ScanError(
            f"{path} moves along kz by {np.ptp(kz):.0f} 1/m during or between its ADCs: only 2D scans are "
            f"reconstructed"
        )
    distinct: list[NDArray[np.float64]] = []
    probes: dict[tuple[int, ...], list[int]] = {}
    which = np.zeros(len(pulses), dtype=np.int64)
    for t, pulse in enumerate(pulses):
        if pulse.adc is None:
            continue
        k = pulse.adc.k[:, :2]
        rounded = tuple(
            np.round(k[[size[0] // 3, size[0] // 2]].ravel() / (50 * _SAME * largest)).astype(int)
        )
        near = [
            n
            for place in _around(rounded)
            for n in probes.get(place, ())
            if np.abs(distinct[n] - k).max() < _SAME * largest
        ]
        if not near:
            probes.setdefault(rounded, []).append(len(distinct))
            near = [len(distinct)]
            distinct.append(k)
        which[t] = near[0]
    return Trajectories(
        points=np.stack(distinct),
        units="1/m",
        source=f"Pulseq file {path}",
        by="timepoint",
        which=which,
        dwell_us=size[1] * 1e6,
    )


def _around(place: tuple[int, ...]) -> list[tuple[int, ...]]:
    """A cell and its neighbours."""
    cells: list[tuple[int, ...]] = [()]
    for value in place:
        cells = [(*cell, v) for cell in cells for v in (value, value - 1, value + 1)]
    return cells


def _receiver(pulses: list[_Pulse]) -> NDArray[np.float64]:
    """Phase of the receiver relative to that of the RF, but for its most frequent value."""
    apart = np.array([p.adc.phase_deg - p.phase_deg if p.adc is not None else np.nan for p in pulses])
    measured = ~np.isnan(apart)
    turns = np.exp(1j * np.deg2rad(np.where(measured, apart, 0)))
    common = Counter(np.round(np.rad2deg(np.angle(turns[measured])), 1).tolist()).most_common(1)[0][0]
    relative = np.rad2deg(np.angle(turns * np.exp(-1j * np.deg2rad(common))))
    return np.where(measured & (np.abs(relative) >= 0.06), relative, 0.0)


def _fov(sequence: Any) -> tuple[float, float] | None:
    try:
        x, y = (float(value) for value in np.asarray(sequence.definitions["FOV"], dtype=float)[:2])
    except (KeyError, TypeError, ValueError):
        return None
    if not (x > 0 and y > 0):
        return None
    scale = 1.0 if max(x, y) > 10 else 1e3  # in m by the format, in mm by some writers
    return x * scale, y * scale
