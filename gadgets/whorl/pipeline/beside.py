"""What is made of a slice beside its maps.

Letters: K coefficients, Y X pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ismrmrd
import numpy as np
import torch
from numpy.typing import NDArray

from whorl.config import Settings
from whorl.maps.images import ImageMaker, Provenance
from whorl.pipeline.deadlines import Deadline, in_time
from whorl.pipeline.fitting import record_fit
from whorl.pipeline.slices import Inside, SliceResult

#: Names, and what makes the images.
Further = Iterator[tuple[str, Callable[[], list[ismrmrd.Image]]]]

#: Joint features that the pictures of a fit show.
_N_FEATURES = 8


def beside_maps(
    result: SliceResult,
    settings: Settings,
    images: ImageMaker,
    head: np.void,
    provenance: Provenance,
    deadline: Deadline | None,
) -> Further:
    """Each thing that is asked for and can be made of the slice: its name, and what makes its images.

    Parameters
    ----------
    result
        What is known of the slice.
    images, head, provenance
        Make images of arrays, as those of the maps.
    deadline
        Of the slice; ``None``: there is none.
    """
    inside = result.inside
    if settings.rgb:
        yield "coloured maps", lambda: images.coloured(result.maps, head, provenance)
    if inside is None:
        return
    if settings.subspace_images:
        yield "subspace images", lambda: images.subspace(_subspace(inside), head, provenance)
    if settings.uncertainty:
        yield "uncertainty", lambda: images.deviations(*_deviations(inside, deadline), head, provenance)
    if settings.fit_frames:
        yield (
            "pictures of the fit",
            lambda: images.frames(record_fit(inside, settings.fit_frames), _N_FEATURES, head, provenance),
        )


def _subspace(inside: Inside) -> NDArray[np.complex64]:
    values = inside.images if inside.phase is None else inside.phase * inside.images
    shown: NDArray[np.complex64] = (values * inside.mask).to(torch.complex64).cpu().numpy()
    return shown


def _deviations(inside: Inside, deadline: Deadline | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if deadline is None:
        return inside.deviations(None)
    return in_time(lambda: inside.deviations(deadline), deadline, "whorl-uncertainty")
