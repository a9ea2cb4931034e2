"""The 14 spheres of a plate of the NIST/ISMRM system phantom: where they lie in an image, and what they are.

Plate 5, the "T1 plate", has nickel chloride in its spheres, plate 4, the "T2 plate", manganese chloride.
On both, spheres 1 to 10 lie on a ring and 11 to 14 in a square within it, and T1 and T2 fall from 1 to 14.

The constellation is found by its geometry alone. That leaves four ways to number it, since half a turn and
the two mirrors throw it onto itself; where the inner spheres cannot be seen there are twenty. The values
in the spheres decide.

Letters: Y X pixels, V U samples of a grid with equal steps, P spheres (14).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import interpolate, ndimage, signal, stats

Plate = Literal["t1", "t2"]
Quantity = Literal["T1", "T2"]

N_SPHERES = 14
SPHERE_RADIUS_MM = 7.5

# Place of the spheres on the plate, x and z in mm, the same on both plates. Stupic et al., Magn Reson Med
# 86:1194 (2021), doi:10.1002/mrm.28779.
_PLACES_MM = np.array(
    [
        (0.0, 50.0),
        (29.4, 40.5),
        (47.6, 15.5),
        (47.6, -15.5),
        (29.4, -40.5),
        (0.0, -50.0),
        (-29.4, -40.5),
        (-47.6, -15.5),
        (-47.6, 15.5),
        (-29.4, 40.5),
        (-20.0, 20.0),
        (20.0, 20.0),
        (20.0, -20.0),
        (-20.0, -20.0),
    ]
)
_N_RING = 10

# T1 and T2 in ms of version 1 at 20 °C, a row for each sphere: T1 and T2 at 3 T, then at 1.5 T; same source.
_VERSION_1: dict[Plate, NDArray[np.float64]] = {
    "t1": np.array(
        [
            (1989.0, 1465.0, 2033.0, 1669.0),
            (1454.0, 1077.0, 1489.0, 1244.0),
            (984.1, 717.9, 1012.0, 859.3),
            (706.0, 510.1, 730.8, 628.5),
            (496.7, 359.6, 514.1, 446.3),
            (351.5, 255.5, 367.9, 321.2),
            (247.13, 180.8, 260.1, 227.7),
            (175.3, 127.3, 184.6, 161.9),
            (125.9, 90.3, 132.7, 117.1),
            (89.0, 64.3, 92.7, 81.9),
            (62.7, 45.7, 65.4, 57.7),
            (44.53, 31.86, 46.32, 41.0),
            (30.84, 22.38, 32.45, 28.7),
            (21.719, 15.83, 22.859, 20.2),
        ]
    ),
    "t2": np.array(
        [
            (2480.0, 581.3, 2376.0, 939.4),
            (2173.0, 403.5, 2183.0, 594.3),
            (1907.0, 278.1, 1870.0, 416.5),
            (1604.0, 190.94, 1539.0, 267.0),
            (1332.0, 133.27, 1237.0, 184.9),
            (1044.0, 96.89, 1030.0, 140.6),
            (801.7, 64.07, 752.2, 91.76),
            (608.6, 46.42, 550.2, 64.84),
            (458.4, 31.97, 413.4, 45.28),
            (336.5, 22.56, 292.2, 30.62),
            (244.2, 15.813, 194.9, 19.76),
            (176.6, 11.237, 160.2, 15.99),
            (126.9, 7.911, 106.4, 10.47),
            (90.9, 5.592, 83.33, 8.15),
        ]
    ),
}
# Where the columns of a field in tesla begin.
_COLUMN = {3.0: 0, 1.5: 2}

# T1 in ms of the T1 plate of version 2 at 3 T, a row for each sphere, over the temperature in °C.
_VERSION_2_C = (16.0, 18.0, 20.0, 22.0, 24.0, 26.0)
_VERSION_2_T1 = np.array(
    [
        (1766.68, 1830.34, 1883.97, 1937.34, 1987.50, 2066.95),
        (1274.07, 1317.71, 1330.16, 1355.29, 1367.79, 1395.94),
        (950.71, 963.56, 987.27, 1000.81, 1015.70, 1030.78),
        (675.07, 686.88, 690.08, 695.01, 701.06, 709.48),
        (483.91, 482.91, 484.97, 486.92, 490.24, 494.55),
        (343.00, 341.53, 341.58, 342.58, 344.23, 346.67),
        (243.77, 241.84, 240.86, 240.75, 241.31, 242.45),
        (177.68, 175.94, 174.95, 174.59, 174.78, 175.48),
        (122.99, 121.79, 121.08, 120.80, 120.90, 121.34),
        (87.47, 86.41, 85.75, 85.03, 85.01, 85.28),
        (61.49, 60.70, 60.21, 59.97, 60.00, 60.17),
        (43.79, 43.24, 42.89, 42.72, 42.70, 42.80),
        (31.05, 30.65, 30.40, 30.27, 30.25, 30.31),
        (21.94, 21.62, 21.44, 21.28, 21.26, 21.31),
    ]
)

# Grid of the search, and of its first, coarse round.
_STEP_MM = 1.25
_COARSE = 2
# Borders of the rings in which a sphere is looked at. The last one lies beyond the wall, which is dark in
# most images, and short of the next sphere: 22.4 mm from centre to centre.
_RINGS_MM = (0.0, 3.0, 5.0, 7.0, 9.0, 12.0)
_BLUR_MM = 1.0
# A contrast of this share of the image's range is as good as none.
_FAINTEST = 0.005
# Turns and sizes of the first round: between two of them a sphere of the ring is less than 1.5 mm off.
_TURNS_DEG = np.arange(0.0, 180.0, 3.0)
_SCALES = (0.94, 0.98, 1.02, 1.06)
# Maps are looked at in logarithms above about this value, in ms.
_LOG_MS = 10.0
# How far a sphere is looked for from where the constellation wants it, round by round.
_REACH_MM = (5.0, 4.0, 3.5, 3.5)
# A sphere is seen if so much of the variance around its centre is that of a thing which is round.
_SEEN = 0.5
_FEWEST_SEEN = 9
_PRECISION_MM = 0.7
_MOST_RESIDUAL_MM = 1.2
_MOST_SCALE = 0.1
# No scanner images more: what is larger has another unit, and would take much memory.
_LARGEST_MM = 1000.0
# The value of a sphere is the median within this radius.
_CORE_MM = 4.5
# Disorder up to which a numbering is believed, and how much less it must be than that of the next best.
# Maps: (1 + Spearman's correlation with the numbers) / 2. Images: the share of the variance between the
# spheres that does not rise and fall once; noise of 5 % of the range makes 0.005 of it, real images have
# less than 0.001. Of 356 contrasts of spin echo and of signed and magnitude inversion recovery, with noise of
# 0, 2 and 5 %, none was numbered wrongly.
_MOST_DISORDER, _CLEARER = 0.1, 0.4
_MOST_DISORDER_IMAGE, _CLEARER_IMAGE = 0.03, 0.3
# A disorder that is none, so that ratios of two of them mean something.
_EXACT = 1e-3
# Values that are off by more than exp(0.4), a factor of 1.5, in the mean are those of neither plate.
_FOREIGN = 0.4


class Reference(NamedTuple):
    """Names of the spheres 1 to 14, and their T1 and T2 in ms, each `(14,)`; NaN where no value is known."""

    names: tuple[str, ...]
    t1_ms: NDArray[np.float64]
    t2_ms: NDArray[np.float64]


def reference(
    plate: Plate, *, version: int = 1, temperature_c: float = 20.0, field_t: float = 3.0
) -> Reference:
    """What the spheres of a plate should have.

    Parameters
    ----------
    plate
        `t1` (nickel chloride) or `t2` (manganese chloride).
    version
        Of the phantom: 1 (serial numbers up to about 42), or 2 with other fillings.
    temperature_c
        Of the phantom, in °C. Version 1 was measured at 20 °C only; T1 of the T1 plate of version 2 from
        16 to 26 °C in steps of 2, between which it is interpolated (PCHIP: monotone between neighbours).
    field_t
        1.5 or 3; version 2 is known at 3 T only.

    Returns
    -------
    Reference
        T2 of version 2 is not known: NaN.

    Raises
    ------
    ValueError
        If the sources have no T1 for this plate, version, temperature and field: it is neither guessed
        nor taken from the nearest.

    References
    ----------
    Stupic et al., Magn Reson Med 86:1194 (2021), doi:10.1002/mrm.28779 (version 1).
    Boudreau et al., Magn Reson Med (2024), doi:10.1002/mrm.30111 (version 2, as in the program of that study,
    github.com/rrsg2020/analysis, src/nist.py).
    """
    _check_plate(plate)
    symbol = "Ni" if plate == "t1" else "Mn"
    names = tuple(f"{symbol}-{number}" for number in range(1, N_SPHERES + 1))
    if version == 1:
        if field_t not in _COLUMN:
            raise ValueError(f"version 1 of the phantom was measured at 1.5 T and 3 T, not at {field_t:g} T")
        if temperature_c != 20:
            raise ValueError(
                f"version 1 of the phantom was measured at 20 °C only, not at {temperature_c:g} °C: "
                "compare at 20 °C, and mention the difference"
            )
        t1_ms, t2_ms = _VERSION_1[plate][:, _COLUMN[field_t] :][:, :2].T.copy()
        return Reference(names, t1_ms, t2_ms)
    if version != 2:
        raise ValueError(f"the phantom's version is {version}: expected 1 or 2")
    if plate != "t1" or field_t != 3:
        raise ValueError(
            "of version 2 of the phantom only T1 of the T1 plate at 3 T is known, "
            f"not the {plate.upper()} plate at {field_t:g} T"
        )
    if not _VERSION_2_C[0] <= temperature_c <= _VERSION_2_C[-1]:
        raise ValueError(
            "version 2 of the phantom was measured from "
            f"{_VERSION_2_C[0]:g} to {_VERSION_2_C[-1]:g} °C, not at {temperature_c:g} °C"
        )
    t1 = interpolate.PchipInterpolator(_VERSION_2_C, _VERSION_2_T1, axis=1)(temperature_c)
    return Reference(names, np.asarray(t1, dtype=np.float64), np.full(N_SPHERES, np.nan))


@dataclass(frozen=True, slots=True, eq=False)
class Spheres:
    """The spheres of a plate in an image.

    Parameters
    ----------
    centres
        `(14, 2)`, row and column in pixels (pixel j has its middle at j), in order of the numbers 1 to 14.
    seen
        `(14,)` whether a sphere was seen itself; where it was not, its centre follows from the others.
    values
        `(14,)` median of the image in the middle of each sphere.
    radius_mm
        Of a sphere in the middle of its plate, at the size at which the constellation was found.
    scale
        That size over the nominal one.
    rotation_deg
        Clockwise as the image is looked at, in [0, 360); at 0 sphere 1 lies at the top.
    mirrored
        Whether the numbers 1 to 10 run counter-clockwise.
    residual_mm
        Root mean square distance of the seen spheres from the constellation that fits them best.
    plate
        `t1`, `t2`; None if it was neither given nor can be told.
    """

    centres: NDArray[np.float64]
    seen: NDArray[np.bool_]
    values: NDArray[np.float64]
    radius_mm: float
    scale: float
    rotation_deg: float
    mirrored: bool
    residual_mm: float
    plate: Plate | None


def _check_plate(plate: str) -> None:
    if plate not in ("t1", "t2"):
        raise ValueError(f'plate is "{plate}": expected "t1" (nickel) or "t2" (manganese)')


def roundness(image: NDArray[np.floating], step_mm: float) -> NDArray[np.float64]:
    """How much of the variance around each point is that of a thing which is round about it.

    The share of the variance within 12 mm that lies between rings, not along them: 1 in the middle of a disc
    or a ring, whether bright or dark and however strong, and 0 at a straight edge and in noise.

    Parameters
    ----------
    image
        `(V, U)`, with pixels of `step_mm` in both directions.

    Returns
    -------
    NDArray
        `(V, U)`, from 0 to 1.
    """
    low, high = np.percentile(image, (0.5, 99.5))
    values = ndimage.gaussian_filter(image.astype(np.float64) - np.median(image), _BLUR_MM / step_mm)
    reach = math.ceil(_RINGS_MM[-1] / step_mm)
    values = np.pad(values, reach, mode="edge")
    # A border through pixels divides them, to about 1/8.
    fine = (np.arange(-8 * reach - 4, 8 * reach + 4) + 0.5) / 8 * step_mm
    radius = np.hypot(fine[:, None], fine)
    blocks = (2 * reach + 1, 8, 2 * reach + 1, 8)
    discs = [(radius < border).reshape(blocks).mean(axis=(1, 3)) for border in _RINGS_MM]
    total = discs[-1] / discs[-1].sum()
    mean = signal.oaconvolve(values, total, mode="valid")
    power = signal.oaconvolve(values**2, total, mode="valid")
    between = -(mean**2)
    for inner, outer in pairwise(discs):
        ring = outer - inner
        share = ring.sum() / discs[-1].sum()
        between += share * signal.oaconvolve(values, ring / ring.sum(), mode="valid") ** 2
    floor = (_FAINTEST * (high - low)) ** 2
    if floor == 0:
        return np.zeros(image.shape)
    return np.asarray(np.clip(between / (np.maximum(power - mean**2, 0) + floor), 0, 1))


def find_spheres(
    image: NDArray[np.floating],
    pixel_mm: tuple[float, float],
    *,
    plate: Plate | None = None,
    quantity: Quantity | None = None,
) -> Spheres | None:
    """Find the spheres of a plate in a map or an image of any contrast, and number them.

    The plate may be turned, seen from either side, off the centre and up to 8 % larger or smaller. Spheres
    may be brighter or darker than what surrounds them; up to five need not be seen at all.

    Of the maps of a slice T1 shows them best, since that of water is measured well; what is found there holds
    for the others. `spheres.seen` tells which were found themselves.

    What numbers them: in a map of T1 or T2 the values fall from 1 to 14. In another image they need only
    rise, fall, rise and fall once, or fall and rise once, as they do in spin echo and signed inversion
    recovery. Magnitude images of inversion recovery are often ambiguous.

    Parameters
    ----------
    image
        `(Y, X)`, real. What is not finite is taken as 0.
    pixel_mm
        Distance of columns and of rows, (dx, dy).
    plate
        Which one it is, if that is known: it is passed on. If not, it is told by the values of a map.
    quantity
        `T1` or `T2` if the image is such a map in ms; None for any other.

    Returns
    -------
    Spheres | None
        None where there are no such spheres, where some lie outside the image, or where the numbering
        remains in doubt.

    Raises
    ------
    ValueError
        If the image is not real and two-dimensional, or larger than 1 m, or the size of pixels, the plate or
        the quantity is none.
    """
    _check(image, pixel_mm, plate, quantity)
    values = np.where(np.isfinite(image), image, 0).astype(np.float64)
    # In maps the water around the spheres has the largest values by far and the largest errors.
    contrast = np.log1p(np.maximum(values, 0) / _LOG_MS) if quantity else values
    share = roundness(_even(contrast, pixel_mm), _STEP_MM)  # (V, U)
    start = _coarse(share)
    if start is None:
        return None

    # The ring is thrown onto itself by 1/10 of a turn: only the inner spheres can tell these apart.
    fits = [_refine(share, start[0] * np.exp(1j * math.tau * n / _N_RING), start[1]) for n in range(5)]
    most = max(fit.weight for fit in fits)
    ways: list[tuple[list[float], Spheres]] = []
    for fit in fits:
        # One sphere more or less could be chance.
        if fit.weight > most - 1 and fit.is_plate:
            ways += _numbered(fit, values, pixel_mm, plate, quantity)
    if not ways:
        return None
    limit, clearer = (_MOST_DISORDER, _CLEARER) if quantity else (_MOST_DISORDER_IMAGE, _CLEARER_IMAGE)
    chosen = set()
    for disorders in np.array([disorder for disorder, _ in ways]).T:
        least, next_least = np.sort(disorders)[:2]
        if least > limit or least + _EXACT > clearer * (next_least + _EXACT):
            return None
        chosen.add(int(disorders.argmin()))
    return ways[chosen.pop()][1] if len(chosen) == 1 else None


def sphere_labels(
    spheres: Spheres, shape: tuple[int, int], pixel_mm: tuple[float, float], *, radius_mm: float = 5.0
) -> NDArray[np.int16]:
    """Regions of interest: the pixels whose middle lies within `radius_mm` of a sphere's centre.

    Parameters
    ----------
    shape
        (Y, X) of the image in which the spheres were found.
    pixel_mm
        Distance of columns and of rows, (dx, dy).
    radius_mm
        Less than the 7.5 mm of a sphere, to keep away from its wall.

    Returns
    -------
    NDArray
        `(Y, X)`: 1 to 14, 0 elsewhere.

    Raises
    ------
    ValueError
        If the radius is not from 0 to 7.5 mm.
    """
    if not 0 < radius_mm <= SPHERE_RADIUS_MM:
        raise ValueError(
            f"radius of the regions is {radius_mm:g} mm: "
            f"expected more than 0 and no more than the spheres' {SPHERE_RADIUS_MM:g} mm"
        )
    labels = np.zeros(shape, dtype=np.int16)
    for number, centre in enumerate(spheres.centres, start=1):
        labels[_distance_mm(centre, shape, pixel_mm) <= radius_mm] = number
    return labels


def _check(
    image: NDArray[np.floating], pixel_mm: tuple[float, float], plate: str | None, quantity: str | None
) -> None:
    if image.ndim != 2 or not image.size or np.iscomplexobj(image):
        raise ValueError(
            f"image is {image.dtype} of shape {image.shape}: expected real numbers (Y, X), a single slice"
        )
    if not all(math.isfinite(size) and size > 0 for size in pixel_mm):
        raise ValueError(f"pixel_mm is {pixel_mm}: expected the distances of columns and rows in mm")
    edges_mm = [n * size for n, size in zip(image.shape[::-1], pixel_mm, strict=True)]
    if max(edges_mm) > _LARGEST_MM:
        raise ValueError(
            f"the image would be {edges_mm[0]:g} × {edges_mm[1]:g} mm with pixel_mm {pixel_mm}: "
            f"expected at most {_LARGEST_MM:g} mm; pixel_mm is the size of one pixel"
        )
    if plate is not None:
        _check_plate(plate)
    if quantity not in (None, "T1", "T2"):
        raise ValueError(f'quantity is "{quantity}": expected "T1", "T2" or None for another contrast')


def _even(image: NDArray[np.float64], pixel_mm: tuple[float, float]) -> NDArray[np.float64]:
    """The image on a grid of `_STEP_MM`, `(V, U)`; both cover the same area."""
    ratio = np.array([_STEP_MM / pixel_mm[1], _STEP_MM / pixel_mm[0]])
    shape = [max(1, round(n / r)) for n, r in zip(image.shape, ratio, strict=True)]
    # Pixels that are smaller than the steps are averaged first.
    smooth = ndimage.gaussian_filter(image, np.maximum(ratio - 1, 0) / 2)
    return np.asarray(
        ndimage.affine_transform(smooth, ratio, ratio / 2 - 0.5, output_shape=shape, order=1, mode="nearest")
    )


def _template() -> NDArray[np.complex128]:
    """Places of the spheres in mm as complex numbers, right + 1j * down: times exp(1j α) turns clockwise."""
    return _PLACES_MM[:, 0] - 1j * _PLACES_MM[:, 1]


def _coarse(share: NDArray[np.float64]) -> tuple[complex, complex] | None:
    """Turn, size and place at which the spheres lie on the most roundness.

    Returns
    -------
    tuple | None
        ``(a, b)``: sphere p of `_template` lies at ``a p + b``, column + 1j * row in steps of the grid; None
        if the constellation does not fit into the image.
    """
    v, u = (n // _COARSE for n in share.shape)
    pooled = share[: v * _COARSE, : u * _COARSE].reshape(v, _COARSE, u, _COARSE).max(axis=(1, 3))
    pooled = pooled.astype(np.float32)
    best, found = 0.0, None
    for scale in _SCALES:
        for turn in np.deg2rad(_TURNS_DEG):
            a = scale * np.exp(1j * turn) / _STEP_MM
            at = a * _template() / _COARSE
            columns, rows = np.rint(at.real).astype(int), np.rint(at.imag).astype(int)
            left, top = -columns.min(), -rows.min()
            height, width = v - top - rows.max(), u - left - columns.max()
            if height < 1 or width < 1:
                continue
            total = np.zeros((height, width), dtype=np.float32)
            for row, column in zip(rows + top, columns + left, strict=True):
                total += pooled[row : row + height, column : column + width]
            peak = int(total.argmax())
            if total.flat[peak] > best:
                best = float(total.flat[peak])
                row, column = divmod(peak, width)
                # The middle of a coarse pixel lies between those of the fine ones.
                middle = (column + left) + 1j * (row + top)
                found = a, complex(middle * _COARSE + (1 + 1j) * (_COARSE - 1) / 2)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """A constellation ``a p + b`` as `_coarse` has it, with the spheres found near it.

    `at` `(14,)` where they are (complex, in steps), `seen` `(14,)`; of those seen the sum `weight` of their
    roundness, and their root mean square distance from the constellation.
    """

    a: complex
    b: complex
    at: NDArray[np.complex128]
    seen: NDArray[np.bool_]
    weight: float
    residual_mm: float

    @property
    def scale(self) -> float:
        return float(abs(self.a)) * _STEP_MM

    @property
    def is_plate(self) -> bool:
        return (
            int(self.seen.sum()) >= _FEWEST_SEEN
            and self.residual_mm <= _MOST_RESIDUAL_MM
            and abs(self.scale - 1) <= _MOST_SCALE
        )


def _refine(share: NDArray[np.float64], a: complex, b: complex) -> _Fit:
    """Look for each sphere near its place and fit the constellation to what is found, a few times."""
    p = _template()
    at, round_there, seen = p, np.zeros(N_SPHERES), np.zeros(N_SPHERES, dtype=bool)
    for reach_mm in _REACH_MM:
        peaks = [_peak(share, place, reach_mm / _STEP_MM) for place in a * p + b]
        at = np.array([place for place, _ in peaks])
        round_there = np.minimum([height for _, height in peaks], 0.99)
        seen = round_there >= _SEEN
        if np.count_nonzero(seen) < _FEWEST_SEEN:
            break
        # Least squares in complex numbers, for turn, size and shift at once; weights of signal over noise.
        w = np.where(seen, round_there / (1 - round_there), 0)
        w /= w.sum()
        p_mean, at_mean = w @ p, w @ at
        a = complex(np.vdot(p - p_mean, w * (at - at_mean)) / np.vdot(p - p_mean, w * (p - p_mean)))
        b = complex(at_mean - a * p_mean)
    fit = a * p + b
    residual_mm = float(np.sqrt(np.mean(np.abs(at - fit)[seen] ** 2))) * _STEP_MM if seen.any() else math.inf
    # The most likely place of a sphere lies between where it is seen, to about 1 mm over the root of signal
    # over noise, and where the others want it, to the precision of the phantom and of the gradients.
    trust = _PRECISION_MM**2 / (_PRECISION_MM**2 + (1 - round_there) / np.maximum(round_there, _SEEN))
    return _Fit(
        a=a,
        b=b,
        at=fit + np.where(seen, trust, 0) * (at - fit),
        seen=seen,
        weight=float(round_there[seen].sum()),
        residual_mm=residual_mm,
    )


def _peak(share: NDArray[np.float64], place: complex, reach: float) -> tuple[complex, float]:
    """The roundest point within `reach` of a place, and how round it is; all in steps of the grid.

    At the border of the reach it is the slope of something else: 0.
    """
    pad = math.ceil(reach)
    row, column = round(place.imag), round(place.real)
    top, left = max(row - pad, 0), max(column - pad, 0)
    window = share[top : max(row + pad + 1, 0), left : max(column + pad + 1, 0)]
    if not window.size:
        return place, 0.0
    rows, columns = np.indices(window.shape)
    points = columns + left + 1j * (rows + top)
    inside = np.where(np.abs(points - place) <= reach, window, 0)
    height = float(inside.max())
    summit = points.flat[int(inside.argmax())]
    if abs(summit - place) > reach - 1:
        return place, 0.0
    # Between the points: the centroid of the summit.
    near = np.abs(points - summit) <= 2.5
    weights = np.where(near, np.maximum(window - 0.8 * height, 0), 0)
    total = float(weights.sum())
    return (complex((weights * points).sum() / total) if total else place), height


def _numbered(
    fit: _Fit,
    image: NDArray[np.float64],
    pixel_mm: tuple[float, float],
    plate: Plate | None,
    quantity: Quantity | None,
) -> list[tuple[list[float], Spheres]]:
    """The four ways to number what was found, each with its disorders; none if a sphere lies outside."""
    dx, dy = pixel_mm
    p = _template()
    columns = (fit.at.real + 0.5) * _STEP_MM / dx - 0.5
    rows = (fit.at.imag + 0.5) * _STEP_MM / dy - 0.5
    centres = np.stack([rows, columns], axis=1)
    if (centres < -0.5).any() or (centres > np.array(image.shape) - 0.5).any():
        return []
    values = np.array([_core(image, centre, pixel_mm) for centre in centres])
    ways = []
    for mirrored in (False, True):
        for sign in (1, -1):
            # Seen from behind, right and left are exchanged.
            wanted = sign * (-p.conj() if mirrored else p)
            order = np.abs(p - wanted[:, None]).argmin(axis=1)
            seen = fit.seen[order]
            index = np.flatnonzero(seen)
            disorders = [_disorder(values[order][index], index, quantity)]
            if quantity is None:
                # What is not seen in an image may have the very signal of its surroundings, or may be a
                # bubble: only what holds with and without it is believed. In a map it can have any value.
                disorders.append(_disorder(values[order], np.arange(N_SPHERES), quantity))
            ways.append(
                (
                    disorders,
                    Spheres(
                        centres=centres[order],
                        seen=seen,
                        values=values[order],
                        radius_mm=SPHERE_RADIUS_MM * fit.scale,
                        scale=fit.scale,
                        rotation_deg=float(np.rad2deg(np.angle(sign * fit.a)) % 360),
                        mirrored=mirrored,
                        residual_mm=fit.residual_mm,
                        plate=plate or _which(values[order], seen, quantity),
                    ),
                )
            )
    return ways


def _distance_mm(
    centre: NDArray[np.float64], shape: tuple[int, ...], pixel_mm: tuple[float, float]
) -> NDArray[np.float64]:
    """Of each pixel from a centre (row, column), `(Y, X)`."""
    rows = (np.arange(shape[0]) - centre[0]) * pixel_mm[1]
    columns = (np.arange(shape[1]) - centre[1]) * pixel_mm[0]
    return np.asarray(np.hypot(rows[:, None], columns))


def _core(image: NDArray[np.float64], centre: NDArray[np.float64], pixel_mm: tuple[float, float]) -> float:
    """Median in the middle of a sphere; of large pixels the nearest."""
    distance = _distance_mm(centre, image.shape, pixel_mm)
    return float(np.median(image[distance <= max(_CORE_MM, distance.min())]))


def _disorder(values: NDArray[np.float64], index: NDArray[np.intp], quantity: Quantity | None) -> float:
    """How little the values of spheres go with their numbers, `index` + 1: from 0, perfect order, to 1."""
    spread = float(np.sum((values - values.mean()) ** 2))
    if not spread:
        return 1.0
    if quantity is not None:
        return float(1 + stats.spearmanr(index, values).statistic) / 2
    # Least squares deviation from what rises and falls once, or falls and rises, at the best turning point.
    least = spread
    for signed in (values, -values):
        for turn in range(len(values) + 1):
            fit = np.concatenate([_rising(signed[:turn]), -_rising(-signed[turn:])])
            least = min(least, float(np.sum((signed - fit) ** 2)))
    return least / spread


def _rising(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares fit that never falls (pool adjacent violators; SciPy has it from 1.12 on)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, n = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, m = blocks.pop()
            mean, n = (before * m + mean * n) / (m + n), m + n
        blocks.append((mean, n))
    return np.array([mean for mean, n in blocks for _ in range(n)], dtype=np.float64)


def _which(values: NDArray[np.float64], seen: NDArray[np.bool_], quantity: Quantity | None) -> Plate | None:
    """The plate whose values, at either field, are nearer to those of a map."""
    known = seen & (values > 0)
    if quantity is None or not known.any():
        return None
    measured = np.log(values[known])
    off: list[tuple[float, Plate]] = []
    for plate, table in _VERSION_1.items():
        columns = table[known, 0::2] if quantity == "T1" else table[known, 1::2]
        off.append((float(np.abs(measured[:, None] - np.log(columns)).mean(axis=0).min()), plate))
    (near, plate), (far, _) = sorted(off)
    return None if near > _FOREIGN or far < 2 * near else plate
