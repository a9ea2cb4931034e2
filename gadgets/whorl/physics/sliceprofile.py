"""Flip angles across the slice that a slice-selective RF pulse makes.

Letters: M samples of the pulse, P places across the slice, T flip angles.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Places from the centre of the slice to where the pulse no longer reaches. T2 of tissue is then biased by
#: 0.02 % at most, of fluid by up to 3 % (tests/bench_signal_model.py); 8 places: 0.3 and 6 %.
N_PLACES = 16
#: Samples of a pulse that this module makes itself.
_SAMPLES = 256
_MOST_SAMPLES = 10_000
_LARGEST_BYTES = 1 << 24
#: Flip angles for which a profile is computed; it is smooth between them.
_FLIPS = 64


def hann_sinc(time_bandwidth: float) -> NDArray[np.complex128]:
    """Samples `(M,)` of a sinc pulse under a Hann window; the sinc has `time_bandwidth` zero crossings.

    Bernstein, King, Zhou, Handbook of MRI Pulse Sequences (2004), section 2.2.
    """
    at = (np.arange(_SAMPLES) + 0.5) / _SAMPLES - 0.5
    shape = np.sinc(time_bandwidth * at) * np.cos(np.pi * at) ** 2
    pulse: NDArray[np.complex128] = shape.astype(np.complex128)
    return pulse


def read_rf_shape(path: str) -> NDArray[np.complex128]:
    """Samples `(M,)` of a pulse from a text file: an amplitude, and perhaps a phase in degrees, a line.

    Raises
    ------
    ValueError
        If the file cannot be read or holds no pulse.
    """
    try:
        file = Path(path)
        if file.exists() and not (file.is_file() and file.stat().st_size <= _LARGEST_BYTES):
            raise ValueError(f"it is no file of at most {_LARGEST_BYTES} bytes")
        text = file.read_text(encoding="utf-8-sig").replace(",", " ").replace(";", " ")
        lines = [line for line in text.splitlines() if line.split("#")[0].strip()]
        values = np.loadtxt(lines, ndmin=2) if lines else np.empty((0, 1))
    except (OSError, ValueError) as error:
        raise ValueError(f"the RF shape {path} cannot be read: {error}") from error
    rows, columns = values.shape
    if columns not in (1, 2) or not 2 <= rows <= _MOST_SAMPLES:
        raise ValueError(
            f"the RF shape {path} has {rows} lines of {columns} numbers: "
            f"expected 2 to {_MOST_SAMPLES} lines with an amplitude and perhaps a phase in degrees"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"the RF shape {path} has values that are no numbers")
    phase = np.deg2rad(values[:, 1]) if columns == 2 else 0.0
    largest = np.abs(values[:, 0]).max() or 1.0
    shape = (values[:, 0] / largest * np.exp(1j * phase)).astype(np.complex128)
    if abs(shape.sum()) <= 1e-6 * np.abs(shape).sum():
        raise ValueError(f"the RF shape {path} has no area: it would excite nothing at its own frequency")
    return shape


def flip_profile(
    shape: NDArray[np.complex128], time_bandwidth: float, flip_deg: ArrayLike, n_places: int = N_PLACES
) -> NDArray[np.float64]:
    """Flip angle over nominal flip angle across the slice, by the Bloch equations.

    The pulse is a train of hard pulses with the slice gradient between them, without relaxation. The rewinder
    takes out what the gradient did after the middle (of the power) of the pulse. Of the phase that is left
    only the sign is kept: side lobes of the other sign have negative factors. For a symmetric pulse of small
    angle nothing else is left.

    Parameters
    ----------
    shape
        `(M,)`, equidistant samples of the pulse in any unit; its area makes the nominal flip angle.
    time_bandwidth
        Duration times bandwidth; the bandwidth spans one slice thickness.
    flip_deg
        `(T,)` nominal flip angles in degrees, up to 180.
    n_places
        From the centre of the slice to half a thickness and two side lobes from it, in the middle of equal
        steps; for a pulse with a varying phase as many again on the other side.

    Returns
    -------
    NDArray
        `(P, T)`, dimensionless.

    Raises
    ------
    ValueError
        If a flip angle is above 180° or the time-bandwidth product is not positive.

    References
    ----------
    Pauly et al., IEEE Trans Med Imaging 10:53 (1991), doi:10.1109/42.75611 (hard pulses as rotations of
    spinors).
    """
    if not 0 < time_bandwidth < np.inf:
        raise ValueError(f"the time-bandwidth product is {time_bandwidth:g}: expected a positive number")
    flips, which = np.unique(np.abs(np.asarray(flip_deg, dtype=np.float64)), return_inverse=True)
    if flips.max() > 180:
        raise ValueError(
            f"a flip angle of the train is {flips.max():g}°: a slice profile can be computed up to 180°"
        )
    table = flips if len(flips) <= _FLIPS else np.linspace(flips[0], flips[-1], _FLIPS)
    # Without flip there is nothing to multiply: the limit of small angles serves as well.
    nominal = np.deg2rad(np.maximum(table, 0.1))
    relative = shape / shape.sum()
    places = (np.arange(n_places) + 0.5) / n_places * (0.5 + 2 / time_bandwidth)  # in slice thicknesses
    places = np.concatenate([-places[::-1], places])
    turn = np.exp(-1j * np.pi * places * time_bandwidth / len(shape))[:, None]  # half the angle of a step
    # Spinor (a, b) of the rotation so far, (P, T).
    a = np.ones((len(places), len(nominal)), dtype=np.complex128)
    b = np.zeros_like(a)
    for sample in relative:
        half = 0.5 * np.abs(sample) * nominal
        c, s = np.cos(half), 1j * np.exp(1j * np.angle(sample)) * np.sin(half)
        a, b = (c * a - s.conjugate() * b) * turn, (s * a + c * b) / turn
    transverse = a.conj() * b
    # The rewinder takes out what the gradient did after the middle of the pulse.
    M, power = len(relative), np.abs(relative) ** 2
    after = (M - (power * np.arange(M)).sum() / power.sum()) / M
    aligned = transverse * np.exp(-2j * np.pi * time_bandwidth * after * places)[:, None]
    strongest = np.abs(aligned[:, 0]).argmax()
    along = (aligned * np.exp(-1j * np.angle(aligned[strongest]))).real
    reached = 2 * np.arctan2(np.abs(b), np.abs(a)) * np.where(along < 0, -1, 1)
    factors = reached / nominal
    if len(table) < len(flips):
        factors = np.stack([np.interp(flips, table, row) for row in factors])
    profile: NDArray[np.float64] = factors[:, which]
    real = np.abs(relative.imag).max() <= 1e-9 * np.abs(relative).max()
    return profile[n_places:] if real else profile  # one side is like the other
