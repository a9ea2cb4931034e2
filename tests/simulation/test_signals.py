"""Signal trains against isochromats that are rotated one by one, and against closed formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from whorl.simulation.signals import Train, fisp_signals, jiang_train


def train_of(flip_deg: Any, *, tr_ms: float = 9.0, te_ms: float = 2.0, ti_ms: float = 20.0) -> Train:
    flip = np.asarray(flip_deg, dtype=float)
    return Train(flip, np.zeros_like(flip), np.full_like(flip, tr_ms), np.full_like(flip, te_ms), ti_ms)


def bloch(train: Train, t1_ms: float, t2_ms: float) -> NDArray[np.complex128]:
    """Mean of isochromats that turn by whole cycles across the voxel in each TR, by 3×3 rotations."""
    n = len(train) + 3  # more than the highest order: no order is mistaken for order 0
    m = np.zeros((3, n))
    m[2] = 1 - 2 * np.exp(-train.ti_ms / t1_ms)
    spin = 2 * np.pi * np.arange(n) / n
    signal = np.empty(len(train), dtype=complex)
    for t in range(len(train)):
        a, p = np.deg2rad(train.flip_deg[t]), np.deg2rad(train.phase_deg[t])
        to_axis = np.array([[np.cos(p), np.sin(p), 0], [-np.sin(p), np.cos(p), 0], [0, 0, 1]])
        about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
        m = to_axis.T @ about_x @ to_axis @ m
        signal[t] = np.mean(m[0] + 1j * m[1]) * np.exp(-1j * p - train.te_ms[t] / t2_ms)
        transverse = (m[0] + 1j * m[1]) * np.exp(1j * spin - train.tr_ms[t] / t2_ms)
        m = np.stack([transverse.real, transverse.imag, 1 + (m[2] - 1) * np.exp(-train.tr_ms[t] / t1_ms)])
    return signal


@pytest.mark.parametrize("n", [1, 2, 3, 40, 61])
def test_equals_isochromats(n: int) -> None:
    rng = np.random.default_rng(n)
    train = Train(
        flip_deg=rng.uniform(0, 170, n),
        phase_deg=rng.uniform(-180, 360, n),
        tr_ms=rng.uniform(5, 30, n),
        te_ms=rng.uniform(0, 5, n),
        ti_ms=13.0,
    )
    t1, t2 = [900.0, 60.0, 4000.0], [80.0, 50.0, 2500.0]
    signals = fisp_signals(train, t1, t2)
    assert signals.shape == (3, n)
    for tissue in range(3):
        np.testing.assert_allclose(signals[tissue], bloch(train, t1[tissue], t2[tissue]), atol=1e-12)


def test_tiny_pulses_watch_the_inversion_recovery() -> None:
    train = train_of(np.full(200, 1e-3))
    age = 20 + 9 * np.arange(200)
    expected = -1j * np.deg2rad(1e-3) * (1 - 2 * np.exp(-age / 700)) * np.exp(-2 / 90)
    # 200 pulses of 2e-5 rad take less than 1e-7 of the magnetisation.
    np.testing.assert_allclose(fisp_signals(train, [700.0], [90.0])[0], expected, atol=1e-6 * 2e-5)


def test_full_recovery_and_decay_to_the_echo() -> None:
    train = train_of([90.0, 90.0], tr_ms=1e5, te_ms=30.0, ti_ms=1e5)
    np.testing.assert_allclose(fisp_signals(train, [500.0], [60.0])[0], -1j * np.exp(-0.5), atol=1e-12)


def test_short_t2_reaches_the_ernst_steady_state() -> None:
    # With T2 << TR nothing transverse survives: a spoiled gradient echo.
    e1, a = np.exp(-9 / 300), np.deg2rad(25.0)
    expected = -1j * np.sin(a) * (1 - e1) / (1 - e1 * np.cos(a))
    signal = fisp_signals(train_of(np.full(400, 25.0), te_ms=0.0), [300.0], [0.2])[0, -1]
    assert signal == pytest.approx(expected, abs=1e-9)


def test_the_receiver_follows_the_rf_phase() -> None:
    plain = train_of([10.0, 50.0, 30.0, 70.0])
    # A phase that grows linearly is a shift in frequency, which whole cycles of dephasing hide.
    turned = Train(plain.flip_deg, np.array([0.0, 33, 66, 99]), plain.tr_ms, plain.te_ms, plain.ti_ms)
    jumping = Train(plain.flip_deg, np.array([0.0, 50, 0, 50]), plain.tr_ms, plain.te_ms, plain.ti_ms)
    reference = fisp_signals(plain, [800.0], [70.0])
    np.testing.assert_allclose(np.abs(fisp_signals(turned, [800.0], [70.0])[0, :2]), np.abs(reference[0, :2]))
    np.testing.assert_allclose(fisp_signals(turned, [800.0], [70.0])[0, 0], reference[0, 0])
    assert not np.allclose(fisp_signals(jumping, [800.0], [70.0]), reference)


def test_jiang_train() -> None:
    train = jiang_train(1000)
    assert len(train) == 1000
    assert train.flip_deg.min() == 0
    assert train.flip_deg.max() == pytest.approx(70)
    lobes = train.flip_deg.reshape(5, 200)
    np.testing.assert_allclose(lobes.max(axis=1), [30, 50, 70, 50, 30])
    np.testing.assert_array_equal(lobes[:, 190:], 0)
    np.testing.assert_array_equal(jiang_train(300).flip_deg, train.flip_deg[:300])
    assert (train.tr_ms[5], train.te_ms[5], train.ti_ms) == (9.0, 2.0, 20.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jiang_train(0), "timepoints is 0"),
        (lambda: train_of([]), "no timepoint"),
        (lambda: train_of([1.0], te_ms=10.0), "te_ms"),
        (lambda: train_of([1.0], ti_ms=-1.0), "ti_ms is -1"),
        (
            lambda: Train(np.ones(2), np.ones(3), np.ones(2), np.ones(2), 0.0),
            "2 flip angles and 3 .* phase_deg",
        ),
        (lambda: fisp_signals(train_of([1.0]), [1.0, 2.0], [1.0]), "same length"),
        (lambda: fisp_signals(train_of([1.0]), [0.0], [1.0]), "positive"),
    ],
)
def test_bad_values_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
