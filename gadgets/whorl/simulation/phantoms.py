"""Objects to be scanned: what fraction of each tissue lies where, and what the tissues are.

A phantom is given on a grid twice as fine as the image, and its object lies off the raster, so that
no edge falls on the edge of a pixel. Directions: columns run along +x, rows along +y of the patient
system LPS (to the left, to the back). A brain therefore has its front at the top and its left side on
the right of the image, as radiologists look at it.

Letters: Z slices, M tissues, C coils, Y X pixels, V U samples of the fine grid (V = 2 Y, U = 2 X).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

#: Fine samples per pixel and direction.
FINE = 2

#: Where the middle of the object lies, (x, y) in mm: not on the raster of any usual pixel size.
OFFSET_MM = (2.3, -3.1)

#: Distance and thickness of the slices.
SLICE_MM = 5.0

# NIST/ISMRM system phantom at 20 °C and 3 T: name, x_mm, z_mm, T1_ms, T2_ms. Stupic et al., Magn Reson
# Med 86:1194 (2021), doi:10.1002/mrm.28779.
NIST_T1_PLATE = (
    ("Ni-1", 0.0, 50.0, 1989.0, 1465.0),
    ("Ni-2", 29.4, 40.5, 1454.0, 1077.0),
    ("Ni-3", 47.6, 15.5, 984.1, 717.9),
    ("Ni-4", 47.6, -15.5, 706.0, 510.1),
    ("Ni-5", 29.4, -40.5, 496.7, 359.6),
    ("Ni-6", 0.0, -50.0, 351.5, 255.5),
    ("Ni-7", -29.4, -40.5, 247.13, 180.8),
    ("Ni-8", -47.6, -15.5, 175.3, 127.3),
    ("Ni-9", -47.6, 15.5, 125.9, 90.3),
    ("Ni-10", -29.4, 40.5, 89.0, 64.3),
    ("Ni-11", -20.0, 20.0, 62.7, 45.7),
    ("Ni-12", 20.0, 20.0, 44.53, 31.86),
    ("Ni-13", 20.0, -20.0, 30.84, 22.38),
    ("Ni-14", -20.0, -20.0, 21.719, 15.83),
)
NIST_T2_PLATE = (
    ("Mn-1", 0.0, 50.0, 2480.0, 581.3),
    ("Mn-2", 29.4, 40.5, 2173.0, 403.5),
    ("Mn-3", 47.6, 15.5, 1907.0, 278.1),
    ("Mn-4", 47.6, -15.5, 1604.0, 190.94),
    ("Mn-5", 29.4, -40.5, 1332.0, 133.27),
    ("Mn-6", 0.0, -50.0, 1044.0, 96.89),
    ("Mn-7", -29.4, -40.5, 801.7, 64.07),
    ("Mn-8", -47.6, -15.5, 608.6, 46.42),
    ("Mn-9", -47.6, 15.5, 458.4, 31.97),
    ("Mn-10", -29.4, 40.5, 336.5, 22.56),
    ("Mn-11", -20.0, 20.0, 244.2, 15.813),
    ("Mn-12", 20.0, 20.0, 176.6, 11.237),
    ("Mn-13", 20.0, -20.0, 126.9, 7.911),
    ("Mn-14", -20.0, -20.0, 90.9, 5.592),
)
# Distance of the plates from the middle of the phantom, whose spherical shell has a radius of 100 mm.
_NIST_PLATE_MM = {"t1": 56.5, "t2": 16.5}
_NIST_SHELL_MM = 100.0
_NIST_SPHERE_MM = 7.5

# Deionised water with dissolved air at 20 °C: T1 is that of water; T2 is shorter because protons are
# exchanged with those at oxygen-17. Only their order of size matters: no region of interest is water.
_WATER_T1_MS, _WATER_T2_MS = 2900.0, 2000.0

# White matter, grey matter and cerebrospinal fluid at 3 T: name, T1_ms, T2_ms, proton density.
BRAIN_TISSUES = (
    ("white matter", 832.0, 60.0, 0.77),
    ("grey matter", 1350.0, 85.0, 0.86),
    ("CSF", 4000.0, 1500.0, 1.0),
)
# Texture of white and grey matter: SD of the relative deviation, and over how many mm the correlation
# falls to 1/e; it repeats after so many mm.
_TEXTURE_SD = {"t1": 0.05, "t2": 0.10}
_TEXTURE_MM = (3.0, 7.0, 15.0)
_FIELD_MM = 320
# Share from which on a lesion can lie there.
_WHITE = 0.9
# Sets its random numbers apart from those of the noise.
_TEXTURE_STREAM = 1
# Lesions: number in a slice, smallest and largest radius (1.5 and 4 pixels of 300/256 mm), least
# distance from each other and from the border of the white matter, increase of T2.
_N_LESIONS = 14
_LESION_RADII_MM = (1.5 * 300 / 256, 4 * 300 / 256)
_LESION_GAP_MM = 1.0
_LESION_T2 = 0.8
# Subcutaneous fat at 3 T: name, T1_ms, T2_ms, proton density; chemical shift; width of the ring.
_FAT = ("fat", 380.0, 70.0, 0.9)
_FAT_HZ = -440.0
_FAT_MM = 4.0
# Letters of an object that has no symmetry: glyph, x_mm, y_mm of its middle, T1_ms, T2_ms; what lies around
# them; and its edges (x, y), the height of a letter, and its middle, all in mm.
LETTERS = (
    ("F", -62.0, -58.0, 600.0, 45.0),
    ("G", 66.0, -62.0, 1300.0, 70.0),
    ("R", -58.0, 64.0, 1900.0, 160.0),
    ("J", 64.0, 60.0, 2600.0, 300.0),
)
_AROUND_LETTERS = ("around", 950.0, 100.0)
_LETTERS_EDGES_MM, _LETTER_MM, _LETTER_FOV_MM = (205.0, 210.0), 62.0, 230.0
# Height of the middle of the slices and the range in which there is enough brain, mm in MNI space.
_BRAIN_MIDDLE_MM, _BRAIN_RANGE_MM = 10.0, (-35.0, 65.0)


@dataclass(frozen=True, slots=True)
class Phantom:
    """An object made of tissues.

    Parameters
    ----------
    names, t1_ms, t2_ms, pd
        Of the M tissues: name, `(M,)` relaxation times in ms, `(M,)` proton density.
    fractions
        `(Z, M, V, U)` float32, share of each tissue in each fine sample; their sum is at most 1.
    regions
        Tissues that are regions of interest, as indices into `names`; label n belongs to `regions[n-1]`.
    pure_radius
        How many pixels a region keeps from its edge; 0 where purity alone decides.
    textured
        Tissues whose relaxation varies from place to place, as indices into `names`.
    t1_factor, t2_factor
        `(Z, V, U)`, what T1 and T2 of the `textured` are multiplied by; None if there are none.
    shift_hz
        `(M,)`, chemical shift of each tissue against water; none are 0 for all.
    """

    names: tuple[str, ...]
    t1_ms: NDArray[np.float64]
    t2_ms: NDArray[np.float64]
    pd: NDArray[np.float64]
    fractions: NDArray[np.float32]
    regions: tuple[int, ...]
    pure_radius: int
    textured: tuple[int, ...] = ()
    t1_factor: NDArray[np.float64] | None = None
    t2_factor: NDArray[np.float64] | None = None
    shift_hz: tuple[float, ...] = ()

    def shift_of(self, m: int) -> float:
        """Chemical shift of a tissue in Hz."""
        return self.shift_hz[m] if self.shift_hz else 0.0

    def factors(self, m: int, z: int) -> NDArray[np.float64]:
        """What T1 and T2 of a tissue are multiplied by in each fine sample of a slice, `(V, U, 2)`."""
        if m not in self.textured or self.t1_factor is None or self.t2_factor is None:
            return np.ones((*self.fractions.shape[2:], 2))
        return np.stack([self.t1_factor[z], self.t2_factor[z]], axis=-1)

    def on_pixels(self) -> NDArray[np.float64]:
        """Share of each tissue in each pixel, `(Z, M, Y, X)`: the mean over its fine samples."""
        z, m, v, u = self.fractions.shape
        blocks = self.fractions.reshape(z, m, v // FINE, FINE, u // FINE, FINE)
        return np.asarray(blocks.mean(axis=(3, 5)), dtype=np.float64)

    def labels(self, share: NDArray[np.float64]) -> NDArray[np.int16]:
        """Regions of interest `(Z, Y, X)` of `share` `(Z, M, Y, X)`: 1, 2, ... and 0 elsewhere.

        A pixel belongs to a region if more than 95 % of it do and, where `pure_radius` asks for it, its
        neighbours too. A region too small for that keeps its pure pixels, or its purest one.
        """
        labels = np.zeros((share.shape[0], *share.shape[2:]), dtype=np.int16)
        for number, tissue in enumerate(self.regions, start=1):
            for z in range(len(share)):
                here = share[z, tissue]
                pure = here > 0.95
                if self.pure_radius and pure.any():
                    kept = ndimage.binary_erosion(pure, iterations=self.pure_radius)
                    pure = kept if kept.any() else pure
                elif self.pure_radius:
                    pure = (here == here.max()) & (here > 0.5)
                labels[z][pure] = number
        return labels


def fine_positions(n: int) -> NDArray[np.float64]:
    """Where the `FINE * n` samples of the fine grid lie, in pixels; pixel j lies at ``j - n // 2``."""
    return (np.arange(FINE * n) + 0.5) / FINE - 0.5 - n // 2


