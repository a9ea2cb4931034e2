"""Both kinds of DICOM objects, as pydicom, dcmdump (DCMTK) and dciodvfy (dicom3tools) read them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from exports.results import (
    GAP_MM,
    MARK,
    N_X,
    N_Y,
    N_Z,
    T1_MS,
    T2_MS,
    XML,
    directions,
    extras,
    make_images,
    marked_lps,
    positions,
    slice_maps,
)
from whorl import __version__
from whorl.exports import Facts, dicom, facts_of
from whorl.maps.volumes import volumes
from whorl.scan.failure import ScanError

#: Directions of single precision over 300 mm, and DS has 16 characters.
PLACE_MM = 1e-3


def place(
    position: Dataset, orientation: Dataset, spacing: Dataset, column: int, row: int
) -> NDArray[np.float64]:
    """LPS of a pixel, DICOM PS3.3 C.7.6.2.1-1: X is along the row, i its column index, Δi the distance of
    columns, which is the second value of Pixel Spacing."""
    x, y = np.array(orientation[:3], float), np.array(orientation[3:], float)
    delta_j, delta_i = (float(v) for v in spacing)
    return np.array(position, float) + x * delta_i * column + y * delta_j * row


def complaints(path: Path) -> tuple[list[str], list[str]]:
    """Errors and warnings of dciodvfy; dcmdump must read it all."""
    for program in ("dcmdump", "dciodvfy"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed (dcmtk, dicom3tools)")
    dump = subprocess.run(["dcmdump", str(path)], capture_output=True, timeout=60)
    assert dump.returncode == 0, dump.stderr
    assert not dump.stderr
    assert b"PixelData" in dump.stdout
    checked = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, timeout=60)
    lines = (checked.stdout + checked.stderr).decode(errors="replace").splitlines()
    assert lines
    return [li for li in lines if li.startswith("Error")], [li for li in lines if li.startswith("Warning")]


@pytest.mark.parametrize("left_handed", [False, True], ids=["right-handed", "left-handed"])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_pixel_of_an_mr_image(left_handed: bool, dtype: str, tmp_path: Path) -> None:
    found = volumes(make_images(left_handed, dtype))
    paths, _ = dicom.write(found, facts_of(XML), tmp_path, mr_images=True)
    assert len(paths) == 5 * N_Z
    for name, value, step in (("T1map", T1_MS, 1.0), ("T2map", T2_MS, 0.1)):
        series = [pydicom.dcmread(p) for p in sorted((tmp_path / name).iterdir())]
        stack = np.stack(
            [s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in series]
        )  # (Z, Y, X)
        column, row, n = MARK
        # Half a step of the stored integers, and none of them far off.
        assert stack[n, row, column] == pytest.approx(value, abs=0.51 * step)
        assert np.argwhere(np.abs(stack - value) < 0.6 * step).tolist() == [[n, row, column]]
        s = series[n]
        got = place(s.ImagePositionPatient, s.ImageOrientationPatient, s.PixelSpacing, column, row)
        np.testing.assert_allclose(got, marked_lps(left_handed), atol=PLACE_MM)
        assert (s.Rows, s.Columns) == (N_Y, N_X)
        assert [float(v) for v in s.PixelSpacing] == [18, 15]
        assert float(s.SliceThickness) == 4
        assert float(s.SpacingBetweenSlices) == pytest.approx(GAP_MM, abs=1e-4)
        expected = {"T1map": slice_maps(False).t1_ms, "T2map": slice_maps(False).t2_ms}[name]
        np.testing.assert_allclose(stack[0], expected, atol=0.51 * step)


@pytest.mark.parametrize("left_handed", [False, True], ids=["right-handed", "left-handed"])
def test_a_pixel_of_a_parametric_map(left_handed: bool, tmp_path: Path) -> None:
    paths, _ = dicom.write(volumes(make_images(left_handed)), facts_of(XML), tmp_path)
    assert len(paths) == 5
    for name, value, code in (("T1map", T1_MS, "113063"), ("T2map", T2_MS, "113065")):
        ds = pydicom.dcmread(tmp_path / f"{name}.dcm")
        values = ds.pixel_array
        assert values.dtype == np.float32
        assert values.shape == (N_Z, N_Y, N_X)
        ((frame, row, column),) = np.argwhere(np.abs(values - value) < 0.06)
        assert (column, row) == MARK[:2]
        shared, own = ds.SharedFunctionalGroupsSequence[0], ds.PerFrameFunctionalGroupsSequence[frame]
        got = place(
            own.PlanePositionSequence[0].ImagePositionPatient,
            shared.PlaneOrientationSequence[0].ImageOrientationPatient,
            shared.PixelMeasuresSequence[0].PixelSpacing,
            *(int(column), int(row)),
        )
        np.testing.assert_allclose(got, marked_lps(left_handed), atol=PLACE_MM)
        mapping = shared.RealWorldValueMappingSequence[0]
        assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1, 0)
        assert mapping.MeasurementUnitsCodeSequence[0].CodeValue == "ms"
        assert mapping.MeasurementUnitsCodeSequence[0].CodingSchemeDesignator == "UCUM"
        quantity = mapping.QuantityDefinitionSequence[0].ConceptCodeSequence[0]
        assert (quantity.CodeValue, quantity.CodingSchemeDesignator) == (code, "DCM")
        # Nothing refers to the images that were made for their attributes only.
        assert "ReferencedSOPInstanceUID" not in str(ds)


#: What dciodvfy may warn of: viewers take units from Rescale, which the MR object does not list; QUANTITY,
#: which it does not know, is highdicom's; without a header nobody knows patient and side.
ALLOWED_WARNINGS = re.compile(
    r"Rescale(Slope|Intercept|Type).*not present in standard DICOM IOD"
    r"|Non-identity Modality LUT Module .* not expected to be present in standard MR IOD"
    r"|defined term = <QUANTITY>"
    r"|needed to build DICOMDIR|Laterality.*only permitted to be empty when actually unknown"
)


@pytest.mark.parametrize("facts", [facts_of(XML), Facts()], ids=["full header", "no header"])
@pytest.mark.parametrize("mr_images", [False, True], ids=["parametric map", "MR images"])
def test_other_programs_find_no_error(facts: Facts, mr_images: bool, tmp_path: Path) -> None:
    images = make_images()
    paths, said = dicom.write(volumes(images + extras(images)), facts, tmp_path, mr_images)
    assert len(said) == 1
    assert "SUBSPACE, T1_RGB" in said[0]
    checked = paths[::3] if mr_images else paths
    for path in checked:
        errors, warnings = complaints(path)
        assert errors == [], path.name
        assert [w for w in warnings if not ALLOWED_WARNINGS.search(w)] == []


@pytest.mark.parametrize("mr_images", [False, True], ids=["parametric map", "MR images"])
def test_patient_study_and_provenance(mr_images: bool, tmp_path: Path) -> None:
    (path, *_), _ = dicom.write(volumes(make_images()), facts_of(XML), tmp_path, mr_images)
    ds = pydicom.dcmread(path)
    assert (str(ds.PatientName), ds.PatientID, ds.PatientSex) == ("Müller^Eva", "AB-12_3", "F")
    assert (ds.PatientBirthDate, ds.StudyDate, ds.StudyTime) == ("19700228", "20260304", "102030")
    assert (ds.StudyInstanceUID, ds.FrameOfReferenceUID) == ("1.2.3.4.5.6", "1.2.3.4.5.7")
    assert ds.PatientPosition == "HFS"
    assert ds.SeriesDescription == "MRF head_T1"
    assert "degraded" in ds.ImageComments
    whorl, scanner = ds.ContributingEquipmentSequence
    assert whorl.SoftwareVersions == ds.SoftwareVersions == __version__
    for part in ("method: inr", "status: degraded", "settings: abc", "3 readouts / missing"):
        assert part in whorl.ContributionDescription
    assert (scanner.Manufacturer, scanner.ManufacturerModelName) == ("Vendor", "Model")
    if mr_images:
        assert list(ds.ImageType) == ["DERIVED", "SECONDARY", "T1 MAP"]
        assert (float(ds.WindowCenter), float(ds.WindowWidth)) == (1250, 2500)
        assert float(ds.MagneticFieldStrength) == 2.89


@pytest.mark.parametrize("mr_images", [False, True], ids=["parametric map", "MR images"])
def test_uids_follow_from_the_content(mr_images: bool, tmp_path: Path) -> None:
    def uids(folder: str, facts: Facts, **how: str) -> list[tuple[str, ...]]:
        paths, _ = dicom.write(volumes(make_images(**how)), facts, tmp_path / folder, mr_images)  # type: ignore[arg-type]
        headers = [pydicom.dcmread(p) for p in paths]
        return [
            (h.SOPInstanceUID, h.SeriesInstanceUID, h.StudyInstanceUID, h.FrameOfReferenceUID)
            for h in headers
        ]

    for folder in "abc":
        (tmp_path / folder).mkdir()
    first, again, other = uids("a", Facts()), uids("b", Facts()), uids("c", Facts(), status="complete")
    assert first == again
    assert len({u[0] for u in first}) == len(first)
    assert len({u[1] for u in first}) == 5
    assert len({u[2:] for u in first}) == 1
    assert not {u[0] for u in first} & {u[0] for u in other}


def test_negative_values_keep_their_sign(tmp_path: Path) -> None:
    images = [i for i in make_images(dtype="float32") if i.meta["GADGETRON_DataRole"] == "T1"]
    for image in images:
        image.data[..., 3, 5] = -250
    dicom.write(volumes(images), Facts(), tmp_path, mr_images=True)
    ds = pydicom.dcmread(tmp_path / "T1map" / "0001.dcm")
    value = ds.pixel_array[3, 5] * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
    # Half of 1 / 65535 of the range of 1484 ms.
    assert value == pytest.approx(-250, abs=0.012)


def test_a_slice_without_signal_does_not_set_the_scale_of_the_others(tmp_path: Path) -> None:
    images = [i for i in make_images() if i.meta["GADGETRON_DataRole"] == "M0"]
    for image in images:
        small = {"RescaleSlope": "1e-7"} if image.slice else {"RescaleSlope": "1.0"}
        image.data[...] = 4000 if image.slice else 0
        meta = image.meta
        meta.update(small)
        image.meta = meta
    dicom.write(volumes(images), Facts(), tmp_path, mr_images=True)
    empty, full = (pydicom.dcmread(tmp_path / "M0map" / f"000{n}.dcm") for n in (1, 2))
    assert not empty.pixel_array.any()
    value = full.pixel_array * float(full.RescaleSlope)
    # Half of 1 / 65535, and float32.
    np.testing.assert_allclose(value, 4e-4, rtol=1e-5)
    assert float(full.WindowWidth) == pytest.approx(4e-4, rel=1e-5)


def test_what_is_no_date_and_no_uid_is_left_out(tmp_path: Path) -> None:
    wrong = XML.replace(b"2026-03-04", b"2026-13-04").replace(b"1.2.3.4.5.6", b"1.02.x")
    paths, _ = dicom.write(volumes(make_images()), facts_of(wrong), tmp_path)
    ds = pydicom.dcmread(paths[0])
    assert ds.StudyDate == ""
    assert ds.StudyInstanceUID.is_valid
    assert ds.StudyInstanceUID != "1.02.x"


@pytest.mark.parametrize("mr_images", [False, True], ids=["parametric map", "MR images"])
@pytest.mark.parametrize("n_slices", [1, 3])
def test_one_slice_and_slices_of_unequal_distances(n_slices: int, mr_images: bool, tmp_path: Path) -> None:
    gaps = (5.5, 9.0)
    images = [i for i in make_images(gaps=gaps) if i.meta["GADGETRON_DataRole"] == "T1"]
    images = [i for i in images if i.slice < n_slices]
    paths, _ = dicom.write(volumes(images), facts_of(XML), tmp_path, mr_images)
    read = [pydicom.dcmread(p) for p in paths]
    frames = (
        read if mr_images else [f.PlanePositionSequence[0] for f in read[0].PerFrameFunctionalGroupsSequence]
    )
    # In any order of the frames: each has its place with it.
    got = sorted(([float(v) for v in f.ImagePositionPatient] for f in frames), key=directions(False)[2].dot)
    assert len(got) == n_slices
    for n, corner in enumerate(got):
        orientation = (
            read[0] if mr_images else read[0].SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
        ).ImageOrientationPatient
        centre = place(corner, orientation, ["18", "15"], N_X // 2, N_Y // 2)
        np.testing.assert_allclose(centre, positions(False, gaps)[n], atol=PLACE_MM)
    for path in paths:
        assert complaints(path)[0] == []


def test_nothing_to_export(tmp_path: Path) -> None:
    colours = [i for i in extras(make_images()) if i.meta["GADGETRON_DataRole"] in ("T1_RGB", "SUBSPACE")]
    with pytest.raises(ScanError, match="nothing can be exported"):
        dicom.write(volumes(colours), Facts(), tmp_path)
