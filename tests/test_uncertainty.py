"""The predicted deviation of noise against that of many realisations of it, through the whole pipeline."""

from __future__ import annotations

import numpy as np
import pytest

from bench_uncertainty import NoisyScan, compare
from scan_edit import Scan

REALISATIONS = 50


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> NoisyScan:
    path = tmp_path_factory.mktemp("uncertainty") / "scan.h5"
    return NoisyScan(path, 5e-3, phantom="brain", matrix=96, timepoints=300, interleaves=32)


# A deviation of 50 values has an error of 10 %. That of the INR is too small where tissues meet: what it is
# told again is smoother than the object.
@pytest.mark.parametrize(("method", "share"), [("lowrank", 0.9), ("inr", 0.65)])
def test_predicted_and_empirical_deviations(noisy: NoisyScan, method: str, share: float) -> None:
    found, _ = compare(noisy, REALISATIONS, {"method": method})
    for one in found.values():
        assert 0.75 < np.median(one.noise) < 1.25
        assert np.mean((one.noise > 0.7) & (one.noise < 1.4)) >= share


def test_more_noise_gives_larger_deviations(scan: Scan) -> None:
    """The level is found without noise readouts."""
    rng = np.random.default_rng(0)
    found = {}
    for factor in (1, 4):
        noisier = scan.copy().without_noise()
        level = factor * 2e-3 * max(float(np.abs(data).max()) for data in scan.data)
        for n in range(len(noisier.data)):
            white = rng.standard_normal((2, *noisier.data[n].shape))
            noisier.data[n] = noisier.data[n] + (level * (white[0] + 1j * white[1])).astype(np.complex64)
        result = noisier.run(method="lowrank", uncertainty="true", output_dtype="float32")
        # In water T2 is not determined by so short a train.
        spheres = (result.physical("T1") > 200) & (result.physical("T2") < 300)
        relative = result.of("T1_SD").data[0, 0][spheres] / result.physical("T1")[spheres]
        assert relative.max() <= 1
        found[factor] = float(np.median(relative))
    assert found[4] > 1.5 * found[1]


def test_all_methods_and_a_matched_transmit_field(scan: Scan) -> None:
    for settings in (
        {"method": "llr", "llr_iterations": 4},
        {"method": "inr", "iterations": 6, "correction_steps": 1},
        {"method": "lowrank", "b1": "match"},
    ):
        result = scan.copy().run(**settings, uncertainty="true", output_dtype="float32")
        inside = result.physical("T1") > 0
        for role in ("T1_SD", "T2_SD"):
            values = result.of(role).data[0, 0]
            assert np.isfinite(values).all()
            assert (values[inside] > 0).all()
            assert (values[~inside] == 0).all()


def test_a_deadline_leaves_the_uncertainty_out_and_says_so(scan: Scan) -> None:
    result = scan.run(method="lowrank", uncertainty="true", deadline_s=1e-3)
    assert result.slices() == [0]
    assert not any(image.image_series_index in (6, 7) for image in result.images)
    assert any("no uncertainty" in note for note in result.outcome.notes)
