"""What a Pulseq file makes a scanner play, by PyPulseq's own calculations.

Letters: T timepoints, I interleaves, S samples, A ADCs.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from whorl.simulation.signals import Train

# Relative to the largest radius: beyond it two readouts are different interleaves.
_SAME = 1e-4


@dataclass(frozen=True, slots=True)
class Played:
    """A fingerprint as a Pulseq file has it.

    Parameters
    ----------
    train
        Pulses and times.
    k_per_m
        `(I, S)` complex, kx + i ky of each distinct interleaf, cycles/m.
    arms
        `(T,)` interleaf of each timepoint.
    receiver_deg
        `(T,)` phase of the receiver.
    n_noise
        ADCs before the first pulse.
    dwell_us
        Time between two samples.
    fov_mm
        Field of view along x.
    matrix
        Largest even matrix whose edge of k-space the readouts reach.
    """

    train: Train
    k_per_m: NDArray[np.complex128]
    arms: NDArray[np.int64]
    receiver_deg: NDArray[np.float64]
    n_noise: int
    dwell_us: float
    fov_mm: float
    matrix: int


def read_played(path: str | os.PathLike[str]) -> Played:
    """Read a file of one slice: noise ADCs, an inversion, then one ADC after each excitation.

    Raises
    ------
    ValueError
        If the file is something else.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import pypulseq

        sequence = pypulseq.Sequence()
        try:
            sequence.read(str(path))
        except Exception as error:  # whatever its reader comes across
            why = str(error) or type(error).__name__
        else:
            why = "" if sequence.block_events else "it has no blocks"
        if why:
            raise ValueError(f"{path} cannot be read as a Pulseq file: {why}")
        k_adc, _, t_excitation, _, t_adc = sequence.calculate_kspace()
        pulses, adcs, inverted = [], [], []
        now = 0.0
        for number in sequence.block_events:
            block = sequence.get_block(number)
            if block.rf is not None:
                # A block pulse has its two ends only.
                raster = np.arange(0.5 * sequence.rf_raster_time, block.rf.shape_dur, sequence.rf_raster_time)
                area = np.interp(raster, block.rf.t, block.rf.signal).sum() * sequence.rf_raster_time
                if block.rf.use in ("inversion", "i"):
                    inverted.append(now + block.rf.delay + block.rf.center)
                else:
                    pulses.append((360 * abs(area), np.rad2deg(block.rf.phase_offset)))
            if block.adc is not None:
                adcs.append((block.adc.num_samples, block.adc.dwell, np.rad2deg(block.adc.phase_offset)))
            now += block.block_duration
        fov_mm = 1e3 * float(np.asarray(sequence.definitions["FOV"])[0])
    sizes = {(n, round(dwell * 1e9)) for n, dwell, _ in adcs}
    if len(sizes) != 1:
        raise ValueError(f"{path} has ADCs of {len(sizes)} sizes: expected one")
    n_samples, dwell_ns = sizes.pop()
    T = len(pulses)
    n_noise = len(adcs) - T
    starts = t_adc.reshape(-1, n_samples)[:, 0]
    if n_noise < 0 or len(t_excitation) != T or (n_noise and starts[n_noise - 1] > t_excitation[0]):
        raise ValueError(
            f"{path} has {T} pulses and {len(adcs)} ADCs: expected noise, then one for each pulse"
        )
    if len(inverted) != 1 or inverted[0] > t_excitation[0]:
        raise ValueError(f"{path} has {len(inverted)} inversions: expected one before the first pulse")
    k = k_adc.reshape(3, -1, n_samples)[:2, n_noise:]
    k = k[0] + 1j * k[1]  # (T, S)
    largest = np.abs(k).max()
    distinct: list[NDArray[np.complex128]] = []
    arms = np.empty(T, dtype=np.int64)
    for t, one in enumerate(k):
        near = (n for n, other in enumerate(distinct) if np.abs(other - one).max() < _SAME * largest)
        arms[t] = next(near, len(distinct))
        if arms[t] == len(distinct):
            distinct.append(one)
    dwell_us = dwell_ns * 1e-3
    te_ms = (starts[n_noise:] - t_excitation) * 1e3 - dwell_us * 0.5e-3
    tr_ms = np.diff(t_excitation, append=max(now, t_excitation[-1] + te_ms[-1] * 1e-3)) * 1e3
    return Played(
        train=Train(
            flip_deg=np.array([flip for flip, _ in pulses]),
            phase_deg=np.array([phase for _, phase in pulses]),
            tr_ms=tr_ms,
            te_ms=te_ms,
            ti_ms=float(t_excitation[0] - inverted[0]) * 1e3,
        ),
        k_per_m=np.array(distinct),
        arms=arms,
        receiver_deg=np.array([phase for _, _, phase in adcs[n_noise:]]),
        n_noise=n_noise,
        dwell_us=dwell_us,
        fov_mm=fov_mm,
        matrix=2 * int(largest * fov_mm * 1e-3 + 1e-3),
    )