def nist_plate(plate: str, *, slices: int = 1, matrix: int = 256, fov_mm: float = 300.0) -> Phantom:
    """Plate of the NIST/ISMRM system phantom: 14 spheres of 15 mm in water.

    The first slice lies below the middle of the plate, the last above it, so that outer slices cut
    smaller discs. Where the field of view is less than 1.1 times the phantom's diameter, the phantom is
    scaled down to fit.

    Parameters
    ----------
    plate
        `t1` (nickel chloride) or `t2` (manganese chloride).
    slices
        1 to 3; beyond that the spheres are too small.

    Raises
    ------
    ValueError
        If the plate is unknown or there are too many slices.

    References
    ----------
    Stupic et al., Magn Reson Med 86:1194 (2021), doi:10.1002/mrm.28779.
    """
    if plate not in _NIST_PLATE_MM:
        raise ValueError(f'plate is "{plate}": expected "t1" or "t2"')
    if not 1 <= slices <= 3:
        raise ValueError(f"slices is {slices}: the NIST plate has 1 to 3, of {SLICE_MM:g} mm each")
    spheres = NIST_T1_PLATE if plate == "t1" else NIST_T2_PLATE
    pixel_mm = fov_mm / matrix
    scale = min(1.0, fov_mm / (2.2 * _NIST_SHELL_MM))
    x = fine_positions(matrix) * pixel_mm - OFFSET_MM[0] * scale
    y = fine_positions(matrix) * pixel_mm - OFFSET_MM[1] * scale

    fractions = np.zeros((slices, len(spheres) + 1, len(y), len(x)), dtype=np.float32)
    for s, height in enumerate(slice_heights_mm(slices)):
        radius = np.sqrt(_NIST_SPHERE_MM**2 - height**2) * scale
        shell = np.sqrt(_NIST_SHELL_MM**2 - (_NIST_PLATE_MM[plate] + height) ** 2) * scale
        for m, (_, x_mm, z_mm, _, _) in enumerate(spheres, start=1):
            # Rows run downwards, z of the phantom upwards.
            fractions[s, m] = _disc(x - x_mm * scale, y + z_mm * scale, radius, pixel_mm / FINE)
        fractions[s, 0] = np.maximum(_disc(x, y, shell, pixel_mm / FINE) - fractions[s, 1:].sum(axis=0), 0)
    return Phantom(
        names=("water", *(name for name, *_ in spheres)),
        t1_ms=np.array([_WATER_T1_MS, *(t1 for *_, t1, _ in spheres)]),
        t2_ms=np.array([_WATER_T2_MS, *(t2 for *_, t2 in spheres)]),
        pd=np.ones(len(spheres) + 1),
        fractions=fractions,
        regions=tuple(range(1, len(spheres) + 1)),
        pure_radius=1,
    )


