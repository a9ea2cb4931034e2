"""Where the time goes: each stage beside a peer in the same run, with its error.

Not a test: ``python tests/bench_stages.py``. Medians of several runs after one that is not counted.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from whorl.kspace.nufft import make_nufft
from whorl.physics.dictionary import DictionaryParameters, build_dictionary
from whorl.physics.epg import fisp_signal
from whorl.physics.matching import match
from whorl.physics.store import Store
from whorl.recon.inr import fit_inr
from whorl.scan.train import Train
from whorl.simulation.signals import fisp_signals, jiang_train
from whorl.simulation.spiral import cycles_per_pixel, design_spiral

#: Of T1 and T2: 13 000 atoms.
_STEP = 0.0445


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
    print(f"{name:58s} {taken[0]:7.3f} s (spread {taken[1]:.3f})   {error}")


def signal_model(device: torch.device) -> None:
    """Dictionary and match, on a CPU beside the plainest way and against the simulator's exact signals."""
    played = jiang_train(500)
    train = Train(played.flip_deg, played.tr_ms, played.te_ms, np.zeros(500), played.ti_ms, "simulated")
    parameters = DictionaryParameters(train, step=_STEP)
    t1, t2, _ = parameters.grid().atoms()
    some = torch.arange(0, len(t1), 97)
    exact = fisp_signals(played, t1[some].double().numpy(), t2[some].double().numpy())
    signals = fisp_signal(train, t1.to(device), t2.to(device)).cpu()
    error = np.abs(np.abs(signals[some].numpy()) - np.abs(exact)).max(1) / np.abs(exact).max(1)
    report(
        f"EPG, {len(t1)} atoms x 500 pulses",
        seconds(lambda: fisp_signal(train, t1.to(device), t2.to(device)), device),
        f"{error.max():.1e} of the peak",
    )
    report("dictionary and basis", seconds(lambda: build_dictionary(parameters, device), device), "")
    with_b1 = replace(parameters, b1_range=(0.8, 1.2))
    report(
        f"dictionary and basis, {len(with_b1.grid())} atoms with a B1 axis",
        seconds(lambda: build_dictionary(with_b1, device), device, 1),
        "",
    )
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), 1 << 30)
        store.save(with_b1, build_dictionary(with_b1))
        report("  the same, from the cache on disk", seconds(lambda: store.load(with_b1), device), "")

    dictionary = build_dictionary(parameters, device)
    atoms = dictionary.coefficients.cpu()
    generator = torch.Generator().manual_seed(0)
    for V in (22_000, 65_536):
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
        size = f"{V} voxels x {len(t1)} atoms, K = {unit.shape[0]}"
        for name, values in (("real", noisy), ("complex", voxels)):
            report(f"match, {size}, {name}", seconds(lambda v=values: match(v, dictionary), device), "")
            report(
                "  best atom only",
                seconds(lambda v=values: match(v, dictionary, refine=False), device),
                f"same atom in {same:.2%}",
            )
        if V == 22_000:
            report("  peer: complex product and argmax", seconds(peer_match, device, 1), "exact")


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    signal_model(device)
    generator = torch.Generator().manual_seed(0)
    spiral = design_spiral(matrix=256, fov_mm=300.0, interleaves=96)
    trajectory = torch.as_tensor(cycles_per_pixel(spiral.k_per_m, 300 / 256), dtype=torch.float32).reshape(
        -1, 2
    )
    images = torch.randn((36, 256, 256), dtype=torch.complex64, generator=generator)
    # The sum itself, at some of the samples.
    few = torch.arange(0, len(trajectory), 997)
    rows, columns = torch.meshgrid(torch.arange(256) - 128, torch.arange(256) - 128, indexing="ij")
    pixels = torch.stack([columns.flatten(), rows.flatten()]).double()
    kernel = torch.exp(-2j * np.pi * (trajectory[few].double() @ pixels)).to(torch.complex64)
    truth = images[:2].reshape(2, -1) @ kernel.T
    for backend in ("finufft", "sigpy"):
        nufft = make_nufft(trajectory, (256, 256), backend=backend)
        error = float((nufft.forward(images[:2])[:, few] - truth).norm() / truth.norm())
        both = seconds(lambda nufft=nufft: nufft.adjoint(nufft.forward(images)))
        report(f"NUFFT forward and adjoint, 36 x 256², {backend}", both, f"{error:.1e}")

    y, x = torch.meshgrid(torch.arange(256) - 128, torch.arange(256) - 128, indexing="ij")
    mask = x**2 + y**2 < 85**2
    target = torch.stack([torch.cos(0.02 * k * x) * torch.sin(0.03 * y + k) for k in range(1, 10)]) * mask
    fitted = fit_inr(target, mask)
    error = float((fitted.coefficients - target).norm() / target.norm())
    report(
        f"INR, {int(mask.sum())} pixels, K = 9, real",
        seconds(lambda: fit_inr(target, mask), times=1),
        f"{error:.1e} after the fit",
    )


if __name__ == "__main__":
    main()
