"""Pulseq files of small spiral fingerprints, written by PyPulseq."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

#: Of a matrix of 64 over 300 mm.
FOV_MM, MATRIX, N_ARMS, DWELL_US, N_SAMPLES = 300.0, 64, 24, 5.0, 400
TE_MS, TR_MS, TI_MS = 3.0, 12.0, 21.0


def flip_angles(n: int) -> np.ndarray[Any, Any]:
    """Lobes, `(T,)` degrees."""
    t = np.arange(n)
    return 5 + 50 * np.abs(np.sin(np.pi * (t + 1) / 60)) * (0.6 + 0.4 * np.cos(t / 37))


def spiral_gradient(n_raster: int, raster_s: float) -> np.ndarray[Any, Any]:
    """Gx + i Gy in Hz/m on the centres of the raster, of a spiral that ends at the edge of k-space."""
    k_max = MATRIX / (2 * FOV_MM * 1e-3)
    u = np.linspace(0, 1, n_raster + 1)
    radius = k_max * u**2 * (3 - 2 * u) ** 0.5  # begins and ends slowly
    k = radius * np.exp(2j * np.pi * 2.2 * u)
    return np.diff(k) / raster_s


def write_sequence(
    path: Path,
    *,
    n_pulses: int = 120,
    n_noise: int = 5,
    dummies: tuple[int, ...] = (),
    slices: int = 1,
    labels: bool = False,
    rf_phase_deg: float = 0.0,
    receiver_follows: bool = True,
    inversion: bool = True,
    use: bool = True,
    extra: str = "",
    n_arms: int = N_ARMS,
) -> Path:
    """Noise ADCs, then for each slice an inversion and pulses with one ADC each.

    Parameters
    ----------
    dummies
        Pulses without an ADC.
    labels
        Whether SLC numbers the slices, else the frequency of the pulses does.
    rf_phase_deg
        Step of the RF phase from pulse to pulse.
    use
        Whether the file says what the pulses are for.
    extra
        Something that does not belong: "refocusing", "two ADCs", "long ADC", "inversion", "kz",
        "no gradient".
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import pypulseq as pp

        system = pp.Opts(
            max_grad=200, grad_unit="mT/m", max_slew=5000, slew_unit="T/m/s", rf_dead_time=0,
            rf_ringdown_time=0, adc_dead_time=0,
        )  # fmt: skip
        sequence = pp.Sequence(system)
        sequence.set_definition("FOV", [FOV_MM * 1e-3, FOV_MM * 1e-3, 5e-3])
        uses = {"use": "excitation"} if use else {"use": "undefined"}
        adc = pp.make_adc(N_SAMPLES, dwell=DWELL_US * 1e-6, system=system)
        for _ in range(n_noise):
            sequence.add_block(adc, pp.make_delay(5e-3))
        pulse_s, raster = 1e-3, system.grad_raster_time
        n_raster = round(N_SAMPLES * DWELL_US * 1e-6 / raster)
        arm = spiral_gradient(n_raster, raster)
        for z in range(slices):
            label = [pp.make_label("SLC", "SET", z)] if labels else []
            if inversion:
                its = {"use": "inversion"} if use else {"use": "undefined"}
                inverting = pp.make_block_pulse(np.pi, duration=2e-3, system=system, **its)
                sequence.add_block(inverting, *label)
                sequence.add_block(pp.make_delay(TI_MS * 1e-3 - 1e-3 - pulse_s / 2))
            for t, flip_deg in enumerate(flip_angles(n_pulses)):
                phase = np.deg2rad(rf_phase_deg * t % 360)
                pulse = pp.make_block_pulse(
                    np.deg2rad(flip_deg),
                    duration=pulse_s,
                    phase_offset=phase,
                    freq_offset=0 if labels else 700.0 * z,
                    system=system,
                    **uses,
                )
                sequence.add_block(pulse, *label)
                sequence.add_block(pp.make_delay(TE_MS * 1e-3 - pulse_s / 2))
                turned = arm * np.exp(2j * np.pi * (t * 7 % n_arms) / n_arms)
                events = [] if extra == "no gradient" else [
                    pp.make_arbitrary_grad(c, w, first=0, last=0, max_slew=1e12, max_grad=1e12, system=system)
                    for c, w in (("x", turned.real), ("y", turned.imag))
                ]  # fmt: skip
                if extra == "kz":
                    events.append(pp.make_trapezoid("z", area=20 * t, duration=2e-3, system=system))
                if t not in dummies:
                    n = N_SAMPLES + (100 if extra == "long ADC" and t % 2 else 0)
                    events.append(
                        pp.make_adc(
                            n,
                            dwell=DWELL_US * 1e-6,
                            phase_offset=(phase if receiver_follows else 0.0) + 0.3,
                            system=system,
                        )
                    )
                sequence.add_block(*events, pp.make_delay(max(n_raster * raster, 2.6e-3)))
                left = TR_MS * 1e-3 - pulse_s / 2 - TE_MS * 1e-3 - max(n_raster * raster, 2.6e-3)
                if extra == "two ADCs" and t == 3:
                    sequence.add_block(adc, pp.make_delay(left))
                elif extra == "refocusing" and t == 3:
                    sequence.add_block(
                        pp.make_block_pulse(np.pi, duration=1e-3, use="refocusing", system=system),
                        pp.make_delay(left),
                    )
                elif extra == "inversion" and t == 3:
                    sequence.add_block(
                        pp.make_block_pulse(np.pi, duration=1e-3, use="inversion", system=system),
                        pp.make_delay(left),
                    )
                else:
                    sequence.add_block(pp.make_delay(left))
        sequence.write(str(path))
    return path
