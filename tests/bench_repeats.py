"""Accuracy over repeated noise and INR seeds: mean of 3 × 3 runs for each case.

Not a test: ``python tests/bench_repeats.py [case ...]`` prints the table of docs/validation.md. Each scan is
simulated with its own truth (500 timepoints, 96 interleaves, 8 coils, 256²), and reconstructed in this process.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench_accuracy import reconstruct
from whorl.maps.rois import RegionStatistics, mean_cov_percent, r_squared, region_statistics
from whorl.simulation.scan import Truth, read_truth, simulate

CASES: dict[str, dict[str, Any]] = {
    "NIST T2 plate, golden": {"phantom": "nist"},
    "NIST T2 plate, sequential": {"phantom": "nist", "order": "sequential"},
    "NIST T1 plate, sequential": {"phantom": "nist", "plate": "t1", "order": "sequential"},
    "brain, golden": {"phantom": "brain"},
    "brain, sequential": {"phantom": "brain", "order": "sequential"},
    "brain, golden, noise 5e-3": {"phantom": "brain", "noise": 5e-3},
    "brain with texture, golden": {"phantom": "texture"},
}
SEEDS = (0, 1, 2)


def largest(rows: list[RegionStatistics], shortest: float) -> float:
    return max((abs(row.bias_percent) for row in rows if row.truth >= shortest), default=0.0)


def figures(maps: dict[str, np.ndarray], truth: Truth) -> dict[str, float]:
    """What the table shows, by name."""
    t1 = region_statistics(maps["T1"], truth.labels, truth.roi_names, truth.roi_t1_ms)
    t2 = region_statistics(maps["T2"], truth.labels, truth.roi_names, truth.roi_t2_ms)
    if len(t2) > 5:
        return {
            "CoV T1 %": mean_cov_percent(t1),
            "CoV T2 %": mean_cov_percent(t2),
            "largest T2 bias %, T2 ≥ 20 ms": largest(t2, 20),
            "largest T2 bias %, all": largest(t2, 0),
            "largest T1 bias %, all": largest(t1, 0),
            "R² T2": r_squared(t2),
        }
    found = {
        f"{row.name} {name}": value
        for row in t2[:1]
        for name, value in (("T2 ms", row.mean), ("T2 SD ms", row.sd))
    }
    found |= {f"{row.name} T2 bias %": row.bias_percent for row in t2[1:]}
    if "lesions" in truth.roi_names:
        white = truth.labels == 1 + list(truth.roi_names).index("white matter")
        known, seen = truth.t2_ms[white], maps["T2"][white]
        found["spread of T2 error in white matter %"] = 100 * float(np.std(seen / known - 1))
        found["correlation with the texture"] = float(np.corrcoef(known, seen)[0, 1])
    return found


def main() -> None:
    print("| case | figure | low-rank | INR, mean of 9 (smallest to largest) |")
    print("|---|---|---|---|")
    for name in sys.argv[1:] or CASES:
        results: dict[str, list[dict[str, float]]] = {"lowrank": [], "inr": []}
        for noise_seed in SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                scan = Path(folder) / "scan.h5"
                simulate(scan, seed=noise_seed, **CASES[name])
                truth = read_truth(scan)
                results["lowrank"].append(figures(reconstruct(scan, {"method": "lowrank"})[0], truth))
                for seed in SEEDS:
                    results["inr"].append(figures(reconstruct(scan, {"seed": seed})[0], truth))
        for figure in results["inr"][0]:
            low = np.mean([run[figure] for run in results["lowrank"]])
            inr = [run[figure] for run in results["inr"]]
            print(
                f"| {name} | {figure} | {low:.4g} | {np.mean(inr):.4g} ({min(inr):.4g} to {max(inr):.4g}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
