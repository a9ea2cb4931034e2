"""From the last readout to the last map by method, with the error beside it, and BART's LLR in the same run.

    python tests/bench_methods.py [--device cuda] [--phantoms nist brain] [--runs 5] [--toy]

A simulated scan (500 timepoints, 256², 8 coils) goes through the whole pipeline; before its last readout it
waits until the others are folded and the dictionary is there, as they are at a scanner. All methods in turn,
again and again, so that what else the machine does meets them all; the first round is not counted. BART
(Debian package `bart`): only its `pics` is timed, its images are matched to the same dictionary.

Letters: T timepoints, K coefficients, V virtual coils, I interleaves, S samples, Y X pixels.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ismrmrd
import numpy as np
import torch
from numpy.typing import NDArray

import whorl.pipeline.scan as pipeline
from benchmarks import TOY, Maps, error, heading, machine, maps_of, number, row, simulated
from benchmarks import parser as plain_parser
from whorl.config import Settings
from whorl.doors.files import read_header, read_readouts
from whorl.kspace.accumulate import fold, fold_gram
from whorl.kspace.coils import coil_maps, compression_matrix
from whorl.physics.dictionary import Dictionary
from whorl.physics.matching import match
from whorl.pipeline.encoding import Encoding
from whorl.recon.calibration import regress_interleaves
from whorl.recon.lowrank import adjoint_coil_images
from whorl.scan.readout import Flag, Readout
from whorl.simulation.truth import Truth

METHODS: dict[str, dict[str, Any]] = {
    "low-rank": {"method": "lowrank"},
    "INR": {},
    "INR, guide=off": {"guide": "off"},
    "INR, preset=seed": {"preset": "seed"},
    "LLR": {"method": "llr"},
}
BART = "BART's LLR, 30 iterations, K = 5 (pics only)"
#: Until all that can be done before the last readout is done.
PAUSE_S = 1.5


@dataclass(frozen=True, eq=False)
class Loaded:
    """A scan in memory."""

    header: bytes
    readouts: list[Readout]
    truth: Truth


def load(path: Path, truth: Truth) -> Loaded:
    kept = [Readout(r.head.copy(), r.trajectory.copy(), r.data.copy()) for r in read_readouts(path)]
    return Loaded(read_header(path), kept, truth)


def run(scan: Loaded, properties: dict[str, Any], pause_s: float) -> tuple[float, Maps]:
    """Seconds from the last readout to the last map, and the maps."""
    images: list[ismrmrd.Image] = []
    arrived = sent = 0.0

    def readouts() -> Iterator[Readout]:
        nonlocal arrived
        yield from scan.readouts[:-1]
        time.sleep(pause_s)
        arrived = time.perf_counter()
        yield scan.readouts[-1]

    def take(image: ismrmrd.Image) -> None:
        nonlocal sent
        sent = time.perf_counter()
        images.append(image)

    settings = Settings.from_properties(properties)
    outcome = pipeline.reconstruct_scan(scan.header, readouts(), settings, take, lambda level, text: None)
    if outcome.failures:
        raise RuntimeError("; ".join(outcome.failures))
    return sent - arrived, maps_of(images)


def captured(scan: Loaded) -> tuple[Encoding, Dictionary]:
    """What the pipeline hands to the reconstruction of the scan's slice."""
    found: list[Any] = []

    def capture(kspace: Any, *arguments: Any, **named: Any) -> Any:
        found.extend(arguments[:2])
        return original(kspace, *arguments, **named)

    original = pipeline.reconstruct_slice
    pipeline.reconstruct_slice = capture
    try:
        run(scan, {"method": "lowrank", "device": "cpu"}, 0.0)
    finally:
        pipeline.reconstruct_slice = original
    return found[0], found[1]


def write_cfl(path: Path, array: NDArray[Any]) -> None:
    """BART's format: the first axis varies fastest."""
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(str(n) for n in array.shape) + "\n")
    array.astype(np.complex64).ravel(order="F").tofile(path.with_suffix(".cfl"))


def read_cfl(path: Path) -> NDArray[np.complex64]:
    shape = [int(n) for n in path.with_suffix(".hdr").read_text().splitlines()[1].split()]
    return np.fromfile(path.with_suffix(".cfl"), dtype=np.complex64).reshape(shape, order="F")


