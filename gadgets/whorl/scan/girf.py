"""What the gradient system makes of a nominal trajectory: delays, and its impulse response (GIRF).

The system is linear and does not change: the played gradient is the nominal one filtered by the response,
and so is their integral, the trajectory.

Letters: I interleaves, S samples, N frequencies.

References
----------
Vannesjo et al., Magn Reson Med 69:583 (2013), doi:10.1002/mrm.24263 (the response);
Vannesjo et al., Magn Reson Med 76:45 (2016), doi:10.1002/mrm.25841 (trajectories by it).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.interpolate import CubicSpline

from whorl.scan.array_file import read_arrays
from whorl.scan.failure import ScanError

#: A response at frequency 0 is 1; a measured one to a few per cent.
_DC = (0.9, 1.1)
#: Beyond its ends a trajectory goes on: with a gradient that rises from 0 before, and falls to it after.
_RAMP_S = 3e-4
#: Interleaves that are filtered at once.
_AT_ONCE = 128


@dataclass(frozen=True, slots=True, eq=False)
class Girf:
    """Impulse response of a gradient system.

    Parameters
    ----------
    response
        `(3, 4, N)` complex: gradient axis x, y, z that is played; field that it makes, constant (B0, per
        gradient in m) and along x, y, z. Frequencies from -1/(2 raster) on in steps of 1/(N raster), 0 at
        N // 2.
    raster_us
        Time step of the response.
    source
        The file.
    """

    response: NDArray[np.complex128]
    raster_us: float
    source: str


def read_girf(path: str, raster_us: float = 10.0) -> Girf:
    """Read the response of property ``girf``.

    `.npy`, or `.npz` or HDF5 with an array `girf` and perhaps a number `raster_us`. Shapes: `(N,)`, the
    same for all axes; `(2, N)` or `(3, N)`, by axis; `(3, 3, N)` and `(3, 4, N)`, what each axis makes along
    all, the latter with the constant field first.

    Raises
    ------
    ScanError
        If the file cannot be read, or holds no response.
    """
    found, there = read_arrays(path, "the gradient response", ["girf", "raster_us"])
    if "girf" not in found:
        names = ", ".join(there) or "nothing"
        raise ScanError(f"the gradient response {path} has {names}: expected an array girf")
    if "raster_us" in found:
        raster_us = float(found["raster_us"].reshape(-1)[0])
    return Girf(_response(found["girf"], path), _raster(raster_us, path), path)


def _raster(raster_us: float, path: str) -> float:
    if not 0.1 <= raster_us <= 1000:
        raise ScanError(f"the gradient response {path} has raster_us {raster_us:g}: expected 0.1 to 1000")
    return raster_us


def _response(loaded: NDArray[np.generic], path: str) -> NDArray[np.complex128]:
    shape = loaded.shape
    if loaded.dtype.kind not in "fc" or not (
        loaded.ndim in (1, 2, 3) and shape[-1] >= 16 and shape[:-1] in ((), (2,), (3,), (3, 3), (3, 4))
    ):
        raise ScanError(
            f"the gradient response {path} has shape {shape} of {loaded.dtype}: expected complex numbers "
            f"(N,), (2, N), (3, N), (3, 3, N) or (3, 4, N), with N frequencies last"
        )
    values = loaded.astype(np.complex128)
    if not np.isfinite(values).all():
        raise ScanError(f"the gradient response {path} has values that are not finite: expected numbers")
    N = shape[-1]
    response = np.zeros((3, 4, N), dtype=np.complex128)
    if values.ndim == 3:
        response[:, 4 - values.shape[1] :] = values
    else:
        axes = np.broadcast_to(values, (3, N)) if values.ndim == 1 else values
        for axis, one in enumerate(axes):
            response[axis, axis + 1] = one
        if len(axes) == 2:  # of a transversal system: z is played as it is
            response[2, 3] = 1
    at_rest = np.abs([response[axis, axis + 1, N // 2] for axis in range(3)])
    if not ((at_rest > _DC[0]) & (at_rest < _DC[1])).all():
        listed = ", ".join(f"{value:.3g}" for value in at_rest)
        raise ScanError(
            f"the gradient response {path} is {listed} at frequency 0 (entry {N // 2} of {N}): "
            f"expected 1, with frequencies from -1/(2 raster) on"
        )
    return response


def corrected(
    trajectory: NDArray[np.floating],
    dwell_us: float,
    girf: Girf | None = None,
    delay_us: tuple[float, float] = (0.0, 0.0),
    directions: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """The trajectory that is played where a nominal one is asked for.

    Parameters
    ----------
    trajectory
        `(I, S, 2)` nominal kx, ky in 1/m.
    dwell_us
        Time between two samples.
    girf
        Response of the gradients; ``None``: as asked for.
    delay_us
        Time by which the gradients along kx and ky lag the samples: ``k(t - delay)``.
    directions
        `(3, 3)`, rows read_dir, phase_dir and slice_dir in the axes of the gradients. MRD gives them in the
        patient's (left, posterior, superior): of a patient who lies head first and supine these are the axes
        of the gradients but for their signs, which matter for cross terms and B0 alone. ``None``: x, y, z.

    Returns
    -------
    tuple
        Trajectory `(I, S, 2)` in 1/m, and ``2π ∫ B0`` `(I, S)` in radians, ``None`` without a response: the
        constant field adds to ``G·r``, so that samples have the phase ``exp(-i (2π ∫ B0 + 2π k·r))``.

    Raises
    ------
    ScanError
        If the directions are not orthonormal.
    """
    nominal = np.asarray(trajectory, dtype=np.float64)
    axes = np.eye(3) if directions is None else np.asarray(directions, dtype=np.float64)
    if girf is not None and not np.allclose(axes @ axes.T, np.eye(3), atol=0.02):
        raise ScanError(
            f"the gradient response {girf.source} needs the directions of the slice: expected orthonormal "
            f"read_dir, phase_dir, slice_dir, got {np.round(axes, 3).tolist()}"
        )
    dwell_s = dwell_us * 1e-6
    if any(delay_us):
        nominal = _delayed(nominal, dwell_s, delay_us)
    if girf is None:
        return nominal, None
    played, cycles = np.empty_like(nominal), np.empty(nominal.shape[:2])
    kernel: NDArray[np.complex128] | None = None
    tail = np.zeros((2, 3))
    for start in range(0, len(nominal), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        longer, n_before = _extended(nominal[some], dwell_s)
        if kernel is None:
            kernel, tail = _transfer(girf, axes, longer.shape[1], dwell_s)
        steps = np.diff(longer, axis=1, prepend=0.0)  # the gradient, up to a factor; it begins and ends at 0
        n_fft = 2 * (kernel.shape[-1] - 1)
        spectrum = rfft(steps, n_fft, axis=1, workers=-1)  # (I, F, 2)
        made = irfft(np.einsum("ifa,abf->ifb", spectrum, kernel), n_fft, axis=1, workers=-1)
        # Before the first sample of the longer one lies what the response's finite band spreads ahead.
        ahead = made[:, n_fft - longer.shape[1] :].sum(1, keepdims=True)
        ahead += longer[:, -1:] @ tail
        k = np.cumsum(made[:, : longer.shape[1]], axis=1) + ahead
        inside = k[:, n_before : n_before + nominal.shape[1]]
        played[some], cycles[some] = inside[..., :2], inside[..., 2]
    return played, 2 * np.pi * cycles


def _extended(trajectory: NDArray[np.float64], dwell_s: float) -> tuple[NDArray[np.float64], int]:
    """The trajectory with what may have come before and after it, and how many samples come before.

    Before: from 0, with a gradient that rises linearly to the first one. After: with one that falls to 0.
    """
    S = trajectory.shape[1]
    n = max(2, round(_RAMP_S / dwell_s))
    first, last = trajectory[:, 1] - trajectory[:, 0], trajectory[:, -1] - trajectory[:, -2]
    begin = np.linalg.norm(trajectory[:, 0], axis=-1)
    speed = np.linalg.norm(first, axis=-1)
    # k0 (1 + t / r)² has at t = 0 the value k0 and the slope 2 k0 / r.
    ramp = np.clip(2 * begin / np.maximum(speed, 1e-12), 1.0, n)  # samples
    before = np.arange(-n, 0)
    rise = np.clip(1 + before / ramp[:, None], 0, None) ** 2
    after = np.arange(1, n + 1)
    fall = after - after**2 / (2 * n)
    return np.concatenate(
        [
            trajectory[:, :1] * rise[..., None],
            trajectory,
            trajectory[:, -1:] + last[:, None] * fall[:, None],
        ],
        axis=1,
    ), (n if S else 0)


def _delayed(
    trajectory: NDArray[np.float64], dwell_s: float, delay_us: tuple[float, float]
) -> NDArray[np.float64]:
    longer, n_before = _extended(trajectory, dwell_s)
    spline = CubicSpline(np.arange(longer.shape[1]), longer, axis=1)
    S = trajectory.shape[1]
    result = np.empty_like(trajectory)
    for axis, delay in enumerate(delay_us):
        places = n_before + np.arange(S) - delay * 1e-6 / dwell_s
        result[..., axis] = spline(np.clip(places, 0, longer.shape[1] - 1))[..., axis]
    return result


def _transfer(
    girf: Girf, axes: NDArray[np.float64], n_samples: int, dwell_s: float
) -> tuple[NDArray[np.complex128], NDArray[np.float64]]:
    """Response between the axes of the slice at the frequencies of a padded FFT, `(2, 3, F)`, and its tail.

    In: kx, ky. Out: kx, ky, constant field. What reaches a sample is at most a readout away, so that the
    response is cut there and the transform stays short. Beyond its band nothing is played. The tail `(2, 3)`
    is the sum of the response further ahead, which the finite band leaves: it is over when a readout begins.
    """
    N, raster_s = girf.response.shape[-1], girf.raster_us * 1e-6
    logical = np.empty((2, 3, N), dtype=np.complex128)
    logical[:, :2] = np.einsum("ai,ion,bo->abn", axes[:2], girf.response[:, 1:], axes[:2])
    logical[:, 2] = np.einsum("ai,in->an", axes[:2], girf.response[:, 0])
    impulse = np.fft.ifft(np.fft.ifftshift(logical, axes=-1), axis=-1)
    reach = min(N // 2 - 1, int(np.ceil(n_samples * dwell_s / raster_s)))
    lags = np.arange(-reach, reach + 1)
    n_fft = next_fast_len(3 * n_samples + 2 * int(raster_s / dwell_s) + 2, real=True)
    n_fft += n_fft % 2
    frequency = np.fft.rfftfreq(n_fft, dwell_s)
    band = frequency <= 0.5 / raster_s
    transfer = np.zeros((2, 3, len(frequency)), dtype=np.complex128)
    waves = np.exp(-2j * np.pi * raster_s * np.outer(lags, frequency[band]))
    transfer[..., band] = impulse[..., lags] @ waves
    tail: NDArray[np.float64] = impulse[..., N // 2 : N - reach].real.sum(-1)
    return transfer, tail
