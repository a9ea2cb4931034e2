"""Slice profiles: the pulse as a rotation, checked by limits that are known."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from whorl.physics.sliceprofile import flip_profile, hann_sinc, read_rf_shape


def bloch_flip(shape: np.ndarray, time_bandwidth: float, flip_deg: float, place: float) -> float:
    """Flip angle (rad) of one isochromat, by rotating its magnetisation in three dimensions."""
    m = np.array([0.0, 0.0, 1.0])
    turn = 2 * np.pi * place * time_bandwidth / len(shape)
    about_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    for sample in shape / shape.sum():
        angle, phase = np.abs(sample) * np.deg2rad(flip_deg), np.angle(sample)
        axis = np.array([np.cos(phase), np.sin(phase), 0.0])
        m = m * np.cos(angle) + np.cross(axis, m) * np.sin(angle) + axis * (axis @ m) * (1 - np.cos(angle))
        m = about_z @ m
    return float(np.arccos(np.clip(m[2], -1, 1)))


def chirp(n: int) -> np.ndarray:
    at = np.linspace(-1, 1, n)
    return (1 - at**2) * np.exp(2j * at**2 + 0.7j * at)


@pytest.mark.parametrize("shape", [hann_sinc(4.0), chirp(90)], ids=["sinc", "phase-modulated"])
def test_equals_isochromats(shape: np.ndarray) -> None:
    flips = [12.0, 75.0, 150.0]
    profile = flip_profile(shape, 4.0, flips, 5)
    sides = (1,) if np.isreal(shape).all() else (-1, 1)
    places = np.sort(np.concatenate([side * (np.arange(5) + 0.5) / 5 * 1.0 for side in sides]))
    assert profile.shape == (len(places), 3)
    for p, place in enumerate(places):
        for t, flip in enumerate(flips):
            expected = bloch_flip(shape, 4.0, flip, place) / np.deg2rad(flip)
            assert abs(profile[p, t]) == pytest.approx(expected, abs=1e-7)  # arccos near 1


PULSES = {"sinc": np.sinc(6.0 * (np.arange(200) + 0.5 - 100) / 200) + 0j, "Hann": hann_sinc(6.0)}


@pytest.mark.parametrize("pulse", PULSES)
def test_small_flips_follow_the_fourier_transform(pulse: str) -> None:
    shape = PULSES[pulse]
    profile = flip_profile(shape, 6.0, [0.5], 20)[:, 0]
    places = (np.arange(20) + 0.5) / 20 * (0.5 + 2 / 6)
    at = (np.arange(len(shape)) + 0.5) / len(shape) - 0.5
    # That of a symmetric pulse is real; its side lobes have signs.
    expected = (np.exp(-2j * np.pi * 6.0 * places[:, None] * at) @ (shape / shape.sum())).real
    np.testing.assert_allclose(profile, expected, atol=1e-4)  # of the order of the angle squared
    assert (profile < -0.01).any() == (pulse == "sinc")
    # Half the angle at half the thickness from the centre: that is what thickness means.
    assert pulse != "Hann" or np.interp(0.5, places, profile) == pytest.approx(0.5, abs=0.02)


def test_the_centre_has_the_nominal_angle_and_the_rim_none() -> None:
    profile = flip_profile(hann_sinc(4.0), 4.0, [0.0, 30.0, 90.0, -90.0], 400)
    np.testing.assert_allclose(profile[0], 1, atol=1e-3)
    assert np.abs(profile[-1]).max() < 0.02
    np.testing.assert_array_equal(profile[:, 2], profile[:, 3])


@pytest.mark.parametrize("separator", [" ", ", ", ";", "\t"])
def test_a_pulse_from_a_file(tmp_path: Path, separator: str) -> None:
    shape, path = chirp(40), tmp_path / "pulse.txt"
    rows = [f"{abs(v)!r}{separator}{float(np.degrees(np.angle(v)))!r}" for v in shape.tolist()]
    path.write_text("# amplitude, phase\n" + "\n".join(rows), encoding="utf-8-sig")
    np.testing.assert_allclose(read_rf_shape(str(path)), shape / np.abs(shape).max(), atol=1e-12)
    path.write_text("\n".join(str(v) for v in hann_sinc(4.0).real.tolist()))
    expected = hann_sinc(4.0) / np.abs(hann_sinc(4.0)).max()
    np.testing.assert_allclose(read_rf_shape(str(path)), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("", "0 lines"),
        ("# nothing\n", "0 lines"),
        ("1\n2 3\n", "cannot be read"),
        ("1 2 3\n4 5 6\n", "of 3 numbers"),
        ("one\ntwo\n", "cannot be read"),
        ("1\nnan\n", "no numbers"),
        ("1\n-1\n", "no area"),
    ],
    ids=["no file", "empty", "comment", "ragged", "three columns", "words", "NaN", "no area"],
)
def test_files_that_are_no_pulse(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "pulse.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=says):
        read_rf_shape(str(path))


def test_angles_and_bandwidths_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="200°"):
        flip_profile(hann_sinc(4.0), 4.0, [30.0, 200.0])
    with pytest.raises(ValueError, match="time-bandwidth"):
        flip_profile(hann_sinc(4.0), 0.0, [30.0])


@pytest.mark.parametrize("shape", [*PULSES.values(), np.ones(100) + 0j], ids=[*PULSES, "rectangle"])
def test_the_signal_of_a_symmetric_pulse_is_that_of_its_isochromats(shape: np.ndarray) -> None:
    # After the rewinder, which has half the area of the slice gradient, the isochromats add up as vectors.
    profile = flip_profile(shape, 6.0, [5.0], 60)[:, 0] * np.deg2rad(5.0)
    places = (np.arange(60) + 0.5) / 60 * (0.5 + 2 / 6)
    total = 0j
    for place in np.concatenate([places, -places]):
        m = np.array([0.0, 0.0, 1.0])
        half = np.pi * place * 6.0 / len(shape)
        c, s = np.cos(half), np.sin(half)
        about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        for sample in shape.real / shape.real.sum():
            angle = sample * np.deg2rad(5.0)
            c, s = np.cos(angle), np.sin(angle)
            m = about_z @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ about_z @ m
        total += (m[0] + 1j * m[1]) * np.exp(-1j * np.pi * place * 6.0)
    # Of the order of the angle squared: at larger angles side lobes keep some phase.
    assert np.sin(profile).sum() == pytest.approx(abs(total) / 2, rel=5e-3)


def test_many_flip_angles_are_interpolated() -> None:
    flips = np.linspace(1, 90, 300)
    profile = flip_profile(hann_sinc(4.0), 4.0, flips, 6)
    for t in (0, 77, 299):
        np.testing.assert_allclose(
            profile[:, t], flip_profile(hann_sinc(4.0), 4.0, flips[[t]], 6)[:, 0], atol=1e-4
        )


def test_a_pipe_is_no_pulse(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="it is no file"):
        read_rf_shape(str(tmp_path / "pipe"))
