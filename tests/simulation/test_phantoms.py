"""The objects lie where they should and are made of what the literature says."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from scipy import ndimage

from whorl.simulation import phantoms
from whorl.simulation.phantoms import (
    brain,
    coil_maps,
    fine_positions,
    nist_plate,
    off_resonance,
    phase_jump,
    textured_brain,
    transmit_field,
    with_fat,
)

needs_nilearn = pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None, reason="the brain phantom needs nilearn"
)


@pytest.mark.parametrize("n", [16, 17])
def test_fine_samples_lie_evenly_in_their_pixel(n: int) -> None:
    positions = fine_positions(n).reshape(n, 2)
    np.testing.assert_allclose(positions.mean(axis=1), np.arange(n) - n // 2)
    np.testing.assert_allclose(np.diff(positions, axis=1), 0.5)


# Copied from Stupic 2021, not from the program: sphere, x, z (mm), T1, T2 (ms).
@pytest.mark.parametrize(
    ("plate", "sphere", "x", "z", "t1", "t2"),
    [
        ("t2", 1, 0.0, 50.0, 2480.0, 581.3),
        ("t2", 7, -29.4, -40.5, 801.7, 64.07),
        ("t2", 14, -20.0, -20.0, 90.9, 5.592),
        ("t1", 3, 47.6, 15.5, 984.1, 717.9),
        ("t1", 12, 20.0, 20.0, 44.53, 31.86),
    ],
)
@pytest.mark.parametrize("matrix", [128, 129])
def test_spheres(plate: str, sphere: int, x: float, z: float, t1: float, t2: float, matrix: int) -> None:
    phantom = nist_plate(plate, matrix=matrix, fov_mm=280.0)
    assert phantom.fractions.shape == (1, 15, 2 * matrix, 2 * matrix)
    assert phantom.t1_ms[sphere] == t1
    assert phantom.t2_ms[sphere] == t2
    disc = phantom.fractions[0, sphere].astype(float)
    places = fine_positions(matrix) * 280 / matrix
    # x to the right, z upwards, that is against the rows; the object lies 2.3 and -3.1 mm off.
    assert (disc.sum(axis=0) @ places) / disc.sum() == pytest.approx(x + 2.3, abs=0.1)
    assert (disc.sum(axis=1) @ places) / disc.sum() == pytest.approx(-z - 3.1, abs=0.1)
    # Anti-aliased edges keep the area of a disc of 15 mm.
    assert disc.sum() * (280 / matrix / 2) ** 2 == pytest.approx(np.pi * 7.5**2, rel=0.02)


def test_fractions_never_exceed_one_and_edges_are_smooth() -> None:
    phantom = nist_plate("t2", matrix=64)
    total = phantom.fractions.sum(axis=1)
    assert total.max() <= 1 + 1e-6
    assert phantom.fractions.min() >= 0
    # Between water and sphere nothing is missing.
    middle = np.abs(fine_positions(64)) < 14
    np.testing.assert_allclose(total[0][np.ix_(middle, middle)], 1, atol=1e-6)
    assert np.any((total > 0.1) & (total < 0.9))


def test_outer_slices_cut_smaller_discs() -> None:
    area = nist_plate("t1", slices=3, matrix=64).fractions[:, 1:].sum(axis=(1, 2, 3))
    np.testing.assert_allclose(area / area[1], [5 / 9, 1, 5 / 9], rtol=0.05)  # (7.5² - 5²) / 7.5²


def test_small_fields_of_view_hold_the_whole_phantom() -> None:
    total = nist_plate("t2", matrix=64, fov_mm=100.0).fractions.sum(axis=(0, 1))
    assert total[:2].max() == total[-2:].max() == total[:, :2].max() == total[:, -2:].max() == 0


@pytest.mark.parametrize("matrix", [16, 32, 64, 256])
def test_every_sphere_has_a_label_that_keeps_off_its_edge(matrix: int) -> None:
    phantom = nist_plate("t2", matrix=matrix)
    share = phantom.on_pixels()
    labels = phantom.labels(share)
    if matrix >= 32:  # pixels of at most 9.4 mm
        assert set(np.unique(labels)) == set(range(15))
    for n in range(1, 15):
        assert np.all(share[0, n][labels[0] == n] > 0.5)
        if matrix == 256:
            inside = np.argwhere(labels[0] == n)
            assert len(inside) > 50
            assert all(share[0, n, y - 1 : y + 2, x].min() > 0.95 for y, x in inside)


@needs_nilearn
def test_brain_lies_as_radiologists_see_it() -> None:
    phantom = brain(matrix=100, fov_mm=250.0)
    white, grey, csf = phantom.fractions[0]
    assert phantom.fractions.sum(axis=1).max() <= 1.01
    # Against the map itself, voxel by voxel: column to the left (-x of MNI), row to the back (-y of MNI).
    maps = phantoms._mni_maps()
    places = fine_positions(100) * 2.5
    rng = np.random.default_rng(1)
    for row, column in rng.integers(60, 140, (200, 2)):
        x, y, z = -(places[column] - 2.3), -(places[row] + 3.1 + 18.0), 10.0
        voxel = (x + 98, y + 134, z + 72)  # origin of the 1 mm maps
        low = np.floor(voxel).astype(int)
        around = maps[0][low[0] : low[0] + 2, low[1] : low[1] + 2, low[2] : low[2] + 2]
        assert around.min() - 1e-5 <= white[row, column] <= around.max() + 1e-5
    assert white.sum() > 0
    assert grey.sum() > 0
    assert csf.sum() > 0
    np.testing.assert_array_equal(phantom.t1_ms, [832, 1350, 4000])
    np.testing.assert_array_equal(phantom.t2_ms, [60, 85, 1500])


@needs_nilearn
def test_texture_varies_as_told_and_over_millimetres() -> None:
    phantom = textured_brain(slices=2, matrix=100, fov_mm=250.0)
    assert phantom.t1_factor is not None
    assert phantom.t2_factor is not None
    # Lesions take room and leave the outline as it is, but for rounding.
    outline = brain(slices=2, matrix=100, fov_mm=250.0).fractions.sum(axis=1)
    np.testing.assert_allclose(phantom.fractions.sum(axis=1), outline, atol=1e-6)
    for factor, sd in ((phantom.t1_factor, 0.05), (phantom.t2_factor, 0.10)):
        field = np.log(factor)
        assert factor.shape == (2, 200, 200)
        # A field of view of 250 mm holds a few hundred independent values.
        np.testing.assert_allclose(field.std(axis=(1, 2)), sd, rtol=0.1)
        # Correlation over 6.25 mm: mean of exp(-d²/L²) of the three lengths.
        there, shifted = field[0, :, :-5].ravel(), field[0, :, 5:].ravel()
        expected = np.mean(np.exp(-((6.25 / np.array([3.0, 7.0, 15.0])) ** 2)))
        assert np.corrcoef(there, shifted)[0, 1] == pytest.approx(expected, abs=0.08)
    fields = [np.log(factor[z]).ravel() for factor in (phantom.t1_factor, phantom.t2_factor) for z in (0, 1)]
    assert np.abs(np.corrcoef(fields) - np.eye(4)).max() < 0.3  # independent of each other
    # Fluid is the same everywhere.
    np.testing.assert_array_equal(phantom.factors(2, 0), 1)
    np.testing.assert_array_equal(phantom.factors(0, 1)[..., 1], phantom.t2_factor[1])


@needs_nilearn
def test_texture_belongs_to_the_seed_and_not_to_the_image() -> None:
    coarse, fine = textured_brain(matrix=40), textured_brain(matrix=200)
    other = textured_brain(matrix=40, seed=1)
    assert coarse.t2_factor is not None
    assert fine.t2_factor is not None
    assert other.t2_factor is not None
    # Fine samples of 3.75 and 0.75 mm: every fifth lies where a large one does.
    there, here = (fine_positions(n) * 300 / n for n in (200, 40))
    np.testing.assert_allclose(there[3:-2:5], here[1:])
    np.testing.assert_allclose(fine.t2_factor[:, 3:-2:5, 3:-2:5], coarse.t2_factor[:, 1:, 1:], rtol=1e-9)
    assert abs(np.corrcoef(coarse.t2_factor.ravel(), other.t2_factor.ravel())[0, 1]) < 0.3


@needs_nilearn
@pytest.mark.parametrize("seed", [0, 1])
def test_lesions_lie_in_white_matter_apart_from_each_other(seed: int) -> None:
    phantom = textured_brain(seed=seed)
    white = brain().fractions[0, 0]
    lesion = phantom.fractions[0, 3]
    discs, count = ndimage.label(lesion > 0.01)
    assert count == 14
    assert white[ndimage.binary_dilation(lesion > 0.01)].min() > 0.9
    # Radii from 1.5 to 4 pixels, two fine samples each, as far as areas of samples tell.
    radii = np.sqrt(np.sort(ndimage.sum(lesion, discs, range(1, 15))) / np.pi) / 2
    np.testing.assert_allclose(radii, np.linspace(1.5, 4, 14), rtol=0.05)
    labels = phantom.labels(phantom.on_pixels())[0]
    in_discs = discs.reshape(256, 2, 256, 2).min(axis=(1, 3))
    assert np.all(in_discs[labels == 4] > 0)
    assert set(in_discs[labels == 4]) == set(range(1, 15))  # each has a pixel of its own
    assert phantom.t2_ms[3] == pytest.approx(1.8 * 60)
    assert phantom.t1_ms[3] == phantom.t1_ms[0]


@needs_nilearn
def test_brain_slices_differ_and_fit() -> None:
    phantom = brain(slices=21, matrix=32, fov_mm=220.0)
    tissue = phantom.fractions.sum(axis=(1, 2, 3))
    assert len(tissue) == 21
    assert tissue.min() > 0.1 * tissue.max()
    edges = phantom.fractions.sum(axis=1)
    assert edges[:, 0].max() == edges[:, -1].max() == edges[:, :, 0].max() == edges[:, :, -1].max() == 0
    labels = phantom.labels(phantom.on_pixels())
    assert set(np.unique(labels)) == {0, 1, 2, 3}


def test_brain_without_nilearn_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'whorl-mrf\[demo\]'"):
        brain()


@pytest.mark.parametrize("coils", [1, 2, 5, 8, 32])
def test_coil_maps_are_smooth_and_different(coils: int) -> None:
    maps = coil_maps(coils, matrix=32, fov_mm=300.0)
    assert maps.shape == (coils, 64, 64)
    together = np.sqrt(np.sum(np.abs(maps) ** 2, axis=0))
    assert together.max() == pytest.approx(1)
    head = np.hypot(*np.meshgrid(fine_positions(32), fine_positions(32))) * 300 / 32 < 90
    assert together[head].min() > 0.05
    # Steps of 4.7 mm, coils of 60 mm: the field falls by half over such a distance.
    assert max(np.abs(np.diff(maps, axis=axis)).max() for axis in (1, 2)) < 0.2
    # No coil is a mixture of the others.
    flat = maps.reshape(coils, -1)
    spectrum = np.linalg.svd(flat, compute_uv=False)
    assert spectrum[min(coils, 8) - 1] > 0.3 * spectrum[0]


@pytest.mark.parametrize("matrix", [64, 65])
def test_transmit_field_spans_its_range_smoothly_and_has_no_symmetry(matrix: int) -> None:
    x, y = np.meshgrid(fine_positions(matrix), fine_positions(matrix))
    inside = np.hypot(x, y) < 0.4 * matrix
    field = transmit_field(0.2, inside)
    assert field.shape == inside.shape
    assert field[inside].min() == pytest.approx(0.8)
    assert field[inside].max() == pytest.approx(1.2)
    assert field[inside].mean() == pytest.approx(1, abs=0.1)
    assert field[np.hypot(x, y) < 0.1 * matrix].mean() > 1.1  # bright in the middle
    # From 1.2 to 0.8 over half a field of view of 64 samples.
    assert max(np.abs(np.diff(field, axis=axis)).max() for axis in (0, 1)) < 0.03
    for turned in (field[::-1], field[:, ::-1], field.T, field[::-1, ::-1], field[::-1].T, field[:, ::-1].T):
        assert np.abs(turned - field)[inside].max() > 0.05
    np.testing.assert_allclose(transmit_field(0.4, inside) - 1, 2 * (field - 1), atol=1e-12)
    np.testing.assert_array_equal(transmit_field(0.0, inside), 1)


@pytest.mark.parametrize("matrix", [64, 65])
def test_off_resonance_is_smooth_and_spans_its_range_with_a_bump_in_front(matrix: int) -> None:
    x, y = np.meshgrid(fine_positions(matrix), fine_positions(matrix))
    inside = np.hypot(x / 0.8, y) < 0.4 * matrix
    field = off_resonance(50.0, inside)
    assert field[inside].min() == pytest.approx(-50)
    assert field[inside].max() == pytest.approx(50)
    row, _ = np.unravel_index(np.argmax(np.where(inside, field, -np.inf)), field.shape)
    assert y[row, 0] < -0.2 * matrix  # the front is at the top
    # 100 Hz over a few centimetres, which are a dozen fine samples.
    assert max(np.abs(np.where(inside, np.gradient(field, axis=axis), 0)).max() for axis in (0, 1)) < 10
    assert abs(field[inside].mean()) < 25
    np.testing.assert_array_equal(off_resonance(0.0, inside), 0)


def test_phase_jumps_within_a_part_of_the_front() -> None:
    x, y = np.meshgrid(fine_positions(64), fine_positions(64))
    inside = np.hypot(x, y) < 25
    turned = phase_jump(1.3, inside) != 1
    np.testing.assert_allclose(phase_jump(1.3, inside)[turned], np.exp(1.3j))
    assert 0.05 < turned[inside].mean() < 0.3
    assert not turned[y > 0].any()


def test_fat_is_a_closed_ring_of_four_millimetres() -> None:
    thing = nist_plate("t2", matrix=200)
    fat = with_fat(thing, matrix=200)
    assert (fat.names[-1], fat.t1_ms[-1], fat.t2_ms[-1], fat.pd[-1]) == ("fat", 380, 70, 0.9)
    assert (fat.shift_of(0), fat.shift_of(15)) == (0, -440)
    assert fat.regions == thing.regions
    np.testing.assert_array_equal(fat.fractions[:, :15], thing.fractions)
    assert fat.fractions.sum(axis=1).max() <= 1 + 1e-6
    ring = fat.fractions[0, 15]
    radius = np.sqrt(100**2 - 16.5**2)
    area = np.pi * ((radius + 4) ** 2 - radius**2)
    assert ring.sum() * 0.75**2 == pytest.approx(area, rel=0.05)
    holes = ndimage.binary_fill_holes(ring > 0.3)
    assert holes.sum() * 0.75**2 == pytest.approx(np.pi * (radius + 4) ** 2, rel=0.02)


@pytest.mark.parametrize("coils", [1, 3])
def test_an_object_that_moves_sees_the_coils_farther_on(coils: int) -> None:
    still, moved = (coil_maps(coils, matrix=40, moved_pixels=way) for way in (0.0, 1.5))
    own_phase = coil_maps(1, matrix=40)
    np.testing.assert_allclose((moved / own_phase)[..., :-3], (still / own_phase)[..., 3:], atol=1e-12)


def test_transmit_field_of_a_single_sample_is_finite() -> None:
    inside = np.zeros((32, 32), dtype=bool)
    inside[3, 4] = True
    assert transmit_field(0.2, inside)[3, 4] == pytest.approx(1.2)
    np.testing.assert_array_equal(transmit_field(0.0, inside), 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nist_plate("t3"), 'plate is "t3"'),
        (lambda: nist_plate("t1", slices=4), "slices is 4"),
        (lambda: nist_plate("t1", slices=0), "slices is 0"),
        (lambda: brain(slices=22), "slices is 22.*1 to 21"),
        (lambda: coil_maps(0), "coils is 0"),
        (lambda: coil_maps(129), "coils is 129"),
    ],
)
def test_bad_values_are_named(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
