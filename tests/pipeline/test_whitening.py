"""Whitening lowers the noise of maps by what theory says, and does not harm where noise is white."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from scan_edit import Scan
from whorl.simulation.noise import correlated_noise
from whorl.simulation.phantoms import coil_maps
from whorl.simulation.scan import simulate
from whorl.simulation.truth import read_truth

C, N = 6, 64


def spread(paths: list[Path], whiten: str) -> float:
    """SD of log T2 by noise alone: scans that differ in nothing else.

    With one prescan for both: what its finite length does to the whitening, and so to the aliasing, is none.
    """
    scans = [Scan.load(p) for p in paths]
    scans[1].data[:4] = scans[0].data[:4]
    first, second = (scan.run(whiten=whiten, compression="off").physical("T2") for scan in scans)
    inside = (read_truth(paths[0]).t1_ms[0] > 2000) & (first > 0) & (second > 0)
    assert inside.sum() > 300
    apart = np.log(first[inside] / second[inside]) / np.sqrt(2)
    return 1.4826 * float(np.median(np.abs(apart)))


def expected(covariance: NDArray[np.complex128], inside: NDArray[np.bool_]) -> float:
    """Ratio of SD by theory: of the variances ``sᴴΨs / (sᴴs)²`` and ``1 / (sᴴΨ⁻¹s)``."""
    fine = coil_maps(C, matrix=N, fov_mm=300.0, height_mm=0.0)
    s = fine.reshape(C, N, -1, N, fine.shape[-1] // N).mean((2, 4))[:, inside]
    plain = np.einsum("cp,cd,dp->p", s.conj(), covariance, s).real / np.square(np.abs(s)).sum(0) ** 2
    white = 1 / np.einsum("cp,cd,dp->p", s.conj(), np.linalg.inv(covariance), s).real
    return float(np.median(np.sqrt(plain / white)))


@pytest.mark.parametrize(
    ("covariance", "noise"),
    [(correlated_noise(C, 0.7, 10.0), 2e-3), (np.eye(C, dtype=complex), 2e-3)],
    ids=["correlated, one coil noisy", "white"],
)
def test_the_noise_of_t2_falls_as_theory_says(
    tmp_path: Path, covariance: NDArray[np.complex128], noise: float
) -> None:
    paths = [tmp_path / f"{seed}.h5" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        simulate(
            path, phantom="nist", timepoints=120, interleaves=24, coils=C, matrix=N, noise=noise, seed=seed,
            noise_covariance=covariance,
        )  # fmt: skip
    theory = expected(covariance, read_truth(paths[0]).t1_ms[0] > 2000)
    ratio = spread(paths, "off") / spread(paths, "auto")
    # The SD of some hundred pixels is known to 5 %; coil maps are estimated, and noise bends T2.
    assert ratio == pytest.approx(theory, rel=0.2)


def test_noise_readouts_of_another_bandwidth(tmp_path: Path) -> None:
    # Sampled at half the dwell time noise has twice the variance; maps and their noise are the same.
    results = []
    for dwell_us in (None, 1.25):
        path = tmp_path / f"{dwell_us}.h5"
        simulate(
            path, phantom="nist", timepoints=120, interleaves=24, coils=C, matrix=N,
            noise_dwell_us=dwell_us,
        )  # fmt: skip
        scan = Scan.load(path)
        noise = np.concatenate([d.ravel() for d in scan.data[:4]])
        results.append((scan.run(), float(np.square(np.abs(noise)).mean())))
    (plain, variance), (wide, doubled) = results
    assert doubled / variance == pytest.approx(2, rel=1e-3)  # the same random numbers
    assert "noise of 1.25 µs scaled to 2.5 µs" in wide.said
    inside = plain.physical("T1") > 0
    ratio = wide.physical("M0")[inside] / plain.physical("M0")[inside]
    # Whitened data have variance 1: M0 is in the unit of the noise, whatever it was measured with.
    assert np.median(ratio) == pytest.approx(1, rel=0.01)
