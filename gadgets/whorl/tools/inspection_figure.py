"""A picture of how a scan goes through k-space.

Letters: I interleaves, S samples, R readouts, Y X pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from whorl.tools.inspection import FigureData
from whorl.tools.pointspread import OrderCheck

_DPI = 110
#: Interleaves that are drawn; more make the picture black.
_DRAWN = 96
#: Readouts whose order is shown, pixels around the point, and the floor of the point-spread function.
_SHOWN, _AROUND, _FLOOR_DB = 200, 24, -60


def check_installed() -> None:
    """Raise ImportError if what the picture needs is not installed."""
    import cmcrameri  # noqa: F401
    import matplotlib  # noqa: F401, ICN001


def draw(data: FigureData, order: OrderCheck | None, title: str, path: Path) -> None:
    """Interleaves, radius over the readout, order of the interleaves, and the spread of a point."""
    import matplotlib as mpl

    mpl.use("Agg")
    from cmcrameri import cm
    from matplotlib import pyplot as plt

    points, I = data.points, len(data.points)  # noqa: E741 - the field's letter
    figure, axes = plt.subplots(2, 2, figsize=(13, 11), dpi=_DPI, layout="constrained")
    figure.suptitle(f"{title}: {I} interleaves of {points.shape[1]} samples")

    plane = axes[0, 0]
    for n in np.unique(np.linspace(0, I - 1, min(I, _DRAWN)).astype(int)):
        plane.plot(*points[n].T, color="0.75", linewidth=0.4)
    plane.plot(*points[0].T, color="#b3124f", linewidth=1.4, label="first")
    angle = np.linspace(0, 2 * np.pi, 200)
    plane.plot(0.5 * np.cos(angle), 0.5 * np.sin(angle), "k--", linewidth=0.8, label="edge of the matrix")
    plane.set(
        aspect="equal", xlabel="kx (cycles per pixel)", ylabel="ky (cycles per pixel)", title="Trajectory"
    )
    plane.legend(loc="upper right")

    radius = axes[0, 1]
    distance = np.linalg.norm(points, axis=-1)  # (I, S)
    samples = np.arange(points.shape[1])
    radius.fill_between(samples, distance.min(0), distance.max(0), color="0.75", label="all interleaves")
    radius.plot(samples, distance[0], color="#b3124f", linewidth=1.2, label="first")
    radius.axhline(0.5, color="k", linestyle="--", linewidth=0.8)
    radius.set(xlabel="sample", ylabel="distance from the centre (cycles per pixel)", title="Radius")
    radius.legend(loc="upper left")

    turn = axes[1, 0]
    last = points[data.interleaf[:_SHOWN], -1]
    degrees = np.rad2deg(np.arctan2(last[:, 1], last[:, 0])) % 360
    turn.plot(degrees, ".", color="#1f4e79", markersize=5)
    turn.set(
        xlabel="readout", ylabel="angle of the last sample (degrees)", ylim=(0, 360),
        yticks=range(0, 361, 60),
        title=f"Order of the interleaves (first {len(degrees)} readouts)",
    )  # fmt: skip

    spot = axes[1, 1]
    Y, X = data.spread.shape
    rows = slice(max(0, Y // 2 - _AROUND), Y // 2 + _AROUND + 1)
    columns = slice(max(0, X // 2 - _AROUND), X // 2 + _AROUND + 1)
    near = 20 * np.log10(np.maximum(data.spread[rows, columns], 1e-6))
    extent = (columns.start - X // 2 - 0.5, columns.start - X // 2 + near.shape[1] - 0.5,
              rows.start - Y // 2 + near.shape[0] - 0.5, rows.start - Y // 2 - 0.5)  # fmt: skip
    image = spot.imshow(near, cmap=cm.lipari, vmin=_FLOOR_DB, vmax=0, extent=extent, interpolation="nearest")
    figure.colorbar(image, ax=spot, label="dB")
    said = ""
    if order is not None:
        lobe = f"{order.side_lobe:.1%}, {order.side_lobe_pixels:.0f} pixels away"
        said = f"\nthe order adds up to {lobe}"
    spot.set(xlabel="x (pixels)", ylabel="y (pixels)", title=f"A point of white matter in x0{said}")

    figure.savefig(path)
    plt.close(figure)
