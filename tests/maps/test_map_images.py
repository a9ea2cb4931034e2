"""The images that leave the program: every row of the contract, and what receivers stumble over."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import ismrmrd
import numpy as np
import pytest

import whorl
from scan_edit import QUANTITIES, Result, Scan
from whorl.config import Settings
from whorl.doors.files import ResultFile, read_images
from whorl.maps.images import ImageMaker, Provenance, SliceMaps
from whorl.scan.header import Space
from whorl.scan.readout import HEAD_DTYPE

SPACE = Space((6, 5, 1), (60.0, 50.0, 5.0))


def maps(scale: float = 1.0) -> SliceMaps:
    """5 × 6 pixels with a rim of zeros and values that tell the quantities apart."""
    inside = np.zeros((5, 6), np.float32)
    inside[1:-1, 1:-1] = 1
    ramp = np.arange(30, dtype=np.float32).reshape(5, 6) * inside
    return SliceMaps(inside * 1000.4 + ramp, inside * 80.06 + ramp, scale * (inside + ramp), 0.97 * inside)


def head(slice_number: int = 0) -> np.void:
    heads = np.zeros(1, HEAD_DTYPE)
    heads["idx"]["slice"] = slice_number
    heads["position"] = (1.5, -2.5, 7)
    heads["read_dir"], heads["phase_dir"], heads["slice_dir"] = (0, 1, 0), (0, 0, 1), (1, 0, 0)
    heads["measurement_uid"], heads["acquisition_time_stamp"] = 77, 123456
    heads["physiology_time_stamp"] = (3, 2, 1)
    heads["patient_table_position"] = (0, 0, -900)
    return heads[0]


def provenance(**changes: object) -> Provenance:
    values = {
        "method": "inr",
        "status": "complete",
        "notes": (),
        "settings": "abc",
        "protocol_name": "MRF",
        "seconds": {"fit": 1.25},
    }
    return Provenance(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def images() -> list[ismrmrd.Image]:
    return ImageMaker(SPACE, "uint16").images(maps(), head(3), provenance())


def test_header_fields(images: list[ismrmrd.Image]) -> None:
    assert [image.image_series_index for image in images] == [1, 2, 3, 4]
    assert [image.image_index for image in images] == [1, 2, 3, 4]
    for image in images:
        assert image.data.dtype == np.uint16
        assert image.data.shape == (1, 1, 5, 6)
        assert tuple(image.matrix_size) in ((6, 5, 1), (1, 5, 6))
        assert image.image_type == ismrmrd.IMTYPE_MAGNITUDE
        assert image.slice == 3
        assert list(image.position) == [1.5, -2.5, 7]
        assert list(image.read_dir) == [0, 1, 0]
        assert list(image.phase_dir) == [0, 0, 1]
        assert list(image.slice_dir) == [1, 0, 0]
        assert list(image.field_of_view) == [60, 50, 5]
        assert (image.measurement_uid, image.acquisition_time_stamp) == (77, 123456)
        assert list(image.physiology_time_stamp) == [3, 2, 1]
        assert list(image.patient_table_position) == [0, 0, -900]


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_pixels_times_slope_are_the_physical_values(dtype: str) -> None:
    truth = maps()
    made = ImageMaker(SPACE, dtype).images(truth, head(), provenance())
    for image, values in zip(made, (truth.t1_ms, truth.t2_ms, truth.m0, truth.quality), strict=True):
        slope, intercept = float(image.meta["RescaleSlope"]), float(image.meta["RescaleIntercept"])
        # Half a step of the integers.
        tolerance = 0.501 * slope if dtype == "uint16" else 0
        np.testing.assert_allclose(image.data[0, 0] * slope + intercept, values, atol=tolerance, rtol=0)
        assert image.data.dtype == dtype
        if dtype == "float32":
            assert (slope, intercept) == (1, 0)


def test_slopes_units_and_roles(images: list[ismrmrd.Image]) -> None:
    assert [image.meta["GADGETRON_DataRole"] for image in images] == list(QUANTITIES)
    assert [image.meta["Units"] for image in images] == ["ms", "ms", "a.u.", "1"]
    slopes = [float(image.meta["RescaleSlope"]) for image in images]
    assert slopes[:2] == [1, 0.1]
    assert slopes[3] == 0.001
    for image, slope in zip(images, slopes, strict=True):
        assert image.meta["DataRole"] == "Quantitative"
        assert float(image.meta["GADGETRON_ScaleRatio"]) == pytest.approx(1 / slope)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_windows_are_integers_that_show_the_map(dtype: str, scale: float) -> None:
    for image in ImageMaker(SPACE, dtype).images(maps(scale), head(), provenance()):
        window = [image.meta[name] for name in ("WindowCenter", "WindowWidth")]
        stored = [image.meta["GADGETRON_" + name] for name in ("WindowCenter", "WindowWidth")]
        assert all(text.isdigit() and int(text) > 0 for text in (*window, *stored))
        if dtype == "uint16":
            low, high = int(stored[0]) - int(stored[1]) / 2, int(stored[0]) + int(stored[1]) / 2
            assert low < np.median(image.data[image.data > 0]) < high
        role = image.meta["GADGETRON_DataRole"]
        if role in ("T1", "T2"):
            assert [int(text) for text in stored] == pytest.approx(
                [int(text) / float(image.meta["RescaleSlope"]) for text in window]
            )
        elif role == "M0" and dtype == "uint16":
            assert stored == ["2000", "4000"]


def test_m0_keeps_the_scale_of_the_first_slice_and_is_clipped() -> None:
    maker = ImageMaker(SPACE, "uint16")
    first, brighter, bright = (
        maker.images(maps(s), head(n), provenance())[2] for n, s in enumerate((1, 2, 99))
    )
    positive = maps().m0[maps().m0 > 0]
    assert float(first.meta["RescaleSlope"]) == pytest.approx(np.percentile(positive, 99.5) / 4000)
    assert first.meta["RescaleSlope"] == brighter.meta["RescaleSlope"] == bright.meta["RescaleSlope"]
    np.testing.assert_allclose(brighter.data, 2.0 * first.data, atol=1.5)
    assert bright.data.max() == 32767


def test_a_first_slice_without_signal_does_not_fix_the_scale() -> None:
    maker = ImageMaker(SPACE, "uint16")
    zero = maker.images(maps(0), head(0), provenance())[2]
    real = maker.images(maps(1e-3), head(1), provenance())[2]
    assert float(zero.meta["RescaleSlope"]) > 0
    assert float(real.data.max()) == pytest.approx(4000, rel=0.02)


def test_no_pixel_of_the_object_is_zero_and_none_outside_is_not() -> None:
    dark = maps()
    dark.m0[2, 2] = 1e-7 * dark.m0.max()
    dark.quality[3, 3] = 0
    dark.t1_ms[1, 1] = 99_999
    made = ImageMaker(SPACE, "uint16").images(dark, head(), provenance())
    for image in made:
        np.testing.assert_array_equal(image.data[0, 0] > 0, dark.t1_ms > 0)
    assert made[0].data.max() == 32767


def test_indices_are_unique_over_slices() -> None:
    maker = ImageMaker(SPACE, "uint16")
    made = [image for n in range(5) for image in maker.images(maps(), head(n), provenance())]
    assert len({image.image_index for image in made}) == 20
    assert min(image.image_index for image in made) == 1


def test_what_is_said_about_an_image(images: list[ismrmrd.Image]) -> None:
    meta = images[1].meta
    assert meta["SeriesDescription"] == "MRF_T2"
    assert meta["SequenceDescriptionAdditional"] == "T2_whorl"
    assert meta["GADGETRON_SeqDescription"] == "_T2_whorl"
    assert list(meta["GADGETRON_ImageProcessingHistory"]) == ["whorl", "inr"]
    assert meta["Keep_image_geometry"] == "1"
    for name in ("ImageComments", "ImageComment", "GADGETRON_ImageComment"):
        assert meta[name] == "T2 map (ms), whorl inr, complete"
    assert [float(v) for v in meta["ImageRowDir"]] == [0, 1, 0]
    assert [float(v) for v in meta["ImageColumnDir"]] == [0, 0, 1]
    assert (meta["whorl_version"], meta["whorl_method"], meta["whorl_settings"], meta["whorl_status"]) == (
        whorl.__version__, "inr", "abc", "complete",
    )  # fmt: skip
    assert "fit=1.250" in meta["whorl_seconds"]


def test_reasons_stand_in_comment_and_notes() -> None:
    notes = ("6 of 120 readouts are missing", "not whitened")
    for image in ImageMaker(SPACE, "uint16").images(
        maps(), head(), provenance(status="degraded", notes=notes)
    ):
        assert image.meta["whorl_status"] == "degraded"
        assert image.meta["whorl_notes"] == "; ".join(notes)
        assert all(note in image.meta["ImageComments"] for note in notes)


def test_odd_characters_survive_and_the_text_is_ascii(tmp_path: Path) -> None:
    name = 'Schädel & "Hirn" <T1> ±1 µs 頭'
    # DICOM's default characters, without accents.
    plain = 'Schadel & "Hirn" <T1> ?1 ?s ?'
    made = ImageMaker(SPACE, "uint16").images(
        maps(), head(), provenance(protocol_name=name, notes=("×2 ≥ 1 & <b>",))
    )
    path = tmp_path / "maps.h5"
    with ResultFile(path, b"<ismrmrdHeader/>") as result:
        for image in made:
            assert image.attribute_string.isascii()
            ET.fromstring(image.attribute_string)  # which refuses what XML forbids
            result.append(image)
    for image in (*made, *read_images(path)):
        role = {"QUALITY": "quality"}.get(image.meta["GADGETRON_DataRole"], image.meta["GADGETRON_DataRole"])
        assert image.meta["SeriesDescription"] == f"{plain}_{role}"
        assert image.meta["whorl_notes"] == "?2 ? 1 & <b>"


# --- As the pipeline sends them -----------------------------------------------------------------------


def test_the_pipeline_fills_them_in(untouched: Result, scan: Scan) -> None:
    first = scan.heads[scan.imaging[0]]
    for role in QUANTITIES:
        image = untouched.of(role)
        assert image.data.shape == (1, 1, 64, 64)
        assert list(image.field_of_view) == [300, 300, 5]
        assert list(image.position) == list(first["position"])
        assert image.acquisition_time_stamp == first["acquisition_time_stamp"]
        assert image.meta["whorl_method"] == "lowrank"
        assert image.meta["whorl_status"] == "complete"
        assert image.meta["whorl_settings"] == Settings.from_properties({"method": "lowrank"}).digest()
        assert str(image.meta["SeriesDescription"]).startswith("whorl simulation nist t2_")
    assert untouched.of("M0").data.max() <= 32767
    inside = untouched.of("M0").data[untouched.of("M0").data > 0]
    assert np.percentile(inside, 99.5) == pytest.approx(4000, rel=0.01)
    # One object, whole and alone, in all four maps.
    masks = [untouched.of(role).data > 0 for role in QUANTITIES]
    assert all((mask == masks[0]).all() for mask in masks)


def test_the_protocol_name_of_a_real_scanner(scan: Scan) -> None:
    scan.header = scan.header.replace(b"whorl simulation nist t2", "Schädel &amp; &lt;Hals&gt;".encode())
    scan.header = scan.header.replace(b'encoding="ascii"', b'encoding="UTF-8"')
    image = scan.run().of("T1")
    assert image.meta["SeriesDescription"] == "Schadel & <Hals>_T1"
    assert image.attribute_string.isascii()


def test_two_slices_and_physical_values(scan: Scan, untouched: Result) -> None:
    scan.two_slices(second_scale=30)
    integers, physical = scan.copy().run(), scan.run(output_dtype="float32")
    assert len({image.image_index for image in integers.images}) == 8
    assert list(integers.of("T1", 1).position) == [1.5, -2.5, 5]
    assert integers.of("M0", 0).meta["RescaleSlope"] == integers.of("M0", 1).meta["RescaleSlope"]
    assert integers.of("M0", 1).data.max() == 32767
    for role, atol in (("T1", 0.51), ("T2", 0.051), ("QUALITY", 0.00051)):
        assert physical.of(role).data.dtype == np.float32
        assert float(physical.of(role).meta["RescaleSlope"]) == 1
        np.testing.assert_allclose(physical.of(role).data[0, 0], integers.physical(role), atol=atol, rtol=0)
    # Not clipped.
    ratio = physical.of("M0", 1).data.max() / physical.of("M0", 0).data.max()
    assert ratio == pytest.approx(30, rel=0.02)
