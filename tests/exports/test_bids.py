"""The derivative dataset, as the validator of BIDS and nibabel see it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from exports.results import MARK, T1_MS, XML, extras, make_images, marked_lps
from whorl import __version__
from whorl.exports import Facts, bids, facts_of
from whorl.maps.volumes import volumes
from whorl.scan.failure import ScanError

VALIDATOR = Path(sys.executable).with_name("bids-validator-deno")


def validate(root: Path) -> tuple[set[str], set[str]]:
    """Codes of the errors and of the warnings."""
    if not VALIDATOR.exists() and not shutil.which("bids-validator-deno"):
        pytest.skip("bids-validator-deno is not installed (extra dev)")
    command = str(VALIDATOR) if VALIDATOR.exists() else "bids-validator-deno"
    ended = subprocess.run(
        [command, "--format", "json", str(root)], capture_output=True, text=True, timeout=120
    )
    report: dict[str, Any] = json.loads(ended.stdout)
    found = {level: set[str]() for level in ("error", "warning", "ignore")}
    for issue in report["issues"]["issues"]:
        found[issue["severity"]].add(issue["code"])
    assert report["summary"]["totalFiles"] > 3
    return found["error"], found["warning"]


def test_the_validator_has_no_errors(tmp_path: Path) -> None:
    images = make_images(repetitions=2)
    paths, said = bids.write(volumes(images + extras(images)), facts_of(XML), tmp_path, session="a1")
    root = tmp_path / "derivatives" / "whorl"
    names = {str(p.relative_to(root)) for p in paths}
    stem = "sub-AB123/ses-a1/anat/sub-AB123_ses-a1_run"
    assert {f"{stem}-1_T1map.nii.gz", f"{stem}-2_M0map.nii.gz", f"{stem}-1_desc-sd_T1map.nii.gz"} <= names
    assert f"{stem}-1_desc-lowrank_T2map.nii.gz" in names
    assert "sub-AB123/ses-a1/fmap/sub-AB123_ses-a1_run-1_TB1map.nii.gz" in names
    assert len(said) == 1
    assert all(role in said[0] for role in ("QUALITY", "SUBSPACE", "T1_RGB"))
    errors, _ = validate(root)
    assert errors == set()


def test_the_validator_has_no_errors_with_chunks_and_without_a_header(tmp_path: Path) -> None:
    images = make_images(gaps=(5.5, 9.0))
    paths, said = bids.write(volumes(images), Facts(), tmp_path)
    assert any(p.name == "sub-01_chunk-2_T1map.nii.gz" for p in paths)
    assert any("equal distances" in sentence for sentence in said)
    errors, _ = validate(tmp_path / "derivatives" / "whorl")
    assert errors == set()


def test_the_validator_sees_a_wrong_name(tmp_path: Path) -> None:
    (path, *_), _ = bids.write(volumes(make_images()), facts_of(XML), tmp_path)
    path.rename(path.with_name("sub-AB123_qualitymap.nii.gz"))
    errors, _ = validate(tmp_path / "derivatives" / "whorl")
    assert errors


@pytest.mark.parametrize("left_handed", [False, True])
def test_seconds_at_the_right_place(left_handed: bool, tmp_path: Path) -> None:
    bids.write(volumes(make_images(left_handed)), facts_of(XML), tmp_path, subject="7")
    image = nib.load(tmp_path / "derivatives/whorl/sub-7/anat/sub-7_T1map.nii.gz")
    # Half a millisecond: the pixels of the result are whole ones.
    assert image.get_fdata()[MARK] == pytest.approx(T1_MS / 1000, abs=6e-4)
    ras = nib.affines.apply_affine(image.affine, MARK)
    # Single precision of the affine.
    np.testing.assert_allclose(ras * [-1, -1, 1], marked_lps(left_handed), atol=1e-3)
    b1 = nib.load(tmp_path / "derivatives/whorl/sub-7/fmap/sub-7_TB1map.nii.gz").get_fdata()
    assert b1.max() == pytest.approx(100, abs=0.1)  # percent, in steps of 0.1


def test_sidecar_and_description(tmp_path: Path) -> None:
    bids.write(volumes(make_images()), facts_of(XML), tmp_path)
    root = tmp_path / "derivatives" / "whorl"
    sidecar = json.loads((root / "sub-AB123/anat/sub-AB123_T2map.json").read_text())
    assert sidecar["Units"] == "s"
    assert (sidecar["Method"], sidecar["Status"]) == ("inr", "degraded")
    assert "readouts" in sidecar["Notes"]
    assert sidecar["MagneticFieldStrength"] == 2.89
    assert sidecar["TrainRepetitionTime"] == [0.012, 0.013]
    assert sidecar["InversionTime"] == 0.02
    description = json.loads((root / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"] == [{"Name": "whorl", "Version": __version__}]
    assert __version__ in (root / "README").read_text()


def test_a_second_subject_joins_and_the_first_is_kept(tmp_path: Path) -> None:
    for subject in ("1", "2"):
        bids.write(volumes(make_images()), Facts(), tmp_path, subject=subject)
    assert len(list((tmp_path / "derivatives/whorl").glob("sub-*"))) == 2
    with pytest.raises(ScanError, match=r"not empty.*--force"):
        bids.write(volumes(make_images()), Facts(), tmp_path, subject="1")
    bids.write(volumes(make_images()), Facts(), tmp_path, subject="1", force=True)


def test_refuses_labels_and_results_without_maps(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match="letters and digits"):
        bids.write(volumes(make_images()), Facts(), tmp_path, subject="../x")
    only_quality = [i for i in make_images() if i.meta["GADGETRON_DataRole"] == "QUALITY"]
    with pytest.raises(ScanError, match="nothing can be exported"):
        bids.write(volumes(only_quality), Facts(), tmp_path)
    assert list(tmp_path.iterdir()) == []
