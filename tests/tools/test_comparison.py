"""The comparison of the methods: what is written is what was reconstructed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from scan_edit import Scan
from whorl.cli import main
from whorl.config import Settings
from whorl.maps.images import SliceMaps
from whorl.pipeline.scan import find_protocol
from whorl.scan.header import read_header
from whorl.simulation.scan import simulate
from whorl.simulation.truth import read_truth
from whorl.tools.comparison import (
    Source,
    as_text,
    compare,
    first_timepoints,
    grid_search,
    reconstruct,
)
from whorl.tools.comparison_figures import draw_agreement
from whorl.tools.runs import Comparison

_RUNS = ["lowrank", "llr", "inr_seed", "inr"]
#: Not good, but soon done.
_QUICK = {"iterations": "4", "levels": "3", "llr_iterations": "3", "n_coefficients": "4"}
_FIGURES = ["figure1b.png", "figure2.gif", "figure3.png", "figure4.png", "figure5.png"]


def whorl(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@dataclass
class Written:
    """A scan, and what the command made of it."""

    scan: Path
    folder: Path
    printed: str
    document: dict[str, Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The command on a small brain with two regions."""
    folder = tmp_path_factory.mktemp("compare")
    scan = folder / "brain.h5"
    simulate(scan, phantom="brain", timepoints=60, interleaves=12, coils=2, matrix=64)
    properties = [part for item in _QUICK.items() for part in ("-p", "=".join(item))]
    result = whorl("compare", scan, "-o", folder / "out", *properties, "-p", "method=lowrank")
    assert result.exit_code == 0, result.output
    assert "method=lowrank is not used" in result.output
    document = json.loads((folder / "out" / "compare.json").read_text())
    return Written(scan, folder / "out", result.output, document)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A scan as if it had been measured: nobody knows the truth, and its phase is not in the coils alone.

    Its last 20 timepoints count for the reference only.
    """
    folder = tmp_path_factory.mktemp("measured")
    size = {"timepoints": 120, "interleaves": 24, "coils": 4, "matrix": 64}
    simulate(folder / "known.h5", phantom="nist", **size, phase_jump_rad=1.5)
    path = Scan.load(folder / "known.h5").write(folder / "scan.h5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("whorl.tools.comparison.TIMEPOINTS", 100)
        return compare(path, _QUICK, lambda text: None)


def test_all_files_are_there_and_can_be_seen(written: Written) -> None:
    assert sorted(path.name for path in written.folder.iterdir()) == ["compare.json", *_FIGURES]
    for name in _FIGURES:
        with Image.open(written.folder / name) as image:
            assert np.ptp(np.asarray(image.convert("L"))) > 100, name


def test_the_animation_ends_with_what_was_sent(written: Written) -> None:
    with Image.open(written.folder / "figure2.gif") as image:
        # Iterations 1 to 4 and what was sent; the writer joins frames that are equal.
        assert image.n_frames >= 5


def test_regions_are_those_of_the_maps(written: Written) -> None:
    truth, document = read_truth(written.scan), written.document
    assert list(document["runs"]) == _RUNS
    assert document["reference"] == "truth"
    settings = Settings.from_properties({**_QUICK, "method": "lowrank"})
    run = document["runs"]["lowrank"]
    assert run["settings"] == settings.digest()
    scan = Scan.load(written.scan)
    result = scan.run(**_QUICK, output_dtype="float32")
    for quantity in ("T1", "T2"):
        values = result.physical(quantity)
        for row in run["regions"][quantity]:
            inside = values[truth.labels[0] == 1 + truth.roi_names.index(row["name"])]
            assert row["n_pixels"] == len(inside)
            assert row["mean"] == pytest.approx(inside.mean(), rel=1e-4)  # sums in float32
            assert row["sd"] == pytest.approx(inside.std(), rel=1e-3)
            assert row["cov_percent"] == pytest.approx(100 * row["sd"] / row["mean"])
            assert row["bias_percent"] == pytest.approx(100 * (row["mean"] / row["truth"] - 1))
        covs = [row["cov_percent"] for row in run["regions"][quantity]]
        assert len(covs) >= 2
        assert run["summary"][f"{quantity} mean CoV %"] == pytest.approx(np.mean(covs))


def test_each_run_says_how_it_went(written: Written) -> None:
    for key, run in written.document["runs"].items():
        assert run["title"].endswith(" 60")
        assert (run["exit_code"], run["notes"], run["failures"]) == (0, [], [])
        assert run["seconds_per_slice"] > 0
        assert run["title"] in written.printed
        (one,) = run["slices"].values()
        assert one["method"] == key.split("_")[0]
    assert len({run["settings"] for run in written.document["runs"].values()}) == 4


def test_the_weight_of_llr_is_the_best_of_its_grid(written: Written) -> None:
    search = written.document["llr_search"]
    errors = {one["llr_lambda"]: one["error"] for one in search["grid"]}
    assert errors[search["chosen"]] == min(errors.values())
    # The run that counts was made with it: its maps are those that were judged.
    summary = written.document["runs"]["llr"]["summary"]
    assert summary["mean |log(map / truth)|"] == pytest.approx(errors[search["chosen"]], rel=1e-6)
    assert search["seconds_per_slice"] > written.document["runs"]["llr"]["seconds_per_slice"]


@pytest.mark.parametrize(("best", "most"), [(0.7, 0.7), (3.1, 2.8), (0.06, 0.04375)])
def test_the_grid_grows_until_its_best_lies_inside(best: float, most: float) -> None:
    errors = grid_search(lambda lam: abs(math.log(lam / best)), (0.35, 0.7, 1.4))
    assert list(errors) == sorted(errors)
    assert min(errors, key=errors.__getitem__) == pytest.approx(most)
    assert min(errors) < most < max(errors)


def test_the_grid_ends_where_nothing_can_be_judged() -> None:
    assert len(grid_search(lambda lam: math.inf, (0.35, 0.7, 1.4))) == 3
    assert len(grid_search(lambda lam: -lam, (0.35, 0.7, 1.4))) < 12


def test_without_truth_the_default_weight_is_taken(measured: Comparison, tmp_path: Path) -> None:
    assert measured.truth is None
    assert not measured.rows
    assert measured.reference == "low-rank 120"
    assert measured.search.errors == {}
    default = Settings.from_properties({}).llr_lambda
    assert (measured.search.chosen, measured.runs["llr"].settings.llr_lambda) == (default, default)
    said = f"LLR: weight {default:g}, search: none: without the truth nothing can be judged"
    assert said in as_text(measured)
    # The reference is not compared with itself, and nothing has a coefficient of variation.
    assert measured.summaries["lowrank_all"] == {}
    names = {f"{q} {what}" for q in ("T1", "T2") for what in ("voxelwise R2", "median difference %")}
    assert all(set(measured.summaries[key]) == names for key in _RUNS)
    draw_agreement(measured, tmp_path / "figure3.png")
    assert (tmp_path / "figure3.png").stat().st_size > 1000


def test_the_frames_are_of_the_inr_as_published_and_the_last_is_what_was_sent(measured: Comparison) -> None:
    run = measured.runs["inr_seed"]
    assert run.settings.preset == "seed"
    maps: SliceMaps = measured.frames[-1].maps
    np.testing.assert_array_equal(maps.t1_ms, run.maps["T1"][0])
    np.testing.assert_array_equal(maps.t2_ms, run.maps["T2"][0])
    assert np.abs(maps.t2_ms - measured.runs["inr"].maps["T2"][0]).max() > 1
    titles = [frame.title for frame in measured.frames]
    assert titles == ["iteration 1", "iteration 2", "iteration 3", "iteration 4", "sent"]
    before, after = measured.frames[0], measured.frames[-2]
    assert np.abs(after.features - before.features).max() > 0


def _source(scan: Scan, path: Path, **properties: object) -> Source:
    found = find_protocol(scan.header, scan.readouts(), Settings.from_properties(properties))
    return Source(scan.write(path), scan.header, found.resolved, 120, properties)


@pytest.mark.parametrize("counter", ["user_int", "arrival", "file"])
def test_the_first_timepoints_are_a_scan_that_ended_earlier(scan: Scan, tmp_path: Path, counter: str) -> None:
    T = 70
    shorter = scan.copy()
    header = read_header(scan.header)
    played = {"flipAngle_deg": header.flip_deg, "TR": header.tr_ms, "TE": header.te_ms}
    noise = np.setdiff1d(np.arange(len(scan.heads)), scan.imaging)
    shorter.take([*noise, *scan.imaging[:T]]).limit("repetition", T - 1)
    for name, values in played.items():
        shorter.header_list(name, values[:T])
    properties: dict[str, object] = {"method": "lowrank"}
    if counter == "arrival":
        properties["timepoint"] = counter
    if counter == "file":
        csv = tmp_path / "all.csv"
        rows = "\n".join(",".join(map(repr, row)) for row in zip(*played.values(), strict=True))
        csv.write_text(f"flip_deg,tr_ms,te_ms\n\n{rows}\n")
        properties["sequence"] = str(csv)
    source = _source(scan, tmp_path / "scan.h5", **properties)
    _, outcome, results = reconstruct(first_timepoints(source, T), {}, shown=0)
    assert outcome.exit_code == 0
    expected = shorter.run(output_dtype="float32")
    np.testing.assert_allclose(results[0].maps.t1_ms, expected.physical("T1"), rtol=1e-5)
    np.testing.assert_allclose(results[0].maps.t2_ms, expected.physical("T2"), rtol=1e-5)
    # It is another scan than the whole one, which stays as it is if it is short enough.
    assert np.abs(results[0].maps.t2_ms - scan.run(output_dtype="float32").physical("T2")).max() > 1
    assert first_timepoints(source, 120) is source


def test_more_timepoints_than_are_compared_make_a_reference(measured: Comparison) -> None:
    assert list(measured.runs) == ["lowrank_all", *_RUNS]
    assert [run.n_timepoints for run in measured.runs.values()] == [120, 100, 100, 100, 100]
    assert measured.n_timepoints == 120


def test_missing_readouts_give_exit_code_3(scan: Scan, tmp_path: Path) -> None:
    lost = scan.without(scan.imaging[10:13]).write(tmp_path / "scan.h5")
    found = compare(lost, {**_QUICK, "llr_lambda": "0.9", "iterations": "1"}, lambda text: None)
    assert found.exit_code == 3
    for run in found.runs.values():
        assert run.results[0].status == "degraded"
        assert "3 of 120 readouts are missing" in run.outcome.notes[0]
    # A weight that was set is not searched for.
    assert found.search.errors == {}
    assert (found.search.chosen, found.runs["llr"].settings.llr_lambda) == (0.9, 0.9)


def test_what_is_no_scan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    path.write_text("no scan")
    result = whorl("compare", path, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "cannot be read as an MRD file" in result.output
    assert not (tmp_path / "out").exists()
    wrong = whorl("compare", path, "-o", tmp_path / "out", "-p", "llr_lamda=1")
    assert wrong.exit_code == 2
    assert 'did you mean "llr_lambda"?' in " ".join(wrong.output.split())
