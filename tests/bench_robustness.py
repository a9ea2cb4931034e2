"""What the model leaves out, and what it does to the maps: low-rank, LLR and INR side by side.

    python tests/bench_robustness.py [PHANTOM ...] [--toy]

Each case is a simulated scan (500 timepoints, golden order, 256², 8 coils, noise 1e-3) with one disturbance
that the reconstruction is not told; coil maps are estimated from the data.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks import TOY, heading, machine, reconstruct, row, simulated
from benchmarks import parser as plain_parser
from whorl.maps.rois import region_statistics

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
TOY_CASES = ("fat",)
METHODS = ("lowrank", "llr", "inr")
#: Of the NIST plate, the spheres with T2 of tissue.
SPHERES = ("Mn-5", "Mn-6", "Mn-7")


def parser() -> argparse.ArgumentParser:
    made = plain_parser(__doc__)
    made.add_argument("phantoms", nargs="*", metavar="PHANTOM", help="of brain, nist")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    told = parser().parse_args(argv)
    phantoms = told.phantoms or (["brain"] if told.toy else ["brain", "nist"])
    print(f"{machine()}\n")
    heading("phantom, disturbance", "method", "status", "T1 bias ± CoV %", "T2 bias ± CoV %")
    for phantom in phantoms:
        for name in TOY_CASES if told.toy else CASES:
            if phantom == "nist" and name == "fat":
                continue
            with simulated(phantom=phantom, **CASES[name], **(TOY if told.toy else {})) as (scan, truth):
                for method in METHODS:
                    maps, status = reconstruct(scan, {"method": method})
                    cells = []
                    for role, known in (("T1", truth.roi_t1_ms), ("T2", truth.roi_t2_ms)):
                        found = region_statistics(maps[role], truth.labels, truth.roi_names, known)
                        shown = [one for one in found if phantom != "nist" or one.name in SPHERES]
                        cells.append(
                            ", ".join(f"{one.bias_percent:+.1f} ± {one.cov_percent:.1f}" for one in shown)
                        )
                    row(f"{phantom}, {name}", method, status, *cells)


if __name__ == "__main__":
    main()
