"""A cohort on a real SLURM cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployment.slurm import own_slurm
from doors.processes import ENVIRONMENT
from whorl.doors.files import read_images
from whorl.simulation.scan import simulate

pytestmark = pytest.mark.system

_N = 12
_WAIT_S = 300
#: So long that a job can be killed on the way and another one comes: five seconds for each scan.
_FIT = {"preset": "seed", "iterations": "1500"}
#: A plain loop over the scans, in one process with as many cores as a worker has.
_SERIAL = f"""
import sys
from pathlib import Path
import torch
from whorl.doors.replaying import replay
torch.set_num_threads(1)
for scan in sorted(Path(sys.argv[1]).glob("*.h5")):
    replay(scan, Path(sys.argv[2]) / scan.name, {_FIT}, lambda *_: None)
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    with own_slurm() as environment:
        yield environment | ENVIRONMENT


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for n in range(_N):
        simulate(folder / f"s{n:02}.h5", phantom="nist", matrix=64, timepoints=200, coils=4, seed=n)
    return folder


def _command(scans: Path, out: Path, *more: str) -> list[str]:
    cluster = ("--cluster", "slurm", "--workers", "2", "--memory", "2GB", "--interface", "lo")
    fit = [part for item in _FIT.items() for part in ("-p", "=".join(item))]
    return [sys.executable, "-m", "whorl", "batch", str(scans), "-o", str(out), *cluster, *fit, *more]


def test_a_killed_job_costs_nothing(slurm: dict[str, str], scans: Path, tmp_path: Path) -> None:
    out, serial = tmp_path / "out", tmp_path / "serial"
    with subprocess.Popen(
        _command(scans, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=slurm
    ) as process:
        end = time.monotonic() + _WAIT_S
        # Some scans are done, another one is being made.
        while len(list(out.glob("s*.json"))) < 2 or not list(out.glob(".s*.part")):
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        jobs = subprocess.run(
            ["squeue", "--noheader", "--states=RUNNING", "--format=%i"],
            capture_output=True, text=True, env=slurm, timeout=60, check=True,
        ).stdout.split()  # fmt: skip
        subprocess.run(["scancel", "--signal=KILL", "--full", jobs[0]], env=slurm, timeout=60, check=True)
        stdout, stderr = process.communicate(timeout=_WAIT_S)
    assert process.returncode in (0, 3), (stdout, stderr)
    assert len(list(out.glob("s*.json"))) == _N, stderr
    assert "failed" not in stdout
    # Another job came for the one that was killed.
    assert len(list((out / ".logs").glob("*.out"))) >= 3

    serial.mkdir()
    subprocess.run(
        [sys.executable, "-c", _SERIAL, scans, serial],
        env=os.environ | ENVIRONMENT,
        timeout=_WAIT_S,
        check=True,
    )
    for scan in sorted(scans.glob("*.h5")):
        ours, alone = (
            {image.image_series_index: image.data.tobytes() for image in read_images(folder / scan.name)}
            for folder in (out, serial)
        )
        assert len(alone) == 4
        assert ours == alone, scan.name

    # A second call submits nothing and touches nothing.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = subprocess.run(
        _command(scans, out), capture_output=True, text=True, env=slurm, timeout=_WAIT_S, check=False
    )
    assert again.stdout == f"all {_N} scans are done already: nothing to do\n"
    assert again.returncode == process.returncode
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_jobs_that_slurm_refuses_are_an_error(slurm: dict[str, str], scans: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        _command(scans, tmp_path / "out", "--partition", "nonsense"),
        capture_output=True, text=True, env=slurm, timeout=_WAIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "SLURM does not take the jobs" in done.stderr
    assert "invalid partition" in done.stderr


def test_without_slurm_its_absence_is_said(scans: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        _command(scans, tmp_path / "out"),
        capture_output=True, text=True, env=os.environ | ENVIRONMENT | {"PATH": "/nonexistent"},
        timeout=_WAIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "SLURM's commands on PATH" in done.stderr
