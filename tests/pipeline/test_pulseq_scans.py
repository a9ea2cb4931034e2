"""Scans of Pulseq sequences, whose data say next to nothing: the file tells train, trajectory and noise.

The reference is the same scan in the layout that says everything, without the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pulseq_files import Written, write_sequence
from scan_edit import Result, Scan, assert_close
from whorl.scan.failure import ScanError
from whorl.scan.readout import Flag
from whorl.simulation.parameters import PULSEQ, Layout
from whorl.simulation.scan import simulate
from whorl.simulation.truth import Truth, read_truth

N, N_NOISE, N_DUMMIES = 120, 3, 6
#: Slowly quadratic, so that signals and echoes depend on it.
PHASES = 0.5 * np.arange(N) ** 2 % 360


@dataclass
class Files:
    folder: Path
    sequence: Written

    def scan(self, layout: Layout, sequence: str = "", noise: float = 1e-3) -> Scan:
        """Simulated with the same noise for each layout."""
        path, sequence = self.folder / "scan.h5", sequence or self.sequence.path
        simulate(path, phantom="nist", coils=4, sequence=sequence, layout=layout, noise=noise)
        return Scan.load(path)

    def truth(self) -> Truth:
        return read_truth(self.folder / "scan.h5")

    def write(self, name: str, **change: object) -> str:
        """The same sequence but for a change."""
        return write(self.folder / name, **change).path


def write(path: Path, **change: object) -> Written:
    same: dict[str, object] = {"n_pulses": N, "n_arms": 24, "n_noise": N_NOISE, "phases_deg": PHASES}
    same |= {"readout_s": 4e-3, "turns": 8.0}
    return write_sequence(path, **{**same, **change})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("pulseq")
    return Files(folder, write(folder / "a.seq"))


@pytest.fixture(scope="module")
def told(files: Files) -> Scan:
    return files.scan(Layout())


@pytest.fixture(scope="module")
def reference(told: Scan) -> Result:
    result = told.copy().run()
    assert result.outcome.exit_code == 0
    return result


def test_maps_of_a_sequence_are_near_the_truth(files: Files, reference: Result) -> None:
    scan = files.scan(PULSEQ)
    result, truth = scan.run(sequence=files.sequence.path), files.truth()
    assert result.outcome.exit_code == 0
    for role, true in (("T1", truth.t1_ms), ("T2", truth.t2_ms)):
        found = result.physical(role)
        assert found.shape == (64, 64)
        spheres = [truth.labels[0] == n for n in range(1, 15)]
        errors = np.array([np.median(found[inside]) / true[0][inside].mean() - 1 for inside in spheres])
        # Spheres are 3 pixels wide, and the low-rank method leaves some aliasing: it is off by 5 % as a rule.
        # A train, a phase or a trajectory that is wrong costs much more.
        assert np.median(np.abs(errors)) < 0.1
        assert np.abs(errors).max() < 0.4


LAYOUTS = {
    "noise-not-flagged": (PULSEQ, {}),
    "noise-flagged": (Layout(attached=False, told=False), {}),
    "by-arrival": (Layout(attached=False, told=False, numbered=False), {"timepoint": "arrival"}),
    "by-arrival-noise-not-flagged": (
        Layout(attached=False, told=False, numbered=False, noise_flagged=False),
        {"timepoint": "arrival"},
    ),
    "attached": (Layout(told=False), {}),
}


@pytest.mark.parametrize(("layout", "properties"), LAYOUTS.values(), ids=LAYOUTS)
def test_each_layout_gives_the_maps_of_the_scan_that_says_everything(
    files: Files, reference: Result, layout: Layout, properties: dict[str, str]
) -> None:
    result = files.scan(layout).run(sequence=files.sequence.path, **properties)
    assert result.outcome.exit_code == 0
    assert f"{N_NOISE} noise readouts" in result.said
    assert_close(result, reference)


def without_dummies(scan: Scan) -> Scan:
    """As if the first pulses had no ADC; what is left is counted anew."""
    n_noise = len(scan.heads) - N
    scan.without(n_noise + np.arange(N_DUMMIES))
    return scan


@pytest.mark.parametrize("flagged", [True, False], ids=["noise-flagged", "noise-not-flagged"])
def test_dummy_pulses_count_in_the_train_but_not_in_the_data(files: Files, told: Scan, flagged: bool) -> None:
    path = files.write("dummies.seq", dummies=N_DUMMIES)
    scan = without_dummies(files.scan(Layout(attached=False, told=False, noise_flagged=flagged)))
    scan.heads["idx"]["repetition"][N_NOISE:] -= N_DUMMIES
    result = scan.run(sequence=path)
    assert result.outcome.exit_code == 0, result.said
    # The same readouts with their own numbers.
    assert_close(result, without_dummies(told.copy()).run())


def test_readouts_whose_oversampling_was_removed(files: Files, told: Scan) -> None:
    def halved(scan: Scan) -> Scan:
        scan.data = [np.ascontiguousarray(data[:, ::2]) for data in scan.data]
        scan.trajectories = [places[::2] for places in scan.trajectories]
        scan.heads["number_of_samples"] //= 2
        scan.heads["sample_time_us"] *= 2
        return scan

    result = halved(files.scan(PULSEQ)).run(sequence=files.sequence.path)
    assert result.outcome.exit_code == 0
    assert_close(result, halved(told.copy()).run())


def test_a_receiver_that_does_not_follow_the_rf_phase(files: Files) -> None:
    path = files.write("still.seq", receiver_follows=False, receiver_offset_deg=20.0)
    # The noise is not turned with the data, and moves a map by itself: here there is next to none.
    still, follows = files.scan(PULSEQ, path, 1e-5), files.scan(PULSEQ, noise=1e-5)
    turns = [np.angle(np.vdot(a, b)) for a, b in zip(still.data[3:], follows.data[3:], strict=True)]
    apart = np.exp(1j * (np.array(turns) + np.deg2rad(PHASES - 20)))
    assert np.abs(apart - 1).max() < 1e-2  # the noise
    result = still.run(sequence=path)
    assert result.outcome.exit_code == 0
    assert_close(result, follows.run(sequence=files.sequence.path))


def test_counters_that_run_through_two_slices(files: Files, reference: Result) -> None:
    path = files.write("two.seq", slices=2)
    scan = files.scan(PULSEQ).take(np.r_[np.arange(N_NOISE + N), N_NOISE + np.arange(N)])
    scan.heads["flags"] &= ~np.uint64(Flag.LAST_IN_SLICE | Flag.LAST_IN_MEASUREMENT)
    scan.heads["idx"]["slice"][N_NOISE + N :] = 1
    scan.limit("slice", 1)
    for restarts in (True, False):
        again = scan.copy()
        if not restarts:
            again.heads["idx"]["repetition"][N_NOISE + N :] += N
        result = again.run(sequence=path)
        assert result.outcome.exit_code == 0, result.said
        for number in (0, 1):
            assert_close(result, reference, slice_number=number)


def test_readouts_longer_than_the_adc_are_refused(files: Files) -> None:
    scan = files.scan(PULSEQ)
    n_samples = scan.data[0].shape[1]
    scan.data = [np.pad(data, ((0, 0), (0, 9))) for data in scan.data]
    scan.trajectories = [np.zeros((n_samples + 9, 0), np.float32)] * len(scan.data)
    scan.heads["number_of_samples"] += 9
    with pytest.raises(ScanError, match=f"samples of 5 µs, the readouts have {n_samples + 9}"):
        scan.run(sequence=files.sequence.path)


def test_without_a_counter_the_order_counts_only_if_it_is_told_to(files: Files) -> None:
    scan = files.scan(Layout(attached=False, told=False, numbered=False))
    with pytest.raises(ScanError, match="no counter numbers the timepoints"):
        scan.run(sequence=files.sequence.path)


def test_a_scan_without_its_noise(files: Files, reference: Result) -> None:
    result = files.scan(PULSEQ).without(np.arange(N_NOISE)).run(sequence=files.sequence.path)
    assert "not whitened" in result.said
    assert_close(result, reference, share=0.9)


def test_contradictions_are_said_with_both_values(files: Files) -> None:
    scan = files.scan(PULSEQ)
    scan.space("encodedSpace", (64, 64), (310, 310)).header_list("TI", [33.0])
    result = scan.run(sequence=files.sequence.path, trajectory_units="1/m")
    assert "is 300 mm in the Pulseq file and 310 mm in the header" in result.said
    assert "in the Pulseq file and 33 ms in the header: that of the file counts" in result.said


def test_a_trajectory_property_replaces_what_is_attached(files: Files, reference: Result) -> None:
    scan = files.scan(Layout(told=False)).trajectory(lambda k: k[:, ::-1])
    path = files.sequence.path
    assert_close(scan.run(sequence=path, trajectory=path), reference)
