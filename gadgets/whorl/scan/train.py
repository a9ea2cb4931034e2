"""The fingerprint train: what the scanner did at each timepoint.

Letters: T timepoints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Train:
    """Flip angles and times of T pulses on one slice.

    Parameters
    ----------
    flip_deg, tr_ms, te_ms, phase_deg
        `(T,)` float64: nominal flip angle and RF phase in degrees, time to the next excitation of
        the same slice and echo time in ms. The receiver follows the RF phase.
    inversion_time_ms
        Delay from an ideal inversion to the first pulse; ``None``: no inversion.
    source
        Where the values come from, for the operator.
    phase_known
        Whether the source gave RF phases; if not, those of the readouts may be filled in.

    Raises
    ------
    ValueError
        If the lengths differ, a value is not finite, or an echo lies outside its TR.
    """

    flip_deg: NDArray[np.float64]
    tr_ms: NDArray[np.float64]
    te_ms: NDArray[np.float64]
    phase_deg: NDArray[np.float64]
    inversion_time_ms: float | None
    source: str
    phase_known: bool = True

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("flip_deg", "tr_ms", "te_ms", "phase_deg")}
        if len(set(lengths.values())) != 1 or not self.n_timepoints:
            raise ValueError(f"the train needs lists of one common length, got {lengths}")
        for name in lengths:
            bad = np.flatnonzero(~np.isfinite(getattr(self, name)))
            if len(bad):
                raise ValueError(
                    f"{name} of timepoint {bad[0]} is {getattr(self, name)[bad[0]]}: expected a number"
                )
        if not np.any(self.flip_deg):
            raise ValueError("all flip angles of the train are 0: there would be no signal")
        wrong = np.flatnonzero((self.te_ms < 0) | (self.tr_ms <= 0) | (self.te_ms > self.tr_ms))
        if len(wrong):
            t = wrong[0]
            raise ValueError(
                f"timepoint {t} has TE {self.te_ms[t]:g} ms and TR {self.tr_ms[t]:g} ms: "
                f"expected 0 <= TE <= TR"
            )
        if self.inversion_time_ms is not None and not self.inversion_time_ms >= 0:
            raise ValueError(f"the inversion time is {self.inversion_time_ms:g} ms: expected 0 or more")

    @property
    def n_timepoints(self) -> int:
        return len(self.flip_deg)

    def first(self, n: int) -> Train:
        """Only the first n pulses, of which the rest was not measured."""
        lists = {name: getattr(self, name)[:n] for name in ("flip_deg", "tr_ms", "te_ms", "phase_deg")}
        return replace(self, **lists, source=f"{self.source}, its first {n} of {self.n_timepoints} pulses")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Train) and self.key() == other.key()

    def __hash__(self) -> int:
        return hash(self.key())

    def key(self) -> bytes:
        """Bytes that are equal for trains with the same signal."""
        parts = [self.flip_deg, self.tr_ms, self.te_ms, self.phase_deg]
        return np.concatenate(
            [*parts, [-1.0 if self.inversion_time_ms is None else self.inversion_time_ms]]
        ).tobytes()
