"""What is marked: clean scans, of which none should be, and damaged ones, of which all should be.

    python tests/bench_guards.py [--methods inr lowrank] [--only TEXT] [--keep FOLDER] [--toy]

Each scan is simulated, damaged in memory and reconstructed in this process with default settings. A scan is
marked if the status of its maps is not "complete", or if it is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import error, heading, machine, maps_of, number, row
from benchmarks import parser as plain_parser
from scan_edit import Scan
from whorl.scan.failure import ScanError
from whorl.simulation.phantoms import Phantom, letters
from whorl.simulation.scan import simulate
from whorl.simulation.truth import Truth, read_truth

Damage = Callable[[Scan], object]


def nothing(scan: Scan) -> None:
    """As it was measured."""


@dataclass(frozen=True, slots=True)
class Case:
    """A simulated scan, what is done to it, and what that is called."""

    scan: dict[str, Any]
    damage: Damage = nothing
    what: str = ""

    @property
    def name(self) -> str:
        return f"{self.what}: {described(self.scan)}".removeprefix(": ")


def measured(
    phantom: str,
    matrix: int,
    interleaves: int,
    timepoints: int,
    noise: float,
    coils: int,
    order: str = "golden",
    **more: Any,
) -> dict[str, Any]:
    """Arguments of `simulate`, and perhaps the T1 and T2 of `tissue` in ms, of which all of the object is."""
    return dict(
        phantom=phantom,
        matrix=matrix,
        interleaves=interleaves,
        timepoints=timepoints,
        noise=noise,
        coils=coils,
        order=order,
        **more,
    )


def described(scan: dict[str, Any]) -> str:
    """Arguments of `simulate` as words: matrix, interleaves, timepoints, noise, coils, order and others."""
    usual = "{phantom} {matrix}², {interleaves} il, {timepoints} tp, {noise:g}, {coils} coils, {order}"
    others = scan.keys() - measured("", 0, 0, 0, 0, 0).keys() - set().union(*DISTURBED.values())
    return ", ".join([usual.format(**scan), *(f"{name} {scan[name]}" for name in sorted(others))])


#: 64² to 320², 16 to 96 interleaves, 200 to 1000 timepoints, noise 1e-3 to 1e-2, 1 to 32 coils, all orders.
SCANS = (
    measured("nist", 256, 96, 500, 1e-3, 8),
    measured("nist", 256, 96, 500, 5e-3, 8),
    measured("nist", 256, 96, 500, 1e-2, 8),
    measured("nist", 256, 96, 500, 1e-3, 8, "sequential"),
    measured("nist", 256, 96, 400, 1e-3, 8),
    measured("nist", 256, 96, 300, 1e-3, 8),
    measured("nist", 256, 96, 500, 1e-3, 8, plate="t1"),
    measured("nist", 256, 96, 500, 2e-3, 8, "sequential", plate="t1"),
    measured("nist", 256, 64, 500, 1e-3, 8),
    measured("nist", 192, 48, 1000, 2e-3, 16),
    measured("nist", 160, 96, 400, 1e-3, 8, "golden-angle"),
    measured("nist", 128, 48, 200, 1e-3, 4),
    measured("nist", 128, 32, 500, 1e-2, 32, plate="t1"),
    measured("nist", 64, 24, 200, 1e-3, 2),
    measured("nist", 64, 16, 300, 5e-3, 1, "sequential"),
    measured("brain", 320, 96, 500, 1e-3, 12),
    measured("brain", 320, 96, 1000, 5e-3, 4, "sequential"),
    measured("brain", 256, 96, 500, 1e-3, 8),
    measured("brain", 256, 96, 500, 5e-3, 8),
    measured("brain", 256, 96, 500, 1e-2, 8),
    measured("brain", 256, 96, 1000, 1e-2, 8),
    measured("brain", 256, 96, 500, 1e-3, 8, "sequential"),
    measured("brain", 256, 96, 500, 1e-3, 8, "golden-angle"),
    measured("brain", 256, 32, 500, 2e-3, 8, readout_ms=5.0),
    measured("brain", 192, 64, 400, 3e-3, 32),
    measured("brain", 128, 48, 300, 2e-3, 1),
    measured("brain", 128, 24, 500, 1e-3, 6, "sequential"),
    measured("brain", 96, 32, 250, 5e-3, 4),
    measured("brain", 64, 16, 200, 1e-2, 2),
    measured("texture", 256, 96, 500, 1e-3, 8),
    measured("texture", 256, 96, 500, 5e-3, 8, seed=3),
    measured("texture", 256, 96, 800, 1e-2, 8, seed=4),
    measured("texture", 192, 48, 500, 1e-3, 4, "sequential"),
    measured("texture", 128, 48, 300, 2e-3, 16),
    measured("texture", 128, 64, 500, 1e-3, 8, "golden-angle"),
    measured("texture", 64, 32, 200, 5e-3, 8),
    # Corners that lie between the coils.
    measured("letters", 256, 96, 500, 1e-3, 8),
    measured("letters", 256, 96, 500, 5e-3, 8, "sequential"),
    measured("letters", 192, 96, 300, 1e-2, 8),
    measured("letters", 128, 48, 200, 1e-3, 4),
    measured("letters", 128, 32, 500, 3e-3, 1),
    measured("letters", 96, 24, 250, 1e-2, 4, "sequential"),
    measured("letters", 64, 16, 300, 1e-3, 32),
    measured("letters", 64, 24, 200, 2e-3, 2, "golden-angle"),
    # Cerebrospinal fluid, and both ends of the dictionary.
    measured("letters", 128, 48, 400, 1e-3, 8, tissue=(4200, 1900)),
    measured("letters", 128, 48, 400, 1e-2, 8, tissue=(4200, 1900)),
    measured("letters", 128, 48, 400, 5e-3, 4, tissue=(4500, 2600)),
    measured("letters", 128, 48, 400, 1e-3, 8, tissue=(60, 7)),
)


# --- Damage -----------------------------------------------------------------------------------------------


def listed(scan: Scan, name: str) -> np.ndarray:
    """A list of the header's sequence parameters `(T,)`."""
    parts = scan.header.split(f"<{name}>".encode())[1:]
    return np.array([float(part.split(b"<")[0]) for part in parts])


