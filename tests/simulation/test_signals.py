"""Signal trains against isochromats that are rotated one by one, and against closed formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from whorl.simulation.signals import Train, expand_signals, fisp_signals, jiang_train


def train_of(flip_deg: Any, *, tr_ms: float = 9.0, te_ms: float = 2.0, ti_ms: float = 20.0) -> Train:
    flip = np.asarray(flip_deg, dtype=float)
    return Train(flip, np.zeros_like(flip), np.full_like(flip, tr_ms), np.full_like(flip, te_ms), ti_ms)


def scaled(train: Train, factor: float) -> Train:
    return Train(train.flip_deg * factor, train.phase_deg, train.tr_ms, train.te_ms, train.ti_ms)


def random_train(n: int, seed: int) -> Train:
    rng = np.random.default_rng(seed)
    return Train(
        flip_deg=rng.uniform(0, 170, n),
        phase_deg=rng.uniform(-180, 360, n),
        tr_ms=rng.uniform(5, 30, n),
        te_ms=rng.uniform(0, 5, n),
        ti_ms=13.0,
    )


def bloch(train: Train, t1_ms: float, t2_ms: float, efficiency: float = 1.0) -> NDArray[np.complex128]:
    """Mean of isochromats that turn by whole cycles across the voxel in each TR, by 3×3 rotations."""
    n = len(train) + 3  # more than the highest order: no order is mistaken for order 0
    m = np.zeros((3, n))
    m[2] = 1 + (-efficiency - 1) * np.exp(-train.ti_ms / t1_ms)
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
    train = random_train(n, seed=n)
    t1, t2 = [900.0, 60.0, 4000.0], [80.0, 50.0, 2500.0]
    signals = fisp_signals(train, t1, t2)
    assert signals.shape == (3, n)
    for tissue in range(3):
        np.testing.assert_allclose(signals[tissue], bloch(train, t1[tissue], t2[tissue]), atol=1e-12)


def test_equals_isochromats_in_any_field_after_any_inversion_across_the_slice() -> None:
    train = random_train(30, seed=3)
    t1, t2, b1 = [900.0, 60.0, 4000.0], [80.0, 50.0, 2500.0], [0.7, 1.25, 0.0]
    profile = (0.3, 1.1, 1.0, 0.3)
    signals = fisp_signals(train, t1, t2, b1=b1, inversion_efficiency=0.9, slice_profile=profile)
    for m in range(3):
        positions = [bloch(scaled(train, b1[m] * factor), t1[m], t2[m], 0.9) for factor in profile]
        np.testing.assert_allclose(signals[m], np.mean(positions, axis=0), atol=1e-12)


def test_an_ideal_slice_in_a_nominal_field_is_the_default() -> None:
    train, t1, t2 = random_train(40, seed=4), [900.0, 60.0], [80.0, 50.0]
    default = fisp_signals(train, t1, t2)
    np.testing.assert_array_equal(fisp_signals(train, t1, t2, slice_profile=(1.0,)), default)
    np.testing.assert_array_equal(fisp_signals(train, t1, t2, inversion_efficiency=1.0), default)
    np.testing.assert_allclose(fisp_signals(train, t1, t2, b1=[1.0, 1.0]), default, atol=1e-14)
    # Half of the slice sees no pulse.
    np.testing.assert_allclose(fisp_signals(train, t1, t2, slice_profile=(1.0, 0.0)), default / 2, atol=1e-14)


def test_efficiency_is_what_the_inversion_leaves() -> None:
    flip, age = np.deg2rad(1e-3), 20 + 9 * np.arange(200)
    for efficiency in (0.0, 0.6, 0.95):
        # The inversion depends neither on the field nor on the position: both only scale tiny pulses.
        signal = fisp_signals(
            train_of(np.full(200, 1e-3)),
            [700.0],
            [90.0],
            b1=[0.5],
            inversion_efficiency=efficiency,
            slice_profile=(1.0, 0.2),
        )[0]
        recovered = 1 - (1 + efficiency) * np.exp(-age / 700)
        np.testing.assert_allclose(signal, -1j * flip * 0.5 * 0.6 * recovered * np.exp(-2 / 90), atol=2e-11)


@pytest.mark.parametrize(
    ("n", "low", "high"),
    [(40, (0.8, 0.85, 1.0), (1.2, 0.95, 1.0)), (3, (0.2, 1.0, 0.5), (1.8, 1.1, 1.5))],
    ids=["long", "short"],
)
@pytest.mark.parametrize("spread", [0.0, 0.3], ids=["fixed relaxation", "varying relaxation"])
def test_expansion_equals_the_signal_at_each_field_and_relaxation(
    n: int, low: Any, high: Any, spread: float
) -> None:
    train, t1, t2 = random_train(n, seed=5), [2900.0, 300.0, 800.0], [2000.0, 40.0, 60.0]
    slice_of: dict[str, Any] = {"inversion_efficiency": 0.8, "slice_profile": (0.4, 1.0)}
    # Ranges of the three factors are all different.
    least = np.stack([low, np.full(3, 1 - spread / 2), np.full(3, 1 - spread)], axis=1)
    most = np.stack([high, np.full(3, 1 + spread), np.full(3, 1 + 1.5 * spread)], axis=1)
    expansion = expand_signals(train, t1, t2, least, most, **slice_of)
    assert len(expansion.components) <= n
    largest = np.abs(fisp_signals(train, t1, t2, **slice_of)).max()
    for m in range(3):
        inside = np.random.default_rng(m).uniform(least[m], most[m], (50, 3))
        factors = np.concatenate([least[m : m + 1], most[m : m + 1], inside])
        b1, t1_here, t2_here = factors[:, 0], t1[m] * factors[:, 1], t2[m] * factors[:, 2]
        expected = fisp_signals(train, t1_here, t2_here, b1=b1, **slice_of)
        both = [
            expansion.weights(m, factors, some) @ expansion.components[some]
            for some in (slice(2), slice(2, None))
        ]
        # What is promised.
        np.testing.assert_allclose(both[0] + both[1], expected, atol=2e-5 * largest)


def test_expansion_of_a_whole_fingerprint_is_short() -> None:
    train, t1, t2 = jiang_train(200), 2900.0, 2000.0
    expansion = expand_signals(train, [t1], [t2], [[0.8, 1, 1]], [[1.2, 1, 1]])
    b1 = np.linspace(0.8, 1.2, 101)
    factors = np.stack([b1, np.ones(101), np.ones(101)], axis=1)
    expected = fisp_signals(train, np.full(101, t1), np.full(101, t2), b1=b1)
    error = expansion.weights(0, factors, slice(None)) @ expansion.components - expected
    assert np.abs(error).max() < 2e-5 * np.abs(expected).max()
    # 200 pulses of 20° on average turn by 70 rad, ±14 in this field: 2 * 14 and as many for the edges.
    assert len(expansion.components) < 56


def test_no_pulses_no_components() -> None:
    low, high = [[0.8, 0.9, 0.9]], [[1.2, 1.1, 1.1]]
    assert len(expand_signals(train_of(np.zeros(5)), [900.0], [80.0], low, high).components) == 0


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
        (
            lambda: fisp_signals(train_of([1.0]), [9.0], [1.0], b1=[1.0, 1.0]),
            r"b1 has shape \(2,\): expected \(1,\)",
        ),
        (lambda: fisp_signals(train_of([1.0]), [9.0], [1.0], b1=[-0.1]), "b1 .* -0.1: expected at least 0"),
        (lambda: fisp_signals(train_of([1.0]), [9.0], [1.0], b1=[np.nan]), "b1 .* nan"),
        (
            lambda: fisp_signals(train_of([1.0]), [9.0], [1.0], inversion_efficiency=1.1),
            "inversion_efficiency is 1.1: expected 0 to 1",
        ),
        (
            lambda: fisp_signals(train_of([1.0]), [9.0], [1.0], inversion_efficiency=np.nan),
            "efficiency is nan",
        ),
        (lambda: fisp_signals(train_of([1.0]), [9.0], [1.0], slice_profile=(0.0, 0.0)), "not all of them 0"),
        (lambda: fisp_signals(train_of([1.0]), [9.0], [1.0], slice_profile=(1.0, np.inf)), "finite factors"),
    ],
)
def test_bad_values_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
