"""The figures of a comparison, in the order and with the numbers of those that the method was published with.

Letters: Z slices, K coefficients, F joint features, R regions, Y X pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whorl.comparison import Comparison, Run, voxels
from whorl.maps.images import Frame
from whorl.maps.rois import QUANTITIES

_N_FEATURES = 9
#: Subspace images that are shown: weaker ones are noise to the eye.
_N_IMAGES = 5
_MARGIN = 6
_DPI = 110
_FRAMES_PER_SECOND = 4
_PAUSE = 6  # frames that the last one stays

Box = tuple[slice, slice]
Limits = dict[str, float]


def check_installed() -> None:
    """Raise ImportError if what the figures need is not installed."""
    import cmcrameri  # noqa: F401
    import matplotlib  # noqa: F401, ICN001


def draw_all(comparison: Comparison, folder: Path) -> list[str]:
    """Draw every figure into a folder; the names of the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    drawn = []
    if comparison.frames:
        draw_features(comparison.frames, _box(comparison), folder / "figure1b.png")
        animate(comparison.frames, _box(comparison), _limits(comparison), folder / "figure2.gif")
        drawn = ["figure1b.png", "figure2.gif"]
    draw_agreement(comparison, folder / "figure3.png")
    draw_one_slice(comparison, folder / "figure4.png")
    draw_slices(comparison, folder / "figure5.png")
    return [*drawn, "figure3.png", "figure4.png", "figure5.png"]


# --- What all of them share ------------------------------------------------------------------------


def _box(comparison: Comparison) -> Box:
    """The object with a margin, in all slices."""
    first = next(iter(comparison.runs.values()))
    inside = (comparison.truth.mask if comparison.truth else first.maps["T1"] > 0).any(0)
    rows, columns = np.nonzero(inside)
    if not len(rows):
        return slice(None), slice(None)
    return (
        slice(max(0, int(rows.min()) - _MARGIN), int(rows.max()) + _MARGIN + 1),
        slice(max(0, int(columns.min()) - _MARGIN), int(columns.max()) + _MARGIN + 1),
    )


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


def _colours(quantity: str) -> Any:
    from cmcrameri import cm

    return (cm.lipari if quantity == "T1" else cm.navia).with_extremes(bad="black", under="black")


def _show_map(axis: Any, image: NDArray[np.float32], quantity: str, top: float) -> Any:
    """A map; what is outside the object is black."""
    return axis.imshow(
        np.ma.masked_equal(image, 0), cmap=_colours(quantity), vmin=0, vmax=top, interpolation="nearest"
    )


def _show_error(axis: Any, image: NDArray[np.float32], known: NDArray[np.float32]) -> Any:
    from cmcrameri import cm

    both = (known > 0) & (image > 0)
    error = np.ma.masked_where(~both, 100 * (image / np.where(known > 0, known, 1) - 1))
    return axis.imshow(error, cmap=cm.vik, vmin=-30, vmax=30, interpolation="nearest")


def _show_magnitude(axis: Any, image: NDArray[np.float32]) -> Any:
    """A subspace image on a scale of its own: that of methods with and without coil calibration differ."""
    inside = image[image > 0]
    top = float(np.percentile(inside, 99)) if len(inside) else 1.0
    return axis.imshow(image, cmap="gray", vmin=0, vmax=top, interpolation="nearest")


def _write(axis: Any, text: str) -> None:
    """A line below a map."""
    axis.text(0.5, -0.02, text, transform=axis.transAxes, ha="center", va="top", fontsize=8)


def _label(axis: Any, text: str) -> None:
    """A name to the left of a row."""
    axis.text(-0.08, 0.5, text, transform=axis.transAxes, ha="right", va="center", fontsize=10)


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


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    # Labels beside axes that are switched off lie beyond what the layout knows of.
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)


# --- The fit of the INR ----------------------------------------------------------------------------


def _alive(features: NDArray[np.float32]) -> list[int]:
    """The first channels that are not 0 everywhere: some ReLU never become active."""
    alive = [n for n, channel in enumerate(features) if np.ptp(channel) > 0]
    return alive[:_N_FEATURES]


