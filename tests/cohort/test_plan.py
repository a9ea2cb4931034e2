"""What belongs to a cohort, and what of it is still to be done."""

from __future__ import annotations

import json
import os
from pathlib import Path

import h5py
import pytest

from whorl.cohort.plan import Job, find_scans, fingerprint, key_of, plan
from whorl.config import Settings
from whorl.scan.failure import ScanError


def _file(path: Path, content: bytes = b"scan") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_scans_of_folders_keep_their_places(tmp_path: Path) -> None:
    for name in ("study/a/1.h5", "study/b/1.h5", "study/2.mrd", "study/notes.txt", "study/.hidden/3.h5"):
        _file(tmp_path / name)
    named = _file(tmp_path / "other.dat")
    found = find_scans([tmp_path / "study", named], tmp_path / "study/out")
    assert list(found) == ["2", "a/1", "b/1", "other.dat"]


def test_results_are_no_scans(tmp_path: Path) -> None:
    _file(tmp_path / "scan.h5")
    _file(tmp_path / "out/scan.h5")
    with h5py.File(tmp_path / "maps.h5", "w") as file:
        file.create_group("dataset/image_1")
    assert list(find_scans([tmp_path], tmp_path / "out")) == ["scan"]


@pytest.mark.parametrize("results", [".", "..", "new"])
def test_scans_are_found_wherever_the_results_shall_lie(tmp_path: Path, results: str) -> None:
    study = tmp_path / "study"
    for name in ("a/sub.01.h5", "a/sub.02.h5"):
        _file(study / name)
    assert list(find_scans([study], study / results)) == ["a/sub.01", "a/sub.02"]
    named = [_file(study / name) for name in ("sub.01", "sub.02")]
    assert list(find_scans(named, study / results)) == ["sub.01", "sub.02"]


def test_two_scans_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [_file(tmp_path / name) for name in ("a/1.h5", "b/1.h5")]
    with pytest.raises(ScanError, match="two scans would be called 1"):
        find_scans(paths, tmp_path / "out")
    assert find_scans([paths[0], paths[0]], tmp_path / "out") == {"1": paths[0]}
    with pytest.raises(ScanError, match="no scans in"):
        find_scans([_file(tmp_path / "c/readme.txt").parent], tmp_path / "out")


def test_a_result_never_replaces_its_scan(tmp_path: Path) -> None:
    scan = _file(tmp_path / "1.h5")
    with pytest.raises(ScanError, match="another folder"):
        plan({"1": scan}, tmp_path, "k")


def test_why_a_scan_is_made_again(tmp_path: Path) -> None:
    scan, out = _file(tmp_path / "a.b.h5"), tmp_path / "out"

    def why(key: str = "k") -> str:
        return plan({"a.b": scan}, out, key)[0].why

    job: Job = plan({"a.b": scan}, out, "k")[0]
    assert job.result.name == "a.b.h5"
    assert why() == "new"
    record = {"state": "complete", "key": "k", "fingerprint": fingerprint(scan), "result_size": 4}
    _file(job.record, json.dumps(record).encode())
    assert why() == "its result is gone"
    _file(job.result)
    assert why() == ""
    _file(job.result, b"sc")
    assert why() == "its result has changed"
    _file(job.result)
    assert why("other") == "made with other settings"
    os.utime(scan, ns=(1, 1))
    assert why() == "the scan has changed"
    _file(job.record, json.dumps(record | {"state": "failed"}).encode())
    assert why() == "failed before"
    _file(job.record, b'{"state": "comp')
    assert why() == "new"


def test_the_key_follows_settings_and_the_content_of_files(tmp_path: Path) -> None:
    train = _file(tmp_path / "train.csv", b"1,2,3")

    def key(**properties: object) -> str:
        return key_of(Settings.from_properties(properties), properties, recorded=True)

    assert key() == key(spool="/somewhere", cache_mb=5)  # of the machine
    assert len({key(), key(method="llr"), key(rgb=True), key(sequence=str(train))}) == 4
    # What is set counts more than what was recorded with a scan, even if it is the default.
    assert key(method="inr") != key()
    assert key_of(Settings(), (), recorded=False) != key()
    before = key(sequence=str(train))
    _file(train, b"1,2,4")
    assert key(sequence=str(train)) != before
    with pytest.raises(ScanError, match="cannot be read"):
        key(sequence=str(tmp_path / "none.csv"))
