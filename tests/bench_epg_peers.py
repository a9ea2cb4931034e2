"""Time of the EPG beside two independent programs, MRpro and blochsim, with the error of each.

    python tests/bench_epg_peers.py [--toy]

Medians of several runs after one that is not counted. The peers (`make peers` installs them) keep the fewest
states that leave an error of at most 1e-3 of each atom's peak, and then as many as make them as accurate as
whorl, which does as it does by default. All compute in single precision on all cores.

Letters: T timepoints, N atoms.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import heading, machine, row
from benchmarks import parser as plain_parser
from epg_peers import Peer, blochsim_peer, mrpro_peer
from whorl.physics.dictionary import Grid, log_grid
from whorl.physics.epg import fisp_signal
from whorl.scan.train import Train
from whorl.simulation.signals import fisp_signals, jiang_train

#: Pulses, and relative steps of T1 and T2.
FULL, TOY = (500, 0.063), (20, 0.4)
# What is asked of a dictionary, and what whorl has.
ACCURACIES = (1e-3, 2.1e-5)


def atoms(step: float) -> tuple[Tensor, Tensor]:
    """T1 and T2 in ms: all pairs with T2 <= T1 of two logarithmic grids."""
    t1, t2, _ = Grid(log_grid(20, 5000, step), log_grid(4, 3000, step)).atoms()
    return t1, t2


def seconds(run: Callable[[], object], times: int = 5) -> tuple[float, float]:
    """Median and spread."""
    run()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken), max(taken) - min(taken)


def worst(signals: Tensor, exact: NDArray[np.complex128]) -> float:
    """Largest error of all atoms, each relative to its own peak."""
    difference = np.abs(signals.numpy() - exact).max(1)
    return float((difference / np.abs(exact).max(1)).max())


def fewest_states(
    peer: Callable[..., Peer],
    train: Train,
    t1: Tensor,
    t2: Tensor,
    exact: NDArray[np.complex128],
    accuracy: float,
) -> int:
    """Fewest states within the accuracy, by halving: the error falls as they become more."""
    low, high = 2, train.n_timepoints // 2 + 1  # what rises above does not return within the train
    while low < high:
        middle = (low + high) // 2
        if worst(peer(train, middle)(t1, t2), exact) <= accuracy:
            high = middle
        else:
            low = middle + 1
    return low


def parser() -> argparse.ArgumentParser:
    return plain_parser(__doc__)


def main(argv: Sequence[str] | None = None) -> None:
    T, step = TOY if parser().parse_args(argv).toy else FULL
    played = jiang_train(T)
    train = Train(played.flip_deg, played.tr_ms, played.te_ms, played.phase_deg, played.ti_ms, "simulated")
    t1, t2 = atoms(step)
    print(f"{machine()}; {len(t1)} atoms × {T} pulses\n")
    # The simulator's pulses turn +z to -iy, whorl's to x.
    exact = 1j * fisp_signals(played, t1.double().numpy(), t2.double().numpy())

    def report(
        name: str, taken: tuple[float, float], states: str, signals: Tensor | None, ratio: str
    ) -> None:
        error = "" if signals is None else f"{worst(signals, exact):.2e}"
        row(name, states, f"{taken[0]:.3f}", f"{taken[1]:.3f}", error, ratio)

    heading("program", "states", "s, median", "spread", "largest error", "times whorl's")
    own = seconds(lambda: fisp_signal(train, t1, t2))
    report("whorl, tolerance 1e-3 (as by default)", own, "by T2", fisp_signal(train, t1, t2), "1.0")

    some = torch.cat([torch.arange(0, len(t1), 23), torch.tensor([len(t1) - 1])])  # the longest T1 and T2 too
    peers = (("MRpro", "mrpro", mrpro_peer, ""), ("blochsim", "blochsim", blochsim_peer, ", a new train"))
    for accuracy, (name, package, peer, note) in itertools.product(ACCURACIES, peers):
        try:
            states = fewest_states(peer, train, t1[some], t2[some], exact[some.numpy()], accuracy)
        except ImportError as error:
            row(f"{name}: dropped, it cannot be imported ({error})", "", "", "", "", "")
            continue
        taken = seconds(lambda peer=peer, states=states: peer(train, states)(t1, t2), 3)
        label = f"{name} {version(package)}{note}"
        report(label, taken, str(states), peer(train, states)(t1, t2), f"{taken[0] / own[0]:.1f}")
        if note:  # it takes the train apart event by event, once
            again = peer(train, states)
            taken = seconds(lambda again=again: again(t1, t2))
            report(f"{name}, the same train again", taken, str(states), None, f"{taken[0] / own[0]:.1f}")


if __name__ == "__main__":
    main()
