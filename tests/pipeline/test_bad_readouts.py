"""One bad readout costs itself, never its slice nor another; most of them bad is what stops a scan."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import ismrmrd
import numpy as np
import pytest

import whorl.pipeline.collecting
import whorl.pipeline.parts
from scan_edit import QUANTITIES, Result, Scan, assert_close
from whorl.config import Settings
from whorl.kspace.coils import NoiseStatistics
from whorl.pipeline.scan import find_protocol, reconstruct_scan
from whorl.scan.failure import ScanError
from whorl.scan.integrity import Tally, usable
from whorl.scan.readout import Readout

#: Share of pixels within two atoms if one of 120 readouts is missing: its interleaf aliases.
LOST_ONE = 0.7


def partition(scan: Scan, n: int) -> None:
    scan.heads["idx"]["kspace_encode_step_2"][n] = 4


def stray(scan: Scan, n: int) -> None:
    scan.heads["idx"]["slice"][n] = 777


def not_finite(scan: Scan, n: int) -> None:
    scan.data[n][1, 7] = np.nan


def short(scan: Scan, n: int) -> None:
    scan.data[n], scan.trajectories[n] = scan.data[n][:, :-9], scan.trajectories[n][:-9]


def spike(scan: Scan, n: int) -> None:
    scan.data[n][1, 3] *= 100


def whole(scan: Scan, n: int) -> None:
    scan.data[n] *= 1000


def zeros(scan: Scan, n: int) -> None:
    scan.data[n][:] = 0


def copied(scan: Scan, n: int) -> None:
    """Of another readout that came before, or comes next."""
    scan.data[n] = scan.data[n - 1 if n > scan.imaging[0] else n + 1].copy()


def no_coils(scan: Scan, n: int) -> None:
    scan.data[n] = scan.data[n][:0]


def no_samples(scan: Scan, n: int) -> None:
    scan.data[n], scan.trajectories[n] = scan.data[n][:, :0], scan.trajectories[n][:0]


def no_trajectory(scan: Scan, n: int) -> None:
    scan.trajectories[n] = scan.trajectories[n][:, :0]


def outside(scan: Scan, n: int) -> None:
    """Beyond the train by each of the counters that could number it."""
    scan.heads["user_int"][n, 0] = 60_000
    for counter in ("repetition", "contrast", "set"):
        scan.heads["idx"][counter][n] = 60_000


#: What is done to one readout, and what is said about it.
DAMAGE: dict[str, tuple[Callable[[Scan, int], None], str]] = {
    "partition": (partition, "with a partition number (kspace_encode_step_2)"),
    "slice number": (stray, "of a slice that the header does not announce"),
    "not finite": (not_finite, "with values that are not finite"),
    "spike": (spike, "with spikes"),
    "too strong": (whole, "with spikes"),
    "zeros": (zeros, "with nothing but zeros"),
    "copied": (copied, "with the data of another timepoint"),
    "length": (short, "of the wrong size"),
    "no coils": (no_coils, "of the wrong size"),
    "no samples": (no_samples, "of the wrong size"),
    "no trajectory": (no_trajectory, "of the wrong size"),
    "timepoint": (outside, "with a timepoint outside the train"),
}
EACH_DAMAGE = pytest.mark.parametrize("damage", DAMAGE)


def assert_one_lost(result: Result, untouched: Result, n_slices: int, bad: int, why: str) -> None:
    """All slices are there; the bad one says what it lacks and why, the others are as they were."""
    outcome = result.outcome
    assert (outcome.failures, outcome.exit_code) == ((), 3)
    assert result.slices() == list(range(n_slices))
    assert any(note.startswith(f"1 readout {why}") for note in outcome.notes)
    for number in range(n_slices):
        for role in QUANTITIES:
            meta = result.of(role, number).meta
            if number == bad:
                assert meta["whorl_status"] == "degraded"
                assert meta["whorl_notes"] == f"1 of 120 readouts are missing: 1 {why}"
                assert meta["whorl_notes"] in meta["ImageComments"]
            else:
                assert (meta["whorl_status"], meta["whorl_notes"] or "") == ("complete", "")
        if number == bad:
            assert_close(result, untouched, slice_number=number, share=LOST_ONE, relative=0.11)
        else:
            assert_close(result, untouched, slice_number=number)


@EACH_DAMAGE
@pytest.mark.parametrize("place", [0, 57, 119], ids=["first", "middle", "last"])
def test_one_bad_readout_of_the_only_slice(scan: Scan, untouched: Result, damage: str, place: int) -> None:
    damaged, why = DAMAGE[damage]
    damaged(scan.no_user_train(), scan.imaging[place])
    assert_one_lost(scan.run(), untouched, 1, 0, why)


@EACH_DAMAGE
def test_one_bad_readout_of_a_train_that_only_the_readouts_tell(
    scan: Scan, untouched: Result, damage: str
) -> None:
    damaged, why = DAMAGE[damage]
    damaged(scan.no_header_train(), scan.imaging[57])
    result = scan.run()
    assert result.slices() == [0]
    assert f"1 of 120 readouts are missing: 1 {why}" in result.of("T1").meta["whorl_notes"]
    if damage not in ("spike", "too strong", "zeros", "copied"):  # their headers are believed
        assert "1 missing timepoints interpolated" in result.of("T1").meta["whorl_notes"]
    assert_close(result, untouched, share=LOST_ONE, relative=0.11)


@EACH_DAMAGE
@pytest.mark.parametrize("bad", [0, 1])
def test_one_bad_readout_does_not_cost_another_slice(
    scan: Scan, untouched: Result, damage: str, bad: int
) -> None:
    damaged, why = DAMAGE[damage]
    scan.slices(3)
    damaged(scan, scan.imaging[120 * bad + 40])
    assert_one_lost(scan.run(), untouched, 3, bad, why)


@EACH_DAMAGE
def test_a_slice_with_a_bad_readout_does_not_wait_for_the_end(scan: Scan, damage: str) -> None:
    """When the third slice is under way, the first is out."""
    scan.slices(3)
    DAMAGE[damage][0](scan, scan.imaging[40])
    images: list[ismrmrd.Image] = []
    early: list[int] = []

    def waiting() -> Iterator[Readout]:
        for n, readout in enumerate(scan.readouts()):
            if n == scan.imaging[0] + 260:
                until = time.monotonic() + 20
                while len(images) < 4 and time.monotonic() < until:
                    time.sleep(0.01)
                early.append(len(images))
            yield readout

    reconstruct_scan(scan.header, waiting(), Settings.from_properties(scan.settings), images.append)
    assert early[0] >= 4
    assert images[0].slice == 0


# --- Slice numbers ----------------------------------------------------------------------------------------


def test_a_slice_that_is_complete_is_made_whatever_the_header_announces(
    scan: Scan, untouched: Result
) -> None:
    result = scan.slices(2).limit("slice", 0).run()
    assert result.slices() == [0, 1]
    assert result.outcome.exit_code == 0
    assert_close(result, untouched, slice_number=1)


def test_without_a_limit_a_slice_that_is_too_short_fails(scan: Scan) -> None:
    stray(scan, scan.imaging[40])
    result = scan.limit("slice", None).run()
    assert result.slices() == [0]
    (failure,) = result.outcome.failures
    assert failure.startswith("slice 777 failed: 1 of 120 timepoints arrived")


def test_the_only_slice_fails_whatever_its_number(scan: Scan) -> None:
    scan.heads["idx"]["slice"][scan.imaging] = 5
    with pytest.raises(ScanError, match="60 of 120 timepoints arrived"):
        scan.without(scan.imaging[60:]).run()


def test_a_readout_with_the_number_of_another_slice(scan: Scan, untouched: Result) -> None:
    """It is that slice's then, which says so where its own comes too; no slice waits for the end."""
    scan.slices(3)
    n = scan.imaging[40]
    scan.heads["idx"]["slice"][n] = 2
    result = scan.run()
    assert result.slices() == [0, 1, 2]
    assert result.outcome.exit_code == 3
    assert result.of("T1", 0).meta["whorl_notes"] == "1 of 120 readouts are missing"
    assert (
        "1 came again with other data" in result.of("T1", 2).meta["whorl_notes"]
        or "came twice" in result.said
    )
    assert result.of("T1", 1).meta["whorl_status"] == "complete"
    assert [int(image.slice) for image in result.images] == [0] * 4 + [1] * 4 + [2] * 4
    assert_close(result, untouched, slice_number=1)


