"""Whatever a slice holds, no map holds what is not a number, and what is amiss is marked or said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import whorl.pipeline.scan
import whorl.pipeline.slices
from scan_edit import QUANTITIES, Result, Scan
from whorl.config import Settings
from whorl.kspace.slicebuffer import SubspaceKspace
from whorl.physics.dictionary import Dictionary
from whorl.pipeline.encoding import Encoding
from whorl.pipeline.slices import SliceResult, reconstruct_slice
from whorl.recon import corrected, methods
from whorl.scan.failure import ScanError
from whorl.simulation.scan import simulate
from whorl.simulation.signals import jiang_train

#: Few iterations: what comes of them is not judged here.
_FEW = {"iterations": 4, "llr_iterations": 2}
METHODS: dict[str, dict[str, Any]] = {
    "inr": {"method": "inr"},
    "inr without guide": {"method": "inr", "guide": "off", **_FEW},
    "inr seed": {"method": "inr", "preset": "seed", **_FEW},
    "llr": {"method": "llr", **_FEW},
    "lowrank": {"method": "lowrank", **_FEW},
}
UNEVEN = pytest.mark.parametrize("method", ["inr", "inr without guide"])
EACH_METHOD = pytest.mark.parametrize("method", METHODS)
FITTED = pytest.mark.parametrize("method", [name for name in METHODS if name != "lowrank"])


@dataclass(frozen=True)
class Slice:
    """What `reconstruct_slice` starts from."""

    kspace: SubspaceKspace
    encoding: Encoding
    dictionary: Dictionary

    def run(self, method: str, **changed: Any) -> SliceResult:
        """Reconstruct it with another k-space, or with other parts of it."""
        kspace = replace(self.kspace, **changed)
        settings = Settings.from_properties(METHODS[method])
        result = reconstruct_slice(kspace, self.encoding, self.dictionary, settings, None)
        for image in (result.maps.t1_ms, result.maps.t2_ms, result.maps.m0, result.maps.quality):
            assert image.shape == self.encoding.shape
            assert np.isfinite(image).all()
        return result


def slice_of(scan: Scan) -> Slice:
    """As the pipeline hands it over."""
    seen: list[Slice] = []
    real = reconstruct_slice

    def look(
        kspace: SubspaceKspace, encoding: Encoding, dictionary: Dictionary, *others: Any, **named: Any
    ) -> SliceResult:
        seen.append(Slice(kspace, encoding, dictionary))
        return real(kspace, encoding, dictionary, *others, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whorl.pipeline.scan, "reconstruct_slice", look)
        scan.run()
    (one,) = seen
    return one


@pytest.fixture(scope="module")
def slice_(loaded_scan: Scan) -> Slice:
    return slice_of(loaded_scan.copy())


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Slice:
    """One whose interleaves came in sequential order: what is done for it alone can fail too."""
    path = tmp_path_factory.mktemp("uneven") / "scan.h5"
    simulate(path, phantom="nist", timepoints=120, interleaves=24, coils=4, matrix=64, order="sequential")
    return slice_of(Scan.load(path))


def is_zero(result: SliceResult) -> bool:
    maps = result.maps
    return not any(image.any() for image in (maps.t1_ms, maps.t2_ms, maps.m0, maps.quality))


def spoilt(place: tuple[int, ...], value: float) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a function of another one whose first result holds a value that it should not."""

    def around(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        calls: list[int] = []

        def spoiling(*arguments: Any, **named: Any) -> Tensor:
            result = function(*arguments, **named)
            if not calls:
                result = result.clone()
                result[place] = value
            calls.append(1)
            return result

        return spoiling

    return around


@EACH_METHOD
def test_a_good_slice_is_complete(slice_: Slice, method: str) -> None:
    result = slice_.run(method)
    assert result.method == METHODS[method]["method"]
    assert result.status == "complete"
    assert (result.maps.t1_ms > 0).sum() > 1000


@EACH_METHOD
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["bins", "gram"])
def test_data_that_are_no_numbers_give_no_maps(slice_: Slice, method: str, where: str, value: float) -> None:
    values = getattr(slice_.kspace, where).clone()
    values[(3, 0, 1, 5)[: values.ndim]] = value
    if where == "bins":
        with pytest.raises(ScanError, match="the folded data are not finite"):
            slice_.run(method, bins=values)
        return
    result = slice_.run(method, **{where: values})
    assert result.status != "complete"
    assert result.notes
    assert is_zero(result)


