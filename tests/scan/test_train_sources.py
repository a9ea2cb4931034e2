"""Where the fingerprint train comes from, through the whole pipeline: the same train by each way makes
the same maps, and a train that is not clear stops the scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scan_edit import Result, Scan, assert_close
from whorl.scan.failure import ScanError


def write_train(path: Path, scan: Scan, columns: str = "flip_deg,tr_ms,te_ms") -> Path:
    """The train of the readouts as CSV."""
    user = scan.user_train()
    known = {"tr_ms": user[:, 2] / 1e3, "te_ms": user[:, 3] / 1e3, "flip_deg": user[:, 5] / 1e2,
             "phase_deg": user[:, 6] / 1e2}  # fmt: skip
    names = columns.split(",")
    rows = zip(*(known[name] for name in names), strict=True)
    path.write_text("\n".join([columns, *(",".join(map(repr, map(float, row))) for row in rows)]))
    return path


def test_the_untouched_scan_takes_the_lists_of_the_header(untouched: Result) -> None:
    assert untouched.slices() == [0]
    assert (
        "train of 120 timepoints from header lists, inversion 20 ms, timepoints by user_int" in untouched.said
    )


def test_header_lists_alone(scan: Scan, untouched: Result) -> None:
    result = scan.no_user_train().run()
    assert result.outcome.exit_code == 0
    assert_close(result, untouched)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3], ids="{}-entries".format)
@pytest.mark.parametrize("announced", [True, False], ids=["announced", "not-announced"])
def test_user_int_alone(scan: Scan, untouched: Result, protocol: int, announced: bool) -> None:
    # Lists shorter than the train are protocol values, even if they agree with its first pulses.
    scan.no_header_train()
    if protocol:
        user = scan.user_train()[:protocol]
        scan.header_list("flipAngle_deg", user[:, 5] / 100).header_list("TR", user[:, 2] / 1000)
        scan.header_list("TE", user[:1, 3] / 1000)
    if not announced:
        scan.limit("repetition", None)
    result = scan.run()
    assert "train of 120 timepoints from user_int of the readouts" in result.said
    assert result.outcome.exit_code == 0
    assert_close(result, untouched)


@pytest.mark.parametrize("flags", [True, False], ids=["flags", "no-flags"])
def test_user_int_alone_with_two_slices(scan: Scan, untouched: Result, flags: bool) -> None:
    scan.two_slices().no_header_train().limit("repetition", None)
    if not flags:
        scan.no_flags()
    result = scan.run()
    assert result.outcome.exit_code == 0
    assert result.slices() == [0, 1]
    assert_close(result, untouched, slice_number=1)


def test_protocol_values_without_any_train(scan: Scan) -> None:
    scan.no_user_train().no_header_train().limit("repetition", None)
    scan.header_list("flipAngle_deg", [10, 20]).header_list("TR", [9]).header_list("TE", [2])
    with pytest.raises(ScanError, match=r"no counter|no fingerprint train"):
        scan.run()


def test_lists_of_one_entry_hold_for_all(scan: Scan, untouched: Result) -> None:
    user = scan.user_train()
    assert len(np.unique(user[:, 2])) == len(np.unique(user[:, 3])) == 1
    tr_ms, te_ms = user[0, 2] / 1000, user[0, 3] / 1000
    result = scan.no_user_train().header_list("TR", [tr_ms]).header_list("TE", [te_ms]).run()
    assert "from header lists" in result.said
    assert_close(result, untouched)


def test_csv_alone(scan: Scan, untouched: Result, tmp_path: Path) -> None:
    path = write_train(tmp_path / "train.csv", scan)
    scan.no_header_train().no_user_train()
    result = scan.run(sequence=str(path))
    assert result.outcome.exit_code == 0
    assert f"from file {path}" in result.said
    assert_close(result, untouched)


def test_csv_counts_more_than_everything_else(scan: Scan, untouched: Result, tmp_path: Path) -> None:
    path = write_train(tmp_path / "train.csv", scan)
    scan.header_list("flipAngle_deg", np.full(120, 33.0))
    scan.heads["user_int"][:, 5] = 7700
    assert_close(scan.run(sequence=str(path)), untouched)


def test_the_train_is_used(scan: Scan, untouched: Result) -> None:
    # The same data with another train must give other maps, or the train was not read.
    scan.no_user_train().header_list("TR", np.full(120, 18.0))
    other = scan.run()
    inside = untouched.physical("T1") > 0
    ratio = other.physical("T1")[inside] / untouched.physical("T1")[inside]
    assert abs(np.median(ratio) - 1) > 0.2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flip_deg,tr_ms\n10,9\n", "lacks te_ms"),
        ("", "lacks flip_deg, te_ms, tr_ms"),
        ("flip_deg,tr_ms,te_ms\n", "no timepoints"),
        ("flip_deg,tr_ms,te_ms\n10,9,2\nten,9,2\n", "line 3.*ten"),
        ("flip_deg,tr_ms,te_ms\n10,9,2\n10,9\n", "line 3"),
        ("flip_deg,tr_ms,te_ms\n10,9,2\n10,nan,2\n", "tr_ms of timepoint 1 is nan: expected a number"),
        ("flip_deg,tr_ms,te_ms\n10,9,2\n10,9,12\n", "TE 12 ms and TR 9 ms: expected 0 <= TE <= TR"),
        ("flip_deg,tr_ms,te_ms\n0,9,2\n0,9,2\n", "all flip angles of the train are 0"),
    ],
    ids=["column", "empty", "header-only", "text", "short-line", "nan", "te-above-tr", "no-pulse"],
)
def test_bad_csv(scan: Scan, tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "train.csv"
    path.write_text(text)
    with pytest.raises(ScanError, match=said) as caught:
        scan.run(sequence=str(path))
    assert str(path) in str(caught.value)


def test_missing_csv_and_pulseq(scan: Scan, tmp_path: Path) -> None:
    with pytest.raises(ScanError, match="cannot be read"):
        scan.run(sequence=str(tmp_path / "none.csv"))
    with pytest.raises(ScanError, match=r"none\.seq"):
        scan.run(sequence=str(tmp_path / "none.seq"))


def test_csv_of_another_length(scan: Scan, tmp_path: Path) -> None:
    path = write_train(tmp_path / "train.csv", scan)
    path.write_text("\n".join(path.read_text().splitlines()[:101]))
    with pytest.raises(ScanError, match=r"\[0, 100\)"):
        scan.run(sequence=str(path))


@pytest.mark.parametrize(
    ("column", "value", "name", "told", "known"),
    [(5, 4321, "flip_deg", "43.21", "10"), (2, 10500, "tr_ms", "10.5", "9"), (3, 2500, "te_ms", "2.5", "2")],
    ids=["flip", "tr", "te"],
)
@pytest.mark.parametrize("second_slice", [False, True], ids=["first", "later"])
def test_sources_that_disagree_stop_the_scan(
    scan: Scan, column: int, value: int, name: str, told: str, known: str, second_slice: bool
) -> None:
    scan.header_list("flipAngle_deg", np.full(120, 10.0))
    scan.heads["user_int"][scan.imaging, 5] = 1000
    if second_slice:
        scan.two_slices()
    place = scan.imaging[-10]
    scan.heads["user_int"][place, column] = value
    if second_slice:
        # The first one was right, and it has been sent.
        result = scan.run()
        assert result.slices() == [0]
        assert result.outcome.exit_code == 3
        (said,) = result.outcome.failures
    else:
        with pytest.raises(ScanError) as caught:
            scan.run()
        said = str(caught.value)
    assert f"disagree on {name} of timepoint 110" in said
    assert f"header lists say {known}" in said
    assert told in said


def test_slices_with_different_trains_in_user_int(scan: Scan) -> None:
    scan.no_header_train().two_slices()
    scan.heads["user_int"][scan.imaging[120:], 5] += 500
    result = scan.run()
    assert result.slices() == [0]
    assert ["disagree on flip_deg" in failure for failure in result.outcome.failures] == [True]


def test_a_flip_angle_of_zero_is_legal(scan: Scan, tmp_path: Path) -> None:
    scan.no_header_train()
    scan.heads["user_int"][scan.imaging[[0, 60]], 5] = 0
    result = scan.run()
    assert result.outcome.exit_code == 0
    assert "from user_int" in result.said


def test_te_above_tr_in_each_source(scan: Scan) -> None:
    user = scan.copy().no_header_train()
    user.heads["user_int"][user.imaging[7], 3] = 9500
    with pytest.raises(ScanError, match=r"user_int.*timepoint 7 has TE 9.5 ms and TR 9 ms"):
        user.run()
    with pytest.raises(ScanError, match=r"MRD header.*timepoint 0 has TE 11 ms and TR 9 ms"):
        scan.header_list("TE", np.full(120, 11.0)).run()


def test_missing_readouts_leave_a_train_that_is_interpolated(scan: Scan, untouched: Result) -> None:
    imaging = scan.imaging
    result = scan.no_header_train().without(imaging[[50, 51, 90]]).run()
    assert result.outcome.exit_code == 3
    assert "3 missing timepoints interpolated" in result.said
    # Three of 120 readouts less are a little more aliasing.
    assert_close(result, untouched, share=0.5, relative=0.11)


def test_an_interpolated_timepoint_may_arrive_with_another_slice(scan: Scan) -> None:
    scan.no_header_train()
    scan.heads["user_int"][scan.imaging[50], 5] += 300  # not on the line between its neighbours
    scan.two_slices()
    result = scan.without(scan.imaging[50]).run()
    assert result.slices() == [0, 1]
    assert result.outcome.exit_code == 3


# --- Inversion ------------------------------------------------------------------------------------


def t1_of(result: Result) -> float:
    inside = result.physical("T1") > 0
    return float(np.median(result.physical("T1")[inside]))


def test_inversion_from_header_property_or_none(scan: Scan, untouched: Result) -> None:
    assert "inversion 20 ms" in untouched.said
    none = scan.copy().run(inversion_time_ms=0)
    assert "inversion none" in none.said
    without = scan.copy().header_list("TI", []).run()
    assert "inversion none" in without.said
    zero = scan.copy().header_list("TI", [0]).run()
    assert "inversion none" in zero.said
    np.testing.assert_array_equal(none.physical("T1"), without.physical("T1"))
    assert abs(t1_of(none) / t1_of(untouched) - 1) > 0.1
    told = scan.copy().header_list("TI", []).run(inversion_time_ms=20)
    assert "inversion 20 ms" in told.said
    np.testing.assert_array_equal(told.physical("T1"), untouched.physical("T1"))
    other = scan.copy().run(inversion_time_ms=400)
    assert "inversion 400 ms" in other.said
    assert abs(t1_of(other) / t1_of(untouched) - 1) > 0.1


# --- RF phase -------------------------------------------------------------------------------------


def test_rf_phases_of_the_readouts_are_used(scan: Scan, untouched: Result, tmp_path: Path) -> None:
    # Phases that a FISP train does not have change what the dictionary expects, with each source.
    phases = (100 * 117 * np.arange(120) ** 2 / 2) % 36000
    path = write_train(tmp_path / "train.csv", scan)
    scan.heads["user_int"][scan.imaging, 6] = phases
    with_phase = write_train(tmp_path / "phase.csv", scan, "flip_deg,tr_ms,te_ms,phase_deg")
    by_header = scan.copy().run()
    inside = untouched.physical("T2") > 0
    assert not np.allclose(by_header.physical("T2")[inside], untouched.physical("T2")[inside], rtol=0.1)
    by_readouts = scan.copy().no_header_train().run()
    by_csv = scan.copy().run(sequence=str(path))
    by_both = scan.copy().no_user_train().run(sequence=str(with_phase))
    for other in (by_readouts, by_csv, by_both):
        assert_close(other, by_header)


def test_phases_in_the_csv_count_more_than_those_of_the_readouts(
    scan: Scan, untouched: Result, tmp_path: Path
) -> None:
    path = write_train(tmp_path / "train.csv", scan, "flip_deg,tr_ms,te_ms,phase_deg")
    scan.heads["user_int"][scan.imaging, 6] = (100 * 117 * np.arange(120) ** 2 / 2) % 36000
    assert_close(scan.run(sequence=str(path)), untouched)


def with_user_parameters(scan: Scan, **texts: str) -> Scan:
    """Parameters in the header's userParameters, as texts."""
    values = "".join(
        f"<userParameterString><name>{name}</name><value>{text}</value></userParameterString>"
        for name, text in texts.items()
    )
    scan.header = scan.header.replace(
        b"</ismrmrdHeader>", f"<userParameters>{values}</userParameters></ismrmrdHeader>".encode()
    )
    return scan


