"""What the model leaves out, and what it does to the maps: low-rank, LLR and INR side by side.

Not a test: ``python tests/bench_robustness.py`` prints the table of docs/validation.md. Each case is a
simulated scan (500 timepoints, golden order, 256², 8 coils, noise 1e-3) with one disturbance that the
reconstruction is not told; coil maps are estimated from the data.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_accuracy import reconstruct
from bench_repeats import UNHURRIED
from whorl.maps.rois import region_statistics
from whorl.simulation.scan import simulate
from whorl.simulation.truth import read_truth

CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "B0 ±50 Hz": {"b0_hz": 50.0},
    "B0 ±100 Hz": {"b0_hz": 100.0},
    "B1 ±20 %": {"b1": 0.2},
    "gradient delay 2 µs": {"gradient_delay_us": 2.0},
    "phase jump π/2": {"phase_jump_rad": 1.5708},
    "phase jump π": {"phase_jump_rad": 3.1416},
    "motion 1 pixel": {"motion_pixels": 1.0},
    "fat": {"fat": True},
}
METHODS = ("lowrank", "llr", "inr")
QUANTITIES = (("T1", "roi_t1_ms"), ("T2", "roi_t2_ms"))


def main() -> None:
    phantoms = sys.argv[1:] or ["brain", "nist"]
    print("| phantom, disturbance | method | status | T1 bias ± CoV % | T2 bias ± CoV % |")
    print("|---|---|---|---|---|")
    for phantom in phantoms:
        for name, disturbance in CASES.items():
            if phantom == "nist" and "fat" in disturbance:
                continue
            with tempfile.TemporaryDirectory() as folder:
                scan = Path(folder) / "scan.h5"
                simulate(scan, phantom=phantom, **disturbance)
                truth = read_truth(scan)
                for method in METHODS:
                    maps, status = reconstruct(scan, {"method": method, **UNHURRIED})
                    cells = []
                    for role, known in QUANTITIES:
                        rows = region_statistics(
                            maps[role], truth.labels, truth.roi_names, getattr(truth, known)
                        )
                        if phantom == "nist":  # the three spheres with T2 of tissue
                            rows = rows[4:7]
                        cells.append(", ".join(f"{r.bias_percent:+.1f} ± {r.cov_percent:.1f}" for r in rows))
                    print(
                        f"| {phantom}, {name} | {method} | {status} | {cells[0]} | {cells[1]} |", flush=True
                    )


if __name__ == "__main__":
    main()
