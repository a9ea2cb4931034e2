"""A variable-density spiral that a gradient system could play, designed along its own path.

The path is an Archimedean spiral whose turns are twice as close in the inner part of k-space. It is
run through in the shortest time that amplitude and slew rate allow; the radius of the inner part is
chosen so that the edge of k-space is reached exactly when the readout ends.

Letters: I interleaves, S samples, R raster points of the gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import cumulative_trapezoid
from scipy.optimize import brentq

GAMMA_HZ_PER_T = 42.577478518e6

# The path is designed a little inside the limits: the steps of the integration must not break them.
_RESERVE = 0.998
# Width of the transition between inner and outer part, in units of the largest radius.
_TRANSITION = 0.15
_N_PATH = 1500


@dataclass(frozen=True, slots=True)
class Spiral:
    """The readout of all interleaves.

    Parameters
    ----------
    k_per_m
        `(I, S)` complex, kx + i ky at the centre of each sample, cycles/m; interleaf i is interleaf 0
        turned by ``2π i / I``. Sample s is taken at ``s * dwell_us`` after the start of the gradient.
    gradient_t_per_m
        `(R,)` complex, Gx + i Gy of interleaf 0 on the gradient raster, T/m; linear between the points.
    raster_us, dwell_us
        Distance of gradient points and of samples, µs.
    inner_radius
        Radius in units of the largest one up to which the turns are twice as close.
    k_max_per_m
        Radius reached at the end of the readout, one dwell after the last sample.
    slew_t_per_m_s
        Slew rate that the design was given: the limit, or less where k-space is filled too soon.
    """

    k_per_m: NDArray[np.complex128]
    gradient_t_per_m: NDArray[np.complex128]
    raster_us: float
    dwell_us: float
    inner_radius: float
    k_max_per_m: float
    slew_t_per_m_s: float

    def delayed(self, delay_us: float) -> Spiral:
        """The same spiral with gradients that lag the samples: ``k(t - delay)``.

        Before its start the gradient is 0; after its last raster point it goes on along the same line, for
        a delay below 0. Both axes lag alike, so that interleaves stay rotations of each other.
        """
        if delay_us == 0:
            return self
        times = np.arange(self.k_per_m.shape[1]) * self.dwell_us - delay_us
        first = _integrate(self.gradient_t_per_m, self.raster_us * 1e-6, np.maximum(times, 0) * 1e-6)
        turns = np.exp(2j * np.pi * np.arange(len(self.k_per_m)) / len(self.k_per_m))
        return replace(self, k_per_m=turns[:, None] * first)


def cycles_per_pixel(k_per_m: NDArray[np.complex128], pixel_mm: float) -> NDArray[np.float64]:
    """kx + i ky `(I, S)` in cycles/m as `(I, S, 2)`, order (kx, ky), in cycles per pixel."""
    k = k_per_m * (pixel_mm * 1e-3)
    return np.stack([k.real, k.imag], axis=-1)


def design_spiral(
    *,
    matrix: int = 256,
    fov_mm: float = 300.0,
    interleaves: int = 96,
    readout_ms: float = 2.21,
    max_gradient_mt_per_m: float = 43.0,
    max_slew_t_per_m_s: float = 180.0,
    raster_us: float = 10.0,
    dwell_us: float = 2.5,
) -> Spiral:
    """Design the spiral and all its rotations.

    A turn of one interleaf is `interleaves / fov` wide outside, so that all interleaves together fill
    k-space there, and half as wide inside. If even a spiral that is dense throughout ends too soon,
    the slew rate is lowered until it fits.

    Parameters
    ----------
    matrix, fov_mm
        Define the edge of k-space, ``k_max = matrix / (2 fov)``.
    interleaves
        Number I of rotated copies that fill the outer part.
    readout_ms
        Length of the readout; it has ``readout / dwell`` samples.
    max_gradient_mt_per_m, max_slew_t_per_m_s
        Limits for the length of the vector. The defaults are those of a 3 T whole-body system.
    raster_us, dwell_us
        Distance of gradient points and of samples.

    Raises
    ------
    ValueError
        If a value is out of its range, or if k-space cannot be filled within the readout.

    References
    ----------
    Lee, Hargreaves, Hu, Nishimura, Magn Reson Med 50:1276 (2003), doi:10.1002/mrm.10644 (variable
    density); Lustig, Kim, Pauly, IEEE Trans Med Imaging 27:866 (2008), doi:10.1109/TMI.2008.922699
    (shortest time along a given path).
    """
    for name, value, low in (("matrix", matrix, 2), ("interleaves", interleaves, 1)):
        if value < low:
            raise ValueError(f"{name} is {value}: expected at least {low}")
    for name, size in (
        ("fov_mm", fov_mm),
        ("readout_ms", readout_ms),
        ("max_gradient_mt_per_m", max_gradient_mt_per_m),
        ("max_slew_t_per_m_s", max_slew_t_per_m_s),
        ("raster_us", raster_us),
        ("dwell_us", dwell_us),
    ):
        if not (size > 0 and math.isfinite(size)):
            raise ValueError(f"{name} is {size}: expected a positive number")
    n_samples = round(readout_ms * 1e3 / dwell_us)
    if n_samples < 2 or readout_ms * 1e3 < 2 * raster_us:
        raise ValueError(
            f"readout_ms is {readout_ms:g}: expected at least two samples of {dwell_us:g} µs "
            f"and two gradient points of {raster_us:g} µs"
        )

    fov_m, readout_s, raster_s = fov_mm * 1e-3, readout_ms * 1e-3, raster_us * 1e-6
    k_max = matrix / (2 * fov_m)
    v_max = _RESERVE * GAMMA_HZ_PER_T * max_gradient_mt_per_m * 1e-3
    a_max = _RESERVE * GAMMA_HZ_PER_T * max_slew_t_per_m_s
    n_points = math.ceil(readout_s / raster_s - 1e-9) + 1
    times = np.arange(n_points, dtype=np.float64) * raster_s

    def play(inner: float, slew_share: float) -> tuple[NDArray[np.complex128], float]:
        """Gradient of one design, and the radius that it reaches at the end of the readout."""
        speed = _fastest(inner * k_max, k_max, fov_m, interleaves, v_max, slew_share * a_max, times)
        gradient = speed / GAMMA_HZ_PER_T
        return gradient, float(abs(_integrate(gradient, raster_s, np.array([readout_s]))[0]))

    # A transition that has ended at the centre leaves no inner part; one that starts at the edge leaves
    # no outer one. The farther out it lies, the longer the path: one root of the radius reached.
    sparse, dense = -_TRANSITION, 1.0
    if (reach := play(sparse, 1.0)[1]) < k_max:
        raise ValueError(
            f"{interleaves} interleaves of {readout_ms:g} ms reach {reach:.0f} cycles/m with "
            f"{max_gradient_mt_per_m:g} mT/m and {max_slew_t_per_m_s:g} T/m/s, but matrix {matrix} with "
            f"fov_mm {fov_mm:g} needs {k_max:.0f}: take more interleaves or a longer readout"
        )
    inner, share = dense, 1.0
    if play(dense, 1.0)[1] <= k_max:
        inner = brentq(lambda x: play(x, 1.0)[1] - k_max, sparse, dense, xtol=1e-12)
    else:
        share = brentq(lambda x: play(dense, x)[1] - k_max, 1e-9, 1.0, xtol=1e-12)
    gradient, _ = play(inner, share)

    first = _integrate(gradient, raster_s, np.arange(n_samples, dtype=np.float64) * (dwell_us * 1e-6))
    turns = np.exp(2j * np.pi * np.arange(interleaves) / interleaves)
    return Spiral(
        k_per_m=turns[:, None] * first,
        gradient_t_per_m=gradient,
        raster_us=raster_us,
        dwell_us=dwell_us,
        inner_radius=max(inner, 0.0),
        k_max_per_m=k_max,
        slew_t_per_m_s=share * max_slew_t_per_m_s,
    )


def _fastest(
    inner: float,
    k_max: float,
    fov_m: float,
    interleaves: int,
    v_max: float,
    a_max: float,
    times: NDArray[np.float64],
) -> NDArray[np.complex128]:
    """Velocity dk/dt at the given times, `(R,)`, of the fastest run along the path.

    Path: ``k = r exp(iθ(r))`` with ``dθ/dr = 2π fov / n(r)``, where n(r) interleaves fill k-space at r.
    With arc length s, curvature κ and u = (ds/dt)², the acceleration across the path is κu, the one
    along it is u'/2: the run is the largest u with ``(κu)² + (u'/2)² ≤ a_max²`` and ``u ≤ v_max²``.
    """
    # The path goes on beyond the edge, so that a run that is too fast is seen to be so.
    r = np.linspace(0.0, 1.3 * k_max, _N_PATH)
    step = np.clip((r - inner) / (_TRANSITION * k_max), 0.0, 1.0)
    # Quintic: the curvature of the path, which has n' in it, then has no kinks.
    filled = interleaves / 2 * (1 + step**3 * (10 - 15 * step + 6 * step**2))
    slope = interleaves / 2 * 30 * (step * (1 - step)) ** 2 / (_TRANSITION * k_max)
    theta1 = 2 * np.pi * fov_m / filled
    theta2 = -theta1 * slope / filled
    theta = cumulative_trapezoid(theta1, r, initial=0.0)

    ds_dr = np.sqrt(1 + (r * theta1) ** 2)
    curvature = np.abs(2 * theta1 + r * theta2 + r**2 * theta1**3) / ds_dr**3
    s = cumulative_trapezoid(ds_dr, r, initial=0.0)
    limit = np.minimum(v_max**2, a_max / np.maximum(curvature, 1e-30))

    ds, caps, bends = np.diff(s).tolist(), limit.tolist(), curvature.tolist()
    u = [0.0] * _N_PATH
    for i, length in enumerate(ds):
        u[i + 1] = min(
            caps[i + 1], u[i] + 2 * length * math.sqrt(max(a_max**2 - (bends[i] * u[i]) ** 2, 0.0))
        )
    # Backwards: slow down in time where the path will bend more strongly.
    for i in range(_N_PATH - 2, -1, -1):
        gain = 2 * ds[i] * math.sqrt(max(a_max**2 - (bends[i + 1] * u[i + 1]) ** 2, 0.0))
        u[i] = min(u[i], u[i + 1] + gain)

    speed = np.sqrt(u)
    # Over one step u is taken as linear in s: its time is the length over the mean speed.
    at = np.concatenate([[0.0], np.cumsum(np.diff(s) / ((speed[1:] + speed[:-1]) / 2))])
    # Speed is linear in time over a step, hence s is quadratic: found from the speed, not interpolated.
    index = np.clip(np.searchsorted(at, times, side="right") - 1, 0, _N_PATH - 2)
    part = (times - at[index]) / np.diff(at)[index]
    v = speed[index] + part * np.diff(speed)[index]
    s_t = s[index] + (times - at[index]) * (speed[index] + v) / 2
    r_t = np.interp(s_t, s, r)
    theta_t = np.interp(r_t, r, theta)
    theta1_t = np.interp(r_t, r, theta1)
    direction = (1 + 1j * r_t * theta1_t) * np.exp(1j * theta_t)
    velocity: NDArray[np.complex128] = v * direction / np.abs(direction)
    return velocity


def _integrate(
    gradient: NDArray[np.complex128], raster_s: float, times: NDArray[np.float64]
) -> NDArray[np.complex128]:
    """k at the given times, cycles/m: the exact integral of a gradient that is linear between its points."""
    k = GAMMA_HZ_PER_T * raster_s * np.concatenate([[0.0], np.cumsum((gradient[1:] + gradient[:-1]) / 2)])
    index = np.clip((times / raster_s + 1e-9).astype(int), 0, len(gradient) - 2)
    part = times / raster_s - index
    rise = gradient[index] * part + (gradient[index + 1] - gradient[index]) * part**2 / 2
    result: NDArray[np.complex128] = k[index] + GAMMA_HZ_PER_T * raster_s * rise
    return result
