"""Pulseq sequences: what the file says of train and trajectory, and scans that were measured with them."""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pulseq_files import (
    DWELL_US,
    FOV_MM,
    MATRIX,
    N_ARMS,
    N_SAMPLES,
    TE_MS,
    TI_MS,
    TR_MS,
    flip_angles,
    write_sequence,
)
from scan_edit import Scan
from whorl.scan.failure import ScanError
from whorl.scan.pulseq import read_pulseq
from whorl.scan.readout import Flag
from whorl.simulation.scan import PULSEQ, Layout, read_truth, simulate

_REAL = Path("/work/shared/data/sequences/test_mrf.seq")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sequence(tmp_path_factory.mktemp("seq") / "small.seq")


def test_the_train(small: Path) -> None:
    found = read_pulseq(str(small))
    train = found.train
    # The file has six digits, times whole microseconds.
    np.testing.assert_allclose(train.flip_deg, flip_angles(120), rtol=1e-5)
    np.testing.assert_allclose(train.tr_ms[:-1], TR_MS, atol=1e-3)
    np.testing.assert_allclose(train.te_ms, TE_MS, atol=1e-3)
    assert train.inversion_time_ms == pytest.approx(TI_MS, abs=1e-3)
    assert not train.phase_deg.any()
    assert train.phase_known
    assert found.adc.tolist() == [-1] * 5 + list(range(120))
    assert (found.n_slices, found.n_samples, found.fov_mm) == (1, N_SAMPLES, (FOV_MM, FOV_MM))
    assert found.measured.all()
    assert not found.receiver_deg.any()
    assert found.warnings == ()


def test_the_trajectory_is_that_of_pypulseq(small: Path) -> None:
    found = read_pulseq(str(small))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import pypulseq

        sequence = pypulseq.Sequence()
        sequence.read(str(small))
        k = sequence.calculate_kspace()[0][:2].T.reshape(-1, N_SAMPLES, 2)[5:]
    table = found.trajectories
    assert len(table.points) == N_ARMS
    assert (table.units, table.by, table.dwell_us) == ("1/m", "timepoint", pytest.approx(DWELL_US))
    k_max = MATRIX / (2 * FOV_MM * 1e-3)
    for t in range(120):
        places = table.interleaf(t)
        assert places is not None
        # Interleaves that agree to the digits of the file are one.
        np.testing.assert_allclose(places, k[t], atol=2e-4 * k_max)
    # A closed form: the radius at which the spiral was written to end.
    assert np.hypot(*table.points[0, -1]) == pytest.approx(k_max, rel=5e-3)  # half a dwell before its end


def test_phases_and_a_receiver_that_does_not_follow(tmp_path: Path) -> None:
    follows = read_pulseq(str(write_sequence(tmp_path / "a.seq", n_pulses=12, rf_phase_deg=50)))
    np.testing.assert_allclose(follows.train.phase_deg % 360, 50 * np.arange(12) % 360, atol=1e-2)
    assert not follows.receiver_deg.any()
    path = write_sequence(tmp_path / "b.seq", n_pulses=12, rf_phase_deg=50, receiver_follows=False)
    apart = read_pulseq(str(path)).receiver_deg
    turns = np.exp(1j * np.deg2rad(apart + 50 * np.arange(12)))
    np.testing.assert_allclose(turns, turns[0], atol=1e-3)  # the same but for a constant


