"""What the benchmarks share: their toy size, a scan to its maps, errors, and what they ran on.

Each `bench_NAME.py` prints tables in Markdown; with ``--toy`` in seconds, from scans too small to tell
anything, so that a test can see that it still works.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ismrmrd
import numpy as np
import torch
from numpy.typing import NDArray

from whorl import __version__
from whorl.config import Settings
from whorl.doors.files import read_header, read_readouts
from whorl.pipeline.scan import reconstruct_scan
from whorl.simulation.scan import simulate
from whorl.simulation.truth import Truth, read_truth

#: The smallest scan whose trajectory has only one unit that fits.
TOY: dict[str, Any] = {"timepoints": 60, "interleaves": 12, "coils": 2, "matrix": 48}
#: The smallest scan in which each sphere of the NIST phantom has pixels.
TOY_WITH_SPHERES: dict[str, Any] = {"timepoints": 60, "interleaves": 24, "coils": 2, "matrix": 128}

Maps = dict[str, NDArray[np.float64]]


def parser(text: str | None) -> argparse.ArgumentParser:
    """Arguments of a benchmark, whose docstring is the help."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--toy", action="store_true", help="seconds instead of minutes: figures mean nothing")
    return made


def machine(device: str = "cpu") -> str:
    """What was measured, and on what."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    return (
        f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, whorl {__version__} (commit {commit})"
    )


@contextmanager
def simulated(**options: Any) -> Iterator[tuple[Path, Truth]]:
    """A simulated scan while it is needed, and its truth."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.h5"
        simulate(path, **options)
        yield path, read_truth(path)


def reconstruct(scan: Path, properties: dict[str, Any]) -> tuple[Maps, str]:
    """Maps `(slices, Y, X)` by quantity in physical units, as a receiver has them; method and status."""
    images: list[ismrmrd.Image] = []
    settings = Settings.from_properties(properties)
    reconstruct_scan(
        read_header(scan), read_readouts(scan), settings, images.append, lambda level, text: None
    )
    return maps_of(images), f"{images[0].meta['whorl_method']}, {images[0].meta['whorl_status']}"


def maps_of(images: list[ismrmrd.Image]) -> Maps:
    """Physical values `(slices, Y, X)` by quantity."""
    maps: dict[str, list[NDArray[np.float64]]] = {}
    for image in images:
        values = image.data[0, 0] * float(image.meta["RescaleSlope"])
        maps.setdefault(image.meta["GADGETRON_DataRole"], []).append(values)
    return {role: np.stack(stack) for role, stack in maps.items()}


def error(maps: Maps, truth: Truth) -> tuple[float, float]:
    """Root mean square of ln(T/truth) over the pixels of all regions, of T1 and T2 in %; NaN without any."""
    inside = (truth.labels > 0) & (maps["T1"] > 0)

    def of(values: NDArray[np.float64], known: NDArray[np.floating]) -> float:
        if not inside.any():
            return float("nan")
        return 100 * float(np.sqrt(np.mean(np.log(values[inside] / known[inside]) ** 2)))

    return of(maps["T1"], truth.t1_ms), of(maps["T2"], truth.t2_ms)


def statuses(told: Sequence[str], method: str) -> str:
    """How the runs of a method went, as `reconstruct` says it: what is no "complete" has its share."""
    others = Counter(one for one in told if one != f"{method}, complete")
    said = (f"{one.removeprefix(f'{method}, ')} {n} of {len(told)}" for one, n in others.items())
    return "; ".join(said) or "complete"


def number(value: float, digits: int = 1, sign: bool = False) -> str:
    """A number in a table; a dash for what is none."""
    return f"{value:{'+' if sign else ''}.{digits}f}" if np.isfinite(value) else "–"


def row(*cells: object) -> None:
    """A line of a table, seen at once."""
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def heading(*cells: str) -> None:
    """The first two lines of a table."""
    row(*cells)
    print("|" + "---|" * len(cells))
