"""Signal trains of tissues at their exact T1 and T2: extended phase graphs of a FISP fingerprint.

Letters: M tissues, T timepoints, N configuration orders, J terms of a series, R components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import ArrayLike, NDArray

# Largest error of each of the two steps of `expand_signals`, relative to the largest signal.
_TOLERANCE = 1e-5
# Products of polynomials that `Expansion.weights` holds at once: 32 MB.
_AT_ONCE = 4_000_000


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
    """Signals of tissues whose transmit field and relaxation vary, ``s_m(x) = Σ_r g_mr(x) v_r``.

    ``x`` is three factors: of the flip angles, of T1 and of T2.

    Parameters
    ----------
    components
        `(R, T)`, the ``v_r``.
    series
        For each tissue the coefficients `(J0, J1, J2, R)` of its ``g_mr`` from `low` to `high`, in
        products of Chebyshev polynomials of the three factors.
    low, high
        `(M, 3)`, range of the factors in which the series are valid.
    """

    components: NDArray[np.complex128]
    series: tuple[NDArray[np.complex128], ...]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def weights(self, tissue: int, factors: NDArray[np.float64], some: slice) -> NDArray[np.complex128]:
        """``g_mr`` of a tissue at the `factors` `(n, 3)`, `(n, R)` for some of the components."""
        low, high = self.low[tissue], self.high[tissue]
        place = (2 * factors - low - high) / _width(low, high)
        series = self.series[tissue][..., some]
        lengths = series.shape[:3]
        # Real times real and imaginary parts: numpy would make the large matrix complex first.
        table = np.ascontiguousarray(series.reshape(math.prod(lengths), -1)).view(np.float64)
        parts = np.empty((len(factors), table.shape[1]))
        at_once = max(_AT_ONCE // len(table), 1)
        for first in range(0, len(factors), at_once):
            some_places = place[first : first + at_once]
            products = np.ones((len(some_places), 1))
            for axis, length in enumerate(lengths):
                terms = chebyshev.chebvander(some_places[:, axis], length - 1)
                products = (products[:, :, None] * terms[:, None, :]).reshape(len(terms), -1)
            parts[first : first + at_once] = products @ table
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
    """Expand the signals of tissues in the transmit field and in their own relaxation times.

    The signal is a smooth function of the field, of T1 and of T2. For each tissue the exact signal is
    interpolated at Chebyshev nodes of the three, twice as many of one until the last quarter of its
    series is below 1e-5 of the largest term; all series together are then compressed by a singular value
    decomposition to the components that keep the error below 1e-5. How many these are grows with the
    train, the ranges and T2.

    Parameters
    ----------
    train, t1_ms, t2_ms, inversion_efficiency, slice_profile
        As for `fisp_signals`.
    low, high
        `(M, 3)`, ranges of the factors of the flip angles, of T1 and of T2 in which a tissue occurs.

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

    def interpolate(m: int, lengths: list[int]) -> NDArray[np.complex128]:
        places = [chebyshev.chebpts1(n) for n in lengths]
        nodes = np.stack(np.meshgrid(*places, indexing="ij"), axis=-1).reshape(-1, 3)
        factors = (least[m] + most[m] + _width(least[m], most[m]) * nodes) / 2
        series = fisp_signals(
            train,
            t1[m] * factors[:, 1],
            t2[m] * factors[:, 2],
            b1=factors[:, 0],
            inversion_efficiency=inversion_efficiency,
            slice_profile=slice_profile,
        ).reshape(*lengths, len(train))
        for axis, (place, n) in enumerate(zip(places, lengths, strict=True)):
            # The polynomials are orthogonal at these nodes; their squares sum to n/2, that of the first to n.
            analysis = chebyshev.chebvander(place, n - 1).T * (2 / n)
            analysis[0] /= 2
            series = np.moveaxis(np.tensordot(analysis, series, axes=(1, axis)), 0, axis)
        return series

    found: list[NDArray[np.complex128]] = []  # (J0, J1, J2, T) of each tissue
    for m in range(len(t1)):
        # What does not vary needs one node.
        lengths = [n if width > 0 else 1 for n, width in zip((16, 8, 8), most[m] - least[m], strict=True)]
        series = interpolate(m, lengths)
        while long := [axis for axis in range(3) if _is_cut_short(series, axis)]:
            lengths = [2 * n if axis in long else n for axis, n in enumerate(lengths)]
            series = interpolate(m, lengths)
        found.append(series)

    terms = [series.reshape(-1, len(train)) for series in found]
    _, size, components = np.linalg.svd(np.concatenate(terms), full_matrices=False)
    # Without the components from r on, a column of the series changes by at most the singular value r,
    # and a signal by that times the root of the number of terms: no Chebyshev polynomial is above 1.
    n_terms = max(len(series) for series in terms)
    largest = max(np.abs(series).max() for series in terms)
    components = components[size * np.sqrt(n_terms) > _TOLERANCE * largest]
    return Expansion(components, tuple(series @ components.conj().T for series in found), least, most)


def _is_cut_short(series: NDArray[np.complex128], axis: int) -> bool:
    """Whether the last quarter of the terms along an axis still matters."""
    n = series.shape[axis]
    tail = np.moveaxis(series, axis, 0)[-n // 4 :]
    return n > 1 and bool(np.abs(tail).max() > _TOLERANCE * np.abs(series).max())


def _width(low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    """Width of ranges, which may be a single value."""
    return np.maximum(high - low, 1e-6)


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
