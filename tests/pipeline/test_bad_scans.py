"""Scans that are wrong or unusual as a whole: marked or refused in one sentence, never silent, never NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scan_edit import QUANTITIES, Result, Scan
from whorl.scan.failure import ScanError
from whorl.simulation.scan import simulate
from whorl.simulation.signals import jiang_train

METHODS: dict[str, dict[str, Any]] = {
    "lowrank": {"method": "lowrank"},
    "llr": {"method": "llr", "llr_iterations": 4},
    "inr": {"method": "inr"},
}
EACH_METHOD = pytest.mark.parametrize("method", METHODS)
SMALL: dict[str, Any] = {"timepoints": 120, "interleaves": 24, "coils": 4, "matrix": 64}


def made(folder: Path, **options: Any) -> Scan:
    path = folder / "scan.h5"
    simulate(path, **{"phantom": "nist", **SMALL, **options})
    return Scan.load(path)


def reconstructed(scan: Scan, method: str, **properties: Any) -> Result | str:
    """The result, or the sentence with which the scan was refused; whatever is sent is a number."""
    try:
        result = scan.run(**METHODS[method], **properties)
    except ScanError as error:
        return str(error)
    for image in result.images:
        assert np.isfinite(image.data).all()
    if result.outcome.failures:
        (why,) = result.outcome.failures
        assert not result.images
        return why
    for role in QUANTITIES:
        result.of(role)
    return result


def assert_marked(result: Result | str, *words: str) -> None:
    """Degraded or a fall-back with a note in each image, or refused; one of the words is in it."""
    if isinstance(result, str):
        said = result
    else:
        assert result.outcome.exit_code == 3
        for role in QUANTITIES:
            meta = result.of(role).meta
            assert meta["whorl_status"] in ("degraded", "fallback")
            assert meta["whorl_notes"]
        said = str(result.of("T1").meta["whorl_notes"])
    assert "\n" not in said
    assert not words or any(word in said for word in words), said


# --- The train --------------------------------------------------------------------------------------------


def list_of(scan: Scan, name: str) -> np.ndarray:
    parts = scan.header.split(f"<{name}>".encode())[1:]
    return np.array([float(part.split(b"<")[0]) for part in parts])


def told(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Scan], Any]:
    """Another list in the header than what was played."""
    return lambda scan: scan.no_user_train().header_list(name, change(list_of(scan, name)))


WRONG: dict[str, Callable[[Scan], Any]] = {
    "inversion not told": lambda scan: scan.header_list("TI", []),
    "flip angles reversed": told("flipAngle_deg", lambda flip: flip[::-1]),
    "TR of another unit": told("TR", lambda tr: 10 * tr),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_another_train_than_was_played(scan: Scan, wrong: str) -> None:
    WRONG[wrong](scan)
    assert_marked(reconstructed(scan, "inr"), "inversion", "train")


def test_an_inversion_that_was_not_told_shows_in_low_rank_images_too(scan: Scan) -> None:
    """In which aliasing and noise excuse smaller misfits."""
    WRONG["inversion not told"](scan)
    assert_marked(reconstructed(scan, "lowrank"), "inversion")


def test_times_in_seconds_are_refused(scan: Scan) -> None:
    told("TE", lambda te: te / 1000)(told("TR", lambda tr: tr / 1000)(scan))
    refused = reconstructed(scan, "lowrank")
    assert isinstance(refused, str)
    assert "TR is 0.009 ms" in refused
    assert "a readout takes 2.21 ms" in refused


@pytest.mark.parametrize("dwell_us", [0.0, 2500.0], ids=["not told", "in nanoseconds"])
def test_a_dwell_time_that_cannot_be_refuses_nothing(scan: Scan, dwell_us: float) -> None:
    scan.heads["sample_time_us"] = dwell_us
    assert scan.run().outcome.exit_code == 0


@EACH_METHOD
def test_the_right_train_is_not_doubted(scan: Scan, method: str) -> None:
    result = reconstructed(scan, method)
    assert isinstance(result, Result)
    assert "match the dictionary" not in result.said
    assert "ends of the dictionary" not in result.said


# --- Data -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unspoilt(loaded_scan: Scan) -> dict[str, Result]:
    return {method: loaded_scan.copy().run(**METHODS[method]) for method in METHODS}


@EACH_METHOD
@pytest.mark.parametrize("factor", [10, 1000])
def test_spikes_cost_their_readouts(
    scan: Scan, unspoilt: dict[str, Result], method: str, factor: float
) -> None:
    for place, n in enumerate(scan.imaging[[5, 40, 100]]):
        scan.data[n][place, 3 * place] *= factor
    result = reconstructed(scan, method)
    assert_marked(result, "3 of 120 readouts are missing: 3 with spikes")
    assert isinstance(result, Result)
    # One readout in forty is lost: as measured, half of that.
    for role, most in (("T1", 0.05), ("T2", 0.1)):
        ours, theirs = result.physical(role), unspoilt[method].physical(role)
        inside = (ours > 0) & (theirs > 0)
        assert inside.sum() > 0.97 * (theirs > 0).sum()
        assert np.median(np.abs(np.log(ours[inside] / theirs[inside]))) < most


#: What is done to the data `(C, S)` of readouts on end, how many these are, and what is said.
BURSTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int, str]] = {
    "spikes": (lambda data: data * np.where(np.arange(data.shape[1]) == 200, 1000, 1), 10, "spikes"),
    "ten times as strong": (lambda data: data * 10, 10, "spikes"),
    "zeros": (lambda data: data * 0, 10, "nothing but zeros"),
    "spikes in a quarter": (
        lambda data: data * np.where(np.arange(data.shape[1]) == 200, 1000, 1),
        30,
        "spikes",
    ),
    "zeros in a quarter": (lambda data: data * 0, 30, "nothing but zeros"),
}


@pytest.mark.parametrize("burst", BURSTS)
@pytest.mark.parametrize("counter", ["user_int", "arrival"])
def test_bursts_cost_their_readouts(scan: Scan, burst: str, counter: str) -> None:
    """Few are missing, many stop the slice."""
    damage, n, why = BURSTS[burst]
    for k in scan.imaging[40 : 40 + n]:
        scan.data[k] = damage(scan.data[k]).astype(np.complex64)
    said = f"{n} of 120 readouts are missing: {n} with {why}"
    if n > 12 and counter != "arrival":
        said = f"{120 - n} of 120 timepoints arrived, expected at least 90%: {n} with {why}"
    assert_marked(reconstructed(scan, "lowrank", timepoint=counter), said)


@pytest.mark.parametrize("counter", ["user_int", "arrival"])
def test_a_buffer_that_was_sent_again_and_again(scan: Scan, counter: str) -> None:
    for n in scan.imaging[50:60]:
        scan.data[n] = scan.data[scan.imaging[49]].copy()
    said = "10 of 120 readouts are missing: 10 with the data of another timepoint"
    assert_marked(reconstructed(scan, "lowrank", timepoint=counter), said)


def test_zeros_of_a_pulse_of_no_angle_are_no_loss(tmp_path: Path) -> None:
    """Without noise a readout in which nothing was excited is nothing else."""
    train = jiang_train(120)
    flip_deg = np.where(np.isin(np.arange(120), (0, 60, 61)), 0, train.flip_deg)
    scan = made(tmp_path, train=replace(train, flip_deg=flip_deg))
    for n in scan.imaging[[0, 60, 61]]:
        scan.data[n][:] = 0
    result = reconstructed(scan, "lowrank")
    assert isinstance(result, Result)
    assert result.outcome.exit_code == 0


@EACH_METHOD
def test_a_density_that_is_not_a_number(scan: Scan, method: str) -> None:
    scan.trajectory(lambda k: np.hstack([k, np.full((len(k), 1), np.nan)]))
    assert_marked(reconstructed(scan, method), "not all finite")


@EACH_METHOD
def test_only_noise(scan: Scan, method: str) -> None:
    rng = np.random.default_rng(0)
    for n in scan.imaging:
        parts = rng.standard_normal((2, *scan.data[n].shape)).astype(np.float32)
        scan.data[n] = parts[0] + 1j * parts[1]
    assert_marked(reconstructed(scan, method), "no signal")


@EACH_METHOD
def test_a_first_coefficient_without_signal_is_no_slice_without_one(tmp_path: Path, method: str) -> None:
    """In 200 timepoints after an inversion, a brain adds up to next to nothing along the first column."""
    pytest.importorskip("nilearn")
    scan = made(tmp_path, phantom="brain", timepoints=200, interleaves=16, coils=2, noise=1e-2)
    result = reconstructed(scan, method)
    assert isinstance(result, Result)
    assert (result.physical("T1") > 0).sum() > 800


@pytest.mark.parametrize("jump_rad", [1.5708, 3.1416], ids=["quarter turn", "half a turn"])
def test_a_phase_that_jumps(tmp_path: Path, jump_rad: float) -> None:
    """In the middle of the object: marked, or maps as good as without."""
    plain, jumping = (
        reconstructed(made(tmp_path, timepoints=300, matrix=96, interleaves=32, phase_jump_rad=rad), "inr")
        for rad in (0.0, jump_rad)
    )
    assert isinstance(plain, Result)
    if isinstance(jumping, str) or jumping.outcome.exit_code:
        assert_marked(jumping, "phase")
        return
    for role, most in (("T1", 0.01), ("T2", 0.02)):
        ours, theirs = jumping.physical(role), plain.physical(role)
        inside = (ours > 0) & (theirs > 0)
        apart = np.abs(np.log(ours[inside] / theirs[inside]))
        assert np.median(apart) < most
        assert np.quantile(apart, 0.95) < 10 * most


@EACH_METHOD
@pytest.mark.parametrize("phase", ["smooth", "stepping"])
def test_a_complex_basis(tmp_path: Path, method: str, phase: str) -> None:
    """RF phases that make the signals complex: maps that are right, marked where the method is another."""
    t = np.arange(120)
    phase_deg = 40 * np.sin(t / 9) if phase == "smooth" else 117.0 * t * (t + 1) / 2 % 360
    scan = made(tmp_path, train=replace(jiang_train(120), phase_deg=phase_deg))
    result = reconstructed(scan, method)
    assert isinstance(result, Result)
    if result.outcome.exit_code:
        assert_marked(result, "complex")
    inside = result.physical("T1") > 0
    # Water is most of the object.
    assert np.median(result.physical("T1")[inside]) == pytest.approx(2900, rel=0.1)


# --- Few of everything ------------------------------------------------------------------------------------


@EACH_METHOD
@pytest.mark.parametrize(("interleaves", "coils"), [(5, 4), (1, 4), (10, 1)])
def test_ten_timepoints(tmp_path: Path, method: str, interleaves: int, coils: int) -> None:
    scan = made(tmp_path, timepoints=10, interleaves=interleaves, coils=coils, matrix=24, readout_ms=5.0)
    result = reconstructed(scan, method, trajectory_units="cycles/pixel")
    assert_marked(result, "10 timepoints are few", "few readouts")


@EACH_METHOD
def test_one_coil(tmp_path: Path, method: str) -> None:
    result = reconstructed(made(tmp_path, coils=1, timepoints=300), method)
    assert isinstance(result, Result)
    assert result.outcome.exit_code == 0
    inside = result.physical("T1") > 0
    assert inside.sum() > 1000
    assert np.median(result.physical("T1")[inside]) == pytest.approx(2900, rel=0.05)


@EACH_METHOD
@pytest.mark.parametrize("coils", [1, 4])
def test_one_interleaf(tmp_path: Path, method: str, coils: int) -> None:
    """Each timepoint is complete: nothing is undersampled."""
    scan = made(tmp_path, interleaves=1, matrix=24, readout_ms=6.0, coils=coils)
    result = reconstructed(scan, method, trajectory_units="cycles/pixel")
    assert isinstance(result, Result)
    assert result.outcome.exit_code == 0
    inside = result.physical("T1") > 0
    assert np.median(result.physical("T1")[inside]) == pytest.approx(2900, rel=0.05)
