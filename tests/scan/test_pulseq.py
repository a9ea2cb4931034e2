"""What is read from a Pulseq file, against what was written into it and against PyPulseq's own k-space."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pulseq_files import (
    ADC_DELAY_S,
    DWELL_S,
    EDGE_PER_M,
    Written,
    quiet,
    spiral_per_m,
    write_sequence,
)
from whorl.scan.failure import ScanError
from whorl.scan.pulseq import PulseqSequence, read_pulseq

#: The file has six significant digits of an amplitude and of each sample of a shape.
DIGITS = 1e-5


def places(sequence: PulseqSequence) -> NDArray[Any]:
    """kx + i ky of each timepoint, `(T, S)`, cycles/m."""
    found = sequence.trajectories
    assert found.which is not None
    k = found.points[found.which]
    return np.asarray(k[..., 0] + 1j * k[..., 1])


def assert_train(sequence: PulseqSequence, written: Written) -> None:
    train = sequence.train
    np.testing.assert_allclose(train.flip_deg, written.flip_deg, rtol=DIGITS)
    # Times are whole microseconds. What follows the last pulse is not a TR: it ends with the file.
    np.testing.assert_allclose(train.tr_ms[:-1], written.tr_ms[:-1], atol=1e-6)
    np.testing.assert_allclose(train.te_ms, written.te_ms, atol=1e-6)
    assert train.inversion_time_ms == (None if written.ti_ms is None else pytest.approx(written.ti_ms))
    apart = np.exp(1j * np.deg2rad(train.phase_deg - written.phase_deg))
    np.testing.assert_allclose(apart, 1, atol=1e-5)


def kspace_of_pypulseq(path: str, n_samples: int) -> NDArray[np.float64]:
    """kx, ky, kz of all ADCs `(A, S, 3)` by PyPulseq, cycles/m."""
    with quiet() as pp:
        sequence = pp.Sequence()
        sequence.read(path)
        k = sequence.calculate_kspace()[0]
    return np.asarray(k.T.reshape(-1, n_samples, 3))


# --- Train and trajectory ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["sinc", "block", "samples", "trapezoid"])
@pytest.mark.parametrize("inversion", [True, False], ids=["inverted", "not-inverted"])
def test_the_train_is_what_was_written(tmp_path: Path, shape: str, inversion: bool) -> None:
    phases = np.array([0, 117, 351, -15, 180, 90, 30.5, 0, 0, 270, 5, 6], dtype=float)
    written = write_sequence(tmp_path / "a.seq", shape=shape, inversion=inversion, phases_deg=phases)
    sequence = read_pulseq(written.path)
    assert_train(sequence, written)
    assert sequence.n_slices == 1
    assert sequence.n_samples == 400
    assert sequence.fov_mm == pytest.approx((300, 300))
    np.testing.assert_array_equal(sequence.adc, [-1, -1, -1, *range(12)])
    np.testing.assert_array_equal(sequence.slice_of_adc, 0)
    assert sequence.measured.all()
    np.testing.assert_array_equal(sequence.receiver_deg, 0)
    assert sequence.warnings == ()
    assert written.path in sequence.train.source


def test_spirals_are_the_integral_of_their_gradients(tmp_path: Path) -> None:
    written = write_sequence(tmp_path / "a.seq")
    sequence = read_pulseq(written.path)
    found = sequence.trajectories
    assert (found.by, found.units) == ("timepoint", "1/m")
    assert found.dwell_us == pytest.approx(5)
    assert found.points.shape == (5, 400, 2)
    np.testing.assert_array_equal(found.which, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1])
    k = places(sequence)
    # PyPulseq integrates the same polygons: only its sums differ in their rounding.
    reference = kspace_of_pypulseq(written.path, 400)[3:]
    np.testing.assert_allclose(k.real, reference[..., 0], atol=1e-9 * EDGE_PER_M)
    np.testing.assert_allclose(k.imag, reference[..., 1], atol=1e-9 * EDGE_PER_M)
    # A polygon through means over raster intervals h is off by h² |k''| / 8: (1e-5 · 3π · 1.5 / 2e-3)² / 8.
    closed = spiral_per_m((np.arange(400) + 0.5) * DWELL_S, 2e-3)
    turns = np.exp(1j * np.deg2rad(written.turn_deg))[:, None]
    assert np.abs(k - closed * turns).max() < 7e-4 * EDGE_PER_M


def test_gradients_before_the_centre_of_a_pulse_do_not_count(tmp_path: Path) -> None:
    written = write_sequence(tmp_path / "a.seq", in_plane=True)
    k = places(read_pulseq(written.path))
    reference = kspace_of_pypulseq(written.path, 400)[3:]
    # The gradient has passed nearly half of its 70 1/m before the centre.
    assert 10 < np.abs(reference[:, 0, 1]).min() < 60
    np.testing.assert_allclose(k.imag, reference[..., 1], atol=1e-9 * EDGE_PER_M)


def test_straight_lines_of_a_trapezoid_are_exact(tmp_path: Path) -> None:
    written = write_sequence(tmp_path / "a.seq", arbitrary=False)
    sequence = read_pulseq(written.path)
    assert len(sequence.trajectories.points) == 2
    with quiet() as pp:
        other = pp.Sequence()
        other.read(written.path)
        one = next(b for n in other.block_events if (b := other.get_block(n)).gx is not None)
        rise, flat, g = one.gx.rise_time, one.gx.flat_time, one.gx.amplitude
    t = ADC_DELAY_S + (np.arange(400) + 0.5) * DWELL_S
    up, level, down = np.clip(t, 0, rise), np.clip(t - rise, 0, flat), np.clip(t - rise - flat, 0, rise)
    k = g * (up**2 / (2 * rise) + level + down - down**2 / (2 * rise))
    # The amplitude is the file's own; the rest is the area of a trapezoid.
    np.testing.assert_allclose(places(sequence)[0], k, atol=1e-9 * EDGE_PER_M)
    np.testing.assert_allclose(places(sequence)[1], -2 * k, atol=DIGITS * EDGE_PER_M)
    # The sample nearest to the centre is the first one, which begins after the delay of the ADC.
    np.testing.assert_allclose(sequence.train.te_ms, written.te_ms, atol=1e-6)


def test_an_inversion_time_of_a_property_counts_more(tmp_path: Path) -> None:
    written = write_sequence(tmp_path / "a.seq")
    assert written.ti_ms is not None
    sequence = read_pulseq(written.path, 12.5)
    assert sequence.train.inversion_time_ms == 12.5
    (warning,) = sequence.warnings
    assert f"12.5 ms, the Pulseq file has {written.ti_ms:g} ms: the property counts" in warning
    assert read_pulseq(written.path, 0.0).train.inversion_time_ms is None
    assert read_pulseq(written.path, written.ti_ms).warnings == ()


# --- What each ADC is --------------------------------------------------------------------------------


def test_dummy_pulses_have_no_adc(tmp_path: Path) -> None:
    written = write_sequence(tmp_path / "a.seq", dummies=2, odd={7: "no ADC"})
    sequence = read_pulseq(written.path)
    assert_train(sequence, written)
    lacking = np.isin(np.arange(12), [0, 1, 7])
    np.testing.assert_array_equal(sequence.measured, ~lacking)
    np.testing.assert_array_equal(sequence.adc, [-1, -1, -1, *np.flatnonzero(~lacking)])
    reference = kspace_of_pypulseq(written.path, 400)[3:]
    np.testing.assert_allclose(places(sequence)[~lacking].real, reference[..., 0], atol=1e-9 * EDGE_PER_M)


def test_a_labelled_noise_adc_within_the_train_is_noise(tmp_path: Path) -> None:
    written = write_sequence(tmp_path / "a.seq", n_noise=0, noise_label_at=4)
    sequence = read_pulseq(written.path)
    np.testing.assert_array_equal(sequence.adc, [0, 1, 2, 3, 4, -1, *range(5, 12)])
    np.testing.assert_allclose(sequence.train.tr_ms[:-1], written.tr_ms[:-1], atol=1e-6)


@pytest.mark.parametrize("by", ["frequency", "label"])
def test_slices_are_told_by_label_or_frequency(tmp_path: Path, by: str) -> None:
    written = write_sequence(tmp_path / "a.seq", slices=2, slices_by=by, n_pulses=6)
    sequence = read_pulseq(written.path)
    assert sequence.n_slices == 2
    assert_train(sequence, written)
    np.testing.assert_array_equal(sequence.adc, [-1, -1, -1, *range(6), *range(6)])
    np.testing.assert_array_equal(sequence.slice_of_adc, [0] * 3 + [0] * 6 + [1] * 6)


@pytest.mark.parametrize("offset", [0.0, 35.0], ids=["no-offset", "offset"])
def test_phase_of_a_receiver_that_does_not_follow(tmp_path: Path, offset: float) -> None:
    phases = np.array([0, 0, 0, 0, 0, 117, 351, -15, 180, 90, 30.5, 200], dtype=float)
    follows = write_sequence(tmp_path / "a.seq", phases_deg=phases, receiver_offset_deg=offset)
    np.testing.assert_array_equal(read_pulseq(follows.path).receiver_deg, 0)
    written = write_sequence(
        tmp_path / "b.seq", phases_deg=phases, receiver_follows=False, receiver_offset_deg=offset, dummies=1
    )
    sequence = read_pulseq(written.path)
    assert_train(sequence, written)
    # Relative to the most frequent value, which is the offset; a dummy pulse has none.
    apart = np.exp(1j * np.deg2rad(sequence.receiver_deg + phases))
    np.testing.assert_allclose(apart, 1, atol=1e-5)


# --- Other files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("old_format", [True, False], ids=["version-1.4.1", "version-1.5"])
def test_the_use_of_pulses_is_told_by_their_angle_if_the_file_does_not_say_it(
    tmp_path: Path, old_format: bool
) -> None:
    written = write_sequence(tmp_path / "a.seq", use=False, old_format=old_format, dummies=1)
    text = Path(written.path).read_text()
    assert ("minor 4" in text) == old_format
    sequence = read_pulseq(written.path)
    assert_train(sequence, written)
    assert sequence.warnings == ("a pulse of 180° is taken for the inversion",)
    np.testing.assert_array_equal(sequence.adc, [-1, -1, -1, *range(1, 12)])


def test_a_field_of_view_in_mm_or_none(tmp_path: Path) -> None:
    assert read_pulseq(write_sequence(tmp_path / "a.seq", fov_m=256.0).path).fov_mm == (256, 256)
    assert read_pulseq(write_sequence(tmp_path / "b.seq", fov_m=None).path).fov_mm is None


def test_a_preparation_before_the_train_is_left_out_with_a_warning(tmp_path: Path) -> None:
    written = write_sequence(tmp_path / "a.seq", before="saturation")
    sequence = read_pulseq(written.path)
    assert sequence.warnings == ("a pulse for 'saturation' before the train is left out",)
    assert_train(sequence, written)


def test_a_few_adcs_of_another_size_are_left_out(tmp_path: Path) -> None:
    written = write_sequence(tmp_path / "a.seq", n_pulses=60, odd={31: "short ADC"}, n_noise=0)
    sequence = read_pulseq(written.path)
    (warning,) = sequence.warnings
    assert "400 × 5 µs (59 times), 200 × 5 µs (1 times), only the most frequent are used" in warning
    np.testing.assert_array_equal(np.flatnonzero(~sequence.measured), [31])
    assert sequence.n_samples == 400


# --- What stops the scan -----------------------------------------------------------------------------

WRONG = {
    "no-excitation": ({"odd": dict.fromkeys(range(12), "no excitation")}, r"has no excitation: expected"),
    "no-adc": ({"dummies": 12}, r"has no ADC behind an excitation: expected one for each timepoint"),
    "two-adcs": ({"odd": {5: "two ADCs"}}, r"two ADCs behind the excitation at [\d.]+ ms: expected one"),
    "one-pulse-less": (
        {"odd": {5: "no excitation"}},
        r"two ADCs behind the excitation at [\d.]+ ms: expected one",
    ),
    "refocusing": ({"odd": {4: "refocusing"}}, r"has a refocusing pulse: expected a FISP train"),
    "saturation": ({"odd": {4: "saturation"}}, r"has a preparation pulse within the train"),
    "second-inversion": ({"odd": {7: "inversion"}}, r"inverts again before excitation 7 .*expected one"),
    "kz": ({"kz_per_m": 1.0}, r"moves along kz by 11 1/m .*only 2D"),
    "sizes": (
        {"odd": {1: "short ADC", 2: "short ADC"}},
        r"ADCs of 400 × 5 µs \(10 times\), 200 × 5 µs \(2 times\): expected one size",
    ),
    "flips-of-slices": (
        {"slices": 2, "flip_factor_of_last_slice": 0.5},
        r"slices 0 and 1 have flip_deg [\d.]+ and [\d.]+ at timepoint \d+: expected the same train",
    ),
    "times-of-slices": (
        {"slices": 2, "odd": {5: "late"}},
        r"slices 0 and 1 have tr_ms [\d.]+ and [\d.]+ at timepoint 5: expected the same train",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_fingerprint_stops_the_scan(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    written = write_sequence(tmp_path / "a.seq", **change)
    with pytest.raises(ScanError, match=message) as raised:
        read_pulseq(written.path)
    assert written.path in str(raised.value)


def edit(path: str, change: Any) -> str:
    """Change the lines of a file's blocks or its text, and leave out the signature of the old one."""
    text = Path(path).read_text().split("[SIGNATURE]")[0]
    Path(path).write_text(change(text))
    return path


