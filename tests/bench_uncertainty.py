"""Predicted standard deviations against those of many noise realisations of a scan, and against errors.

    python tests/bench_uncertainty.py [--phantoms brain nist] [--methods lowrank inr] [--noise 5e-3]
        [--order golden] [--realisations 50] [--toy]

For each realisation the scan gets new noise, in its noise readouts too, and goes through the whole
pipeline. Shown are ratios over the voxels (median, 5th to 95th percentile, and the share between 0.7 and
1.4): of the deviation predicted from noise alone to the empirical one; and, away from edges, of the whole
prediction to the root mean square error against the truth. And the share of voxels whose error is less than
one and two predicted deviations (68 % and 95 % if it were normal).

Letters: R realisations, C coils, S samples, Y X pixels.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ismrmrd
import numpy as np
from numpy.typing import NDArray

from benchmarks import TOY, heading, machine, row
from benchmarks import parser as plain_parser
from whorl.config import Settings
from whorl.doors.files import read_header, read_readouts
from whorl.pipeline.scan import reconstruct_scan
from whorl.pipeline.slices import SliceResult
from whorl.scan.readout import Flag, Readout
from whorl.simulation.scan import simulate
from whorl.simulation.truth import read_truth

QUANTITIES = (("T1", "t1_ms"), ("T2", "t2_ms"))
#: Of predictions that are compared with the empirical deviation: one from each of the first realisations.
N_PREDICTIONS = 3


class NoisyScan:
    """A scan without noise, and any number of copies with noise.

    Parameters
    ----------
    path
        Where the scan without noise is written to.
    noise
        Standard deviation relative to the largest sample.
    options
        Of `whorl.simulation.scan.simulate`.
    """

    def __init__(self, path: Path, noise: float, **options: object) -> None:
        simulate(path, noise=0.0, **options)
        self.header = read_header(path)
        self.truth = read_truth(path)
        self._readouts = list(read_readouts(path))
        largest = max(
            float(np.abs(r.data).max()) for r in self._readouts if not r.flags & Flag.IS_NOISE_MEASUREMENT
        )
        covariance = self.truth.parameters["noise_covariance"]
        self.mixing = np.linalg.cholesky(covariance) * noise * largest  # (C, C)

    def readouts(self, realisation: int) -> Iterator[Readout]:
        """The readouts with noise."""
        rng = np.random.default_rng([realisation, 17])
        for readout in self._readouts:
            white = rng.standard_normal((2, *readout.data.shape)) / np.sqrt(2)
            noise = (self.mixing @ (white[0] + 1j * white[1])).astype(np.complex64)
            yield Readout(readout.head, readout.trajectory, readout.data + noise)


def reconstruct(scan: NoisyScan, realisation: int, properties: dict[str, object]) -> SliceResult:
    """The slice's maps, whose deviations can be asked for."""
    seen: list[SliceResult] = []

    def observe(_: int, result: SliceResult) -> None:
        seen.append(result)

    def ignore(_: ismrmrd.Image) -> None:
        pass

    settings = Settings.from_properties(properties)
    reconstruct_scan(scan.header, scan.readouts(realisation), settings, ignore, observe=observe)
    (result,) = seen
    return result


@dataclass(frozen=True)
class Comparison:
    """Of one quantity: ratios of predicted to empirical deviation over the voxels, of noise and against the
    root mean square error; and the shares of errors within one and two predicted deviations."""

    noise: NDArray[np.float64]
    error: NDArray[np.float64]
    within: tuple[float, float]


def compare(
    scan: NoisyScan, n_realisations: int, properties: dict[str, object]
) -> tuple[dict[str, Comparison], float]:
    """Comparisons by quantity, and the seconds that a prediction takes."""
    stacks: dict[str, list[NDArray[np.float32]]] = {name: [] for name, _ in QUANTITIES}
    noise: dict[str, list[NDArray[np.float32]]] = {name: [] for name, _ in QUANTITIES}
    whole: dict[str, list[NDArray[np.float32]]] = {name: [] for name, _ in QUANTITIES}
    seconds = 0.0
    for realisation in range(n_realisations):
        result = reconstruct(scan, realisation, properties)
        for name, field in QUANTITIES:
            stacks[name].append(getattr(result.maps, field))
        if realisation < N_PREDICTIONS:
            assert result.inside is not None
            start = time.monotonic()
            of_all = result.inside.deviations(None)
            seconds += time.monotonic() - start
            of_noise = result.inside.deviations(None, noise_only=True)
            for n, (name, _) in enumerate(QUANTITIES):
                noise[name].append(of_noise[n])
                whole[name].append(of_all[n])
    found = {}
    for name, field in QUANTITIES:
        values, predicted, total = np.stack(stacks[name]), np.stack(noise[name]), np.stack(whole[name])
        inside = (values > 0).all(0) & (predicted > 0).all(0)
        empirical = values.std(0, ddof=1)[inside]
        # Errors at the edge of a tissue are those of the truth, which has one tissue in a pixel.
        pure = inside & (scan.truth.labels[0] > 0)
        error = values[:, pure] - getattr(scan.truth, field)[0][pure]
        z = np.abs(error[: len(total)]) / total[:, pure]
        with np.errstate(divide="ignore"):  # at the end of the dictionary nothing moves
            noise_ratio = (predicted[:, inside] / empirical).ravel().astype(np.float64)
        found[name] = Comparison(
            noise_ratio,
            (total[:, pure] / np.sqrt(np.mean(error**2, axis=0))).ravel().astype(np.float64),
            (float(np.mean(z < 1)), float(np.mean(z < 2))),
        )
    return found, seconds / N_PREDICTIONS


def parser() -> argparse.ArgumentParser:
    made = plain_parser(__doc__)
    made.add_argument("--phantoms", nargs="+", default=["brain", "nist"])
    made.add_argument("--methods", nargs="+", default=["lowrank", "inr"])
    made.add_argument("--order", default="golden")
    made.add_argument("--noise", type=float, default=5e-3)
    made.add_argument("--realisations", type=int, default=50)
    made.add_argument("--seed", type=int, default=0)
    return made


def spread(ratio: NDArray[np.float64]) -> tuple[str, str]:
    """Median with percentiles, and the share that is near 1."""
    # Where nothing moves at the end of the dictionary, the ratio may be infinite.
    low, middle, high = np.percentile(ratio, (5, 50, 95), method="nearest")
    share = np.mean((ratio > 0.7) & (ratio < 1.4))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{share:.1%}"


def main(argv: Sequence[str] | None = None) -> None:
    told = parser().parse_args(argv)
    if told.toy:
        size, phantoms, n = TOY, told.phantoms[:1], 3
    else:
        size, phantoms, n = {}, told.phantoms, told.realisations
    print(f"{machine()}; {told.order} order, noise {told.noise:g}, {n} realisations\n")
    heading(
        "phantom, method, map", "noise / empirical SD: median (5 to 95 %)", "in 0.7 to 1.4",
        "all / RMS error: median (5 to 95 %)", "in 0.7 to 1.4", "error within 1, 2 SD", "s for a prediction",
    )  # fmt: skip
    for phantom in phantoms:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "scan.h5"
            scan = NoisyScan(path, told.noise, phantom=phantom, order=told.order, seed=told.seed, **size)
        for method in told.methods:
            found, seconds = compare(scan, n, {"method": method})
            for name, one in found.items():
                within = " %, ".join(f"{100 * share:.0f}" for share in one.within)
                cells = (*spread(one.noise), *spread(one.error), f"{within} %", f"{seconds:.1f}")
                row(f"{phantom}, {method}, {name}", *cells)


if __name__ == "__main__":
    main()
