"""Accuracy over repeated noise and INR seeds: mean of 3 × 3 runs for each case.

Not a test: ``python tests/bench_repeats.py [case ...]`` prints the table of docs/validation.md. Each scan is
simulated with its own truth (500 timepoints, 96 interleaves, 8 coils, 256²) and reconstructed here.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench_accuracy import reconstruct
from whorl.maps.rois import RegionStatistics, mean_cov_percent, r_squared, region_statistics
from whorl.simulation.scan import simulate
from whorl.simulation.truth import Truth, read_truth

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
#: What is tried shall not depend on what else this machine does.
UNHURRIED = {"tuning_budget_s": 100}


def largest(rows: list[RegionStatistics], shortest: float) -> float:
    return max((abs(row.bias_percent) for row in rows if row.truth >= shortest), default=0.0)


def figures(maps: dict[str, np.ndarray], truth: Truth) -> dict[str, float]:
    """What the table shows, by name; keys that begin with "T2 bias" or "T1 bias" are of single regions."""
    t1 = region_statistics(maps["T1"], truth.labels, truth.roi_names, truth.roi_t1_ms)
    t2 = region_statistics(maps["T2"], truth.labels, truth.roi_names, truth.roi_t2_ms)
    if len(t2) > 5:
        found = {
            "CoV T1 %": mean_cov_percent(t1),
            "CoV T2 %": mean_cov_percent(t2),
            "largest T2 bias of a run %, T2 ≥ 20 ms": largest(t2, 20),
            "largest T2 bias of a run %, all": largest(t2, 0),
            "largest T1 bias of a run %, all": largest(t1, 0),
            "R² T2": r_squared(t2),
        }
        for name, rows in (("T1", t1), ("T2", t2)):
            found |= {
                f"{name} bias {row.name}{' long' if t2_row.truth >= 20 else ''}": row.bias_percent
                for row, t2_row in zip(rows, t2, strict=True)
            }
        return found
    found = {
        f"{row.name} {name}": value
        for row in t2[:1]
        for name, value in (("T2 ms", row.mean), ("T2 SD ms", row.sd))
    }
    found |= {f"{row.name} bias of T2 %": row.bias_percent for row in t2[1:]}
    if "lesions" in truth.roi_names:
        white = truth.labels == 1 + list(truth.roi_names).index("white matter")
        known, seen = truth.t2_ms[white], maps["T2"][white]
        found["spread of T2 error in white matter %"] = 100 * float(np.std(seen / known - 1))
        found["correlation with the texture"] = float(np.corrcoef(known, seen)[0, 1])
    return found


def of_the_mean(runs: list[dict[str, float]]) -> dict[str, float]:
    """Largest bias of a region's mean over all runs: what more noise would not average away."""
    means = {key: float(np.mean([run[key] for run in runs])) for key in runs[0] if " bias " in key}
    return {
        title: max(
            (abs(value) for key, value in means.items() if key.startswith(start) and key.endswith(end))
        )
        for title, start, end in (
            ("largest T2 bias of the mean %, T2 ≥ 20 ms", "T2 bias ", " long"),
            ("largest T2 bias of the mean %, all", "T2 bias ", ""),
            ("largest T1 bias of the mean %, all", "T1 bias ", ""),
        )
        if any(key.startswith(start) for key in means)
    }


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
                    results["inr"].append(figures(reconstruct(scan, {"seed": seed, **UNHURRIED})[0], truth))
        for figure, value in of_the_mean(results["inr"]).items():
            print(f"| {name} | {figure} | {of_the_mean(results['lowrank'])[figure]:.4g} | {value:.4g} |")
        for figure in results["inr"][0]:
            if figure.startswith(("T1 bias", "T2 bias")):
                continue
            low = np.mean([run[figure] for run in results["lowrank"]])
            inr = [run[figure] for run in results["inr"]]
            print(
                f"| {name} | {figure} | {low:.4g} | {np.mean(inr):.4g} ({min(inr):.4g} to {max(inr):.4g}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
