"""Low-rank, LLR and INR side by side on one scan: the runs, and what they measure.

Each run goes the way of a scan, through `whorl.pipeline.scan.reconstruct_scan`.

Letters: Z slices, T timepoints, K coefficients, R regions, Y X pixels.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from whorl import __version__
from whorl.config import Settings
from whorl.doors.files import read_header, read_readouts
from whorl.maps.images import SliceMaps
from whorl.maps.rois import (
    QUANTITIES,
    SHORTEST_T2_MS,
    RegionStatistics,
    determination,
    largest_bias_percent,
    mean_cov_percent,
    r_squared,
    region_statistics,
    well_seen,
)
from whorl.pipeline.fitting import record_fit
from whorl.pipeline.scan import Outcome, find_protocol, reconstruct_scan
from whorl.pipeline.slices import SliceResult
from whorl.scan.failure import ScanError
from whorl.scan.readout import NOT_IMAGING, Readout
from whorl.scan.resolve import Resolved
from whorl.simulation.truth import Truth, read_truth
from whorl.tools.runs import Comparison, Run, Search, voxels

#: Timepoints that the methods are compared at; the low-rank reference has all.
TIMEPOINTS = 500
#: Weights of llr that are tried first, around its default. The grid grows by factors of two where it ends.
LAMBDAS = (0.35, 0.7, 1.4)
_MOST_LAMBDAS = 9

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Source:
    """A scan, or its first timepoints.

    Parameters
    ----------
    path, header
        The file, and its MRD header.
    resolved
        How its timepoints are numbered.
    n_timepoints
        Those that are used.
    properties
        Of the reconstruction.
    """

    path: Path
    header: bytes
    resolved: Resolved
    n_timepoints: int
    properties: Mapping[str, object]

    def readouts(self, only_slice: int | None = None) -> Iterator[Readout]:
        """The readouts of these timepoints, perhaps of one slice only, and all that carry no image data."""
        arrived: dict[int, int] = {}
        for readout in read_readouts(self.path):
            if readout.flags & NOT_IMAGING:
                yield readout
                continue
            number = int(readout.head["idx"]["slice"])
            if self.resolved.counter == "arrival":
                t = arrived.get(number, 0)
                arrived[number] = t + 1
            else:
                t = int(self.resolved.timepoints(np.array([readout.head]))[0])
            if t < self.n_timepoints and only_slice in (None, number):
                yield readout


def first_timepoints(source: Source, n_timepoints: int) -> Source:
    """The same scan as if its train had ended earlier."""
    if n_timepoints >= source.n_timepoints:
        return source
    return replace(
        source, n_timepoints=n_timepoints, properties={**source.properties, "timepoints": n_timepoints}
    )


def reconstruct(
    source: Source,
    properties: Mapping[str, object],
    *,
    shown: int,
    only_slice: int | None = None,
) -> tuple[Settings, Outcome, dict[int, SliceResult]]:
    """Reconstruct a scan; what is known about each slice, the inside only of the one that is to be shown."""
    settings = Settings.from_properties({**source.properties, **properties})
    results: dict[int, SliceResult] = {}

    def observe(z: int, result: SliceResult) -> None:
        if z != shown:
            result.inside = None  # it holds all data of the slice
        results[z] = result

    outcome = reconstruct_scan(
        source.header,
        source.readouts(only_slice),
        settings,
        lambda image: None,
        lambda level, text: None,  # what matters is in the outcome
        observe=observe,
    )
    return settings, outcome, results


def run_method(
    source: Source, key: str, title: str, properties: Mapping[str, object], n_slices: int, shown: int
) -> Run:
    """One method on a whole scan of so many slices."""
    settings, outcome, results = reconstruct(source, properties, shown=shown)
    if not results:
        raise ScanError(f"{title}: nothing could be reconstructed: {'; '.join(outcome.failures)}")
    some = next(iter(results.values()))
    nothing = np.zeros_like(some.maps.t1_ms)
    maps = {
        quantity: np.stack(
            [getattr(results[z].maps, name) if z in results else nothing for z in range(n_slices)]
        )
        for quantity, name in QUANTITIES
    }
    images = np.zeros((0, *nothing.shape), dtype=np.float32)
    if shown in results and (inside := results[shown].inside) is not None:
        images = (inside.images.abs() * inside.mask).float().cpu().numpy()
    return Run(key, title, source.n_timepoints, settings, outcome, maps, images, results)


# --- What is measured ------------------------------------------------------------------------------


def map_error(maps: SliceMaps, truth: Truth, z: int) -> float:
    """Mean of ``|log(map / truth)|`` over T1 and T2 and the object of a slice."""
    errors = []
    for _, name in QUANTITIES:
        values, known = getattr(maps, name), getattr(truth, name)[z]
        both = (values > 0) & (known > 0)
        errors.append(np.abs(np.log(values[both] / known[both])).mean() if both.any() else np.inf)
    return float(np.mean(errors))


def grid_search(error: Callable[[float], float], grid: tuple[float, ...]) -> dict[float, float]:
    """Errors by weight, ascending, on a grid that grows by factors of two while an end of it is the best."""
    errors = {lam: error(lam) for lam in grid}
    while len(errors) < _MOST_LAMBDAS:
        best = min(errors, key=errors.__getitem__)
        if not math.isfinite(errors[best]) or min(errors) < best < max(errors):
            break
        lam = best / 2 if best == min(errors) else best * 2
        errors[lam] = error(lam)
    return dict(sorted(errors.items()))


def search_lambda(source: Source, truth: Truth | None, z: int) -> Search:
    """The weight of llr with the smallest error of one slice's maps; without a truth the default."""
    default = Settings.from_properties({**source.properties, "method": "llr"}).llr_lambda
    if "llr_lambda" in source.properties:
        return Search("none: llr_lambda was set", default)
    if truth is None:
        return Search("none: without the truth nothing can be judged, the default was taken", default)
    search = Search(f"mean |log(map / truth)| of T1 and T2 in the object, slice {z}", default)

    def error(lam: float) -> float:
        chosen = {"method": "llr", "llr_lambda": lam}
        _, _, results = reconstruct(source, chosen, shown=z, only_slice=z)
        result = results.get(z)
        if result is None or result.method != "llr":
            return math.inf
        search.seconds += result.seconds["slice"]
        return map_error(result.maps, truth, z)

    search.errors = grid_search(error, LAMBDAS)
    best = min(search.errors, key=search.errors.__getitem__)
    if math.isfinite(search.errors[best]):
        search.chosen = best
    else:
        search.criterion = "none: no weight could be judged, the default was taken"
    return search


