"""The spiral can be played by the gradients it was designed for, and fills k-space as told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from whorl.simulation.spiral import GAMMA_HZ_PER_T, cycles_per_pixel, design_spiral

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "small": {"matrix": 64, "interleaves": 16},
    "odd": {"matrix": 65, "fov_mm": 250.0, "interleaves": 24},
    "few": {"matrix": 64, "interleaves": 8},
    "long": {"matrix": 192, "interleaves": 24, "readout_ms": 6.0},
    "amplitude": {"max_gradient_mt_per_m": 25.0, "max_slew_t_per_m_s": 400.0, "readout_ms": 3.0},
    "short, slowed down": {"matrix": 32, "interleaves": 48, "readout_ms": 1.0},
    "not a multiple of the raster": {"matrix": 96, "interleaves": 48, "readout_ms": 2.2175},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_limits_hold_on_every_raster_point_and_k_max_is_reached(case: dict[str, Any]) -> None:
    spiral = design_spiral(**case)
    max_gradient = case.get("max_gradient_mt_per_m", 43.0) * 1e-3
    max_slew = case.get("max_slew_t_per_m_s", 180.0)
    gradient = spiral.gradient_t_per_m
    slew = np.diff(gradient) / (spiral.raster_us * 1e-6)

    assert gradient[0] == 0  # nothing plays before the readout
    assert np.abs(gradient).max() <= max_gradient
    assert np.abs(slew).max() <= max_slew
    # It is a fast spiral: somewhere one of the limits is nearly used up, unless it was slowed down.
    used = max(np.abs(gradient).max() / max_gradient, np.abs(slew).max() / spiral.slew_t_per_m_s)
    assert 0.99 < used <= 1.001

    k_max = case.get("matrix", 256) / (2 * case.get("fov_mm", 300.0) * 1e-3)
    # Independent integral: trapezia are exact for a gradient that is linear between raster points.
    times = spiral.raster_us * np.arange(len(gradient))
    end_us = case.get("readout_ms", 2.21) * 1e3
    fine = np.union1d(times[times < end_us], [end_us])
    played = np.interp(fine, times, gradient.real) + 1j * np.interp(fine, times, gradient.imag)
    end = GAMMA_HZ_PER_T * 1e-6 * np.sum((played[1:] + played[:-1]) / 2 * np.diff(fine))
    assert abs(end) == pytest.approx(k_max, rel=1e-6)  # as exact as the root that the design looks for
    assert spiral.k_per_m.shape == (case.get("interleaves", 96), round(end_us / 2.5))


def test_default_readout() -> None:
    spiral = design_spiral()
    assert spiral.k_per_m.shape == (96, 884)
    trajectory = cycles_per_pixel(spiral.k_per_m, 300 / 256)
    radius = np.hypot(trajectory[..., 0], trajectory[..., 1])
    assert trajectory.shape == (96, 884, 2)
    np.testing.assert_array_equal(radius[:, 0], 0)
    assert np.all(np.diff(radius[0]) > 0)
    assert 0.495 < radius.max() < 0.5
    assert trajectory.min() >= -0.5
    assert trajectory.max() < 0.5


def test_samples_lie_on_the_integral_of_the_gradient() -> None:
    spiral = design_spiral(matrix=64, interleaves=16)
    fine_us = np.arange(0, 2200.1, 0.5)
    raster = spiral.raster_us * np.arange(len(spiral.gradient_t_per_m))
    gradient = np.interp(fine_us, raster, spiral.gradient_t_per_m.real) + 1j * np.interp(
        fine_us, raster, spiral.gradient_t_per_m.imag
    )
    k = GAMMA_HZ_PER_T * 0.5e-6 * np.concatenate([[0], np.cumsum((gradient[1:] + gradient[:-1]) / 2)])
    np.testing.assert_allclose(spiral.k_per_m[0, :880], k[: 880 * 5 : 5], atol=1e-9 * abs(k).max())


def test_delayed_gradients_play_the_samples_of_an_earlier_time() -> None:
    spiral = design_spiral(matrix=64, interleaves=16)
    later, earlier = spiral.delayed(5.0).k_per_m, spiral.delayed(-2.5).k_per_m
    # Two samples later, one earlier; up to rounding.
    np.testing.assert_allclose(later[:, 2:], spiral.k_per_m[:, :-2], atol=1e-9)
    np.testing.assert_array_equal(later[:, :3], 0)
    np.testing.assert_allclose(earlier[:, :-1], spiral.k_per_m[:, 1:], atol=1e-9)
    # Beyond the end it goes on as before.
    steps = np.diff(earlier, axis=1)
    np.testing.assert_allclose(
        np.abs(steps[:, -1] - steps[:, -2]), np.abs(steps[:, -2] - steps[:, -3]), rtol=0.1
    )
    between = spiral.delayed(1.25).k_per_m[:, 1:]
    np.testing.assert_allclose(between, (spiral.k_per_m[:, 1:] + spiral.k_per_m[:, :-1]) / 2, atol=0.05)
    assert spiral.delayed(0.0) is spiral


def test_interleaves_are_rotations() -> None:
    k = design_spiral(matrix=64, interleaves=24).k_per_m
    for i in (1, 7, 23):
        np.testing.assert_allclose(k[i], k[0] * np.exp(2j * np.pi * i / 24), atol=1e-10)


def test_turns_are_twice_as_close_inside() -> None:
    spiral = design_spiral()
    k = spiral.k_per_m[0, 4:]  # near the centre there is no angle yet
    radius, angle = np.abs(k), np.unwrap(np.angle(k))
    # Growth of the radius over one turn, in units of the distance 1/fov: interleaves needed here.
    needed = 2 * np.pi * np.gradient(radius, angle) * 0.3
    edge = spiral.inner_radius * spiral.k_max_per_m
    assert 0.2 < spiral.inner_radius < 0.8
    inside = (radius > 0.1 * edge) & (radius < 0.98 * edge)
    outside = (radius > edge + 0.16 * spiral.k_max_per_m) & (radius < 0.99 * spiral.k_max_per_m)
    # The played spiral is a polygon in the gradient, hence per cents and not digits.
    np.testing.assert_allclose(needed[inside], 48, rtol=0.02)
    np.testing.assert_allclose(needed[outside], 96, rtol=0.02)


def test_too_short_a_readout_says_what_would_help() -> None:
    with pytest.raises(ValueError, match=r"8 interleaves of 2\.21 ms reach \d+ .* needs 427: take more"):
        design_spiral(interleaves=8)


@pytest.mark.parametrize(
    "bad",
    [
        {"matrix": 1},
        {"interleaves": 0},
        {"fov_mm": 0.0},
        {"fov_mm": float("nan")},
        {"readout_ms": -1.0},
        {"readout_ms": 0.002},
        {"max_slew_t_per_m_s": float("inf")},
        {"dwell_us": 0.0},
    ],
    ids=str,
)
def test_bad_values_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        design_spiral(**bad)
