"""Gradients that go through a gradient system with a measured impulse response.

Letters: I interleaves, R raster points, S samples, N frequencies.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.signal import fftconvolve

from whorl.simulation.spiral import GAMMA_HZ_PER_T, Spiral

# After the readout the gradient falls to 0 in this time.
_RAMP_S = 4e-4
_RASTER_US = 10.0


def play(spiral: Spiral, girf: ArrayLike) -> tuple[NDArray[np.complex128], NDArray[np.float64]]:
    """Trajectory that is played, and phase by the constant field, for all interleaves of a spiral.

    The response is convolved with the gradient on its raster in time, over its whole length of 200 ms in both
    directions; between raster points the played gradient is linear.

    Parameters
    ----------
    spiral
        With gradients on a raster of 10 µs; x and y are axes of the gradient system.
    girf
        `(3, 4, N)` complex: axis that is played (x, y, z); field that it makes, constant (per gradient, in m)
        and along x, y, z. Frequencies from -50 kHz on, N of them up to 50 kHz.

    Returns
    -------
    tuple
        `(I, S)` kx + i ky in cycles/m, and ``2π ∫ B0`` `(I, S)` in radians.
    """
    if spiral.raster_us != _RASTER_US:
        raise ValueError(f"the raster of the gradient is {spiral.raster_us:g} µs: expected {_RASTER_US:g}")
    response = np.asarray(girf)
    N = response.shape[-1]
    # Order in time: from -N/2 to N/2 - 1 raster points.
    impulse = np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(response, axes=-1), axis=-1), axes=-1).real
    raster_s = _RASTER_US * 1e-6
    n_ramp = round(_RAMP_S / raster_s)
    first = spiral.gradient_t_per_m
    first = np.concatenate([first, first[-1] * np.linspace(1, 0, n_ramp + 1)[1:]])  # (R,)
    n_interleaves, n_samples = spiral.k_per_m.shape
    turns = np.exp(2j * np.pi * np.arange(n_interleaves) / n_interleaves)
    gradient = turns[:, None] * first  # (I, R)
    axes = (gradient.real, gradient.imag)

    def made(field: int) -> NDArray[np.float64]:
        """Field along an axis, or the constant one, from a while before the readout on, `(I, R')`."""
        total = np.zeros((n_interleaves, len(first) + N - 1))
        for axis, played in enumerate(axes):
            total += fftconvolve(played, impulse[axis, field][None], axes=1)
        return total

    times = np.arange(n_samples) * spiral.dwell_us * 1e-6

    def integral(field: int) -> NDArray[np.float64]:
        rate = GAMMA_HZ_PER_T * made(field)
        total = raster_s * np.concatenate(
            [np.zeros((n_interleaves, 1)), np.cumsum((rate[:, 1:] + rate[:, :-1]) / 2, axis=1)], axis=1
        )
        place = times / raster_s + N // 2
        index = place.astype(int)
        part = place - index
        rise = rate[:, index] * part + (rate[:, index + 1] - rate[:, index]) * part**2 / 2
        return np.asarray(total[:, index] + raster_s * rise)

    return integral(1) + 1j * integral(2), 2 * np.pi * integral(0)