def told(name: str, change: Callable[[np.ndarray], Iterable[float]]) -> Damage:
    """Another list in the header than what was played; the readouts tell nothing."""
    return lambda scan: scan.no_user_train().header_list(name, change(listed(scan, name)))


def spike(factor: float, sample: int | slice, *readouts: int, coil: int | slice = slice(None)) -> Damage:
    """Samples of some readouts times a factor."""

    def damage(scan: Scan) -> None:
        for r in readouts:
            scan.data[scan.imaging[r]][coil, sample] *= np.float32(factor)

    return damage


def zeros(*readouts: int) -> Damage:
    """Readouts that were never filled."""
    return spike(0, slice(None), *readouts)


def copied(*readouts: int) -> Damage:
    """Readouts that hold the data of the one before the first."""

    def damage(scan: Scan) -> None:
        for r in readouts:
            scan.data[scan.imaging[r]] = scan.data[scan.imaging[readouts[0] - 1]].copy()

    return damage


def column(values: Callable[[np.ndarray], np.ndarray]) -> Damage:
    """A third column of the trajectory, made of the radius `(S,)`."""
    return lambda scan: scan.trajectory(lambda k: np.hstack([k, values(np.hypot(*k.T))[:, None]]))


def only_noise(scan: Scan) -> None:
    rng = np.random.default_rng(0)
    for n in scan.imaging:
        noise = rng.standard_normal((2, *scan.data[n].shape)).astype(np.float32)
        scan.data[n] = (noise[0] + 1j * noise[1]) * np.abs(scan.data[0]).mean()


def shuffled(scan: Scan) -> None:
    """Each timepoint has the number of another one, as if the order of the train were another."""
    at = scan.imaging
    order = np.random.default_rng(0).permutation(len(at))
    scan.no_user_train()
    scan.heads["user_int"][at, 0] = order
    scan.heads["idx"]["repetition"][at] = order


