"""The file that the simulation writes: its layout, its k-space, its noise and its truth."""

from __future__ import annotations

import ast
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import finufft
import h5py
import ismrmrd
import ismrmrd.xsd
import numpy as np
import pytest
from scipy.interpolate import CubicSpline

import whorl.simulation.scan
import whorl.simulation.scene
from whorl.simulation.acquisition import segments_of_time
from whorl.simulation.encoding import interleaf_order
from whorl.simulation.phantoms import (
    brain,
    coil_maps,
    nist_plate,
    off_resonance,
    phase_jump,
    textured_brain,
    transmit_field,
    with_fat,
)
from whorl.simulation.scan import simulate
from whorl.simulation.signals import Train, fisp_signals, jiang_train
from whorl.simulation.spiral import design_spiral
from whorl.simulation.truth import read_truth

# All sizes different: a swap is seen.
SMALL: dict[str, Any] = {
    "phantom": "nist",
    "timepoints": 21,
    "interleaves": 16,
    "coils": 3,
    "slices": 2,
    "matrix": 48,
    "fov_mm": 240.0,
    "readout_ms": 2.0,
}
PHANTOMS = {"nist": partial(nist_plate, "t2"), "brain": brain, "texture": textured_brain}
needs_nilearn = pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None, reason="the brain phantom needs nilearn"
)
N_SAMPLES = 800
N_NOISE = 4


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "scan.h5"
    n = SMALL["timepoints"]
    train = Train(
        flip_deg=np.linspace(0, 61.5, n),
        phase_deg=np.linspace(0, 90, n),
        tr_ms=np.linspace(8, 12, n),
        te_ms=np.linspace(1.5, 2.5, n),
        ti_ms=17.5,
    )
    simulate(path, **SMALL, noise=0.01, train=train)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "plain.h5"
    simulate(path, **SMALL)
    return path


def rows_of(path: Path) -> Any:
    with h5py.File(path, "r") as file:
        return file["dataset/data"][()]


def kspace_of(path: Path) -> Any:
    """Imaging readouts (N, C, S), complex64."""
    rows = rows_of(path)[N_NOISE:]
    coils = int(rows["head"]["active_channels"][0])
    return np.stack([data.view(np.complex64).reshape(coils, -1) for data in rows["data"]])


def test_heads_follow_the_layout(scan: Path) -> None:
    head = rows_of(scan)["head"]
    assert len(head) == N_NOISE + 2 * 21
    np.testing.assert_array_equal(head["version"], 1)
    np.testing.assert_array_equal(head["scan_counter"], np.arange(len(head)))
    np.testing.assert_array_equal(head["active_channels"], 3)
    np.testing.assert_array_equal(head["available_channels"], 3)
    np.testing.assert_array_equal(head["channel_mask"][:, 0], 0b111)
    np.testing.assert_array_equal(head["channel_mask"][:, 1:], 0)
    np.testing.assert_array_equal(head["number_of_samples"], N_SAMPLES)
    np.testing.assert_allclose(head["sample_time_us"], 2.5)
    np.testing.assert_array_equal(head["center_sample"], 0)
    assert np.all(np.diff(head["acquisition_time_stamp"].astype(int)) > 0)

    noise, head = head[:N_NOISE], head[N_NOISE:]
    np.testing.assert_array_equal(noise["flags"], 1 << 18)
    np.testing.assert_array_equal(noise["trajectory_dimensions"], 0)

    t = np.tile(np.arange(21), 2)
    np.testing.assert_array_equal(head["idx"]["slice"], np.repeat([0, 1], 21))
    np.testing.assert_array_equal(head["idx"]["repetition"], t)
    np.testing.assert_array_equal(head["idx"]["kspace_encode_step_1"], interleaf_order("golden", 21, 16)[t])
    np.testing.assert_array_equal(head["trajectory_dimensions"], 2)
    np.testing.assert_array_equal(head["user_int"][:, 0], t)
    np.testing.assert_array_equal(head["user_int"][:, 2], np.linspace(8000, 12000, 21)[t])
    np.testing.assert_array_equal(head["user_int"][:, 3], np.linspace(1500, 2500, 21)[t])
    np.testing.assert_allclose(head["user_int"][:, 5], np.linspace(0, 6150, 21)[t], atol=0.5)
    np.testing.assert_allclose(head["user_int"][:, 6], np.linspace(0, 9000, 21)[t], atol=0.5)

    first, last, end = 1 << 6, 1 << 7, 1 << 24
    expected = np.zeros(42, dtype=int)
    expected[[0, 21]] = first
    expected[20], expected[41] = last, last | end
    np.testing.assert_array_equal(head["flags"], expected)

    np.testing.assert_allclose(head["position"][:, 2], np.repeat([-2.5, 2.5], 21))
    axes = np.stack([head["read_dir"], head["phase_dir"], head["slice_dir"]], axis=1)
    np.testing.assert_array_equal(axes, np.broadcast_to(np.eye(3), (42, 3, 3)))