def regions(run: Run, truth: Truth) -> dict[str, list[RegionStatistics]]:
    """Statistics of T1 and T2 in the regions of the truth, in the slices that did not fail."""
    delivered = np.isin(np.arange(len(truth.labels)), list(run.results))
    labels = truth.labels * delivered[:, None, None]
    return {
        quantity: region_statistics(
            run.maps[quantity], labels, truth.roi_names, getattr(truth, f"roi_{name}")
        )
        for quantity, name in QUANTITIES
    }


def of_regions(rows: Mapping[str, list[RegionStatistics]]) -> dict[str, float]:
    """The figures of one run that stand for all of its regions."""
    kept = well_seen(rows)
    summary = {}
    for quantity, of_all in rows.items():
        summary[f"{quantity} mean CoV %"] = mean_cov_percent(of_all)
        summary[f"{quantity} R2"] = r_squared(of_all)
        summary[f"{quantity} largest bias % (T2 >= {SHORTEST_T2_MS:g} ms)"] = largest_bias_percent(
            kept[quantity]
        )
        summary[f"{quantity} largest bias %"] = largest_bias_percent(of_all)
    return summary


def of_voxels(run: Run, reference: Mapping[str, NDArray[np.float32]]) -> dict[str, float]:
    """Voxelwise agreement with maps by quantity."""
    summary = {}
    for quantity, _ in QUANTITIES:
        ours, theirs = voxels(run.maps[quantity], reference[quantity])
        summary[f"{quantity} voxelwise R2"] = determination(theirs, ours)
        difference = float(np.median(100 * (ours / theirs - 1))) if len(theirs) else math.nan
        summary[f"{quantity} median difference %"] = difference
    return summary


# --- All together ----------------------------------------------------------------------------------


