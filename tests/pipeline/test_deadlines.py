"""Deadlines of a slice and of a scan: low-rank maps are ready first, and sent when the fit is late."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import ismrmrd
import numpy as np
import pytest

import whorl.pipeline.slices
import whorl.recon.methods
from scan_edit import QUANTITIES, Result, Scan
from whorl.config import Settings
from whorl.pipeline.deadlines import Deadline, DeadlinePassed, in_time
from whorl.pipeline.scan import reconstruct_scan
from whorl.scan.readout import Readout

#: How long a fit hangs: much longer than any deadline here, and than the rest of a scan.
HANGS_S = 120.0
#: Of a scan whose fits hang; within it a busy machine makes low-rank maps many times over.
FAR_LESS_S = 60.0
QUICK = {"method": "inr", "iterations": 8, "levels": 4, "hidden": 24, "correction_steps": 1}


class Hanging(threading.Event):
    """What fits that hang wait for; `ran_out` if one was waited for until it gave up."""

    ran_out = False


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Hanging:
    """Fits of the INR hang, whatever they are told, until the event is set."""
    released = Hanging()

    def hang(*_: object, **__: object) -> None:
        released.ran_out |= not released.wait(HANGS_S)
        raise RuntimeError("released")

    monkeypatch.setattr(whorl.recon.methods, "fit_inr", hang)
    return released


def are_low_rank(result: Result, untouched: Result, slice_number: int = 0) -> None:
    for role in QUANTITIES:
        image = result.of(role, slice_number)
        assert (image.meta["whorl_method"], image.meta["whorl_status"]) == ("lowrank", "fallback")
        assert image.meta["whorl_flags"].split()[0] == "fallback"
        # Or at the last but one step, if the deadline came before the fit.
        said = r"low-rank maps instead of the INR: it was at (.*) when its time was over"
        found = re.search(said, image.meta["whorl_notes"])
        assert found
        assert re.fullmatch(r"its start|correction \d+ of \d+", found[1])
        np.testing.assert_array_equal(image.data, untouched.of(role).data)


@pytest.mark.parametrize("deadline", ["deadline_s", "scan_deadline_s"])
def test_a_fit_that_hangs_gives_low_rank_maps_at_the_deadline(
    scan: Scan, untouched: Result, hanging: Hanging, deadline: str
) -> None:
    result = scan.run(method="inr", **{deadline: 1.0})
    assert not hanging.ran_out
    hanging.set()
    are_low_rank(result, untouched)
    assert result.outcome.exit_code == 3
    assert result.outcome.failures == ()


def test_the_deadline_of_a_scan_is_that_of_all_its_slices(
    scan: Scan, untouched: Result, hanging: Hanging
) -> None:
    result = scan.slices(3).run(method="inr", scan_deadline_s=0.5)
    assert not hanging.ran_out
    hanging.set()
    assert result.slices() == [0, 1, 2]
    for number in range(3):
        for role in QUANTITIES:
            image = result.of(role, number)
            assert image.meta["whorl_method"] == "lowrank"
            if role != "M0":
                np.testing.assert_array_equal(image.data, untouched.of(role).data)


def test_a_deadline_of_a_scan_that_is_kept_changes_nothing(scan: Scan) -> None:
    plain = scan.copy().run(**QUICK)
    result = scan.run(**QUICK, scan_deadline_s=300)
    assert result.outcome.exit_code == 0
    assert result.of("T1").meta["whorl_method"] == "inr"
    for role in QUANTITIES:
        np.testing.assert_array_equal(result.of(role).data, plain.of(role).data)


def test_a_late_fit_costs_the_next_slice_nothing(scan: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = whorl.recon.methods.fit_inr, []

    def hang_once(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            time.sleep(8)
        return real(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(whorl.recon.methods, "fit_inr", hang_once)
    scan.two_slices()
    images: list[ismrmrd.Image] = []
    first_sent = threading.Event()

    def take(image: ismrmrd.Image) -> None:
        images.append(image)
        first_sent.set()

    def readouts() -> Iterator[Readout]:
        for readout in scan.readouts():
            if readout.head["idx"]["slice"] == 1:
                first_sent.wait(FAR_LESS_S)  # a scanner takes its time
            yield readout

    settings = Settings.from_properties({**QUICK, "deadline_s": 4.0})
    reconstruct_scan(scan.header, readouts(), settings, take, lambda *_: None)
    methods = {int(image.slice): image.meta["whorl_method"] for image in images}
    assert methods == {0: "lowrank", 1: "inr"}


def test_the_preview_comes_first_and_is_the_low_rank_result(scan: Scan, untouched: Result) -> None:
    result = scan.run(**QUICK, preview="true")
    assert result.outcome.exit_code == 0
    series = [int(image.image_series_index) for image in result.images]
    assert series == [11, 12, 13, 14, 1, 2, 3, 4]
    assert len({image.image_index for image in result.images}) == 8
    for role in QUANTITIES:
        ahead = result.of(f"{role}_LOWRANK")
        assert ahead.meta["whorl_method"] == "lowrank"
        assert "low-rank" in ahead.meta["SeriesDescription"] or "low-rank" in ahead.meta["ImageComments"]
        np.testing.assert_array_equal(ahead.data, untouched.of(role).data)
        assert result.of(role).meta["whorl_method"] == "inr"
    assert "low-rank maps ready after" in result.said


def test_the_preview_of_a_fit_that_hangs_is_there_at_once(scan: Scan, hanging: Hanging) -> None:
    sent: list[int] = []
    four = threading.Event()

    def take(image: ismrmrd.Image) -> None:
        sent.append(int(image.image_series_index))
        if len(sent) == 4:
            four.set()

    settings = Settings.from_properties({"method": "inr", "preview": "true"})
    runner = threading.Thread(
        target=reconstruct_scan, args=(scan.header, scan.readouts(), settings, take, lambda *_: None)
    )
    runner.start()
    assert four.wait(FAR_LESS_S)
    assert runner.is_alive()  # the fit hangs, and there is no deadline
    assert sent == [11, 12, 13, 14]
    hanging.set()
    runner.join(FAR_LESS_S)
    assert sent[4:] == [1, 2, 3, 4]


def test_low_rank_as_the_method_needs_no_preview(scan: Scan) -> None:
    result = scan.run(method="lowrank", preview="true")
    assert [int(image.image_series_index) for image in result.images] == [1, 2, 3, 4]


# --- The parts ----------------------------------------------------------------------------------------


def test_a_deadline_comes_closer_but_never_moves_away() -> None:
    outer = Deadline()
    inner = Deadline(5.0, outer)
    assert inner.until == 5
    inner.bring_forward(7)
    assert inner.until == 5
    outer.bring_forward(3)
    assert (inner.until, outer.until) == (3, 3)
    inner.bring_forward(2)
    assert (inner.until, outer.until) == (2, 3)
    assert inner.has_passed
    assert not Deadline().has_passed
    with pytest.raises(DeadlinePassed, match="it was here when its time was over"):
        inner.check("it was here")


def raises(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_work_in_time_gives_its_result_and_its_errors() -> None:
    far = Deadline(time.monotonic() + 1000)
    assert in_time(lambda: 7, far, "work") == 7
    with pytest.raises(ZeroDivisionError, match="odd"):
        in_time(raises(ZeroDivisionError("odd")), far, "work")


def test_work_that_is_late_is_left_alone_even_if_the_deadline_was_not_known_at_first() -> None:
    released, deadline = threading.Event(), Deadline()
    threading.Timer(0.2, lambda: deadline.bring_forward(0)).start()
    with pytest.raises(DeadlinePassed):
        in_time(lambda: released.wait(HANGS_S), deadline, "work")
    released.set()


def test_work_that_hangs_does_not_keep_the_process() -> None:
    program = (
        "import time\n"
        "from whorl.pipeline.deadlines import Deadline, DeadlinePassed, in_time\n"
        "try:\n"
        "    in_time(lambda: time.sleep(1000), Deadline(time.monotonic() + 0.2), 'work')\n"
        "except DeadlinePassed:\n"
        "    print('late')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=FAR_LESS_S, check=True
    )
    assert done.stdout == "late\n"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits of the INR fail."""

    def fail(*_: object, **__: object) -> None:
        raise FloatingPointError("it came to nothing")

    monkeypatch.setattr(whorl.recon.methods, "fit_inr", fail)


