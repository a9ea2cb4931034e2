"""Spirals from Hargreaves' parameters: against an accurate integration, and within their limits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

from scan_edit import Result, Scan
from whorl.scan.failure import ScanError
from whorl.scan.header import read_header
from whorl.scan.trajectory import resolve_units
from whorl.scan.vds import trajectories_from_header, vds_spiral

GAMMA = 4257.747892  # Hz/G
CASES = pytest.mark.parametrize(
    ("fov_cm", "n"),
    [((30.0,), 48), ((60.0, -7.0), 24), ((24.0, 1.0, -0.3), 96)],
    ids=["constant", "denser inside", "both ways"],
)
KRMAX, GMAX, SMAX, DWELL_US = 4.27, 4.3, 18000.0, 2.5


def reference(fov_cm: Sequence[float], n: int, samples: int) -> NDArray[np.float64]:
    """Radius at each sample, by an adaptive solver: the largest r'' found by bisection of |k''|."""
    field = np.polynomial.Polynomial(fov_cm)

    def fastest(r: float) -> float:
        speed = min(GAMMA * GMAX, 1 / (field(r) * DWELL_US * 1e-6))
        return float(speed / np.hypot(1, r * 2 * np.pi * field(r) / n))

    def rate(_: float, state: NDArray[np.float64]) -> list[float]:
        r, v = state
        w, dw = 2 * np.pi * field(r) / n, 2 * np.pi * field.deriv()(r) / n
        if v >= fastest(r):  # along the limit, and back to it
            along = (fastest(r + 1e-5) - fastest(r - 1e-5)) / 2e-5 * fastest(r)
            return [fastest(r), along + 1e6 * (fastest(r) - v)]

        def slew(a: float) -> float:
            return float(abs(a - r * w**2 * v**2 + 1j * (2 * w * v**2 + r * dw * v**2 + r * w * a)))

        high = 2 * GAMMA * SMAX
        # Between where it is smallest and where it is too large.
        across = 2 * w * v**2 + r * dw * v**2
        low = (r * w**2 * v**2 - r * w * across) / (1 + (r * w) ** 2)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if slew(middle) < GAMMA * SMAX else (low, middle)
        return [v, low]

    times = np.arange(samples) * DWELL_US * 1e-6
    return solve_ivp(rate, (0, times[-1]), [0, 0], t_eval=times, rtol=1e-5, atol=1e-7).y[0]


@CASES
def test_it_is_as_fast_as_the_limits_allow(fov_cm: tuple[float, ...], n: int) -> None:
    k = vds_spiral(fov_cm, KRMAX, n, GMAX, SMAX, DWELL_US)
    assert len(k) > 300
    some = 120
    radius = np.hypot(*k[:some].T)
    # The midpoint rule with eight steps for each sample.
    np.testing.assert_allclose(radius, reference(fov_cm, n, some), atol=2e-4 * KRMAX)


@CASES
def test_limits_are_kept(fov_cm: tuple[float, ...], n: int) -> None:
    k = vds_spiral(fov_cm, KRMAX, n, GMAX, SMAX, DWELL_US)
    gradient = np.diff(k, axis=0) / (DWELL_US * 1e-6 * GAMMA)
    slew = np.diff(gradient, axis=0) / (DWELL_US * 1e-6)
    assert np.hypot(*gradient.T).max() <= GMAX * 1.001
    assert np.hypot(*slew.T).max() <= SMAX * 1.01
    radius = np.hypot(*k.T)
    assert KRMAX - 0.02 < radius[-1] <= KRMAX
    assert (np.diff(radius) >= 0).all()
    # Along the readout and between the turns of all interleaves k-space is dense enough.
    field = np.polynomial.Polynomial(fov_cm)
    steps = np.hypot(*np.diff(k, axis=0).T)
    assert (steps * field(radius[1:]) < 1.01).all()
    turns = np.unwrap(np.arctan2(k[1:, 1], k[1:, 0]))
    apart = np.gradient(radius[1:], turns) * 2 * np.pi / n  # from one interleaf to the next
    outside = radius[1:] > 0.3
    np.testing.assert_allclose((apart * field(radius[1:]))[outside], 1, atol=0.02)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"krmax_per_cm": 0.0}, "krmax_per_cm is 0"),
        ({"max_gradient_g_per_cm": float("nan")}, "MaxGradient_G_per_cm is nan"),
        ({"fov_cm": (-3.0,)}, "FOVCoeff_1_cm is -3"),
        ({"fov_cm": (30.0, -20.0)}, "the field of view becomes 0 or less"),
        ({"max_slew_g_per_cm_per_s": 1e-3}, "not reached in 65536 samples"),
    ],
    ids=str,
)
def test_what_makes_no_spiral(change: dict[str, object], says: str) -> None:
    good: dict[str, object] = {
        "fov_cm": (30.0,), "krmax_per_cm": KRMAX, "n_interleaves": 48, "max_gradient_g_per_cm": GMAX,
        "max_slew_g_per_cm_per_s": SMAX, "sampling_us": DWELL_US,
    }  # fmt: skip
    with pytest.raises(ValueError, match=says):
        vds_spiral(**{**good, **change})  # type: ignore[arg-type]


# --- In the header ------------------------------------------------------------------------------------

#: A spiral for the 64² of the small scan, over 300 mm.
PARAMETERS = {
    "interleaves": 24, "fov_coefficients": 1, "SamplingTime_ns": 2500, "MaxGradient_G_per_cm": 4.0,
    "MaxSlewRate_G_per_cm_per_s": 15000.0, "FOVCoeff_1_cm": 30.0, "krmax_per_cm": 64 / 60,
}  # fmt: skip


def described(scan: Scan, parameters: dict[str, float], *, identifier: str = "HargreavesVDS2000") -> Scan:
    """The scan with a trajectory description in its header."""
    texts = "".join(
        f"<userParameter{'Long' if isinstance(value, int) else 'Double'}><name>{name}</name>"
        f"<value>{value}</value></userParameter{'Long' if isinstance(value, int) else 'Double'}>"
        for name, value in parameters.items()
    )
    text = f"<trajectoryDescription><identifier>{identifier}</identifier>{texts}</trajectoryDescription>"
    scan.header = scan.header.replace(b"</encoding>", f"{text}</encoding>".encode())
    return scan


def test_parameters_of_the_header(scan: Scan) -> None:
    assert trajectories_from_header(scan.header) is None
    found = trajectories_from_header(described(scan, PARAMETERS).header)
    assert found is not None
    assert (len(found), found.units, found.by, found.dwell_us) == (24, "1/cm", "arm", 2.5)
    one = vds_spiral([30.0], 64 / 60, 24, 4.0, 15000.0, 2.5)
    np.testing.assert_array_equal(found.points[0], -one)  # of the sign that Gadgetron gives it
    assert resolve_units(found.points.astype(np.float32), read_header(scan.header).encoded) == "1/cm"
    # Clockwise, as Gadgetron turns them.
    x, y = found.points[0, -1]
    angle = -2 * np.pi * 5 / 24
    np.testing.assert_allclose(
        found.points[5, -1],
        [np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y],
        atol=1e-9,
    )
    other = trajectories_from_header(scan.header, rotation_deg=111.25)
    assert other is not None
    turned = np.rad2deg(np.arctan2(*other.points[1, -1, ::-1]) - np.arctan2(*other.points[0, -1, ::-1]))
    assert turned % 360 == pytest.approx(111.25)


def test_parameters_among_those_of_the_user(scan: Scan) -> None:
    texts = "".join(
        f"<userParameter{kind}><name>{name}</name><value>{value}</value></userParameter{kind}>"
        for name, value in PARAMETERS.items()
        if (kind := "Long" if isinstance(value, int) else "Double")
    )
    scan.header = scan.header.replace(
        b"</ismrmrdHeader>", f"<userParameters>{texts}</userParameters></ismrmrdHeader>".encode()
    )
    found = trajectories_from_header(scan.header)
    assert found is not None
    assert len(found) == 24


def test_missing_and_wrong_parameters(scan: Scan) -> None:
    some = {k: v for k, v in PARAMETERS.items() if k not in ("krmax_per_cm", "SamplingTime_ns")}
    with pytest.raises(ScanError, match="without SamplingTime_ns, krmax_per_cm"):
        trajectories_from_header(described(scan.copy(), some).header)
    with pytest.raises(ScanError, match="cannot be computed: interleaves is 0"):
        trajectories_from_header(described(scan.copy(), {**PARAMETERS, "interleaves": 0}).header)
    many = {**PARAMETERS, "interleaves": 65536, "MaxSlewRate_G_per_cm_per_s": 50.0}
    with pytest.raises(ScanError, match=r"65536 interleaves of .* samples are too many"):
        trajectories_from_header(described(scan.copy(), many).header)
    broken = described(scan.copy(), PARAMETERS)
    broken.header = broken.header.replace(b"<value>30.0</value>", b"<value>wide</value>")
    with pytest.raises(ScanError, match="FOVCoeff_1_cm of the spiral in the MRD header is 'wide'"):
        trajectories_from_header(broken.header)
    # Another description with a name in common is not of this kind.
    other = described(scan.copy(), {"interleaves": 24}, identifier="Siemens")
    assert trajectories_from_header(other.header) is None


def test_they_are_used_where_nothing_is_attached(scan: Scan, untouched: Result) -> None:
    described(scan, PARAMETERS)
    attached = scan.copy().run()
    np.testing.assert_array_equal(attached.of("T1").data, untouched.of("T1").data)
    # Resample the scan along the spiral: its readouts hold other places, so that maps differ but exist.
    n_samples = len(vds_spiral([30.0], 64 / 60, 24, 4.0, 15000.0, 2.5))
    for n in scan.imaging:
        scan.data[n] = scan.data[n][:, :n_samples]
        scan.trajectories[n] = np.zeros((scan.data[n].shape[1], 0), np.float32)
        scan.heads["number_of_samples"][n] = scan.data[n].shape[1]
    result = scan.run()
    assert "by kspace_encode_step_1 (HargreavesVDS2000 parameters of the header)" in result.said
    assert result.slices() == [0]
