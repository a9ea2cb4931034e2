"""What every method starts from, and what it gives.

Letters: K coefficients, C coils, Y X pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from whorl.kspace.coils import coil_maps, combine
from whorl.recon.inr import InrFit, Watch
from whorl.recon.normal import Normal


@dataclass(frozen=True, slots=True, eq=False)
class SliceData:
    """A slice in its subspace.

    Parameters
    ----------
    coil_images
        Complex `(K, C, Y, X)`: ``F'W(U'y)``.
    normal
        ``A'WA`` with the coil maps, for images that are zero outside `mask`.
    calibrated
        Complex `(K, Y, X)`: estimate that the order of the interleaves does not bias, but noise does; see
        `whorl.recon.calibration`.
    mask
        Boolean `(Y, X)`: where the object may be.
    energies
        `(K,)`: energy of each coefficient in the dictionary, relative to the first.
    real_basis
        Whether the temporal basis is real, so that the coefficients of a voxel share one phase.
    estimate_maps
        Makes coil maps `(C, Y, X)` of better coil images `(K, C, Y, X)`; ``None``: the maps are given.
    """

    coil_images: Tensor
    normal: Normal
    calibrated: Tensor
    mask: Tensor
    energies: Tensor
    real_basis: bool = True
    estimate_maps: Callable[[Tensor], Tensor] | None = coil_maps

    @property
    def x0(self) -> Tensor:
        """``A'W(U'y)``, `(K, Y, X)`."""
        return combine(self.coil_images, self.normal.csm)

    def with_maps(self, csm: Tensor) -> SliceData:
        """The same data with other coil maps."""
        return replace(self, normal=self.normal.with_maps(csm))


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """Subspace images of a slice, and what a method says about them.

    Parameters
    ----------
    coefficients
        `(K, Y, X)`; real where a common phase has been taken out, which changes no map.
    diagnostics
        What was measured and chosen, by name, for logs and reports.
    remarks
        Pairs of status (`degraded`, `fallback`) and why.
    phase
        Factor `(Y, X)` that was taken out of the coefficients; ``None``: none.
    csm
        Coil maps `(C, Y, X)` that the images were made with.
    losses
        Data term of each iteration of the fit that was taken.
    refit
        Repeats the fit of the INR to be watched, if there was one; its images have not seen the k-space head.
    """

    coefficients: Tensor
    diagnostics: dict[str, float | str] = field(default_factory=dict)
    remarks: tuple[tuple[str, str], ...] = ()
    phase: Tensor | None = None
    csm: Tensor | None = None
    losses: tuple[float, ...] = ()
    refit: Callable[[Watch], InrFit] | None = None
