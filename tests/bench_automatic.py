"""Settings chosen without the truth against the best that the truth would have chosen.

Not a test: ``python tests/bench_automatic.py`` prints the table of docs/validation.md. The cases were not
used to design the choice.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench_accuracy import reconstruct
from whorl.simulation.scan import simulate
from whorl.simulation.truth import Truth, read_truth

CASES: dict[str, dict[str, Any]] = {
    "NIST T1 plate, golden": {"phantom": "nist", "plate": "t1", "seed": 5},
    "NIST T1 plate, sequential, noise 2e-3": {
        "phantom": "nist",
        "plate": "t1",
        "order": "sequential",
        "noise": 2e-3,
        "seed": 5,
    },
    "NIST T2 plate, 300 timepoints": {"phantom": "nist", "timepoints": 300, "seed": 6},
    "NIST T2 plate, 72 interleaves, noise 2e-3": {
        "phantom": "nist",
        "interleaves": 72,
        "noise": 2e-3,
        "seed": 7,
    },
    "NIST T2 plate, noise 1e-2": {"phantom": "nist", "noise": 1e-2, "seed": 7},
    "brain, 192², 4 coils": {"phantom": "brain", "matrix": 192, "coils": 4, "seed": 5},
    "brain, sequential, noise 3e-3": {"phantom": "brain", "order": "sequential", "noise": 3e-3, "seed": 6},
    "brain, noise 1e-2": {"phantom": "brain", "noise": 1e-2, "seed": 8},
    "brain with texture, seed 3, noise 2e-3": {"phantom": "texture", "seed": 3, "noise": 2e-3},
    "brain with texture, seed 4, 1000 timepoints": {"phantom": "texture", "seed": 4, "timepoints": 1000},
}
#: Among these the truth chooses.
GRID: dict[str, dict[str, object]] = {
    "low_noise": {"preset": "low_noise"},
    "normal": {"preset": "normal"},
    "high_noise": {"preset": "high_noise"},
    "12 steps, 128": {"preset": "normal", "correction_steps": 12, "finest_resolution": 128},
    "8 steps, 64, 200 iterations": {"preset": "normal", "finest_resolution": 64, "iterations": 200},
}


def error(maps: dict[str, np.ndarray], truth: Truth) -> tuple[float, float]:
    """Root mean square of ln(T/truth) of T1 and T2 over the regions, in %."""
    inside = (truth.labels > 0) & (maps["T1"] > 0)

    def of(values: np.ndarray, known: np.ndarray) -> float:
        return 100 * float(np.sqrt(np.mean(np.log(values[inside] / known[inside]) ** 2)))

    return of(maps["T1"], truth.t1_ms), of(maps["T2"], truth.t2_ms)


def main() -> None:
    print(
        "| case | low-rank T1 / T2 % | automatic T1 / T2 % | best of the grid by T1 + T2 | automatic / best |"
    )
    print("|---|---|---|---|---|")
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            scan = Path(folder) / "scan.h5"
            simulate(scan, **CASES[name])
            truth = read_truth(scan)
            low = error(reconstruct(scan, {"method": "lowrank"})[0], truth)
            # Time for all that it would try, whatever else this machine does.
            auto = error(reconstruct(scan, {"tuning_budget_s": 100})[0], truth)
            tried = {key: error(reconstruct(scan, properties)[0], truth) for key, properties in GRID.items()}
            best = min(tried, key=lambda key: sum(tried[key]))
        print(
            f"| {name} | {low[0]:.1f} / {low[1]:.1f} | {auto[0]:.1f} / {auto[1]:.1f} "
            f"| {best}: {tried[best][0]:.1f} / {tried[best][1]:.1f} | {sum(auto) / sum(tried[best]):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
