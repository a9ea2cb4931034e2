"""How much whitening, the gradient response and a Pulseq file are worth: errors of maps against the truth.

    python tests/bench_understanding.py [whitening] [girf] [sequence]
        [--girf FILE.npy] [--sequence FILE.seq] [--toy]

* whitening: SD of T2 by noise alone (two scans that differ in their noise only, with one prescan), with and
  without, beside what theory says: without, a combination of coils s has the variance ``sᴴΨs / (sᴴs)²``,
  after whitening ``1 / (sᴴΨ⁻¹s)``.
* girf: mean error of log T1 and log T2 over the object, of scans without a gradient response, with one, and
  with one that is corrected for: a synthetic one, unless a file is given.
* sequence: R² of the means over regions, of a scan of a Pulseq sequence without flags, train or trajectory: a
  small one of 64², unless a file is given.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import TOY, Maps, error, heading, machine, number, reconstruct, row
from benchmarks import parser as plain_parser
from pulseq_files import write_sequence
from scan_edit import Scan
from whorl.maps.rois import largest_bias_percent, region_statistics
from whorl.simulation.noise import correlated_noise
from whorl.simulation.parameters import PULSEQ
from whorl.simulation.phantoms import coil_maps
from whorl.simulation.scan import simulate
from whorl.simulation.truth import read_truth

METHODS = ("lowrank", "inr")


@dataclass(frozen=True)
class Size:
    """Options of scans; phantoms and seeds; pulses of the sequence that is made here."""

    scan: dict[str, Any] = field(default_factory=dict)
    coils: int = 8
    phantoms: tuple[str, ...] = ("nist", "brain")
    seeds: tuple[int, ...] = (0, 1)
    pulses: int = 400


TOY_SIZE = Size(TOY, TOY["coils"], ("brain",), (0,), 30)


def maps(path: Path, **properties: Any) -> Maps:
    return reconstruct(path, {"output_dtype": "float32", **properties})[0]


def theory(covariance: NDArray[np.complex128], inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """SD without whitening relative to that with it, in each pixel of the object."""
    n, coils = len(inside), len(covariance)
    fine = coil_maps(coils, matrix=n, fov_mm=300.0, height_mm=0.0)
    s = fine.reshape(coils, n, -1, n, fine.shape[-1] // n).mean((2, 4))[:, inside]  # (C, P)
    plain = np.einsum("cp,cd,dp->p", s.conj(), covariance, s).real / np.square(np.abs(s)).sum(0) ** 2
    white = 1 / np.einsum("cp,cd,dp->p", s.conj(), np.linalg.inv(covariance), s).real
    return np.asarray(np.sqrt(plain / white))


def whitening(folder: Path, size: Size, _: argparse.Namespace) -> None:
    heading("phantom", "noise of the coils", "method", "SD of T2 without", "with", "ratio", "theory")
    for phantom in size.phantoms:
        covariances = {
            "correlated 0.7, one coil × 10": correlated_noise(size.coils, 0.7, 10.0),
            "white": np.eye(size.coils, dtype=np.complex128),
        }
        for name, covariance in covariances.items():
            paths = [folder / f"{phantom}{seed}.h5" for seed in (0, 1)]
            for seed, path in enumerate(paths):
                noise = {"noise": 4e-3, "noise_covariance": covariance}
                simulate(path, phantom=phantom, seed=seed, **noise, **size.scan)
            truth = read_truth(paths[0])
            # One prescan for both: what its finite length does to the aliasing is no noise.
            scans = [Scan.load(path) for path in paths]
            scans[1].data[:4] = scans[0].data[:4]
            scans[1].write(paths[1])
            inside = truth.labels[0] > 0
            for method in METHODS:
                spread = {}
                for whiten in ("off", "auto"):
                    first, second = (maps(p, method=method, whiten=whiten)["T2"][0][inside] for p in paths)
                    both = (first > 0) & (second > 0)
                    apart = (first[both] - second[both]) / truth.t2_ms[0][inside][both] / np.sqrt(2)
                    # Robust: pixels at the end of the dictionary do not tell the noise.
                    spread[whiten] = 1.4826 * float(np.median(np.abs(apart)))
                ratio = spread["off"] / spread["auto"]
                # The INR smooths: what is left of noise does not follow a formula.
                expected = number(float(np.median(theory(covariance, inside))), 2) if method != "inr" else "–"
                row(
                    phantom,
                    name,
                    method,
                    f"{spread['off']:.2%}",
                    f"{spread['auto']:.2%}",
                    f"{ratio:.2f}",
                    expected,
                )


def response() -> NDArray[np.complex128]:
    """A gradient response `(3, 4, N)` as measured ones are: slower along y than along x, some cross talk,
    some constant field."""
    hz = (np.arange(20_000) - 10_000) * 5.0

    def low_pass(us: float) -> NDArray[np.complex128]:
        return 1 / (1 + 2j * np.pi * hz * us * 1e-6)

    full = np.zeros((3, 4, len(hz)), dtype=np.complex128)
    full[0, 1], full[1, 2], full[2, 3] = low_pass(2.0), low_pass(3.0), 1
    full[0, 2], full[1, 1] = 2e-3 * low_pass(60.0), -3e-3 * low_pass(40.0)
    full[0, 0], full[1, 0] = 5e-4 * low_pass(200.0), -3e-4 * low_pass(90.0)
    return full


def girf(folder: Path, size: Size, told: argparse.Namespace) -> None:
    file = told.girf
    if file is None:
        file = folder / "girf.npy"
        np.save(file, response())
    heading("phantom", "seed", "method", "gradients", "mean error of ln T1", "of ln T2")
    for phantom in size.phantoms:
        for seed in size.seeds:
            plain, played = folder / f"{phantom}{seed}.h5", folder / f"{phantom}{seed}_girf.h5"
            simulate(plain, phantom=phantom, seed=seed, **size.scan)
            simulate(played, phantom=phantom, seed=seed, girf=file, **size.scan)
            truth = read_truth(plain)
            for method in METHODS:
                reference: tuple[float, ...] = ()
                for name, path, properties in (
                    ("as asked for", plain, {}),
                    ("distorted", played, {}),
                    ("corrected", played, {"girf": str(file)}),
                ):
                    found = maps(path, method=method, **properties)
                    inside = truth.mask & (found["T1"] > 0)
                    errors = tuple(
                        float(np.abs(np.log(found[role][inside] / true[inside])).mean())
                        for role, true in (("T1", truth.t1_ms), ("T2", truth.t2_ms))
                    )
                    reference = reference or errors
                    shown = [f"{e:.4f} ({e / r - 1:+.1%})" for e, r in zip(errors, reference, strict=True)]
                    row(phantom, seed, method, name, *shown)


def of_sequence(folder: Path, size: Size, told: argparse.Namespace) -> None:
    file, matrix, phantoms = told.sequence, {}, ["nist"]
    if file is None:
        file, matrix, phantoms = folder / "made.seq", {"matrix": 64}, ["brain"]
        write_sequence(file, n_pulses=size.pulses, n_arms=24, n_noise=4, readout_s=4e-3, turns=8.0)
    heading("phantom", "method", "error T1 / T2 %", "largest bias T1 / T2 %")
    for phantom in phantoms:
        path = folder / "scan.h5"
        simulate(path, phantom=phantom, sequence=file, layout=PULSEQ, coils=size.coils, **matrix)
        truth = read_truth(path)
        for method in METHODS:
            found = maps(path, method=method, sequence=str(file))
            biases = [
                largest_bias_percent(
                    region_statistics(found[role], truth.labels, truth.roi_names, of_regions)
                )
                for role, of_regions in (("T1", truth.roi_t1_ms), ("T2", truth.roi_t2_ms))
            ]
            row(
                phantom,
                method,
                " / ".join(map(number, error(found, truth))),
                " / ".join(number(bias, sign=True) for bias in biases),
            )


PARTS = {"whitening": whitening, "girf": girf, "sequence": of_sequence}


def parser() -> argparse.ArgumentParser:
    made = plain_parser(__doc__)
    made.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all")
    made.add_argument("--girf", type=Path)
    made.add_argument("--sequence", type=Path)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    told = parser().parse_args(argv)
    print(machine())
    for part in told.parts or PARTS:
        print()
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](Path(folder), TOY_SIZE if told.toy else Size(), told)


if __name__ == "__main__":
    main()
