"""Each benchmark still works: at toy size, in seconds, it prints its tables."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import whorl

FOLDER = Path(__file__).parent
BENCHES = sorted(path.stem for path in FOLDER.glob("bench_*.py"))
WAIT_S = 240


def run(bench: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(whorl.__file__).parents[1]), str(FOLDER)])
    return subprocess.run(
        [sys.executable, str(FOLDER / f"{bench}.py"), "--toy"],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Of those that are asked for, two at a time: half of it is starting Python."""
    asked = {item.callspec.params["bench"] for item in request.session.items if item.path == Path(__file__)}
    with ThreadPoolExecutor(2) as pool:
        yield {bench: pool.submit(run, bench) for bench in BENCHES if bench in asked}


@pytest.mark.parametrize("bench", BENCHES)
def test_a_benchmark_prints_its_table(
    runs: dict[str, Future[subprocess.CompletedProcess[str]]], bench: str
) -> None:
    done = runs[bench].result()
    assert done.returncode == 0, done.stderr
    assert re.search(r"commit \w+", done.stdout)
    tables = re.findall(r"^\|.*\|\n\|(?:---\|)+\n((?:\|.*\|\n)+)", done.stdout, re.MULTILINE)
    assert tables, done.stdout
    for line in done.stdout.splitlines():
        assert not line.startswith("|") or line.endswith("|")