def brain(*, slices: int = 1, matrix: int = 256, fov_mm: float = 300.0) -> Phantom:
    """Axial slices of the MNI ICBM152 brain: white matter, grey matter, cerebrospinal fluid.

    The tissue probabilities are taken as fractions; what is left to 1 inside the skull-stripped head is
    CSF. Where the field of view is less than 200 mm, the brain is scaled down to fit. The template is
    symmetric: a swap of left and right cannot be seen in it, apart from the offset of the object.

    Parameters
    ----------
    slices
        1 to 21, 5 mm apart, around the height of the basal ganglia.

    Raises
    ------
    ImportError
        If nilearn, whose package holds the maps, is not installed.
    ValueError
        If there are too many slices.

    References
    ----------
    Fonov et al., NeuroImage 54:313 (2011), doi:10.1016/j.neuroimage.2010.07.033.
    """
    low, high = _BRAIN_RANGE_MM
    most = int((high - low) / SLICE_MM) + 1
    if not 1 <= slices <= most:
        raise ValueError(f"slices is {slices}: the brain has 1 to {most}, {SLICE_MM:g} mm apart")
    white, grey, csf, affine = _mni_maps()

    scale = min(1.0, fov_mm / 200.0)
    pixel_mm = fov_mm / matrix
    # The middle of the brain in MNI space is not at the origin, which is the anterior commissure.
    left = (fine_positions(matrix) * pixel_mm / scale) - OFFSET_MM[0]
    back = (fine_positions(matrix) * pixel_mm / scale) - OFFSET_MM[1] + 18.0
    heights = slice_heights_mm(slices) + _BRAIN_MIDDLE_MM
    # Lowest slice inside the range, whatever their number.
    heights += max(0.0, low - heights[0]) - max(0.0, heights[-1] - high)

    inverse = np.linalg.inv(affine)
    fractions = np.empty((slices, 3, len(back), len(left)), dtype=np.float32)
    for s, height in enumerate(heights):
        # MNI space is RAS (right, front, up), the image LPS: two signs change.
        places = np.stack(
            np.broadcast_arrays(-left[None, :], -back[:, None], np.full((1, 1), height), np.ones((1, 1)))
        )
        index = np.tensordot(inverse[:3], places, axes=1)
        for m, tissue in enumerate((white, grey, csf)):
            fractions[s, m] = ndimage.map_coordinates(tissue, index, order=1, mode="constant")
    return Phantom(
        names=tuple(name for name, *_ in BRAIN_TISSUES),
        t1_ms=np.array([t1 for _, t1, _, _ in BRAIN_TISSUES]),
        t2_ms=np.array([t2 for _, _, t2, _ in BRAIN_TISSUES]),
        pd=np.array([pd for *_, pd in BRAIN_TISSUES]),
        fractions=fractions,
        regions=(0, 1, 2),
        pure_radius=0,
    )


