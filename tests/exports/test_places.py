"""Maps in the formats of other programs, read by these programs: the right numbers at the right places.

An object with another letter in each corner is scanned in double-oblique slices off the centre, with a matrix
that is not square, reconstructed, and exported. Where its parts lie is computed here from the angles alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from scan_edit import Scan
from whorl.cli import main
from whorl.doors.files import ResultFile, read_images
from whorl.simulation.scan import simulate
from whorl.simulation.truth import read_truth

TURNED_DEG, CENTRE_MM = (20.0, -35.0, 50.0), (12.0, -25.0, 40.0)
SLICE_MM, MATRIX, FOV_MM = 5.0, 128, 300.0
#: What is reconstructed: a part of the field of view, whose middle is the same.
RECON = (104, 128)
UID = "1.2.826.0.1.3680043.8.498.1"
HEADER = (
    ("<subjectInformation>", "<patientName>Doe^Jane</patientName>", "<patientID>A-12</patientID>"),
    ("<patientBirthdate>1980-02-03</patientBirthdate>", "<patientGender>F</patientGender>"),
    ("</subjectInformation>", "<studyInformation>", "<studyDate>2024-05-06</studyDate>"),
    (
        "<studyTime>07:08:09</studyTime>",
        "<studyID>7</studyID>",
        f"<studyInstanceUID>{UID}.2</studyInstanceUID>",
    ),
    ("</studyInformation>",),
)


def turn() -> NDArray[np.float64]:
    """Columns: read, phase and slice direction. About x, then about y, then about z of the patient."""
    a, b, c = np.deg2rad(TURNED_DEG)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


@dataclass(frozen=True)
class Exported:
    """A result in a file, and the truth: T1, T2, regions `(Z, Y, X)`; places `(Z, Y, X, 3)`, LPS in mm."""

    path: Path
    t1_ms: NDArray[np.float32]
    t2_ms: NDArray[np.float32]
    labels: NDArray[np.int16]
    places: NDArray[np.float64]

    def export(self, folder: Path, *options: str) -> list[Path]:
        """What `whorl export` writes."""
        done = CliRunner().invoke(main, ["export", str(self.path), "-o", str(folder), *options])
        assert done.exit_code == 0, done.output
        return sorted(p for p in folder.rglob("*") if p.is_file())

    def check(self, read: Any, tolerance: float = 0.15) -> None:
        """Of each region the values at its places, which `read` gives for places `(N, 3)` in a slice.

        Thin letters of a short train are off by up to 13 %, single pixels of T2 by more; two letters differ
        by 40 % and more.
        """
        for z in range(len(self.labels)):
            for quantity, truth in (("T1", self.t1_ms), ("T2", self.t2_ms)):
                for number in range(1, 5):
                    inside = self.labels[z] == number
                    found = read(quantity, self.places[z][inside])
                    assert len(found) > 10
                    # Off by a pixel, some would lie in what is around the letter.
                    wrong = np.abs(found / truth[z][inside] - 1) > 0.25
                    assert wrong.mean() < (0.1 if quantity == "T1" else 0.4), (quantity, z, number)
                    assert np.median(found) == pytest.approx(np.median(truth[z][inside]), rel=tolerance)

    def stored(self, quantity: str, z: int) -> NDArray[np.float64]:
        """Physical values `(Y, X)` of the MRD image of a slice."""
        for image in read_images(self.path):
            if image.meta["GADGETRON_DataRole"] == quantity and image.slice == z:
                return np.asarray(image.data[0, 0] * float(image.meta["RescaleSlope"]))
        raise AssertionError("no such image")

    def centre(self, z: int, longer_than: float) -> NDArray[np.float64]:
        """Middle of what has a T1 longer than all other letters, LPS in mm."""
        return np.asarray(self.places[z][self.t1_ms[z] > longer_than].mean(0))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("letters")
    simulate(
        folder / "scan.h5", phantom="letters", timepoints=240, interleaves=32, coils=6, slices=3,
        matrix=MATRIX, noise=1e-4, turned_deg=TURNED_DEG, centre_mm=CENTRE_MM,
    )  # fmt: skip
    scan = Scan.load(folder / "scan.h5")
    inside = re.search(rb"<reconSpace>.*?</reconSpace>", scan.header, re.DOTALL)
    assert inside is not None
    x_fov = FOV_MM * RECON[0] / MATRIX
    narrow = inside[0].replace(b"<x>128</x>", b"<x>104</x>").replace(b"<x>300.0</x>", b"<x>%g</x>" % x_fov)
    assert narrow.count(b"104") == 1
    header = scan.header.replace(inside[0], narrow)
    texts = "".join(text for line in HEADER for text in line).encode()
    scan.header = header.replace(b"<measurementInformation>", texts + b"<measurementInformation>")
    images = scan.run(method="lowrank").images
    with ResultFile(folder / "result.h5", scan.header) as file:
        for image in images:
            file.append(image)
    truth = read_truth(folder / "scan.h5")
    z, y, x = np.meshgrid(*(np.arange(n) for n in truth.labels.shape), indexing="ij")
    pixel = FOV_MM / MATRIX
    in_stack = np.stack([(x - MATRIX // 2) * pixel, (y - MATRIX // 2) * pixel, (z - 1) * SLICE_MM], axis=-1)
    places = np.array(CENTRE_MM) + in_stack @ turn().T
    return Exported(folder / "result.h5", truth.t1_ms, truth.t2_ms, truth.labels, places)


def test_it_is_double_oblique_and_not_square(result: Exported) -> None:
    image = read_images(result.path)[0]
    assert image.data.shape[-2:] == (128, 104)
    assert all(0.05 < abs(v) < 0.95 for v in (*image.read_dir, *image.slice_dir))


# --- NIfTI -----------------------------------------------------------------------------------------------


def at_places(image: Any, places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values of a NIfTI image at places `(N, 3)` in LPS mm, of the nearest voxel."""
    ras = places * [-1, -1, 1]
    index = np.rint(nibabel.affines.apply_affine(np.linalg.inv(image.affine), ras)).astype(int)
    return np.asarray(image.get_fdata()[tuple(index.T)])


