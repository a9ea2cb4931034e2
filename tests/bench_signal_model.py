"""Is the signal model right? Noiseless signals of an independent simulation, matched.

    python tests/bench_signal_model.py [match] [ranges] [profile] [--toy]

Tissues lie at random, off the grid, over T1 50 to 4000 ms and T2 8 to 2000 ms (T2 <= T1), uniformly in their
logarithms. Their signals are those of the simulator's own EPG, with every state and in double precision.

* match: errors of the match, all tissues together.
* ranges: those with a B1 map, by range of T1 and T2.
* profile: how well few places across the slice stand for many.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks import heading, machine, row
from benchmarks import parser as plain_parser
from whorl.physics.dictionary import DictionaryParameters, build_dictionary
from whorl.physics.epg import SignalModel, fisp_signal
from whorl.physics.matching import Match, match
from whorl.physics.sliceprofile import flip_profile, hann_sinc
from whorl.scan.train import Train
from whorl.simulation.signals import fisp_signals, jiang_train

T1_EDGES_MS = (50.0, 200.0, 800.0, 4000.0)
T2_EDGES_MS = (8.0, 40.0, 200.0, 2000.0)
B1_VALUES = 12


@dataclass(frozen=True, slots=True)
class Size:
    """Timepoints of the train, tissues of a case, relative step of the grid, and that of B1."""

    timepoints: int = 500
    tissues: int = 900
    step: float = 0.05
    b1_step: float = 0.02


TOY = Size(60, 40, 0.2, 0.2)


@dataclass(frozen=True, slots=True)
class Case:
    """What the tissues are seen through, and what the match knows of it."""

    name: str
    known: str = ""
    refine: bool = True
    efficiency: float = 1.0
    profile: tuple[float, ...] = ()
    seed: int = 0


CASES = (
    Case("best atom of the 5 % grid", refine=False),
    Case("refined match", seed=1),
    Case("refined match, B1 0.8 to 1.2 from a map", known="map"),
    Case("refined match, B1 0.8 to 1.2 from a map", known="map", seed=1),
    Case("refined match, B1 0.8 to 1.2 matched too", known="match"),
    Case("refined match, efficiency 0.9, profile 1/0.9/0.6/0.2", efficiency=0.9, profile=(1, 0.9, 0.6, 0.2)),
)
BY_RANGE = Case("by range", known="map")


def tissues(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    t1 = np.exp(rng.uniform(np.log(T1_EDGES_MS[0]), np.log(T1_EDGES_MS[-1]), 4 * n))
    t2 = np.exp(rng.uniform(np.log(T2_EDGES_MS[0]), np.log(T2_EDGES_MS[-1]), 4 * n))
    kept = np.flatnonzero(t2 <= t1)[:n]
    return t1[kept], t2[kept]


def train_of(n: int) -> Train:
    played = jiang_train(n)
    return Train(played.flip_deg, played.tr_ms, played.te_ms, np.zeros(n), played.ti_ms, "simulated")


def matched(case: Case, size: Size) -> tuple[np.ndarray, np.ndarray, np.ndarray, Match]:
    """True T1, T2 and B1 `(V,)`, and what was matched."""
    rng = np.random.default_rng(case.seed)
    played = jiang_train(size.timepoints)
    t1, t2 = tissues(rng, size.tissues)
    b1 = rng.uniform(0.8, 1.2, B1_VALUES)[np.arange(len(t1)) % B1_VALUES] if case.known else np.ones(len(t1))
    signals = fisp_signals(
        played, t1, t2, b1=b1, inversion_efficiency=case.efficiency, slice_profile=case.profile
    )
    model = SignalModel(case.efficiency, np.array(case.profile or (1.0,))[:, None])
    parameters = DictionaryParameters(
        train_of(size.timepoints),
        model,
        step=size.step,
        b1_range=(0.8, 1.2) if case.known else (1.0, 1.0),
        b1_step=size.b1_step,
    )
    dictionary = build_dictionary(parameters)
    voxels = torch.from_numpy(signals).to(torch.complex64) @ dictionary.basis.to(torch.complex64)
    known = torch.from_numpy(b1) if case.known == "map" else None
    return t1, t2, b1, match(voxels, dictionary, b1=known, refine=case.refine)


def profile(size: Size) -> None:
    train = train_of(size.timepoints)
    t1, t2 = (torch.tensor(values) for values in ([300.0, 830.0, 1350.0, 4000.0], [50.0, 60.0, 85.0, 1500.0]))
    shown = ", ".join(f"{a:g}/{b:g}" for a, b in zip(t1.tolist(), t2.tolist(), strict=True))
    heading("sinc pulse, time-bandwidth", "places", f"bias of T1 / T2 % at {shown} ms")
    for time_bandwidth in (2.0, 4.0, 8.0):
        many = flip_profile(hann_sinc(time_bandwidth), time_bandwidth, train.flip_deg, 96)
        signal = fisp_signal(train, t1, t2, model=SignalModel(profile=many))
        for places in (8, 16):
            few = flip_profile(hann_sinc(time_bandwidth), time_bandwidth, train.flip_deg, places)
            dictionary = build_dictionary(
                DictionaryParameters(train, SignalModel(profile=few), step=size.step)
            )
            found = match(signal @ dictionary.basis, dictionary)
            e1, e2 = 100 * (found.t1_ms / t1 - 1), 100 * (found.t2_ms / t2 - 1)
            errors = ", ".join(f"{a:+.2f} / {b:+.2f}" for a, b in zip(e1.tolist(), e2.tolist(), strict=True))
            row(f"{time_bandwidth:g}", places, errors)


def matching(size: Size) -> None:
    heading(
        f"{size.timepoints} timepoints, no noise",
        "largest error T1 / T2 %",
        "mean error T1 / T2 %",
        "largest B1 error",
    )
    for case in CASES:
        t1, t2, b1, found = matched(case, size)
        e1, e2 = 100 * (found.t1_ms.numpy() / t1 - 1), 100 * (found.t2_ms.numpy() / t2 - 1)
        row(
            f"{case.name}, seed {case.seed}",
            f"{np.abs(e1).max():.3f} / {np.abs(e2).max():.3f}",
            f"{e1.mean():+.3f} / {e2.mean():+.3f}",
            f"{np.abs(found.b1.numpy() - b1).max():.4f}" if case.known == "match" else "–",
        )


def ranges(size: Size) -> None:
    t1, t2, _, found = matched(BY_RANGE, size)
    e1, e2 = 100 * (found.t1_ms.numpy() / t1 - 1), 100 * (found.t2_ms.numpy() / t2 - 1)
    heading("T1 ms", "T2 ms", "tissues", "bias T1 / T2 %", "largest error T1 / T2 %")
    for (low1, high1), (low2, high2) in itertools.product(
        itertools.pairwise(T1_EDGES_MS), itertools.pairwise(T2_EDGES_MS)
    ):
        n = (t1 >= low1) & (t1 < high1) & (t2 >= low2) & (t2 < high2)
        if n.any():
            row(
                f"{low1:g}–{high1:g}",
                f"{low2:g}–{high2:g}",
                n.sum(),
                f"{e1[n].mean():+.3f} / {e2[n].mean():+.3f}",
                f"{np.abs(e1[n]).max():.3f} / {np.abs(e2[n]).max():.3f}",
            )


PARTS = {"match": matching, "ranges": ranges, "profile": profile}


def parser() -> argparse.ArgumentParser:
    made = plain_parser(__doc__)
    made.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    told = parser().parse_args(argv)
    print(machine())
    for part in told.parts or PARTS:
        print()
        PARTS[part](TOY if told.toy else Size())


if __name__ == "__main__":
    main()
