"""Settings that suit a scan, chosen without the truth: by readouts that the fit has not seen.

Coarse features average noise away and lose small structures, fine ones keep both. Presets from coarse to fine
are fitted to nine tenths of the readouts, one core each, and the coarsest whose held-out error is near the
best is taken.

Letters: K coefficients, Y X pixels, F joint features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from whorl.pipeline.deadlines import DeadlinePassed
from whorl.recon.corrected import Start
from whorl.recon.inr import InrFit
from whorl.runtime.cores import spread

#: Within this share of the smallest held-out error a coarser preset is as good: less is chance.
_AS_GOOD = 0.005


#: Held-out error of the corrected start above which coarse presets are tried, else fine ones.
_NOISY = 0.1


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


#: The one that is made in any case.
USUAL = "normal"


@dataclass(frozen=True, slots=True, eq=False)
class Tried:
    """A preset, what its fit started from and gave, and its held-out error."""

    name: str
    start: Start
    fit: InrFit
    error: float


def worth_trying(error: float, at_a_time: int) -> tuple[str, ...]:
    """Names of the presets to try, from coarse to fine.

    Parameters
    ----------
    error
        Held-out error of the corrected start: mostly noise.
    at_a_time
        How many fits take hardly longer than one.
    """
    names = tuple(PRESETS)
    if at_a_time >= len(names):
        return names
    if at_a_time < 2:
        return (USUAL,)
    return names[:2] if error > _NOISY else names[1:]


def choose(
    steps: Mapping[str, int],
    starts: Mapping[int, Start],
    fit: Callable[[Start, str], InrFit],
    error: Callable[[Tensor, Tensor], float],
) -> tuple[Tried, list[Tried]]:
    """Try presets on training data and take one.

    Parameters
    ----------
    steps
        Conjugate-gradient steps by preset, from coarse to fine.
    starts
        Corrected start by number of steps, of the training data.
    fit
        Fits the INR to a start, with the preset of a name; called from several threads. A fit that runs out
        of time (`DeadlinePassed`) is left out.
    error
        Held-out error of complex images `(K, Y, X)` with coil maps `(C, Y, X)`.

    Returns
    -------
    Tried, list[Tried]
        The one taken, and all that were made in time.

    Raises
    ------
    DeadlinePassed
        If none was.
    """

    def run(name: str) -> InrFit | DeadlinePassed:
        try:
            return fit(starts[steps[name]], name)
        except DeadlinePassed as late:
            return late

    tried, late = [], None
    for name, fitted in zip(steps, spread(run, list(steps)), strict=True):
        if isinstance(fitted, DeadlinePassed):
            late = fitted
            continue
        start = starts[steps[name]]
        images = start.phase * fitted.coefficients
        tried.append(Tried(name, start, fitted, error(images, start.data.normal.csm)))
    if late is not None and not tried:
        raise late
    best = min(t.error for t in tried)
    return next(t for t in tried if t.error <= best * (1 + _AS_GOOD)), tried