def test_nifti_has_the_numbers_at_their_places(result: Exported, tmp_path: Path) -> None:
    files = result.export(tmp_path / "n", "--to", "nifti")
    assert [p.name for p in files if p.name.endswith(".nii.gz")] == [
        f"{name}.nii.gz" for name in ("M0map", "T1map", "T2map", "quality")
    ]
    images = {name: nibabel.load(tmp_path / "n" / f"{name}map.nii.gz") for name in ("T1", "T2")}
    result.check(lambda quantity, places: at_places(images[quantity], places))
    for name, z in (("T1", 0), ("T2", 2)):
        np.testing.assert_allclose(images[name].get_fdata()[:, :, z].T, result.stored(name, z), rtol=1e-6)
    t1 = images["T1"]
    assert t1.shape == (104, 128, 3)
    assert t1.get_data_dtype() == np.float32
    assert t1.header.get_xyzt_units()[0] == "mm"
    # Both forms say the same, in scanner coordinates.
    for form, code in (t1.get_qform(coded=True), t1.get_sform(coded=True)):
        assert code == 1
        np.testing.assert_allclose(form, t1.affine, atol=1e-4)
    np.testing.assert_allclose(nibabel.affines.voxel_sizes(t1.affine), (300 / 128, 300 / 128, 5), rtol=1e-5)
    # To a fraction of a pixel: the middle of the letter that alone has such a long T1.
    longer = 2250.0
    for z in range(3):
        middle = np.argwhere(t1.get_fdata()[:, :, z] > longer).mean(0)
        found = nibabel.affines.apply_affine(t1.affine, [*middle, z]) * [-1, -1, 1]
        assert np.linalg.norm(found - result.centre(z, longer)) < 0.4 * 300 / 128


