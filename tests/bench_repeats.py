"""Accuracy of the methods, means over noise seeds: the heart of docs/validation.md.

    python tests/bench_repeats.py [CASE ...] [--methods lowrank llr inr] [--seeds 3] [--toy]

Each scan is simulated with its own truth (500 timepoints unless it says otherwise, 96 interleaves, 8 coils,
256²) and reconstructed in this process with default settings. Errors are root mean squares of ln(T/truth)
over the pixels of all regions; the coefficient of variation is SD / mean over the pixels of a region, mean
over the regions; the bias is that of a region's mean, the largest of all regions; all of them are those of
one scan, and then the mean over the seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import (
    TOY,
    TOY_WITH_SPHERES,
    Maps,
    error,
    heading,
    machine,
    number,
    reconstruct,
    row,
    simulated,
    statuses,
)
from benchmarks import parser as plain_parser
from whorl.maps.rois import RegionStatistics, mean_cov_percent, region_statistics
from whorl.simulation.truth import Truth

CASES: dict[str, dict[str, Any]] = {
    "NIST T2 plate, golden": {"phantom": "nist"},
    "NIST T2 plate, golden, noise 5e-3": {"phantom": "nist", "noise": 5e-3},
    "NIST T2 plate, golden, noise 1e-2": {"phantom": "nist", "noise": 1e-2},
    "NIST T2 plate, sequential": {"phantom": "nist", "order": "sequential"},
    "NIST T2 plate, golden, 300 timepoints": {"phantom": "nist", "timepoints": 300},
    "NIST T1 plate, golden": {"phantom": "nist", "plate": "t1"},
    "NIST T1 plate, sequential": {"phantom": "nist", "plate": "t1", "order": "sequential"},
    "brain, golden": {"phantom": "brain"},
    "brain, sequential": {"phantom": "brain", "order": "sequential"},
    "brain, golden, noise 5e-3": {"phantom": "brain", "noise": 5e-3},
    "brain with texture, golden": {"phantom": "texture"},
    "brain with texture, golden, noise 5e-3": {"phantom": "texture", "noise": 5e-3},
}
TOY_CASES = {"NIST T2 plate, golden": TOY_WITH_SPHERES, "brain with texture, golden": TOY}
METHODS = ("lowrank", "llr", "inr")
#: ms; shorter T2 hardly show in a train.
_WELL_SEEN_T2_MS = 20.0


def largest_bias(rows: list[RegionStatistics], shortest_t2_ms: float) -> float:
    """Largest bias of T2 in %, without its sign."""
    return max((abs(one.bias_percent) for one in rows if one.truth >= shortest_t2_ms), default=float("nan"))


def figures(maps: Maps, truth: Truth) -> dict[str, float]:
    """The figures of one scan, by name; NaN for what it does not have."""
    t1 = region_statistics(maps["T1"], truth.labels, truth.roi_names, truth.roi_t1_ms)
    t2 = region_statistics(maps["T2"], truth.labels, truth.roi_names, truth.roi_t2_ms)
    of_t1, of_t2 = error(maps, truth)
    found = {
        "T1": of_t1,
        "T2": of_t2,
        "T1 CoV": mean_cov_percent(t1),
        "T2 CoV": mean_cov_percent(t2),
        "T2 bias, well seen": largest_bias(t2, _WELL_SEEN_T2_MS),
        "T2 bias": largest_bias(t2, 0),
        "correlation": float("nan"),
        "lesions": float("nan"),
    }
    if "lesions" in truth.roi_names:
        # Where the texture is, and nothing else.
        white = (truth.labels == 1 + list(truth.roi_names).index("white matter")) & (maps["T2"] > 0)
        found["correlation"] = float(np.corrcoef(truth.t2_ms[white], maps["T2"][white])[0, 1])
        found["lesions"] = next((one.bias_percent for one in t2 if one.name == "lesions"), float("nan"))
    return found


def mean_figures(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}


def parser() -> argparse.ArgumentParser:
    made = plain_parser(__doc__)
    made.add_argument("cases", nargs="*", metavar="CASE", help=f"of: {'; '.join(CASES)}")
    made.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    made.add_argument("--seeds", type=int, default=3)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    told = parser().parse_args(argv)
    cases = told.cases or (TOY_CASES if told.toy else CASES)
    print(f"{machine()}; means of {1 if told.toy else told.seeds} noise seeds\n")
    heading(
        "case", "method", "status", "error T1 / T2 %", "CoV T1 / T2 %",
        "largest bias of T2 %, T2 ≥ 20 ms / all", "correlation with the texture", "bias of T2 in lesions %",
    )  # fmt: skip
    for case in cases:
        runs: dict[str, list[dict[str, float]]] = {method: [] for method in told.methods}
        said: dict[str, list[str]] = {method: [] for method in told.methods}
        for seed in range(1 if told.toy else told.seeds):
            size = TOY_CASES.get(case, TOY) if told.toy else {}
            with simulated(**{**CASES[case], **size, "seed": seed}) as (scan, truth):
                for method, of_method in runs.items():
                    maps, status = reconstruct(scan, {"method": method})
                    of_method.append(figures(maps, truth))
                    said[method].append(status)
        for method, of_method in runs.items():
            mean = mean_figures(of_method)
            pairs = [
                f"{number(mean[a])} / {number(mean[b])}"
                for a, b in (("T1", "T2"), ("T1 CoV", "T2 CoV"), ("T2 bias, well seen", "T2 bias"))
            ]
            status = statuses(said[method], method)
            row(
                case,
                method,
                status,
                *pairs,
                number(mean["correlation"], 3),
                number(mean["lesions"], sign=True),
            )


if __name__ == "__main__":
    main()
