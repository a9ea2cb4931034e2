"""The same data and settings give the same maps, bit for bit, whatever else the machine does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from whorl.simulation.scan import simulate

#: A scan of two slices through the pipeline; prints a digest of each slice's maps. The cache is not used, so
#: that the dictionary is made anew.
_RUN = """
import hashlib, sys
from whorl.config import Settings
from whorl.doors.files import read_header, read_readouts
from whorl.pipeline.scan import reconstruct_scan

scan, only, *properties = sys.argv[1:]
slices = {}

def send(image):
    slices.setdefault(int(image.slice), hashlib.sha256()).update(image.data.tobytes())

readouts = (r for r in read_readouts(scan) if only == "all" or int(r.head["idx"]["slice"]) == int(only) or
r.flags & 1 << 18)
settings = Settings.from_properties({"cache_mb": 0, "output_dtype": "float32"} | dict(p.split("=") for p in
properties))
outcome = reconstruct_scan(read_header(scan), readouts, settings, send, lambda level, text: None)
# The header announces both slices.
assert outcome.exit_code == (0 if only == "all" else 3), outcome
for number, digest in sorted(slices.items()):
    print(number, digest.hexdigest())
"""

METHODS = {
    "inr": [],
    "inr, uneven order": [],
    "inr without guide": ["guide=off", "iterations=6"],
    "llr": ["method=llr"],
    "llr, uneven order": ["method=llr"],
    # If that could not be made the scan would not be whole.
    "lowrank, uncertainty": ["method=lowrank", "uncertainty=true"],
}


def digests(scan: Path, *properties: str, threads: int = 2, only: str = "all") -> dict[int, str]:
    run = subprocess.run(
        [sys.executable, "-c", _RUN, str(scan), only, *properties],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return {int(n): digest for n, digest in (line.split() for line in run.stdout.splitlines())}


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scans")
    made = {}
    for order in ("golden", "sequential"):
        made[order] = folder / f"{order}.h5"
        simulate(
            made[order],
            phantom="nist",
            timepoints=160,
            interleaves=24,
            coils=5,
            matrix=72,
            slices=2,
            order=order,
        )
    return made


@contextmanager
def busy_machine() -> Iterator[None]:
    """More programs than cores, all of them at work."""
    spin = [sys.executable, "-c", "while True: sum(range(10000))"]
    programs = [subprocess.Popen(spin) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


@pytest.mark.parametrize("name", METHODS)
def test_the_same_bits_with_one_thread_and_two_and_on_a_busy_machine(
    name: str, scans: dict[str, Path]
) -> None:
    scan = scans["sequential" if "uneven" in name else "golden"]
    alone = digests(scan, *METHODS[name], threads=2)
    assert sorted(alone) == [0, 1]
    assert len(set(alone.values())) == 2  # a digest of nothing would be the same for both
    assert digests(scan, *METHODS[name], threads=1) == alone
    with busy_machine():
        assert digests(scan, *METHODS[name], threads=2) == alone


@pytest.mark.parametrize("name", ["inr", "llr", "lowrank, uncertainty"])
def test_the_same_bits_alone_and_after_another_slice(name: str, scans: dict[str, Path]) -> None:
    both = digests(scans["golden"], *METHODS[name])
    assert digests(scans["golden"], *METHODS[name], only="1") == {1: both[1]}


def test_the_digest_sees_a_change(scans: dict[str, Path]) -> None:
    assert digests(scans["golden"], "seed=1") != digests(scans["golden"], "seed=0")
