"""Signal trains of tissues at their exact T1 and T2: extended phase graphs of a FISP fingerprint.

Letters: M tissues, T timepoints, N configuration orders, J terms of a series, R components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import ArrayLike, NDArray

# Largest error of each of the two steps of `expand_signals`, relative to the largest signal.
_TOLERANCE = 1e-5


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


def fisp_signals(
    train: Train,
    t1_ms: ArrayLike,
    t2_ms: ArrayLike,
    *,
    b1: ArrayLike | None = None,
    inversion_efficiency: float = 1.0,
    slice_profile: Sequence[float] = (),
) -> NDArray[np.complex128]:
    """Signals of tissues in a gradient-spoiled train (FISP) after an inversion.

    ``Mz = -efficiency``, recovery over TI; then for each timepoint the pulse, the signal at TE in the
    phase frame of the pulse, relaxation over TR, and one whole cycle of dephasing across the voxel.
    Pulses are instantaneous, diffusion and off-resonance are left out. A pulse of phase 0 turns Mz = 1
    into a signal of ``-i sin(flip)``.

    Parameters
    ----------
    train
        The pulses and times.
    t1_ms, t2_ms
        `(M,)` relaxation times in ms.
    b1
        `(M,)`, factor of all flip angles of a tissue; 1 if None. The inversion is adiabatic and does not
        depend on it.
    inversion_efficiency
        1 inverts all of the magnetisation, 0 saturates it.
    slice_profile
        Factors of the flip angle at equidistant positions across the slice, whose mean is the signal;
        none are an ideal slice, as one factor of 1 is. The inversion does not depend on the position.

    Returns
    -------
    NDArray
        `(M, T)`, in units of the equilibrium magnetisation.

    Raises
    ------
    ValueError
        If the lengths differ or a value is out of its range.

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
    # A number for all tissues, or (M, 1).
    field: np.float64 | NDArray[np.float64] = np.float64(1)
    if b1 is not None:
        given = np.atleast_1d(np.asarray(b1, dtype=np.float64))
        if given.shape != t1.shape:
            raise ValueError(f"b1 has shape {given.shape}: expected {t1.shape}, one factor for each tissue")
        if not np.all((given >= 0) & np.isfinite(given)):
            raise ValueError(f"b1 lies between {given.min():g} and {given.max():g}: expected at least 0")
        field = given[:, None]
    if not 0 <= inversion_efficiency <= 1:
        raise ValueError(f"inversion_efficiency is {inversion_efficiency:g}: expected 0 to 1")
    profile = np.asarray(slice_profile, dtype=np.float64)
    if profile.ndim != 1 or not np.all(np.isfinite(profile)) or (profile.size and not profile.any()):
        raise ValueError(f"slice_profile is {slice_profile}: expected finite factors, not all of them 0")

    # A symmetric profile has each factor twice.
    factors, counts = np.unique(profile if profile.size else [1.0], return_counts=True)
    signals = np.zeros((len(t1), len(train)), dtype=np.complex128)
    for factor, share in zip(factors, counts / counts.sum(), strict=True):
        signals += share * _extended_phase_graph(train, t1, t2, factor * field, inversion_efficiency)
    return signals


@dataclass(frozen=True, slots=True)
class Expansion:
    """Signals of tissues at any transmit field, ``s_m(b1) = Σ_r g_mr(b1) v_r``.

    Parameters
    ----------
    components
        `(R, T)`, the ``v_r``.
    series
        For each tissue the Chebyshev coefficients `(J, R)` of its ``g_mr`` from `low` to `high`.
    low, high
        `(M,)`, range of the field in which the series are valid.
    """

    components: NDArray[np.complex128]
    series: tuple[NDArray[np.complex128], ...]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def weights(self, tissue: int, b1: NDArray[np.float64], some: slice) -> NDArray[np.complex128]:
        """``g_mr`` of a tissue at the fields `b1` `(n,)`, `(n, R)` for some of the components."""
        low, high = self.low[tissue], self.high[tissue]
        place = (2 * b1 - low - high) / _width(low, high)
        series = self.series[tissue][:, some]
        # Real times real and imaginary parts: numpy would make the large matrix complex first.
        parts = chebyshev.chebvander(place, len(series) - 1) @ np.ascontiguousarray(series).view(np.float64)
        result: NDArray[np.complex128] = parts.view(np.complex128)
        return result


