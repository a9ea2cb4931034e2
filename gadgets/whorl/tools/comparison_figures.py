"""The figures of a comparison, in the order and with the numbers of those that the method was published with.

Letters: Z slices, K coefficients, F joint features, R regions, Y X pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whorl.maps.figures import (
    N_IMAGES,
    Box,
    Limits,
    animate,
    box_of,
    draw_features,
    label,
    save,
    show_error,
    show_magnitude,
    show_map,
    write,
)
from whorl.maps.rois import QUANTITIES
from whorl.tools.runs import Comparison, Run, voxels


def draw_all(comparison: Comparison, folder: Path) -> list[str]:
    """Draw every figure into a folder; the names of the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    drawn = []
    if comparison.frames:
        box, of = _box(comparison), "the INR as published"
        draw_features(comparison.frames, box, folder / "figure1b.png", of)
        animate(comparison.frames, box, _limits(comparison), folder / "figure2.gif", of)
        drawn = ["figure1b.png", "figure2.gif"]
    draw_agreement(comparison, folder / "figure3.png")
    draw_one_slice(comparison, folder / "figure4.png")
    draw_slices(comparison, folder / "figure5.png")
    return [*drawn, "figure3.png", "figure4.png", "figure5.png"]


# --- What all of them share ------------------------------------------------------------------------


def _box(comparison: Comparison) -> Box:
    """The object with a margin, in all slices."""
    first = next(iter(comparison.runs.values()))
    inside = comparison.truth.mask if comparison.truth else first.maps["T1"] > 0
    return box_of(np.any(inside, axis=0))


def _limits(comparison: Comparison) -> Limits:
    """Upper end of the colours of each quantity.

    A few regions are tissues, and a scale for CSF would hide the others.
    """
    limits = {}
    for quantity, name in QUANTITIES:
        if comparison.truth:
            known = getattr(comparison.truth, f"roi_{name}")
            limits[quantity] = float(1.1 * known.max() if len(known) > 5 else 2 * np.median(known))
        else:
            values = next(iter(comparison.runs.values())).maps[quantity]
            limits[quantity] = 1.5 * float(np.percentile(values[values > 0], 75)) if values.any() else 1.0
    return limits


def _first_region(comparison: Comparison) -> int | None:
    """Label of the region whose mean is written into maps: white matter, or the first one."""
    if comparison.truth is None:
        return None
    names = comparison.truth.roi_names
    return 1 + (names.index("white matter") if "white matter" in names else 0)


def _spread_text(comparison: Comparison, image: NDArray[np.float32], z: int) -> str:
    label = _first_region(comparison)
    if label is None or comparison.truth is None:
        return ""
    inside = image[comparison.truth.labels[z] == label]
    if not len(inside):
        return ""
    spread = f" ± {inside.std():.1f}" if np.ptp(inside) > 0 else ""  # the truth has none
    return f"{comparison.truth.roi_names[label - 1]} {inside.mean():.1f}{spread}"


# --- The comparison --------------------------------------------------------------------------------


