"""Accuracy of low-rank and INR maps with a transmit field, in noise, and of other spheres.

Not a test: ``python tests/bench_accuracy.py`` prints the table of docs/validation.md. Each case is a
simulated scan with its own truth (500 timepoints, 256², 8 coils), reconstructed in this process
with default settings; `bench_repeats.py` has the main cases.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import ismrmrd
import numpy as np

from whorl.config import Settings
from whorl.doors.files import read_header, read_readouts
from whorl.maps.rois import (
    largest_bias_percent,
    mean_cov_percent,
    r_squared,
    region_statistics,
    well_seen,
)
from whorl.pipeline.scan import reconstruct_scan
from whorl.simulation.scan import simulate
from whorl.simulation.truth import Truth, read_truth


@dataclass(frozen=True, slots=True)
class Case:
    phantom: str
    plate: str = "t2"
    order: str = "golden"
    noise: float = 1e-3
    seed: int = 0
    b1: float = 0.0
    b1_known: str = ""

    @property
    def name(self) -> str:
        what = f"NIST {self.plate.upper()} plate" if self.phantom == "nist" else "brain"
        field = f", B1 ±{self.b1:.0%} {self.b1_known or 'not known'}" if self.b1 else ""
        return f"{what}, {self.order}, noise {self.noise:g}, seed {self.seed}{field}"


CASES = (
    Case("nist", noise=5e-3),
    Case("nist", plate="t1"),
    Case("nist", plate="t1", order="sequential"),
    *(
        Case(phantom, b1=0.2, b1_known=known)
        for phantom in ("nist", "brain")
        for known in ("", "from a map", "matched")
    ),
)


def coarse_map(b1: np.ndarray) -> np.ndarray:
    """A B1 map as it is measured, with pixels four times as wide, `(Z, Y/4, X/4)`; 0 outside the object."""
    Z, Y, X = b1.shape
    blocks = b1.reshape(Z, Y // 4, 4, X // 4, 4)
    inside = (blocks > 0).sum((2, 4))
    return np.where(inside > 4, blocks.sum((2, 4)) / np.maximum(inside, 1), 0)


def b1_properties(case: Case, truth: Truth, folder: Path) -> dict[str, object]:
    """What the reconstruction is told of the transmit field."""
    if case.b1_known == "from a map":
        np.save(folder / "b1.npy", coarse_map(truth.b1))
        return {"b1_map": str(folder / "b1.npy")}
    return {"b1": "match"} if case.b1_known == "matched" else {}


def reconstruct(scan: Path, properties: dict[str, object]) -> tuple[dict[str, np.ndarray], str]:
    """Maps `(slices, Y, X)` by quantity, and method and status."""
    images: list[ismrmrd.Image] = []
    settings = Settings.from_properties(properties)
    reconstruct_scan(
        read_header(scan), read_readouts(scan), settings, images.append, lambda level, text: None
    )
    maps: dict[str, list[np.ndarray]] = {}
    for image in images:
        values = image.data[0, 0] * float(image.meta["RescaleSlope"])
        maps.setdefault(image.meta["GADGETRON_DataRole"], []).append(values)
    status = f"{images[0].meta['whorl_method']}, {images[0].meta['whorl_status']}"
    return {role: np.stack(stack) for role, stack in maps.items()}, status


def main() -> None:
    print("| case | method | T1 CoV % | T2 CoV % | T1 R² | T2 R² | largest T1 bias % | largest T2 bias % |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            scan = Path(folder) / "scan.h5"
            simulate(
                scan,
                phantom=case.phantom,
                plate=case.plate,
                order=case.order,
                noise=case.noise,
                seed=case.seed,
                b1=case.b1,
            )
            truth = read_truth(scan)
            told = b1_properties(case, truth, Path(folder))
            for method in ("lowrank", "inr"):
                maps, _ = reconstruct(scan, {"method": method, "tuning_budget_s": 100, **told})
                t1 = region_statistics(maps["T1"], truth.labels, truth.roi_names, truth.roi_t1_ms)
                t2 = region_statistics(maps["T2"], truth.labels, truth.roi_names, truth.roi_t2_ms)
                t1_kept, t2_kept = well_seen({"T1": t1, "T2": t2}).values()
                biases = [largest_bias_percent(rows) for rows in (t1_kept, t2_kept)]
                print(
                    f"| {case.name} | {method} | {mean_cov_percent(t1):.1f} | {mean_cov_percent(t2):.1f} "
                    f"| {r_squared(t1_kept):.4f} | {r_squared(t2_kept):.4f} "
                    f"| {biases[0]:+.1f} | {biases[1]:+.1f} |"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