def test_header_follows_the_layout(scan: Path) -> None:
    with h5py.File(scan, "r") as file:
        header = ismrmrd.xsd.CreateFromDocument(file["dataset/xml"][0])
    encoding = header.encoding[0]
    for space in (encoding.encodedSpace, encoding.reconSpace):
        assert (space.matrixSize.x, space.matrixSize.y, space.matrixSize.z) == (48, 48, 1)
        assert (space.fieldOfView_mm.x, space.fieldOfView_mm.y, space.fieldOfView_mm.z) == (240, 240, 5)
    assert encoding.trajectory == ismrmrd.xsd.trajectoryType.SPIRAL
    limits = encoding.encodingLimits
    assert limits.kspace_encoding_step_1.maximum == 15
    assert limits.slice.maximum == 1
    assert limits.repetition.maximum == 20
    assert header.acquisitionSystemInformation.receiverChannels == 3
    assert header.acquisitionSystemInformation.systemFieldStrength_T == 3
    assert header.acquisitionSystemInformation.relativeReceiverNoiseBandwidth == 1
    assert header.experimentalConditions.H1resonanceFrequency_Hz == pytest.approx(127.7e6, rel=1e-3)
    assert "nist" in header.measurementInformation.protocolName
    sequence = header.sequenceParameters
    np.testing.assert_allclose(sequence.flipAngle_deg, np.linspace(0, 61.5, 21))
    np.testing.assert_allclose(sequence.TR, np.linspace(8, 12, 21))
    np.testing.assert_allclose(sequence.TE, np.linspace(1.5, 2.5, 21))
    np.testing.assert_allclose(sequence.TI, [17.5])


