"""EPG against isochromats that are rotated one by one, against closed formulas, and against itself.

Letters: T timepoints, N atoms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from whorl.physics import epg
from whorl.physics.epg import SignalModel, diffusion_rate, fisp_coefficients, fisp_signal, n_orders
from whorl.scan.train import Train

VECTORS = Path(__file__).parents[3] / "shared/data/epg/fisp_mrf_vectors.npz"

# Relaxation times (ms) of very unlike tissues: fat-like, tissue, fluid, and T2 = T1.
T1_MS = torch.tensor([260.0, 900.0, 4000.0, 60.0], dtype=torch.float64)
T2_MS = torch.tensor([45.0, 80.0, 2500.0, 60.0], dtype=torch.float64)


def train_of(
    flip_deg: Any, *, tr_ms: Any = 9.0, te_ms: Any = 2.0, phase_deg: Any = 0.0, ti_ms: float | None = 20.0
) -> Train:
    flip = np.atleast_1d(np.asarray(flip_deg, dtype=float))
    tr, te, phase = (x + np.zeros_like(flip) for x in (tr_ms, te_ms, phase_deg))
    return Train(flip, tr, te, phase, ti_ms, "test")


def random_train(T: int, *, phase: str = "none", seed: int = 5) -> Train:
    rng = np.random.default_rng(seed + T)
    count = np.arange(T)
    phases = {
        "none": 0 * count,
        "alternating": 180 * count,
        "quadratic": 117 / 2 * count * (count + 1),
        "random": rng.uniform(-180, 540, T),
    }
    return train_of(
        rng.uniform(0, 170, T),
        tr_ms=rng.uniform(5, 30, T),
        te_ms=rng.uniform(0, 5, T),
        phase_deg=phases[phase],
    )


def bloch(train: Train, t1_ms: float, t2_ms: float, b1: float = 1.0) -> NDArray[np.complex128]:
    """Mean of isochromats that turn by whole cycles across the voxel in each TR.

    The pulse turns about the axis that makes positive transverse magnetisation out of +z in the frame
    of its own phase; so does the receiver.
    """
    T = train.n_timepoints
    n = T + 1  # more than the highest order: no order is mistaken for order 0
    spin = np.exp(2j * np.pi * np.arange(n) / n)
    inversion = train.inversion_time_ms
    z = np.full(n, 1.0 if inversion is None else 1 - 2 * np.exp(-inversion / t1_ms))
    xy = np.zeros(n, dtype=complex)
    signal = np.empty(T, dtype=complex)
    for t in range(T):
        angle, frame = np.deg2rad(train.flip_deg[t]) * b1, np.exp(1j * np.deg2rad(train.phase_deg[t]))
        seen = xy * frame.conj()
        along, across = seen.real, seen.imag
        seen = along * np.cos(angle) + z * np.sin(angle) + 1j * across
        z = z * np.cos(angle) - along * np.sin(angle)
        signal[t] = seen.mean() * np.exp(-train.te_ms[t] / t2_ms)
        xy = seen * frame * spin * np.exp(-train.tr_ms[t] / t2_ms)
        z = 1 + (z - 1) * np.exp(-train.tr_ms[t] / t1_ms)
    return signal


@pytest.mark.parametrize("phase", ["none", "alternating", "quadratic", "random"])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 40, 61])
def test_equals_isochromats(T: int, phase: str) -> None:
    train = random_train(T, phase=phase)
    signal = fisp_signal(train, T1_MS, T2_MS, tolerance=0, dtype=torch.float64)
    assert signal.shape == (4, T)
    # Only phases other than 0 and 180 degrees cost complex arithmetic; a single pulse never does.
    assert signal.is_complex() == (phase in ("quadratic", "random") and T > 1)
    for atom in range(4):
        expected = bloch(train, float(T1_MS[atom]), float(T2_MS[atom]))
        # Both are exact; float64 rounding of at most 61 pulses, and of the angles 180 t.
        np.testing.assert_allclose(signal[atom].numpy(), expected, atol=2e-12)


def test_b1_scales_the_flip_angles_of_its_atom() -> None:
    train = random_train(31)
    b1 = torch.tensor([0.7, 1.0, 1.25, 0.9], dtype=torch.float64)
    signal = fisp_signal(train, T1_MS, T2_MS, b1, tolerance=0, dtype=torch.float64)
    for atom in range(4):
        expected = bloch(train, float(T1_MS[atom]), float(T2_MS[atom]), float(b1[atom]))
        np.testing.assert_allclose(signal[atom].numpy(), expected, atol=1e-12)  # float64 rounding


def test_b1_with_complex_phases() -> None:
    train = random_train(24, phase="quadratic")
    b1 = torch.tensor([0.7, 1.0, 1.25, 0.9], dtype=torch.float64)
    signal = fisp_signal(train, T1_MS, T2_MS, b1, tolerance=0, dtype=torch.float64)
    for atom in range(4):
        expected = bloch(train, float(T1_MS[atom]), float(T2_MS[atom]), float(b1[atom]))
        np.testing.assert_allclose(signal[atom].numpy(), expected, atol=1e-12)  # float64 rounding


def test_tiny_pulses_watch_the_inversion_recovery() -> None:
    T, flip_deg = 200, 1e-5
    signal = fisp_signal(train_of(np.full(T, flip_deg)), T1_MS, T2_MS, tolerance=0, dtype=torch.float64)
    a, age = np.deg2rad(flip_deg), 20 + 9 * np.arange(T)
    t1, t2 = T1_MS.numpy()[:, None], T2_MS.numpy()[:, None]
    expected = a * (1 - 2 * np.exp(-age / t1)) * np.exp(-2 / t2)
    # Echoes need three pulses, of which there are fewer than T² for each time; the rest is rounding.
    np.testing.assert_allclose(signal.numpy(), expected, rtol=1e-9, atol=T**2 * a**3)


def test_no_inversion_starts_at_equilibrium() -> None:
    signal = fisp_signal(train_of([90.0, 0.0], te_ms=0.0, ti_ms=None), T1_MS, T2_MS, dtype=torch.float64)
    np.testing.assert_allclose(signal[:, 0].numpy(), 1, atol=1e-15)
    # The whole magnetisation is transverse and dephased: a pulse of 0 degrees sees nothing.
    np.testing.assert_allclose(signal[:, 1].numpy(), 0, atol=1e-15)


def test_inversion_without_delay_is_upside_down() -> None:
    signal = fisp_signal(train_of([90.0], te_ms=0.0, ti_ms=0.0), T1_MS, T2_MS, dtype=torch.float64)
    np.testing.assert_allclose(signal[:, 0].numpy(), -1, atol=1e-15)


def test_short_t2_reaches_the_ernst_steady_state() -> None:
    # With T2 << TR nothing transverse survives: a spoiled gradient echo.
    t1, t2 = torch.tensor([300.0, 900.0]), torch.tensor([0.2, 0.2])
    e1, a = np.exp(-9 / np.array([300.0, 900.0])), np.deg2rad(25.0)
    signal = fisp_signal(train_of(np.full(600, 25.0), te_ms=0.0), t1, t2, dtype=torch.float64)
    expected = np.sin(a) * (1 - e1) / (1 - e1 * np.cos(a))
    # exp(-9 / 0.2) = 3e-20; the transient has decayed to (e1 cos a)^600 < 1e-25.
    np.testing.assert_allclose(signal[:, -1].numpy(), expected, rtol=1e-12)


def test_long_trains_reach_the_fisp_steady_state() -> None:
    # Ideal unbalanced SSFP, closed form of Hänicke & Vogel, Magn Reson Med 49:771 (2003).
    t1, t2, tr, a = 400.0, 60.0, 10.0, np.deg2rad(40.0)
    e1, e2 = np.exp(-tr / t1), np.exp(-tr / t2)
    p = 1 - e1 * np.cos(a) - e2**2 * (e1 - np.cos(a))
    q = e2 * (1 - e1) * (1 + np.cos(a))
    expected = np.tan(a / 2) * (1 - (e1 - np.cos(a)) * (1 - e2**2) / np.sqrt(p**2 - q**2))
    train = train_of(np.full(700, 40.0), tr_ms=tr, te_ms=0.0)
    signal = fisp_signal(train, torch.tensor([t1]), torch.tensor([t2]), tolerance=1e-12, dtype=torch.float64)
    # The last orders cannot all return before the train ends, but those that matter did.
    assert float(signal[0, -1]) == pytest.approx(expected, rel=1e-9)


def test_an_alternating_phase_equals_alternating_flip_angles() -> None:
    plain = random_train(33)
    sign = np.where(np.arange(33) % 2, -1.0, 1.0)
    flips = train_of(plain.flip_deg * sign, tr_ms=plain.tr_ms, te_ms=plain.te_ms)
    turned = train_of(plain.flip_deg, tr_ms=plain.tr_ms, te_ms=plain.te_ms, phase_deg=180 * np.arange(33))
    expected = fisp_signal(flips, T1_MS, T2_MS, tolerance=0, dtype=torch.float64).numpy() * sign
    result = fisp_signal(turned, T1_MS, T2_MS, tolerance=0, dtype=torch.float64).numpy()
    np.testing.assert_allclose(result, expected, atol=1e-13)  # rounding


@pytest.mark.parametrize("step_deg", [0.0, 33.0])
def test_a_constant_or_linear_phase_changes_nothing(step_deg: float) -> None:
    # A phase that grows linearly is a shift in frequency, which whole cycles of dephasing hide.
    plain = random_train(33)
    phase = 77.0 + step_deg * np.arange(33)
    turned = train_of(plain.flip_deg, tr_ms=plain.tr_ms, te_ms=plain.te_ms, phase_deg=phase)
    expected = fisp_signal(plain, T1_MS, T2_MS, tolerance=0, dtype=torch.float64)
    result = fisp_signal(turned, T1_MS, T2_MS, tolerance=0, dtype=torch.float64)
    assert float((result - expected).abs().max()) < 1e-13  # rounding


def test_a_quadratic_phase_does() -> None:
    plain, spoiled = random_train(33), random_train(33, phase="quadratic")
    assert not torch.allclose(
        fisp_signal(plain, T1_MS, T2_MS).to(torch.complex64), fisp_signal(spoiled, T1_MS, T2_MS), atol=0.05
    )


@pytest.mark.parametrize("phase", ["none", "quadratic"])
def test_single_precision(phase: str) -> None:
    train = random_train(150, phase=phase)
    fine = fisp_signal(train, T1_MS, T2_MS, tolerance=0, dtype=torch.float64)
    coarse = fisp_signal(train, T1_MS.float(), T2_MS.float(), tolerance=0)
    assert coarse.dtype == (torch.float32 if phase == "none" else torch.complex64)
    # 150 pulses of float32 rounding (6e-8) that add up at worst in proportion.
    assert float((coarse - fine).abs().max()) < 3e-6


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3, 1e-5])
def test_tolerance_bounds_the_error(tolerance: float) -> None:
    T = 201
    train = train_of(40 + 30 * np.sin(np.arange(T) / 20), tr_ms=np.linspace(8, 14, T))
    t1, t2 = torch.tensor([4000.0, 4000.0, 1000.0, 900.0]), torch.tensor([2500.0, 800.0, 150.0, 30.0])
    exact = fisp_signal(train, t1, t2, tolerance=0, dtype=torch.float64)
    # Each atom alone: in company it keeps as many orders as the longest T2 of its chunk.
    alone = torch.cat(
        [
            fisp_signal(train, t1[i : i + 1], t2[i : i + 1], tolerance=tolerance, dtype=torch.float64)
            for i in range(4)
        ]
    )
    # What an order that is dropped would have brought back is at most `tolerance` of M0 = 1.
    assert float((alone - exact).abs().max()) < tolerance
    together = fisp_signal(train, t1, t2, tolerance=tolerance, dtype=torch.float64)
    assert float((together - exact).abs().max()) < tolerance


def test_tolerance_saves_orders() -> None:
    train = train_of(np.full(500, 30.0))
    assert n_orders(train, 60.0) == int(np.ceil(60 * np.log(1000) / 18)) + 1
    assert n_orders(train, 60.0, 1e-2) < n_orders(train, 60.0, 1e-3)
    assert n_orders(train, 1e6) == 250  # none above can return in 500 pulses


def test_many_atoms_equal_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Several chunks of atoms in no order: each must come back to its own place.
    T, N = 60, 401
    monkeypatch.setattr(epg, "_CHUNK_ELEMENTS", 3000)  # 100 atoms or more at a time
    rng = np.random.default_rng(8)
    t1 = torch.tensor(np.exp(rng.uniform(np.log(50), np.log(4000), N)), dtype=torch.float32)
    t2 = t1 * torch.tensor(rng.uniform(0.02, 1, N), dtype=torch.float32)
    b1 = torch.tensor(rng.uniform(0.7, 1.2, N), dtype=torch.float32)
    train = random_train(T)
    signal = fisp_signal(train, t1, t2, b1, tolerance=0)
    for i in rng.integers(0, N, 12).tolist():
        one = fisp_signal(train, t1[i : i + 1], t2[i : i + 1], b1[i : i + 1], tolerance=0)
        # Vectorised and scalar remainder loops may round the last bit differently.
        np.testing.assert_allclose(signal[i : i + 1].numpy(), one.numpy(), atol=2e-6)


def test_zero_flip_angles_are_legal() -> None:
    train = train_of([0.0, 30.0, 0.0, 0.0, 50.0, 0.0])
    expected = bloch(train, 900.0, 80.0)
    signal = fisp_signal(train, T1_MS[1:2], T2_MS[1:2], tolerance=0, dtype=torch.float64)
    np.testing.assert_allclose(signal[0].numpy(), expected, atol=1e-13)


@pytest.mark.parametrize(
    ("t1", "t2", "b1", "message"),
    [
        (torch.ones(3), torch.ones(2), None, "common length"),
        (torch.ones(3), torch.ones(3), torch.ones(2), "common length"),
        (torch.ones(3, 1), torch.ones(3, 1), None, "common length"),
        (torch.tensor([1.0, 0.0]), torch.ones(2), None, "positive"),
        (torch.ones(2), torch.tensor([1.0, -1.0]), None, "positive"),
        (torch.tensor([1.0, float("nan")]), torch.ones(2), None, "positive"),
    ],
    ids=["lengths", "b1 length", "two axes", "T1 = 0", "T2 < 0", "NaN"],
)
def test_bad_tissues_are_refused(t1: torch.Tensor, t2: torch.Tensor, b1: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fisp_signal(train_of([30.0]), t1, t2, b1)


# --- What a real scanner adds ---------------------------------------------------------------------------


@pytest.mark.parametrize("efficiency", [0.0, 0.6, 0.95])
def test_an_incomplete_inversion(efficiency: float) -> None:
    # A first pulse of 90 degrees shows the recovered magnetisation.
    train = train_of([90.0], te_ms=0.0, ti_ms=70.0)
    model = SignalModel(inversion_efficiency=efficiency)
    signal = fisp_signal(train, T1_MS, T2_MS, model=model, dtype=torch.float64)
    expected = 1 - (1 + efficiency) * np.exp(-70.0 / T1_MS.numpy())
    np.testing.assert_allclose(signal[:, 0].numpy(), expected, rtol=1e-13)
    # Where there is no inversion there is no efficiency.
    plain = train_of([90.0], te_ms=0.0, ti_ms=None)
    assert fisp_signal(plain, T1_MS, T2_MS, model=model, dtype=torch.float64)[:, 0].tolist() == [1.0] * 4


@pytest.mark.parametrize("phase", ["none", "quadratic"])
@pytest.mark.parametrize("varying", [False, True], ids=["P x 1", "P x T"])
def test_a_slice_profile_is_the_mean_of_its_places(phase: str, varying: bool) -> None:
    train = random_train(37, phase=phase)
    rng = np.random.default_rng(0)
    profile = rng.uniform(0, 1.1, (3, 37 if varying else 1))
    b1 = torch.tensor([0.7, 1.0, 1.25, 0.9], dtype=torch.float64)
    model = SignalModel(profile=profile)
    signal = fisp_signal(train, T1_MS, T2_MS, b1, model=model, tolerance=0, dtype=torch.float64)
    for atom in range(4):
        parts = []
        for place in profile:
            played = train_of(
                train.flip_deg * place, tr_ms=train.tr_ms, te_ms=train.te_ms, phase_deg=train.phase_deg
            )
            parts.append(bloch(played, float(T1_MS[atom]), float(T2_MS[atom]), float(b1[atom])))
        np.testing.assert_allclose(signal[atom].numpy(), np.mean(parts, axis=0), atol=1e-12)  # rounding


def test_diffusion_takes_the_spin_echo_s_known_share() -> None:
    # 90° - TR - 180° - TR: the echo of two gradients of equal area loses exp(-D k² τ (1/3 + 1/3)).
    t1, t2, rate, tr = torch.tensor([1e6]), torch.tensor([100.0]), 0.02, 12.0
    train = train_of([90.0, 180.0, 0.0], tr_ms=tr, te_ms=0.0, ti_ms=None)
    signal = fisp_signal(
        train, t1, t2, model=SignalModel(diffusion_per_ms=rate), tolerance=0, dtype=torch.float64
    )
    expected = np.exp(-2 * tr / 100) * np.exp(-rate * 2 * tr / 3)
    assert abs(float(signal[0, 2])) == pytest.approx(expected, rel=1e-4)  # T1 of 1000 s recovers 2e-5


def test_diffusion_takes_the_stimulated_echo_s_known_share() -> None:
    # 90° - τ - 90° - pause - 90° - τ: exp(-D k² (2τ/3 + pause)), Tanner, J Chem Phys 52:2523 (1970). The
    # pause is one TR, in which the longitudinal order is 1.
    rate, tau, pause = 0.02, 10.0, 35.0
    t1, t2 = torch.tensor([1e7]), torch.tensor([100.0])
    train = train_of([90.0, 90.0, 90.0, 0.0], tr_ms=[tau, pause, tau, tau], te_ms=0.0, ti_ms=None)
    model = SignalModel(diffusion_per_ms=rate)
    free, damped = (
        abs(float(fisp_signal(train, t1, t2, model=m, tolerance=0, dtype=torch.float64)[0, 3]))
        for m in (SignalModel(), model)
    )
    # Half the magnetisation is stored, half of that comes back; no other path ends in order 0 here.
    assert free == pytest.approx(0.5 * np.exp(-2 * tau / 100), rel=1e-4)
    assert damped / free == pytest.approx(np.exp(-rate * (2 * tau / 3 + pause)), rel=1e-4)


def test_diffusion_in_units_of_the_laboratory() -> None:
    # Water, 2 µm²/ms; 4π over a slice of 5 mm: k = 2513 rad/m; D k² = 2e-9 · 2513² / s = 12.6 / 1000 s.
    assert diffusion_rate(2.0, 2 / 5) == pytest.approx(2e-9 * (4 * np.pi / 5e-3) ** 2 / 1e3, rel=1e-12)


@pytest.mark.parametrize("phase", ["none", "quadratic"])
@pytest.mark.parametrize("n_atoms", [7, 700], ids=["B1 of each", "shared B1"])
def test_coefficients_are_projected_signals(phase: str, n_atoms: int) -> None:
    train = random_train(41, phase=phase)
    rng = np.random.default_rng(1)
    t1 = torch.tensor(np.geomspace(60, 3000, n_atoms), dtype=torch.float32)
    t2 = t1 * torch.tensor(rng.uniform(0.05, 1, n_atoms), dtype=torch.float32)
    b1 = torch.tensor([0.8, 1.0, 1.15])[torch.arange(n_atoms) % 3]
    model = SignalModel(0.9, np.array([[1.0], [0.6]]), 1e-3)
    signal = fisp_signal(train, t1, t2, b1, model=model)
    basis = torch.linalg.qr(
        torch.randn((41, 5), generator=torch.Generator().manual_seed(0)).to(signal.dtype)
    )[0]
    coefficients, energies = fisp_coefficients(train, t1, t2, b1, basis, model=model)
    torch.testing.assert_close(coefficients, signal @ basis.conj(), rtol=0, atol=2e-6)
    torch.testing.assert_close(energies, signal.abs().square().sum(1), rtol=1e-5, atol=0)
    # Atoms that share their B1 are worked on together, the others each with its own.
    one = fisp_signal(train, t1[5:6], t2[5:6], b1[5:6], model=model)
    torch.testing.assert_close(signal[5:6], one, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inversion_efficiency": 1.1}, "efficiency is 1.1: expected 0 to 1"),
        ({"inversion_efficiency": float("nan")}, "efficiency is nan"),
        ({"diffusion_per_ms": -1.0}, "expected 0 or more"),
        ({"profile": np.ones(3)}, r"shape \(3,\)"),
        ({"profile": np.zeros((3, 1))}, "no signal"),
        ({"profile": np.full((3, 1), np.nan)}, "finite"),
        ({"profile": np.ones((2, 5))}, "5 timepoints, the train has 1"),
    ],
)
def test_impossible_models_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fisp_signal(train_of([30.0]), T1_MS, T2_MS, model=SignalModel(**change))


@pytest.mark.skipif(not VECTORS.exists(), reason="the reference vectors of other programs are not at hand")
@pytest.mark.parametrize("case", ["TR9_TI20_ideal", "yunTR_TI20_ideal", "TR9_TI20_invMz-0.95_B1_0.9"])
def test_equals_other_programs(case: str) -> None:
    with np.load(VECTORS) as vectors:
        flip, tr = vectors["FA_deg"], vectors[f"{case}__TR_ms"]
        t1, t2 = vectors["T1_ms"], vectors["T2_ms"]
        expected = {
            te: vectors[f"{case}__{name}"] for te, name in ((0.0, "blochsim_TE0"), (2.0, "numpy_TE2ms"))
        }
    real = "invMz" in case
    model, b1 = (
        SignalModel(inversion_efficiency=0.95 if real else 1.0),
        torch.full((6,), 0.9 if real else 1.0),
    )
    for te, reference in expected.items():
        train = train_of(flip, tr_ms=tr, te_ms=te)
        signal = fisp_signal(train, torch.tensor(t1), torch.tensor(t2), b1, model=model, tolerance=0)
        # Their signals are complex with one phase; float32 over 1000 pulses.
        phase = np.exp(-1j * np.angle((reference * signal.numpy()).sum()))
        np.testing.assert_allclose(signal.numpy(), (reference * phase), atol=2e-5)
