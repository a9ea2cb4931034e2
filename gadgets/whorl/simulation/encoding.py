"""How k-space is run through: pulses, and where the samples lie.

Letters: T timepoints, I interleaves, S samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from whorl.simulation.gradients import play
from whorl.simulation.parameters import Parameters
from whorl.simulation.pulseq import read_played
from whorl.simulation.signals import Train, jiang_train
from whorl.simulation.spiral import cycles_per_pixel, design_spiral

_NOISE_READOUTS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """Pulses, and where the samples lie.

    Parameters
    ----------
    train
        Pulses and times.
    arms
        `(T,)` interleaf of each timepoint.
    nominal, played
        `(I, S, 2)` in cycles per pixel: what the file holds, and what the gradients make of it.
    dwell_us
        Time between two samples.
    n_prescans
        Noise readouts before the first pulse.
    turn
        By what the readouts are multiplied, complex `(T, S)` or `(T, 1)`; ``None``: nothing.
    inner_radius, slew_t_per_m_s
        Of a spiral that was designed, see `whorl.simulation.spiral.Spiral`; else 0.
    """

    train: Train
    arms: NDArray[np.int64]
    nominal: NDArray[np.float64]
    played: NDArray[np.float64]
    dwell_us: float
    n_prescans: int = _NOISE_READOUTS
    turn: NDArray[np.complex64] | None = None
    inner_radius: float = 0.0
    slew_t_per_m_s: float = 0.0

    @property
    def elapsed_ms(self) -> NDArray[np.float64]:
        """Time of each sample after its pulse, `(T, S)`."""
        n_samples = self.nominal.shape[1]
        return np.asarray(self.train.te_ms[:, None] + np.arange(n_samples) * (self.dwell_us * 1e-3))


def encode(given: Parameters) -> tuple[Parameters, Encoding]:
    """How k-space is run through, and the parameters with those that a sequence replaces.

    Raises
    ------
    ValueError
        If the spiral cannot be made, or a sequence, pulses and readouts do not go together.
    """
    p, encoding = (given, _spirals(given)) if given.sequence is None else _of_sequence(given)
    train = encoding.train
    if train.tr_ms.min() < train.te_ms.max() + p.readout_ms:
        raise ValueError(
            f"readout_ms is {p.readout_ms:g}: TE {train.te_ms.max():g} ms and the readout do not fit "
            f"into TR {train.tr_ms.min():g} ms"
        )
    return p, encoding


def _spirals(p: Parameters) -> Encoding:
    train = p.train if p.train is not None else jiang_train(p.timepoints)
    if len(train) != p.timepoints:
        raise ValueError(
            f"the train has {len(train)} pulses, timepoints is {p.timepoints}: expected the same number"
        )
    arms = interleaf_order(p.order, p.timepoints, p.interleaves)
    spiral = design_spiral(
        matrix=p.matrix, fov_mm=p.fov_mm, interleaves=p.interleaves, readout_ms=p.readout_ms
    )
    if p.order == "golden-angle":
        turns = np.exp(2j * np.pi * (1 - 2 / (1 + math.sqrt(5))) * np.arange(p.timepoints))
        spiral = replace(spiral, k_per_m=turns[:, None] * spiral.k_per_m[0])
        if p.girf is not None or p.gradient_delay_us:
            raise ValueError("girf and gradient_delay_us need an order of equal rotations")
    k_per_m, turn = spiral.delayed(p.gradient_delay_us).k_per_m, None
    if p.girf is not None:
        k_per_m, phase = play(spiral, np.load(p.girf, allow_pickle=False))
        # The field adds to that of the gradients, whose phase is exp(-i 2π k·r).
        turn = np.exp(-1j * phase[arms]).astype(np.complex64)
    pixel_mm = p.fov_mm / p.matrix
    return Encoding(
        train=train,
        arms=arms,
        nominal=cycles_per_pixel(spiral.k_per_m, pixel_mm),
        played=cycles_per_pixel(k_per_m, pixel_mm),
        dwell_us=spiral.dwell_us,
        turn=turn,
        inner_radius=spiral.inner_radius,
        slew_t_per_m_s=spiral.slew_t_per_m_s,
    )


def _of_sequence(given: Parameters) -> tuple[Parameters, Encoding]:
    assert given.sequence is not None
    file = read_played(given.sequence)
    if given.girf is not None or given.gradient_delay_us:
        raise ValueError("girf and gradient_delay_us are of simulated spirals: expected no sequence")
    n_interleaves, n_samples = file.k_per_m.shape
    p = replace(
        given,
        timepoints=len(file.train),
        interleaves=n_interleaves,
        matrix=file.matrix,
        fov_mm=file.fov_mm,
        order="of the sequence",
        readout_ms=n_samples * file.dwell_us * 1e-3,
    )
    k = cycles_per_pixel(file.k_per_m, p.fov_mm / p.matrix)
    # The signals are in the frame of the RF phase, the receiver is in its own.
    receiver = np.exp(1j * np.deg2rad(file.train.phase_deg - file.receiver_deg)).astype(np.complex64)
    return p, Encoding(file.train, file.arms, k, k, file.dwell_us, file.n_noise, receiver[:, None])


def interleaf_order(order: str, timepoints: int, interleaves: int) -> NDArray[np.int64]:
    """Interleaf of each timepoint, `(T,)`.

    `golden`: steps of nearly the golden section of all interleaves, without a common divisor with their
    number, so that successive timepoints lie far apart and each I timepoints visit every interleaf once.
    `sequential`: one after the other. `golden-angle`: each timepoint has an interleaf of its own, see
    `Parameters`.

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