@EACH_METHOD
def test_coil_maps_that_are_no_numbers_give_no_maps(
    slice_: Slice, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = spoilt((0, 30, 31), np.nan)(whorl.pipeline.slices.maps_from_centre)
    monkeypatch.setattr(whorl.pipeline.slices, "maps_from_centre", function)
    result = slice_.run(method)
    assert result.status != "complete"
    assert is_zero(result)


@FITTED
def test_images_that_are_no_numbers_give_low_rank_maps(
    slice_: Slice, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of x0; those that are calibrated are as they should be.
    function = spoilt((0, 0, 30, 31), np.nan)(whorl.pipeline.slices.adjoint_coil_images)
    monkeypatch.setattr(whorl.pipeline.slices, "adjoint_coil_images", function)
    result = slice_.run(method)
    assert (result.method, result.status) == ("lowrank", "fallback")
    assert "not finite" in result.notes[-1]
    monkeypatch.undo()
    plain = slice_.run("lowrank").maps
    assert plain.m0[30, 31] > 0
    expected = plain.m0.copy()
    expected[30, 31] = 0  # of this pixel alone there is nothing
    np.testing.assert_array_equal(result.maps.m0, expected)


@UNEVEN
def test_a_refinement_that_fails_gives_low_rank_maps(
    uneven: Slice, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = spoilt((0, 20, 21), np.nan)(corrected.polynomial_maps)
    monkeypatch.setattr(corrected, "polynomial_maps", function)
    fell_back(uneven, method)


@UNEVEN
def test_a_head_that_fails_gives_low_rank_maps(
    uneven: Slice, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "kspace_head", spoilt((0, 20, 21), np.inf)(methods.kspace_head))
    fell_back(uneven, method)


def test_a_guide_that_fails_gives_low_rank_maps(slice_: Slice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "guide", spoilt((0, 20, 21), np.nan)(methods.guide))
    fell_back(slice_, "inr")


def fell_back(one: Slice, method: str) -> None:
    """It gives low-rank maps as if they had been asked for, and says why."""
    result = one.run(method)
    assert (result.method, result.status) == ("lowrank", "fallback")
    assert result.notes[-1].startswith("low-rank maps instead of the INR: ")
    assert "not finite" in result.notes[-1]
    assert (result.maps.t1_ms > 0).sum() > 1000
    plain = one.run("lowrank").maps
    for name in ("t1_ms", "t2_ms", "m0", "quality"):
        np.testing.assert_array_equal(getattr(result.maps, name), getattr(plain, name))


@EACH_METHOD
def test_a_slice_of_pure_noise_has_no_maps(slice_: Slice, method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(slice_.kspace.bins.shape, generator=generator, dtype=torch.complex64)
    result = slice_.run(method, bins=noise)
    assert (result.status, result.notes) == ("degraded", ["the slice has no signal, its maps are zero"])
    assert is_zero(result)


@EACH_METHOD
@pytest.mark.parametrize("pixels", [0, 1])
def test_objects_that_are_hardly_there(
    slice_: Slice, method: str, pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.zeros(slice_.encoding.shape, dtype=torch.bool)
    mask[30, 30 : 30 + pixels] = True
    monkeypatch.setattr(whorl.pipeline.slices, "object_mask", lambda *_: mask)
    result = slice_.run(method)
    assert np.array_equal(result.maps.m0 > 0, mask.numpy())
    if not pixels:
        note = "no object stands out of the slice, its maps are zero"
        assert (result.status, result.notes) == ("degraded", [note])


@EACH_METHOD
def test_one_coil_is_enough(slice_: Slice, method: str) -> None:
    result = slice_.run(method, bins=slice_.kspace.bins[:, :, :1].contiguous())
    assert result.method == METHODS[method]["method"]
    assert (result.maps.t1_ms > 0).sum() > 1000


@pytest.mark.parametrize(
    ("method", "factor"),
    [("inr", 1e-12), ("inr", 1e12), ("inr without guide", 1e12), ("llr", 1e-12), ("lowrank", 1e12)],
)
def test_the_unit_of_the_data_does_not_matter(slice_: Slice, method: str, factor: float) -> None:
    scaled, plain = slice_.kspace.scaled(factor), slice_.run(method)
    result = slice_.run(method, bins=scaled.bins)
    assert (result.method, result.status) == (plain.method, plain.status)
    inside = plain.maps.m0 > 0
    # Rounding may take a pixel to another atom.
    near = np.abs(result.maps.m0[inside] / factor - plain.maps.m0[inside]) < 0.02 * plain.maps.m0[inside]
    assert near.mean() > 0.97


# --- Whole scans --------------------------------------------------------------------------------------------


def assert_finite(result: Result) -> None:
    for role in QUANTITIES:
        assert np.isfinite(result.physical(role)).all()


@EACH_METHOD
def test_an_interleaf_that_never_came(scan: Scan, untouched: Result, method: str) -> None:
    lost = [n for n in scan.imaging if scan.heads["idx"]["kspace_encode_step_1"][n] == 5]
    result = scan.without(lost).run(**METHODS[method])
    meta = result.of("T1").meta
    assert meta["whorl_method"] == METHODS[method]["method"]
    assert meta["whorl_status"] == "degraded"
    assert f"{len(lost)} of 120 readouts are missing" in meta["whorl_notes"]
    assert_finite(result)
    ours, theirs = result.physical("M0") > 0, untouched.physical("M0") > 0
    assert (ours & theirs).sum() > 0.95 * theirs.sum()


@EACH_METHOD
def test_readouts_of_nothing_but_noise(scan: Scan, method: str) -> None:
    generator = np.random.default_rng(3)
    for n in scan.imaging:
        pair = generator.standard_normal((2, *scan.data[n].shape))
        scan.data[n] = (pair[0] + 1j * pair[1]).astype(np.complex64)
    result = scan.run(**METHODS[method])
    assert result.outcome.exit_code == 3
    assert "no signal" in result.of("T1").meta["whorl_notes"]
    assert not any(result.physical(role).any() for role in QUANTITIES)


@pytest.fixture(scope="module")
def short_scans(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Scan]:
    made: dict[int, Scan] = {}

    def short_scan(n_timepoints: int) -> Scan:
        if n_timepoints not in made:
            path: Path = tmp_path_factory.mktemp("short") / "scan.h5"
            simulate(path, phantom="nist", timepoints=n_timepoints, interleaves=24, coils=2, matrix=64)
            made[n_timepoints] = Scan.load(path)
        return made[n_timepoints].copy()

    return short_scan


@EACH_METHOD
@pytest.mark.parametrize(("n_timepoints", "n_coefficients"), [(10, 0), (2, 5)])
def test_trains_that_are_too_short_give_numbers(
    short_scans: Callable[[int], Scan], method: str, n_timepoints: int, n_coefficients: int
) -> None:
    scan = short_scans(n_timepoints)
    result = scan.run(**METHODS[method], n_coefficients=n_coefficients, dictionary_step=0.2)
    assert_finite(result)
    assert result.of("T1").meta["whorl_method"] == METHODS[method]["method"]


# --- The preset of the published data flow --------------------------------------------------------------


def test_the_preset_seed_is_what_it_stands_for(slice_: Slice) -> None:
    parts = {"start": "adjoint", "guide": "off", "head": "image", "fit": "adam"}

    def m0(**properties: Any) -> np.ndarray[Any, Any]:
        settings = Settings.from_properties({"method": "inr", **_FEW, **properties})
        return reconstruct_slice(slice_.kspace, slice_.encoding, slice_.dictionary, settings, None).maps.m0

    seed = m0(preset="seed")
    np.testing.assert_array_equal(m0(finest_resolution=96, levels=8, hidden=64, **parts), seed)
    for name, value in {"start": "corrected", "guide": "on", "fit": "varpro"}.items():
        changed = m0(preset="seed", **{name: value})
        assert not np.array_equal(changed, seed)
        np.testing.assert_array_equal(changed, m0(**{**parts, name: value}))


def test_the_kspace_head_is_for_an_uneven_order(slice_: Slice, uneven: Slice) -> None:
    for one, changes in ((uneven, True), (slice_, False)):
        kspace, image = (
            reconstruct_slice(
                one.kspace, one.encoding, one.dictionary, Settings.from_properties({"head": head}), None
            )
            for head in ("kspace", "image")
        )
        assert kspace.status == image.status == "complete"
        assert np.array_equal(kspace.maps.m0, image.maps.m0) != changes


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {"guide": "off"},
        {"method": "llr"},
    ],
    ids=str,
)
def test_rf_phases_that_make_the_basis_complex(tmp_path: Path, properties: dict[str, Any]) -> None:
    # A quadratic phase: coefficients that are taken as real would match anything.
    angles = (1.5 * np.arange(120) ** 2) % 360
    path = tmp_path / "scan.h5"
    train = replace(jiang_train(120), phase_deg=angles)
    simulate(path, phantom="nist", timepoints=120, interleaves=24, coils=4, matrix=64, train=train)
    result = Scan.load(path).run(**{"method": "inr", "iterations": 20, **properties})
    assert "the basis is complex" in result.said
    assert result.of("T1").meta["whorl_status"] == "fallback"
    plain = Scan.load(path).run(method="lowrank").physical("T1")
    inside = plain > 0
    assert np.median(np.abs(result.physical("T1")[inside] / plain[inside] - 1)) < 0.2
