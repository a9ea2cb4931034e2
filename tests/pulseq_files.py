"""Small Pulseq files of spiral FISP fingerprints, written by PyPulseq.

Letters: T pulses of a slice, S samples.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RASTER_S = 10e-6
DWELL_S = 5e-6
EXCITATION_S, INVERSION_S = 0.8e-3, 1e-3
ADC_DELAY_S = 40e-6
#: Of a field of view of 300 mm and a matrix of 64; a little less, so that rounding does not pass the edge.
FOV_M, EDGE_PER_M = 0.3, 0.999995 * 32 / 0.3


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    """PyPulseq without its warnings and its prints, neither of which say anything about whorl."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import pypulseq

        yield pypulseq


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """What was written: `(T,)` of one slice."""

    path: str
    flip_deg: NDArray[np.float64]
    phase_deg: NDArray[np.float64]
    adc_phase_deg: NDArray[np.float64]
    tr_ms: NDArray[np.float64]
    te_ms: float
    ti_ms: float | None
    turn_deg: NDArray[np.float64]  # of the spiral


def spiral_per_m(time_s: NDArray[np.float64], length_s: float, turns: float = 1.5) -> NDArray[Any]:
    """Archimedean spiral kx + i ky that starts and ends at rest, cycles/m."""
    u = np.clip(time_s / length_s, 0, 1)
    s = u * u * (3 - 2 * u)
    return np.asarray(EDGE_PER_M * s * np.exp(2j * np.pi * turns * s))


def flip_angles(n: int) -> NDArray[np.float64]:
    """Two lobes, never twice the same."""
    t = np.arange(n)
    return 8 + 50 * np.abs(np.sin(np.pi * (t + 0.5) / (0.6 * n))) + 0.01 * t