class Bart:
    """BART's LLR of a scan, prepared."""

    def __init__(self, scan: Loaded, mask: NDArray[np.bool_], folder: Path) -> None:
        encoding, self._dictionary = captured(scan)
        self._mask, self._folder, self._shape = torch.from_numpy(mask), folder, encoding.shape
        rows = [r for r in scan.readouts if not r.flags & Flag.IS_NOISE_MEASUREMENT]
        rows.sort(key=lambda r: int(r.head["user_int"][0]))
        data = torch.from_numpy(np.stack([r.data for r in rows]))
        data = compression_matrix(data) @ data  # (T, V, S)
        # The capture numbered the interleaves in the same order of arrival.
        first = {r.trajectory.tobytes(): r.trajectory for r in reversed(rows)}
        keys = list(dict.fromkeys(r.trajectory.tobytes() for r in rows))
        arms = {key: i for i, key in enumerate(keys)}
        interleaf = torch.tensor([arms[r.trajectory.tobytes()] for r in rows])
        T, V, S = data.shape
        (_, X), basis = encoding.shape, self._dictionary.basis
        K = basis.shape[1]
        bins = torch.zeros((len(keys), K, V, S), dtype=torch.complex64)
        gram = torch.zeros((len(keys), K, K), dtype=torch.complex64)
        t = torch.arange(T)
        fold(bins, data, t, interleaf, basis)
        fold_gram(gram, t, interleaf, basis)
        energies = self._dictionary.coefficients.abs().square().sum(0)
        clean = regress_interleaves(bins, gram, energies / energies[0], leading=3)
        csm = coil_maps(adjoint_coil_images(clean, encoding.dcf, encoding.nufft)).numpy()
        # (T, S, 2), cycles per field of view
        trajectory = np.stack([first[keys[i]][:, :2] for i in interleaf]) * X
        traj = np.zeros((3, S, 1, 1, 1, T), dtype=np.complex64)
        traj[:2, :, 0, 0, 0] = trajectory.transpose(2, 1, 0)
        weights = np.sqrt(encoding.dcf.numpy()[interleaf]).T[None, :, None, None, None]
        write_cfl(folder / "traj", traj)
        write_cfl(folder / "weights", weights / weights.max())
        write_cfl(folder / "ksp", data.numpy().transpose(2, 1, 0)[None, :, None, :, None, :])
        write_cfl(folder / "maps", csm.transpose(2, 1, 0)[:, :, None, :])
        write_cfl(folder / "basis", basis[:, :5].numpy()[None, None, None, None, None])

    def run(self) -> tuple[float, Maps]:
        """Seconds of `bart pics`, and the maps of its images."""
        command = ["bart", "pics", "-e", "-S", "-i30", "-R", "L:3:3:0.01"]
        command += ["-B", "basis", "-p", "weights", "-t", "traj", "ksp", "maps", "out"]
        began = time.perf_counter()
        subprocess.run(command, cwd=self._folder, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        Y, X = self._shape
        out = read_cfl(self._folder / "out").reshape(X, Y, -1).transpose(2, 1, 0)  # (K, Y, X)
        images = torch.zeros((self._dictionary.basis.shape[1], Y, X), dtype=torch.complex64)
        images[: len(out)] = torch.from_numpy(np.ascontiguousarray(out))
        found = match(images[:, self._mask].T.contiguous(), self._dictionary)
        maps = np.zeros((2, 1, Y, X))
        for quantity, values in zip(maps, (found.t1_ms, found.t2_ms), strict=True):
            quantity[0][self._mask.numpy()] = values.numpy()
        return seconds, {"T1": maps[0], "T2": maps[1]}


def parser() -> argparse.ArgumentParser:
    made = plain_parser(__doc__)
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument(
        "--phantoms", nargs="+", default=["nist", "brain"], choices=("nist", "brain", "texture")
    )
    made.add_argument("--runs", type=int, default=5, help="runs that count")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    told = parser().parse_args(argv)
    if told.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench_methods: there is no usable NVIDIA GPU")
    phantoms = ["nist"] if told.toy else told.phantoms
    size, runs, pause_s = (TOY, 1, 0.1) if told.toy else ({}, told.runs, PAUSE_S)
    common = {"device": told.device, **({"iterations": 4, "llr_iterations": 3} if told.toy else {})}
    with_bart = told.device == "cpu" and shutil.which("bart") is not None
    without = "" if with_bart or told.device == "cuda" else "; BART is not installed (Debian package bart)"
    print(f"{machine(told.device)}; median of {runs} (smallest to largest){without}\n")
    heading("phantom", "method", "s", "× low-rank", "BART / it", "error T1 / T2 %")
    for phantom in phantoms:
        taken: dict[str, list[float]] = {}
        last: dict[str, Maps] = {}
        with simulated(phantom=phantom, **size) as (path, truth), tempfile.TemporaryDirectory() as folder:
            scan = load(path, truth)
            ways = {
                name: partial(run, scan, {**common, **properties}, pause_s)
                for name, properties in METHODS.items()
            }
            if with_bart:
                ways[BART] = Bart(scan, truth.mask[0], Path(folder)).run
            for number_of_run in range(runs + 1):
                for name, way in ways.items():
                    seconds, last[name] = way()
                    if number_of_run:
                        taken.setdefault(name, []).append(seconds)
        medians = {name: statistics.median(some) for name, some in taken.items()}
        for name, some in taken.items():
            of_bart = f"{medians[BART] / medians[name]:.1f}" if with_bart else "–"
            found = " / ".join(map(number, error(last[name], truth)))
            row(
                phantom,
                name,
                f"{medians[name]:.2f} ({min(some):.2f} to {max(some):.2f})",
                f"{medians[name] / medians['low-rank']:.2f}",
                of_bart,
                found,
            )


if __name__ == "__main__":
    main()