def draw_features(frames: Sequence[Frame], box: Box, path: Path) -> None:
    """Figure 1b: joint features at five iterations, from the first to the last."""
    import matplotlib.pyplot as plt

    fit = frames[:-1]
    chosen = sorted({round(n) for n in np.linspace(0, len(fit) - 1, 5)})
    channels = _alive(fit[-1].features)
    figure, axes = plt.subplots(
        len(chosen), len(channels), figsize=(1.5 * len(channels) + 1, 1.7 * len(chosen)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, n in enumerate(chosen):
        for column, channel in enumerate(channels):
            axis, image = axes[row, column], fit[n].features[channel][box]
            inside = image[image != 0]
            low, high = np.percentile(inside, (1, 99)) if len(inside) else (0, 1)
            axis.imshow(image, cmap="gray", vmin=min(low, 0), vmax=high or 1, interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(f"φ{channel + 1}", fontsize=10)
        _label(axes[row, 0], fit[n].title)
    figure.suptitle("Joint features of the INR, each on a scale of its own")
    _save(figure, path)


def animate(frames: Sequence[Frame], box: Box, limits: Limits, path: Path) -> None:
    """Figure 2: subspace images and maps during the fit."""
    import matplotlib.pyplot as plt
    from matplotlib.animation import PillowWriter

    last = frames[-1]
    n_images = min(_N_IMAGES, len(last.images))
    figure, axes = plt.subplots(1, n_images + 2, figsize=(1.9 * (n_images + 2), 2.7), layout="constrained")
    heading = figure.suptitle(last.title)
    shown = [_show_magnitude(axes[k], last.images[k][box]) for k in range(n_images)]
    for k in range(n_images):
        axes[k].set_title(f"k = {k + 1}", fontsize=10)
    for axis, (quantity, name) in zip(axes[n_images:], QUANTITIES, strict=True):
        image = _show_map(axis, getattr(last.maps, name)[box], quantity, limits[quantity])
        figure.colorbar(image, ax=axis, location="bottom", label=f"{quantity}, ms", shrink=0.9)
        shown.append(image)
    for axis in axes:
        axis.set_axis_off()

    # The layout stays as it is: to find it takes longer than to draw.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    writer = PillowWriter(fps=_FRAMES_PER_SECOND)
    with writer.saving(figure, path, dpi=80):
        for frame in [*frames, *[last] * _PAUSE]:
            heading.set_text("as sent" if frame is last else f"{frame.title} of the fit")
            for k in range(n_images):
                shown[k].set_data(frame.images[k][box])
            for image, (_, name) in zip(shown[n_images:], QUANTITIES, strict=True):
                image.set_data(np.ma.masked_equal(getattr(frame.maps, name)[box], 0))
            writer.grab_frame()
    plt.close(figure)


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
    _save(figure, path)


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
    _save(figure, path)


def _time_text(run: Run) -> str:
    text = f"{run.title}\n{run.seconds:.1f} s per slice"
    return f"{text}\n(with fall-back)" if run.fell_back else text


def draw_one_slice(comparison: Comparison, path: Path) -> None:
    """Figure 4: subspace images with run times, maps with the spread in one region, errors."""
    import matplotlib.pyplot as plt

    truth, z, box, limits = comparison.truth, comparison.shown, _box(comparison), _limits(comparison)
    runs = list(comparison.runs.values())
    n_images = min([_N_IMAGES, *(len(run.images) for run in runs if len(run.images))])
    first_map, n_maps, top = n_images, 4 if truth else 2, 1 if truth else 0
    figure, axes = plt.subplots(
        len(runs) + top, n_images + n_maps, squeeze=False, layout="constrained",
        figsize=(1.9 * (n_images + n_maps) + 1.4, 1.9 * (len(runs) + top) * _aspect(box) + 1),
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    if truth:
        _label(axes[0, first_map], "truth")
    drawn: dict[int, Any] = {}
    for row, run in enumerate(runs, start=top):
        _label(axes[row, 0], _time_text(run))
        for k in range(min(n_images, len(run.images))):
            _show_magnitude(axes[row, k], run.images[k][box])
        for column, (quantity, name) in enumerate(QUANTITIES, start=first_map):
            image = run.maps[quantity][z]
            drawn[column] = _show_map(axes[row, column], image[box], quantity, limits[quantity])
            _write(axes[row, column], _spread_text(comparison, image, z))
            if truth:
                known = getattr(truth, name)[z]
                drawn[column + 2] = _show_error(axes[row, column + 2], image[box], known[box])
                _show_map(axes[0, column], known[box], quantity, limits[quantity])
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
    _save(figure, path)


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
                drawn = _show_map(axis, image[box], quantity, limits[quantity])
                _write(axis, _spread_text(comparison, image, z))
                axis.set_axis_off()
            _label(axes[row, 0], f"{quantity}\nslice {z}")
        figure.colorbar(drawn, ax=axes[first : first + len(chosen)], label=f"{quantity}, ms", shrink=0.8)
    for axis, title in zip(
        axes[0], [*(["truth"] if truth else []), *(run.title for run in runs)], strict=True
    ):
        axis.set_title(title, fontsize=10)
    _save(figure, path)