def stretched(flip_deg: np.ndarray) -> np.ndarray:
    """The lobes of a train half as long again."""
    return np.interp(np.arange(len(flip_deg)) / 1.5, np.arange(len(flip_deg)), flip_deg)


#: Trains that were not played.
WRONG: dict[str, Damage] = {
    "inversion not told": lambda scan: scan.header_list("TI", []),
    "TI 300 for 20 ms": lambda scan: scan.header_list("TI", [300]),
    "TI 1000 for 20 ms": lambda scan: scan.header_list("TI", [1000]),
    "flip angles × 2": told("flipAngle_deg", lambda flip: 2 * flip),
    "flip angles / 2": told("flipAngle_deg", lambda flip: flip / 2),
    "flip angles reversed": told("flipAngle_deg", lambda flip: flip[::-1]),
    "flip angles constant": told("flipAngle_deg", lambda flip: np.full_like(flip, flip.mean())),
    "lobes × 1.5": told("flipAngle_deg", stretched),
    "lobes half a lobe later": told("flipAngle_deg", lambda flip: np.roll(flip, 100)),
    "TR × 10": told("TR", lambda tr: 10 * tr),
    "TR / 2": told("TR", lambda tr: tr / 2),
    "timepoints shuffled": shuffled,
    "only noise": only_noise,
}
BASES = (
    measured("brain", 128, 48, 500, 1e-3, 8),
    measured("brain", 128, 48, 300, 5e-3, 8, "sequential"),
    measured("nist", 128, 48, 500, 1e-3, 8),
)
DISTURBED: dict[str, dict[str, Any]] = {
    "phase jump π/2": {"phase_jump_rad": 1.5708},
    "phase jump π": {"phase_jump_rad": 3.1416},
    "fat": {"fat": True},
    "gradients 2 µs late": {"gradient_delay_us": 2.0},
    "gradients 5 µs late": {"gradient_delay_us": 5.0},
}
SPOILT: dict[str, Damage] = {
    "first sample × 10": spike(10, 0, 100),
    "fifth sample × 30, one coil": spike(30, 4, 0, coil=1),
    "middle × 100": spike(100, 440, 130),
    "last sample × 1000": spike(1000, -1, 299),
    "three samples × 1000, five readouts": spike(1000, slice(200, 203), 20, 90, 91, 150, 260),
    "whole readout × 10": spike(10, slice(None), 64),
    "whole readout × 1000, one coil": spike(1000, slice(None), 63, coil=2),
    "sample 200 × 1000, 20 readouts on end": spike(1000, 200, *range(100, 120)),
    "sample 200 × 100, every second readout": spike(100, 200, *range(0, 300, 2)),
    "sample 200 × 10⁴, all readouts": spike(1e4, 200, *range(300)),
    "whole readouts × 10, 20 on end": spike(10, slice(None), *range(100, 120)),
    "5 readouts of zeros": zeros(*range(250, 255)),
    "a fifth of the readouts zeros": zeros(*range(0, 300, 5)),
    "20 readouts copied": copied(*range(150, 170)),
    "50 readouts copied": copied(*range(150, 200)),
    "third column k/kmax": column(lambda radius: radius / radius.max()),
    "third column not a number": column(lambda radius: radius * np.nan),
    "third column a rounded kz": column(lambda radius: np.round(0.05 + 0.02 * radius, 2)),
}


#: What is not marked, and why.
UNSEEN = {
    "TI 300 for 20 ms": "other T1 explain it",
    "TI 1000 for 20 ms": "other T1 explain it",
    "flip angles × 2": "other T2 explain it",
    "flip angles / 2": "other T2 explain it",
    "flip angles constant": "other T2 explain it",
    "TR / 2": "T1 and T2 of half the length explain it",
    "gradients 2 µs late": "blurs alike at all timepoints",
    "gradients 5 µs late": "blurs alike at all timepoints",
}


def damaged() -> Iterable[Case]:
    for name, damage in WRONG.items():
        yield from (Case(base, damage, name) for base in BASES)
    for name, options in DISTURBED.items():
        yield from (Case({**base, **options}, what=name) for base in BASES[:2])
    yield from (Case(BASES[1], damage, name) for name, damage in SPOILT.items())


