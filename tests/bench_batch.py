"""How `whorl batch` spends time: two workers against one, and one against a plain loop.

    python tests/bench_batch.py [--toy]            12 scans of 96², about five minutes on two cores

All have one core for each worker; results are compared byte for byte.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import whorl
from benchmarks import TOY, heading, machine, row
from benchmarks import parser as plain_parser
from whorl.doors.files import read_images
from whorl.simulation.scan import simulate

_ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(whorl.__file__).parents[1])}
#: What somebody would write who needs no more: one process, one scan after the other.
_LOOP = """
import sys
from pathlib import Path
import torch
from whorl.doors.replaying import replay
torch.set_num_threads(1)
for scan in sorted(Path(sys.argv[1]).glob("*.h5")):
    replay(scan, Path(sys.argv[2]) / scan.name, {}, lambda *_: None)
"""


def _seconds(*command: object) -> float:
    began = time.perf_counter()
    done = subprocess.run(
        list(map(str, command)), env=_ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 3):
        raise RuntimeError(done.stderr)
    return time.perf_counter() - began


def _pixels(folder: Path) -> dict[str, list[bytes]]:
    return {path.name: [image.data.tobytes() for image in read_images(path)] for path in folder.glob("*.h5")}


def parser() -> argparse.ArgumentParser:
    made = plain_parser(__doc__)
    made.add_argument("--scans", type=int, default=12)
    made.add_argument("--matrix", type=int, default=96)
    made.add_argument("--timepoints", type=int, default=200)
    made.add_argument("--repeats", type=int, default=3, help="rounds that count; one before does not")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    told = parser().parse_args(argv)
    size = {"matrix": told.matrix, "timepoints": told.timepoints, "coils": 8}
    n_scans, rounds = (2, [True]) if told.toy else (told.scans, [False, *[True] * told.repeats])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _ENVIRONMENT["XDG_CACHE_HOME"] = str(folder / "cache")
        scans = folder / "scans"
        scans.mkdir()
        for n in range(n_scans):
            simulate(scans / f"s{n:02}.h5", phantom="nist", **(TOY if told.toy else size), seed=n)
        batch = (sys.executable, "-m", "whorl", "batch", scans, "--cores", 1)
        kinds = ("loop", "1 worker") if told.toy else ("loop", "1 worker", "2 workers")
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        pixels = {}
        for repeat, counts in enumerate(rounds):
            # In turns: what else the machine does falls on all of them. The first round fills caches.
            for kind, taken in times.items():
                out = folder / f"{kind} {repeat}"
                if kind == "loop":
                    out.mkdir()
                    seconds = _seconds(sys.executable, "-c", _LOOP, scans, out)
                else:
                    seconds = _seconds(*batch, "-o", out, "--workers", kind[0])
                if counts:
                    taken.append(seconds)
                pixels[kind] = _pixels(out)
    best = {kind: min(taken) for kind, taken in times.items()}
    same = all(found == pixels["loop"] for found in pixels.values())
    what = "toy scans" if told.toy else f"scans of {told.matrix}² with {told.timepoints} timepoints"
    print(f"{machine()}; {n_scans} {what}, results {'equal byte for byte' if same else 'DIFFERENT'}\n")
    heading("", "s, best", "all", "relative")
    before = "loop"
    for kind, taken in times.items():
        row(
            kind,
            f"{best[kind]:.1f}",
            ", ".join(f"{seconds:.1f}" for seconds in taken),
            f"{best[kind] / best[before]:.2f} of {before}",
        )
        before = kind
    overhead = (best["1 worker"] - best["loop"]) / n_scans
    print(f"\nOverhead of a worker for each scan: {overhead:.2f} s, most of it the start.")


if __name__ == "__main__":
    main()
