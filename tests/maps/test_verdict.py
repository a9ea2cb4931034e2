"""Maps that do not look like a measurement are never complete."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scan_edit import Scan
from whorl.config import Settings
from whorl.maps.images import SliceMaps
from whorl.maps.verdict import half_turns, remarks
from whorl.pipeline.slices import is_corrected
from whorl.simulation.scan import simulate

T1, T2 = (20.0, 5000.0), (4.0, 3000.0)


def maps(t1: float = 800, t2: float = 60, quality: float = 0.99, share: float = 1.0) -> SliceMaps:
    """A share of the pixels as told, the others like tissue; a frame of zeros around them."""
    inside = np.zeros((20, 20), dtype=bool)
    inside[2:18, 2:18] = True
    told = inside & (np.arange(400).reshape(20, 20) % 20 < 2 + 16 * share)
    values = [
        np.where(told, v, usual).astype(np.float32) * inside
        for v, usual in ((t1, 800), (t2, 60), (quality, 0.99))
    ]
    return SliceMaps(values[0], values[1], inside.astype(np.float32), values[2])


def test_usual_maps_and_none_at_all_are_passed_over() -> None:
    assert remarks(maps(), T1, T2) == []
    assert remarks(maps(t1=0, t2=0, quality=0), T1, T2) == []
    # CSF is long, but not at the end; a few voxels may be there.
    assert remarks(maps(t1=4500, t2=2500), T1, T2) == []
    assert remarks(maps(t2=3000, share=0.75), T1, T2) == []
    # Noisy voxels match badly; the best ones tell.
    assert remarks(maps(quality=0.5, share=0.7), T1, T2) == []


@pytest.mark.parametrize(("name", "value"), [("t1", 20.0), ("t1", 5000.0), ("t2", 4.0), ("t2", 2999.0)])
def test_voxels_at_the_ends_are_told(name: str, value: float) -> None:
    ((status, why),) = remarks(maps(share=0.9375, **{name: value}), T1, T2)
    assert status == "degraded"
    assert why.startswith("94% of the voxels lie at the ends of the dictionary")
    assert "units" in why


@pytest.mark.parametrize("quality", [0.5, np.nan])
def test_signals_of_another_train_are_told(quality: float) -> None:
    ((status, why),) = remarks(maps(quality=quality), T1, T2)
    assert status == "degraded"
    assert "the best tenth of the voxels has a quality of" in why
    assert "inversion_time_ms" in why


def test_corrected_images_have_to_match_better() -> None:
    """What aliasing and noise excuse in low-rank images, nothing does in corrected ones."""
    assert remarks(maps(quality=0.97), T1, T2) == []
    ((status, why),) = remarks(maps(quality=0.97), T1, T2, corrected=True)
    assert status == "degraded"
    assert "the median voxel has a quality of 0.970, expected 0.98 or more" in why
    assert remarks(maps(quality=0.985), T1, T2, corrected=True) == []
    # A part that the model does not hold for, as fat, is not the train.
    assert remarks(maps(quality=0.5, share=0.4), T1, T2, corrected=True) == []
    assert len(remarks(maps(quality=0.5), T1, T2, corrected=True)) == 1  # said once


@pytest.mark.parametrize(
    ("method", "properties", "corrected"),
    [
        ("inr", {}, True),
        ("llr", {}, True),
        ("lowrank", {}, False),
        ("inr", {"preset": "seed"}, False),
        ("inr", {"correction_steps": 0}, False),
        ("inr", {"guide": "off"}, False),
        ("llr", {"start": "adjoint"}, True),  # which stands in for the INR
    ],
)
def test_which_images_are_corrected(method: str, properties: dict[str, str | int], corrected: bool) -> None:
    assert is_corrected(method, Settings.from_properties(properties)) == corrected


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Scan:
    path: Path = tmp_path_factory.mktemp("verdict") / "scan.h5"
    simulate(path, phantom="nist", matrix=64, timepoints=200, interleaves=16, coils=4, noise=5e-3)
    return Scan.load(path)


@pytest.mark.parametrize("method", ["inr", "lowrank"])
def test_an_inversion_that_nobody_told_is_not_complete(scan: Scan, method: str) -> None:
    right = scan.copy().run(method=method)
    assert right.outcome.exit_code == 0, right.outcome
    wrong = scan.copy().run(method=method, inversion_time_ms=0)
    assert wrong.outcome.exit_code == 3
    meta = wrong.of("T1").meta
    assert meta["whorl_status"] == "degraded"
    assert "the voxels lie at the ends of the dictionary" in meta["whorl_notes"]


@pytest.mark.parametrize("turn", [np.pi, -2.6, 1.5, 0.0])
def test_a_jump_of_the_phase_by_half_a_turn_is_told(turn: float) -> None:
    found = maps(quality=0.999)
    inside = found.t1_ms > 0
    smooth = np.exp(0.05j * np.arange(20))
    jumped = replace(
        found,
        turn=(inside * smooth * np.where(np.arange(20) < 10, 1, np.exp(1j * turn))).astype(np.complex64),
    )
    assert remarks(jumped, T1, T2) == []  # of images that are not corrected the sign says little
    told = remarks(jumped, T1, T2, corrected=True)
    if abs(turn) < 2:  # leaves an imaginary part, which is seen elsewhere
        assert told == []
        return
    ((status, why),) = told
    assert status == "degraded"
    # Six of sixteen columns.
    assert "the phase jumps by half a turn beside 37.5% of the object" in why
    # Along the other axis too; and not where there is next to no signal.
    assert half_turns(replace(jumped, turn=jumped.turn.T)) == 0.375
    dark = np.where(np.arange(20) < 10, 0.01, 1).astype(np.float32)
    assert half_turns(replace(jumped, m0=found.m0 * dark)) == 0


@pytest.mark.parametrize("method", ["llr", "inr"])
def test_a_scan_whose_phase_jumps_by_half_a_turn_is_degraded(method: str, tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    simulate(path, phantom="brain", matrix=64, timepoints=200, interleaves=24, coils=4, phase_jump_rad=np.pi)
    result = Scan.load(path).run(method=method)
    assert result.of("T1").meta["whorl_status"] == "degraded"
    assert "jumps by half a turn" in result.said
