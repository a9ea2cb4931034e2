"""What the figures of a comparison and of a report share: maps, errors, subspace images, the fit of the INR.

Letters: K coefficients, F joint features, Y X pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whorl.maps.images import Frame
from whorl.maps.rois import QUANTITIES

_N_FEATURES = 9
#: Subspace images that are shown: weaker ones are noise to the eye.
N_IMAGES = 5
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


def box_of(inside: NDArray[np.bool_]) -> Box:
    """The object in a mask `(Y, X)` with a margin; all of it if there is none."""
    rows, columns = np.nonzero(inside)
    if not len(rows):
        return slice(None), slice(None)
    return (
        slice(max(0, int(rows.min()) - _MARGIN), int(rows.max()) + _MARGIN + 1),
        slice(max(0, int(columns.min()) - _MARGIN), int(columns.max()) + _MARGIN + 1),
    )


def colours(quantity: str) -> Any:
    from cmcrameri import cm

    return (cm.lipari if quantity == "T1" else cm.navia).with_extremes(bad="black", under="black")


def show_map(axis: Any, image: NDArray[np.float32], quantity: str, top: float) -> Any:
    """A map; what is outside the object is black."""
    return axis.imshow(
        np.ma.masked_equal(image, 0), cmap=colours(quantity), vmin=0, vmax=top, interpolation="nearest"
    )


def show_error(axis: Any, image: NDArray[np.float32], known: NDArray[np.float32]) -> Any:
    from cmcrameri import cm

    both = (known > 0) & (image > 0)
    error = np.ma.masked_where(~both, 100 * (image / np.where(known > 0, known, 1) - 1))
    return axis.imshow(error, cmap=cm.vik, vmin=-30, vmax=30, interpolation="nearest")


def show_magnitude(axis: Any, image: NDArray[np.float32]) -> Any:
    """A subspace image on a scale of its own: that of methods with and without coil calibration differ."""
    inside = image[image > 0]
    top = float(np.percentile(inside, 99)) if len(inside) else 1.0
    return axis.imshow(image, cmap="gray", vmin=0, vmax=top, interpolation="nearest")


def write(axis: Any, text: str) -> None:
    """A line below a map."""
    axis.text(0.5, -0.02, text, transform=axis.transAxes, ha="center", va="top", fontsize=8)


def label(axis: Any, text: str) -> None:
    """A name to the left of a row."""
    axis.text(-0.08, 0.5, text, transform=axis.transAxes, ha="right", va="center", fontsize=10)


def save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    # Labels beside axes that are switched off lie beyond what the layout knows of.
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)


# --- The fit of the INR ----------------------------------------------------------------------------


def _alive(features: NDArray[np.float32]) -> list[int]:
    """The first channels that are not 0 everywhere: some ReLU never become active."""
    alive = [n for n, channel in enumerate(features) if np.ptp(channel) > 0]
    return alive[:_N_FEATURES]


def draw_features(frames: Sequence[Frame], box: Box, path: Path, of: str = "the INR") -> None:
    """Figure 1b: joint features at five iterations, from the first to the last.

    Parameters
    ----------
    frames
        The last one is what was sent, and is drawn only if there is no other.
    of
        Whose features they are, for the title.
    """
    import matplotlib.pyplot as plt

    fit = frames[:-1] or frames
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
        label(axes[row, 0], fit[n].title)
    figure.suptitle(f"Joint features of {of}, each on a scale of its own")
    save(figure, path)


def animate(frames: Sequence[Frame], box: Box, limits: Limits, path: Path, of: str = "the fit") -> None:
    """Figure 2: subspace images and maps during the fit.

    Parameters
    ----------
    frames
        The last one is what was sent.
    of
        What the iterations are of, for the headings.
    """
    import matplotlib.pyplot as plt
    from matplotlib.animation import PillowWriter

    last = frames[-1]
    n_images = min(N_IMAGES, len(last.images))
    figure, axes = plt.subplots(1, n_images + 2, figsize=(1.9 * (n_images + 2), 2.7), layout="constrained")
    heading = figure.suptitle(last.title)
    shown = [show_magnitude(axes[k], last.images[k][box]) for k in range(n_images)]
    for k in range(n_images):
        axes[k].set_title(f"k = {k + 1}", fontsize=10)
    for axis, (quantity, name) in zip(axes[n_images:], QUANTITIES, strict=True):
        image = show_map(axis, getattr(last.maps, name)[box], quantity, limits[quantity])
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
            heading.set_text("as sent" if frame is last else f"{frame.title} of {of}")
            for k in range(n_images):
                shown[k].set_data(frame.images[k][box])
            for image, (_, name) in zip(shown[n_images:], QUANTITIES, strict=True):
                image.set_data(np.ma.masked_equal(getattr(frame.maps, name)[box], 0))
            writer.grab_frame()
    plt.close(figure)
