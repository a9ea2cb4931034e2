"""`whorl export`, from a result file to files of other programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from click.testing import CliRunner, Result

from exports.results import XML, extra, make_images, write_result
from whorl.cli import main
from whorl.doors.files import read_result_header


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return write_result(tmp_path / "result.h5", make_images())


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def test_each_format(result: Path, tmp_path: Path) -> None:
    out = {kind: tmp_path / kind for kind in ("nifti", "dicom", "bids")}
    for kind, folder in out.items():
        ended = run(result, "--to", kind, "-o", folder)
        assert ended.exit_code == 0, ended.output
        assert f"files in {folder}" in ended.output
    assert nib.load(out["nifti"] / "T1map.nii.gz").shape == (20, 14, 3)
    assert pydicom.dcmread(out["dicom"] / "T2map.dcm").PatientID == "AB-12_3"
    assert (out["bids"] / "derivatives/whorl/sub-AB123/anat/sub-AB123_T1map.nii.gz").is_file()
    assert run(result, "--to", "dicom", "--mr-images", "-o", tmp_path / "mr").exit_code == 0
    assert pydicom.dcmread(tmp_path / "mr/T1map/0002.dcm").Modality == "MR"
    labelled = run(result, "--to", "bids", "--subject", "9", "--session", "b", "-o", out["bids"])
    assert labelled.exit_code == 0
    assert (out["bids"] / "derivatives/whorl/sub-9/ses-b/anat/sub-9_ses-b_T2map.nii.gz").is_file()


@pytest.mark.parametrize("kind", ["nifti", "dicom", "bids"])
def test_nothing_is_overwritten_unless_told(kind: str, result: Path, tmp_path: Path) -> None:
    arguments = (result, "--to", kind, "-o", tmp_path / "out")
    assert run(*arguments).exit_code == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert "is not empty" in refused.output
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    assert run(*arguments, "--force").exit_code == 0


def test_refusals(result: Path, tmp_path: Path, tiny_scan: Path) -> None:
    scan = run(tiny_scan, "--to", "nifti", "-o", tmp_path / "out")
    assert scan.exit_code == 1
    assert "has no images" in scan.output
    assert not (tmp_path / "out").exists()
    assert run(result, "--to", "nifti", "--mr-images", "-o", tmp_path / "out").exit_code == 2
    assert run(result, "--to", "dicom", "--subject", "1", "-o", tmp_path / "out").exit_code == 2


def test_a_status_image_is_no_map(result: Path, tmp_path: Path) -> None:
    status = extra(make_images()[0], np.ones((1, 1, 30, 40), np.uint16), "STATUS", 99)
    both = write_result(tmp_path / "both.h5", [*make_images(), status])
    assert run(both, "--to", "nifti", "-o", tmp_path / "both").exit_code == 0
    assert len(list((tmp_path / "both").iterdir())) == 5
    failed = run(write_result(tmp_path / "failed.h5", [status]), "--to", "dicom", "-o", tmp_path / "none")
    assert failed.exit_code == 1
    assert "no maps" in failed.output
    assert not (tmp_path / "none").exists()


def test_what_to_install_without_the_extra(result: Path, tmp_path: Path) -> None:
    program = "import sys; sys.modules['nibabel'] = None; from whorl.cli import main; main()"
    arguments = ["export", str(result), "--to", "nifti", "-o", str(tmp_path / "out")]
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    assert "pip install 'whorl-mrf[export]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_header_of_a_result(result: Path) -> None:
    assert read_result_header(result) == XML