def letters(*, slices: int = 1, matrix: int = 256, fov_mm: float = 300.0) -> Phantom:
    """A plate with another letter in each corner: what is turned, mirrored, transposed or shifted shows it.

    Letters stand upright where rows run downwards and columns to the right. The middle of the plate has a
    notch for each slice, so that their order shows too: 1 in the first, 2 in the second ... Where the field
    of view is less than 230 mm, the plate is scaled down to fit.

    Parameters
    ----------
    slices
        1 to 9.

    Raises
    ------
    ValueError
        If there are too many slices.
    """
    if not 1 <= slices <= 9:
        raise ValueError(f"slices is {slices}: the letters have 1 to 9")
    scale = min(1.0, fov_mm / _LETTER_FOV_MM)
    fine_mm = fov_mm / matrix / FINE / scale
    at = fine_positions(matrix) * fov_mm / matrix / scale
    x, y = at - OFFSET_MM[0], at - OFFSET_MM[1]
    width, height = _LETTERS_EDGES_MM
    plate = _edge(x, width / 2, fine_mm)[None, :] * _edge(y, height / 2, fine_mm)[:, None]
    fractions = np.zeros((slices, len(LETTERS) + 1, len(y), len(x)), dtype=np.float32)
    for s in range(slices):
        for m, (glyph, x_mm, y_mm, _, _) in enumerate(LETTERS, start=1):
            fractions[s, m] = _glyph(glyph, (x - x_mm) / fine_mm, (y - y_mm) / fine_mm, _LETTER_MM / fine_mm)
        rest = plate - fractions[s, 1:].sum(axis=0)
        for notch in range(s + 1):
            rest *= 1 - _disc(x - 10 * notch, y, 3.5, fine_mm)
        fractions[s, 0] = np.clip(rest, 0, 1)
    return Phantom(
        names=(_AROUND_LETTERS[0], *(name for name, *_ in LETTERS)),
        t1_ms=np.array([_AROUND_LETTERS[1], *(t1 for *_, t1, _ in LETTERS)]),
        t2_ms=np.array([_AROUND_LETTERS[2], *(t2 for *_, t2 in LETTERS)]),
        pd=np.ones(len(LETTERS) + 1),
        fractions=fractions,
        regions=tuple(range(1, len(LETTERS) + 1)),
        pure_radius=1,
    )


