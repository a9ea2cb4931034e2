"""Standard deviations of a slice's maps: by repetitions of its scan, and the slope of the dictionary.

What noise does is told by more noise on the data: a guide that averages what is alike answers to noise on the
data as it did to their own, but hardly at all to noise on images that it has smoothed already. What is
systematic, aliasing and detail that is lost, is told by scans of the images that were found.

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
from whorl.physics.precision import sensitivity
from whorl.physics.real import as_real
from whorl.pipeline.deadlines import Deadline
from whorl.recon.uncertainty import SecondScan, Tissues, noise_variance, systematic_variance
from whorl.runtime.cores import one_thread

#: Repetitions with more noise, and scans of the result.
_REPETITIONS, _SECOND_SCANS = 12, 2


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
    _moves: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def __call__(
        self, until: Deadline | None, *, noise_only: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Both `(Y, X)`, 0 outside.

        Parameters
        ----------
        until
            When they are given up.
        noise_only
            Without what is systematic.

        Raises
        ------
        DeadlinePassed
            If they are not ready in time.
        """
        inside, device = self.mask.cpu().numpy(), self.mask.device
        t1_ms, t2_ms = (torch.from_numpy(m[inside]).to(device) for m in (self.maps.t1_ms, self.maps.t2_ms))
        with one_thread():
            if self._moves is None:
                self._moves = self._repeat(until, t1_ms, t2_ms)
            noisy, second = self._moves
            tissues = Tissues(t1_ms, t2_ms, self.mask)
            variance = noise_variance(noisy, tissues)
            if not noise_only:
                variance = systematic_variance(second, tissues) + variance * (1 - 1 / len(second))
            # 1 at most: then the value is not determined.
            relative = variance.clamp(0, 1).sqrt()
        result = []
        for deviation, values in zip(relative, (t1_ms, t2_ms), strict=True):
            sd = np.zeros(inside.shape, dtype=np.float32)
            sd[inside] = (deviation * values).float().cpu().numpy()
            result.append(sd)
        return result[0], result[1]

    def _repeat(self, until: Deadline | None, t1_ms: Tensor, t2_ms: Tensor) -> tuple[Tensor, Tensor]:
        """How far log T1 and log T2 `(N, 2, V)` are moved by more noise on the data, and by scans of the
        images that were found."""
        seen = self.images if self.phase is None else self.phase * self.images
        scan = SecondScan(self.kspace, (seen * self.mask).to(self.csm.dtype), self.csm, self.nufft)
        sd = scan.noise_sd() if self.noise_sd is None else self.noise_sd
        joint = self.maps.b1 is not None
        b1 = self.b1
        if self.maps.b1 is not None:
            b1 = torch.from_numpy(self.maps.b1[self.mask.cpu().numpy()]).to(self.mask.device)
        found = self.images[:, self.mask].T
        sensitive = sensitivity(found, t1_ms, t2_ms, self.dictionary, b1=b1, joint=joint)
        moves, total = [], _REPETITIONS + _SECOND_SCANS
        for n in range(total):
            if until is not None:
                until.check(f"the uncertainty was at repetition {n} of {total}")
            its = self.again(scan.with_noise(sd, n) if n < _REPETITIONS else scan.measured(sd, n))
            if its.is_complex() != self.images.is_complex():  # only one of the two had a common phase
                its = its.abs() * torch.sign(self.images) if its.is_complex() else its.to(self.images.dtype)
            errors = as_real(its[:, self.mask].T - found, 1)  # (V, J)
            moves.append((sensitive @ errors[:, :, None])[..., 0].T)
        return torch.stack(moves[:_REPETITIONS]), torch.stack(moves[_REPETITIONS:])
