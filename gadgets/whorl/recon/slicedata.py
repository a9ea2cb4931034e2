"""What every method starts from, and what it gives: both in the box around the object.

Letters: K coefficients, C coils, J leading coefficients, H W pixels of the box.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from whorl.kspace.coilmaps import Polynomials
from whorl.kspace.coils import combine
from whorl.recon.inr import InrFit, Watch
from whorl.recon.normal import Sampling

#: Takes what is under way, and how many steps of how many are done.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class SliceData:
    """A slice in its subspace.

    Parameters
    ----------
    coil_images
        Complex `(K, C, H, W)`: ``F'W(U'y)``.
    csm
        Coil maps `(C, H, W)`.
    calibrated
        Complex `(J, H, W)`: leading coefficients, estimated such that the order of the interleaves does not
        bias them, but noise does; see `whorl.recon.calibration`.
    mask
        Boolean `(H, W)`: where the object may be.
    energies
        `(K,)`: energy of each coefficient in the dictionary, relative to the first.
    sampling
        Of k-space.
    share
        Longer side of the box relative to that of the field of view.
    polynomials
        Of which refined coil maps are made; ``None``: the maps are given and shall not be refined.
    """

    coil_images: Tensor
    csm: Tensor
    calibrated: Tensor
    mask: Tensor
    energies: Tensor
    sampling: Sampling
    share: float = 1.0
    polynomials: Polynomials | None = None

    @property
    def x0(self) -> Tensor:
        """``A'W(U'y)``, `(K, H, W)`."""
        return combine(self.coil_images, self.csm)


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """Subspace images of a slice, and what a method says about them.

    Parameters
    ----------
    coefficients
        `(K, H, W)`; real where a common phase has been taken out, which changes no map.
    csm
        Coil maps `(C, H, W)` that the images were made with.
    diagnostics
        What was measured and chosen, by name, for logs and reports.
    remarks
        Pairs of status (`degraded`, `fallback`) and why.
    phase
        Factor `(H, W)` that was taken out of the coefficients; ``None``: none.
    losses
        Data term of each iteration of the fit, and of its end.
    refit
        Repeats the fit of the INR to be watched, if there was one; its images have not seen the k-space head.
    """

    coefficients: Tensor
    csm: Tensor
    diagnostics: dict[str, float | str] = field(default_factory=dict)
    remarks: tuple[tuple[str, str], ...] = ()
    phase: Tensor | None = None
    losses: tuple[float, ...] = ()
    refit: Callable[[Watch], InrFit] | None = None