def expand_signals(
    train: Train,
    t1_ms: ArrayLike,
    t2_ms: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    inversion_efficiency: float = 1.0,
    slice_profile: Sequence[float] = (),
) -> Expansion:
    """Expand the signals of tissues in the transmit field.

    The signal is a smooth function of the field. For each tissue it is interpolated at Chebyshev nodes,
    twice as many until the last quarter of the series is below 1e-5 of the largest term; all series
    together are then compressed by a singular value decomposition to the components that keep the error
    below 1e-5. How many these are grows with the train, the range of the field and T2.

    Parameters
    ----------
    train, t1_ms, t2_ms, inversion_efficiency, slice_profile
        As for `fisp_signals`.
    low, high
        `(M,)`, range of the field in which a tissue occurs.

    Returns
    -------
    Expansion
        Within 2e-5 of the largest signal of all tissues; as tried, within 1e-6.

    Raises
    ------
    ValueError
        As `fisp_signals`.
    """
    t1, t2, least, most = (np.atleast_1d(np.asarray(a, dtype=np.float64)) for a in (t1_ms, t2_ms, low, high))

    def interpolate(m: int, n_terms: int) -> NDArray[np.complex128]:
        place = chebyshev.chebpts1(n_terms)
        values = fisp_signals(
            train,
            np.full(n_terms, t1[m]),
            np.full(n_terms, t2[m]),
            b1=(least[m] + most[m] + _width(least[m], most[m]) * place) / 2,
            inversion_efficiency=inversion_efficiency,
            slice_profile=slice_profile,
        )
        # The polynomials are orthogonal at these nodes; their squares sum to n/2, that of the first to n.
        series: NDArray[np.complex128] = chebyshev.chebvander(place, n_terms - 1).T @ values * (2 / n_terms)
        series[0] /= 2
        return series

    found: list[NDArray[np.complex128]] = []  # (J, T) of each tissue
    for m in range(len(t1)):
        series = interpolate(m, 16)
        while np.abs(series[-len(series) // 4 :]).max() > _TOLERANCE * np.abs(series).max():
            series = interpolate(m, 2 * len(series))
        found.append(series)

    _, size, components = np.linalg.svd(np.concatenate(found), full_matrices=False)
    # Without the components from r on, a column of the series changes by at most the singular value r,
    # and a signal by that times the root of the number of terms: no Chebyshev polynomial is above 1.
    n_terms = max(len(series) for series in found)
    largest = max(np.abs(series).max() for series in found)
    components = components[size * np.sqrt(n_terms) > _TOLERANCE * largest]
    return Expansion(components, tuple(series @ components.conj().T for series in found), least, most)


def _width(low: float, high: float) -> float:
    """Width of a range of the field, which may be a single value."""
    return max(high - low, 1e-6)


def _extended_phase_graph(
    train: Train,
    t1: NDArray[np.float64],
    t2: NDArray[np.float64],
    b1: np.float64 | NDArray[np.float64],
    inversion_efficiency: float,
) -> NDArray[np.complex128]:
    """Signals `(M, T)` at one position in the slice; `b1` is `(M, 1)`, or a number for all tissues."""
    n = len(train)
    # A state of order k needs k shifts to arise and k to return: beyond n/2 it is never seen.
    n_orders = n // 2 + 2
    plus = np.zeros((len(t1), n_orders), dtype=np.complex128)  # (M, N)
    minus = np.zeros_like(plus)  # complex conjugate of the state of order -k
    z = np.zeros_like(plus)
    z[:, 0] = 1 - (1 + inversion_efficiency) * np.exp(-train.ti_ms / t1)

    signals = np.empty((len(t1), n), dtype=np.complex128)
    for t in range(n):
        # Orders that have arisen and can still return.
        k = min(t, n - 1 - t) + 1
        fp, fm, fz = plus[:, :k], minus[:, :k], z[:, :k]
        flip, phase = b1 * np.deg2rad(train.flip_deg[t]), np.deg2rad(train.phase_deg[t])
        cos2, sin2, sin, turn = np.cos(flip / 2) ** 2, np.sin(flip / 2) ** 2, np.sin(flip), np.exp(1j * phase)
        fp, fm, fz = (
            cos2 * fp + turn**2 * sin2 * fm - 1j * turn * sin * fz,
            turn.conjugate() ** 2 * sin2 * fp + cos2 * fm + 1j * turn.conjugate() * sin * fz,
            -0.5j * turn.conjugate() * sin * fp + 0.5j * turn * sin * fm + np.cos(flip) * fz,
        )
        signals[:, t] = fp[:, 0] * turn.conjugate() * np.exp(-train.te_ms[t] / t2)

        e1, e2 = np.exp(-train.tr_ms[t] / t1)[:, None], np.exp(-train.tr_ms[t] / t2)[:, None]
        plus[:, 1 : k + 1] = e2 * fp
        minus[:, : k - 1] = (e2 * fm)[:, 1:]
        minus[:, k - 1] = 0
        plus[:, 0] = minus[:, 0].conj()
        z[:, :k] = e1 * fz
        z[:, 0] += 1 - e1[:, 0]
    return signals