def draw_agreement(comparison: Comparison, path: Path) -> None:
    """Figure 3: agreement with the reference, and coefficients of variation; voxelwise without regions."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if not comparison.has_regions:
        _draw_voxels(comparison, path)
        return
    figure, axes = plt.subplots(2, 2, figsize=(14, 9), layout="constrained", width_ratios=(1, 1.8))
    markers = "so^Dv"
    for row, (quantity, _) in enumerate(QUANTITIES):
        points, bars = axes[row]
        known = np.array([one.truth for one in comparison.rows["inr"][quantity]])
        ends = np.array([known.min() / 1.4, known.max() * 1.4])
        points.plot(ends, ends, color="black", linewidth=0.8)
        width = 0.85 / len(comparison.runs)
        for n, (key, run) in enumerate(comparison.runs.items()):
            rows, summary = comparison.rows[key][quantity], comparison.summaries[key]
            mean_cov = summary[f"{quantity} mean CoV %"]
            points.plot(
                [one.truth for one in rows], [one.mean for one in rows], markers[n % len(markers)],
                markersize=5, fillstyle="none", label=f"{run.title}, R² = {summary[f'{quantity} R2']:.4f}",
            )  # fmt: skip
            places = np.arange(len(rows)) + (n - (len(comparison.runs) - 1) / 2) * width
            bars.bar(
                places, [one.cov_percent for one in rows], width, label=f"{run.title}, mean {mean_cov:.1f} %"
            )
        points.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
        for axis in (points.xaxis, points.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        points.set(xlabel=f"true {quantity} (ms)", ylabel=f"mean {quantity} in the region (ms)")
        points.legend(fontsize="small")
        names = [f"{one.name}\n{one.truth:.4g}" for one in comparison.rows["inr"][quantity]]
        bars.set_xticks(np.arange(len(names)), names, fontsize=7 if len(names) > 8 else 9)
        bars.set_xlabel(f"region and true {quantity} (ms)")
        bars.set_ylabel(f"coefficient of variation of {quantity} (%)")
        bars.legend(fontsize="small")
    save(figure, path)


def _draw_voxels(comparison: Comparison, path: Path) -> None:
    """Joint histograms of voxels where there are no regions."""
    import matplotlib.pyplot as plt

    others = [run for run in comparison.runs.values() if run.maps is not comparison.reference_maps]
    limits = _limits(comparison)
    figure, axes = plt.subplots(
        2, len(others), figsize=(3.6 * len(others), 7.2), squeeze=False, layout="constrained"
    )
    for row, (quantity, _) in enumerate(QUANTITIES):
        top = 2 * limits[quantity]
        for axis, run in zip(axes[row], others, strict=True):
            ours, theirs = voxels(run.maps[quantity], comparison.reference_maps[quantity])
            axis.hist2d(theirs, ours, bins=100, range=((0, top), (0, top)), cmin=1, norm="log")
            axis.plot((0, top), (0, top), color="black", linewidth=0.8)
            r2 = comparison.summaries[run.key][f"{quantity} voxelwise R2"]
            axis.set(title=f"{run.title}, R² = {r2:.3f}", aspect="equal")
            axis.set(xlabel=f"{quantity}, {comparison.reference} (ms)", ylabel=f"{quantity} (ms)")
    figure.suptitle("Voxels, since there are no regions of known relaxation")
    save(figure, path)


def _time_text(run: Run) -> str:
    text = f"{run.title}\n{run.seconds:.1f} s per slice"
    return f"{text}\n(with fall-back)" if run.fell_back else text


def draw_one_slice(comparison: Comparison, path: Path) -> None:
    """Figure 4: subspace images with run times, maps with the spread in one region, errors."""
    import matplotlib.pyplot as plt

    truth, z, box, limits = comparison.truth, comparison.shown, _box(comparison), _limits(comparison)
    runs = list(comparison.runs.values())
    n_images = min([N_IMAGES, *(len(run.images) for run in runs if len(run.images))])
    first_map, n_maps, top = n_images, 4 if truth else 2, 1 if truth else 0
    figure, axes = plt.subplots(
        len(runs) + top, n_images + n_maps, squeeze=False, layout="constrained",
        figsize=(1.9 * (n_images + n_maps) + 1.4, 1.9 * (len(runs) + top) * _aspect(box) + 1),
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    if truth:
        label(axes[0, first_map], "truth")
    drawn: dict[int, Any] = {}
    for row, run in enumerate(runs, start=top):
        label(axes[row, 0], _time_text(run))
        for k in range(min(n_images, len(run.images))):
            show_magnitude(axes[row, k], run.images[k][box])
        for column, (quantity, name) in enumerate(QUANTITIES, start=first_map):
            image = run.maps[quantity][z]
            drawn[column] = show_map(axes[row, column], image[box], quantity, limits[quantity])
            write(axes[row, column], _spread_text(comparison, image, z))
            if truth:
                known = getattr(truth, name)[z]
                drawn[column + 2] = show_error(axes[row, column + 2], image[box], known[box])
                show_map(axes[0, column], known[box], quantity, limits[quantity])
    for k in range(n_images):
        axes[top, k].set_title(f"|x| k = {k + 1}", fontsize=10)
    for column, (quantity, _) in enumerate(QUANTITIES, start=first_map):
        axes[0, column].set_title(quantity, fontsize=10)
        figure.colorbar(
            drawn[column], ax=axes[:, column], location="bottom", label=f"{quantity}, ms", aspect=12
        )
        if truth:
            axes[top, column + 2].set_title(f"{quantity} error", fontsize=10)
            figure.colorbar(
                drawn[column + 2], ax=axes[:, column + 2], location="bottom", label="%", aspect=12
            )
    save(figure, path)


def _aspect(box: Box) -> float:
    rows, columns = box
    if rows.stop is None or columns.stop is None:
        return 1.0
    return float((rows.stop - rows.start) / (columns.stop - columns.start))


def draw_slices(comparison: Comparison, path: Path) -> None:
    """Figure 5: maps of up to three slices."""
    import matplotlib.pyplot as plt

    box, limits, truth = _box(comparison), _limits(comparison), comparison.truth
    runs = list(comparison.runs.values())
    # Of the slices that were measured, three that lie evenly, not at the ends.
    measured = sorted({z for run in runs for z in run.results})
    places = np.linspace(0, len(measured) - 1, min(3, len(measured)) + (2 if len(measured) > 4 else 0))
    chosen = [measured[round(n)] for n in (places[1:-1] if len(measured) > 4 else places)]
    columns = len(runs) + (1 if truth else 0)
    figure, axes = plt.subplots(
        2 * len(chosen), columns, squeeze=False, layout="constrained",
        figsize=(2.1 * columns + 1.5, 2.1 * 2 * len(chosen) * _aspect(box) + 0.5),
    )  # fmt: skip
    for block, (quantity, name) in enumerate(QUANTITIES):
        first = block * len(chosen)
        for row, z in enumerate(chosen, start=first):
            known = [getattr(truth, name)[z]] if truth else []
            for axis, image in zip(
                axes[row], [*known, *(run.maps[quantity][z] for run in runs)], strict=True
            ):
                drawn = show_map(axis, image[box], quantity, limits[quantity])
                write(axis, _spread_text(comparison, image, z))
                axis.set_axis_off()
            label(axes[row, 0], f"{quantity}\nslice {z}")
        figure.colorbar(drawn, ax=axes[first : first + len(chosen)], label=f"{quantity}, ms", shrink=0.8)
    for axis, title in zip(
        axes[0], [*(["truth"] if truth else []), *(run.title for run in runs)], strict=True
    ):
        axis.set_title(title, fontsize=10)
    save(figure, path)
