"""whorl inspect: what it says of good and of damaged scans, as a user reads it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from pulseq_files import write_sequence
from scan_edit import Scan
from whorl.cli import main
from whorl.config import Settings
from whorl.pipeline.scan import reconstruct_scan
from whorl.pipeline.slices import Inside, SliceResult
from whorl.scan.failure import EndOfStream
from whorl.scan.readout import Flag, Readout
from whorl.simulation.noise import correlated_noise
from whorl.simulation.parameters import PULSEQ
from whorl.simulation.scan import simulate
from whorl.simulation.truth import read_truth
from whorl.tools.inspection import Inspection, SliceSummary, inspect

_SMALL = {"phantom": "nist", "timepoints": 120, "interleaves": 24, "coils": 4, "matrix": 64}


def whorl(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def found(scan: Scan, **properties: object) -> dict[str, str]:
    """Values that were found, by name."""
    inspection = inspect(scan.header, scan.readouts(), Settings.from_properties(properties))
    return {item.name: f"{item.value} ({item.source})" for item in inspection.items}


def test_a_page_and_json_say_the_same(tiny_scan: Path, tmp_path: Path) -> None:
    page = whorl(tiny_scan)
    data = json.loads(whorl(tiny_scan, "--json").stdout)
    assert (page.exit_code, data["exit_code"]) == (data["exit_code"],) * 2
    for item in data["found"]:
        assert item["name"] in page.stdout
        assert item["value"] in page.stdout
        assert item["source"] in page.stdout
    by_name = {item["name"]: item for item in data["found"]}
    assert by_name["timepoints"]["value"] == "120"
    assert by_name["flip angle"]["source"] == "header lists"
    assert by_name["inversion"] == {
        "name": "inversion", "value": "20 ms before the first pulse", "source": "header TI",
    }  # fmt: skip
    assert by_name["interleaves"]["value"] == "24 distinct, 884 samples"
    assert data["noise"]["n_readouts"] == 4
    assert len(data["noise"]["relative_sd"]) == 4
    (one,) = data["slices"]
    assert (one["name"], one["n_readouts"], one["n_expected"]) == ("slice 0", 120, 120)
    assert one["snr"] > 10
    assert any("fold 120 readouts" in line for line in data["would"])
    assert data["order"]["bias"][0]["tissue"] == "white matter"
    assert data["missing"] == []


def test_properties_are_used_and_named(scan: Scan) -> None:
    plain = found(scan)
    assert plain["inversion efficiency"] == "1 (default: ideal)"
    told = found(scan, inversion_time_ms=25, inversion_efficiency=0.9, timepoint="repetition", timepoints=100)
    assert told["inversion"] == "25 ms before the first pulse (property inversion_time_ms)"
    assert told["inversion efficiency"] == "0.9 (property inversion_efficiency)"
    assert told["timepoint counter"] == "repetition (property timepoint)"
    assert told["timepoints"] == "100 (property timepoints)"


def test_it_says_where_a_scan_would_be_reconstructed(scan: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    def would(**properties: object) -> tuple[str, list[str]]:
        inspection = inspect(scan.header, scan.readouts(), Settings.from_properties(properties))
        return "\n".join(inspection.would), inspection.missing

    for package in ("cufinufft", "cupy"):
        monkeypatch.setitem(sys.modules, package, None)  # not to be imported
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        says, missing = would(device="cpu")
        assert "on the CPU\n" in says
        assert missing == []
        (one,) = would(device="cuda")[1]
        assert ("no NUFFT for the GPU" if there else "no usable GPU") in one
    says, missing = would()
    assert "on the CPU: there is no NUFFT for the GPU" in says
    assert missing == []


@pytest.mark.parametrize("order", ["golden", "sequential"])
def test_the_order_is_judged(tmp_path: Path, order: str) -> None:
    path = tmp_path / "scan.h5"
    simulate(path, **{**_SMALL, "timepoints": 480}, order=order)
    result = whorl(path)
    assert ("biases low-rank T2" in result.stdout) == (order == "sequential")
    assert result.exit_code == (3 if order == "sequential" else 0)


def test_noise_is_described(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    covariance = correlated_noise(4, 0.7, noisy=8.0)
    simulate(path, **_SMALL, noise_covariance=covariance)
    result = whorl(path)
    assert "largest correlation of two 0.7" in result.stdout
    assert "noisy coils (numbers from 0): 0" in result.stdout


def test_the_signal_to_noise_ratio_follows_the_noise(tmp_path: Path) -> None:
    ratios = []
    for noise in (1e-3, 4e-3):
        path = tmp_path / f"{noise}.h5"
        simulate(path, **_SMALL, noise=noise)
        scan = Scan.load(path)
        for one in (scan, scan.copy().without_noise()):
            inspection = inspect(one.header, one.readouts(), Settings())
            ratios.append(inspection.slices[0].snr or 0.0)
    known, guessed, known_4, guessed_4 = ratios
    assert known / known_4 == pytest.approx(4, rel=0.1)  # the same object, noise four times as strong
    # Without noise readouts the edge of k-space tells, where some signal is left: a lower bound.
    assert guessed < known
    assert known_4 / 2 < guessed_4 < 1.05 * known_4


def test_pictures(tiny_scan: Path, tmp_path: Path) -> None:
    path = tmp_path / "scan.png"
    assert whorl(tiny_scan, "--png", path).exit_code in (0, 3)
    with Image.open(path) as image:
        assert image.width > 1200
        assert len(set(image.convert("L").resize((60, 60)).tobytes())) > 30


def test_a_pulseq_scan(tmp_path: Path) -> None:
    written = write_sequence(
        tmp_path / "a.seq", n_pulses=120, n_arms=24, n_noise=5, readout_s=4e-3, turns=8.0
    )
    sequence = written.path
    simulate(tmp_path / "scan.h5", phantom="nist", coils=4, sequence=sequence, layout=PULSEQ)
    bare = whorl(tmp_path / "scan.h5")
    assert bare.exit_code == 1
    assert "the readouts carry no trajectory" in bare.stdout
    result = whorl(tmp_path / "scan.h5", "-p", f"sequence={sequence}")
    assert result.exit_code in (0, 3)
    assert "whitened by 5 noise readouts" in result.stdout
    assert "repetition (numbers ADCs of the sequence)" in result.stdout


def test_damaged_scans(scan: Scan, tmp_path: Path) -> None:
    lost = scan.copy().without(scan.imaging[[3, 4, 77]])
    page = inspect(lost.header, lost.readouts(), Settings()).text()
    assert "slice 0: 117 of 120 readouts" in page
    assert "3 of 120 readouts are missing" in page
    assert "scan_counter leaves out 3 numbers" in page

    short = scan.copy().take(np.arange(4 + 60))
    result = whorl(short.write(tmp_path / "short.h5"))
    assert result.exit_code == 1
    assert "60 of 120 timepoints arrived, expected at least 90%" in result.stdout

    bad = scan.copy()
    bad.heads["user_int"][:, 5] = 7700
    result = whorl(bad.write(tmp_path / "bad.h5"))
    assert result.exit_code == 1
    assert "two sources disagree on flip_deg of timepoint 0" in result.stdout

    units = scan.copy().trajectory(lambda k: k * 0.3)
    result = whorl(units.write(tmp_path / "units.h5"))
    assert result.exit_code == 1
    assert "the unit of the trajectory is not clear" in result.stdout

    nothing = scan.copy().flag(scan.imaging, Flag.IS_NAVIGATION_DATA)
    assert "no imaging readouts arrived" in whorl(nothing.write(tmp_path / "none.h5")).stdout

    (tmp_path / "text.h5").write_text("this is no scan")
    result = whorl(tmp_path / "text.h5")
    assert result.exit_code == 1


def test_a_stream_that_broke_off(scan: Scan) -> None:
    def readouts() -> Iterator[Readout]:
        for n, readout in enumerate(scan.readouts()):
            if n == 122:
                raise EndOfStream("connection lost in an acquisition")
            yield readout

    inspection = inspect(scan.header, readouts(), Settings())
    assert "the stream ended early: connection lost in an acquisition" in inspection.missing
    assert [one.n_readouts for one in inspection.slices] == [118]
    assert inspection.exit_code == 3


def negative_density(scan: Scan) -> Scan:
    return scan.trajectory(lambda k: np.column_stack([k, -np.hypot(*k.T)]))


def first_timepoints(scan: Scan, n: int) -> Scan:
    scan.settings["timepoints"] = n
    return scan


def three_lost(scan: Scan) -> Scan:
    return scan.without(scan.imaging[[3, 4, 77]])


def no_directions(scan: Scan) -> Scan:
    for name in ("read_dir", "phase_dir", "slice_dir"):
        scan.heads[name] = 0
    return scan


@pytest.mark.parametrize(
    "change",
    [
        lambda scan: scan,
        negative_density,
        lambda scan: first_timepoints(scan, 10),
        lambda scan: first_timepoints(scan, 50),
        three_lost,
        no_directions,
        lambda scan: scan.without_noise(),
    ],
    ids=["whole", "negative density", "10 timepoints", "50 timepoints", "3 lost", "no places", "no noise"],
)
def test_it_says_of_a_slice_what_its_images_say(scan: Scan, change: Callable[[Scan], Scan]) -> None:
    changed = change(scan)
    replayed = changed.run()
    meta = replayed.of("T1").meta
    inspection = inspect(changed.header, changed.readouts(), Settings.from_properties(changed.settings))
    (one,) = inspection.slices
    assert one.status == meta["whorl_status"]
    assert "; ".join(one.notes) == meta.get("whorl_notes", "")
    # Not less: that the order biases low-rank maps is a warning of its own.
    assert inspection.exit_code >= replayed.outcome.exit_code


def test_a_degraded_slice_is_doubtful() -> None:
    one = SliceSummary("slice 0", 10, 10, 50.0, 0.3, "complete", ())
    assert Inspection(slices=[one]).exit_code == 0
    assert Inspection(slices=[one, replace(one, status="degraded")]).exit_code == 3


def test_the_signal_to_noise_ratio_is_that_of_repeated_scans(tmp_path: Path) -> None:
    """The same scan with noise of the same covariance added: the images differ by noise alone."""
    path = tmp_path / "scan.h5"
    simulate(path, **_SMALL, noise=4e-3)
    told = read_truth(path).parameters
    mixing = np.linalg.cholesky(told["noise_covariance"]) * told["noise_sd"]
    scan = Scan.load(path)
    scan.settings["coil_maps"] = "walsh"  # maps that noise moves less than those of polynomials
    again, rng = scan.copy(), np.random.default_rng(1)
    for n in again.imaging:
        normal = rng.standard_normal((*again.data[n].shape, 2)) @ [1, 1j] / np.sqrt(2)
        again.data[n] += (mixing @ normal).astype(np.complex64)
    seen: list[Inside] = []

    def observe(_: int, result: SliceResult) -> None:
        assert result.inside is not None
        seen.append(result.inside)

    for one in (scan, again):
        settings = Settings.from_properties(one.settings)
        reconstruct_scan(one.header, one.readouts(), settings, lambda _: None, observe=observe)
    a, b = (one.images[0] * one.scale for one in seen)
    mask = seen[0].mask
    repeated = float(a[mask].abs().median() / (a - b)[mask].abs().square().mean().sqrt())
    snr = inspect(scan.header, scan.readouts(), Settings.from_properties(scan.settings)).slices[0].snr
    # 130 and 134: the coil maps differ by noise as well.
    assert snr == pytest.approx(repeated, rel=0.06)