CLEAN = tuple(Case(scan) for scan in (*SCANS, *BASES))
DAMAGED = tuple(damaged())

SMALL = measured("nist", 64, 24, 120, 1e-3, 4)
TOY_CLEAN = (Case(SMALL),)
TOY_DAMAGED = tuple(
    Case(SMALL, (WRONG | SPOILT)[name], name)
    for name in ("inversion not told", "first sample × 10", "third column k/kmax")
)


# --- Tables -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is said about a scan, and the errors of T1 and T2 in %."""

    status: str
    remarks: tuple[str, ...] = ()
    errors: tuple[float, float] = (float("nan"), float("nan"))

    @property
    def marked(self) -> bool:
        return self.status != "complete"

    @property
    def remark(self) -> str:
        """The first clause of the first one."""
        return re.split(r": |\. |; |, expected", self.remarks[0])[0] if self.remarks else ""


def simulated(scan: dict[str, Any], folder: Path) -> tuple[Scan, Truth]:
    """A scan, simulated once for a folder, and its truth."""
    path = folder / f"{hashlib.sha256(repr(sorted(scan.items())).encode()).hexdigest()[:16]}.h5"
    options = dict(scan)
    tissue = options.pop("tissue", None)
    if not path.exists() and tissue:
        spread = np.linspace(0.95, 1.05, 5)  # five tissues, which are nearly alike

        def alike(**size: Any) -> Phantom:
            return replace(letters(**size), t1_ms=tissue[0] * spread, t2_ms=tissue[1] * spread)

        with mock.patch("whorl.simulation.scene.letters", alike):
            simulate(path, **options)
    elif not path.exists():
        simulate(path, **options)
    return Scan.load(path), read_truth(path)


def reconstructed(case: Case, folder: Path, method: str) -> Outcome:
    """What becomes of a case."""
    scan, truth = simulated(case.scan, folder)
    case.damage(scan)
    try:
        result = scan.run(method=method)
    except ScanError as error_found:
        return Outcome("refused", (str(error_found),))
    if result.outcome.failures:
        return Outcome("refused", result.outcome.failures)
    notes = tuple(note.removeprefix("slice 0: ") for note in result.outcome.notes)
    return Outcome(str(result.of("T1").meta["whorl_status"]), notes, error(maps_of(result.images), truth))


def table(title: str, cases: Sequence[Case], folder: Path, methods: Sequence[str]) -> None:
    """A line for each scan, with the remark and the errors of the first method, and how many were marked."""
    heading(title, *methods, f"remark ({methods[0]})", f"error T1 / T2 % ({methods[0]})")
    marked: Counter[str] = Counter()
    for case in cases:
        found = [reconstructed(case, folder, method) for method in methods]
        marked.update(method for method, outcome in zip(methods, found, strict=True) if outcome.marked)
        first = found[0]
        remark = first.remark or (f"cannot be seen: {UNSEEN[case.what]}" if case.what in UNSEEN else "")
        errors = " / ".join(number(value) for value in first.errors)
        row(case.name, *(outcome.status for outcome in found), remark, errors)
    print(f"\nMarked: {', '.join(f'{marked[method]} of {len(cases)} ({method})' for method in methods)}.\n")


def parser() -> argparse.ArgumentParser:
    made = plain_parser(__doc__)
    made.add_argument("--methods", nargs="+", choices=("inr", "llr", "lowrank"), default=["inr", "lowrank"])
    made.add_argument("--only", default="", metavar="TEXT", help="scans whose name holds it")
    made.add_argument("--keep", type=Path, metavar="FOLDER", help="of the simulated scans; else they go")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    told = parser().parse_args(argv)
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = told.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for title, cases in (
            ("clean scan", TOY_CLEAN if told.toy else CLEAN),
            ("damage, scan", TOY_DAMAGED if told.toy else DAMAGED),
        ):
            table(title, [case for case in cases if told.only in case.name], folder, told.methods)


if __name__ == "__main__":
    main()