def test_ismrmrd_reads_it(scan: Path) -> None:
    with ismrmrd.Dataset(str(scan), mode="r") as dataset:
        assert dataset.number_of_acquisitions() == N_NOISE + 42
        noise, readout = dataset.read_acquisition(0), dataset.read_acquisition(N_NOISE + 5)
    assert noise.is_flag_set(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
    assert noise.data.shape == readout.data.shape == (3, N_SAMPLES)
    assert readout.traj.shape == (N_SAMPLES, 2)
    assert readout.isChannelActive(2)
    radius = np.hypot(readout.traj[:, 0], readout.traj[:, 1])
    assert radius[0] == 0
    assert 0.49 < radius[-1] < 0.5  # cycles per pixel


@pytest.mark.parametrize("matrix", [36, 37], ids=["even", "odd"])
def test_kspace_is_the_sum_over_all_point_sources(tmp_path: Path, matrix: int) -> None:
    args = SMALL | {"matrix": matrix, "noise": 0.0}
    simulate(tmp_path / "scan.h5", **args)
    rows, kspace = rows_of(tmp_path / "scan.h5")[N_NOISE:], kspace_of(tmp_path / "scan.h5")
    phantom = nist_plate("t2", slices=2, matrix=matrix, fov_mm=240.0)
    signals = fisp_signals(jiang_train(21), phantom.t1_ms, phantom.t2_ms)
    # Pixel j lies at j - n // 2 and is cut into two halves.
    places = np.array([j - matrix // 2 + half for j in range(matrix) for half in (-0.25, 0.25)])
    for n, coil, sample in [(0, 0, 0), (3, 2, 300), (20, 1, 799), (21, 0, 50), (38, 2, 640)]:
        z, t = divmod(n, 21)
        kx, ky = rows["traj"][n].reshape(-1, 2)[sample].astype(float)
        sources = np.tensordot(phantom.pd * signals[:, t], phantom.fractions[z], axes=1)
        sources = sources * coil_maps(3, matrix=matrix, fov_mm=240.0, height_mm=[-2.5, 2.5][z])[coil]
        wave = np.exp(-2j * np.pi * ky * places)[:, None] * np.exp(-2j * np.pi * kx * places)[None, :]
        # Single precision of the file; the trajectory in it is rounded to 3e-8 cycles/pixel too.
        expected = np.sum(sources * wave) / 4
        assert abs(kspace[n, coil, sample] - expected) < 2e-6 * np.abs(kspace).max()


@pytest.mark.parametrize(
    ("phantom", "matrix", "b1"),
    [
        ("nist", 36, 0.2),
        ("nist", 37, 0.7),
        pytest.param("brain", 37, 0.2, marks=needs_nilearn),
        pytest.param("texture", 36, 0.1, marks=needs_nilearn),
        pytest.param("texture", 37, 0.0, marks=needs_nilearn),
    ],
)
def test_each_point_source_has_the_signal_of_its_own_field_and_relaxation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phantom: str, matrix: int, b1: float
) -> None:
    monkeypatch.setattr(whorl.simulation.scene, "_AT_ONCE", 4)  # several groups of components
    pulses: dict[str, Any] = {"inversion_efficiency": 0.9, "slice_profile": (0.3, 1.0, 0.8)}
    args = SMALL | {"phantom": phantom, "matrix": matrix, "noise": 0.0} | pulses
    simulate(tmp_path / "scan.h5", **args, b1=b1)
    rows, kspace = rows_of(tmp_path / "scan.h5")[N_NOISE:], kspace_of(tmp_path / "scan.h5")
    size: dict[str, Any] = {"slices": 2, "matrix": matrix, "fov_mm": 240.0}
    thing = PHANTOMS[phantom](**size)
    field = transmit_field(b1, thing.fractions.sum(axis=(0, 1)) > 0)
    places = np.array([j - matrix // 2 + half for j in range(matrix) for half in (-0.25, 0.25)])
    for z in range(2):
        density = np.zeros((21, 2 * matrix, 2 * matrix), dtype=complex)
        for m, tissue in enumerate(thing.fractions[z]):
            v, u = np.nonzero(tissue)
            t1, t2 = (np.array([thing.t1_ms[m], thing.t2_ms[m]]) * thing.factors(m, z)[v, u]).T
            signals = fisp_signals(jiang_train(21), t1, t2, b1=field[v, u], **pulses)
            density[:, v, u] += thing.pd[m] * tissue[v, u] * signals.T
        for t, coil, sample in [(0, 0, 0), (3, 2, 300), (12, 0, 50), (17, 2, 640), (20, 1, 799)]:
            n = 21 * z + t
            kx, ky = rows["traj"][n].reshape(-1, 2)[sample].astype(float)
            sources = density[t] * coil_maps(3, matrix=matrix, fov_mm=240.0, height_mm=[-2.5, 2.5][z])[coil]
            wave = np.exp(-2j * np.pi * ky * places)[:, None] * np.exp(-2j * np.pi * kx * places)[None, :]
            # What is promised for a sample of the object, of which k-space is a sum.
            expected = np.sum(sources * wave) / 4
            assert abs(kspace[n, coil, sample] - expected) < 2e-5 * np.abs(kspace).max()
    # The truth is the mean over the fine samples of a pixel.
    truth = read_truth(tmp_path / "scan.h5")
    blocks = field.reshape(matrix, 2, matrix, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(truth.b1, truth.mask * blocks, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        # A spline through the nominal samples is not the integral of a gradient with kinks.
        ({"gradient_delay_us": 1.7}, 2e-5),
        ({"gradient_delay_us": -3.1}, 2e-5),
        # Single precision of the file, or what is promised for the interpolation in time.
        ({"phase_jump_rad": 1.2}, 2e-6),
        ({"motion_pixels": -1.5}, 2e-6),
        ({"fat": True}, 2e-6),
        ({"b0_hz": 80.0}, 1e-4),
        ({"b0_hz": 400.0}, 1e-4),
        (
            {
                "b0_hz": 150.0,
                "gradient_delay_us": -0.9,
                "phase_jump_rad": -2.0,
                "motion_pixels": 1.0,
                "fat": True,
                "b1": 0.2,
            },
            1.2e-4,
        ),
    ],
    ids=str,
)
def test_each_disturbance_equals_the_sum_over_all_point_sources(
    tmp_path: Path, changes: dict[str, Any], tolerance: float
) -> None:
    # TE differs from pulse to pulse.
    train = jiang_train(21)
    train = Train(train.flip_deg, train.phase_deg, train.tr_ms, np.linspace(1.5, 3.5, 21), train.ti_ms)
    args = SMALL | {"matrix": 36, "noise": 0.0, "slices": 1, "train": train}
    simulate(tmp_path / "scan.h5", **args)
    simulate(tmp_path / "disturbed.h5", **args, **changes)
    kspace, before = kspace_of(tmp_path / "disturbed.h5"), kspace_of(tmp_path / "scan.h5")
    assert np.abs(kspace - before).max() > 0.01 * np.abs(before).max()
    # The nominal trajectory is attached, whatever is played.
    rows, nominal = (rows_of(tmp_path / name)[N_NOISE:] for name in ("disturbed.h5", "scan.h5"))
    for row, as_told in zip(rows["traj"], nominal["traj"], strict=True):
        np.testing.assert_array_equal(row, as_told)

    thing = nist_plate("t2", matrix=36, fov_mm=240.0)
    thing = with_fat(thing, matrix=36, fov_mm=240.0) if changes.get("fat") else thing
    inside = thing.fractions.sum(axis=(0, 1)) > 0
    field = transmit_field(changes.get("b1", 0.0), inside)
    b0 = off_resonance(changes.get("b0_hz", 0.0), inside)
    jump = phase_jump(changes.get("phase_jump_rad", 0.0), inside)
    maps, own_phase = coil_maps(3, matrix=36, fov_mm=240.0), coil_maps(1, matrix=36, fov_mm=240.0)
    places = np.array([j - 18 + half for j in range(36) for half in (-0.25, 0.25)])
    spiral = design_spiral(matrix=36, fov_mm=240.0, interleaves=16, readout_ms=2.0)
    dwell = 2.5 * np.arange(N_SAMPLES)
    for t, coil, sample in [(0, 0, 40), (4, 2, 300), (9, 1, 700), (10, 1, 700), (15, 2, 790), (20, 0, 120)]:
        way = changes.get("motion_pixels", 0.0) if t >= 10 else 0.0
        first = CubicSpline(dwell, spiral.k_per_m[interleaf_order("golden", 21, 16)[t]])
        k = first(dwell[sample] - changes.get("gradient_delay_us", 0.0)) * 240 / 36 * 1e-3
        elapsed = (train.te_ms[t] + dwell[sample] * 1e-3) * 1e-3
        # Two fine samples to a pixel: the object meets the coils so many samples farther on.
        seen = np.roll((maps / own_phase)[coil], -round(2 * way), axis=1) * own_phase[0]
        expected = 0
        for m, tissue in enumerate(thing.fractions[0]):
            v, u = np.nonzero(tissue)
            t1, t2 = np.full(len(v), thing.t1_ms[m]), np.full(len(v), thing.t2_ms[m])
            signal = fisp_signals(train, t1, t2, b1=field[v, u])[:, t]
            hz = b0[v, u] + (-440.0 if thing.names[m] == "fat" else 0.0)
            source = thing.pd[m] * tissue[v, u] * signal * seen[v, u] * jump[v, u]
            phase = 2 * np.pi * (hz * elapsed - k.real * (places[u] + way) - k.imag * places[v])
            expected += np.sum(source * np.exp(1j * phase)) / 4
        assert abs(kspace[t, coil, sample] - expected) < tolerance * np.abs(kspace).max()


@pytest.mark.parametrize(("peak_hz", "most"), [(0.1, 2), (50.0, 4), (400.0, 10)])
def test_segments_of_time_are_few_and_exact_enough(peak_hz: float, most: int) -> None:
    b0 = np.linspace(-peak_hz, 0.7 * peak_hz, 301)[None]  # (1, U)
    elapsed_ms = np.linspace(1.5, 2.0, 3)[:, None] + np.arange(700) * 2.5e-3  # (T, S)
    segments = segments_of_time(b0, elapsed_ms)
    assert len(segments) <= most
    total = sum(carrier[0][:, None, None] * course for carrier, course in segments)
    exact = np.exp(2e-3j * np.pi * b0[0][:, None, None] * elapsed_ms)
    # What is promised, between the places where it was tried.
    assert np.abs(total - exact).max() < 1.1e-4


def test_truth_of_off_resonance_and_fat(tmp_path: Path, plain: Path) -> None:
    told: dict[str, Any] = {
        "b0_hz": 60.0,
        "gradient_delay_us": 1.5,
        "phase_jump_rad": 1.0,
        "motion_pixels": 0.5,
        "fat": True,
    }
    simulate(tmp_path / "scan.h5", **SMALL, **told)
    truth, before = read_truth(tmp_path / "scan.h5"), read_truth(plain)
    assert {name: truth.parameters[name] for name in told} == told
    assert str(truth.b0_hz.dtype) == "float32"
    assert not truth.b0_hz[~truth.mask].any()
    # The extremes lie at the edge, where pixels of 5 mm average.
    assert truth.b0_hz.min() == pytest.approx(-60, abs=4)
    assert truth.b0_hz.max() == pytest.approx(60, abs=4)
    # Fat is outside of what was there, in the mask, and in no region.
    fat = truth.t1_ms == 380
    assert fat.any(axis=(1, 2)).all()
    assert np.all(truth.mask[fat] & ~before.mask[fat])
    assert set(truth.t2_ms[fat]) == {70.0}
    np.testing.assert_array_equal(truth.labels, before.labels)
    np.testing.assert_array_equal(truth.t1_ms[before.mask], before.t1_ms[before.mask])
    assert not before.b0_hz.any()
    assert not any(before.parameters[name] for name in told)


def test_a_field_that_hardly_varies_is_a_uniform_one(tmp_path: Path) -> None:
    # Two ways through the program.
    for name, b1 in (("uniform", 0.0), ("nearly", 1e-8)):
        simulate(tmp_path / name, **SMALL, noise=0.0, b1=b1)
    uniform, nearly = kspace_of(tmp_path / "uniform"), kspace_of(tmp_path / "nearly")
    np.testing.assert_allclose(nearly, uniform, atol=2e-5 * np.abs(uniform).max())


def test_a_tissue_between_the_samples_is_left_out(tmp_path: Path) -> None:
    # Fine samples of 188 mm, spheres of 15 mm.
    args = SMALL | {"matrix": 16, "fov_mm": 6000.0, "readout_ms": 0.6, "slices": 1}
    assert (nist_plate("t2", matrix=16, fov_mm=6000.0).fractions.max(axis=(0, 2, 3)) == 0).any()
    simulate(tmp_path / "scan.h5", **args, b1=0.2)
    assert np.isfinite(kspace_of(tmp_path / "scan.h5")).all()


@pytest.mark.parametrize("matrix", [48, 49], ids=["even", "odd"])
def test_the_image_lies_on_the_truth(tmp_path: Path, matrix: int) -> None:
    train = Train(np.full(16, 3.0), np.zeros(16), np.full(16, 9.0), np.full(16, 2.0), 1e5)
    args = SMALL | {"matrix": matrix, "noise": 0.0, "timepoints": 16, "slices": 1, "coils": 5}
    simulate(tmp_path / "scan.h5", **args, train=train)
    rows, kspace = rows_of(tmp_path / "scan.h5")[N_NOISE:], kspace_of(tmp_path / "scan.h5")
    trajectory = np.stack([row.reshape(-1, 2) for row in rows["traj"]]).astype(float)
    weight = np.gradient(np.sum(trajectory**2, axis=-1), axis=1)
    points = 2 * np.pi * trajectory.reshape(-1, 2)
    data = (kspace * weight[:, None]).swapaxes(0, 1).reshape(5, -1).astype(complex)
    images = finufft.nufft2d1(points[:, 1].copy(), points[:, 0].copy(), data, (matrix, matrix), isign=1)
    image = np.sqrt(np.sum(np.abs(images) ** 2, axis=0))
    sensitivity = np.sqrt(np.sum(np.abs(coil_maps(5, matrix=matrix, fov_mm=240.0)) ** 2, axis=0))
    image /= sensitivity.reshape(matrix, 2, matrix, 2).mean(axis=(1, 3))
    mask = read_truth(tmp_path / "scan.h5").mask[0].astype(float)

    def agreement(dy: int, dx: int) -> float:
        return float(np.corrcoef(np.roll(image, (dy, dx), (0, 1)).ravel(), mask.ravel())[0, 1])

    here = agreement(0, 0)
    assert here > 0.95
    assert all(here > agreement(*shift) for shift in [(0, 1), (1, 0), (0, -1), (-1, 0)])
    assert here > np.corrcoef(image.T.ravel(), mask.ravel())[0, 1]


def test_noise_has_the_level_and_covariance_that_is_written(tmp_path: Path) -> None:
    simulate(tmp_path / "clean.h5", **SMALL, noise=0.0)
    simulate(tmp_path / "noisy.h5", **SMALL, noise=0.02)
    clean = kspace_of(tmp_path / "clean.h5")
    noise = kspace_of(tmp_path / "noisy.h5") - clean
    prescan = np.stack(
        [row.view(np.complex64).reshape(3, -1) for row in rows_of(tmp_path / "noisy.h5")["data"][:N_NOISE]]
    )
    expected = read_truth(tmp_path / "noisy.h5").parameters["noise_covariance"]
    assert np.trace(expected).real == pytest.approx(3)
    np.testing.assert_allclose(expected, expected.conj().T)
    assert np.linalg.cond(expected) < 20
    assert np.abs(expected - np.diag(np.diag(expected))).max() > 0.05
    level = 0.02 * np.abs(clean).max()
    assert read_truth(tmp_path / "noisy.h5").parameters["noise_sd"] == pytest.approx(level)
    # Four standard errors: 1/sqrt(samples), 33 600 and 3 200 of them.
    for readouts, tolerance in ((noise, 0.025), (prescan, 0.08)):
        samples = readouts.swapaxes(0, 1).reshape(3, -1)
        measured = samples @ samples.conj().T / samples.shape[1] / level**2
        np.testing.assert_allclose(measured, expected, atol=tolerance)
        # Circular: real and imaginary parts alike and independent.
        np.testing.assert_allclose(samples @ samples.T / samples.shape[1] / level**2, 0, atol=1.5 * tolerance)
    assert abs(np.vdot(noise[0], noise[1])) < 5 * np.sqrt(noise[0].size) * level**2


def test_truth(scan: Path) -> None:
    truth = read_truth(scan)
    assert truth.t1_ms.shape == truth.labels.shape == truth.mask.shape == (2, 48, 48)
    assert [str(a.dtype) for a in (truth.t1_ms, truth.labels, truth.mask)] == ["float32", "int16", "bool"]
    assert truth.roi_names[6] == "Mn-7"
    assert len(truth.roi_names) == len(truth.roi_t1_ms) == len(truth.roi_t2_ms) == 14
    assert (truth.roi_t1_ms[6], truth.roi_t2_ms[6]) == (801.7, 64.07)
    for n in range(1, 15):
        region = truth.labels == n
        assert region.any(axis=(1, 2)).all()
        np.testing.assert_allclose(truth.t1_ms[region], truth.roi_t1_ms[n - 1], rtol=1e-6)
        np.testing.assert_allclose(truth.t2_ms[region], truth.roi_t2_ms[n - 1], rtol=1e-6)
    for image in (truth.t1_ms, truth.t2_ms, truth.m0):
        np.testing.assert_array_equal(image > 0, truth.mask)
    assert truth.mask.mean() == pytest.approx(np.pi * 100**2 / 240**2, rel=0.05)
    assert truth.parameters["order"] == "golden"
    assert truth.parameters["timepoints"] == 21
    np.testing.assert_allclose(truth.parameters["flip_deg"], np.linspace(0, 61.5, 21))


@needs_nilearn
def test_truth_of_a_texture_is_that_of_each_pixel(tmp_path: Path) -> None:
    simulate(tmp_path / "scan.h5", **(SMALL | {"phantom": "texture", "matrix": 96, "interleaves": 48}))
    truth = read_truth(tmp_path / "scan.h5")
    phantom = textured_brain(slices=2, matrix=96, fov_mm=240.0)
    assert truth.roi_names == ("white matter", "grey matter", "CSF", "lesions")
    assert phantom.t1_factor is not None
    assert phantom.t2_factor is not None
    for name, nominal, factor in (
        ("t1_ms", (832, 1350, 4000, 832), phantom.t1_factor),
        ("t2_ms", (60, 85, 1500, 108), phantom.t2_factor),
    ):
        values, means = getattr(truth, name), getattr(truth, f"roi_{name}")
        for n in range(4):
            region = truth.labels == n + 1
            assert region.sum() > 10
            here = factor.reshape(2, 96, 2, 96, 2).mean(axis=(2, 4))[region] if n != 2 else 1
            np.testing.assert_allclose(values[region], nominal[n] * here, rtol=1e-6)
            assert means[n] == pytest.approx(values[region].mean())
        np.testing.assert_array_equal(values > 0, truth.mask)


def test_truth_of_the_field(tmp_path: Path, plain: Path) -> None:
    uniform = read_truth(plain)
    assert str(uniform.b1.dtype) == "float32"
    np.testing.assert_array_equal(uniform.b1, uniform.mask)
    assert (uniform.parameters["b1"], uniform.parameters["inversion_efficiency"]) == (0, 1)
    assert uniform.parameters["slice_profile"].shape == (0,)

    simulate(tmp_path / "scan.h5", **SMALL, b1=0.2, inversion_efficiency=0.95, slice_profile=(0.5, 1))
    truth = read_truth(tmp_path / "scan.h5")
    assert truth.b1.shape == (2, 48, 48)
    np.testing.assert_array_equal(truth.b1 > 0, truth.mask)
    # Pixels of the edge lie partly outside.
    assert truth.b1[truth.mask].min() == pytest.approx(0.8, abs=0.02)
    assert truth.b1[truth.mask].max() == pytest.approx(1.2, abs=0.005)
    np.testing.assert_array_equal(truth.t1_ms, uniform.t1_ms)
    assert (truth.parameters["b1"], truth.parameters["inversion_efficiency"]) == (0.2, 0.95)
    np.testing.assert_array_equal(truth.parameters["slice_profile"], [0.5, 1])
    # The reconstruction is told the nominal train.
    with h5py.File(plain, "r") as a, h5py.File(tmp_path / "scan.h5", "r") as b:
        assert a["dataset/xml"][0] == b["dataset/xml"][0]
        np.testing.assert_array_equal(a["dataset/data"]["head"], b["dataset/data"]["head"])


def test_truth_of_older_files_is_of_a_uniform_field(tmp_path: Path) -> None:
    simulate(tmp_path / "scan.h5", **SMALL, b1=0.2, inversion_efficiency=0.95, slice_profile=(0.5, 1))
    with h5py.File(tmp_path / "scan.h5", "r+") as file:
        group = file["truth"]
        for name in ("b1", "b0_hz", "slice_profile"):
            del group[name]
        disturbances = ("b0_hz", "gradient_delay_us", "phase_jump_rad", "motion_pixels", "fat")
        for name in ("b1", "inversion_efficiency", *disturbances):
            del group.attrs[name]
    truth = read_truth(tmp_path / "scan.h5")
    assert str(truth.b1.dtype) == "float32"
    np.testing.assert_array_equal(truth.b1, truth.mask)
    assert (truth.parameters["b1"], truth.parameters["inversion_efficiency"]) == (0, 1)
    assert truth.parameters["slice_profile"].shape == (0,)
    assert truth.b0_hz.shape == truth.mask.shape
    assert not truth.b0_hz.any()
    assert not any(truth.parameters[name] for name in disturbances)


def test_truth_of_another_file_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.create_group("dataset")
    with pytest.raises(ValueError, match="no group truth"):
        read_truth(tmp_path / "other.h5")


@pytest.mark.parametrize("order", ["golden", "sequential"])
@pytest.mark.parametrize("interleaves", [1, 2, 3, 8, 16, 48, 89, 96])
def test_orders_visit_all_interleaves_evenly(order: str, interleaves: int) -> None:
    arms = interleaf_order(order, 3 * interleaves, interleaves)
    for block in arms.reshape(3, interleaves):
        np.testing.assert_array_equal(np.sort(block), np.arange(interleaves))
    if interleaves >= 8:
        step = (arms[1] - arms[0]) / interleaves
        assert step == pytest.approx(0.618 if order == "golden" else 1 / interleaves, abs=0.06)


def test_seeds(tmp_path: Path, plain: Path) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        simulate(tmp_path / name, **SMALL, seed=seed)
    a, b, c = kspace_of(plain), kspace_of(tmp_path / "same"), kspace_of(tmp_path / "other")
    np.testing.assert_array_equal(a, b)
    assert np.mean(a == c) < 0.01
    np.testing.assert_allclose(a, c, atol=1e-2 * np.abs(a).max())


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("order", "sequential"),
        ("plate", "t1"),
        ("fov_mm", 260.0),
        ("readout_ms", 2.1),
        ("noise", 0.1),
        ("train", jiang_train(21, tr_ms=11.0)),
        ("b1", 0.1),
        ("inversion_efficiency", 0.9),
        ("slice_profile", (0.5, 1.0)),
    ],
)
def test_each_argument_is_used(tmp_path: Path, plain: Path, change: str, value: Any) -> None:
    simulate(tmp_path / "changed.h5", **(SMALL | {change: value}))
    before, after = kspace_of(plain), kspace_of(tmp_path / "changed.h5")
    assert before.shape != after.shape or not np.allclose(before, after, atol=1e-3 * np.abs(before).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timepoints": 0}, "timepoints is 0"),
        ({"timepoints": 70000}, "timepoints is 70000"),
        ({"phantom": "leg"}, 'phantom is "leg": expected "nist", "brain", "texture" or "letters"'),
        ({"order": "random"}, 'order is "random"'),
        ({"plate": "pd"}, 'plate is "pd"'),
        ({"slices": 4}, "slices is 4"),
        ({"slices": 0}, "slices is 0"),
        ({"coils": 0}, "coils is 0"),
        ({"matrix": 8}, "matrix is 8"),
        ({"interleaves": 0}, "interleaves is 0"),
        ({"interleaves": 1}, "1 interleaves of 2 ms reach"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"fov_mm": -1.0}, "fov_mm is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"readout_ms": 8.0}, "do not fit into TR 9 ms"),
        ({"b1": -0.1}, "b1 is -0.1: expected at least 0 and less than 1"),
        ({"b1": 1.0}, "b1 is 1.0"),
        ({"b1": float("nan")}, "b1 is nan"),
        ({"inversion_efficiency": -0.5}, "inversion_efficiency is -0.5: expected 0 to 1"),
        ({"inversion_efficiency": 1.5, "b1": 0.1}, "inversion_efficiency is 1.5"),
        ({"slice_profile": (0.0,)}, "slice_profile is .*not all of them 0"),
        ({"slice_profile": (1.0, float("nan"))}, "slice_profile is .* expected finite"),
        ({"b0_hz": -5.0}, "b0_hz is -5.0: expected 0 to 2000"),
        ({"b0_hz": float("nan")}, "b0_hz is nan"),
        ({"gradient_delay_us": 51.0}, "gradient_delay_us is 51.0: expected -50 to 50"),
        ({"gradient_delay_us": float("nan")}, "gradient_delay_us is nan"),
        ({"phase_jump_rad": float("inf")}, "phase_jump_rad is inf"),
        ({"motion_pixels": 13.0}, "motion_pixels is 13.0: expected at most a quarter"),
        ({"train": jiang_train(20)}, "20 pulses, timepoints is 21"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_and_leave_no_file(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(tmp_path / "scan.h5", **(SMALL | change))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        simulate(tmp_path / "none" / "scan.h5", **SMALL)


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "scan.h5"
    target.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(whorl.simulation.scan, "write_truth", fail)
    with pytest.raises(OSError, match="disk full"):
        simulate(target, **SMALL)
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_bytes() == b"old"


def test_long_trains_fit_into_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # HDF5 refuses attributes above 64 KiB; 9000 angles are 72 kB. Their signals would take a while.
    monkeypatch.setattr(
        whorl.simulation.scene, "fisp_signals", lambda train, t1, *_, **__: np.ones((len(t1), len(train)))
    )
    args = SMALL | {"matrix": 16, "interleaves": 4, "coils": 1, "slices": 1, "readout_ms": 0.6}
    n = 9000
    simulate(tmp_path / "scan.h5", **(args | {"timepoints": n}))
    assert len(read_truth(tmp_path / "scan.h5").parameters["flip_deg"]) == n


def test_more_than_64_coils_are_marked(tmp_path: Path) -> None:
    args = SMALL | {"matrix": 16, "interleaves": 4, "coils": 70, "slices": 1, "readout_ms": 0.6}
    simulate(tmp_path / "scan.h5", **args)
    mask = rows_of(tmp_path / "scan.h5")["head"]["channel_mask"][0]
    assert [int(word) for word in mask[:3]] == [2**64 - 1, 2**6 - 1, 0]


def test_progress_tells_each_slice(tmp_path: Path) -> None:
    lines: list[str] = []
    simulate(tmp_path / "scan.h5", **SMALL, progress=lines.append)
    assert any("slice 2 of 2" in line for line in lines)


def test_nothing_is_shared_with_the_reconstruction() -> None:
    allowed = ("whorl.simulation", "whorl.scan.readout")
    for source in Path(whorl.simulation.scan.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert all(name.startswith(allowed) for name in names if name.startswith("whorl"))
            assert not (isinstance(node, ast.ImportFrom) and node.level), "relative imports hide the room"
