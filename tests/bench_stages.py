"""Where the time goes: each stage beside a peer in the same run, with its error.

    python tests/bench_stages.py [--toy]

Medians of several runs after one that is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import heading, machine, row
from benchmarks import parser as plain_parser
from whorl.kspace.nufft import make_nufft
from whorl.physics.dictionary import DictionaryParameters, build_dictionary
from whorl.physics.epg import fisp_signal
from whorl.physics.matching import match
from whorl.physics.store import Store
from whorl.recon.inr import fit_inr
from whorl.scan.train import Train
from whorl.simulation.signals import fisp_signals, jiang_train
from whorl.simulation.spiral import cycles_per_pixel, design_spiral


@dataclass(frozen=True, slots=True)
class Size:
    """Timepoints, relative step of T1 and T2 and that of B1, voxels of the matches, matrix, interleaves,
    subspace images, and iterations of the INR."""

    timepoints: int = 500
    step: float = 0.0445  # 13 000 atoms
    b1_step: float = 0.02
    voxels: tuple[int, ...] = (22_000, 65_536)
    matrix: int = 256
    interleaves: int = 96
    images: int = 36
    iterations: int = 100


TOY = Size(60, 0.2, 0.2, (500,), 48, 12, 4, 5)


def seconds(
    run: Callable[[], object], device: torch.device | None = None, times: int = 3
) -> tuple[float, float]:
    """Median and spread."""

    def finish() -> None:
        run()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize()

    finish()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        finish()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken), max(taken) - min(taken)


def report(name: str, taken: tuple[float, float], error: str) -> None:
    row(name, f"{taken[0]:.3f}", f"{taken[1]:.3f}", error)


def signal_model(device: torch.device, size: Size) -> None:
    """Dictionary and match, on a CPU beside the plainest way and against the simulator's exact signals."""
    T = size.timepoints
    played = jiang_train(T)
    train = Train(played.flip_deg, played.tr_ms, played.te_ms, np.zeros(T), played.ti_ms, "simulated")
    parameters = DictionaryParameters(train, step=size.step)
    t1, t2, _ = parameters.grid().atoms()
    some = torch.arange(0, len(t1), 97)
    exact = fisp_signals(played, t1[some].double().numpy(), t2[some].double().numpy())
    signals = fisp_signal(train, t1.to(device), t2.to(device)).cpu()
    error = np.abs(np.abs(signals[some].numpy()) - np.abs(exact)).max(1) / np.abs(exact).max(1)
    report(
        f"EPG, {len(t1)} atoms × {T} pulses",
        seconds(lambda: fisp_signal(train, t1.to(device), t2.to(device)), device),
        f"{error.max():.1e} of the peak",
    )
    report("dictionary and basis", seconds(lambda: build_dictionary(parameters, device), device), "")
    with_b1 = replace(parameters, b1_range=(0.8, 1.2), b1_step=size.b1_step)
    report(
        f"dictionary and basis, {len(with_b1.grid())} atoms with a B1 axis",
        seconds(lambda: build_dictionary(with_b1, device), device, 1),
        "",
    )
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), 1 << 30)
        store.save(with_b1, build_dictionary(with_b1))
        report("… the same, from the cache on disk", seconds(lambda: store.load(with_b1), device), "")

    dictionary = build_dictionary(parameters, device)
    atoms = dictionary.coefficients.cpu()
    generator = torch.Generator().manual_seed(0)
    for V in size.voxels:
        chosen = torch.randint(len(t1), (V,), generator=generator)
        noisy = atoms[chosen] / atoms[chosen].norm(dim=1, keepdim=True)
        noisy += 0.03 * torch.randn(noisy.shape, generator=generator)
        voxels = (noisy * torch.exp(2j * np.pi * torch.rand((V, 1), generator=generator))).to(device)
        noisy = noisy.to(device)
        unit = dictionary.directions

        def peer_match(voxels: torch.Tensor = voxels, unit: torch.Tensor = unit) -> torch.Tensor:
            parts = voxels.split(256)
            return torch.cat([(part @ unit.to(part.dtype)).abs().argmax(1) for part in parts])

        best = t1[peer_match().cpu()]
        same = float((best == match(voxels, dictionary, refine=False).t1_ms.cpu()).float().mean())
        what = f"{V} voxels × {len(t1)} atoms, K = {unit.shape[0]}"
        for name, values in (("real", noisy), ("complex", voxels)):
            report(f"match, {what}, {name}", seconds(lambda v=values: match(v, dictionary), device), "")
            report(
                "… best atom only",
                seconds(lambda v=values: match(v, dictionary, refine=False), device),
                f"same atom in {same:.2%}",
            )
        if size.voxels[0] == V:
            report("… peer: complex product and argmax", seconds(peer_match, device, 1), "exact")


def images_and_kspace(size: Size) -> None:
    """NUFFT against the sum itself, and the fit of an INR without a guide."""
    generator = torch.Generator().manual_seed(0)
    n = size.matrix
    spiral = design_spiral(matrix=n, fov_mm=300.0, interleaves=size.interleaves)
    trajectory = torch.as_tensor(cycles_per_pixel(spiral.k_per_m, 300 / n), dtype=torch.float32)
    trajectory = trajectory.reshape(-1, 2)
    images = torch.randn((size.images, n, n), dtype=torch.complex64, generator=generator)
    # The sum itself, at some of the samples.
    few = torch.arange(0, len(trajectory), 997)
    rows, columns = torch.meshgrid(torch.arange(n) - n // 2, torch.arange(n) - n // 2, indexing="ij")
    pixels = torch.stack([columns.flatten(), rows.flatten()]).double()
    kernel = torch.exp(-2j * np.pi * (trajectory[few].double() @ pixels)).to(torch.complex64)
    truth = images[:2].reshape(2, -1) @ kernel.T
    for backend in ("finufft", "sigpy"):
        nufft = make_nufft(trajectory, (n, n), backend=backend)
        error = float((nufft.forward(images[:2])[:, few] - truth).norm() / truth.norm())
        both = seconds(lambda nufft=nufft: nufft.adjoint(nufft.forward(images)))
        report(f"NUFFT forward and adjoint, {size.images} × {n}², {backend}", both, f"{error:.1e}")

    y, x = rows / n, columns / n
    mask = x**2 + y**2 < 0.33**2
    target = torch.stack([torch.cos(5 * k * x) * torch.sin(8 * y + k) for k in range(1, 10)]) * mask
    fit = partial(fit_inr, target, mask, iterations=size.iterations)
    fitted = fit()
    error = float((fitted.coefficients - target).norm() / target.norm())
    report(
        f"INR without guide, {int(mask.sum())} pixels, K = 9, real",
        seconds(fit, times=1),
        f"{error:.1e} after the fit",
    )


def parser() -> argparse.ArgumentParser:
    return plain_parser(__doc__)


def main(argv: Sequence[str] | None = None) -> None:
    size = TOY if parser().parse_args(argv).toy else Size()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{machine(device.type)}\n")
    heading("what", "s, median", "spread", "error")
    signal_model(device, size)
    images_and_kspace(size)


if __name__ == "__main__":
    main()
