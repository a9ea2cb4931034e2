"""Signal trains of tissues at their exact T1 and T2: extended phase graphs of a FISP fingerprint.

Letters: M tissues, T timepoints, N configuration orders.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True)
class Train:
    """A fingerprint train: inversion, delay, then one pulse and one readout for each timepoint.

    Parameters
    ----------
    flip_deg, phase_deg
        `(T,)`, flip angle and RF phase of each pulse in degrees.
    tr_ms
        `(T,)`, time from each pulse to the next.
    te_ms
        `(T,)`, time from each pulse to the start of its readout.
    ti_ms
        Time from the inversion to the first pulse.
    """

    flip_deg: NDArray[np.float64]
    phase_deg: NDArray[np.float64]
    tr_ms: NDArray[np.float64]
    te_ms: NDArray[np.float64]
    ti_ms: float

    def __post_init__(self) -> None:
        n = len(self.flip_deg)
        if n < 1:
            raise ValueError("the train has no timepoint: expected at least 1")
        for name in ("phase_deg", "tr_ms", "te_ms"):
            if len(getattr(self, name)) != n:
                raise ValueError(
                    f"the train has {n} flip angles and {len(getattr(self, name))} values of {name}: "
                    f"expected one for each pulse"
                )
        if np.any(self.te_ms < 0) or np.any(self.te_ms > self.tr_ms):
            raise ValueError(
                f"te_ms lies between {self.te_ms.min():g} and {self.te_ms.max():g}, tr_ms between "
                f"{self.tr_ms.min():g} and {self.tr_ms.max():g}: expected 0 <= te_ms <= tr_ms"
            )
        if self.ti_ms < 0:
            raise ValueError(f"ti_ms is {self.ti_ms:g}: expected at least 0")

    def __len__(self) -> int:
        return len(self.flip_deg)


def jiang_train(n: int, *, tr_ms: float = 9.0, te_ms: float = 2.0, ti_ms: float = 20.0) -> Train:
    """Train in the manner of Jiang: lobes of a half sine, of different heights.

    Each lobe has 190 pulses, which rise from 5° to the peak and fall back, and 10 pulses of 0°, in
    which the magnetisation recovers. The peaks of five successive lobes are 30°, 50°, 70°, 50°, 30°.

    Parameters
    ----------
    n
        Number of timepoints T.
    tr_ms, te_ms, ti_ms
        The same for all timepoints.

    References
    ----------
    Jiang et al., Magn Reson Med 74:1621 (2015), doi:10.1002/mrm.25559. The shape is theirs, the
    values are not.
    """
    if n < 1:
        raise ValueError(f"timepoints is {n}: expected at least 1")
    lobe, pulse = np.divmod(np.arange(n), 200)
    peak = 30.0 + 20.0 * (2 - np.abs(lobe % 5 - 2))
    flip = np.where(pulse < 190, 5.0 + (peak - 5.0) * np.sin(np.pi * pulse / 190), 0.0)
    return Train(flip, np.zeros(n), np.full(n, float(tr_ms)), np.full(n, float(te_ms)), float(ti_ms))


def fisp_signals(train: Train, t1_ms: ArrayLike, t2_ms: ArrayLike) -> NDArray[np.complex128]:
    """Signals of tissues in a gradient-spoiled train (FISP) after an ideal inversion.

    ``Mz = -1``, recovery over TI; then for each timepoint the pulse, the signal at TE in the phase
    frame of the pulse, relaxation over TR, and one whole cycle of dephasing across the voxel. Pulses
    are instantaneous, diffusion, B1 and off-resonance are left out. A pulse of phase 0 turns Mz = 1
    into a signal of ``-i sin(flip)``.

    Parameters
    ----------
    train
        The pulses and times.
    t1_ms, t2_ms
        `(M,)` relaxation times in ms.

    Returns
    -------
    NDArray
        `(M, T)`, in units of the equilibrium magnetisation.

    Raises
    ------
    ValueError
        If the lengths differ or a time is not positive.

    References
    ----------
    Weigel, J Magn Reson Imaging 41:266 (2015), doi:10.1002/jmri.24619: states F+, F-, Z of each
    order, their rotation and shift.
    """
    t1 = np.atleast_1d(np.asarray(t1_ms, dtype=np.float64))
    t2 = np.atleast_1d(np.asarray(t2_ms, dtype=np.float64))
    if t1.ndim != 1 or t1.shape != t2.shape:
        raise ValueError(f"t1_ms has shape {t1.shape}, t2_ms has {t2.shape}: expected the same length")
    if not (np.all(t1 > 0) and np.all(t2 > 0)):
        raise ValueError("t1_ms and t2_ms must be positive")

    n = len(train)
    # A state of order k needs k shifts to arise and k to return: beyond n/2 it is never seen.
    n_orders = n // 2 + 2
    plus = np.zeros((len(t1), n_orders), dtype=np.complex128)  # (M, N)
    minus = np.zeros_like(plus)  # complex conjugate of the state of order -k
    z = np.zeros_like(plus)
    z[:, 0] = 1 - 2 * np.exp(-train.ti_ms / t1)

    signals = np.empty((len(t1), n), dtype=np.complex128)
    for t in range(n):
        flip, phase = np.deg2rad(train.flip_deg[t]), np.deg2rad(train.phase_deg[t])
        cos2, sin2, sin, turn = np.cos(flip / 2) ** 2, np.sin(flip / 2) ** 2, np.sin(flip), np.exp(1j * phase)
        plus, minus, z = (
            cos2 * plus + turn**2 * sin2 * minus - 1j * turn * sin * z,
            turn.conjugate() ** 2 * sin2 * plus + cos2 * minus + 1j * turn.conjugate() * sin * z,
            -0.5j * turn.conjugate() * sin * plus + 0.5j * turn * sin * minus + np.cos(flip) * z,
        )
        signals[:, t] = plus[:, 0] * turn.conjugate() * np.exp(-train.te_ms[t] / t2)

        e1, e2 = np.exp(-train.tr_ms[t] / t1)[:, None], np.exp(-train.tr_ms[t] / t2)[:, None]
        plus, minus, z = e2 * plus, e2 * minus, e1 * z
        z[:, 0] += 1 - e1[:, 0]
        plus[:, 1:] = plus[:, :-1].copy()
        minus[:, :-1] = minus[:, 1:].copy()
        minus[:, -1] = 0
        plus[:, 0] = minus[:, 0].conj()
    return signals
