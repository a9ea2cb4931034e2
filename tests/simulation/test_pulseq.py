"""What the simulator takes from a Pulseq file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pulseq_files import DWELL_S, EDGE_PER_M, spiral_per_m, write_sequence
from whorl.simulation.pulseq import read_played


@pytest.mark.parametrize("shape", ["sinc", "block", "samples", "trapezoid"])
def test_what_is_played_is_what_was_written(tmp_path: Path, shape: str) -> None:
    phases = np.array([0, 117, 351, 15, 180, 90, 30.5, 0, 0, 270, 5, 6], dtype=float)
    written = write_sequence(tmp_path / "a.seq", shape=shape, phases_deg=phases, receiver_follows=False)
    played = read_played(written.path)
    # Six digits of an amplitude and of each sample of a shape.
    np.testing.assert_allclose(played.train.flip_deg, written.flip_deg, rtol=1e-5)
    np.testing.assert_allclose(played.train.tr_ms[:-1], written.tr_ms[:-1], atol=1e-6)
    np.testing.assert_allclose(played.train.te_ms, written.te_ms, atol=1e-6)
    assert played.train.ti_ms == pytest.approx(written.ti_ms)
    # The file has radians of six digits.
    np.testing.assert_allclose(played.train.phase_deg, phases, atol=1e-3)
    np.testing.assert_allclose(played.receiver_deg, 0, atol=1e-3)
    assert (played.n_noise, played.matrix) == (3, 64)
    assert (played.dwell_us, played.fov_mm) == pytest.approx((5, 300))
    np.testing.assert_array_equal(played.arms, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1])
    closed = spiral_per_m((np.arange(400) + 0.5) * DWELL_S, 2e-3)
    turns = np.exp(1j * np.deg2rad(written.turn_deg[:5]))[:, None]
    # A polygon through means over raster intervals h is off by h² |k''| / 8, as in tests/scan/test_pulseq.py.
    assert np.abs(played.k_per_m - closed * turns).max() < 7e-4 * EDGE_PER_M


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dummies": 1, "n_noise": 0}, r"has 12 pulses and 11 ADCs: expected noise, then one for each pulse"),
        ({"inversion": False}, r"has 0 inversions: expected one before the first pulse"),
        ({"odd": {7: "inversion"}}, r"has 2 inversions: expected one before the first pulse"),
        ({"odd": {7: "short ADC"}}, r"has ADCs of 2 sizes: expected one"),
    ],
    ids=["dummy", "no-inversion", "two-inversions", "sizes"],
)
def test_another_file_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    written = write_sequence(tmp_path / "a.seq", **change)
    with pytest.raises(ValueError, match=message):
        read_played(written.path)
