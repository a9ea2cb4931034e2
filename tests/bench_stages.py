"""Where the time goes: each stage beside a peer in the same run, with its error.

Not a test: ``python tests/bench_stages.py``. Medians of several runs after one that is not counted.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from whorl.kspace.nufft import make_nufft
from whorl.physics.dictionary import build_dictionary, relaxation_grid
from whorl.physics.epg import fisp_signal
from whorl.physics.matching import match
from whorl.recon.inr import fit_inr
from whorl.scan.train import Train
from whorl.simulation.signals import fisp_signals, jiang_train
from whorl.simulation.spiral import design_spiral


def seconds(run: Callable[[], object], times: int = 3) -> tuple[float, float]:
    """Median and spread."""
    run()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken), max(taken) - min(taken)


def report(name: str, taken: tuple[float, float], error: str) -> None:
    print(f"{name:58s} {taken[0]:7.3f} s (spread {taken[1]:.3f})   {error}")


def main() -> None:
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    played = jiang_train(500)
    train = Train(played.flip_deg, played.tr_ms, played.te_ms, np.zeros(500), played.ti_ms, "simulated")
    t1, t2 = relaxation_grid((20, 5000), (4, 3000), 0.05)
    some = torch.arange(0, len(t1), 97)
    exact = fisp_signals(played, t1[some].double().numpy(), t2[some].double().numpy())
    signals = fisp_signal(train, t1, t2)
    error = np.abs(np.abs(signals[some].numpy()) - np.abs(exact)).max(1) / np.abs(exact).max(1)
    report(
        f"EPG, {len(t1)} atoms x 500 pulses",
        seconds(lambda: fisp_signal(train, t1, t2)),
        f"{error.max():.1e} of the peak",
    )
    peer = seconds(lambda: fisp_signals(played, t1[some].double().numpy(), t2[some].double().numpy()), 1)
    scale = len(t1) / len(some)
    report(
        f"  peer: the simulator's EPG, {len(some)} atoms x {scale:.0f}",
        (peer[0] * scale, peer[1] * scale),
        "exact",
    )
    report("dictionary and basis", seconds(lambda: build_dictionary(train)), "")

    dictionary = build_dictionary(train)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(t1), (22_000,), generator=generator)
    noisy = dictionary.coefficients[chosen] + 0.01 * torch.randn(
        (22_000, dictionary.basis.shape[1]), generator=generator
    )
    voxels = noisy * torch.exp(2j * np.pi * torch.rand((22_000, 1), generator=generator))
    unit = dictionary.coefficients / dictionary.coefficients.norm(dim=1, keepdim=True)

    def peer_match() -> torch.Tensor:
        return torch.cat([(part @ unit.T.to(part.dtype)).abs().argmax(1) for part in voxels.split(256)])

    same = float((dictionary.t1_ms[peer_match()] == match(voxels, dictionary).t1_ms).float().mean())
    report(
        f"match, 22 000 voxels x {len(t1)} atoms, complex",
        seconds(lambda: match(voxels, dictionary)),
        f"same atom in {same:.2%}",
    )
    report("match, the same, real", seconds(lambda: match(noisy, dictionary)), "")
    report("  peer: complex product and argmax", seconds(peer_match, 1), "exact")

    spiral = design_spiral(matrix=256, fov_mm=300.0, interleaves=96)
    trajectory = torch.as_tensor(spiral.cycles_per_pixel(300 / 256), dtype=torch.float32).reshape(-1, 2)
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
        seconds(lambda: fit_inr(target, mask), 1),
        f"{error:.1e} after the fit",
    )


if __name__ == "__main__":
    main()
