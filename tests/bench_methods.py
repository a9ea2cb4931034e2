"""Time of a slice by method, fold to maps, with the error beside it, and that of BART's LLR.

Not a test: ``python tests/bench_methods.py [--device cuda]``. A simulated scan (500 timepoints, 256²,
8 coils); the first run of each method is not counted, and the median of three is shown. For BART: Debian
package `bart`; its images are matched to the same dictionary, and only its `pics` is timed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import whorl.pipeline.scan as pipeline
from bench_automatic import error
from whorl.config import Settings
from whorl.doors.files import read_header, read_readouts
from whorl.kspace.accumulate import fold, fold_gram
from whorl.kspace.coils import coil_maps, compression_matrix
from whorl.kspace.slicebuffer import SubspaceKspace
from whorl.physics.dictionary import Dictionary
from whorl.physics.matching import match
from whorl.pipeline.encoding import Encoding
from whorl.pipeline.slices import reconstruct_slice
from whorl.recon.calibration import regress_interleaves
from whorl.recon.lowrank import adjoint_coil_images
from whorl.scan.readout import Flag
from whorl.simulation.scan import simulate
from whorl.simulation.truth import Truth, read_truth

METHODS: dict[str, dict[str, Any]] = {
    "low-rank": {"method": "lowrank"},
    "INR, default": {},
    "INR, preset=normal": {"preset": "normal"},
    "INR, preset=seed fit=varpro": {"preset": "seed", "fit": "varpro"},
    "INR, preset=seed": {"preset": "seed"},
    "LLR": {"method": "llr"},
}


def captured(scan: Path, properties: dict[str, Any]) -> tuple[SubspaceKspace, Encoding, Dictionary]:
    """What the pipeline hands to the reconstruction of the scan's slice."""
    found: list[Any] = []

    def capture(*arguments: Any) -> Any:
        found.extend(arguments[:3])
        return original(*arguments)

    original = pipeline.reconstruct_slice
    pipeline.reconstruct_slice = capture
    try:
        settings = Settings.from_properties(properties | {"method": "lowrank"})
        pipeline.reconstruct_scan(read_header(scan), read_readouts(scan), settings, lambda image: None)
    finally:
        pipeline.reconstruct_slice = original
    return found[0], found[1], found[2]


def shown(t1: NDArray[np.float32], t2: NDArray[np.float32], truth: Truth) -> str:
    """Errors of T1 and T2 maps `(Y, X)`, as in the automatic choice."""
    return "{:.1f} / {:.1f}".format(*error({"T1": t1[None], "T2": t2[None]}, truth))


def write_cfl(path: Path, array: NDArray[Any]) -> None:
    """BART's format: the first axis varies fastest."""
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(str(n) for n in array.shape) + "\n")
    array.astype(np.complex64).ravel(order="F").tofile(path.with_suffix(".cfl"))


def read_cfl(path: Path) -> NDArray[np.complex64]:
    shape = [int(n) for n in path.with_suffix(".hdr").read_text().splitlines()[1].split()]
    return np.fromfile(path.with_suffix(".cfl"), dtype=np.complex64).reshape(shape, order="F")


