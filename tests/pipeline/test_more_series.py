"""Series that are sent beside the maps when asked for: colour, subspace images, deviations, the fit."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import ismrmrd
import numpy as np
import pytest
from cmcrameri import cm

import whorl.pipeline.errors
from scan_edit import QUANTITIES, Result, Scan
from whorl.doors.files import ResultFile, read_images
from whorl.maps.volumes import volumes
from whorl.pipeline.fitting import chosen_iterations

QUICK = {"method": "inr", "iterations": 8, "levels": 4, "hidden": 24, "correction_steps": 1}
ALL = {"rgb": "true", "subspace_images": "true", "uncertainty": "true", "fit_frames": 4, "preview": "true"}


@pytest.fixture(scope="module")
def result(loaded_scan: Scan) -> Result:
    return loaded_scan.copy().run(**QUICK, **ALL)


def series(result: Result, number: int) -> list[ismrmrd.Image]:
    return [image for image in result.images if image.image_series_index == number]


def test_each_series_has_a_number_and_each_image_an_index(result: Result) -> None:
    assert result.outcome.exit_code == 0
    K = len(series(result, 31))
    assert K >= 3
    expected = dict.fromkeys((1, 2, 3, 4, 6, 7, 11, 12, 13, 14, 21, 22), 1)
    expected |= {31: K, 41: 4, 42: 4, 43: 4, 44: 4}
    assert Counter(int(image.image_series_index) for image in result.images) == expected
    assert len({image.image_index for image in result.images}) == len(result.images)
    # The maps do not wait for the rest.
    order = [int(image.image_series_index) for image in result.images]
    assert order[:8] == [11, 12, 13, 14, 1, 2, 3, 4]
    # Pixels that every receiver takes.
    kinds = {image.data.dtype.name for image in result.images}
    assert kinds <= {"uint16", "float32", "complex64"}


def test_what_is_sent_beside_the_maps_does_not_change_them(result: Result, scan: Scan) -> None:
    plain = scan.run(**QUICK)
    for role in QUANTITIES:
        np.testing.assert_array_equal(result.of(role).data, plain.of(role).data)


def test_nothing_more_is_sent_unless_it_is_asked_for(scan: Scan) -> None:
    assert {int(image.image_series_index) for image in scan.run(**QUICK).images} == {1, 2, 3, 4}


@pytest.mark.parametrize(("number", "role", "name"), [(21, "T1", "lipari"), (22, "T2", "navia")])
def test_colours_are_those_of_the_field(result: Result, number: int, role: str, name: str) -> None:
    (image,) = series(result, number)
    assert image.image_type == ismrmrd.IMTYPE_RGB
    assert image.data.shape == (3, 1, 64, 64)
    assert image.data.dtype == np.uint16
    assert image.data.max() <= 255
    values = result.physical(role)
    pixels = image.data[:, 0]
    assert (pixels[:, values == 0] == 0).all()
    meta = result.of(role).meta
    low = int(meta["WindowCenter"]) - int(meta["WindowWidth"]) / 2
    share = np.clip((values - low) / int(meta["WindowWidth"]), 0, 1)
    expected = 255 * np.moveaxis(getattr(cm, name)(share)[..., :3], -1, 0)
    inside = values > 0
    # A map's integer may fall into the next of 256 colours, which differs by a few.
    assert np.abs(pixels[:, inside] - expected[:, inside]).max() < 12
    assert image.meta["DataRole"] == "Image"


def test_without_the_colours_the_maps_come_and_it_is_said(
    scan: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from whorl.maps import images

    images.colour_table.cache_clear()
    monkeypatch.setitem(sys.modules, "cmcrameri", None)
    result = scan.run(method="lowrank", rgb="true")
    images.colour_table.cache_clear()
    assert result.slices() == [0]
    assert series(result, 21) == []
    assert any("no coloured maps" in note for note in result.outcome.notes)
    assert result.outcome.exit_code == 3


def test_subspace_images_are_what_the_maps_were_matched_to(result: Result) -> None:
    images = series(result, 31)
    assert [int(image.contrast) for image in images] == list(range(len(images)))
    assert all(image.image_type == ismrmrd.IMTYPE_COMPLEX for image in images)
    assert all(image.data.dtype == np.complex64 for image in images)
    stack = np.stack([image.data[0, 0] for image in images])
    inside = result.physical("T1") > 0
    assert (stack[:, ~inside] == 0).all()
    # M0 is the length of a voxel's coefficients, but for what no atom explains and the norm of the atom.
    power = np.linalg.norm(stack[:, inside], axis=0)
    m0 = result.physical("M0")[inside]
    assert np.corrcoef(np.log(power), np.log(m0))[0, 1] > 0.5
    assert np.ptp(np.angle(stack[0][inside])) > 0.1  # they have their phase again


def test_deviations_are_inside_the_object_only(result: Result) -> None:
    inside = result.physical("T1") > 0
    for role, number in (("T1", 6), ("T2", 7)):
        (image,) = series(result, number)
        values = image.data[0, 0] * float(image.meta["RescaleSlope"])
        np.testing.assert_array_equal(values > 0, inside)
        assert image.meta["Units"] == "ms"
        assert image.meta["GADGETRON_DataRole"] == f"{role}_SD"
        relative = values[inside] / result.physical(role)[inside]
        assert 1e-4 < np.median(relative) < 0.5


def test_what_cannot_be_made_costs_no_map(scan: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("odd")

    monkeypatch.setattr(whorl.pipeline.errors, "noise_variance", fail)
    result = scan.run(method="lowrank", uncertainty="true", rgb="true")
    assert result.slices() == [0]
    assert len(series(result, 21)) == 1
    assert series(result, 6) == []
    assert any("no uncertainty: odd" in note for note in result.outcome.notes)


def test_pictures_of_the_fit(result: Result) -> None:
    subspace, t1, features = (series(result, number) for number in (41, 42, 44))
    assert [image.meta["whorl_frame"] for image in t1][-1] == "sent"
    assert t1[0].meta["whorl_frame"] == "iteration 1"
    assert subspace[0].data.shape[0] == len(series(result, 31))
    assert features[0].data.shape[0] == 8
    np.testing.assert_allclose(t1[-1].data[0, 0], result.physical("T1"), atol=0.51)
    assert np.abs(t1[0].data - t1[-1].data).max() > 1


def test_a_fit_without_iterations_has_one_picture(scan: Scan) -> None:
    result = scan.run(method="inr", iterations=0, fit_frames=4)
    assert int(result.of("T1").meta["whorl_iterations"]) == 0
    for number in (41, 42, 43, 44):
        assert [image.meta["whorl_frame"] for image in series(result, number)] == ["sent"]
    (t1,), (features,) = series(result, 42), series(result, 44)
    np.testing.assert_allclose(t1.data[0, 0], result.physical("T1"), atol=0.51)
    assert np.ptp(features.data) > 0


def test_as_volumes_they_keep_their_meaning(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "all.h5"
    with ResultFile(path, b"<ismrmrdHeader/>") as file:
        for image in result.images:
            file.append(image)
    found = {(volume.role, volume.contrast): volume for volume in volumes(read_images(path))}
    for role in QUANTITIES:
        assert found[role, 0].values.shape == (1, 64, 64)
        np.testing.assert_allclose(found[role, 0].values[0], result.physical(role), rtol=1e-6)
        assert f"{role}_LOWRANK" in {name for name, _ in found}
    assert found["T1_RGB", 0].values.shape == (1, 3, 64, 64)
    assert found["SUBSPACE", 1].values.dtype == np.complex64


@pytest.mark.parametrize(("n_frames", "n_iterations"), [(0, 100), (5, 100), (16, 60), (2, 1), (3, 0)])
def test_chosen_iterations(n_frames: int, n_iterations: int) -> None:
    chosen = chosen_iterations(n_frames, n_iterations)
    if not n_iterations:
        assert chosen == set()
        return
    assert {1, n_iterations} <= chosen
    assert max(chosen) == n_iterations
    assert len(chosen) <= (n_frames or 80)


# --- What images say about how they were made -----------------------------------------------------------


def test_images_say_what_was_taken_from_where(scan: Scan) -> None:
    meta = scan.run(**QUICK, seed=3).of("T2").meta
    assert "train of 120 timepoints" in meta["whorl_resolved"]
    assert "matrix: 64" in meta["whorl_resolved"]
    assert '"seed": 3' in meta["whorl_changed"]
    assert '"iterations": 8' in meta["whorl_changed"]
    assert "torch=" in meta["whorl_versions"]
    assert int(meta["whorl_iterations"]) == 8
    assert len(meta["whorl_losses"].split()) == 9  # the last one is that of the end
    assert meta["whorl_flags"] in (None, "", "uneven_order")


def test_flags_for_programs(scan: Scan) -> None:
    result = scan.without(scan.imaging[[5, 9, 50]]).run(method="inr", deadline_s=1e-6)
    flags = result.of("T1").meta["whorl_flags"].split()
    assert {"fallback", "readouts_lost=3"} <= set(flags)
