"""Scans that are incomplete, damaged or disordered: what is delivered, and what is said about it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import ismrmrd
import numpy as np
import pytest

from scan_edit import QUANTITIES, Result, Scan, assert_close
from whorl.config import Settings
from whorl.pipeline.scan import reconstruct_scan
from whorl.scan.failure import EndOfStream, ScanError
from whorl.scan.readout import Flag, Readout

#: Share of pixels that stay within two atoms of the dictionary if one of 120 readouts is missing: its
#: interleaf has been visited four times instead of five, which aliases.
LOST_ONE = 0.7


def assert_degraded(result: Result, *texts: str) -> None:
    assert result.outcome.exit_code == 3
    for role in QUANTITIES:
        meta = result.of(role).meta
        assert meta["whorl_status"] == "degraded"
        for text in texts:
            assert text in str(meta["whorl_notes"])


# --- Damaged readouts -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["data", "trajectory"])
def test_a_readout_that_is_not_finite_is_dropped(
    scan: Scan, untouched: Result, value: float, where: str
) -> None:
    place = scan.imaging[40]
    (scan.data if where == "data" else scan.trajectories)[place][1, 1] = value
    result = scan.run()
    assert_degraded(result, "1 of 120 readouts are missing")
    assert "1 readout with values that are not finite" in result.said
    assert_close(result, untouched, share=LOST_ONE, relative=0.11)


@pytest.mark.parametrize("place", [0, 3, 119])
@pytest.mark.parametrize("what", ["samples", "coils"])
def test_a_readout_of_another_size_is_dropped_even_if_it_is_the_first(
    scan: Scan, untouched: Result, place: int, what: str
) -> None:
    n = scan.imaging[place]
    if what == "samples":
        scan.data[n], scan.trajectories[n] = scan.data[n][:, :-5], scan.trajectories[n][:-5]
    else:
        scan.data[n] = scan.data[n][:-1]
    result = scan.run()
    assert_degraded(result, "1 of 120 readouts are missing")
    assert "of the wrong size" in result.said
    assert_close(result, untouched, share=LOST_ONE, relative=0.11)


def test_identical_duplicates_are_ignored(scan: Scan, untouched: Result) -> None:
    imaging = scan.imaging
    order = np.insert(np.arange(len(scan.heads)), imaging[[10, 50, 119]] + 1, imaging[[10, 50, 119]])
    result = scan.take(order).run()
    assert result.outcome.exit_code == 0
    # Virtual coils are chosen by the first readouts that arrive, so rounding differs.
    assert_close(result, untouched, share=0.995)


@pytest.mark.parametrize("place", [50, 119])
def test_of_different_duplicates_the_first_counts(scan: Scan, place: int) -> None:
    # With all coils, which do not depend on what arrives.
    reference = scan.copy().run(virtual_coils=4)
    n = scan.imaging[place]
    scan.take(np.insert(np.arange(len(scan.heads)), n + 1, n))
    scan.data[n + 1] = scan.data[n + 1] * np.complex64(2j)
    result = scan.run(virtual_coils=4)
    assert "1 readout came again with other data; the first one counts" in result.said
    assert result.outcome.exit_code == 3
    assert_close(result, reference, share=0.995)


def test_discarded_samples_are_left_out(scan: Scan, untouched: Result) -> None:
    rng = np.random.default_rng(0)
    for n in scan.imaging:
        junk = (1e3 * rng.standard_normal((4, 7))).astype(np.complex64)
        scan.data[n] = np.hstack([junk[:, :3], scan.data[n], junk[:, 3:]])
        scan.trajectories[n] = np.pad(scan.trajectories[n], ((3, 4), (0, 0)), constant_values=0.3)
    scan.heads["discard_pre"][scan.imaging] = 3
    scan.heads["discard_post"][scan.imaging] = 4
    result = scan.run()
    assert result.outcome.exit_code == 0
    assert_close(result, untouched, share=0.999)


def test_one_readout_that_discards_more_than_it_has_is_dropped(scan: Scan) -> None:
    scan.heads["discard_post"][scan.imaging[5]] = 900  # of 884
    result = scan.run()
    assert_degraded(result, "1 of 120 readouts are missing")


@pytest.mark.parametrize(("name", "value"), [("discard_pre", 5000), ("discard_post", 900)])
def test_all_readouts_discard_more_than_they_have(scan: Scan, name: str, value: int) -> None:
    scan.heads[name][scan.imaging] = value  # of 884
    with pytest.raises(ScanError, match="no samples left"):
        scan.run()


@pytest.mark.parametrize("flag", [
    Flag.IS_NAVIGATION_DATA, Flag.IS_PHASECORR_DATA, Flag.IS_DUMMYSCAN_DATA, Flag.IS_RTFEEDBACK_DATA,
], ids=lambda flag: flag.name)  # fmt: skip
def test_readouts_that_are_no_image_data_are_passed_over(scan: Scan, untouched: Result, flag: Flag) -> None:
    imaging = scan.imaging
    extra = imaging[[0, 30, 31]]
    scan.take(np.insert(np.arange(len(scan.heads)), extra, extra))
    for n in extra + np.arange(3):
        scan.flag(n, flag)
        scan.data[n] = np.full((2, 5), np.nan, np.complex64)
        scan.trajectories[n] = np.zeros((5, 0), np.float32)
    result = scan.run()
    assert result.outcome == untouched.outcome
    np.testing.assert_array_equal(result.of("T1").data, untouched.of("T1").data)


# --- Lost readouts ------------------------------------------------------------------------------------


def test_five_percent_lost(scan: Scan, untouched: Result) -> None:
    lost = np.random.default_rng(3).choice(scan.imaging, 6, replace=False)
    result = scan.without(lost).run()
    assert_degraded(result, "6 of 120 readouts are missing")
    inside = (result.physical("T1") > 0) & (untouched.physical("T1") > 0)
    ratio = result.physical("T1")[inside] / untouched.physical("T1")[inside]
    # Maps, if with more aliasing: 5 % of the data are 5 % of the coverage.
    assert np.median(np.abs(ratio - 1)) < 0.15


@pytest.mark.parametrize("bad", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("flags", [True, False], ids=["flags", "no-flags"])
def test_a_slice_with_too_few_readouts_does_not_cost_the_other(
    scan: Scan, untouched: Result, bad: int, flags: bool
) -> None:
    imaging = scan.two_slices().imaging
    if not flags:
        scan.no_flags()
    result = scan.without(imaging[120 * bad + np.arange(5, 29)]).run()
    good = 1 - bad
    assert result.slices() == [good]
    assert_close(result, untouched, slice_number=good)
    assert result.of("T1", good).meta["whorl_status"] == "complete"
    assert result.outcome.failures == (
        f"slice {bad} failed: 96 of 120 timepoints arrived, expected at least 90%",
    )
    assert result.outcome.exit_code == 3


def test_only_the_slice_with_losses_is_degraded(scan: Scan) -> None:
    result = scan.two_slices().without(scan.imaging[[30, 31]]).run()
    assert [result.of("T1", n).meta["whorl_status"] for n in (0, 1)] == ["degraded", "complete"]
    assert not result.of("T1", 1).meta["whorl_notes"]


def test_min_readouts_decides(scan: Scan) -> None:
    lost = scan.imaging[20:50]
    assert scan.copy().without(lost).run(min_readouts=0.7).slices() == [0]
    two = scan.copy().two_slices()
    strict = two.without(two.imaging[[20, 21, 22]]).run(min_readouts=0.98)
    assert strict.slices() == [1]


def test_a_slice_that_was_announced_and_did_not_arrive(scan: Scan) -> None:
    result = scan.limit("slice", 2).run()
    assert result.slices() == [0]
    assert result.outcome.exit_code == 3
    assert "1, 2 did not arrive" in "\n".join(result.outcome.failures)


# --- Ends ---------------------------------------------------------------------------------------------


def breaking_off(scan: Scan, after: int) -> Iterator[Readout]:
    for n, readout in enumerate(scan.readouts()):
        if n == after:
            raise EndOfStream("connection lost in an acquisition")
        yield readout


def test_the_stream_ends_in_the_second_slice(scan: Scan, untouched: Result) -> None:
    scan.two_slices()
    result = scan.run(breaking_off(scan, 4 + 180))
    assert result.slices() == [0]
    assert_close(result, untouched)
    assert result.outcome.exit_code == 3
    assert any("60 of 120 timepoints" in text for text in result.outcome.failures)
    assert any("ended early: connection lost" in text for text in result.outcome.failures)


def test_the_stream_ends_after_everything_came(scan: Scan) -> None:
    result = scan.run(breaking_off(scan.copy().take([*range(124), 0]), 124))
    assert result.slices() == [0]
    assert result.outcome.exit_code == 3
    assert any("ended early" in text for text in result.outcome.failures)


@pytest.mark.parametrize("after", [0, 3, 4, 10])
def test_the_stream_ends_before_there_is_a_slice(scan: Scan, after: int) -> None:
    with pytest.raises(ScanError, match="ended early: connection lost"):
        scan.run(breaking_off(scan, after))


def test_no_imaging_readouts(scan: Scan) -> None:
    with pytest.raises(ScanError, match=r"no imaging readouts arrived \(4 noise readouts did\)"):
        scan.take(np.arange(4)).run()
    with pytest.raises(ScanError, match="no imaging readouts arrived"):
        scan.take([]).run()


def test_every_readout_is_broken(scan: Scan) -> None:
    for n in scan.imaging:
        scan.data[n][0, 0] = np.nan
    with pytest.raises(ScanError, match="120 readouts with values that are not finite"):
        scan.run()


@pytest.mark.parametrize("unit", [1e-38, 1e-16, 1e16, 1e30], ids="{:g}".format)
def test_a_unit_that_cannot_be_computed_with(scan: Scan, unit: float) -> None:
    largest = max(float(np.abs(scan.data[n]).max()) for n in scan.imaging)
    for n in range(len(scan.data)):
        scan.data[n] = (scan.data[n] * (unit / largest)).astype(np.complex64)
    with pytest.raises(ScanError, match=r"expected more than 1e-15 and less than 1e\+15, got") as error:
        scan.run()
    assert "Scale data and noise" in str(error.value)


@pytest.mark.parametrize("unit", [1e-38, 1e-20], ids="{:g}".format)
def test_noise_readouts_in_another_unit(scan: Scan, unit: float) -> None:
    for n in np.setdiff1d(np.arange(len(scan.data)), scan.imaging):
        scan.data[n] = (scan.data[n] * unit).astype(np.complex64)
    with pytest.raises(ScanError, match=r"as large as the noise .*expected less than 1e\+15 times"):
        scan.run()


@pytest.mark.parametrize("unit", [1e-13, 1e14], ids="{:g}".format)
def test_a_unit_that_can(scan: Scan, untouched: Result, unit: float) -> None:
    largest = max(float(np.abs(scan.data[n]).max()) for n in scan.imaging)
    for n in range(len(scan.data)):
        scan.data[n] = (scan.data[n] * (unit / largest)).astype(np.complex64)
    assert_close(scan.run(), untouched)


def test_no_trajectory(scan: Scan) -> None:
    with pytest.raises(ScanError, match="no trajectory"):
        scan.trajectory(lambda k: k[:, :0]).run()


def test_partitions(scan: Scan) -> None:
    scan.heads["idx"]["kspace_encode_step_2"][scan.imaging[60:]] = 1
    with pytest.raises(ScanError, match=r"partitions \(kspace_encode_step_2\): only 2D"):
        scan.run()


# --- Slices without signal ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zeros", "noise"])
@pytest.mark.parametrize("method", ["lowrank", "inr"])
def test_a_slice_without_signal_is_sent_as_zeros(
    scan: Scan, untouched: Result, kind: str, method: str
) -> None:
    imaging = scan.two_slices().imaging
    rng = np.random.default_rng(4)
    for n in imaging[:120]:
        shape = scan.data[n].shape
        noise = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
        scan.data[n] = (noise * (kind == "noise")).astype(np.complex64)
    result = scan.run(method=method)
    assert result.slices() == [0, 1]
    assert result.outcome.exit_code == 3
    for role in QUANTITIES:
        image = result.of(role, 0)
        assert not image.data.any()
        assert image.meta["whorl_status"] == "degraded"
        assert "no signal" in str(image.meta["whorl_notes"])
    assert result.of("T1", 1).meta["whorl_status"] == "complete"
    # The scale of M0 is that of the slice with signal.
    assert (
        result.of("M0", 1).meta["RescaleSlope"] == untouched.of("M0").meta["RescaleSlope"] or method == "inr"
    )


# --- Order and flags ----------------------------------------------------------------------------------


@pytest.fixture
def two(scan: Scan) -> Scan:
    return scan.two_slices()


def rearranged(scan: Scan, order: np.ndarray) -> Scan:
    """Noise first, then the imaging readouts in this order."""
    return scan.take(np.concatenate([np.arange(len(scan.heads) - len(scan.imaging)), scan.imaging[order]]))


ORDERS = {
    "alternating": np.arange(240).reshape(2, 120).T.ravel(),
    "blocks": np.arange(240).reshape(2, 10, 12).swapaxes(0, 1).ravel(),
    "shuffled": np.random.default_rng(5).permutation(240),
    "backwards": np.arange(240)[::-1],
    # The first slice has 93 % when it is left for the second time: it is not over.
    "ragged": np.concatenate(
        [np.arange(60), 120 + np.arange(9), np.arange(60, 112), 129 + np.arange(111), np.arange(112, 120)]
    ),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("flags", ["right", "none", "each", "once-early"])
@pytest.mark.parametrize("source", ["header", "user_int"])
def test_slices_in_any_order(two: Scan, untouched: Result, order: str, flags: str, source: str) -> None:
    if flags == "none":
        two.no_flags()
    if source == "user_int":
        two.no_header_train()
    else:
        two.no_user_train()
    rearranged(two, ORDERS[order])
    if flags == "each":
        two.flag(two.imaging, Flag.LAST_IN_SLICE)
    elif flags == "once-early":
        two.no_flags().flag(two.imaging[11], Flag.LAST_IN_SLICE)
    result = two.run()
    assert result.outcome.exit_code == 0, result.said
    assert result.slices() == [0, 1]
    for n in (0, 1):
        # Virtual coils are chosen by the first readouts of a slice, so the maps are not identical.
        assert_close(result, untouched, slice_number=n, share=0.9)


@pytest.mark.parametrize("place", [0, 1, 60, 110])
@pytest.mark.parametrize("announced", [True, False], ids=["announced", "not-announced"])
@pytest.mark.parametrize("source", ["header", "user_int"])
def test_last_in_slice_too_early(
    two: Scan, untouched: Result, place: int, announced: bool, source: str
) -> None:
    two.flag(two.imaging[[place, place + 120]], Flag.LAST_IN_SLICE)
    if not announced:
        two.limit("repetition", None)
    if source == "user_int":
        two.no_header_train()
    result = two.run()
    assert result.outcome.exit_code == 0, result.said
    assert result.slices() == [0, 1]
    assert_close(result, untouched, slice_number=1)


def test_a_slice_is_made_while_the_next_one_arrives(two: Scan) -> None:
    # In the middle of the second slice the first one comes out, with and without a loss.
    for lost in ([], [two.imaging[7]]):
        scan = two.copy().without(lost)
        images: list[ismrmrd.Image] = []
        early: list[int] = []

        def waiting(scan: Scan = scan, images: list = images, early: list = early) -> Iterator[Readout]:
            for n, readout in enumerate(scan.readouts()):
                if n == 4 + 180:
                    until = time.monotonic() + 20
                    while len(images) < 4 and time.monotonic() < until:
                        time.sleep(0.01)
                    early.append(len(images))
                yield readout

        settings = Settings.from_properties({"method": "lowrank"})
        reconstruct_scan(scan.header, waiting(), settings, images.append)
        assert early == [4]


# --- Noise readouts -----------------------------------------------------------------------------------


def test_without_noise_readouts_nothing_is_whitened(scan: Scan, untouched: Result) -> None:
    without = scan.copy().without_noise().run()
    off = scan.copy().run(whiten="off")
    for result in (without, off):
        assert result.outcome.exit_code == 0
        assert "whitened by" not in result.said
    np.testing.assert_array_equal(without.of("T1").data, off.of("T1").data)
    assert "4 coils whitened by 4 noise readouts" in untouched.said
    # Whitening scales the data to unit noise, so M0 shows whether it happened.
    assert off.of("M0").meta["RescaleSlope"] != untouched.of("M0").meta["RescaleSlope"]


def test_too_few_noise_samples(scan: Scan) -> None:
    for n in range(4):
        scan.data[n] = scan.data[n][:, :3]
    result = scan.run()
    assert_degraded(result, "12 usable samples for 4 coils: not whitened")


def test_a_noise_readout_that_is_not_finite_is_dropped(scan: Scan) -> None:
    scan.data[1][0, 0] = np.nan
    result = scan.run()
    assert "4 coils whitened by 3 noise readouts" in result.said
    assert result.outcome.exit_code == 3
    assert "not finite" in result.said


@pytest.mark.parametrize("case", ["dead", "copy"])
def test_a_dead_coil_or_a_copy_is_dropped_and_said(scan: Scan, case: str) -> None:
    without = scan.copy()
    for n in range(len(scan.heads)):
        scan.data[n][2] = 0 if case == "dead" else 2j * scan.data[n][0]
        without.data[n] = np.delete(without.data[n], 2, axis=0)
    without.heads["active_channels"] = 3
    result, expected = scan.run(), without.run()
    assert_degraded(result, "of 4 coils, 2 (counted from 0) was dropped")
    assert "4 coils whitened by 4 noise readouts" in result.said
    # As if that coil had not been there, but for rounding.
    assert_close(result, expected, share=0.999)


def test_all_coils_dead(scan: Scan) -> None:
    for n in range(4):
        scan.data[n][:] = 0
    assert_degraded(scan.run(), "noise of 4 coils has variances of 0 to 0", "not whitened")


def m0_slope(result: Result) -> float:
    return float(result.of("M0").meta["RescaleSlope"])


def test_whitening_knows_the_bandwidth_of_noise_and_data(scan: Scan, untouched: Result) -> None:
    # In units of the noise the data double where the noise has a fourth of its variance.
    slope = m0_slope(untouched)
    noise = np.arange(4)
    scan.heads["sample_time_us"][noise] /= 4
    dwell_us = float(scan.heads["sample_time_us"][-1])
    faster = scan.copy().run()
    assert m0_slope(faster) == pytest.approx(2 * slope, rel=1e-3)
    assert f"noise of {dwell_us / 4:g} µs scaled to {dwell_us:g} µs, relative bandwidth 1" in faster.said
    narrow = scan.copy().run(noise_bandwidth=0.64)
    assert m0_slope(narrow) == pytest.approx(2 * 0.8 * slope, rel=1e-3)
    told = scan.copy()
    told.header = told.header.replace(b"Bandwidth>1.0<", b"Bandwidth>0.64<")
    assert m0_slope(told.run()) == pytest.approx(2 * 0.8 * slope, rel=1e-3)
    scan.heads["sample_time_us"][noise] = 0
    unknown = scan.run()
    assert m0_slope(unknown) == pytest.approx(slope, rel=1e-3)
    assert "noise not scaled" in unknown.said


@pytest.mark.parametrize("scale", [1e-7, 1e5], ids="{:g}".format)
def test_the_unit_of_the_data_does_not_matter(scan: Scan, scale: float) -> None:
    as_is = scan.copy().run(whiten="off")
    for n in scan.imaging:
        scan.data[n] *= np.float32(scale)
    scaled = scan.run(whiten="off")
    assert_close(scaled, as_is, share=0.999)
    # M0 moves with T1 where rounding picks the next atom; its series has a scale of its own.
    np.testing.assert_allclose(scaled.of("M0").data, as_is.of("M0").data.astype(float), rtol=0.02, atol=2)