def bart(
    scan: Path, encoding: Encoding, dictionary: Dictionary, mask: Any, folder: Path
) -> tuple[float, Any, Any]:
    """Seconds of `bart pics` with LLR, and T1 and T2 maps of its images."""
    rows = [r for r in read_readouts(scan) if not r.flags & Flag.IS_NOISE_MEASUREMENT]
    rows.sort(key=lambda r: int(r.head["user_int"][0]))
    data = torch.from_numpy(np.stack([r.data for r in rows]))
    matrix = compression_matrix(data)
    data = matrix @ data  # (T, V, S)
    keys = list(dict.fromkeys(r.trajectory.tobytes() for r in rows))
    arms = {key: i for i, key in enumerate(keys)}
    interleaf = torch.tensor([arms[r.trajectory.tobytes()] for r in rows])
    T, V, S = data.shape
    (Y, X), K = encoding.shape, 5
    basis = dictionary.basis
    bins = torch.zeros((len(keys), basis.shape[1], V, S), dtype=torch.complex64)
    gram = torch.zeros((len(keys), basis.shape[1], basis.shape[1]), dtype=torch.complex64)
    t = torch.arange(T)
    fold(bins, data, t, interleaf, basis)
    fold_gram(gram, t, interleaf, basis)
    energies = dictionary.coefficients.square().sum(0)
    clean = regress_interleaves(bins, gram, energies / energies[0])
    first = {key: next(r.trajectory for r in rows if r.trajectory.tobytes() == key) for key in keys}
    # The capture numbered the interleaves in the same order of arrival.
    csm = coil_maps(adjoint_coil_images(clean, encoding.dcf, encoding.nufft)[:3]).numpy()
    trajectory = (
        np.stack([first[keys[i]][:, :2] for i in interleaf]) * X
    )  # (T, S, 2), cycles per field of view
    traj = np.zeros((3, S, 1, 1, 1, T), dtype=np.complex64)
    traj[:2, :, 0, 0, 0] = trajectory.transpose(2, 1, 0)
    weights = np.sqrt(encoding.dcf.numpy()[interleaf]).T[None, :, None, None, None]
    write_cfl(folder / "traj", traj)
    write_cfl(folder / "weights", weights / weights.max())
    write_cfl(folder / "ksp", data.numpy().transpose(2, 1, 0)[None, :, None, :, None, :])
    write_cfl(folder / "maps", csm.transpose(2, 1, 0)[:, :, None, :])
    write_cfl(folder / "basis", basis[:, :K].numpy()[None, None, None, None, None])
    command = ["bart", "pics", "-e", "-S", "-i30", "-R", "L:3:3:0.01"]
    command += ["-B", "basis", "-p", "weights", "-t", "traj", "ksp", "maps", "out"]
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    out = read_cfl(folder / "out").reshape(X, Y, -1).transpose(2, 1, 0)  # (K, Y, X)
    images = torch.zeros((basis.shape[1], Y, X), dtype=torch.complex64)
    images[:K] = torch.from_numpy(np.ascontiguousarray(out[:K]))
    found = match(images[:, mask].T.contiguous(), dictionary)
    maps = np.zeros((2, Y, X), dtype=np.float32)
    maps[0][mask.numpy()], maps[1][mask.numpy()] = found.t1_ms.numpy(), found.t2_ms.numpy()
    return seconds, maps[0], maps[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--phantom", default="nist")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no usable NVIDIA GPU")
    name = (
        torch.cuda.get_device_name()
        if chosen.device == "cuda"
        else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    print(f"{name}, torch {torch.__version__}; {chosen.phantom}, 500 timepoints, 256², 8 coils")
    print("| method | s (spread) | T1 / T2 error % | preset |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        scan = Path(folder) / "scan.h5"
        simulate(scan, phantom=chosen.phantom)
        truth = read_truth(scan)
        slowest = 0.0
        for title, properties in METHODS.items():
            properties = {"device": chosen.device, **properties}
            settings = Settings.from_properties(properties)
            kspace, encoding, dictionary = captured(scan, properties)
            taken = []
            for _ in range(4):
                began = time.perf_counter()
                result = reconstruct_slice(kspace, encoding, dictionary, settings, None)
                taken.append(time.perf_counter() - began)
            taken = taken[1:]
            slowest = max(slowest, statistics.median(taken))
            known = shown(result.maps.t1_ms, result.maps.t2_ms, truth)
            spread = max(taken) - min(taken)
            preset = result.diagnostics.get("preset", "")
            print(
                f"| {title} | {statistics.median(taken):.2f} ({spread:.2f}) | {known} | {preset} |",
                flush=True,
            )
        if shutil.which("bart") and chosen.device == "cpu":
            mask = torch.from_numpy(result.maps.t1_ms > 0)
            taken_s, t1, t2 = bart(scan, encoding, dictionary, mask, Path(folder))
            print(
                f"| BART LLR, 30 iterations, K = 5 (pics only) | {taken_s:.1f} | {shown(t1, t2, truth)} | |"
            )
        elif chosen.device == "cpu":
            print("| BART | not installed | | |")


if __name__ == "__main__":
    main()
