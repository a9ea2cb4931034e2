"""The pipeline as a whole: fall-backs, deadlines, errors that stay with their slice, and settings that
are used."""

from __future__ import annotations

from typing import Any

import ismrmrd
import numpy as np
import pytest
import torch

import whorl.pipeline
import whorl.reconstruction
from scan_edit import QUANTITIES, Result, Scan, assert_close
from whorl.config import Settings
from whorl.pipeline import reconstruct_scan
from whorl.scan.failure import ScanError

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

    monkeypatch.setattr(whorl.reconstruction, "fit_inr", fail)
    fell_back(scan.run(method="inr"), untouched, str(error) or "KeyError")


def test_a_slice_that_raises_does_not_cost_the_other(
    scan: Scan, untouched: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = whorl.reconstruction.match, []

    def fail_once(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError
        return real(*arguments)

    monkeypatch.setattr(whorl.reconstruction, "match", fail_once)
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

    monkeypatch.setattr(whorl.pipeline, "cached_dictionary", fail)
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
    for n in (0, 1):
        np.testing.assert_array_equal(both.of("T2", n).data, alone.of("T2").data)


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
        ("inversion_time_ms", 300),
    ],
)
def test_a_property_of_the_low_rank_maps_is_used(
    scan: Scan, untouched: Result, name: str, value: float
) -> None:
    result = scan.run(**{name: value})
    assert result.outcome.exit_code == 0
    ours, theirs = result.physical("T1"), untouched.physical("T1")
    assert not np.array_equal(ours, theirs) or not np.array_equal(
        result.physical("T2"), untouched.physical("T2")
    )
    if name.startswith("t"):
        values = result.physical(name[:2].upper())
        values = values[values > 0]
        # Half a step of the integers.
        assert values.min() >= value - 0.5 if "min" in name else values.max() <= value + 0.5
    assert result.of("T1").meta["whorl_settings"] != untouched.of("T1").meta["whorl_settings"]


@pytest.fixture(scope="module")
def quick(loaded_scan: Scan) -> Result:
    return loaded_scan.copy().run(**QUICK)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("start", "adjoint"),
        ("correction_steps", 3),
        ("fit", "adam"),
        ("iterations", 3),
        ("levels", 2),
        ("features", 2),
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


def test_the_same_settings_make_the_same_maps(scan: Scan, quick: Result) -> None:
    result = scan.run(**QUICK)
    for role in QUANTITIES:
        np.testing.assert_array_equal(result.of(role).data, quick.of(role).data)


def test_both_nuffts_agree(scan: Scan) -> None:
    one, other = (scan.copy().run(nufft=name) for name in ("finufft", "sigpy"))
    # SigPy's gridding is good to three digits.
    assert_close(one, other, share=0.95)
