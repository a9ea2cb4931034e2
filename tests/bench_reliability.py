"""What one server process holds after 1000 scans, in large scans, and with 8 scans at once.

Not a test: ``PYTHONPATH=gadgets:tests python tests/bench_reliability.py [endurance] [slices] [slices-inr]
[at-once]`` prints the tables of docs/reliability.md. Memory is what Linux says of the process: VmRSS, and
VmHWM for the peak.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from doors.processes import Served, Usage, send_scan, serving
from scan_edit import Scan
from whorl import __version__
from whorl.scan.readout import Flag, Readout
from whorl.simulation.scan import simulate

#: The smallest scan whose trajectory has only one unit that fits.
SMALL: dict[str, Any] = {"timepoints": 60, "interleaves": 12, "coils": 2, "matrix": 48}
#: As a scanner sends it: 256², 8 coils, 500 timepoints, 96 interleaves.
REAL: dict[str, Any] = {}
LOOKED_AT = (1, 10, 50, 100, 200, 500, 1000)


def simulated(folder: str, **options: Any) -> Scan:
    path = Path(folder) / "scan.h5"
    simulate(path, phantom="nist", **options)
    return Scan.load(path)


def sliced(scan: Scan, n_slices: int) -> Iterator[Readout]:
    """The readouts of a scan of one slice, again for each of several slices."""
    noise = np.setdiff1d(np.arange(len(scan.heads)), scan.imaging)
    every = list(scan.readouts())
    yield from (every[n] for n in noise)
    for number in range(n_slices):
        for n in scan.imaging:
            head = every[n].head.copy()
            head["idx"]["slice"] = number
            head["position"][2] = 5.0 * number
            if number < n_slices - 1:
                head["flags"] &= ~np.uint64(Flag.LAST_IN_MEASUREMENT)
            yield Readout(head, every[n].trajectory, every[n].data)


def deliver(served: Served, scan: Scan, n_slices: int = 1, **properties: object) -> None:
    header = scan.copy().limit("slice", n_slices - 1).header if n_slices > 1 else scan.header
    received = send_scan(served.port, header, sliced(scan, n_slices), properties)
    if received.exit_code or len(received.images) != 4 * n_slices:
        raise RuntimeError(f"{len(received.images)} images: {received.texts} {received.problems}")


def row(name: str, usage: Usage, rest: str = "") -> None:
    print(
        f"{name:44s} {usage.rss_mb:8.1f} {usage.peak_mb:8.1f} {usage.threads:7d} {usage.descriptors:11d}  "
        f"{rest}",
        flush=True,
    )


def heading(title: str) -> None:
    print(f"\n{title}\n{'':44s} {'RSS MiB':>8s} {'peak MiB':>8s} {'threads':>7s} {'descriptors':>11s}")


def endurance(folder: str) -> None:
    """Many scans, one after the other, through one process."""
    scan = simulated(folder, **SMALL)
    heading(f"scans one after the other, method=lowrank, {SMALL}")
    found: dict[int, Usage] = {}
    with serving(Path(folder) / "log", "-p", "method=lowrank") as served:
        row("before the first", served.usage)
        began = time.monotonic()
        for n in range(1, LOOKED_AT[-1] + 1):
            deliver(served, scan)
            if n in LOOKED_AT:
                spent = time.monotonic() - began
                time.sleep(0.5)  # the last thread may still be on its way out
                found[n] = served.usage
                row(f"after {n}", found[n], f"{n / spent:.2f} scans/s")
    print(f"growth from the 100th to the 1000th: {found[1000].rss_mb - found[100].rss_mb:.1f} MiB")


def slices(folder: str, **properties: object) -> None:
    """The same slice 4 and 16 times; the memory must not follow the number."""
    scan = simulated(folder, **REAL)
    heading(f"scans of several slices, 256², 8 coils, 500 timepoints, 96 interleaves, {properties}")
    peaks: dict[int, float] = {}
    for n_slices in (4, 16):
        with serving(Path(folder) / "log") as served:
            row("before", served.usage)
            began = time.monotonic()
            deliver(served, scan, n_slices, **properties)
            spent = time.monotonic() - began
            peaks[n_slices] = served.usage.peak_mb
            row(f"{n_slices} slices", served.usage, f"{spent:.1f} s")
    print(f"peak of 16 slices / peak of 4: {peaks[16] / peaks[4]:.3f}")


def at_once(folder: str) -> None:
    """Eight scans at once, beside the same eight one after the other."""
    medium = {**SMALL, "matrix": 64, "timepoints": 120}
    for name, options in (("64², 120 timepoints", medium), ("256²", REAL)):
        scan = simulated(folder, **options)
        heading(f"eight scans, method=lowrank, {name}")
        spent: dict[bool, float] = {}
        for together in (False, True):
            with serving(Path(folder) / "log", "--max-scans", 8, "-p", "method=lowrank") as served:
                deliver(served, scan)  # the dictionary is remembered from here on
                row("after one", served.usage)
                threads = [threading.Thread(target=deliver, args=(served, scan)) for _ in range(8)]
                began = time.monotonic()
                for thread in threads:
                    thread.start()
                    if not together:
                        thread.join()
                for thread in threads:
                    thread.join()
                spent[together] = time.monotonic() - began
                row("8 at once" if together else "8 in turn", served.usage, f"{spent[together]:.1f} s")
        print(f"at once / in turn: {spent[True] / spent[False]:.2f} of the time")


PARTS = {
    "endurance": endurance,
    "slices": lambda folder: slices(folder, method="lowrank"),
    "slices-inr": lambda folder: slices(folder, preset="normal"),
    "at-once": at_once,
}


def main() -> None:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(
        f"{device}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, whorl {__version__} ({commit})"
    )
    for name in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](folder)


if __name__ == "__main__":
    main()