def _edge(x: NDArray[np.float64], half: float, width: float) -> NDArray[np.float64]:
    """1 between -half and half, with an edge one sample wide."""
    return np.clip((half - np.abs(x)) / width + 0.5, 0, 1)


def _glyph(
    letter: str, columns: NDArray[np.float64], rows: NDArray[np.float64], size: float
) -> NDArray[np.float32]:
    """A bold letter `(V, U)` of a height in samples, its middle where `columns` and `rows` are 0."""
    from PIL import Image, ImageDraw, ImageFont

    canvas = Image.new("L", (len(columns), len(rows)))
    font = ImageFont.load_default(size)
    where = -columns[0], -rows[0]
    # Strokes thick enough for several pixels.
    ImageDraw.Draw(canvas).text(where, letter, fill=255, font=font, anchor="mm", stroke_width=size / 22)
    return np.asarray(canvas, dtype=np.float32) / np.float32(255)


def textured_brain(*, slices: int = 1, matrix: int = 256, fov_mm: float = 300.0, seed: int = 0) -> Phantom:
    """The slices of `brain`, with relaxation that varies within the tissue, and with small lesions.

    T1 and T2 of white and grey matter are multiplied by the exponential of two independent Gaussian
    random fields, with an SD of 5 % (T1) and 10 % (T2). Each is the sum of three fields of equal variance,
    whose correlation falls to 1/e over 3, 7 and 15 mm. Slices are independent of each other.

    Up to 14 lesions in each slice, discs with a radius of 1.8 to 4.7 mm (1.5 to 4 pixels of the default
    image), lie wholly in white matter, apart from each other and from its border; there are fewer in
    slices with too little white matter. Their T2 is that of the white matter at their place, and 80 %.

    Parameters
    ----------
    slices, matrix, fov_mm
        As for `brain`.
    seed
        Of the texture and of the places of the lesions. The texture does not depend on the matrix.

    Raises
    ------
    ImportError, ValueError
        As `brain`.
    """
    plain = brain(slices=slices, matrix=matrix, fov_mm=fov_mm)
    rng = np.random.default_rng([seed, _TEXTURE_STREAM])
    scale = min(1.0, fov_mm / 200.0)
    fine_mm = fov_mm / matrix / FINE / scale
    at_mm = fine_positions(matrix) * fov_mm / matrix / scale
    fields = np.array([[_random_field(at_mm, rng) for _ in range(2)] for _ in range(slices)])  # (Z, 2, V, U)
    fractions = np.zeros((slices, 4, len(at_mm), len(at_mm)), dtype=np.float32)
    fractions[:, :3] = plain.fractions
    for z in range(slices):
        for row, column, radius_mm in _place_lesions(plain.fractions[z, 0], fine_mm, rng):
            disc = _disc(at_mm - at_mm[column], at_mm - at_mm[row], radius_mm, fine_mm)
            fractions[z, 3] += disc
        # A lesion takes the place of all that was there, else none of its pixels would be pure.
        total = plain.fractions[z].sum(axis=0)
        fractions[z, :3] *= 1 - fractions[z, 3]
        fractions[z, 3] *= total
    return Phantom(
        names=(*plain.names, "lesions"),
        t1_ms=plain.t1_ms[[0, 1, 2, 0]],
        t2_ms=plain.t2_ms[[0, 1, 2, 0]] * np.array([1, 1, 1, 1 + _LESION_T2]),
        pd=plain.pd[[0, 1, 2, 0]],
        fractions=fractions,
        regions=(0, 1, 2, 3),
        pure_radius=0,
        textured=(0, 1, 3),
        t1_factor=np.exp(_TEXTURE_SD["t1"] * fields[:, 0]),
        t2_factor=np.exp(_TEXTURE_SD["t2"] * fields[:, 1]),
    )


