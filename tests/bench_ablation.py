"""What each part of the INR contributes: errors with one part left out, or changed.

    python tests/bench_ablation.py [--seeds 3] [--toy]

Root mean squares of ln(T/truth) over the pixels of all regions, T1 / T2 %, means over noise seeds; of the
texture also the correlation in white matter; and the status, if it was not complete each time. Scans as in
`bench_repeats.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench_repeats import CASES as ALL_CASES
from bench_repeats import figures, mean_figures
from benchmarks import TOY, heading, machine, number, reconstruct, row, simulated, statuses
from benchmarks import parser as plain_parser
from whorl.recon.inr import InrFit

CASES = (
    "NIST T2 plate, golden",
    "NIST T2 plate, sequential",
    "brain, golden",
    "brain with texture, golden",
    "brain with texture, golden, noise 5e-3",
)
TOY_CASES = ("brain with texture, golden",)


def guide_as_it_is(images: Tensor, mask: Tensor, *, guide: Tensor, **_: Any) -> InrFit:
    """The guide in place of a fit to the images."""
    K = len(images)
    found = torch.complex(guide[:K], guide[K:]) if images.is_complex() else guide
    return InrFit(found * mask, (0.0,), torch.cat([guide, mask.to(guide.dtype)[None]]))


@dataclass(frozen=True, slots=True)
class Variant:
    """The INR with something changed: properties, or a part of the program."""

    name: str
    properties: dict[str, Any] = field(default_factory=dict)
    changed: Callable[[], AbstractContextManager[Any]] = nullcontext


VARIANTS = (
    Variant("default"),
    Variant("no guide (guide=off)", {"guide": "off"}),
    Variant(
        "guide alone: its images matched",
        {"head": "image"},
        lambda: patch("whorl.recon.methods.fit_inr", guide_as_it_is),
    ),
    Variant("guide gives nothing back", {}, lambda: patch("whorl.recon.guide._REMAINDERS", ())),
    Variant("coil_maps=walsh", {"coil_maps": "walsh"}),
    Variant("start=adjoint", {"start": "adjoint"}),
    Variant("head=image", {"head": "image"}),
    *(Variant(f"iterations={n}", {"iterations": n}) for n in (5, 10, 20, 50)),
    *(Variant(f"correction_steps={n}", {"correction_steps": n}) for n in (2, 4, 8, 12)),
    *(Variant(f"hidden={n}", {"hidden": n}) for n in (1, 8, 32, 64)),
    Variant("preset=seed", {"preset": "seed"}),
)


def parser() -> argparse.ArgumentParser:
    made = plain_parser(__doc__)
    made.add_argument("--seeds", type=int, default=3)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    told = parser().parse_args(argv)
    cases = TOY_CASES if told.toy else CASES
    seeds = range(1 if told.toy else told.seeds)
    less = {"iterations": 2} if told.toy else {}
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    said: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for seed in seeds:
            with simulated(**{**ALL_CASES[case], **(TOY if told.toy else {}), "seed": seed}) as (scan, truth):
                for variant in VARIANTS:
                    with variant.changed():
                        maps, status = reconstruct(scan, {**less, **variant.properties})
                    runs.setdefault((variant.name, case), []).append(figures(maps, truth))
                    said.setdefault((variant.name, case), []).append(status)
    print(f"{machine()}; means of {len(seeds)} noise seeds\n")
    heading("INR", *cases)
    for variant in VARIANTS:
        cells = []
        for case in cases:
            mean = mean_figures(runs[variant.name, case])
            texture = f", {number(mean['correlation'], 3)}" if "texture" in case else ""
            status = statuses(said[variant.name, case], "inr")
            marked = "" if status == "complete" else f" ({status})"
            cells.append(f"{number(mean['T1'])} / {number(mean['T2'])}{texture}{marked}")
        row(variant.name, *cells)


if __name__ == "__main__":
    main()
