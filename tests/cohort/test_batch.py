"""`whorl batch` with real worker processes on this machine."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from whorl.doors.files import read_images
from whorl.doors.replaying import replay

_WAIT_S = 120


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "whorl", "batch", *map(str, arguments)]


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(*arguments), capture_output=True, text=True, timeout=_WAIT_S, check=False)


def _pixels(path: Path) -> list[bytes]:
    return [image.data.tobytes() for image in read_images(path)]


def _states(folder: Path) -> dict[str, str]:
    with (folder / "summary.csv").open(newline="") as file:
        return {row["name"]: row["state"] for row in csv.DictReader(file)}


def test_a_cohort_from_its_plan_to_its_second_call(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = _run(cohort, "-o", out, "-p", "correction_steps=3", "--dry-run")
    assert planned.returncode == 0
    assert "run   scan1  (new)" in planned.stdout
    assert "3 of 3 scans" in planned.stdout
    assert "correction_steps=3" in planned.stdout
    assert not out.exists()

    done = _run(cohort, "-o", out, "-p", "correction_steps=3", "--workers", 2)
    assert (done.returncode, done.stdout.split(";")[0]) == (0, "3 complete"), done.stderr
    assert "[3/3]" in done.stderr
    for number in range(3):
        alone = tmp_path / "alone.h5"
        replay(cohort / f"scan{number}.h5", alone, {"correction_steps": "3"}, lambda *_: None)
        assert _pixels(out / f"scan{number}.h5") == _pixels(alone)
        record = json.loads((out / f"scan{number}.json").read_text())
        t1 = next(image for image in read_images(alone) if image.image_series_index == 1).data
        assert record["t1_median"] == pytest.approx(np.median(t1[t1 > 0]))
    page = (out / "summary.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert 'href="scan2.h5"' in page
    assert not list(out.rglob("*.part"))

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = _run(cohort, "-o", out, "-p", "correction_steps=3")
    assert (again.returncode, again.stdout) == (0, "all 3 scans are done already: nothing to do\n")
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_a_scan_that_fails_costs_no_other_and_leaves_no_old_maps(cohort: Path, tmp_path: Path) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    shutil.copytree(cohort, scans)
    assert _run(scans, "-o", out, "-p", "method=lowrank").returncode == 0
    (scans / "scan1.h5").write_bytes(b"no scan any more")
    done = _run(scans, "-o", out, "-p", "method=lowrank")
    assert done.returncode == 3
    assert _states(out) == {"scan0": "complete", "scan1": "failed", "scan2": "complete"}
    assert not (out / "scan1.h5").exists()
    assert "cannot be read as an MRD file" in (out / "summary.html").read_text()
    # What failed is tried again, and only that.
    planned = _run(scans, "-o", out, "-p", "method=lowrank", "--dry-run")
    assert "run   scan1  (failed before)" in planned.stdout
    assert "1 of 3 scans" in planned.stdout


def test_who_is_stopped_goes_on_where_it_was(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (cohort, "-o", out, "-p", "method=lowrank", "--workers", 1)
    with subprocess.Popen(_command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        _appeared(out, "*.json", process)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=_WAIT_S)
    assert b"goes on where it was" in stderr
    assert process.returncode == 3
    assert b"not finished" in stdout
    assert "not finished" in _states(out).values()
    done = {path: path.stat().st_mtime_ns for path in out.glob("scan*.h5")}
    assert done
    assert _run(*arguments).returncode == 0
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    assert set(_states(out).values()) == {"complete"}


def test_a_worker_that_dies_is_replaced_and_its_scan_made_again(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        _command(cohort, "-o", out, "-p", "preset=seed", "--workers", 1),  # it takes its time
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        made = _appeared(out, ".scan*.part", process)  # a scan is under way
        holder = [pid for pid in _descendants(process.pid) if _holds(pid, made[0])]
        os.kill(holder[0], signal.SIGKILL)
        _, stderr = process.communicate(timeout=_WAIT_S)
    assert process.returncode in (0, 3), stderr
    assert "failed" not in _states(out).values()
    assert len(list(out.glob("scan*.h5"))) == 3
    assert not list(out.glob(".*.part"))


def test_names_that_are_no_text_or_too_long_cost_no_other_scan(cohort: Path, tmp_path: Path) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    latin = os.fsdecode(b"M\xfcller")
    shutil.copy(cohort / "scan0.h5", scans / f"{latin}.h5")
    shutil.copy(cohort / "scan0.h5", scans / f"{'a' * 240}.h5")
    shutil.copy(cohort / "scan1.h5", scans / "z.h5")
    done = _run(scans, "-o", out, "-p", "method=lowrank")
    assert done.returncode == 3, done.stderr
    assert (out / f"{latin}.h5").is_file()
    assert _states(out) == {"M\\udcfcller": "complete", "a" * 240: "failed", "z": "complete"}
    assert 'href="M%FCller.h5"' in (out / "summary.html").read_text()


def test_two_batches_in_one_folder_are_refused(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (cohort, "-o", out, "-p", "method=lowrank", "--workers", 1)
    with subprocess.Popen(_command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        _appeared(out, ".lock", process)
        time.sleep(0.2)
        second = _run(*arguments)
        process.communicate(timeout=_WAIT_S)
    assert second.returncode == 1
    assert "another batch is at work" in second.stderr
    assert process.returncode == 0
    assert set(_states(out).values()) == {"complete"}


def test_a_recorded_method_does_not_stand_for_one_that_is_set(cohort: Path, tmp_path: Path) -> None:
    assert _run(cohort / "scan0.h5", "-o", tmp_path, "-p", "method=lowrank").returncode == 0
    planned = _run(cohort / "scan0.h5", "-o", tmp_path, "-p", "method=inr", "--dry-run")
    assert "1 of 1 scans" in planned.stdout


def test_no_page_tells_passers_by_of_the_scans(cohort: Path, tmp_path: Path) -> None:
    """What it listens with answers no browser: pages of Dask are open, and name tasks and files."""
    out = tmp_path / "out"
    with subprocess.Popen(
        _command(cohort, "-o", out, "-p", "method=lowrank", "--workers", 1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        _appeared(out, ".scan*.part", process)
        ports = {
            connection.laddr
            for pid in (process.pid, *_descendants(process.pid))
            for connection in psutil.Process(pid).net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        answers = []
        for address, port in ports:
            assert address == "127.0.0.1"
            for page in ("", "status", "info/main/workers.html"):
                # 404, or no HTTP at all
                with (
                    suppress(OSError, HTTPException),
                    urllib.request.urlopen(f"http://{address}:{port}/{page}", timeout=5) as answer,
                ):
                    answers.append((port, page, answer.status))
        process.communicate(timeout=_WAIT_S)
    assert ports
    assert answers == []
    assert process.returncode == 0


def test_workers_that_cannot_be_had_are_an_error(cohort: Path, tmp_path: Path) -> None:
    done = _run(cohort, "-o", tmp_path, "--cluster", "nonsense")
    assert done.returncode == 1
    assert "no Dask scheduler answers at nonsense" in done.stderr
    assert _run(cohort, "-o", tmp_path, "-p", "metod=llr").returncode == 2


def _appeared(folder: Path, pattern: str, process: subprocess.Popen[Any]) -> list[Path]:
    """Wait for files while a process runs."""
    end = time.monotonic() + _WAIT_S
    while not (found := list(folder.glob(pattern))):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.01)
    return found


def _descendants(pid: int) -> list[int]:
    children = [
        int(child)
        for thread in Path(f"/proc/{pid}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]
    return children + [below for child in children for below in _descendants(child)]


def _holds(pid: int, path: Path) -> bool:
    # realpath says nothing of a descriptor that was closed meanwhile.
    return any(os.path.realpath(d) == str(path) for d in Path(f"/proc/{pid}/fd").iterdir())