def _random_field(at_mm: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Gaussian random field at all pairs of positions `(V, V)`, mean 0 and SD 1 over a wide area."""
    # Drawn on a raster of its own, so that the same seed gives the same field on all images.
    n = _FIELD_MM
    field = np.zeros((n, n))
    for length_mm in _TEXTURE_MM:
        # White noise under a Gaussian of width σ has the correlation exp(-d² / 4σ²).
        part = ndimage.gaussian_filter(rng.standard_normal((n, n)), length_mm / 2, mode="wrap")
        field += part / part.std()
    field = (field - field.mean()) / field.std()
    # Where the field of view is wider, the field goes on periodically.
    index = np.stack(np.meshgrid(at_mm + n // 2, at_mm + n // 2, indexing="ij"))
    return np.asarray(ndimage.map_coordinates(field, index, order=3, mode="grid-wrap"))


def _place_lesions(
    white: NDArray[np.float32], fine_mm: float, rng: np.random.Generator
) -> list[tuple[int, int, float]]:
    """Row, column and radius in mm of lesions in white matter `(V, U)`, the largest first."""
    # Distance to what is not white matter; a sample of it counts from its edge.
    room = ndimage.distance_transform_edt(white > _WHITE) * fine_mm - fine_mm / 2
    rows, columns = np.indices(white.shape)
    lesions = []
    for radius_mm in np.linspace(*_LESION_RADII_MM, _N_LESIONS)[::-1]:
        places = np.argwhere(room > radius_mm + _LESION_GAP_MM)
        if not len(places):
            continue
        row, column = places[rng.integers(len(places))]
        lesions.append((int(row), int(column), float(radius_mm)))
        distance = np.hypot(rows - row, columns - column) * fine_mm - radius_mm
        room = np.minimum(room, distance)
    return lesions


def with_fat(thing: Phantom, *, matrix: int = 256, fov_mm: float = 300.0) -> Phantom:
    """The phantom with a ring of subcutaneous fat, 4 mm wide, directly around it.

    The fat belongs to no region of interest. Its chemical shift is -440 Hz (-3.4 ppm at 3 T). Where the
    field of view is less than 200 mm, it is as much thinner as the brain is smaller.
    """
    wide = _FAT_MM * min(1.0, fov_mm / 200.0) / (fov_mm / matrix / FINE)  # fine samples
    inside = thing.fractions.sum(axis=1)
    ring = np.zeros_like(inside)
    for z, tissues in enumerate(inside):
        body = ndimage.binary_fill_holes(tissues > 0.5)
        # From the edge of the body, which lies half a sample before the first one outside.
        distance = ndimage.distance_transform_edt(~body) - 0.5 if body.any() else np.full(body.shape, np.inf)
        # Shares of samples at the border of the body are left to its tissues; its holes stay empty.
        ring[z] = np.where(body, 0, np.clip(0.5 + wide - distance, 0, 1) * np.clip(1 - tissues, 0, 1))
    name, t1_ms, t2_ms, pd = _FAT
    return replace(
        thing,
        names=(*thing.names, name),
        t1_ms=np.append(thing.t1_ms, t1_ms),
        t2_ms=np.append(thing.t2_ms, t2_ms),
        pd=np.append(thing.pd, pd),
        fractions=np.concatenate([thing.fractions, ring[:, None]], axis=1),
        shift_hz=(0.0,) * len(thing.names) + (_FAT_HZ,),
    )


def slice_heights_mm(slices: int) -> NDArray[np.float64]:
    """Where the slices lie along their normal, mm from the middle of the stack, `(Z,)`."""
    return np.asarray(SLICE_MM * (np.arange(slices) - (slices - 1) / 2), dtype=np.float64)


def coil_maps(
    coils: int,
    *,
    matrix: int = 256,
    fov_mm: float = 300.0,
    height_mm: float = 0.0,
    moved_pixels: float = 0.0,
) -> NDArray[np.complex128]:
    """Sensitivities of a ring of receive coils, `(C, V, U)`, times the smooth phase of the object.

    A coil is a magnetic dipole on a cylinder around the object that looks at its axis, softened by the
    size of a loop; what it receives is the field component that turns against the precession,
    ``Bx - i By``. The largest root-sum-of-squares within the field of view is 1. A single coil is
    uniform, as a body coil is. The phase of the object is a polynomial of second order, 1 rad or so.

    An object that has moved by `moved_pixels` along x has taken its phase along and sees the coils there:
    the maps are given where its samples were before.

    Raises
    ------
    ValueError
        If there is no coil, or more than 128.
    """
    if not 1 <= coils <= 128:
        raise ValueError(f"coils is {coils}: expected 1 to 128")
    half_mm = fov_mm / 2
    x = (fine_positions(matrix) * fov_mm / matrix)[None, :]
    y = (fine_positions(matrix) * fov_mm / matrix)[:, None]
    phase = 0.5 + 0.9 * x / half_mm - 0.7 * y / half_mm + 0.6 * (x / half_mm) ** 2 - 0.4 * x * y / half_mm**2
    turn = np.exp(1j * phase)
    if coils == 1:
        return np.array([turn])

    maps = _coil_ring(coils, x + moved_pixels * fov_mm / matrix, y, height_mm, half_mm)
    still = maps if moved_pixels == 0 else _coil_ring(coils, x, y, height_mm, half_mm)
    # The coils are as sensitive whatever the object does.
    scale = np.float64(np.sqrt(np.max(np.sum(np.abs(still) ** 2, axis=0))))
    return np.asarray(maps / scale * turn)


def _coil_ring(
    coils: int, x: NDArray[np.float64], y: NDArray[np.float64], height_mm: float, half_mm: float
) -> NDArray[np.complex128]:
    """Sensitivities `(C, V, U)` of the dipoles at `x` `(1, U)` and `y` `(V, 1)` in mm, not normalised."""
    ring_mm, loop_mm = 1.1 * half_mm, 0.4 * half_mm
    maps = np.empty((coils, y.shape[0], x.shape[1]), dtype=np.complex128)
    for c in range(coils):
        # The half step keeps the ring from being symmetric to the raster.
        angle = 2 * np.pi * (c + 0.3) / coils
        mx, my = -np.cos(angle), -np.sin(angle)
        dx, dy = x + ring_mm * mx, y + ring_mm * my
        distance2 = dx**2 + dy**2 + height_mm**2 + loop_mm**2
        along = 3 * (mx * dx + my * dy) / distance2
        maps[c] = ((along * dx - mx) - 1j * (along * dy - my)) / distance2**1.5
    return maps


def transmit_field(peak: float, inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Smooth transmit field on the fine grid `(V, U)`, relative to the nominal one.

    A paraboloid: bright near the centre, as the body is at 3 T, but off it and elongated, so that no
    flip or rotation of the image leaves it as it is. All slices have the same.

    Parameters
    ----------
    peak
        The field runs from ``1 - peak`` to ``1 + peak`` inside; 0 is exactly uniform.
    inside
        `(V, U)`, where the object is. Outside the field may be far from 1 and is of no use.
    """
    v, u = inside.shape
    x = fine_positions(u // FINE)[None, :] / (u // FINE) + 0.09
    y = fine_positions(v // FINE)[:, None] / (v // FINE) - 0.05
    bowl = x**2 + 0.7 * y**2
    low, high = bowl[inside].min(), bowl[inside].max()
    # An object may be as small as one sample.
    return np.asarray(1 + peak * (1 - 2 * (bowl - low) / max(high - low, 1e-12)))


def off_resonance(peak_hz: float, inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Smooth off-resonance field on the fine grid `(V, U)` in Hz.

    A polynomial of second order, as shims leave it, and a bump near the front of the object, as above the
    frontal sinus. All slices have the same.

    Parameters
    ----------
    peak_hz
        The field runs from ``-peak_hz`` to ``peak_hz`` inside; 0 is exactly uniform.
    inside
        `(V, U)`, where the object is.
    """
    x, y = _object_places(inside)
    field = 0.25 * x - 0.55 * y + 0.35 * (x * y) - 0.5 * x**2 - 0.3 * y**2
    field = field + 1.3 * np.exp(-(((x - 0.05) / 0.35) ** 2) - ((y + 0.8) / 0.3) ** 2)
    low, high = field[inside].min(), field[inside].max()
    # Outside it stays within the range: a wider one would only cost segments of time.
    return np.asarray(peak_hz * np.clip(2 * (field - low) / max(high - low, 1e-12) - 1, -1, 1))


def phase_jump(angle_rad: float, inside: NDArray[np.bool_]) -> NDArray[np.complex128]:
    """Phase factor on the fine grid `(V, U)`: turned by an angle within an ellipse in the front of the
    object, with a sharp border, as at an interface of air and tissue."""
    x, y = _object_places(inside)
    ellipse = ((x - 0.1) / 0.45) ** 2 + ((y + 0.55) / 0.3) ** 2 < 1
    return np.where(ellipse, np.exp(1j * angle_rad), 1)


def _object_places(inside: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions x `(1, U)` and y `(V, 1)`, -1 to 1 over the box around the object; y is -1 at the front."""
    places = []
    for axis in (0, 1):
        hit = np.flatnonzero(inside.any(axis=axis))
        middle, half = (hit[0] + hit[-1]) / 2, max((hit[-1] - hit[0]) / 2, 1)
        places.append((np.arange(inside.shape[1 - axis]) - middle) / half)
    return places[0][None, :], places[1][:, None]


def _disc(x: NDArray[np.float64], y: NDArray[np.float64], radius: float, width: float) -> NDArray[np.float32]:
    """Share of each fine sample that lies in a disc; the edge is taken as straight over a sample."""
    distance = np.hypot(x[None, :], y[:, None])
    return np.clip(0.5 + (radius - distance) / width, 0, 1).astype(np.float32)


def _mni_maps() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """White matter, grey matter and CSF of the MNI brain, 0 to 1, and the affine of their voxels."""
    # Found without importing it: importing nilearn takes longer than the whole simulation.
    spec = importlib.util.find_spec("nilearn")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("nibabel") is None:
        raise ImportError(
            "the brain phantom needs the tissue maps of the package nilearn, which is not installed: "
            "pip install 'whorl-mrf[demo]'"
        )
    import nibabel

    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    maps = {}
    affine = np.eye(4)
    for kind in ("wm", "gm", "t1"):
        found = sorted(folder.glob(f"mni_icbm152_{kind}_*.nii.gz"))
        if not found:
            raise ImportError(
                f"the installed nilearn has no map mni_icbm152_{kind}: pip install 'whorl-mrf[demo]'"
            )
        image: Any = nibabel.load(found[0])
        maps[kind] = np.asarray(image.dataobj, dtype=np.float32)
        affine = np.asarray(image.affine, dtype=np.float64)
    head = maps["t1"] > 0
    white, grey = maps["wm"] / 255 * head, maps["gm"] / 255 * head
    csf = np.where(head, np.clip(1 - white - grey, 0, 1), 0)
    return white.astype(np.float32), grey.astype(np.float32), csf.astype(np.float32), affine
