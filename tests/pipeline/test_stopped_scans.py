"""What is said and what is kept where a scan, a slice or a fit comes to grief on the way."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from scan_edit import Result, Scan, assert_close
from whorl.scan.failure import ScanError
from whorl.scan.readout import Readout


@pytest.mark.parametrize("cause", ["partition", "file"])
def test_what_stops_a_scan_does_not_cost_what_is_ready(scan: Scan, untouched: Result, cause: str) -> None:
    scan.two_slices()
    why = {"partition": "kspace_encode_step_2", "file": "readout 154 of scan.h5 cannot be read"}[cause]
    if cause == "partition":
        scan.heads["idx"]["kspace_encode_step_2"][scan.imaging[150:]] = 1

    def source() -> Iterator[Readout]:
        for n, readout in enumerate(scan.readouts()):
            if cause == "file" and n == 154:
                raise ScanError(why)
            yield readout

    result = scan.run(source())
    assert result.slices() == [0]
    assert_close(result, untouched)
    assert result.outcome.exit_code == 3
    assert any(why in failure for failure in result.outcome.failures)
    assert any("slice 1 failed" in failure for failure in result.outcome.failures)


def test_a_file_that_breaks_off_late_is_delivered(scan: Scan, untouched: Result) -> None:
    """With 95 % of its readouts a slice is made, whatever ended them."""

    def source() -> Iterator[Readout]:
        for n, readout in enumerate(scan.readouts()):
            if n == 4 + 114:
                raise ScanError("readout 118 cannot be read")
            yield readout

    result = scan.run(source())
    assert result.slices() == [0]
    # Other aliasing moves the pixels of low-rank maps to other atoms; the object stays.
    ours, theirs = result.physical("T1") > 0, untouched.physical("T1") > 0
    assert (ours & theirs).sum() > 0.95 * theirs.sum()
    assert result.of("T1").meta["whorl_status"] == "degraded"
    assert any("readout 118 cannot be read" in failure for failure in result.outcome.failures)
    assert result.outcome.exit_code == 3


def test_what_stops_a_scan_before_anything_is_ready_is_raised(scan: Scan) -> None:
    scan.heads["idx"]["kspace_encode_step_2"][scan.imaging[20:]] = 1
    with pytest.raises(ScanError, match="only 2D scans"):
        scan.run()


@pytest.mark.parametrize("source", ["header", "user_int"])
def test_too_few_readouts_of_the_only_slice_are_counted(scan: Scan, source: str) -> None:
    """The counters are not at fault, so they are not what the operator reads about."""
    if source == "user_int":
        scan.no_header_train()
    with pytest.raises(ScanError, match="80 of 120 timepoints arrived, expected at least 90%"):
        scan.without(scan.imaging[::3]).run()


def test_a_slice_that_cannot_be_encoded_does_not_cost_the_next(scan: Scan, untouched: Result) -> None:
    """The trajectories of the first slice have no unit."""
    scan.two_slices()
    for n in scan.imaging[:120]:
        scan.trajectories[n] = scan.trajectories[n] * np.float32(0.3)
    result = scan.run()
    assert result.slices() == [1]
    assert_close(result, untouched, slice_number=1)
    assert result.outcome.exit_code == 3
    (failure,) = result.outcome.failures
    assert failure.startswith("slice 0 failed: the unit of the trajectory is not clear")
    assert ("ERR", failure) in result.texts
    assert {image.meta["whorl_status"] for image in result.images} == {"complete"}


def test_a_fit_that_really_diverges(scan: Scan, untouched: Result) -> None:
    result = scan.run(method="inr", fit="adam", iterations=3, learning_rate=1e30)
    assert result.outcome.exit_code == 3
    assert not result.outcome.failures
    for image in result.images:
        assert image.meta["whorl_method"] == "lowrank"
        assert image.meta["whorl_status"] == "fallback"
        assert "low-rank maps instead of the INR" in image.meta["whorl_notes"]
    np.testing.assert_array_equal(result.physical("T1"), untouched.physical("T1"))


@pytest.mark.parametrize(
    ("name", "value", "role"),
    [("t1_min_ms", 400, "T1"), ("t1_max_ms", 900, "T1"), ("t2_min_ms", 60, "T2"), ("t2_max_ms", 90, "T2")],
)
def test_the_maps_keep_within_the_dictionary(scan: Scan, name: str, value: int, role: str) -> None:
    values = scan.run(**{name: value}).physical(role)
    inside = values[values > 0]
    # In steps of 0.1 or 1 ms, both of which hit the ends of these ranges.
    edge = inside.min() if "min" in name else inside.max()
    assert edge == pytest.approx(value)
