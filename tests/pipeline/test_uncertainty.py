"""The predicted deviation of noise against that of many realisations of it, through the whole pipeline."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from bench_uncertainty import NoisyScan, compare, reconstruct
from scan_edit import Scan

REALISATIONS = 50


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> NoisyScan:
    path = tmp_path_factory.mktemp("uncertainty") / "scan.h5"
    return NoisyScan(path, 5e-3, phantom="brain", matrix=96, timepoints=300, interleaves=32)


# A deviation of 50 values has an error of 10 %. The guide of the INR is no linear filter: with more noise it
# averages more (0.79 of the voxels; of the low-rank maps 0.94).
@pytest.mark.parametrize(("method", "share"), [("lowrank", 0.9), ("inr", 0.75)])
def test_predicted_and_empirical_deviations(noisy: NoisyScan, method: str, share: float) -> None:
    found, _ = compare(noisy, REALISATIONS, {"method": method})
    for one in found.values():
        assert 0.75 < np.median(one.noise) < 1.25
        assert np.mean((one.noise > 0.7) & (one.noise < 1.4)) >= share


def test_noise_is_found_without_noise_readouts(noisy: NoisyScan) -> None:
    """Four times the noise gives about four times the deviation, and the same as noise readouts do."""
    medians = {}
    for factor in (1, 4):
        for whiten in ("auto", "off"):
            louder = copy.copy(noisy)
            louder.mixing = factor * noisy.mixing
            result = reconstruct(louder, 0, {"method": "lowrank", "whiten": whiten})
            assert result.inside is not None
            sd, _ = result.inside.deviations(None, noise_only=True)
            medians[factor, whiten] = float(np.median(sd[sd > 0] / result.maps.t1_ms[sd > 0]))
    assert 2.5 < medians[4, "off"] / medians[1, "off"] < 5.5
    # The noise of the coils is correlated, which is not known without noise readouts.
    for factor in (1, 4):
        assert 0.5 < medians[factor, "off"] / medians[factor, "auto"] < 2


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
