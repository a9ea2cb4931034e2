"""The pipeline as a whole: fall-backs, deadlines, errors that stay with their slice, and settings that
are used."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ismrmrd
import numpy as np
import pytest
import torch

import whorl.pipeline.dictionaries
import whorl.pipeline.scan
import whorl.pipeline.slices
import whorl.recon.methods
from scan_edit import QUANTITIES, Result, Scan, assert_close
from whorl.config import PROPERTIES, Settings
from whorl.pipeline.scan import reconstruct_scan
from whorl.scan.failure import ScanError
from whorl.scan.readout import Readout

#: An INR that takes a fraction of a second and is still better than nothing.
QUICK = {"method": "inr", "iterations": 8, "levels": 4, "hidden": 24, "correction_steps": 1}


def fell_back(result: Result, untouched: Result, why: str) -> None:
    assert result.outcome.exit_code == 3
    for role in QUANTITIES:
        meta = result.of(role).meta
        assert (meta["whorl_method"], meta["whorl_status"]) == ("lowrank", "fallback")
        assert "low-rank maps instead of the INR" in meta["whorl_notes"]
        assert why in meta["whorl_notes"]
        np.testing.assert_array_equal(result.of(role).data, untouched.of(role).data)


def test_a_deadline_that_passes_gives_the_low_rank_maps(scan: Scan, untouched: Result) -> None:
    result = scan.run(method="inr", deadline_s=1e-6)
    fell_back(result, untouched, "when its time was over")


def test_a_deadline_that_is_kept_changes_nothing(scan: Scan) -> None:
    result = scan.run(**QUICK, deadline_s=300)
    assert result.outcome.exit_code == 0
    assert result.of("T1").meta["whorl_method"] == "inr"


@pytest.mark.parametrize(
    "error",
    [FloatingPointError("it diverged"), ValueError("odd"), torch.OutOfMemoryError("full"), KeyError()],
    ids=lambda error: type(error).__name__,
)
def test_an_inr_that_fails_gives_the_low_rank_maps(
    scan: Scan, untouched: Result, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(whorl.recon.methods, "fit_inr", fail)
    fell_back(scan.run(method="inr"), untouched, str(error) or "KeyError")


def test_a_slice_that_raises_does_not_cost_the_other(
    scan: Scan, untouched: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = whorl.pipeline.slices.match, []

    def fail_once(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError
        return real(*arguments, **named)

    monkeypatch.setattr(whorl.pipeline.slices, "match", fail_once)
    result = scan.two_slices().run()
    assert result.slices() == [1]
    assert_close(result, untouched, slice_number=1)
    assert result.outcome.failures == ("slice 0 failed: ZeroDivisionError",)
    assert ("ERR", "slice 0 failed: ZeroDivisionError") in result.texts
    assert result.outcome.exit_code == 3


def test_a_receiver_that_is_gone_is_a_failure(scan: Scan) -> None:
    def send(_: ismrmrd.Image) -> None:
        raise BrokenPipeError("the client is gone")

    outcome = reconstruct_scan(
        scan.header, scan.readouts(), Settings.from_properties({"method": "lowrank"}), send
    )
    assert outcome.exit_code == 1
    assert outcome.failures == ("slice 0 failed: the client is gone",)


def test_a_dictionary_that_cannot_be_built_is_said(scan: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no such physics")

    monkeypatch.setattr(whorl.pipeline.scan, "get_dictionary", fail)
    try:
        # A range that no other test has, because dictionaries are kept.
        texts = scan.run(t1_max_ms=4321, n_coefficients=3).outcome.failures
    except ScanError as error:
        texts = (str(error),)
    assert any("no such physics" in text for text in texts)


def test_the_joint_inr_is_near_the_low_rank_maps(scan: Scan, untouched: Result) -> None:
    result = scan.run(**{**QUICK, "iterations": 40})
    assert result.outcome.exit_code == 0
    assert result.of("T1").meta["whorl_method"] == "inr"
    inside = (result.physical("T1") > 0) & (untouched.physical("T1") > 0)
    ratio = result.physical("T1")[inside] / untouched.physical("T1")[inside]
    # What differs pixel by pixel is aliasing, on which the methods need not agree.
    assert inside.sum() > 0.97 * (untouched.physical("T1") > 0).sum()
    assert np.median(ratio) == pytest.approx(1, abs=0.15)


def test_each_slice_alone_and_together(scan: Scan) -> None:
    alone = scan.copy().run(**QUICK)
    both = scan.two_slices().run(**QUICK)
    for n, role in itertools.product((0, 1), QUANTITIES):
        np.testing.assert_array_equal(both.of(role, n).data, alone.of(role).data)


def test_a_gpu_that_is_not_there(scan: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ScanError, match="device=cuda"):
        scan.run(device="cuda")


# --- Every property is used ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("t1_min_ms", 900),
        ("t1_max_ms", 700),
        ("t2_min_ms", 90),
        ("t2_max_ms", 40),
        ("dictionary_step", 0.2),
        ("energy", 0.98),
        ("n_coefficients", 2),
        ("virtual_coils", 1),
        ("coil_energy", 0.6),
        ("compression", "off"),
        ("compression", "rovir"),
        ("inversion_time_ms", 300),
        ("inversion_efficiency", 0.7),
        ("slice_profile", "1 0.9 0.4"),
        ("slice_profile", "sinc"),
        ("refine", "off"),
        ("b1", "match"),
    ],
)
def test_a_property_of_the_low_rank_maps_is_used(
    scan: Scan, untouched: Result, name: str, value: float | str
) -> None:
    result = scan.run(**{name: value})
    assert result.outcome.exit_code == 0
    ours, theirs = result.physical("T1"), untouched.physical("T1")
    assert not np.array_equal(ours, theirs) or not np.array_equal(
        result.physical("T2"), untouched.physical("T2")
    )
    if name.startswith("t"):
        assert isinstance(value, int)
        values = result.physical(name[:2].upper())
        values = values[values > 0]
        # Half a step of the integers.
        assert values.min() >= value - 0.5 if "min" in name else values.max() <= value + 0.5
    assert result.of("T1").meta["whorl_settings"] != untouched.of("T1").meta["whorl_settings"]


def test_the_region_of_the_virtual_coils_is_used(scan: Scan) -> None:
    maps = [
        scan.copy().run(compression="rovir", rovir_region=region, virtual_coils=2).physical("T1")
        for region in ("", "0.1 0.5 0.1 0.5")
    ]
    assert not np.array_equal(*maps)


def test_a_region_that_cannot_be_told_from_the_rest_is_said(scan: Scan, untouched: Result) -> None:
    # Six of 24 interleaves, each four times as often.
    few = [n for n in scan.imaging if scan.heads["idx"]["kspace_encode_step_1"][n] % 4 == 0]
    noise = np.setdiff1d(np.arange(len(scan.heads)), scan.imaging)
    scan.take([*noise, *few])
    result = scan.run(compression="rovir", min_readouts=0.2)
    assert "the strongest virtual coils instead of rovir" in result.of("T1").meta["whorl_notes"]
    assert result.outcome.exit_code == 3


@pytest.fixture(scope="module")
def quick(loaded_scan: Scan) -> Result:
    return loaded_scan.copy().run(**QUICK)


@pytest.fixture(scope="module")
def plain(loaded_scan: Scan) -> Result:
    return loaded_scan.copy().run(**QUICK, guide="off")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("start", "adjoint"),
        ("guide", "off"),
        ("coil_maps", "walsh"),
        ("correction_steps", 3),
        ("fit", "adam"),
        ("iterations", 3),
        ("levels", 2),
        ("base_resolution", 4),
        ("finest_resolution", 24),
        ("hidden", 8),
        ("learning_rate", 0.2),
        ("lambda_enc", 10.0),
        ("lambda_mlp", 10.0),
        ("ridge", 0.5),
        ("seed", 1),
    ],
)
def test_a_property_of_the_inr_is_used(scan: Scan, quick: Result, name: str, value: object) -> None:
    result = scan.run(**{**QUICK, name: value})
    assert result.of("M0").meta["whorl_method"] == "inr"
    assert not np.array_equal(result.of("M0").data, quick.of("M0").data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("features", 2),
        ("levels", 2),
        ("base_resolution", 4),
        ("finest_resolution", 24),
        ("hidden", 8),
        ("iterations", 3),
        ("learning_rate", 0.2),
        ("seed", 1),
    ],
)
def test_a_property_of_the_inr_without_a_guide_is_used(
    scan: Scan, plain: Result, name: str, value: object
) -> None:
    result = scan.run(**{**QUICK, "guide": "off", name: value})
    assert result.of("M0").meta["whorl_method"] == "inr"
    assert not np.array_equal(result.of("M0").data, plain.of("M0").data)


@pytest.mark.parametrize(
    ("guide", "told"),
    [
        ("on", {"levels": 4, "hidden": 16, "finest_resolution": 64, "learning_rate": 0.003}),
        ("off", {"levels": 8, "hidden": 64, "finest_resolution": 96, "learning_rate": 0.03}),
    ],
)
def test_zero_and_minus_one_mean_what_the_properties_say(
    scan: Scan, guide: str, told: dict[str, object]
) -> None:
    given: dict[str, object] = {"method": "inr", "guide": guide, "iterations": 4}
    one, other = scan.copy().run(**given), scan.copy().run(**given, **told)
    for role in QUANTITIES:
        np.testing.assert_array_equal(one.of(role).data, other.of(role).data)
    plain = scan.copy().run(method="inr", guide=guide)
    iterations = int(plain.of("T1").meta["whorl_iterations"]) or "none"
    said = f"{iterations} for guide=on" if guide == "on" else f"{iterations} without"
    assert said in PROPERTIES["iterations"].text


def test_the_same_settings_make_the_same_maps(scan: Scan, quick: Result) -> None:
    result = scan.run(**QUICK)
    for role in QUANTITIES:
        np.testing.assert_array_equal(result.of(role).data, quick.of(role).data)


def test_both_nuffts_agree(scan: Scan) -> None:
    one, other = (scan.copy().run(nufft=name) for name in ("finufft", "sigpy"))
    # SigPy's gridding is good to three digits.
    assert_close(one, other, share=0.95)


# --- Signal model, transmit field, cache -----------------------------------------------------------------


def t1_and_t2(result: Result) -> tuple[np.ndarray, np.ndarray]:
    return result.physical("T1"), result.physical("T2")


def differs(one: Result, other: Result) -> bool:
    return any(not np.array_equal(a, b) for a, b in zip(t1_and_t2(one), t1_and_t2(other), strict=True))


def test_properties_that_belong_together_are_used(scan: Scan, untouched: Result, tmp_path: Path) -> None:
    diffusion = scan.copy().run(diffusion_um2_per_ms=2.0, spoiler_cycles_per_mm=2.0)
    assert differs(diffusion, untouched)
    assert differs(diffusion, scan.copy().run(diffusion_um2_per_ms=2.0, spoiler_cycles_per_mm=1.0))
    sinc = scan.copy().run(slice_profile="sinc", time_bandwidth=2.0)
    assert differs(sinc, scan.copy().run(slice_profile="sinc", time_bandwidth=8.0))
    pulse = tmp_path / "pulse.txt"
    pulse.write_text("\n".join(["1"] * 64))
    assert differs(scan.copy().run(rf_shape=str(pulse), time_bandwidth=2.0), sinc)


def test_a_known_transmit_field_changes_the_maps_of_its_slice(
    scan: Scan, untouched: Result, tmp_path: Path
) -> None:
    path = tmp_path / "b1.npy"
    np.save(path, np.stack([np.ones((16, 16)), np.full((16, 16), 0.85)]))
    result = scan.two_slices().run(b1_map=str(path), n_coefficients=8)
    plain = scan.copy().run(n_coefficients=8)
    assert result.outcome.exit_code == 0
    inside = untouched.physical("T2") > 0
    ratios = [np.median(result.physical("T2", n)[inside] / plain.physical("T2")[inside]) for n in (0, 1)]
    # The basis is another one, for a range of B1; with B1 = 1 the maps hardly are.
    assert ratios[0] == pytest.approx(1, abs=0.05)
    assert abs(ratios[1] - 1) > 0.08
    # The ends of the axis and its step are used.
    other = scan.copy().run(b1_map=str(path), n_coefficients=8, b1_step=0.05)
    assert differs(other, result)


def test_a_transmit_field_with_gaps_is_said(scan: Scan, tmp_path: Path) -> None:
    path = tmp_path / "b1.npy"
    values = np.full((2, 16, 16), 0.9)
    values[0, :, 8:] = 0
    values[0, 4, 4] = 1.6
    values[1] = 0
    np.save(path, values)
    result = scan.two_slices().run(b1_map=str(path))
    assert result.outcome.exit_code == 3
    first, second = (result.of("T1", n).meta for n in (0, 1))
    assert first["whorl_status"] == second["whorl_status"] == "degraded"
    assert "B1 was not measured in" in first["whorl_notes"]
    assert "B1 is beyond 0.9 to 1.3" in first["whorl_notes"]
    assert "the B1 map has no values for this slice" in second["whorl_notes"]


def test_a_slice_that_the_map_lacks_has_the_flip_angles_as_planned(scan: Scan, tmp_path: Path) -> None:
    path = tmp_path / "b1.npy"
    np.save(path, np.stack([np.full((16, 16), 1.25), np.zeros((16, 16))]))
    result = scan.two_slices().run(b1_map=str(path), n_coefficients=8)
    plain = scan.copy().run(n_coefficients=8)
    inside = plain.physical("T2") > 0
    ratio = np.median(result.physical("T2", 1)[inside] / plain.physical("T2")[inside])
    assert ratio == pytest.approx(1, abs=0.05)  # of another basis


def test_a_uniform_transmit_field(scan: Scan, tmp_path: Path) -> None:
    path = tmp_path / "b1.npy"
    np.save(path, np.full((16, 16), 1.2))
    assert scan.copy().run(b1_map=str(path)).outcome.exit_code == 0
    np.save(path, np.full((16, 16), 2.5))
    result = scan.copy().run(b1_map=str(path))
    assert result.outcome.exit_code == 3
    assert "Set properties b1_min and b1_max" in result.said


def test_a_matched_transmit_field_is_a_map_of_its_own(scan: Scan) -> None:
    result = scan.run(b1="match", b1_min=0.9, b1_max=1.2, b1_step=0.1)
    assert result.outcome.exit_code == 0
    image = result.of("B1")
    assert (image.image_series_index, image.meta["Units"]) == (5, "1")
    values, inside = result.physical("B1"), result.physical("T1") > 0
    assert ((values > 0) == inside).all()
    assert values[inside].min() >= 0.9 - 5e-4
    assert values[inside].max() <= 1.2 + 5e-4
    assert len({i.image_index for i in result.images}) == len(result.images) == 5


@pytest.mark.parametrize(
    ("properties", "says"),
    [
        ({"b1_map": "{missing}"}, "the B1 map .* cannot be read"),
        ({"rf_shape": "{missing}"}, "the RF shape .* cannot be read"),
    ],
)
def test_files_that_are_not_there_stop_the_scan(
    scan: Scan, tmp_path: Path, properties: dict[str, str], says: str
) -> None:
    filled = {name: value.format(missing=tmp_path / "missing") for name, value in properties.items()}
    with pytest.raises(ScanError, match=says):
        scan.run(**filled)


def test_a_train_that_allows_no_profile_is_said(scan: Scan, tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("flip_deg,tr_ms,te_ms\n" + "200,9,2\n" * 120)
    with pytest.raises(ScanError, match="no dictionary can be made: a flip angle of the train is 200"):
        scan.run(sequence=str(path), slice_profile="sinc")


def test_a_cache_that_cannot_be_used_costs_nothing_but_a_warning(scan: Scan, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    # A range that no other test has: this process remembers dictionaries.
    result = scan.run(t1_max_ms=5001, cache_dir=str(in_the_way))
    assert result.outcome.exit_code == 0
    assert result.of("T1").meta["whorl_status"] == "complete"
    assert [level for level, text in result.texts if "goes on without the cache" in text] == ["WRN"]


def test_a_dictionary_is_kept_where_it_is_told_to(scan: Scan, tmp_path: Path) -> None:
    before = scan.copy().run(t1_max_ms=5002, cache_dir=str(tmp_path))
    (kept,) = tmp_path.iterdir()
    whorl.pipeline.dictionaries._recent.clear()
    used = kept.stat().st_mtime_ns
    again = scan.copy().run(t1_max_ms=5002, cache_dir=str(tmp_path))
    assert not differs(before, again)
    assert kept.stat().st_mtime_ns > used
    # Where it is kept changes no map.
    elsewhere = scan.copy().run(t1_max_ms=5002)
    assert before.of("T1").meta["whorl_settings"] == elsewhere.of("T1").meta["whorl_settings"]
    off = tmp_path / "off"
    scan.copy().run(t1_max_ms=5003, cache_dir=str(off), cache_mb=0)
    assert not off.exists()


def test_scans_at_the_same_time_build_one_dictionary(scan: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    real = whorl.pipeline.dictionaries.build_dictionary

    def count(*arguments: Any) -> Any:
        built.append(1)
        return real(*arguments)

    monkeypatch.setattr(whorl.pipeline.dictionaries, "build_dictionary", count)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda s: s.run(t1_max_ms=5004), [scan.copy() for _ in range(3)]))
    assert len(built) == 1
    assert not differs(results[0], results[1])
    assert not differs(results[0], results[2])


def test_a_failed_build_is_not_remembered(scan: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(whorl.pipeline.dictionaries, "build_dictionary", fail)
        failed = scan.copy().run(t1_max_ms=5005)
    assert failed.outcome.exit_code == 1
    assert failed.outcome.failures == ("slice 0 failed: no memory",)
    assert scan.copy().run(t1_max_ms=5005).outcome.exit_code == 0


def test_a_pulse_that_cannot_be_read_does_not_wait_for_the_train(scan: Scan, tmp_path: Path) -> None:
    def readouts() -> Iterator[Readout]:
        raise AssertionError("read although nothing can be made of it")
        yield

    with pytest.raises(ScanError, match=r"the RF shape .* cannot be read"):
        scan.no_header_train().run(readouts(), rf_shape=str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("properties", "says"),
    [
        ({"b1": "match", "dictionary_step": 0.005, "b1_step": 0.005}, "expected at most 2000000 atoms"),
        ({"t1_max_ms": 100, "t2_min_ms": 100}, "1 atoms of 120 timepoints: expected at least 2"),
    ],
)
def test_dictionaries_that_are_too_large_or_too_small(
    scan: Scan, properties: dict[str, object], says: str
) -> None:
    with pytest.raises(ScanError, match=says):
        scan.run(**properties)


@pytest.mark.parametrize(
    "properties", [{}, {"iterations": 2}, {"guide": "off"}, {"fit": "adam", "iterations": 0}], ids=str
)
def test_settings_say_whether_a_fit_iterates(scan: Scan, properties: dict[str, object]) -> None:
    meta = scan.run(method="inr", **properties).of("T1").meta
    iterates = Settings.from_properties({"method": "inr", **properties}).iterates
    assert (int(meta["whorl_iterations"]) > 0) == iterates


def test_what_adam_needs_is_not_imported_where_nothing_iterates(tiny_scan: Path) -> None:
    """It takes longer than a second, in the thread in which slices wait."""
    program = (
        "import sys\n"
        "from whorl.config import Settings\n"
        "from whorl.doors.files import read_header, read_readouts\n"
        "from whorl.pipeline.scan import reconstruct_scan\n"
        "path, iterations = sys.argv[1:]\n"
        "settings = Settings(method='inr', iterations=int(iterations))\n"
        "reconstruct_scan(read_header(path), read_readouts(path), settings, lambda image: None)\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    for iterations, imported in (("-1", "False"), ("1", "True")):
        command = [sys.executable, "-c", program, str(tiny_scan), iterations]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == imported