def write_sequence(
    path: Path,
    *,
    n_pulses: int = 12,
    n_noise: int = 3,
    dummies: int = 0,
    slices: int = 1,
    slices_by: str = "frequency",
    n_arms: int = 5,
    phases_deg: NDArray[np.float64] | None = None,
    receiver_follows: bool = True,
    receiver_offset_deg: float = 0.0,
    inversion: bool = True,
    arbitrary: bool = True,
    shape: str = "sinc",
    in_plane: bool = False,
    readout_s: float = 2e-3,
    turns: float = 1.5,
    use: bool = True,
    fov_m: float | None = FOV_M,
    flip_factor_of_last_slice: float = 1.0,
    kz_per_m: float = 0.0,
    odd: Mapping[int, str] = {},
    before: str = "",
    noise_label_at: int | None = None,
    old_format: bool = False,
) -> Written:
    """Write noise ADCs, an inversion, and a train of excitations with one ADC each, for each slice.

    Parameters
    ----------
    dummies
        Excitations at the start that have no ADC.
    slices_by
        What tells the slices: ``frequency`` or ``label``.
    arbitrary
        Whether the readouts are spirals; if not, they are straight lines of a trapezoid along x.
    shape
        Of the excitations: ``sinc``, ``block`` (its two ends), ``samples`` (a block by its samples), or
        ``trapezoid``, which has corners at unequal times.
    in_plane
        Whether a gradient along y lies in the block of the pulse, before and after its centre.
    kz_per_m
        Difference of kz between two successive pulses.
    odd
        What is wrong with a pulse: ``two ADCs``, ``short ADC``, ``no ADC``, ``no excitation``,
        ``refocusing``, ``inversion`` or ``saturation`` before it, ``late`` (a longer TR in the last slice).
    before
        Use of a pulse before the inversion.
    noise_label_at
        Pulse whose ADC is followed by one that is labelled as noise.
    old_format
        Whether to write version 1.4.1, which does not say what a pulse is for.
    """
    T = n_pulses
    flip_deg = flip_angles(T)
    phase_deg = np.zeros(T) if phases_deg is None else phases_deg
    adc_phase_deg = (phase_deg if receiver_follows else np.zeros(T)) + receiver_offset_deg
    tr_s = RASTER_S * np.round((9e-3 + 1.5e-3 * np.sin(0.7 * np.arange(T)) + readout_s) / RASTER_S)
    turn_deg = 360.0 * (np.arange(T) * 7 % n_arms) / n_arms
    n_samples = round(readout_s / DWELL_S)
    with quiet() as pp:
        # No hardware is asked; without dead times, all times are those of the parameters.
        system = pp.Opts(max_grad=80, grad_unit="mT/m", max_slew=2000, slew_unit="T/m/s")
        seq = pp.Sequence(system)
        if fov_m is not None:
            seq.set_definition("FOV", [fov_m, fov_m, 5e-3])

        def pulse(deg: float, seconds: float, what: str) -> Any:
            return pp.make_block_pulse(
                np.deg2rad(deg), duration=seconds, system=system, use=what if use else "undefined"
            )

        adc = {
            n: pp.make_adc(n, dwell=DWELL_S, delay=ADC_DELAY_S, system=system)
            for n in (n_samples, n_samples // 2)
        }
        readout_block_s = ADC_DELAY_S + readout_s + 2 * RASTER_S
        edges = np.arange(0, readout_s + RASTER_S / 2, RASTER_S)
        for _ in range(n_noise):
            seq.add_block(adc[n_samples], pp.make_delay(8e-3))
        if before:
            seq.add_block(pulse(90, 1e-3, before))
            seq.add_block(pp.make_delay(5e-3))
        ti_s = None
        for z in range(slices):
            if slices_by == "label" and slices > 1:
                seq.add_block(pp.make_label("SLC", "SET", z))
            if inversion:
                seq.add_block(pulse(180, INVERSION_S, "inversion"))
                spoiler = pp.make_trapezoid("z", area=300, duration=5e-3, system=system)
                seq.add_block(spoiler, pp.make_delay(17.3e-3))
                ti_s = INVERSION_S / 2 + 17.3e-3
            for t in range(T):
                what = odd.get(t, "")
                if what == "inversion":
                    seq.add_block(pulse(180, INVERSION_S, "inversion"))
                elif what in ("refocusing", "saturation"):
                    seq.add_block(pulse(180, 1.2e-3, what))  # PyPulseq takes equal pulses for one
                factor = flip_factor_of_last_slice if slices > 1 and z == slices - 1 else 1.0
                angle, used = np.deg2rad(flip_deg[t] * factor), 0.0
                rf, gz, gzr = pp.make_sinc_pulse(
                    angle,
                    duration=EXCITATION_S,
                    slice_thickness=5e-3,
                    time_bw_product=4,
                    return_gz=True,
                    system=system,
                    use="excitation" if use else "undefined",
                )
                if shape != "sinc":
                    delay = rf.delay
                    rf = pulse(np.rad2deg(angle), EXCITATION_S, "excitation")
                    rf.delay = delay
                if shape == "samples":
                    rf.t = (np.arange(800) + 0.5) * 1e-6
                    rf.signal = np.full(800, angle / (2 * np.pi) / EXCITATION_S)
                if shape == "trapezoid":
                    height = angle / (2 * np.pi) / 0.6e-3
                    rf.t = np.array([0.0, 0.2e-3, 0.6e-3, 0.8e-3])
                    rf.signal = height * np.array([0.0, 1.0, 1.0, 0.0])
                rf.phase_offset = np.deg2rad(phase_deg[t])
                rf.freq_offset = 730.0 * z if slices_by == "frequency" else 0.0
                gzr = pp.make_trapezoid("z", area=gzr.area + t * kz_per_m, duration=1.2e-3, system=system)
                if what != "no excitation":
                    gy = pp.make_trapezoid("y", area=70, rise_time=1e-4, duration=7e-4, system=system)
                    seq.add_block(rf, gz, *([gy] if in_plane else []))
                    used = RASTER_S * round(pp.calc_duration(rf, gz) / RASTER_S)
                seq.add_block(gzr)
                centre = rf.delay + EXCITATION_S / 2
                if arbitrary:
                    k = spiral_per_m(edges, readout_s, turns) * np.exp(1j * np.deg2rad(turn_deg[t]))
                    g = np.diff(k) / RASTER_S
                    gradients = [
                        pp.make_arbitrary_grad(axis, part, first=0, last=0, delay=ADC_DELAY_S, system=system)
                        for axis, part in (("x", g.real), ("y", g.imag))
                    ]
                else:
                    area = EDGE_PER_M if t % 2 else -EDGE_PER_M / 2
                    gradients = [
                        pp.make_trapezoid("x", area=area, duration=readout_s, rise_time=2e-4, system=system)
                    ]
                if t < dummies or what == "no ADC":
                    seq.add_block(*gradients, pp.make_delay(readout_block_s))
                else:
                    event = adc[n_samples // 2 if what == "short ADC" else n_samples]
                    event.phase_offset = np.deg2rad(adc_phase_deg[t])
                    seq.add_block(*gradients, event, pp.make_delay(readout_block_s))
                te_s = used - centre + 1.2e-3 + ADC_DELAY_S
                used += 1.2e-3 + readout_block_s
                extra = what == "two ADCs" or t == noise_label_at
                if extra:
                    labels = [pp.make_label("NOISE", "SET", 1)] if t == noise_label_at else []
                    seq.add_block(adc[n_samples], pp.make_delay(readout_block_s), *labels)
                    used += readout_block_s
                late = 1e-3 if what == "late" and z == slices - 1 else 0.0
                spoiler = pp.make_trapezoid("z", area=800, duration=1.5e-3, system=system)
                off = [pp.make_label("NOISE", "SET", 0)] if t == noise_label_at else []
                seq.add_block(spoiler, pp.make_delay(tr_s[t] - used + late), *off)
        seq.write(str(path), v141_compat=old_format)
    return Written(
        str(path),
        flip_deg,
        phase_deg,
        adc_phase_deg,
        tr_s * 1e3,
        te_s * 1e3,
        None if ti_s is None else (ti_s + centre) * 1e3,
        turn_deg,
    )