def compare(scan: Path, properties: Mapping[str, object], say: Say) -> Comparison:
    """Reconstruct a scan by all methods.

    Parameters
    ----------
    scan
        MRD file.
    properties
        For all runs, without `method`; a `preset` is that of the last one, and `llr_lambda` needs no search.
    say
        Takes a line when a run begins.

    Raises
    ------
    ScanError
        If the file is no scan, or a run delivers nothing.
    SettingsError
        If a property is wrong.
    """
    if "method" in properties:
        say(f"property method={properties['method']} is not used: the methods are what is compared")
        properties = {name: value for name, value in properties.items() if name != "method"}
    settings = Settings.from_properties(properties)
    header = read_header(scan)
    protocol = find_protocol(header, read_readouts(scan), settings)
    try:
        truth = read_truth(scan)
    except ValueError:
        truth = None
    T = protocol.train.n_timepoints
    n = min(T, TIMEPOINTS)
    runs: dict[str, Run] = {}
    whole = Source(scan, header, protocol.resolved, T, properties)
    first = first_timepoints(whole, n)
    numbers = {int(r.head["idx"]["slice"]) for r in read_readouts(scan) if not r.flags & NOT_IMAGING}
    n_slices = len(truth.mask) if truth else max(numbers) + 1
    shown = sorted(numbers)[len(numbers) // 2]

    def add(source: Source, key: str, name: str, **chosen: object) -> None:
        title = f"{name} {source.n_timepoints}"
        say(title)
        runs[key] = run_method(source, key, title, chosen, n_slices, shown)

    if n < T:
        add(whole, "lowrank_all", "low-rank", method="lowrank")
    add(first, "lowrank", "low-rank", method="lowrank")
    if truth is not None:
        say(f"LLR {n}, search for its weight")
    search = search_lambda(first, truth, shown)
    add(first, "llr", "LLR", method="llr", llr_lambda=search.chosen)
    add(first, "inr_seed", "INR as published", method="inr", preset="seed")
    add(first, "inr", "INR", method="inr")
    say("the fit of the INR as published once more, for its pictures")
    fitted = runs["inr_seed"].results.get(shown)
    frames = record_fit(fitted.inside) if fitted and fitted.inside else []

    reference = runs.get("lowrank_all", runs["lowrank"])
    maps = {quantity: getattr(truth, name) for quantity, name in QUANTITIES} if truth else reference.maps
    rows = {key: regions(run, truth) for key, run in runs.items()} if truth else {}
    summaries: dict[str, dict[str, float]] = {}
    for key, run in runs.items():
        summaries[key] = {}
        if truth:
            errors = [map_error(result.maps, truth, z) for z, result in run.results.items()]
            summaries[key]["mean |log(map / truth)|"] = float(np.mean(errors))
        if key in rows and rows[key]["T2"]:
            summaries[key] |= of_regions(rows[key])
        elif truth or run is not reference:
            summaries[key] |= of_voxels(run, maps)
    return Comparison(
        runs=runs,
        truth=truth,
        reference="truth" if truth else reference.title,
        reference_maps=maps,
        n_timepoints=T,
        n_slices=n_slices,
        shown=shown,
        search=search,
        rows=rows,
        summaries=summaries,
        frames=frames,
    )


def as_json(comparison: Comparison, scan: Path, seconds: float) -> str:
    """Every figure as a JSON document; what is not finite is null."""

    def row(one: RegionStatistics) -> dict[str, object]:
        return {**asdict(one), "cov_percent": one.cov_percent, "bias_percent": one.bias_percent}

    def of_run(run: Run) -> dict[str, object]:
        results = sorted(run.results.items())
        # The wait for the dictionary is also that for the slice before: from a file, all arrive at once.
        stages = sorted({stage for _, result in results for stage in result.seconds} - {"dictionary"})
        return {
            "title": run.title,
            "timepoints": run.n_timepoints,
            "coefficients": len(run.images),
            "settings": run.settings.digest(),
            "seconds_per_slice": run.seconds,
            "seconds_by_stage": {
                stage: float(np.mean([result.seconds.get(stage, 0.0) for _, result in results]))
                for stage in stages
            },
            "slices": {
                str(z): {
                    "method": result.method,
                    "status": result.status,
                    "notes": result.notes,
                    "diagnostics": result.diagnostics,
                }
                for z, result in results
            },
            "notes": list(run.outcome.notes),
            "failures": list(run.outcome.failures),
            "exit_code": run.outcome.exit_code,
            "summary": comparison.summaries[run.key],
            "regions": {q: [row(one) for one in of] for q, of in comparison.rows.get(run.key, {}).items()},
        }

    search, truth = comparison.search, comparison.truth
    document = {
        "whorl": __version__,
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "scan": scan.name,
        "simulation": truth
        and {name: value for name, value in truth.parameters.items() if not isinstance(value, np.ndarray)},
        "timepoints": comparison.n_timepoints,
        "slices": comparison.n_slices,
        "slice_shown": comparison.shown,
        "reference": comparison.reference,
        "llr_search": {
            "criterion": search.criterion,
            "chosen": search.chosen,
            "grid": [{"llr_lambda": lam, "error": error} for lam, error in search.errors.items()],
            "seconds_per_slice": search.seconds,
        },
        "runs": {key: of_run(run) for key, run in comparison.runs.items()},
        "seconds": seconds,
        "exit_code": comparison.exit_code,
    }
    return json.dumps(_finite(document), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if isinstance(value, np.generic) else value


def as_text(comparison: Comparison) -> str:
    """The tables for the operator."""
    runs = comparison.runs
    width = max(18, *(len(run.title) + 2 for run in runs.values()))
    lines = []
    if comparison.has_regions:
        for quantity, _ in QUANTITIES:
            heads = "".join(f"{run.title:>{width}}" for run in runs.values())
            lines += ["", f"{quantity}, ms: mean ± SD", f"{'':14s}{'truth':>8}{heads}"]
            by_name = {key: {row.name: row for row in comparison.rows[key][quantity]} for key in runs}
            for name, row in by_name["inr"].items():
                cells = (by_name[key].get(name) for key in runs)
                texts = (f"{cell.mean:.1f} ± {cell.sd:.1f}" if cell else "-" for cell in cells)
                lines.append(f"{name:14s}{row.truth:8.1f}" + "".join(f"{text:>{width}}" for text in texts))
    else:
        lines += ["", f"no regions of known relaxation, so that there is no coefficient of variation: "
                      f"voxels are compared with those of {comparison.reference}"]  # fmt: skip
    names = list(dict.fromkeys(name for key in runs for name in comparison.summaries[key]))
    label = max([len(name) for name in names] + [18]) + 2
    lines += ["", " " * label + "".join(f"{run.title:>{width}}" for run in runs.values())]
    for name in names:
        values = (comparison.summaries[key].get(name, math.nan) for key in runs)
        texts = (f"{value:.4g}" if math.isfinite(value) else "-" for value in values)
        lines.append(f"{name:{label}s}" + "".join(f"{text:>{width}}" for text in texts))
    times = "".join(f"{run.seconds:>{width}.2f}" for run in runs.values())
    lines.append(f"{'seconds per slice':{label}s}{times}")
    search = comparison.search
    lines.append("")
    if search.errors:
        tried = ", ".join(f"{lam:g}: {error:.4g}" for lam, error in search.errors.items())
        lines.append(f"LLR: weight {search.chosen:g} of {tried} ({search.criterion}; {search.seconds:.1f} s)")
    else:
        lines.append(f"LLR: weight {search.chosen:g}, search: {search.criterion}")
    for run in runs.values():
        lines += [f"{run.title}: {text}" for text in (*run.outcome.failures, *run.outcome.notes)]
    return "\n".join(lines[1:])


def run(scan: Path, output: Path, properties: Mapping[str, object], say: Say, show: Say) -> int:
    """Compare the methods on a scan; tables, `compare.json` and figures.

    Parameters
    ----------
    scan
        MRD file.
    output
        Folder; it is made.
    properties
        For all runs.
    say, show
        Take lines about what goes on, and the tables.

    Returns
    -------
    int
        Exit code of the command.

    Raises
    ------
    ImportError
        If matplotlib or cmcrameri is not installed.
    ScanError, SettingsError
        See `compare`.
    """
    from whorl.maps.figures import check_installed
    from whorl.tools import comparison_figures as figures

    check_installed()  # not after minutes
    began = time.monotonic()
    comparison = compare(scan, properties, say)
    show(as_text(comparison))
    output.mkdir(parents=True, exist_ok=True)
    (output / "compare.json").write_text(as_json(comparison, scan, time.monotonic() - began))
    say("figures")
    drawn = figures.draw_all(comparison, output)
    if not comparison.frames:
        say("figure1b.png and figure2.gif are left out: there was no fit of the INR to show")
    show(f"{', '.join(drawn)} and compare.json in {output}")
    return comparison.exit_code
