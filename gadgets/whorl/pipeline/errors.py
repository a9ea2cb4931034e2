"""Standard deviations of a slice's maps: by scans of its own images, and the slope of the dictionary.

Letters: N repetitions, K coefficients, C coils, Y X pixels, V pixels of the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.kspace.nufft import Nufft
from whorl.kspace.slicebuffer import SubspaceKspace
from whorl.maps.images import SliceMaps
from whorl.physics.dictionary import Dictionary
from whorl.physics.precision import as_real, relative_sd, sensitivity
from whorl.pipeline.deadlines import Deadline
from whorl.recon.uncertainty import SecondScan, covariance_of
from whorl.runtime.cores import one_thread

#: Scans of the result from which its uncertainty is told.
_REPETITIONS = 6


@dataclass(slots=True, eq=False)
class Deviations:
    """Standard deviations of T1 and T2 in ms, made when they are asked for; it takes as long as some slices.

    Parameters
    ----------
    kspace
        What was measured.
    images, phase, csm
        Subspace images `(K, Y, X)`, the phase factor that they lack or ``None``, and coil maps `(C, Y, X)`.
    mask
        Boolean `(Y, X)`: the object.
    maps
        What was matched.
    b1
        Known transmit field `(V,)`, or ``None``.
    nufft, dictionary
        Of the scan.
    noise_sd
        Of a complex sample; ``None``: as the data show it.
    again
        Images `(K, Y, X)` of another scan of the slice, by the same method.
    """

    kspace: SubspaceKspace
    images: Tensor
    phase: Tensor | None
    csm: Tensor
    mask: Tensor
    maps: SliceMaps
    b1: Tensor | None
    nufft: Nufft
    dictionary: Dictionary
    noise_sd: float | None
    again: Callable[[SubspaceKspace], Tensor]
    _errors: Tensor | None = field(default=None, init=False)

    def __call__(
        self, until: Deadline | None, *, noise_only: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Both `(Y, X)`, 0 outside; see `whorl.recon.uncertainty.covariance_of`.

        Raises
        ------
        DeadlinePassed
            If they are not ready in time.
        """
        with one_thread():
            if self._errors is None:
                self._errors = self._repeat(until)
            covariance = covariance_of(as_real(self._errors, 1), self.mask, noise_only=noise_only)
            inside, device = self.mask.cpu().numpy(), self.mask.device
            t1_ms, t2_ms = (
                torch.from_numpy(m[inside]).to(device) for m in (self.maps.t1_ms, self.maps.t2_ms)
            )
            joint = self.maps.b1 is not None
            b1 = torch.from_numpy(self.maps.b1[inside]).to(device) if self.maps.b1 is not None else self.b1
            moved = sensitivity(
                self.images[:, self.mask].T, t1_ms, t2_ms, self.dictionary, b1=b1, joint=joint
            )
            relative = relative_sd(moved, covariance)
        result = []
        for n, values in enumerate((t1_ms, t2_ms)):
            sd = np.zeros(inside.shape, dtype=np.float32)
            sd[inside] = (relative[:, n] * values).float().cpu().numpy()
            result.append(sd)
        return result[0], result[1]

    def _repeat(self, until: Deadline | None) -> Tensor:
        """What the method makes of scans of its own images, less these images, `(N, K, Y, X)`."""
        seen = self.images if self.phase is None else self.phase * self.images
        scan = SecondScan(self.kspace, (seen * self.mask).to(self.csm.dtype), self.csm, self.nufft)
        sd = scan.noise_sd() if self.noise_sd is None else self.noise_sd
        errors = []
        for seed in range(_REPETITIONS):
            if until is not None:
                until.check(f"the uncertainty was at repetition {seed} of {_REPETITIONS}")
            its = self.again(scan.measured(sd, seed))
            if its.is_complex() != self.images.is_complex():  # only one of the two had a common phase
                its = its.abs() * torch.sign(self.images) if its.is_complex() else its.to(self.images.dtype)
            errors.append(its - self.images)
        return torch.stack(errors)
