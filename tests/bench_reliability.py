"""What one server process holds after 1000 scans, in large scans, and with 8 scans at once.

    python tests/bench_reliability.py [endurance] [slices] [slices-inr] [at-once] [--toy]

Memory is what Linux says of the process: VmRSS, and VmHWM for the peak.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import TOY, heading, machine, row
from benchmarks import parser as plain_parser
from doors.processes import Served, Usage, send_scan, serving
from scan_edit import Scan
from whorl.scan.readout import Flag, Readout
from whorl.simulation.scan import simulate


@dataclass(frozen=True)
class Size:
    """Options of a scan as a scanner sends it (256², 8 coils, 500 timepoints, 96 interleaves); after how many
    scans one looks; how many slices; how many scans at once, and of which sizes."""

    scan: dict[str, Any] = field(default_factory=dict)
    looked_at: tuple[int, ...] = (1, 10, 50, 100, 200, 500, 1000)
    slices: tuple[int, int] = (4, 16)
    at_once: int = 8
    sizes: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {
            "64², 120 timepoints": {**TOY, "matrix": 64, "timepoints": 120},
            "256², 500 timepoints": {},
        }
    )


TOY_SIZE = Size(TOY, (1, 2, 3), (1, 2), 2, {"48², 60 timepoints": TOY})


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


def of(usage: Usage) -> tuple[str, str, int, int]:
    return f"{usage.rss_mb:.1f}", f"{usage.peak_mb:.1f}", usage.threads, usage.descriptors


def table(title: str) -> None:
    print(f"\n{title}:\n")
    heading("", "RSS MiB", "peak MiB", "threads", "descriptors", "time")


def endurance(folder: str, size: Size) -> None:
    """Many scans, one after the other, through one process."""
    scan = simulated(folder, **TOY)
    table(f"Scans of {TOY['matrix']}² one after the other, method=lowrank")
    found: dict[int, Usage] = {}
    with serving(Path(folder) / "log", "-p", "method=lowrank") as served:
        row("before the first", *of(served.usage), "")
        began = time.monotonic()
        for n in range(1, size.looked_at[-1] + 1):
            deliver(served, scan)
            if n in size.looked_at:
                spent = time.monotonic() - began
                time.sleep(0.5)  # the last thread may still be on its way out
                found[n] = served.usage
                row(f"after {n}", *of(found[n]), f"{n / spent:.2f} scans/s")
    # By then all that is kept once is kept.
    settled = min(size.looked_at, key=lambda n: abs(n - size.looked_at[-1] / 10))
    grown = found[size.looked_at[-1]].rss_mb - found[settled].rss_mb
    print(f"\nGrowth from scan {settled} to scan {size.looked_at[-1]}: {grown:.1f} MiB.")


def slices(folder: str, size: Size, **properties: object) -> None:
    """The same slice few times and many times; the memory must not follow the number."""
    scan = simulated(folder, **size.scan)
    table(f"Scans of several slices, {properties or 'default settings'}")
    peaks: dict[int, float] = {}
    for n_slices in size.slices:
        with serving(Path(folder) / "log") as served:
            row(f"before {n_slices} slices", *of(served.usage), "")
            began = time.monotonic()
            deliver(served, scan, n_slices, **properties)
            spent = time.monotonic() - began
            peaks[n_slices] = served.usage.peak_mb
            row(f"after {n_slices} slices", *of(served.usage), f"{spent:.1f} s")
    few, many = size.slices
    print(f"\nPeak of {many} slices / peak of {few}: {peaks[many] / peaks[few]:.3f}.")


def at_once(folder: str, size: Size) -> None:
    """Several scans at once, beside the same ones one after the other."""
    n = size.at_once
    for name, options in size.sizes.items():
        scan = simulated(folder, **options)
        table(f"{n} scans of {name}, method=lowrank")
        spent: dict[bool, float] = {}
        for together in (False, True):
            with serving(Path(folder) / "log", "--max-scans", n, "-p", "method=lowrank") as served:
                deliver(served, scan)  # the dictionary is remembered from here on
                row("after one", *of(served.usage), "")
                threads = [threading.Thread(target=deliver, args=(served, scan)) for _ in range(n)]
                began = time.monotonic()
                for thread in threads:
                    thread.start()
                    if not together:
                        thread.join()
                for thread in threads:
                    thread.join()
                spent[together] = time.monotonic() - began
                name_of_row = f"{n} at once" if together else f"{n} in turn"
                row(name_of_row, *of(served.usage), f"{spent[together]:.1f} s")
        print(f"\nAt once / in turn: {spent[True] / spent[False]:.2f} of the time.")


PARTS = {
    "endurance": endurance,
    "slices": lambda folder, size: slices(folder, size, method="lowrank"),
    "slices-inr": slices,
    "at-once": at_once,
}
#: Each part starts servers, which takes seconds.
TOY_PARTS = ("endurance",)


def parser() -> argparse.ArgumentParser:
    made = plain_parser(__doc__)
    made.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    told = parser().parse_args(argv)
    print(machine())
    for name in told.parts or (TOY_PARTS if told.toy else PARTS):
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](folder, TOY_SIZE if told.toy else Size())


if __name__ == "__main__":
    main()
