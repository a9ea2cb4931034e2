"""Readouts with spikes: found on arrival, before anything hangs on them.

Along a readout the samples of a spiral change smoothly: their second differences are small where it moves
slowly, and noise where it has left the centre. A spike is neither. What is usual at a place of the readout
is told by the readouts around, which lie at the same distance from the centre of k-space.

Letters: R readouts, B readouts before them, C coils, S samples, W windows of samples.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Samples in a window, of which the roughest one counts.
_WINDOW = 16
#: Share of the readouts that may be rougher than what is usual; as many may be missing of a slice.
_SHARE = 0.1
#: Readouts before a block by which it is judged too, and the fewest that can judge anything.
_BEFORE, _FEWEST = 32, 4
#: Share of the readouts that have no spike in a burst of them; how much more these and the rougher ones may
#: differ than they do in the windows beside; and how much rougher than those beside these may be.
_SOUND, _DIFFERENT, _PEAK = 0.25, 2.0, 100.0
#: Windows over which a spike does not reach.
_APART = 2
#: Share of the windows of a readout that are as quiet as its noise, and how many times that of the other
#: readouts it is in one that is damaged as a whole.
_QUIET, _LOUD = 0.1, 4.0
#: Sixth differences relative to third ones: 6.8 of white noise, at most 5.2 of a signal in two thirds of the
#: band.
_NOISE = 5.5
#: How much rougher than usual a spike is, and how much rougher than the size of the samples beside it.
_SPIKE, _BESIDE = 8.0, 4.0
#: Share of its windows than which a readout is rougher as a whole; and how much rougher than those before and
#: after it, and how many these are, one is that is damaged as a whole.
_MOST, _WHOLE, _NEAR = 0.75, 5.0, 3
#: A whole readout may be as much rougher than usual because its signal is stronger.
_STRONGER = 15.0
#: Size of a sample that is no noise, relative to the median of its coil.
_NOISE_SPIKE = 12.0
_TINY = torch.finfo(torch.float32).tiny
#: What is smoother than this, relative to the roughest place, is judged as if it were not.
_FLOOR = 1e-2


def roughness(readouts: Tensor) -> Tensor:
    """Largest second difference along the samples in each window of 16, `(R, C, W)`; that of the real or of
    the imaginary part, whichever is larger.

    Parameters
    ----------
    readouts
        Complex `(R, C, S)`, S at least 3.
    """
    parts = torch.view_as_real(readouts).flatten(-2)  # (R, C, 2 S)
    bends = parts[..., 4:] + parts[..., :-4]
    bends.sub_(parts[..., 2:-2], alpha=2).abs_()
    W = _n_windows(readouts)
    windows = _cut(bends, W)
    rough = windows.amax(-1)
    left = bends[..., W * windows.shape[-1] :]
    if left.shape[-1]:  # they belong to the last window
        rough[..., -1] = torch.maximum(rough[..., -1], left.amax(-1))
    return rough


def find_spikes(readouts: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which readouts of a block hold spikes, in samples of any coil or as a whole.

    A spike is 8 times as rough as all but a tenth of the readouts around, at the same place in the same coil,
    and 4 times as rough as the samples beside it are large. If a quarter of the readout is rougher than
    usual, its signal may be stronger, and a spike must stand out by as much more; or, if that is five times
    as rough as the readouts before and after it, or its noise is four times that of most, it is damaged as
    a whole.

    Spikes at the same place in up to three quarters of the readouts are told from the windows beside, where
    the readouts differ less; in all readouts, if they are some 1000 times what is beside.

    Of 93 clean scans (64² to 320², 16 to 96 interleaves, 1 to 32 coils, noise 1e-3 to 1e-2 of the largest
    sample; fat, off-resonance and phase jumps among them) none reaches more than 3.5 times what is usual, or
    1.5 times the noise of most. The largest spike that is not found, in all
    coils and wherever it lies, changes low-rank T1 and T2 by 0.19 of what noise does, mostly by less than
    0.05. Readouts that are several times as strong as those around can be taken for damaged if there is next
    to no noise (1e-4 and below).

    Parameters
    ----------
    readouts
        Complex `(R, C, S)`, in the order of arrival.
    before
        What was returned for the block before, of the same slice; ``None``: there is none.

    Returns
    -------
    Tensor, Tensor
        Boolean `(R,)`, and what the next block is judged by as well, `(B, C, W)`. Fewer than four readouts,
        or samples, are not judged.
    """
    R, _, S = readouts.shape
    damaged = torch.zeros(R, dtype=torch.bool, device=readouts.device)
    if S < _FEWEST:
        return damaged, readouts.real[:0]
    rough = roughness(readouts)
    around = rough if before is None else torch.cat([before, rough])  # (B + R, C, W)
    if len(around) < _FEWEST:
        return damaged, around
    usual = _without_bursts(_exceeded_by(around, math.ceil(_SHARE * len(around))), around)
    excess = around / torch.maximum(usual, _FLOOR * usual.max()).clamp_min(_TINY)
    B = len(around) - R
    loud = _loudness(excess)[B:] > _LOUD
    suspects = torch.nonzero((excess[B:] > _SPIKE).flatten(1).any(1) | loud.any(1))[:, 0]
    if len(suspects):
        as_a_whole = excess.quantile(_MOST, dim=-1)  # (B + R, C)
        for r in suspects.tolist():
            own = as_a_whole[B + r]
            spiked = excess[B + r] > _SPIKE * own.clamp(1, _STRONGER)[:, None]
            spiked &= rough[r] > _BESIDE * _size_beside(readouts[r])
            whole = (own > _WHOLE * _near(as_a_whole, B + r)) | (loud[r] & _is_noisy(readouts[r]))
            damaged[r] = bool((spiked.any(-1) | whole).any())
    return damaged, torch.cat([around[:B], rough[~damaged]])[-_BEFORE:]


