"""Noiseless readouts of all slices, with what disturbs them: fields, chemical shift, motion, gradients.

Letters: Z slices, T timepoints, N images, C coils, I interleaves, S samples, V U samples of the fine grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import finufft
import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

from whorl.simulation.encoding import Encoding
from whorl.simulation.parameters import Parameters
from whorl.simulation.phantoms import FINE, coil_maps, fine_positions, slice_heights_mm
from whorl.simulation.scene import Scene

# Largest error of the interpolation of off-resonance in time, relative to the signal.
_SEGMENT_ERROR = 1e-4
_NUFFT_EPS = 1e-8
_SMALL = 100_000

_Segments = list[tuple[NDArray[np.complex128], NDArray[np.float64]]]


def measure(
    scene: Scene, encoding: Encoding, p: Parameters, say: Callable[[str], None]
) -> NDArray[np.complex64]:
    """Readouts `(Z, T, C, S)` without noise."""
    T = p.timepoints
    segments: _Segments = [(np.ones((1, 1), dtype=np.complex128), np.ones((T, 1)))]
    if p.b0_hz:
        segments = segments_of_time(scene.b0_hz, encoding.elapsed_ms)
        say(f"off-resonance of up to {p.b0_hz:g} Hz: {len(segments)} segments of time")
    halves = [(slice(None), 0.0)]
    if p.motion_pixels:
        halves = [(slice(0, T // 2), 0.0), (slice(T // 2, None), p.motion_pixels)]
    kspace = np.zeros((p.slices, T, p.coils, encoding.nominal.shape[1]), dtype=np.complex64)
    for z, height in enumerate(slice_heights_mm(p.slices)):
        say(f"slice {z + 1} of {p.slices}: k-space of {p.coils} coils")
        for half, way in halves:
            maps = coil_maps(p.coils, matrix=p.matrix, fov_mm=p.fov_mm, height_mm=height, moved_pixels=way)
            _add_readouts(kspace[z, half], scene, z, scene.phase * maps, segments, encoding, half, way)
    if encoding.turn is not None:
        for part in kspace:
            part *= encoding.turn[:, None]
    return kspace


def _add_readouts(
    kspace: NDArray[np.complex64],
    scene: Scene,
    z: int,
    maps: NDArray[np.complex128],
    segments: _Segments,
    encoding: Encoding,
    half: slice,
    way: float,
) -> None:
    """Add a slice to the readouts `(T', C, S)` of the timepoints in `half`, during which the object stays.

    Parameters
    ----------
    maps
        `(C, V, U)` of the coils, times the phase of the object.
    segments
        See `segments_of_time`, of all timepoints.
    way
        Where the object is along x, in pixels.
    """
    arms, elapsed_ms = encoding.arms[half], encoding.elapsed_ms[half]
    moved = np.exp(-2j * np.pi * way * encoding.played[arms, :, 0]) if way else np.ones((len(arms), 1))
    for hz, tissues in scene.species().items():
        turned = moved * (np.exp(2e-3j * np.pi * hz * elapsed_ms) if hz else 1)
        for images, signals in scene.of_slice(z, tissues):
            for carrier, course in segments:
                readouts = _acquire(images, carrier * maps, signals[:, half], encoding.played, arms)
                factor = turned * course[half]  # (T', S), or (T', 1) where it is 1 throughout
                kspace += readouts * factor[:, None].astype(np.complex64)


def segments_of_time(b0: NDArray[np.float64], elapsed_ms: NDArray[np.float64]) -> _Segments:
    """Off-resonance as a short sum, ``exp(i 2π b0 τ) = Σ_l carrier_l(b0) course_l(τ)``.

    The carriers `(V, U)` are the phase at Chebyshev nodes of the time, the courses `(T, S)` the
    polynomials that interpolate between them: as many as the error of 1e-4 needs.

    References
    ----------
    Noll et al., IEEE Trans Med Imaging 10:629 (1991), doi:10.1109/42.108599: segments of time, here with
    polynomials as their interpolators.
    """
    start, stop = elapsed_ms.min(), elapsed_ms.max()

    def interpolators(n: int, times: NDArray[np.float64]) -> NDArray[np.float64]:
        analysis = 2 / n * chebyshev.chebvander(chebyshev.chebpts1(n), n - 1).T
        analysis[0] /= 2
        place = (2 * times - start - stop) / max(stop - start, 1e-9)
        return np.asarray(chebyshev.chebvander(place, n - 1) @ analysis)

    times = np.linspace(start, stop, 200)
    rates = 2e-3j * np.pi * np.linspace(b0.min(), b0.max(), 50)[:, None]  # of a phase in rad/ms
    for n in itertools.count(1):
        nodes = (start + stop + (stop - start) * chebyshev.chebpts1(n)) / 2
        error = np.exp(rates * nodes) @ interpolators(n, times).T - np.exp(rates * times)
        if np.abs(error).max() < _SEGMENT_ERROR:
            break
    courses = interpolators(n, elapsed_ms)  # (T, S, L)
    return [(np.exp(2e-3j * np.pi * node * b0), courses[..., i]) for i, node in enumerate(nodes)]


def _acquire(
    images: NDArray[np.float32] | NDArray[np.complex128],
    maps: NDArray[np.complex128],
    signals: NDArray[np.complex128],
    trajectory: NDArray[np.float64],
    arms: NDArray[np.int64],
) -> NDArray[np.complex64]:
    """Noiseless readouts `(T, C, S)` of images `(N, V, U)` whose signals are `(N, T)`."""
    n_samples = trajectory.shape[1]
    n_coils, n_images = len(maps), len(images)
    used = np.unique(arms)
    points = trajectory[used].reshape(-1, 2)
    spectra = np.zeros((len(used), n_images, n_coils, n_samples), dtype=np.complex128)
    for m, image in enumerate(images):
        if image.any():
            part = _spectrum(image, maps, points).reshape(n_coils, len(used), n_samples)
            spectra[:, m] = part.swapaxes(0, 1)
    kspace = np.empty((len(arms), n_coils, n_samples), dtype=np.complex64)
    for i, arm in enumerate(used):
        t = np.flatnonzero(arms == arm)
        kspace[t] = (signals[:, t].T @ spectra[i].reshape(n_images, -1)).reshape(len(t), n_coils, n_samples)
    return kspace


def _spectrum(
    image: NDArray[np.float32] | NDArray[np.complex128],
    maps: NDArray[np.complex128],
    points: NDArray[np.float64],
) -> NDArray[np.complex128]:
    """k-space `(C, P)` of one image `(V, U)` seen by the coils `(C, V, U)` at `points` `(P, 2)`.

    ``y(k) = Σ ρ(r) exp(-i 2π k·r) / FINE²``, r in pixels: each fine sample is a point source with the
    share of a pixel that it covers.
    """
    at_y, at_x = fine_positions(image.shape[0] // FINE), fine_positions(image.shape[1] // FINE)
    v, u = np.nonzero(image)
    # Only the box around the object is transformed: a sphere is a thousandth of the field of view.
    rows, columns = slice(v.min(), v.max() + 1), slice(u.min(), u.max() + 1)
    sources = image[rows, columns] * maps[:, rows, columns]
    n_v, n_u = sources.shape[1:]
    values = finufft.nufft2d2(
        2 * np.pi / FINE * points[:, 1],
        2 * np.pi / FINE * points[:, 0],
        np.ascontiguousarray(sources),
        eps=_NUFFT_EPS,
        # A small transform on several threads waits for them longer than it takes; 0: all cores.
        nthreads=1 if sources.size < _SMALL else 0,
        isign=-1,
    )
    # FINUFFT counts from the middle of the box; this is where that sample lies.
    ramp = np.exp(-2j * np.pi * (points @ np.array([at_x[columns][n_u // 2], at_y[rows][n_v // 2]])))
    result: NDArray[np.complex128] = values.reshape(len(maps), -1) * (ramp / FINE**2)
    return result