def test_a_file_that_cannot_be_read_stops_the_scan(tmp_path: Path) -> None:
    for name, content in {
        "garbage.seq": b"no sequence\n",
        "empty.seq": b"",
        "bytes.seq": bytes(range(256)),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ScanError, match=rf"{name} cannot be read as a Pulseq file: \S"):
            read_pulseq(str(tmp_path / name))
    with pytest.raises(ScanError, match=r"the Pulseq file .*absent\.seq cannot be read: .*No such file"):
        read_pulseq(str(tmp_path / "absent.seq"))
    with pytest.raises(ScanError, match="is no file of at most 256 MiB"):
        read_pulseq(str(tmp_path))


def test_events_that_are_missing_stop_the_scan(tmp_path: Path) -> None:
    written = write_sequence(tmp_path / "a.seq")
    edit(written.path, lambda text: re.sub(r"\[RF\].*?\n\n", "", text, flags=re.DOTALL))
    with pytest.raises(ScanError, match=r"a\.seq cannot be read as a Pulseq file: KeyError \S"):
        read_pulseq(written.path)


def test_readouts_without_gradients_stop_the_scan(tmp_path: Path) -> None:
    written = write_sequence(tmp_path / "a.seq", arbitrary=False)
    # Columns of a block: number, duration, RF, gx, gy, gz, ADC, extension.
    edit(
        written.path,
        lambda text: re.sub(r"(?m)^( *\d+ +\d+ +\d+ +)[1-9]\d*( +0 +0 +[1-9]\d* +\d+)$", r"\g<1>0\2", text),
    )
    with pytest.raises(ScanError, match="has no gradient along x or y during its ADCs: expected spirals"):
        read_pulseq(written.path)