def has_noise_spikes(noise: NDArray[np.complex64]) -> bool:
    """Whether a noise readout `(C, S)` has samples that are none: 12 times the median size of their coil.

    Gaussian noise reaches that once in 10⁴³ samples. Coils without noise are not judged.
    """
    if not noise.size:
        return False
    size = np.abs(noise)
    usual = np.median(size, axis=1, keepdims=True)
    return bool(((size > _NOISE_SPIKE * usual) & (usual > 0)).any())


def _exceeded_by(values: Tensor, count: int) -> Tensor:
    """What only `count` of the values `(R, ...)` are larger than."""
    return values.topk(min(count, len(values) - 1) + 1, dim=0).values[-1]


def _without_bursts(usual: Tensor, around: Tensor) -> Tensor:
    """What is usual `(C, W)`, where it is not made of spikes itself.

    How much the readouts around differ changes slowly along them; where a burst of spikes is, it does not.
    """
    if usual.shape[-1] < 2 * _APART:
        return usual
    sound = around.kthvalue(math.ceil(_SOUND * len(around)), dim=0).values.clamp_min(_TINY)
    most = sound * (_DIFFERENT * _beside(usual / sound))
    return torch.minimum(torch.minimum(usual, most), _PEAK * _beside(usual))


def _beside(values: Tensor) -> Tensor:
    """The larger one of the values two windows before and after each, `(C, W)`."""
    padded = torch.nn.functional.pad(values, (_APART, _APART))
    return torch.maximum(padded[..., : -2 * _APART], padded[..., 2 * _APART :])


def _loudness(excess: Tensor) -> Tensor:
    """Where a readout is quiet, how rough it is relative to the others `(R, C, W)`; `(R, C)`."""
    quiet = excess.kthvalue(math.ceil(_QUIET * excess.shape[-1]), dim=-1).values
    middle = quiet.median(0).values
    return quiet / middle.where(middle > 0, torch.inf)  # a coil that is dead in most of them tells nothing


def _is_noisy(readout: Tensor) -> Tensor:
    """Whether what changes from sample to sample is noise, `(C, S)` to `(C,)`; a signal is smoother."""
    if readout.shape[-1] < 2 * _WINDOW:
        return torch.zeros(len(readout), dtype=torch.bool, device=readout.device)
    third = torch.diff(readout, n=3)
    sixth = torch.diff(third, n=3)
    return sixth.abs().median(-1).values > _NOISE * third.abs().median(-1).values


def _near(roughness: Tensor, r: int) -> Tensor:
    """Roughness of the readouts around one, `(R, C)` to `(C,)`; one of them may be damaged too."""
    around = torch.cat([roughness[max(0, r - _NEAR) : r], roughness[r + 1 : r + 1 + _NEAR]])
    return _exceeded_by(around, 1).clamp(1, _STRONGER)


def _n_windows(readouts: Tensor) -> int:
    return max(1, (readouts.shape[-1] - 2) // _WINDOW)


def _cut(values: Tensor, count: int) -> Tensor:
    """The last axis in windows of equal size, `(..., W, size)`; what is left over is left out."""
    size = values.shape[-1] // count
    return values[..., : count * size].view(*values.shape[:-1], count, size)


def _size_beside(readout: Tensor) -> Tensor:
    """Size of the samples `(C, S)` in each window together with the one before or the one after, whichever
    have the smaller median, `(C, W)`."""
    windows = _cut(readout[:, 1:-1].abs(), _n_windows(readout))  # (C, W, samples)
    with_next = torch.cat([windows[:, :-1], windows[:, 1:]], dim=-1).median(-1).values  # (C, W - 1)
    ends = windows[:, [0, -1]].median(-1).values
    return torch.minimum(
        torch.cat([with_next, ends[:, 1:]], dim=1), torch.cat([ends[:, :1], with_next], dim=1)
    )
