"""Layouts of real scans: parts of ADCs, repetitions, slices in any order, parts of a train, other encodings,
trajectories that are not attached. Each gives the maps of the same scan in the reference layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from scan_edit import Result, Scan, assert_close
from whorl.scan.failure import ScanError
from whorl.scan.header import read_header
from whorl.scan.readout import Flag
from whorl.simulation.scan import simulate
from whorl.simulation.truth import read_truth

# --- Parts of one ADC ---------------------------------------------------------------------------------


def split(scan: Scan, n_parts: int, *, padded: bool = False) -> Scan:
    """Each imaging readout in parts, numbered by idx.segment; perhaps with junk that is to be discarded."""
    n_noise = len(scan.heads) - len(scan.imaging)
    heads, trajectories, data = list(scan.heads[:n_noise]), scan.trajectories[:n_noise], scan.data[:n_noise]
    for n in scan.imaging:
        pieces = np.array_split(np.arange(scan.data[n].shape[1]), n_parts)
        for segment, piece in enumerate(pieces):
            head = scan.heads[n].copy()
            head["idx"]["segment"] = segment
            head["number_of_samples"] = len(piece)
            places, samples = scan.trajectories[n][piece], scan.data[n][:, piece]
            if padded:
                head["discard_pre"], head["discard_post"] = 2, 1
                head["number_of_samples"] += 3
                places = np.pad(places, ((2, 1), (0, 0)), constant_values=0.2)
                samples = np.pad(samples, ((0, 0), (2, 1)), constant_values=1e3)
            if segment < n_parts - 1:
                head["flags"] &= ~np.uint64(Flag.LAST_IN_SLICE | Flag.LAST_IN_MEASUREMENT)
            heads.append(head)
            trajectories.append(places)
            data.append(samples)
    scan.heads, scan.trajectories, scan.data = np.array(heads), trajectories, data
    return scan


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "not-announced"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "plain"])
def test_parts_of_an_adc_are_joined(scan: Scan, untouched: Result, announced: bool, padded: bool) -> None:
    split(scan, 3, padded=padded)
    if announced:
        scan.limit("segment", 2)
    result = scan.run()
    assert result.outcome.exit_code == 0
    np.testing.assert_array_equal(result.of("T1").data, untouched.of("T1").data)


def test_a_part_that_is_missing_costs_its_readout(scan: Scan) -> None:
    split(scan, 2)
    result = scan.without([4 + 2 * 30 + 1, 4 + 2 * 50]).run()
    assert result.outcome.exit_code == 3
    assert "2 of 120 readouts are missing" in str(result.of("T1").meta["whorl_notes"])
    assert "2 readouts of the wrong size were dropped" in result.said


def test_a_part_that_comes_twice_costs_its_readout(scan: Scan) -> None:
    split(scan, 3)
    order = np.insert(np.arange(len(scan.heads)), 4 + 3 * 30 + 2, 4 + 3 * 30 + 1)
    result = scan.take(order).run()
    assert "1 of 120 readouts are missing" in str(result.of("T1").meta["whorl_notes"])


def test_segments_that_number_something_else_are_not_joined(scan: Scan, untouched: Result) -> None:
    scan.heads["idx"]["segment"][scan.imaging] = np.arange(120) % 4
    result = scan.run()
    assert result.outcome.exit_code == 0
    np.testing.assert_array_equal(result.of("T1").data, untouched.of("T1").data)


def test_parts_are_joined_or_not_as_the_property_says(scan: Scan, untouched: Result) -> None:
    split(scan, 2)
    # Each half then is a readout of its own; the inner halves of k-space have no edge to tell the unit by.
    assert (
        "slice 0 failed: the unit of the trajectory is not clear" in scan.copy().run(adc_segments="off").said
    )
    # By arrival nothing else tells the parts from timepoints: only the property does.
    with pytest.raises(ScanError, match=r"parts of one ADC or timepoints.*adc_segments to join or off"):
        scan.copy().run(timepoint="arrival")
    result = scan.run(timepoint="arrival", adc_segments="join")
    np.testing.assert_array_equal(result.of("T1").data, untouched.of("T1").data)


# --- Repetitions of the whole scan ------------------------------------------------------------------------


def repeated(scan: Scan, counter: str, n: int = 3, *, slices: int = 1) -> Scan:
    """The scan n times, the data of each times 1, 2, ...; an arbitrary phase tells copies apart."""
    if counter == "repetition":  # then it does not number timepoints
        scan.heads["idx"]["repetition"] = 0
        scan.limit("repetition", n - 1)
    if slices > 1:
        scan.slices(slices)
    imaging = scan.imaging
    n_noise, R = len(scan.heads) - len(imaging), len(imaging)
    scan.heads["flags"][imaging] &= ~np.uint64(Flag.LAST_IN_MEASUREMENT)
    scan.take(np.concatenate([np.arange(n_noise), *([imaging] * n)]))
    for r in range(n):
        for place in range(n_noise + r * R, n_noise + (r + 1) * R):
            scan.data[place] = scan.data[place] * np.complex64((1 + r) * np.exp(1j * r))
            if counter:
                scan.heads["idx"][counter][place] = r
    return scan


@pytest.mark.parametrize("train", ["header", "readouts"])
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("counter", ["average", "repetition", "set", "phase", ""], ids=lambda c: c or "none")
def test_each_repetition_of_the_scan_has_maps_of_its_own(
    scan: Scan, untouched: Result, counter: str, slices: int, train: str
) -> None:
    repeated(scan, counter, slices=slices)
    if train == "readouts":
        scan.no_header_train().limit("repetition", None)
    result = scan.run()
    assert result.outcome.failures == ()
    assert result.outcome.notes == ()
    found = [(int(i.slice), int(i.getHead().repetition)) for i in result.images]
    assert sorted(set(found)) == [(z, r) for z in range(slices) for r in range(3)]
    assert len(found) == 4 * 3 * slices
    assert len({int(i.image_index) for i in result.images}) == len(found)
    for z in range(slices):
        m0 = []
        for r in range(3):
            images = [i for i in result.images if (i.slice, i.getHead().repetition) == (z, r)]
            one = Result(result.outcome, images, result.texts)
            assert_close(one, untouched, slice_number=z, share=0.995)
            m0.append(np.median(one.physical("M0", z)[one.physical("T1", z) > 0]))
        # The data of each repetition, and not those of the first.
        np.testing.assert_allclose(np.array(m0) / m0[0], [1, 2, 3], rtol=0.01)


def test_lost_readouts_of_one_repetition_cost_no_other(scan: Scan) -> None:
    repeated(scan, "average")
    result = scan.without(scan.imaging[[0, 7, 119, 120 + 30]]).run()
    status = {int(i.getHead().repetition): i.meta["whorl_notes"] for i in result.images}
    assert status[0].startswith("3 of 120 readouts are missing")
    assert status[1].startswith("1 of 120 readouts are missing")
    assert status[2] in ("", None)


def test_a_repetition_that_breaks_off_is_said(scan: Scan, untouched: Result) -> None:
    repeated(scan, "average", 2)
    scan.take(np.arange(4 + 120 + 60))
    result = scan.run()
    assert result.outcome.failures == (
        "slice 0, repetition 1 failed: 60 of 120 timepoints arrived, expected at least 90%",
    )
    assert_close(result, untouched)


def test_a_repetition_that_the_header_announces_and_does_not_come(scan: Scan) -> None:
    repeated(scan, "average", 2).limit("average", 2)
    result = scan.run()
    assert "of 3 repetitions that the header announces, 2 of slice 0 arrived" in result.outcome.failures


def test_a_counter_that_changes_within_the_train_tells_no_repetition(scan: Scan, untouched: Result) -> None:
    # Blocks of the train, as some sequences number them.
    scan.heads["idx"]["set"][scan.imaging] = np.arange(120) // 40
    scan.heads["idx"]["average"][scan.imaging] = np.arange(120) // 60
    result = scan.run()
    assert result.outcome.exit_code == 0
    np.testing.assert_array_equal(result.of("T1").data, untouched.of("T1").data)


def test_one_readout_with_another_repetition_number_is_dropped(scan: Scan) -> None:
    scan.heads["idx"]["average"][scan.imaging[33]] = 9
    result = scan.run()
    assert "1 readout of another repetition were dropped" in result.said
    assert "1 of 120 readouts are missing" in str(result.of("T1").meta["whorl_notes"])


# --- Slices -----------------------------------------------------------------------------------------------


def test_slices_interleaved_in_time(scan: Scan, untouched: Result) -> None:
    n = 3
    scan.slices(n)
    imaging = scan.imaging.reshape(n, 120)
    scan.take(np.concatenate([np.arange(4), imaging.T.ravel()]))
    result = scan.run()
    assert result.slices() == [0, 1, 2]
    assert result.outcome.exit_code == 0
    for z in range(n):
        assert_close(result, untouched, slice_number=z, share=0.99)


# --- Parts of a train ---------------------------------------------------------------------------------


def test_the_beginning_of_a_longer_train(scan: Scan) -> None:
    whole = scan.copy()
    scan.take(np.arange(4 + 100))
    reference = scan.copy().limit("repetition", 99)
    played = read_header(whole.header)
    for name, values in (("flipAngle_deg", played.flip_deg), ("TR", played.tr_ms), ("TE", played.te_ms)):
        reference.header_list(name, values[:100])
    expected = reference.run()
    assert expected.outcome.exit_code == 0
    announced = scan.copy().limit("repetition", 99).run()
    assert "its first 100 of 120 pulses" in announced.said
    for result in (announced, scan.copy().run(timepoints=100)):
        assert result.outcome.exit_code == 0
        np.testing.assert_array_equal(result.of("T2").data, expected.of("T2").data)
    # The same of a scan that goes on: what lies behind is not used, and no loss.
    for one in (whole, whole.copy().no_header_train()):
        more = one.copy().run(timepoints=100)
        assert more.outcome.exit_code == 0
        assert "20 readouts lie behind the timepoints that are used" in more.said
        assert_close(more, expected, share=0.98)
    with pytest.raises(ScanError, match=r"with timepoints=60 needs exactly 60 readouts of a slice, got 120"):
        whole.copy().run(timepoints=60, timepoint="arrival")
    with pytest.raises(ScanError, match=r"timepoints is 130: expected at most 120"):
        scan.run(timepoints=130)


# --- Other readouts in the stream -------------------------------------------------------------------------


def test_readouts_of_another_encoding_are_passed_over(scan: Scan, untouched: Result) -> None:
    other = scan.header[scan.header.index(b"<encoding>") : scan.header.index(b"</encoding>") + 11]
    cartesian = other.replace(b"spiral", b"cartesian")
    scan.header = scan.header.replace(other, cartesian + other)
    scan.heads["encoding_space_ref"][scan.imaging] = 1
    extra = scan.imaging[[0, 40]]
    scan.take(np.insert(np.arange(len(scan.heads)), extra, extra))
    for n in extra + np.arange(2):
        scan.heads["encoding_space_ref"][n] = 0
        scan.data[n] *= 50
    result = scan.run()
    assert result.outcome.exit_code == 0
    np.testing.assert_array_equal(result.of("T1").data, untouched.of("T1").data)


@pytest.mark.parametrize("flag", [
    Flag.IS_PARALLEL_CALIBRATION, Flag.IS_HPFEEDBACK_DATA, Flag.IS_SURFACECOILCORRECTIONSCAN_DATA,
    Flag.IS_PHASE_STABILIZATION_REFERENCE, Flag.IS_PHASE_STABILIZATION,
], ids=lambda flag: flag.name)  # fmt: skip
def test_flags_of_readouts_that_are_no_image_data(scan: Scan, untouched: Result, flag: Flag) -> None:
    extra = scan.imaging[[0, 30]]
    scan.take(np.insert(np.arange(len(scan.heads)), extra, extra))
    for n in extra + np.arange(2):
        scan.flag(n, flag)
        scan.data[n] = np.full((2, 5), 7, np.complex64)
        scan.trajectories[n] = np.zeros((5, 0), np.float32)
    result = scan.run()
    np.testing.assert_array_equal(result.of("T1").data, untouched.of("T1").data)


# --- Lost and disordered, by scan_counter -------------------------------------------------------------------


def test_gaps_and_disorder_of_scan_counter_are_said(scan: Scan) -> None:
    whole = scan.copy().run()
    assert "scan_counter" not in whole.said
    lost = scan.copy().without(scan.imaging[[10, 11, 60]]).run()
    assert "scan_counter leaves out 3 numbers" in lost.said
    order = np.arange(len(scan.heads))
    order[[50, 51]] = order[[51, 50]]
    swapped = scan.copy().take(order).run()
    assert swapped.outcome.exit_code == 0
    assert "scan_counter shows 1 readouts out of order" in swapped.said
    with pytest.raises(ScanError, match="out of order: expected the order of measurement"):
        scan.take(order).no_user_train().run(timepoint="arrival")


# --- The place of the slice -----------------------------------------------------------------------------


def off_centre(scan: Scan, shift: tuple[float, float]) -> Scan:
    """The object at a position that is `shift` pixels from the isocentre along x and y, data not demodulated.

    ``y(k) = Σ ρ(r) exp(-i 2π k·r)``: what lies at r + c has the phase ``exp(-i 2π k·c)`` besides.
    """
    pixel_mm = 300 / 64
    for n in scan.imaging:
        ramp = scan.trajectories[n].astype(np.float64) @ np.array(shift)
        scan.data[n] = (scan.data[n] * np.exp(-2j * np.pi * ramp)).astype(np.complex64)
        x, y, z = (scan.heads[name][n].astype(float) for name in ("read_dir", "phase_dir", "slice_dir"))
        scan.heads["position"][n] = (shift[0] * x + shift[1] * y) * pixel_mm + 12 * z
    return scan


def centre_of(result: Result) -> NDArray[np.float64]:
    """Where the object lies in the patient's coordinates, by image and image header, mm."""
    image, inside = result.of("T1"), result.physical("T1") > 0
    rows, columns = np.nonzero(inside)
    head = image.getHead()
    n_y, n_x = inside.shape
    return (
        np.array(head.position)
        + (columns.mean() - n_x // 2) * head.field_of_view[0] / n_x * np.array(head.read_dir)
        + (rows.mean() - n_y // 2) * head.field_of_view[1] / n_y * np.array(head.phase_dir)
    )


@pytest.mark.parametrize("directions", ["transversal", "oblique"])
def test_a_shifted_object_lands_where_the_position_says(
    scan: Scan, untouched: Result, directions: str
) -> None:
    if directions == "oblique":
        turn, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))
        for name, axis in zip(("read_dir", "phase_dir", "slice_dir"), turn, strict=True):
            scan.heads[name] = axis
    shift = (7.0, -4.0)
    off_centre(scan, shift)
    expected = centre_of(untouched)  # relative to the middle of the slice
    head = scan.heads[scan.imaging[0]]
    x, y = head["read_dir"].astype(float), head["phase_dir"].astype(float)
    true = head["position"] + expected[0] * x + expected[1] * y
    for choice in ("nominal", "off"):
        result = scan.copy().run(fov_shift=choice)
        # A pixel is 4.7 mm; the mask of the shifted object may differ by some pixels at its edge.
        np.testing.assert_allclose(centre_of(result), true, atol=0.5)
    nominal = scan.copy().run(fov_shift="nominal")
    assert_close(nominal, untouched)
    # Left alone, the label is believed: the object then seems to be a shift further away.
    plain = scan.run()
    moved = (shift[0] * x + shift[1] * y) * 300 / 64
    np.testing.assert_allclose(centre_of(plain), true + moved, atol=0.5)