def test_slices_of_different_lengths_or_inversions_stop_the_scan(tmp_path: Path) -> None:
    written = write_sequence(tmp_path / "a.seq", slices=2, n_pulses=6)
    text = Path(written.path).read_text()
    blocks = re.search(r"\[BLOCKS\]\n(.*?)\n\n", text, re.DOTALL)
    assert blocks
    lines = blocks[1].splitlines()

    def with_blocks(kept: list[str]) -> str:
        numbered = [re.sub(r"^ *\d+", str(n), line) for n, line in enumerate(kept, start=1)]
        return edit(
            written.path, lambda _: text.split("[SIGNATURE]")[0].replace(blocks[1], "\n".join(numbered))
        )

    with pytest.raises(ScanError, match=r"its slices have \[6, 5\] excitations: expected the same train"):
        read_pulseq(with_blocks(lines[:-4]))
    readout = lines[-2].split()
    assert readout[6] != "0"
    readout[6] = "0"
    with pytest.raises(ScanError, match="its slices have their ADCs behind different pulses"):
        read_pulseq(with_blocks([*lines[:-2], " ".join(readout), lines[-1]]))
    second = [n for n, line in enumerate(lines) if line.split()[2] == lines[3].split()[2]][1]
    with pytest.raises(ScanError, match=r"slices 0 and 1 have inversion times 18\.22 and 0 ms"):
        read_pulseq(with_blocks([*lines[:second], *lines[second + 1 :]]))


# --- A sequence that others wrote --------------------------------------------------------------------

OPENMRF = Path(__file__).parents[3] / "shared/data/sequences"


@pytest.mark.skipif(
    not (OPENMRF / "test_mrf.seq").exists(), reason="the sequence of OpenMRF is not on this machine"
)
def test_a_sequence_of_openmrf() -> None:
    sequence = read_pulseq(str(OPENMRF / "test_mrf.seq"))
    assert sequence.train.n_timepoints == 1000
    np.testing.assert_array_equal(sequence.adc, [*[-1] * 100, *range(1000)])
    assert len(sequence.trajectories.points) == 48
    assert sequence.n_samples == 3072
    assert sequence.fov_mm == pytest.approx((256, 256))
    # Both come from six digits.
    listed = np.loadtxt(OPENMRF / "mrf_patterns_yun_fa.txt").ravel()
    np.testing.assert_allclose(sequence.train.flip_deg, listed, atol=1e-3)
    assert sequence.train.inversion_time_ms == pytest.approx(18.02, abs=1e-3)
    np.testing.assert_allclose(sequence.train.te_ms, 2.02, atol=1e-3)
    np.testing.assert_array_equal(sequence.receiver_deg, 0)
    assert sequence.measured.all()
