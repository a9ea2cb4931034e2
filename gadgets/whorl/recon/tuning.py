"""Settings that suit a scan, chosen without the truth: by readouts that the fit has not seen.

Coarse features average noise away and lose small structures, fine ones keep both. Presets from coarse to fine are
fitted to nine tenths of the readouts, one core each, and the coarsest whose held-out error is near the best
is taken.

Letters: K coefficients, Y X pixels, F joint features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from whorl.cores import spread
from whorl.recon.corrected import Start
from whorl.recon.inr import InrFit

#: Within this share of the smallest held-out error a coarser preset is as good: what is below decides by chance.
_AS_GOOD = 0.005


@dataclass(frozen=True, slots=True)
class Preset:
    """What suits a level of noise.

    Parameters
    ----------
    steps
        Conjugate-gradient steps of the corrected start.
    finest
        Grid points of the finest level along the field of view.
    iterations
        Of the fit.
    """

    steps: int
    finest: int
    iterations: int


#: From coarse to fine.
PRESETS: Mapping[str, Preset] = {
    "high_noise": Preset(4, 64, 60),
    "normal": Preset(8, 96, 100),
    "low_noise": Preset(8, 200, 100),
}


@dataclass(frozen=True, slots=True, eq=False)
class Tried:
    """A preset, what it started from and gave, and its held-out error."""

    name: str
    start: Start
    fit: InrFit
    error: float


def choose(
    starts: Mapping[int, Start],
    fit: Callable[[Tensor, Tensor, Preset], InrFit],
    error: Callable[[Tensor, Tensor], float],
    names: Sequence[str] = tuple(PRESETS),
) -> tuple[Tried, list[Tried]]:
    """Try presets on training data and take one.

    Parameters
    ----------
    starts
        Corrected start by number of steps, of the training data.
    fit
        Takes (images, mask, preset).
    error
        Held-out error of complex images `(K, Y, X)` with coil maps `(C, Y, X)`.
    names
        Presets to try, from coarse to fine.

    Returns
    -------
    Tried, list[Tried]
        The one taken, and all.
    """

    def run(name: str) -> InrFit:
        preset = PRESETS[name]
        start = starts[preset.steps]
        return fit(start.z, start.data.mask, preset)

    fits = spread(run, names)
    tried = []
    for name, fitted in zip(names, fits, strict=True):
        start = starts[PRESETS[name].steps]
        tried.append(
            Tried(name, start, fitted, error(start.phase * fitted.coefficients, start.data.normal.csm))
        )
    best = min(t.error for t in tried)
    return next(t for t in tried if t.error <= best * (1 + _AS_GOOD)), tried