def test_garbage_in_the_slice_number_does_not_open_slices_without_end(
    scan: Scan, untouched: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whorl.pipeline.parts, "_MOST_OPEN", 8)
    extra = scan.imaging[:20]
    scan.take(np.insert(np.arange(len(scan.heads)), extra + 30, extra))
    places = extra + 30 + np.arange(20)
    scan.heads["idx"]["slice"][places] = 100 + np.arange(20)
    real = whorl.pipeline.collecting.SliceBuffer
    opened: list[object] = []

    def count(*arguments: object, **named: object) -> object:
        opened.append(1)
        return real(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(whorl.pipeline.collecting, "SliceBuffer", count)
    result = scan.run()
    assert len(opened) == 8
    assert result.slices() == [0]
    assert "13 readouts beyond 8 slices that were open at once were dropped" in result.said
    assert "7 readouts of a slice that the header does not announce were dropped" in result.said
    assert_close(result, untouched)


def test_the_train_is_told_by_the_fullest_slice(scan: Scan) -> None:
    stray(scan, scan.imaging[0])
    found = find_protocol(scan.header, scan.readouts(), Settings.from_properties({}))
    assert (found.train.n_timepoints, found.counter) == (120, "user_int")


# --- Counters ---------------------------------------------------------------------------------------------


def test_a_counter_that_goes_on_beyond_the_train_is_not_damaged(scan: Scan) -> None:
    """One value outside looks the same in a counter that begins at 1, and would shift the train."""
    scan.no_user_train()
    scan.heads["user_int"][:, 0] = 0
    for start in (1, -1):
        shifted = scan.copy()
        shifted.heads["idx"]["repetition"] = 0
        shifted.heads["user_int"][scan.imaging, 0] = np.arange(120) + start
        with pytest.raises(ScanError, match="no counter numbers the timepoints"):
            shifted.run()


def test_outliers_of_many_slices_are_not_another_train(scan: Scan) -> None:
    """One in each of 16 slices is more than a tenth of a train, and not a hundredth of the readouts."""
    scan.slices(16)
    for number in range(16):
        outside(scan, scan.imaging[120 * number + 30])
    result = scan.run(n_coefficients=2)
    assert result.slices() == list(range(16))


# --- Most of them -----------------------------------------------------------------------------------------

SENTENCES = {
    "partition": "number partitions",
    "no coils": "have no coils",
    "no samples": "have no samples left",
    "no trajectory": "carry no trajectory",
}


@pytest.mark.parametrize("damage", SENTENCES)
@pytest.mark.parametrize("n_good", [0, 5])
def test_what_most_readouts_are_stops_the_scan(scan: Scan, damage: str, n_good: int) -> None:
    for n in scan.imaging[n_good:]:
        DAMAGE[damage][0](scan, n)
    with pytest.raises(ScanError, match=f"^the readouts {SENTENCES[damage]}"):
        scan.run()


@pytest.mark.parametrize("damage", ["no coils", "no trajectory", "length", "not finite", "partition"])
def test_a_slice_that_is_mostly_bad_says_why_it_fails(scan: Scan, untouched: Result, damage: str) -> None:
    damaged, why = DAMAGE[damage]
    scan.slices(2)
    for n in scan.imaging[160:]:
        damaged(scan, n)
    result = scan.run()
    assert result.slices() == [0]
    assert_close(result, untouched)
    assert result.outcome.failures == (
        f"slice 1 failed: 40 of 120 timepoints arrived, expected at least 90%: 80 {why}",
    )


def test_partitions_are_taken_for_a_3d_scan_only_if_they_are_many(scan: Scan) -> None:
    readouts = [*scan.without_noise().readouts()]
    for n in range(0, 120, 3):
        partition(scan, n)
    tally = Tally()
    assert len(list(usable(scan.readouts(), tally))) == 80
    assert tally.by_slice == {0: {"with a partition number (kspace_encode_step_2) were dropped": 40}}
    for n in range(1, 120, 3):
        partition(scan, n)
    with pytest.raises(ScanError, match="only 2D scans"):
        list(usable(iter(readouts), Tally()))
    # One partition after the other: the first looks like a 2D scan.
    scan.heads["idx"]["kspace_encode_step_2"] = np.arange(120) // 40
    passed: list[Readout] = []
    with pytest.raises(ScanError, match="only 2D scans"):
        passed.extend(usable(scan.readouts(), Tally()))
    assert len(passed) == 40


# --- Noise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_coils", [0, 3, 900])
def test_noise_with_another_number_of_coils(scan: Scan, n_coils: int) -> None:
    scan.data[1] = np.ones((n_coils, scan.data[1].shape[1]), np.complex64)
    result = scan.run()
    assert result.slices() == [0]
    assert "4 coils whitened by 3 noise readouts" in result.said
    assert "1 readout of noise, which have not the 4 coils of the image data, were dropped" in result.said
    assert result.outcome.exit_code == 3
    assert_close(result, scan.copy().without([1]).run(), share=0.999)


def test_noise_of_many_numbers_of_coils_is_not_kept(scan: Scan) -> None:
    order = np.concatenate([np.arange(4), np.zeros(9, int), np.arange(4, len(scan.heads))])
    scan.take(order)
    for n in range(4, 13):
        scan.data[n] = np.ones((20 + n, 10), np.complex64)
    result = scan.run()
    assert "4 coils whitened by 4 noise readouts" in result.said
    assert "9 readouts of noise" in result.said
    statistics = NoiseStatistics()
    for n_coils in range(1, 10):
        statistics.add(np.ones((n_coils, 50), np.complex64), 2.0)
    assert [statistics.n_usable(n_coils) for n_coils in range(1, 10)] == [1] * 4 + [0] * 5
