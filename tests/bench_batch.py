"""How `whorl batch` spends time: two workers against one, and one against a plain loop.

    python tests/bench_batch.py            12 scans of 96², about five minutes on two cores

All have one core for each worker; results are compared byte for byte.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import whorl
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
    replay(scan, Path(sys.argv[2]) / scan.name, {"tuning_budget_s": 1e6}, lambda *_: None)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, default=12)
    parser.add_argument("--matrix", type=int, default=96)
    parser.add_argument("--timepoints", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _ENVIRONMENT["XDG_CACHE_HOME"] = str(folder / "cache")
        scans = folder / "scans"
        scans.mkdir()
        for n in range(told.scans):
            simulate(
                scans / f"s{n:02}.h5",
                phantom="nist",
                matrix=told.matrix,
                timepoints=told.timepoints,
                coils=8,
                seed=n,
            )
        batch = (sys.executable, "-m", "whorl", "batch", scans, "--cores", 1)
        times: dict[str, list[float]] = {"loop": [], "1 worker": [], "2 workers": []}
        pixels = {}
        for repeat in range(told.repeats + 1):
            # In turns: what else the machine does falls on all of them. The first round fills caches.
            for kind, taken in times.items():
                out = folder / f"{kind} {repeat}"
                if kind == "loop":
                    out.mkdir()
                    seconds = _seconds(sys.executable, "-c", _LOOP, scans, out)
                else:
                    seconds = _seconds(*batch, "-o", out, "--workers", kind[0])
                if repeat:
                    taken.append(seconds)
                pixels[kind] = _pixels(out)
    best = {kind: min(taken) for kind, taken in times.items()}
    same = all(found == pixels["loop"] for found in pixels.values())
    print(f"{told.scans} scans of {told.matrix}², {told.timepoints} timepoints, {os.cpu_count()} cores")
    for kind, taken in times.items():
        print(f"{kind:10} {best[kind]:6.1f} s  ({', '.join(f'{seconds:.1f}' for seconds in taken)})")
    overhead = (best["1 worker"] - best["loop"]) / told.scans
    print(f"2 workers / 1 worker: {best['2 workers'] / best['1 worker']:.2f}")
    print(
        f"overhead per scan: {overhead:.2f} s, {100 * overhead * told.scans / best['loop']:.1f} % of the loop"
    )
    print(f"results: {'equal byte for byte' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
