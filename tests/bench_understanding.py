"""How much whitening, the gradient response and a Pulseq file are worth: errors of maps against the truth.

    python tests/bench_understanding.py [whitening] [girf --girf FILE.npy] [sequence --sequence FILE.seq]

* whitening: SD of T2 by noise alone (two scans that differ in their noise only, with one prescan), with and
  without, beside what theory says: without, a combination of coils s has the variance ``sᴴΨs / (sᴴs)²``,
  after whitening ``1 / (sᴴΨ⁻¹s)``.
* girf: mean error of log T1 and log T2 over the object, of scans without a gradient response, with one, and
  with one that is corrected for.
* sequence: R² of the means over regions, of a scan of that sequence without flags, train or trajectory.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scan_edit import Scan
from whorl.config import Settings
from whorl.doors.files import read_header, read_readouts
from whorl.pipeline.scan import reconstruct_scan
from whorl.simulation.noise import correlated_noise
from whorl.simulation.parameters import PULSEQ
from whorl.simulation.phantoms import coil_maps
from whorl.simulation.scan import simulate
from whorl.simulation.truth import read_truth

COILS = 8


def maps(path: Path, **properties: Any) -> dict[str, NDArray[np.float32]]:
    """T1 and T2 in ms, by name."""
    found: dict[str, NDArray[np.float32]] = {}
    settings = Settings.from_properties({"output_dtype": "float32", "preset": "normal", **properties})
    outcome = reconstruct_scan(
        read_header(path),
        read_readouts(path),
        settings,
        lambda image: found.update({image.meta["GADGETRON_DataRole"]: image.data[0, 0].copy()}),
        lambda level, text: print(level, text) if level != "DBG" else None,
    )
    assert not outcome.failures
    return found


def theory(covariance: NDArray[np.complex128], inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """SD without whitening relative to that with it, in each pixel of the object."""
    n = len(inside)
    fine = coil_maps(COILS, matrix=n, fov_mm=300.0, height_mm=0.0)
    s = fine.reshape(COILS, n, -1, n, fine.shape[-1] // n).mean((2, 4))[:, inside]  # (C, P)
    plain = np.einsum("cp,cd,dp->p", s.conj(), covariance, s).real / np.square(np.abs(s)).sum(0) ** 2
    white = 1 / np.einsum("cp,cd,dp->p", s.conj(), np.linalg.inv(covariance), s).real
    return np.asarray(np.sqrt(plain / white))


def whitening(folder: Path) -> None:
    print("| phantom | noise | method | SD of T2 without | with | ratio | theory |")
    print("|---|---|---|---|---|---|---|")
    for phantom in ("nist", "brain"):
        for name, covariance in (
            ("correlated 0.7, one coil × 10", correlated_noise(COILS, 0.7, 10.0)),
            ("white", np.eye(COILS, dtype=np.complex128)),
        ):
            paths = [folder / f"{phantom}{seed}.h5" for seed in (0, 1)]
            for seed, path in enumerate(paths):
                simulate(path, phantom=phantom, seed=seed, noise=4e-3, noise_covariance=covariance)
            truth = read_truth(paths[0])
            # One prescan for both: what its finite length does to the aliasing is no noise.
            scans = [Scan.load(path) for path in paths]
            scans[1].data[:4] = scans[0].data[:4]
            scans[1].write(paths[1])
            inside = truth.labels[0] > 0
            for method in ("lowrank", "inr"):
                spread = {}
                for whiten in ("off", "auto"):
                    first, second = (maps(p, method=method, whiten=whiten)["T2"][inside] for p in paths)
                    both = (first > 0) & (second > 0)
                    apart = (first[both] - second[both]) / truth.t2_ms[0][inside][both] / np.sqrt(2)
                    # Robust: pixels at the end of the dictionary do not tell the noise.
                    spread[whiten] = 1.4826 * float(np.median(np.abs(apart)))
                ratio = spread["off"] / spread["auto"]
                expected = float(np.median(theory(covariance, inside)))
                print(
                    f"| {phantom} | {name} | {method} | {spread['off']:.2%} | {spread['auto']:.2%} | "
                    f"{ratio:.2f} | {expected:.2f} |",
                    flush=True,
                )


def girf(folder: Path, response: Path) -> None:
    print("| phantom | seed | method | | T1 | T2 |\n|---|---|---|---|---|---|")
    for phantom in ("nist", "brain"):
        for seed in (0, 1):
            plain, played = folder / f"{phantom}{seed}.h5", folder / f"{phantom}{seed}_girf.h5"
            simulate(plain, phantom=phantom, seed=seed)
            simulate(played, phantom=phantom, seed=seed, girf=response)
            truth = read_truth(plain)
            for method in ("lowrank", "inr"):
                reference = (0.0, 0.0)
                for name, path, properties in (
                    ("undistorted", plain, {}),
                    ("distorted", played, {}),
                    ("corrected", played, {"girf": str(response)}),
                ):
                    found = maps(path, method=method, **properties)
                    inside = truth.mask[0] & (found["T1"] > 0)
                    errors = tuple(
                        float(np.abs(np.log(found[role][inside] / true[0][inside])).mean())
                        for role, true in (("T1", truth.t1_ms), ("T2", truth.t2_ms))
                    )
                    reference = errors if name == "undistorted" else reference
                    shown = [f"{e:.4f} ({e / r - 1:+.1%})" for e, r in zip(errors, reference, strict=True)]
                    print(f"| {phantom} | {seed} | {method} | {name} | {' | '.join(shown)} |", flush=True)


def of_sequence(folder: Path, sequence: Path) -> None:
    print(
        "| phantom | method | R² T1 | R² T2 | largest bias T1 | T2 (T2 ≥ 15 ms) |\n|---|---|---|---|---|---|"
    )
    for plate in ("t2", "t1"):
        path = folder / f"{plate}.h5"
        simulate(path, phantom="nist", plate=plate, sequence=sequence, layout=PULSEQ)
        truth = read_truth(path)
        for method in ("lowrank", "inr"):
            found = maps(path, method=method, sequence=str(sequence))
            cells = []
            biases = []
            for role, true in (("T1", truth.roi_t1_ms), ("T2", truth.roi_t2_ms)):
                means = np.array([found[role][truth.labels[0] == n + 1].mean() for n in range(len(true))])
                cells.append(1 - np.square(means - true).sum() / np.square(true - true.mean()).sum())
                long = truth.roi_t2_ms >= 15
                biases.append((means / true - 1)[long][np.abs(means / true - 1)[long].argmax()])
            print(
                f"| nist {plate} | {method} | {cells[0]:.4f} | {cells[1]:.4f} | {biases[0]:+.1%} | "
                f"{biases[1]:+.1%} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", default=["whitening"])
    parser.add_argument("--girf", type=Path)
    parser.add_argument("--sequence", type=Path)
    chosen = parser.parse_args()
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    print(f"commit {revision.strip()}\n")
    with tempfile.TemporaryDirectory() as folder:
        if "whitening" in chosen.what:
            whitening(Path(folder))
        if chosen.girf:
            girf(Path(folder), chosen.girf)
        if chosen.sequence:
            of_sequence(Path(folder), chosen.sequence)


if __name__ == "__main__":
    main()
