"""What is measured: an object in its fields, and the signals of its tissues.

Where signals vary from place to place, components of the signals take the place of the tissues.

Letters: T timepoints, M tissues, R components, N images, V U samples of the fine grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whorl.simulation.parameters import Parameters
from whorl.simulation.phantoms import (
    Phantom,
    brain,
    letters,
    nist_plate,
    off_resonance,
    phase_jump,
    textured_brain,
    transmit_field,
    with_fat,
)
from whorl.simulation.signals import Expansion, Train, expand_signals, fisp_signals

# Components that are transformed at once: 16 of 8 coils and 96 interleaves take 0.2 GB.
_AT_ONCE = 16


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """An object in its fields.

    Parameters
    ----------
    thing
        The object.
    b1
        Transmit field relative to the nominal one, `(V, U)`.
    b0_hz
        Off-resonance, `(V, U)`.
    phase
        Of the object as a complex factor, `(V, U)` or `(1, 1)`.
    signals
        `(M, T)` of the tissues, times their proton density; or an expansion of signals that vary from
        place to place.
    """

    thing: Phantom
    b1: NDArray[np.float64]
    b0_hz: NDArray[np.float64]
    phase: NDArray[np.complex128]
    signals: NDArray[np.complex128] | Expansion

    def species(self) -> dict[float, list[int]]:
        """Tissues by chemical shift in Hz."""
        found: dict[float, list[int]] = {}
        for m in range(len(self.thing.names)):
            found.setdefault(self.thing.shift_of(m), []).append(m)
        return found

    def of_slice(self, z: int, tissues: list[int]) -> Iterator[tuple[NDArray[Any], NDArray[np.complex128]]]:
        """Images of some tissues in a slice `(N, V, U)` and their signals `(N, T)`, not too many at once."""
        if not isinstance(self.signals, Expansion):
            yield self.thing.fractions[z, tissues], self.signals[tissues]
            return
        for first in range(0, len(self.signals.components), _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            yield self._images(self.signals, z, tissues, some), self.signals.components[some]

    def _images(
        self, expansion: Expansion, z: int, tissues: list[int], some: slice
    ) -> NDArray[np.complex128]:
        """What each of some components weighs in each fine sample of a slice, `(R, V, U)`."""
        images = np.zeros((len(expansion.components[some]), *self.b1.shape), dtype=np.complex128)
        for m in tissues:
            tissue = self.thing.fractions[z, m]
            v, u = np.nonzero(tissue)
            amount = self.thing.pd[m] * tissue[v, u]
            weights = expansion.weights(m, _factors(self.thing, m, z, self.b1)[v, u], some)
            images[:, v, u] += (amount[:, None] * weights).T
        return images


def make_scene(p: Parameters, train: Train, say: Callable[[str], None]) -> Scene:
    """The object that is asked for, with the signals of a train.

    Raises
    ------
    ValueError
        If there is no such phantom.
    ImportError
        If the brain is asked for and nilearn is not installed.
    """
    phantoms: dict[str, Callable[..., Phantom]] = {
        "nist": partial(nist_plate, p.plate),
        "brain": brain,
        "texture": partial(textured_brain, seed=p.seed),
        "letters": letters,
    }
    if p.phantom not in phantoms:
        raise ValueError(f'phantom is "{p.phantom}": expected "nist", "brain", "texture" or "letters"')
    thing = phantoms[p.phantom](slices=p.slices, matrix=p.matrix, fov_mm=p.fov_mm)
    if p.fat:
        thing = with_fat(thing, matrix=p.matrix, fov_mm=p.fov_mm)
    say(f"signals: {len(thing.names)} tissues, {len(train)} timepoints")
    inside = thing.fractions.max(axis=(0, 1)) > 0  # (V, U)
    b1 = transmit_field(p.b1, inside)
    pulses: dict[str, Any] = {
        "inversion_efficiency": p.inversion_efficiency,
        "slice_profile": p.slice_profile,
    }
    signals: NDArray[np.complex128] | Expansion
    if p.b1 == 0 and not thing.textured:
        signals = thing.pd[:, None] * fisp_signals(train, thing.t1_ms, thing.t2_ms, **pulses)
    else:
        signals = expand_signals(train, thing.t1_ms, thing.t2_ms, *_ranges(thing, b1), **pulses)
        say(f"tissues that vary from place to place: {len(signals.components)} components")
    phase = phase_jump(p.phase_jump_rad, inside) if p.phase_jump_rad else np.ones((1, 1), dtype=np.complex128)
    return Scene(thing, b1, off_resonance(p.b0_hz, inside), phase, signals)


def _factors(thing: Phantom, m: int, z: int, b1: NDArray[np.float64]) -> NDArray[np.float64]:
    """Factors of the flip angles, of T1 and of T2 of a tissue in each fine sample, `(V, U, 3)`."""
    return np.concatenate([b1[..., None], thing.factors(m, z)], axis=-1)


def _ranges(thing: Phantom, b1: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Smallest and largest factors `(M, 3)` of each tissue where there is some of it."""
    n_slices, n_tissues = thing.fractions.shape[:2]
    # Pixels may be so large that a tissue falls between them.
    low, high = np.full((n_tissues, 3), np.inf), np.full((n_tissues, 3), -np.inf)
    for m in range(n_tissues):
        for z in range(n_slices):
            if (inside := thing.fractions[z, m] > 0).any():
                factors = _factors(thing, m, z, b1)[inside]
                low[m] = np.minimum(low[m], factors.min(axis=0))
                high[m] = np.maximum(high[m], factors.max(axis=0))
    missing = np.isinf(low)
    return np.where(missing, 1, low), np.where(missing, 1, high)
