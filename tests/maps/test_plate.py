"""The spheres of the NIST plates: found at any place, numbered rightly, and never where there are none.

The images are drawn here, of a geometry that is written down once more: 10 spheres at equal angles on a
radius of 50 mm, 4 in a square.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from whorl.maps.plate import Plate, Quantity, Spheres, find_spheres, reference, roundness, sphere_labels
from whorl.maps.rois import region_statistics

DATA = Path(__file__).parents[3] / "shared/data"
INNER = (11, 12, 13, 14)

# The tables give the places to 0.1 mm; the rest of 1 mm is partial volume and noise, and the regions of
# interest end 2.5 mm within the spheres.
CENTRE_MM = 1.0


@dataclass(frozen=True, slots=True)
class Scene:
    """A drawn plate; the shift is that of its middle from the middle of the image, right and down."""

    shape: tuple[int, int] = (201, 180)
    pixel_mm: tuple[float, float] = (1.25, 1.1)
    turn_deg: float = 0.0
    mirrored: bool = False
    shift_mm: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0
    wider: float = 1.0
    radius_mm: float = 7.5
    background: float = 0.0
    missing: tuple[int, ...] = ()
    wall: bool = False

    def places_mm(self) -> NDArray[np.float64]:
        """Of the spheres from the middle of the image, right and down, `(14, 2)`."""
        clockwise = np.deg2rad([*range(0, 360, 36), -45, 45, 135, 225])
        if self.mirrored:
            clockwise = -clockwise
        clockwise = clockwise + np.deg2rad(self.turn_deg)
        radius = self.scale * np.array([50.0] * 10 + [20 * np.sqrt(2)] * 4)
        x, y = radius * np.sin(clockwise), -radius * np.cos(clockwise)
        return np.stack([self.wider * x, y], 1) + self.shift_mm

    def centres(self) -> NDArray[np.float64]:
        """Row and column in pixels."""
        middle = (np.array(self.shape) - 1) / 2
        return np.asarray(middle + self.places_mm()[:, ::-1] / np.array(self.pixel_mm[::-1]))

    def draw(self, values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
        image = self._onto(np.zeros(self.shape), self.shift_mm, 95.0, self.background)
        for number, (place, value) in enumerate(zip(self.places_mm(), values, strict=True), start=1):
            if number in self.missing:
                continue
            if self.wall:
                image = self._onto(image, place, self.radius_mm * self.scale + 1.5, 0.0)
            image = self._onto(image, place, self.radius_mm * self.scale, value)
        return image

    def _onto(
        self, image: NDArray[np.float64], place: Sequence[float], radius: float, value: float
    ) -> NDArray[np.float64]:
        (n_y, n_x), (dx, dy) = self.shape, self.pixel_mm
        x = (np.arange(n_x) - (n_x - 1) / 2) * dx - place[0]
        y = (np.arange(n_y) - (n_y - 1) / 2) * dy - place[1]
        # The share of a pixel at the edge, as if the edge were straight.
        share = np.clip((radius - np.hypot(x, y[:, None])) / max(dx, dy) + 0.5, 0, 1)
        return np.asarray(image * (1 - share) + share * value)

    def error_mm(self, spheres: Spheres) -> float:
        """The largest distance of a found centre from where the sphere of that number was drawn."""
        off = (spheres.centres - self.centres()) * np.array(self.pixel_mm[::-1])
        return float(np.hypot(*off.T).max())


def truth(plate: Plate, quantity: Quantity) -> NDArray[np.float64]:
    values = reference(plate)
    return values.t1_ms if quantity == "T1" else values.t2_ms


def anywhere(rng: np.random.Generator) -> Scene:
    """A scene with everything at random but the missing spheres."""
    pixel_mm = (float(rng.uniform(0.8, 2.2)), float(rng.uniform(0.8, 2.2)))
    return Scene(
        shape=(int(230 / pixel_mm[1]) + int(rng.integers(2)), int(250 / pixel_mm[0]) + int(rng.integers(2))),
        pixel_mm=pixel_mm,
        turn_deg=float(rng.uniform(0, 360)),
        mirrored=bool(rng.random() < 0.5),
        shift_mm=(float(rng.uniform(-12, 12)), float(rng.uniform(-12, 12))),
        scale=float(rng.uniform(0.96, 1.04)),
        radius_mm=float(rng.choice([6.5, 7.5])),
    )


def degrees_apart(a: float, b: float) -> float:
    return abs((a - b + 180) % 360 - 180)


def found(spheres: Spheres | None) -> Spheres:
    assert spheres is not None
    return spheres


@pytest.mark.parametrize("background", [0.0, 2900.0])
@pytest.mark.parametrize("quantity", ["T1", "T2"])
@pytest.mark.parametrize("plate", ["t1", "t2"])
def test_maps_are_numbered_at_any_place(plate: Plate, quantity: Quantity, background: float) -> None:
    rng = np.random.default_rng([4, plate == "t1", quantity == "T1", background > 0])
    values = truth(plate, quantity)
    for _ in range(12):
        scene = replace(anywhere(rng), background=background)
        clean = scene.draw(values)
        image = clean * (1 + 0.1 * rng.standard_normal(clean.shape))
        spheres = found(find_spheres(image.astype(np.float32), scene.pixel_mm, quantity=quantity))
        assert scene.error_mm(spheres) < CENTRE_MM, scene
        assert spheres.mirrored == scene.mirrored
        # 1 mm at 50 mm is 1.1 degrees and 2 %; of 14 spheres less.
        assert degrees_apart(spheres.rotation_deg, scene.turn_deg) < 0.7
        assert spheres.scale == pytest.approx(scene.scale, abs=0.012)
        assert spheres.radius_mm == pytest.approx(7.5 * spheres.scale)
        assert spheres.residual_mm < CENTRE_MM
        assert spheres.plate == plate
        # About 30 pixels or more with 10 % of noise each.
        assert spheres.values[spheres.seen] == pytest.approx(values[spheres.seen], rel=0.1)


@pytest.mark.parametrize(
    "missing",
    [(1,), (10,), (1, 2, 3), (2, 6, 12), (11,), (13, 14), (12, 13, 14), INNER, (5, 11, 12, 13, 14)],
    ids=str,
)
@pytest.mark.parametrize("plate", ["t1", "t2"])
def test_missing_spheres_follow_from_the_others(plate: Plate, missing: tuple[int, ...]) -> None:
    rng = np.random.default_rng([5, *missing])
    for _ in range(4):
        scene = replace(anywhere(rng), missing=missing, background=float(rng.choice([0, 2900])))
        image = scene.draw(truth(plate, "T1"))
        spheres = found(find_spheres(image, scene.pixel_mm, plate=plate, quantity="T1"))
        assert scene.error_mm(spheres) < CENTRE_MM, scene
        assert not spheres.seen[np.array(missing) - 1].any()
        assert spheres.plate == plate


def test_a_neighbour_is_not_taken_for_a_missing_sphere() -> None:
    """A rod of the frame 5 mm from where sphere 3 should be."""
    scene = Scene(turn_deg=20.0, missing=(3,))
    place = scene.places_mm()[2]
    image = scene._onto(scene.draw(truth("t1", "T1")), (place * 55 / 50).tolist(), 7.5, 1200.0)
    spheres = found(find_spheres(image, scene.pixel_mm, quantity="T1"))
    assert not spheres.seen[2]
    assert spheres.seen.sum() == 13
    assert scene.error_mm(spheres) < CENTRE_MM


def spin_echo(t1_ms: NDArray[np.float64], t2_ms: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((1 - np.exp(-2000 / t1_ms)) * np.exp(-12 / t2_ms))


def inversion_recovery(t1_ms: NDArray[np.float64], t2_ms: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((1 - 2 * np.exp(-50 / t1_ms) + np.exp(-1000 / t1_ms)) * np.exp(-12 / t2_ms))


@pytest.mark.parametrize("contrast", [spin_echo, inversion_recovery])
@pytest.mark.parametrize("plate", ["t1", "t2"])
def test_images_are_numbered_though_their_values_turn(plate: Plate, contrast: object) -> None:
    assert callable(contrast)
    _, t1_ms, t2_ms = reference(plate, field_t=1.5)
    values = contrast(t1_ms, t2_ms)
    steps = np.sign(np.diff(values))
    assert len(set(steps)) == 2, "these contrasts are here because they rise and fall"
    water = float(contrast(np.array(2900.0), np.array(2000.0)))
    rng = np.random.default_rng(6)
    for _ in range(10):
        scene = replace(anywhere(rng), background=water, wall=True)
        clean = scene.draw(values)
        image = clean + 0.02 * np.ptp(values) * rng.standard_normal(clean.shape)
        spheres = found(find_spheres(image, scene.pixel_mm))
        assert scene.error_mm(spheres) < CENTRE_MM, scene
        assert spheres.mirrored == scene.mirrored
        assert spheres.plate is None  # an image has no milliseconds to tell it by
        assert found(find_spheres(image, scene.pixel_mm, plate=plate)).plate == plate


def test_contrast_and_unit_do_not_matter() -> None:
    scene = Scene(turn_deg=70.0, shift_mm=(4.0, -7.0))
    values = np.linspace(900.0, 100.0, 14)
    image = scene.draw(values)
    places = [found(find_spheres(a * image + b, scene.pixel_mm)).centres for a, b in [(1, 0), (-1e-6, 3e-6)]]
    # Rounding of single precision, in pixels.
    assert places[0] == pytest.approx(places[1], abs=1e-4)


def test_each_sphere_is_looked_for_itself() -> None:
    """Gradients that are off by 3 % in one direction only: the best circle is 0.75 mm off at its edge."""
    scene = Scene(turn_deg=110.0, wider=1.03)
    spheres = found(find_spheres(scene.draw(truth("t1", "T1")), scene.pixel_mm, quantity="T1"))
    assert scene.error_mm(spheres) < 0.4
    assert 0.4 < spheres.residual_mm < 0.75


def test_what_is_not_a_number_is_outside() -> None:
    scene = Scene(turn_deg=200.0, mirrored=True)
    image = scene.draw(truth("t1", "T1"))
    image[image == 0] = np.nan
    assert scene.error_mm(found(find_spheres(image, scene.pixel_mm, quantity="T1"))) < CENTRE_MM


def test_a_decagon_without_order_has_no_numbers() -> None:
    """Spheres that are all alike (proton density), or in disorder, are found but cannot be numbered."""
    scene = Scene(background=1000.0)
    shuffled = np.random.default_rng(7).permutation(truth("t1", "T1"))
    for values in (np.full(14, 400.0), shuffled):
        image = scene.draw(values)
        assert find_spheres(image, scene.pixel_mm) is None
        assert find_spheres(image, scene.pixel_mm, plate="t1", quantity="T1") is None


def test_a_rising_ring_alone_can_be_read_from_both_ends() -> None:
    scene = Scene(missing=INNER)
    image = scene.draw(truth("t1", "T1"))
    assert find_spheres(image, scene.pixel_mm) is None
    # In a map of T1 the long end is the first.
    assert find_spheres(image, scene.pixel_mm, quantity="T1") is not None


def test_water_may_be_full_of_errors() -> None:
    """T2 of water is hardly measured by a train of short pulses: it is anything from 300 to 3000 ms."""
    rng = np.random.default_rng(9)
    values = truth("t2", "T2")
    for _ in range(8):
        scene = replace(
            anywhere(rng), shape=(180, 201), pixel_mm=(1.1, 1.25), radius_mm=7.5, background=2000.0
        )
        clean = scene.draw(values)
        water = 2000 * np.exp(0.5 * texture(rng, 3.0, scene.shape) + 0.3 * rng.standard_normal(scene.shape))
        image = np.where(clean > values.max(), np.clip(water, 300, 3000), clean)
        spheres = found(find_spheres(image, scene.pixel_mm, quantity="T2"))
        assert scene.error_mm(spheres) < CENTRE_MM, scene
        assert spheres.plate == "t2"


def test_bubbles_cost_the_numbers_rather_than_change_them() -> None:
    """Without spheres 1, 11 and 14 a magnitude image rises and falls once in a wrong order too."""
    _, t1_ms, t2_ms = reference("t2")
    values, water = (
        np.abs((1 - 2 * np.exp(-500 / t1) + np.exp(-3000 / t1)) * np.exp(-30 / t2))
        for t1, t2 in ((t1_ms, t2_ms), (2900.0, 2000.0))
    )
    rng = np.random.default_rng(10)
    for _ in range(4):
        scene = replace(anywhere(rng), background=float(water), missing=(1, 11, 14))
        spheres = find_spheres(scene.draw(values), scene.pixel_mm)
        assert spheres is None or scene.error_mm(spheres) < CENTRE_MM


def test_foreign_values_name_no_plate() -> None:
    scene = Scene(turn_deg=10.0)
    spheres = found(find_spheres(scene.draw(truth("t1", "T1") * 5), scene.pixel_mm, quantity="T1"))
    assert spheres.plate is None


# The image ends 100 mm to the right and 99 mm above: in the last cases 1 mm short of the middle of a sphere.
@pytest.mark.parametrize("shift_mm", [(60.0, 0.0), (0.0, -75.0), (51.0, 0.0), (0.0, -50.0)])
def test_a_plate_that_is_cut_off_is_none(shift_mm: tuple[float, float]) -> None:
    scene = Scene(shift_mm=shift_mm, shape=(180, 160), turn_deg=90.0 if shift_mm[0] else 0.0)
    assert find_spheres(scene.draw(truth("t2", "T1")), scene.pixel_mm, quantity="T1") is None


def uniform_disc(rng: np.random.Generator) -> NDArray[np.float64]:
    scene = Scene(background=1000.0, missing=tuple(range(1, 15)))
    return scene.draw(np.zeros(14)) + rng.standard_normal(scene.shape)


def texture(
    rng: np.random.Generator, sigma: float, shape: tuple[int, int] = (201, 180)
) -> NDArray[np.float64]:
    image = ndimage.gaussian_filter(rng.standard_normal(shape), sigma)
    return np.asarray(image / image.std())


def brain_like(rng: np.random.Generator) -> NDArray[np.float64]:
    """Folds of two tissues and a fluid, in an ellipse."""
    folds = texture(rng, 3.0)
    y, x = np.ogrid[-1.4:1.4:201j, -1.4:1.4:180j]
    inside = x**2 / 0.6 + y**2 < 1
    return np.asarray(inside * np.select([folds < -0.5, folds < 0.7], [830.0, 1350.0], 4000.0))


def scattered_discs(rng: np.random.Generator) -> NDArray[np.float64]:
    """Spheres of the right size in wrong places."""
    scene = Scene(background=500.0)
    image = scene.draw(np.full(14, 500.0))
    for _ in range(40):
        image = scene._onto(image, rng.uniform(-80, 80, 2).tolist(), 7.5, rng.uniform(0, 3000))
    return image


def lattice(rng: np.random.Generator) -> NDArray[np.float64]:
    """The phantom of another maker: spheres of the right size at equal distances."""
    scene = Scene(background=500.0)
    image = scene.draw(np.full(14, 500.0))
    step, turn = rng.uniform(18, 34), np.exp(1j * rng.uniform(0, np.pi))
    for i in range(-4, 5):
        for j in range(-4, 5):
            place = step * (i + 1j * j) * turn
            if abs(place) < 85:
                image = scene._onto(image, (place.real, place.imag), 7.5, rng.uniform(0, 3000))
    return image


@pytest.mark.parametrize("quantity", [None, "T1", "T2"])
@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda rng: np.zeros((64, 90)), id="empty"),
        pytest.param(lambda rng: np.full((180, 201), 7.0), id="flat"),
        pytest.param(lambda rng: np.full((180, 201), np.nan), id="nan"),
        pytest.param(lambda rng: np.ones((1, 1)), id="pixel"),
        pytest.param(lambda rng: rng.standard_normal((5, 300)), id="strip"),
        pytest.param(lambda rng: texture(rng, 0), id="noise"),
        pytest.param(lambda rng: texture(rng, 4), id="texture"),
        pytest.param(lambda rng: np.exp(texture(rng, 6)), id="lumps"),
        uniform_disc,
        brain_like,
        scattered_discs,
        lattice,
    ],
)
def test_other_things_are_none(draw: object, quantity: Quantity | None) -> None:
    assert callable(draw)
    rng = np.random.default_rng(8)
    for _ in range(4):
        assert find_spheres(draw(rng), (1.25, 1.1), quantity=quantity) is None


def test_roundness_knows_neither_strength_nor_sign() -> None:
    y, x = np.mgrid[-40:41, -30:31]
    disc = (np.hypot(x, y) * 1.25 < 7.5).astype(np.float64)
    share = roundness(disc, 1.25)
    assert share.shape == disc.shape
    assert np.unravel_index(share.argmax(), share.shape) == (40, 30)
    # A disc is all round; what is missing are corners of pixels.
    assert share.max() > 0.9
    assert roundness(7 - 1e3 * disc, 1.25) == pytest.approx(share, abs=1e-6)
    # A straight edge: an odd function has the same mean on each ring.
    edge = roundness((x > 0) - 0.5 * (x == 0), 1.25)
    assert edge[40, 30] < 0.02


def test_labels_are_discs_within_the_spheres() -> None:
    scene = Scene(turn_deg=33.0, mirrored=True, scale=1.02, background=3000.0)
    values = truth("t2", "T2")
    image = scene.draw(values)
    spheres = found(find_spheres(image, scene.pixel_mm, quantity="T2"))
    labels = sphere_labels(spheres, scene.shape, scene.pixel_mm)
    assert labels.shape == scene.shape
    assert labels.dtype == np.int16
    assert set(np.unique(labels)) == set(range(15))
    for number, (row, column) in enumerate(scene.centres(), start=1):
        assert labels[round(row), round(column)] == number
    # π 5² mm² in pixels; the border of a disc of 60 pixels passes through some 25.
    counts = np.bincount(labels.ravel())[1:]
    assert counts == pytest.approx(np.pi * 25 / (1.25 * 1.1), abs=6)
    names, _, t2_ms = reference("t2")
    rows = region_statistics(image.astype(np.float32), labels, names, t2_ms)
    assert [row.name for row in rows] == list(names)
    # Nothing but the sphere's own value: rounding of single precision.
    assert [row.mean for row in rows] == pytest.approx(list(values), rel=1e-6)
    small = sphere_labels(spheres, scene.shape, scene.pixel_mm, radius_mm=2.5)
    assert (labels[small > 0] == small[small > 0]).all()
    assert 0 < np.count_nonzero(small) < np.count_nonzero(labels) / 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((3, 64, 64))}, r"shape \(3, 64, 64\): expected real numbers \(Y, X\)"),
        ({"image": np.zeros((64, 64), dtype=np.complex64)}, "image is complex64"),
        ({"image": np.zeros((0, 64))}, "shape"),
        ({"pixel_mm": (0.0, 1.0)}, "pixel_mm"),
        ({"pixel_mm": (1.0, np.nan)}, "pixel_mm"),
        ({"pixel_mm": (1.0, 300.0)}, r"64 × 19200 mm .* the size of one pixel"),
        ({"plate": "t3"}, 'plate is "t3": expected "t1"'),
        ({"quantity": "t1"}, 'quantity is "t1": expected "T1"'),
    ],
)
def test_find_refuses(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"image": np.zeros((64, 64)), "pixel_mm": (1.0, 1.0)} | changes
    with pytest.raises(ValueError, match=message):
        find_spheres(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("radius_mm", [0.0, -1.0, 8.0, np.nan])
def test_labels_refuse_other_radii(radius_mm: float) -> None:
    scene = Scene()
    spheres = found(find_spheres(scene.draw(truth("t1", "T1")), scene.pixel_mm, quantity="T1"))
    with pytest.raises(ValueError, match=r"radius of the regions .* 7\.5 mm"):
        sphere_labels(spheres, scene.shape, scene.pixel_mm, radius_mm=radius_mm)


# Some numbers of the paper's tables: plate, field, sphere, T1, T2.
@pytest.mark.parametrize(
    ("plate", "field_t", "number", "t1_ms", "t2_ms"),
    [
        ("t1", 3.0, 1, 1989.0, 1465.0),
        ("t1", 3.0, 14, 21.719, 15.83),
        ("t1", 1.5, 6, 367.9, 321.2),
        ("t2", 3.0, 8, 608.6, 46.42),
        ("t2", 1.5, 14, 83.33, 8.15),
    ],
)
def test_version_1(plate: Plate, field_t: float, number: int, t1_ms: float, t2_ms: float) -> None:
    values = reference(plate, field_t=field_t)
    assert values.t1_ms[number - 1] == t1_ms
    assert values.t2_ms[number - 1] == t2_ms
    assert values.names[number - 1] == f"{'Ni' if plate == 't1' else 'Mn'}-{number}"
    assert len(values.names) == len(values.t1_ms) == len(values.t2_ms) == 14


@pytest.mark.parametrize("field_t", [1.5, 3.0])
@pytest.mark.parametrize("plate", ["t1", "t2"])
def test_times_fall_from_sphere_to_sphere(plate: Plate, field_t: float) -> None:
    _, t1_ms, t2_ms = reference(plate, field_t=field_t)
    assert (np.diff(t1_ms) < 0).all()
    assert (np.diff(t2_ms) < 0).all()
    assert (t2_ms < t1_ms).all()


def test_version_2_over_temperature() -> None:
    at = {c: reference("t1", version=2, temperature_c=c) for c in (16.0, 19.0, 20.0, 26.0, 18.0)}
    assert at[20.0].t1_ms[[0, 13]] == pytest.approx([1883.97, 21.44])
    assert at[16.0].t1_ms[5] == pytest.approx(343.00)
    assert at[26.0].t1_ms[9] == pytest.approx(85.28)
    # Monotone between neighbours, and not one of them.
    for n in range(14):
        ends = sorted((at[18.0].t1_ms[n], at[20.0].t1_ms[n]))
        assert ends[0] < at[19.0].t1_ms[n] < ends[1]
    assert np.isnan(at[20.0].t2_ms).all()


@pytest.mark.parametrize(
    ("plate", "arguments", "message"),
    [
        ("t3", {}, 'plate is "t3"'),
        ("t1", {"version": 3}, "version is 3: expected 1 or 2"),
        ("t1", {"temperature_c": 22.0}, "at 20 °C only, not at 22 °C"),
        ("t1", {"temperature_c": np.nan}, "20 °C"),
        ("t2", {"field_t": 7.0}, "1.5 T and 3 T, not at 7 T"),
        ("t1", {"field_t": 2.89}, "not at 2.89 T"),
        ("t2", {"version": 2}, "only T1 of the T1 plate at 3 T is known, not the T2 plate at 3 T"),
        ("t1", {"version": 2, "field_t": 1.5}, "not the T1 plate at 1.5 T"),
        ("t1", {"version": 2, "temperature_c": 15.9}, "from 16 to 26 °C, not at 15.9 °C"),
        ("t1", {"version": 2, "temperature_c": np.nan}, "from 16 to 26 °C"),
    ],
)
def test_what_is_not_known_is_no_number(plate: Plate, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference(plate, **arguments)  # type: ignore[arg-type]


needs_data = pytest.mark.skipif(
    not (DATA / "nist").is_dir() or not (DATA / "qa").is_dir(),
    reason=f"no {DATA.name} folder: tables, images",
)


@needs_data
def test_values_are_those_of_the_tables() -> None:
    with (DATA / "nist/nist_system_phantom_v1_20C.csv").open() as file:
        rows = {row["sphere"]: row for row in csv.DictReader(file)}
    for plate in ("t1", "t2"):
        for field_t, column in ((1.5, "1p5T"), (3.0, "3T")):
            names, t1_ms, t2_ms = reference(plate, field_t=field_t)
            assert list(t1_ms) == [float(rows[name][f"T1_{column}_ms"]) for name in names]
            assert list(t2_ms) == [float(rows[name][f"T2_{column}_ms"]) for name in names]
        # Places, to the 0.1 mm to which they are written down.
        wanted = [(float(rows[name]["x_mm"]), -float(rows[name]["z_mm"])) for name in names]
        assert Scene().places_mm() == pytest.approx(np.array(wanted), abs=0.06)
    with (DATA / "nist/nist_T1plate_v2_temperature_3T.csv").open() as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            for temperature in ("16", "18", "20", "22", "24", "26"):
                t1_ms = reference("t1", version=2, temperature_c=float(temperature)).t1_ms
                assert t1_ms[int(row["sphere"]) - 1] == pytest.approx(float(row[temperature]))


@needs_data
@pytest.mark.parametrize("name", ["Plate4_T1_signed", "Plate4_T2", "Plate5_T1_signed", "Plate5_T2"])
def test_real_images(name: str) -> None:
    """Spin echo and signed inversion recovery of both plates; the numbers were read off by eye."""
    pydicom = pytest.importorskip("pydicom")
    file = pydicom.dcmread(DATA / f"qa/{name}.dcm")
    image = file.pixel_array * float(file.get("RescaleSlope", 1)) + float(file.get("RescaleIntercept", 0))
    dy, dx = (float(size) for size in file.PixelSpacing)
    spheres = found(find_spheres(image, (dx, dy)))
    # Row and column of spheres 1, 4, 6, 8, 11 and 14, read off a picture to about a pixel and a half.
    wanted = [(56, 94.5), (105, 134), (133, 98), (108, 60), (80, 80.5), (110.5, 81)]
    assert spheres.centres[[0, 3, 5, 7, 10, 13]] == pytest.approx(np.array(wanted), abs=2)
    assert not spheres.mirrored
    assert spheres.residual_mm < CENTRE_MM
    # The scanner corrects distortion, the phantom is made to 0.1 mm.
    assert spheres.scale == pytest.approx(1, abs=0.01)
    # The same from behind. Half a step of the grid of the search could come of the other borders.
    behind = found(find_spheres(image[:, ::-1], (dx, dy)))
    assert behind.mirrored
    centres = behind.centres * (1, -1) + (0, image.shape[1] - 1)
    assert centres == pytest.approx(spheres.centres, abs=0.6 / dx)
    # Each region lies within its sphere: wall and water, far off in value, would show.
    labels = sphere_labels(spheres, image.shape, (dx, dy))
    spread = [image[labels == number].std() for number in range(1, 15)]
    assert max(spread) < 0.05 * np.ptp(image)
