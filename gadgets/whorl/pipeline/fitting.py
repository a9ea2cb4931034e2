"""The fit of an INR once more, to be looked at.

Letters: K coefficients, F features, Y X pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from whorl.maps.images import Frame
from whorl.pipeline.slices import Inside

#: Growth of the iteration from frame to frame where their number is not given.
_GROWTH = 1.16


def chosen_iterations(n_frames: int, n_iterations: int) -> set[int]:
    """Iterations that are shown: at first each one, then ever fewer; the last one among them.

    Parameters
    ----------
    n_frames
        How many at most; 0: as many as a growth of a sixth gives.
    """
    if not n_iterations:
        return set()
    growth = _GROWTH
    while True:
        chosen, latest = {1, n_iterations}, 1.0
        while (latest := latest * growth) < n_iterations:
            chosen.add(round(latest))
        if not n_frames or len(chosen) <= max(n_frames, 2):
            return chosen
        growth *= 1.05


def record_fit(inside: Inside, n_frames: int = 0) -> list[Frame]:
    """Repeat the fit of a slice; frames at some iterations, and at last the images that were sent.

    A fit without iterations has the last one alone.

    Parameters
    ----------
    n_frames
        How many, the one that was sent included; 0: as many as a growth of a sixth gives.
    """
    if inside.refit is None:
        return []
    frames: list[Frame] = []

    def frame(title: str, features: Tensor, images: Tensor) -> Frame:
        shown = (images.abs() * inside.mask).float().cpu().numpy()
        return Frame(title, features.float().cpu().numpy(), shown, inside.to_maps(images))

    wanted = chosen_iterations(max(n_frames - 1, 0), len(inside.losses) - 1)

    def watch(iteration: int, current: Callable[[], Any]) -> None:
        if iteration in wanted:
            fit = current()
            frames.append(frame(f"iteration {iteration}", fit.features[:-1], fit.coefficients))

    fit = inside.refit(watch)
    frames.append(frame("sent", fit.features[:-1], inside.images))
    return frames