@pytest.mark.parametrize("settings", [{}, {"deadline_s": FAR_LESS_S}, {"uncertainty": "true"}])
def test_llr_may_stand_in_for_a_fit_that_fails(
    scan: Scan, failing: None, settings: dict[str, object]
) -> None:
    quick = {"llr_iterations": 4}
    llr = scan.copy().run(method="llr", **quick, **settings)
    result = scan.run(method="inr", fallback="llr", **quick, **settings)
    assert result.outcome.exit_code == 3
    assert len(result.images) == len(llr.images)
    for role in QUANTITIES:
        image = result.of(role)
        assert (image.meta["whorl_method"], image.meta["whorl_status"]) == ("llr", "fallback")
        assert "LLR maps instead of the INR: it came to nothing" in image.meta["whorl_notes"]
        np.testing.assert_array_equal(image.data, llr.of(role).data)


def test_where_both_fail_low_rank_maps_are_sent(
    scan: Scan, untouched: Result, failing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(whorl.recon.methods, "llr", fail)
    result = scan.run(method="inr", fallback="llr")
    for role in QUANTITIES:
        image = result.of(role)
        assert (image.meta["whorl_method"], image.meta["whorl_status"]) == ("lowrank", "fallback")
        np.testing.assert_array_equal(image.data, untouched.of(role).data)
    assert "low-rank maps instead of the INR: it came to nothing" in image.meta["whorl_notes"]
    assert "low-rank maps instead of the LLR: no room" in image.meta["whorl_notes"]


def test_past_a_deadline_nothing_stands_in_but_what_is_ready(
    scan: Scan, untouched: Result, hanging: Hanging
) -> None:
    result = scan.run(method="inr", fallback="llr", deadline_s=1.0)
    hanging.set()
    are_low_rank(result, untouched)
