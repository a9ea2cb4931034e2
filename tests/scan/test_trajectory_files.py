"""Trajectories that are not attached to the data: files, tables, and scans that use them."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from scan_edit import Result, Scan
from whorl.scan.failure import ScanError
from whorl.scan.trajectories import Trajectories
from whorl.scan.trajectory_file import read_trajectories, rotated


def arms(scan: Scan) -> NDArray[np.float32]:
    """Trajectory of each arm of a scan, `(I, S, 2)`."""
    numbers = scan.heads["idx"]["kspace_encode_step_1"]
    first = {int(numbers[n]): scan.trajectories[n] for n in scan.imaging[::-1]}
    return np.stack([first[n] for n in range(24)])


def stripped(scan: Scan) -> Scan:
    """Without its trajectories."""
    return scan.trajectory(lambda k: np.zeros((len(k), 0), np.float32))


# --- Files ------------------------------------------------------------------------------------------------


def test_arrays(scan: Scan, tmp_path: Path) -> None:
    k = arms(scan)
    np.savez(tmp_path / "a.npz", trajectory=k, units="cycles/pixel", dwell_us=2.5, by="arm")
    found = read_trajectories(str(tmp_path / "a.npz"))
    np.testing.assert_array_equal(found.points, k)
    assert (found.units, found.dwell_us, found.by) == ("cycles/pixel", 2.5, "arm")
    assert str(tmp_path / "a.npz") in found.source
    density = np.hypot(k[..., 0], k[..., 1])
    np.savez(tmp_path / "b.npz", kx=k[..., 0], ky=k[..., 1], density=density)
    found = read_trajectories(str(tmp_path / "b.npz"))
    np.testing.assert_array_equal(found.points, np.concatenate([k, density[..., None]], axis=-1))
    assert (found.units, found.dwell_us, found.by) == ("auto", None, "auto")
    np.save(tmp_path / "c.npy", k[3])
    np.testing.assert_array_equal(read_trajectories(str(tmp_path / "c.npy")).points, k[3:4])
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["trajectory"] = k
        file["dwell_us"] = 2.5
        file.attrs["units"] = "1/m"
        file.attrs["by"] = b"timepoint"
    found = read_trajectories(str(tmp_path / "d.h5"))
    np.testing.assert_array_equal(found.points, k)
    assert (found.units, found.dwell_us, found.by) == ("1/m", 2.5, "timepoint")


def test_readouts_of_another_file(scan: Scan, tmp_path: Path) -> None:
    found = read_trajectories(str(scan.write(tmp_path / "scan.h5")))
    assert (found.by, found.dwell_us) == ("arm", 2.5)
    np.testing.assert_array_equal(found.points, arms(scan))
    # Where an arm has two trajectories the order of the readouts counts.
    second = scan.imaging[30]
    scan.trajectories[second] = scan.trajectories[second] * np.float32(0.97)
    found = read_trajectories(str(scan.write(tmp_path / "other.h5")))
    assert found.by == "timepoint"
    assert len(found) == 120
    np.testing.assert_array_equal(found.points[30], scan.trajectories[second])


def test_files_that_are_no_trajectories(scan: Scan, tmp_path: Path) -> None:
    k = arms(scan)
    infinite = k.copy()
    infinite[2, 3, 1] = np.inf
    for name, says, values in (
        ("empty", "has one, two: expected an array trajectory", {"one": k, "two": k}),
        ("shape", r"has shape \(24, 884, 4\)", {"trajectory": np.zeros((24, 884, 4))}),
        ("kind", "expected numbers", {"trajectory": np.zeros((2, 3, 2), dtype=complex)}),
        ("infinite", "not finite", {"trajectory": infinite}),
        ("units", "units 'furlong': expected one of cycles/pixel", {"trajectory": k, "units": "furlong"}),
        ("by", "numbered by 'shot': expected arm or timepoint", {"trajectory": k, "by": "shot"}),
        ("dwell", "dwell_us -1", {"trajectory": k, "dwell_us": -1.0}),
        ("columns", "expected one shape", {"kx": k[..., 0], "ky": k[:3, :, 0]}),
        ("pickle", "holds no arrays of numbers", {"trajectory": np.array([{}], dtype=object)}),
    ):
        path = tmp_path / f"{name}.npz"
        np.savez(path, **values)
        with pytest.raises(ScanError, match=says) as caught:
            read_trajectories(str(path))
        assert str(path) in str(caught.value)
    for path, says in ((tmp_path / "none.npz", "cannot be read"), (tmp_path, "is no file")):
        with pytest.raises(ScanError, match=says):
            read_trajectories(str(path))
    (tmp_path / "text.npz").write_text("kx,ky\n")
    with pytest.raises(ScanError, match="cannot be read"):
        read_trajectories(str(tmp_path / "text.npz"))
    with pytest.raises(ScanError, match=r"no readout of .* has a trajectory"):
        read_trajectories(str(stripped(scan).write(tmp_path / "bare.h5")))


# --- Tables -----------------------------------------------------------------------------------------------


def test_rotations() -> None:
    one = np.stack([np.linspace(0, 0.4, 7), np.linspace(0, -0.2, 7), np.arange(7.0)], axis=-1)
    all_of_them = rotated(one, 5)
    k = all_of_them[..., 0] + 1j * all_of_them[..., 1]
    np.testing.assert_array_equal(all_of_them[0], one)
    np.testing.assert_allclose(k, k[:1] * np.exp(2j * np.pi * np.arange(5) / 5)[:, None], atol=1e-15)
    np.testing.assert_array_equal(all_of_them[..., 2], np.tile(np.arange(7.0), (5, 1)))
    golden = rotated(one, 3, -111.25)
    turned = (golden[..., 0] + 1j * golden[..., 1])[:, -1] / k[0, -1]
    np.testing.assert_allclose(np.rad2deg(np.angle(turned)), [0, -111.25, 137.5], atol=1e-9)


def test_readouts_of_another_sampling() -> None:
    def curve(s: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([0.01 * s * np.cos(0.05 * s), 0.01 * s * np.sin(0.05 * s)], axis=-1)

    table = Trajectories(curve(np.arange(401.0))[None], "1/m", "here", dwell_us=2.0)
    assert table.sampled(401, 2.0) is table
    # The first sample keeps its time where oversampling was removed.
    half = table.sampled(200, 4.0)
    np.testing.assert_allclose(half.points[0], curve(2 * np.arange(200.0)), atol=1e-12)
    third = table.sampled(500, 2.0 / 1.5)
    np.testing.assert_allclose(third.points[0], curve(np.arange(500) / 1.5), atol=2e-5)
    with pytest.raises(ScanError, match=r"\(here\) has 401 samples of 2 µs, the readouts have 402 of 2 µs"):
        table.sampled(402, 2.0)
    unknown = Trajectories(table.points, "1/m", "here")
    assert unknown.sampled(401, 7.0) is unknown
    with pytest.raises(ScanError, match="expected one place for each sample"):
        unknown.sampled(400, 2.0)


# --- Scans ------------------------------------------------------------------------------------------------


def test_all_arms_from_a_file(scan: Scan, untouched: Result, tmp_path: Path) -> None:
    np.savez(tmp_path / "k.npz", trajectory=arms(scan))
    result = stripped(scan).run(trajectory=str(tmp_path / "k.npz"))
    assert result.outcome.exit_code == 0
    assert "24 interleaves of 884 samples, by kspace_encode_step_1" in result.said
    np.testing.assert_array_equal(result.of("T2").data, untouched.of("T2").data)


def test_one_interleaf_stands_for_all(scan: Scan, untouched: Result, tmp_path: Path) -> None:
    np.savez(tmp_path / "k.npz", trajectory=arms(scan)[0])
    stripped(scan)
    result = scan.copy().run(trajectory=str(tmp_path / "k.npz"))
    # Turned in double precision, while the scan's own were rounded each: hardly a pixel moves.
    near = np.isclose(result.physical("T1"), untouched.physical("T1"), rtol=0.002, atol=1)
    assert near.mean() > 0.995
    wrong = scan.copy().run(trajectory=str(tmp_path / "k.npz"), rotation_deg=-15)
    assert np.abs(wrong.physical("T1") - untouched.physical("T1")).max() > 100
    with pytest.raises(ScanError, match="how many rotations of it there are is not known"):
        scan.limit("kspace_encoding_step_1", None).run(trajectory=str(tmp_path / "k.npz"))


def test_a_table_by_timepoint(scan: Scan, untouched: Result, tmp_path: Path) -> None:
    by_timepoint = np.stack([scan.trajectories[n] for n in scan.imaging])
    np.savez(tmp_path / "k.npz", trajectory=by_timepoint)
    stripped(scan).heads["idx"]["kspace_encode_step_1"] = 0
    result = scan.copy().run(trajectory=str(tmp_path / "k.npz"))
    assert "120 interleaves of 884 samples, by timepoint" in result.said
    np.testing.assert_array_equal(result.of("T2").data, untouched.of("T2").data)
    np.savez(tmp_path / "short.npz", trajectory=by_timepoint[:100], by="timepoint")
    with pytest.raises(ScanError, match="has 100 timepoints, the readouts have timepoint 100"):
        scan.run(trajectory=str(tmp_path / "short.npz"))


def test_a_file_replaces_what_is_attached(scan: Scan, untouched: Result, tmp_path: Path) -> None:
    np.savez(tmp_path / "k.npz", trajectory=arms(scan))
    scan.trajectory(lambda k: k[::-1].copy())
    result = scan.run(trajectory=str(tmp_path / "k.npz"))
    np.testing.assert_array_equal(result.of("T2").data, untouched.of("T2").data)


def test_an_arm_beyond_the_table_is_dropped(scan: Scan, tmp_path: Path) -> None:
    np.savez(tmp_path / "k.npz", trajectory=arms(scan))
    scan.heads["idx"]["kspace_encode_step_1"][scan.imaging[40]] = 99
    result = stripped(scan).run(trajectory=str(tmp_path / "k.npz"))
    assert "1 readout of the wrong size were dropped" in result.said
    assert "1 of 120 readouts are missing" in str(result.of("T1").meta["whorl_notes"])


def test_discarded_samples_with_a_table(scan: Scan, untouched: Result, tmp_path: Path) -> None:
    padded = np.pad(arms(scan), ((0, 0), (3, 4), (0, 0)), constant_values=0.3)
    by_timepoint = padded[scan.heads["idx"]["kspace_encode_step_1"][scan.imaging]]
    np.savez(tmp_path / "arm.npz", trajectory=padded)
    np.savez(tmp_path / "time.npz", trajectory=by_timepoint)
    for n in scan.imaging:
        scan.data[n] = np.pad(scan.data[n], ((0, 0), (3, 4)), constant_values=1e3)
        scan.trajectories[n] = np.zeros((891, 0), np.float32)
    scan.heads["number_of_samples"][scan.imaging] = 891
    scan.heads["discard_pre"][scan.imaging] = 3
    scan.heads["discard_post"][scan.imaging] = 4
    for name in ("arm", "time"):
        result = scan.copy().run(trajectory=str(tmp_path / f"{name}.npz"))
        np.testing.assert_array_equal(result.of("T2").data, untouched.of("T2").data)
