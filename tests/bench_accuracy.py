"""Accuracy of low-rank and INR maps where the transmit field varies: not known, from a map, or matched.

    python tests/bench_accuracy.py [--toy]

Each case is a simulated scan with its own truth (500 timepoints, 256², 8 coils), reconstructed in this
process with default settings; `bench_repeats.py` has the cases without a field.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import TOY, heading, machine, number, reconstruct, row, simulated
from benchmarks import parser as plain_parser
from whorl.maps.rois import (
    largest_bias_percent,
    mean_cov_percent,
    r_squared,
    region_statistics,
    well_seen,
)
from whorl.simulation.truth import Truth

#: Largest deviation of the field from 1.
B1 = 0.2
KNOWN = ("not known", "from a map", "matched")
#: At toy size few steps of B1: a dictionary with all of them takes long.
_TOY_PROPERTIES = {"b1_step": 0.2, "dictionary_step": 0.2}


def coarse_map(b1: NDArray[np.floating]) -> NDArray[np.floating]:
    """A B1 map as it is measured, with pixels four times as wide, `(Z, Y/4, X/4)`; 0 outside the object."""
    Z, Y, X = b1.shape
    blocks = b1.reshape(Z, Y // 4, 4, X // 4, 4)
    inside = (blocks > 0).sum((2, 4))
    return np.where(inside > 4, blocks.sum((2, 4)) / np.maximum(inside, 1), 0)


def b1_properties(known: str, truth: Truth, folder: Path) -> dict[str, object]:
    """What the reconstruction is told of the transmit field."""
    if known == "from a map":
        np.save(folder / "b1.npy", coarse_map(truth.b1))
        return {"b1_map": str(folder / "b1.npy")}
    return {"b1": "match"} if known == "matched" else {}


def parser() -> argparse.ArgumentParser:
    return plain_parser(__doc__)


def main(argv: Sequence[str] | None = None) -> None:
    told = parser().parse_args(argv)
    size, more = (TOY, _TOY_PROPERTIES) if told.toy else ({}, {})
    print(f"{machine()}\n")
    heading(
        "phantom",
        f"B1 ±{B1:.0%}",
        "method",
        "status",
        "CoV T1 / T2 %",
        "R² T1 / T2",
        "largest bias T1 / T2 %",
    )
    for phantom in ("brain",) if told.toy else ("nist", "brain"):
        with (
            simulated(phantom=phantom, b1=B1, **size) as (scan, truth),
            tempfile.TemporaryDirectory() as folder,
        ):
            for known in KNOWN:
                properties = {**more, **b1_properties(known, truth, Path(folder))}
                for method in ("lowrank", "inr"):
                    maps, status = reconstruct(scan, {"method": method, **properties})
                    rows = {
                        role: region_statistics(maps[role], truth.labels, truth.roi_names, of_regions)
                        for role, of_regions in (("T1", truth.roi_t1_ms), ("T2", truth.roi_t2_ms))
                    }
                    kept = well_seen(rows)
                    row(
                        phantom,
                        known,
                        method,
                        status.removeprefix(f"{method}, "),
                        " / ".join(number(mean_cov_percent(of)) for of in rows.values()),
                        " / ".join(number(r_squared(of), 4) for of in kept.values()),
                        " / ".join(number(largest_bias_percent(of), sign=True) for of in kept.values()),
                    )


if __name__ == "__main__":
    main()
