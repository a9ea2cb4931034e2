"""The pictures of a report, each as a file in memory.

Letters: Z slices, Y X pixels.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from whorl.maps.figures import Box, Limits, animate, box_of, colours, draw_features
from whorl.maps.images import Frame
from whorl.maps.rois import QUANTITIES
from whorl.maps.volumes import Volume
from whorl.reporting.content import Agreement, Regions, SliceFacts

_COLUMNS = 6
_DPI = 100
_BACK, _FORE = "#14181d", "#e6e9ec"
#: Slices of a montage; of more, so many that lie evenly.
_MOST_SLICES = 24


def box(maps: Mapping[str, Volume]) -> Box:
    """The object in all slices, with a margin."""
    return box_of(np.any(maps["T1"].values > 0, axis=0))


def limits(maps: Mapping[str, Volume], regions: Sequence[Regions]) -> Limits:
    """Upper end of the colours by role: tissues shall be told apart, whatever CSF has."""
    found: Limits = {}
    for role, volume in maps.items():
        inside = volume.values[volume.values > 0]
        known = [r.agreements[role] for r in regions if role in r.agreements]
        if role == "QUALITY":
            found[role] = 1.0
        elif known and len(known[0].rows) > 5:
            found[role] = 1.1 * max(row.truth for row in known[0].rows)
        elif role.endswith("_SD"):
            found[role] = 2.0 * float(np.percentile(inside, 75)) if len(inside) else 1.0
        else:
            found[role] = 1.5 * float(np.percentile(inside, 75)) if len(inside) else 1.0
    return found


def _palette(role: str) -> Any:
    import matplotlib as mpl
    from cmcrameri import cm

    if role.startswith(("T1", "T2")) and not role.endswith("_SD"):
        return colours(role[:2])
    palette = cm.lajolla if role.endswith("_SD") else cm.vik if role == "B1" else mpl.colormaps["gray"]
    return palette.with_extremes(bad="black", under="black")


def _png(figure: Any, **options: Any) -> bytes:
    import matplotlib.pyplot as plt

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, **options)
    plt.close(figure)
    return file.getvalue()


def montage(volume: Volume, box: Box, top: float, regions: Regions | None = None) -> bytes:
    """All slices of a map with a colour bar; outlines of regions where there are some.

    Parameters
    ----------
    top
        Upper end of the colours.
    """
    import matplotlib.pyplot as plt

    n = len(volume.images)
    chosen = (
        range(n) if n <= _MOST_SLICES else np.unique(np.linspace(0, n - 1, _MOST_SLICES).astype(int)).tolist()
    )
    columns = min(_COLUMNS, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    shown = volume.values[0][box]
    aspect = shown.shape[0] / shown.shape[1]
    width = 4.3 if len(chosen) == 1 else 2.1
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width * columns + 0.9, width * aspect * rows + 0.3),
        squeeze=False,
        layout="constrained",
        facecolor=_BACK,
    )
    low = 0.0 if volume.role != "QUALITY" else 0.9
    if volume.role == "B1":
        low, top = 2 - top, top
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, place in zip(axes.flat, chosen, strict=False):
        drawn = axis.imshow(
            np.ma.masked_equal(volume.values[place][box], 0),
            cmap=_palette(volume.role),
            vmin=low,
            vmax=top,
            interpolation="nearest",
        )
        # What is masked is drawn in the colour of the axes' background.
        if len(chosen) > 1:
            axis.set_title(f"slice {volume.images[place].slice}", fontsize=8, color=_FORE)
        if regions is not None:
            _outline(axis, regions, place, box)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.85, aspect=25)
    bar.set_label(volume.units if volume.units != "1" else "", color=_FORE)
    bar.ax.tick_params(colors=_FORE)
    bar.outline.set_edgecolor(_FORE)
    return _png(figure, facecolor=_BACK)


def _outline(axis: Any, regions: Regions, place: int, box: Box) -> None:
    labels = regions.labels[place][box]
    for number in np.unique(labels[labels > 0]):
        inside = labels == number
        axis.contour(inside, levels=[0.5], colors="white", linewidths=0.7)
        if len(regions.names) > 5:
            rows, columns = np.nonzero(inside)
            axis.text(
                columns.mean(), rows.mean(), str(number), color="white", fontsize=7, ha="center", va="center"
            )


def histograms(maps: Mapping[str, Volume]) -> bytes:
    """Distribution of T1 and T2 over all voxels of the object."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    shown = [quantity for quantity, _ in QUANTITIES if quantity in maps]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(5.2 * len(shown), 2.9), squeeze=False, layout="constrained"
    )
    for axis, quantity in zip(axes[0], shown, strict=True):
        inside = maps[quantity].values[maps[quantity].values > 0]
        bins = np.geomspace(max(float(inside.min()), 1), float(inside.max()) * 1.01, 120)
        axis.hist(inside, bins=bins, color="#b3124f" if quantity == "T1" else "#1b6f8a")
        axis.set(xscale="log", xlabel=f"{quantity} (ms)", ylabel="voxels")
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def agreement_plot(found: Mapping[str, Agreement]) -> bytes:
    """Means against the reference, and their relative difference (Bland–Altman), for each quantity."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure, axes = plt.subplots(
        len(found), 2, figsize=(10.4, 3.5 * len(found)), squeeze=False, layout="constrained"
    )
    for (quantity, one), (line, difference) in zip(found.items(), axes, strict=True):
        known = np.array([row.truth for row in one.rows])
        mean, sd = (np.array([getattr(row, name) for row in one.rows]) for name in ("mean", "sd"))
        ends = np.array([min(known.min(), mean.min()) / 1.3, max(known.max(), mean.max()) * 1.3])
        line.plot(ends, ends, color="0.5", linewidth=0.8)
        line.errorbar(known, mean, sd, fmt="o", markersize=4, color="#b3124f", capsize=2, linewidth=1)
        line.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
        line.set(xlabel=f"reference {quantity} (ms)", ylabel=f"{quantity} (ms)", title=f"R² = {one.r2:.4f}")
        between = (known + mean) / 2
        difference.plot(between, 200 * (mean - known) / (mean + known), "o", markersize=4, color="#b3124f")
        for value, style in (
            (one.bias_percent, "-"),
            (one.low_percent, "--"),
            (one.high_percent, "--"),
            (0, ":"),
        ):
            if np.isfinite(value):
                difference.axhline(value, color="0.4", linestyle=style, linewidth=0.9)
        difference.set(xscale="log", xlabel=f"mean of both {quantity} (ms)", ylabel="difference (%)")
        difference.set_title(
            f"bias {one.bias_percent:+.1f} %, limits {one.low_percent:+.1f} to {one.high_percent:+.1f} %"
        )
        for axis in (line.xaxis, line.yaxis, difference.xaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
    return _png(figure)


def fit_curve(slices: Sequence[SliceFacts]) -> bytes:
    """Data term over the iterations of each slice's fit."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.1), layout="constrained")
    for one in slices:
        if one.losses:
            step = -(-(one.n_iterations + 1) // len(one.losses))
            iterations = one.n_iterations - step * np.arange(len(one.losses))[::-1]
            axis.plot(iterations, one.losses, linewidth=1, label=f"slice {one.number}")
    axis.set(xlabel="iteration", ylabel="data term")
    if all(loss > 0 for one in slices for loss in one.losses):
        axis.set_yscale("log")
    axis.spines[["top", "right"]].set_visible(False)
    if sum(bool(one.losses) for one in slices) <= 8:
        axis.legend(fontsize="small")
    return _png(figure)


def animation(frames: Sequence[Frame], box: Box, limits: Limits) -> bytes:
    """Subspace images and maps over the iterations, a GIF."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fit.gif"
        animate(frames, box, limits, path)
        return path.read_bytes()


def features(frames: Sequence[Frame], box: Box) -> bytes:
    """Joint features over the iterations; of a fit without any, those that it had."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.png"
        draw_features(frames, box, path)
        return path.read_bytes()