# --- Which interleaves a scan has -------------------------------------------------------------------------

_SMALL: dict[str, Any] = {"phantom": "nist", "timepoints": 120, "coils": 4, "matrix": 64}


def error(result: Result, path: Path) -> float:
    """Mean error of log T1 and log T2 over the object."""
    truth = read_truth(path)
    inside = truth.mask[0] & (result.physical("T1") > 0)
    assert inside.sum() > 300
    return float(
        sum(
            np.abs(np.log(result.physical(role)[inside] / true[0][inside])).mean()
            for role, true in (("T1", truth.t1_ms), ("T2", truth.t2_ms))
        )
    )


@pytest.mark.parametrize(
    "properties",
    [{"method": "lowrank"}, {"method": "inr"}, {"method": "inr", "guide": "off", "iterations": 20}],
    ids=str,
)
def test_an_interleaf_of_its_own_for_each_timepoint(
    tiny_scan: Path, scan: Scan, tmp_path: Path, properties: dict[str, object]
) -> None:
    path = tmp_path / "scan.h5"
    simulate(path, **_SMALL, interleaves=24, order="golden-angle")
    result = Scan.load(path).run(**properties)
    assert "120 interleaves of 884 samples" in result.said
    assert result.outcome.exit_code == 0
    assert error(result, path) < 1.2 * error(scan.run(**properties), tiny_scan)


def test_different_spirals_in_one_scan(tiny_scan: Path, scan: Scan, tmp_path: Path) -> None:
    # Every other timepoint is measured by another design, whose arms have the same numbers.
    path = tmp_path / "other.h5"
    simulate(path, **_SMALL, interleaves=32)
    other = Scan.load(path)
    reference = error(scan.copy().run(), tiny_scan)
    for n in scan.imaging[1::2]:
        scan.data[n], scan.trajectories[n] = other.data[n], other.trajectories[n]
        scan.heads["idx"]["kspace_encode_step_1"][n] = other.heads["idx"]["kspace_encode_step_1"][n]
    result = scan.run()
    n_distinct = len({scan.trajectories[n].tobytes() for n in scan.imaging})
    assert n_distinct > 24
    assert f"{n_distinct} interleaves of 884 samples" in result.said
    assert result.outcome.exit_code == 0
    # By arm number alone half of the readouts would lie at wrong places.
    assert error(result, tiny_scan) < 1.2 * reference
