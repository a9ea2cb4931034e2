"""What the gradient system makes of a trajectory: against exact delays, a filter in closed form, and a
simulation in the time domain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from scan_edit import Scan
from whorl.scan.failure import ScanError
from whorl.scan.girf import Girf, corrected, read_girf
from whorl.simulation.gradients import play
from whorl.simulation.scan import simulate
from whorl.simulation.spiral import Spiral, design_spiral
from whorl.simulation.truth import read_truth

_REAL = Path(__file__).parents[3] / "shared/data/girf/girf_10us.npy"
N = 20000
HZ = (np.arange(N) - N // 2) * 5.0


def spiral(n: int = 12) -> Spiral:
    # With 12 interleaves the spiral turns more slowly than a scanner's, and still fills 64² over 300 mm.
    return design_spiral(matrix=64, fov_mm=300, interleaves=n, readout_ms=2.2)


def pairs(k: NDArray[np.complex128]) -> NDArray[np.float64]:
    return np.stack([k.real, k.imag], axis=-1)


def response(**terms: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """`(3, 4, N)`; terms by name, as xy: played along x, seen along y (0: the constant field)."""
    full = np.zeros((3, 4, N), dtype=np.complex128)
    for axis in range(3):
        full[axis, axis + 1] = 1
    for name, values in terms.items():
        full["xyz".index(name[0]), "0xyz".index(name[1])] = values
    return full


def low_pass(us: float) -> NDArray[np.complex128]:
    return 1 / (1 + 2j * np.pi * HZ * us * 1e-6)


def synthetic() -> NDArray[np.complex128]:
    """As measured ones are: slower along y than along x, some cross talk, some constant field."""
    return response(
        xx=low_pass(9.0), yy=low_pass(14.0), xy=0.01 * low_pass(60.0), yx=-0.02 * low_pass(40.0),
        x0=2e-3 * low_pass(200.0), y0=-1e-3 * low_pass(90.0),
    )  # fmt: skip


@pytest.mark.parametrize("delay_us", [3.7, -2.2, 25.0])
def test_delays(tmp_path: Path, delay_us: float) -> None:
    one = spiral()
    k, true = pairs(one.k_per_m), pairs(one.delayed(delay_us).k_per_m)
    k_max = np.abs(k).max()
    assert np.abs(true - k).max() > 0.005 * k_max
    # A gradient that comes early needs what follows the last sample.
    inside = slice(0, -20 if delay_us < 0 else None)
    plain, phase = corrected(k, one.dwell_us, None, (delay_us, delay_us))
    assert phase is None
    np.testing.assert_allclose(plain[:, inside], true[:, inside], atol=2e-5 * k_max)
    np.save(tmp_path / "delay.npy", np.exp(-2j * np.pi * HZ * delay_us * 1e-6))
    filtered, phase = corrected(k, one.dwell_us, read_girf(str(tmp_path / "delay.npy")))
    # Its band ends at 50 kHz, where neither a delay nor the corner with which the gradient begins do.
    np.testing.assert_allclose(filtered[:, inside], true[:, inside], atol=3e-4 * k_max)
    assert phase is not None
    assert not phase.any()


def test_delays_of_both_axes() -> None:
    one = spiral()
    k = pairs(one.k_per_m)
    moved, _ = corrected(k, one.dwell_us, None, (4.0, 0.0))
    np.testing.assert_array_equal(moved[..., 1], k[..., 1])
    np.testing.assert_allclose(moved[..., 0], pairs(one.delayed(4.0).k_per_m)[..., 0], atol=2e-3)


def test_a_low_pass_in_closed_form() -> None:
    # Through exp(-t / τ) / τ, a trajectory k = a t² becomes a (t² - 2 τ t + 2 τ² (1 - exp(-t / τ))).
    tau_us, a = 30.0, 4e7
    t = np.arange(900) * 2.5e-6
    k = np.zeros((1, len(t), 2))
    k[0, :, 0] = a * t**2
    girf = Girf(response(xx=low_pass(tau_us)), 10.0, "here")
    played, _ = corrected(k, 2.5, girf)
    tau = tau_us * 1e-6
    true = a * (t**2 - 2 * tau * t + 2 * tau**2 * (1 - np.exp(-t / tau)))
    # The response is sampled at 10 µs, and its band ends at 50 kHz where the filter still passes a tenth.
    np.testing.assert_allclose(played[0, :-20, 0], true[:-20], atol=2e-3 * k.max())


@pytest.mark.parametrize("which", ["synthetic", "measured"])
def test_it_is_what_the_simulation_plays(which: str) -> None:
    if which == "measured":
        if not _REAL.is_file():
            pytest.skip("the measured response is not at hand")
        full = np.load(_REAL)
    else:
        full = synthetic()
    one = spiral()
    k_true, phase_true = play(one, full)
    nominal = pairs(one.k_per_m)
    k, phase = corrected(nominal, one.dwell_us, Girf(full, 10.0, "here"))
    k_max = np.abs(nominal).max()
    assert np.abs(pairs(k_true) - nominal).max() > 5e-3 * k_max
    # Both end in another way after the last sample; the response looks some 100 µs ahead.
    inside = slice(0, -60)
    np.testing.assert_allclose(k[:, inside], pairs(k_true)[:, inside], atol=5e-4 * k_max)
    assert phase is not None
    assert np.abs(phase_true).max() > 0.05
    np.testing.assert_allclose(phase[:, inside], phase_true[:, inside], atol=0.01)


def test_directions_of_the_slice() -> None:
    one = spiral(10)
    k = pairs(one.k_per_m)
    girf = Girf(response(xx=low_pass(9.0), yy=low_pass(40.0), zz=low_pass(70.0)), 10.0, "here")
    straight, _ = corrected(k, one.dwell_us, girf)
    # With read along z and phase along x.
    turned, _ = corrected(k, one.dwell_us, girf, directions=np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0.0]]))
    along_z, _ = corrected(k, one.dwell_us, Girf(response(xx=low_pass(70.0)), 10.0, "here"))
    np.testing.assert_allclose(turned[..., 0], along_z[..., 0], atol=1e-6)
    x_of_y, _ = corrected(k[..., ::-1], one.dwell_us, girf)
    np.testing.assert_allclose(turned[..., 1], x_of_y[..., 0], atol=1e-6)
    # A response that is the same everywhere does not care; one that is not does.
    angle = 0.7
    turn = np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    assert np.abs(corrected(k, one.dwell_us, girf, directions=turn)[0] - straight).max() > 0.1
    same = Girf(np.stack([response(xx=low_pass(9.0), yy=low_pass(9.0), zz=low_pass(9.0))])[0], 10.0, "here")
    np.testing.assert_allclose(
        corrected(k, one.dwell_us, same, directions=turn)[0], corrected(k, one.dwell_us, same)[0], atol=1e-6
    )
    with pytest.raises(ScanError, match="expected orthonormal read_dir"):
        corrected(k, one.dwell_us, girf, directions=np.zeros((3, 3)))


def test_files(tmp_path: Path) -> None:
    full = synthetic()
    np.savez(tmp_path / "a.npz", girf=full, raster_us=5.0)
    found = read_girf(str(tmp_path / "a.npz"))
    np.testing.assert_array_equal(found.response, full)
    assert found.raster_us == 5
    for name, values, expected in (
        ("one", low_pass(9.0), response(xx=low_pass(9.0), yy=low_pass(9.0), zz=low_pass(9.0))),
        ("two", np.stack([low_pass(9.0), low_pass(14.0)]), response(xx=low_pass(9.0), yy=low_pass(14.0))),
        ("three", full[:, 1:], np.concatenate([np.zeros((3, 1, N)), full[:, 1:]], axis=1)),
    ):
        np.save(tmp_path / f"{name}.npy", values)
        np.testing.assert_array_equal(read_girf(str(tmp_path / f"{name}.npy"), 20.0).response, expected)
    for name, says, values in (
        ("shape", r"has shape \(7, 20000\)", np.ones((7, N))),
        ("nan", "not finite", np.full(N, np.nan)),
        ("zero", "is 0, 0, 0 at frequency 0", np.zeros(N)),
        ("order", "expected 1, with frequencies from", np.fft.ifftshift(low_pass(100.0))),
    ):
        np.save(tmp_path / f"{name}.npy", values)
        with pytest.raises(ScanError, match=says):
            read_girf(str(tmp_path / f"{name}.npy"))
    with pytest.raises(ScanError, match="cannot be read"):
        read_girf(str(tmp_path / "none.npy"))
    np.savez(tmp_path / "r.npz", girf=full, raster_us=0.0)
    with pytest.raises(ScanError, match="raster_us 0"):
        read_girf(str(tmp_path / "r.npz"))


# --- Scans --------------------------------------------------------------------------------------------


def error(scan: Scan, path: Path, **properties: object) -> tuple[float, float]:
    """Mean error of log T1 and log T2 in the object."""
    result, truth = scan.copy().run(**properties), read_truth(path)
    inside = truth.mask[0] & (result.physical("T1") > 0)
    return (
        float(np.abs(np.log(result.physical("T1")[inside] / truth.t1_ms[0][inside])).mean()),
        float(np.abs(np.log(result.physical("T2")[inside] / truth.t2_ms[0][inside])).mean()),
    )


@pytest.mark.parametrize("what", ["girf", "delay"])
def test_a_scan_is_corrected(tmp_path: Path, what: str) -> None:
    # So slow a system, or so long a delay, that it shows in a matrix of 64.
    full = response(xx=low_pass(30.0), yy=low_pass(45.0), x0=2e-3 * low_pass(200.0))
    np.save(tmp_path / "girf.npy", full)
    disturbed = {"girf": tmp_path / "girf.npy"} if what == "girf" else {"gradient_delay_us": 20.0}
    correction: dict[str, object] = (
        {"girf": str(tmp_path / "girf.npy")}
        if what == "girf"
        else {"gradient_delay_x_us": 20.0, "gradient_delay_y_us": 20.0}
    )
    common = {"phantom": "nist", "timepoints": 120, "interleaves": 24, "coils": 4, "matrix": 64}
    simulate(tmp_path / "plain.h5", **common)
    simulate(tmp_path / "scan.h5", **common, **disturbed)
    reference = error(Scan.load(tmp_path / "plain.h5"), tmp_path / "plain.h5")
    scan = Scan.load(tmp_path / "scan.h5")
    wrong, right = error(scan, tmp_path / "scan.h5"), error(scan, tmp_path / "scan.h5", **correction)
    for of_reference, of_wrong, of_right in zip(reference, wrong, right, strict=True):
        assert of_wrong > 1.05 * of_reference
        # Other places are sampled, and a little less of k-space.
        assert of_right == pytest.approx(of_reference, rel=0.1)


def test_a_correction_needs_the_dwell_time(scan: Scan) -> None:
    scan.heads["sample_time_us"] = 0
    assert "sample_time_us of the readouts is 0" in scan.run(gradient_delay_x_us=2).said