def test_user_parameters_of_the_header(scan: Scan, untouched: Result) -> None:
    user = scan.user_train().copy()
    scan.no_user_train().no_header_train().header_list("TI", [])
    flips = ", ".join(f"{value / 100:g}" for value in user[:, 5])
    with_user_parameters(scan, flip_deg=flips, tr_ms=f"{user[0, 2] / 1e3}", te_ms="2", inversion_time_ms="20")
    result = scan.copy().run()
    assert "train of 120 timepoints from user parameters of the header, inversion 20 ms" in result.said
    assert "(user parameters of the header)" in result.said
    assert_close(result, untouched)
    scan.header_list("flipAngle_deg", user[:, 5] / 100 + (np.arange(120) == 7))
    scan.header_list("TR", [9.0]).header_list("TE", [2.0])
    with pytest.raises(
        ScanError, match=r"disagree on flip_deg of timepoint 7: header lists say .*, user par"
    ):
        scan.run()


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ({"flip_deg": "1 2 x", "tr_ms": "9", "te_ms": "2"}, "flip_deg of the MRD header is '1 2 x'"),
        ({"flip_deg": "1 2 3", "tr_ms": "9 9", "te_ms": "2"}, "3 timepoints, but tr_ms has 2"),
        ({"flip_deg": "1 2 3", "tr_ms": "9", "te_ms": "12"}, "TE 12 ms and TR 9 ms"),
        ({"flip_deg": "", "tr_ms": "9", "te_ms": "2"}, "flip_deg of the MRD header is empty"),
    ],
    ids=["text", "lengths", "te-above-tr", "empty"],
)
def test_bad_user_parameters(scan: Scan, texts: dict[str, str], says: str) -> None:
    scan.no_user_train().no_header_train()
    with pytest.raises(ScanError, match=says):
        with_user_parameters(scan, **texts).run()