@pytest.mark.parametrize("change", ["mirrored", "transposed", "shifted"])
def test_the_check_sees_what_is_wrong(result: Exported, tmp_path: Path, change: str) -> None:
    result.export(tmp_path / "n", "--to", "nifti")
    images = {}
    for name in ("T1", "T2"):
        image = nibabel.load(tmp_path / "n" / f"{name}map.nii.gz")
        values, affine = image.get_fdata(), image.affine.copy()
        if change == "mirrored":
            values = values[::-1]
        elif change == "transposed":
            values = values[:, :104].transpose(1, 0, 2)
        else:
            affine[:3, 3] += 2 * affine[:3, 0]
        images[name] = nibabel.Nifti1Image(values, affine)
    with pytest.raises(AssertionError):
        result.check(lambda quantity, places: at_places(images[quantity], places))


def test_slices_in_any_order_and_at_unequal_distances(result: Exported, tmp_path: Path) -> None:
    images = read_images(result.path)
    reordered = tmp_path / "reordered.h5"
    with ResultFile(reordered, b"<ismrmrdHeader/>") as file:
        for image in sorted(images, key=lambda i: (i.image_series_index, -i.slice)):
            file.append(image)
    uneven = tmp_path / "uneven.h5"
    with ResultFile(uneven, b"<ismrmrdHeader/>") as file:
        for image in images:
            head = image.getHead()
            if image.slice == 2:
                head.position[:] = [p + 4 * d for p, d in zip(head.position, head.slice_dir, strict=True)]
                image.setHead(head)
            file.append(image)
    for path, n_files in ((reordered, 4), (uneven, 12)):
        target = tmp_path / path.stem
        done = CliRunner().invoke(main, ["export", str(path), "--to", "nifti", "-o", str(target)])
        assert done.exit_code == 0
        assert f"{n_files} files" in done.output
    again = nibabel.load(tmp_path / "reordered" / "T1map.nii.gz")
    result.check(lambda q, places: at_places(again, places) if q == "T1" else at_t2(tmp_path, places))
    single = nibabel.load(tmp_path / "uneven" / "T1map_slice-03.nii.gz")
    moved = result.places[2][result.labels[2] == 4] + 4 * turn()[:, 2]
    assert np.median(at_places(single, moved)) == pytest.approx(2600, rel=0.06)


def at_t2(folder: Path, places: NDArray[np.float64]) -> NDArray[np.float64]:
    return at_places(nibabel.load(folder / "reordered" / "T2map.nii.gz"), places)


# --- DICOM -----------------------------------------------------------------------------------------------