def test_pulses_without_an_adc(tmp_path: Path) -> None:
    found = read_pulseq(str(write_sequence(tmp_path / "a.seq", n_pulses=12, dummies=(0, 1, 7))))
    assert np.flatnonzero(~found.measured).tolist() == [0, 1, 7]
    assert found.adc.tolist() == [-1] * 5 + [2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert found.train.n_timepoints == 12
    np.testing.assert_allclose(found.train.te_ms, TE_MS, atol=1e-3)


@pytest.mark.parametrize("labels", [True, False], ids=["SLC", "frequency"])
def test_slices(tmp_path: Path, labels: bool) -> None:
    found = read_pulseq(str(write_sequence(tmp_path / "a.seq", n_pulses=12, slices=2, labels=labels)))
    assert found.n_slices == 2
    assert found.slice_of_adc.tolist() == [0] * 17 + [1] * 12
    assert found.adc.tolist() == [-1] * 5 + [*range(12), *range(12)]
    np.testing.assert_allclose(found.train.tr_ms[:-1], TR_MS, atol=1e-3)


def test_a_file_that_does_not_say_what_its_pulses_are_for(tmp_path: Path) -> None:
    found = read_pulseq(str(write_sequence(tmp_path / "a.seq", n_pulses=12, use=False)))
    assert found.train.inversion_time_ms == pytest.approx(TI_MS, abs=1e-3)
    assert "a pulse of 180° is taken for the inversion" in found.warnings
    none = read_pulseq(str(write_sequence(tmp_path / "b.seq", n_pulses=12, inversion=False)))
    assert none.train.inversion_time_ms is None


def test_the_property_counts_more_and_is_said(small: Path) -> None:
    found = read_pulseq(str(small), 30.0)
    assert found.train.inversion_time_ms == 30
    assert any("property inversion_time_ms is 30 ms, the Pulseq file has 21 ms" in w for w in found.warnings)
    assert read_pulseq(str(small), 0.0).train.inversion_time_ms is None


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("refocusing", "has a refocusing pulse: expected a FISP train"),
        ("two ADCs", "has two ADCs behind the excitation"),
        ("long ADC", r"imaging ADCs of .*400 × 5 µs .*expected one size"),
        ("inversion", "inverts again before excitation 4"),
        ("kz", "only 2D scans are reconstructed"),
        ("no gradient", "no gradient along x or y during its ADCs"),
    ],
)
def test_what_is_no_such_train(tmp_path: Path, extra: str, says: str) -> None:
    path = write_sequence(tmp_path / "a.seq", n_pulses=12, extra=extra)
    with pytest.raises(ScanError, match=says) as caught:
        read_pulseq(str(path))
    assert str(path) in str(caught.value)


def test_files_that_are_no_sequences(tmp_path: Path, small: Path) -> None:
    with pytest.raises(ScanError, match="cannot be read"):
        read_pulseq(str(tmp_path / "none.seq"))
    with pytest.raises(ScanError, match="is no file"):
        read_pulseq(str(tmp_path))
    for number, text in enumerate(("", "nonsense\n", small.read_text()[:900], "\0" * 200)):
        path = tmp_path / f"{number}.seq"
        path.write_text(text)
        with pytest.raises(ScanError, match=f"{number}.seq"):
            read_pulseq(str(path))
    nothing = write_sequence(tmp_path / "no.seq", n_pulses=0)
    with pytest.raises(ScanError, match="no excitation"):
        read_pulseq(str(nothing))
    silent = write_sequence(tmp_path / "silent.seq", n_pulses=3, dummies=(0, 1, 2))
    with pytest.raises(ScanError, match="no ADC behind an excitation"):
        read_pulseq(str(silent))


@pytest.mark.skipif(not _REAL.is_file(), reason="the real sequence is not at hand")
def test_a_real_sequence() -> None:
    found = read_pulseq(str(_REAL))
    train = found.train
    assert train.n_timepoints == 1000
    assert (found.adc < 0).sum() == 100
    assert len(found.trajectories.points) == 48
    assert (found.n_samples, found.fov_mm) == (3072, (256.0, 256.0))
    np.testing.assert_allclose(
        train.flip_deg, np.loadtxt(_REAL.parent / "mrf_patterns_yun_fa.txt"), atol=1e-3
    )
    # Its blocks have a raster of 10 µs, to which the TRs of the list were rounded.
    np.testing.assert_allclose(
        train.tr_ms[:-1], np.loadtxt(_REAL.parent / "mrf_patterns_yun_tr.txt")[:-1], atol=0.02
    )
    assert (train.inversion_time_ms, train.te_ms[0]) == (pytest.approx(18.02), pytest.approx(2.02))


# --- Scans --------------------------------------------------------------------------------------------


def simulated(path: Path, sequence: Path, layout: Layout = PULSEQ) -> Path:
    simulate(path, phantom="nist", coils=4, sequence=sequence, layout=layout)
    return path


