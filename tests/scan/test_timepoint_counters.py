"""Which counter numbers the timepoints: the first that fits, and none without saying so."""

from __future__ import annotations

import numpy as np
import pytest

from scan_edit import Result, Scan, assert_close
from whorl.scan.failure import ScanError

COUNTERS = ("user_int", "repetition", "contrast", "set")


def only(scan: Scan, counter: str, values: np.ndarray | None = None) -> Scan:
    """Let just one counter count; the readouts arrive in an order that says nothing."""
    imaging = scan.imaging
    values = np.arange(len(imaging)) if values is None else values
    scan.heads["user_int"][:, 0] = 0
    for name in COUNTERS[1:]:
        scan.heads["idx"][name] = 0
    if counter == "user_int":
        scan.heads["user_int"][imaging, 0] = values
    else:
        scan.heads["idx"][counter][imaging] = values
    return scan


@pytest.mark.parametrize("counter", COUNTERS)
@pytest.mark.parametrize("choice", ["auto", "told"])
def test_one_counter_alone(scan: Scan, untouched: Result, counter: str, choice: str) -> None:
    only(scan, counter)
    order = np.random.default_rng(1).permutation(scan.imaging)
    scan.take(np.concatenate([np.arange(4), order]))
    result = scan.run(timepoint="auto" if choice == "auto" else counter, virtual_coils=4)
    assert f"timepoints by {counter}" in result.said
    assert result.outcome.exit_code == 0
    assert_close(result, untouched, share=0.9)


def test_the_first_that_fits_is_taken_and_the_property_overrides(scan: Scan, untouched: Result) -> None:
    # A counter that runs backwards fits as well, so the order of the candidates decides.
    scan.no_user_train()
    scan.heads["idx"]["contrast"][scan.imaging] = np.arange(120)[::-1]
    first = scan.copy().run()
    assert "timepoints by user_int" in first.said
    assert_close(first, untouched)
    told = scan.copy().run(timepoint="contrast")
    assert "timepoints by contrast" in told.said
    assert not np.array_equal(told.physical("T1"), untouched.physical("T1"))


def test_counters_that_do_not_cover_or_exceed_the_train_are_passed_over(
    scan: Scan, untouched: Result
) -> None:
    imaging = scan.imaging
    scan.heads["user_int"][imaging, 0] = np.arange(120) // 2  # half of the timepoints
    scan.heads["idx"]["repetition"][imaging] = np.arange(120) + 1  # one beyond the end
    scan.heads["idx"]["contrast"][imaging] = np.arange(120)
    result = scan.limit("repetition", 119).run()
    assert "timepoints by contrast" in result.said
    assert_close(result, untouched)


def test_ninety_percent_must_be_covered(scan: Scan) -> None:
    imaging = scan.imaging
    assert scan.copy().without(imaging[20:32]).run().slices() == [0]
    with pytest.raises(ScanError, match=r"\[0, 120\).*107 readouts user_int has 107 values from 0 to 119"):
        scan.without(imaging[20:33]).run()


@pytest.mark.parametrize("choice", ["auto", "set"])
def test_no_counter_fits(scan: Scan, choice: str) -> None:
    only(scan, "user_int", np.zeros(120))
    with pytest.raises(ScanError, match="no counter numbers the timepoints") as caught:
        scan.run(timepoint=choice)
    assert "set has 1 values from 0 to 0" in str(caught.value)
    assert "Set property timepoint" in str(caught.value)


def test_arrival_with_the_exact_count(scan: Scan, untouched: Result) -> None:
    only(scan, "user_int", np.zeros(120))
    result = scan.run(timepoint="arrival")
    assert "timepoints by arrival" in result.said
    assert result.outcome.exit_code == 0
    assert_close(result, untouched)


def test_arrival_of_two_slices_that_alternate(scan: Scan, untouched: Result) -> None:
    only(scan, "user_int", np.zeros(120)).two_slices()
    noise = np.arange(len(scan.heads) - 240)
    order = scan.imaging.reshape(2, 120).T.ravel()
    result = scan.take(np.concatenate([noise, order])).run(timepoint="arrival")
    assert result.slices() == [0, 1]
    assert_close(result, untouched, slice_number=1)


@pytest.mark.parametrize("flags", [True, False], ids=["flags", "no-flags"])
@pytest.mark.parametrize("extra", [-1, 1], ids=["one-less", "one-more"])
def test_arrival_with_a_wrong_count(scan: Scan, extra: int, flags: bool) -> None:
    only(scan, "user_int", np.zeros(120))
    if not flags:
        scan.no_flags()
    imaging = scan.imaging
    scan = (
        scan.without(imaging[60])
        if extra < 0
        else scan.take(np.insert(np.arange(len(scan.heads)), imaging[60], imaging[60]))
    )
    with pytest.raises(ScanError, match=f"timepoint=arrival needs exactly .* 120 .*got {120 + extra}"):
        scan.run(timepoint="arrival")


def test_arrival_with_a_wrong_count_costs_only_its_slice(scan: Scan) -> None:
    only(scan, "user_int", np.zeros(120)).no_user_train().two_slices()
    result = scan.without(scan.imaging[200]).run(timepoint="arrival")
    assert result.slices() == [0]
    assert result.outcome.exit_code == 3
    assert any("slice 1" in text and "119" in text for text in result.outcome.failures)