def dicom_index(
    position: Any, orientation: Any, spacing: Any, places: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows and columns `(N, 2)` of places and their distance from the plane: equation C.7.6.2.1-1 of PS3.3,
    inverted."""
    along_row, along_column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    normal = np.cross(along_row, along_column)
    offset = places - np.array(position, float)
    column, row = offset @ along_row / float(spacing[1]), offset @ along_column / float(spacing[0])
    return np.rint(np.stack([row, column], 1)).astype(int), offset @ normal


def test_mr_images_have_the_numbers_at_their_places(result: Exported, tmp_path: Path) -> None:
    files = result.export(tmp_path / "m", "--to", "dicom", "--mr-images")
    assert len(files) == 12
    datasets = [pydicom.dcmread(path) for path in files]

    def read(quantity: str, places: NDArray[np.float64]) -> NDArray[np.float64]:
        for ds in datasets:
            index, distance = dicom_index(
                ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing, places
            )
            if ds.ImageType[2] == f"{quantity} MAP" and np.abs(distance).max() < 0.1:
                values = ds.pixel_array[tuple(index.T)]
                return np.asarray(values * float(ds.RescaleSlope) + float(ds.RescaleIntercept))
        raise AssertionError("no image lies there")

    result.check(read)
    ds = next(ds for ds in datasets if ds.ImageType[2] == "T2 MAP" and ds.InstanceNumber == 2)
    np.testing.assert_allclose(ds.pixel_array * float(ds.RescaleSlope), result.stored("T2", 1), rtol=1e-6)
    assert (ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex) == (
        "Doe^Jane", "A-12", "19800203", "F",
    )  # fmt: skip
    assert (ds.StudyInstanceUID, ds.StudyDate, ds.StudyTime, ds.StudyID) == (
        f"{UID}.2", "20240506", "070809", "7",
    )  # fmt: skip
    assert (float(ds.RescaleSlope), float(ds.MagneticFieldStrength)) == (0.1, 3.0)
    assert "T2 map (ms), whorl lowrank, complete" in ds.ImageComments
    assert len({ds.SOPInstanceUID for ds in datasets}) == 12
    assert len({ds.SeriesInstanceUID for ds in datasets}) == 4
    assert len({ds.StudyInstanceUID for ds in datasets}) == 1


def test_parametric_maps_have_the_numbers_at_their_places(result: Exported, tmp_path: Path) -> None:
    files = result.export(tmp_path / "d", "--to", "dicom")
    assert [path.name for path in files] == ["M0map.dcm", "T1map.dcm", "T2map.dcm", "quality.dcm"]
    maps = {name: pydicom.dcmread(tmp_path / "d" / f"{name}.dcm") for name in ("T1map", "T2map")}

    def read(quantity: str, places: NDArray[np.float64]) -> NDArray[np.float64]:
        ds = maps[f"{quantity}map"]
        shared = ds.SharedFunctionalGroupsSequence[0]
        orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
        spacing = shared.PixelMeasuresSequence[0].PixelSpacing
        for frame, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
            position = group.PlanePositionSequence[0].ImagePositionPatient
            index, distance = dicom_index(position, orientation, spacing, places)
            if np.abs(distance).max() < 0.1:
                return np.asarray(ds.pixel_array[frame][tuple(index.T)])
        raise AssertionError("no frame lies there")

    result.check(read)
    for name, code, meaning in (("T1map", "113063", "T1"), ("T2map", "113065", "T2")):
        ds = maps[name]
        assert ds.pixel_array.dtype == np.float32
        # Frames have an order of their own; that of the middle is the same.
        np.testing.assert_allclose(ds.pixel_array[1], result.stored(meaning, 1), rtol=1e-6)
        groups = (ds.SharedFunctionalGroupsSequence[0], ds.PerFrameFunctionalGroupsSequence[0])
        (mapping,) = next(
            g.RealWorldValueMappingSequence for g in groups if "RealWorldValueMappingSequence" in g
        )
        unit = mapping.MeasurementUnitsCodeSequence[0]
        assert (unit.CodeValue, unit.CodingSchemeDesignator) == ("ms", "UCUM")
        assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1, 0)
        quantity = mapping.QuantityDefinitionSequence[0].ConceptCodeSequence[0]
        assert (quantity.CodeValue, quantity.CodeMeaning) == (code, meaning)
        assert ds.ContentQualification == "RESEARCH"


# --- BIDS ------------------------------------------------------------------------------------------------


def test_the_bids_validator_has_no_errors_and_the_numbers_are_in_seconds(
    result: Exported, tmp_path: Path
) -> None:
    result.export(tmp_path, "--to", "bids")
    result.export(tmp_path, "--to", "bids", "--subject", "02", "--session", "a")
    root = tmp_path / "derivatives" / "whorl"
    images = {name: nibabel.load(root / f"sub-A12/anat/sub-A12_{name}map.nii.gz") for name in ("T1", "T2")}
    result.check(lambda quantity, places: at_places(images[quantity], places) * 1000)
    assert (root / "sub-02/ses-a/anat/sub-02_ses-a_T2map.nii.gz").is_file()
    told = json.loads((root / "sub-A12/anat/sub-A12_T1map.json").read_text())
    assert told["Units"] == "s"
    description = json.loads((root / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "whorl"
    validator = Path(sys.executable).with_name("bids-validator-deno")
    if not validator.is_file():
        pytest.skip("bids-validator-deno is not installed")
    done = subprocess.run(
        [validator, root, "--format", "json"], capture_output=True, text=True, check=False, timeout=300
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []
    # It did look at them.
    (root / "sub-A12/anat/sub-A12_T1map.nii.gz").rename(root / "sub-A12/anat/sub-A12_T1mop.nii.gz")
    done = subprocess.run(
        [validator, root, "--format", "json"], capture_output=True, text=True, check=False, timeout=300
    )
    assert any(issue["severity"] == "error" for issue in json.loads(done.stdout)["issues"]["issues"])