@pytest.fixture(scope="module")
def measured(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated(tmp_path_factory.mktemp("scan") / "scan.h5", small)


def assert_near_the_truth(
    scan: Scan, path: Path, sequence: Path, *, within: float = 0.12, **properties: object
) -> str:
    result = scan.run(sequence=str(sequence), **properties)
    assert result.outcome.failures == ()
    truth = read_truth(path)
    inside = (truth.t1_ms[0] > 2000) & (result.physical("T1") > 0)  # water: most of the object
    assert inside.sum() > 200
    for role, true in (("T1", truth.t1_ms[0]), ("T2", truth.t2_ms[0])):
        # Low-rank maps of 120 timepoints: aliasing spreads them, their median is near.
        assert np.median(result.physical(role)[inside] / true[inside]) == pytest.approx(1, abs=within)
    return result.said


def test_a_scan_without_flags_train_or_trajectory(measured: Path, small: Path) -> None:
    said = assert_near_the_truth(Scan.load(measured), measured, small)
    assert "4 coils whitened by 5 noise readouts" in said
    assert "repetition (numbers ADCs of the sequence)" in said
    assert "24 interleaves of 400 samples, by timepoint" in said


def test_noise_that_is_flagged(measured: Path, small: Path) -> None:
    scan = Scan.load(measured).flag(np.arange(5), Flag.IS_NOISE_MEASUREMENT)
    assert "whitened by 5 noise readouts" in assert_near_the_truth(scan, measured, small)


def test_a_scan_without_its_noise(measured: Path, small: Path) -> None:
    scan = Scan.load(measured).without(np.arange(5))
    assert "not whitened" in assert_near_the_truth(scan, measured, small)


def test_counters_of_the_timepoints_alone(measured: Path, small: Path) -> None:
    scan = Scan.load(measured)
    scan.heads["idx"]["repetition"][5:] -= 5
    scan.limit("repetition", 119)
    assert_near_the_truth(scan, measured, small)


def test_no_counter(measured: Path, small: Path) -> None:
    scan = Scan.load(measured).limit("repetition", None)
    scan.heads["idx"]["repetition"] = 0
    assert_near_the_truth(scan.copy(), measured, small, timepoint="arrival")
    with pytest.raises(ScanError, match="no counter numbers the timepoints"):
        scan.run(sequence=str(small))


def test_dummy_pulses_count_for_the_signal(tmp_path: Path) -> None:
    # Simulated as if all had been measured; the readouts of the dummies are then left out of the scan.
    whole = write_sequence(tmp_path / "whole.seq")
    dummies = (0, 1, 2, 50)
    path = simulated(tmp_path / "scan.h5", whole)
    scan = Scan.load(path).without([5 + t for t in dummies])
    with_dummies = write_sequence(tmp_path / "dummies.seq", dummies=dummies)
    for numbered in (True, False):
        ours = scan.copy()
        if numbered:  # the ADCs, of which there are fewer
            ours.heads["idx"]["repetition"] = np.arange(121)
            ours.limit("repetition", 120)
        else:
            ours.heads["idx"]["repetition"] = 0
            ours.limit("repetition", None)
        counter = "auto" if numbered else "arrival"
        # Without the first readouts, which tell T1 best.
        said = assert_near_the_truth(ours, path, with_dummies, within=0.2, timepoint=counter)
        assert "120, 116 of them measured" in said


def test_removed_oversampling(measured: Path, small: Path) -> None:
    scan = Scan.load(measured)
    scan.data = [np.ascontiguousarray(data[:, ::2]) for data in scan.data]
    scan.heads["number_of_samples"] = N_SAMPLES // 2
    scan.heads["sample_time_us"] *= 2
    scan.trajectories = [np.zeros((N_SAMPLES // 2, 0), np.float32)] * len(scan.data)
    assert_near_the_truth(scan, measured, small)


def test_a_receiver_that_stays(tmp_path: Path) -> None:
    path = write_sequence(tmp_path / "a.seq", rf_phase_deg=180, receiver_follows=False)
    scan = simulated(tmp_path / "scan.h5", path)
    said = assert_near_the_truth(Scan.load(scan), scan, path)
    assert "receiver phase: does not follow the RF phase: corrected" in said


def test_readouts_longer_than_the_adc_are_refused(measured: Path, small: Path) -> None:
    scan = Scan.load(measured)
    scan.data = [np.pad(data, ((0, 0), (0, 9))) for data in scan.data]
    scan.heads["number_of_samples"] += 9
    scan.trajectories = [np.zeros((N_SAMPLES + 9, 0), np.float32)] * len(scan.data)
    with pytest.raises(ScanError, match=r"has 400 samples of 5 µs, the readouts have 409"):
        scan.run(sequence=str(small))


def test_what_is_attached_counts_unless_the_property_replaces_it(tmp_path: Path, small: Path) -> None:
    path = simulated(tmp_path / "scan.h5", small, replace(PULSEQ, attached=True))
    scan = Scan.load(path)
    said = assert_near_the_truth(scan.copy(), path, small)
    assert "trajectory: of each readout (attached to the readouts)" in said
    scan.trajectory(lambda k: k[:, ::-1])  # something else
    said = assert_near_the_truth(scan, path, small, trajectory=str(small))
    assert "24 interleaves of 400 samples, by timepoint" in said


def test_contradictions_are_said_with_both_values(measured: Path, small: Path) -> None:
    scan = Scan.load(measured)
    scan.space("encodedSpace", (64, 64), (310, 310)).header_list("TI", [33.0])
    result = scan.run(sequence=str(small), trajectory_units="1/m")
    assert "is 300 mm in the Pulseq file and 310 mm in the header" in result.said
    assert "the inversion time is 21 ms in the Pulseq file and 33 ms in the header" in result.said
