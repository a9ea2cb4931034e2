"""Readouts that are not used: why, and which slice lacks them."""

from __future__ import annotations

from collections import Counter

from whorl.scan.integrity import Tally

TWICE, BEHIND = "came twice", "lie behind the timepoints that are used"
#: Reasons that are no loss.
HARMLESS = (TWICE, BEHIND)
STRAY = "of a slice that the header does not announce were dropped"
AGAIN = "came again with other data; the first one counts"
LATE = "came after their slice was over and were dropped"
OUT = "with a timepoint outside the train were dropped"
COPIED = "with the data of another timepoint were dropped"
OTHER = "of another repetition were dropped"


class Losses:
    """What is known of the readouts that a part lacks; each loss is told of one repetition only.

    Parameters
    ----------
    tally
        Counts readouts that are not used.
    """

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._told: dict[int, Counter[str]] = {}  # of the repetitions before, by slice

    def sentence(self, number: int, missing: int, again: int, strays: int) -> str:
        """What is known of readouts that a part of a slice lacks, or had too many of.

        Parameters
        ----------
        number
            Of the slice.
        missing
            Timepoints that the part lacks.
        again
            Readouts that may be its own, and came with other data.
        strays
            Readouts that may be its own, with the number of a slice that there is not.
        """
        counts = self._tally.of_slice(number, but=HARMLESS)
        counts.subtract(self._told.get(number, Counter()))
        if again:
            counts[AGAIN] += again
        if (stray := min(missing - counts.total(), strays)) > 0:
            counts[STRAY] = stray
        return ", ".join(f"{n} {reason.removesuffix(' were dropped')}" for reason, n in counts.items() if n)

    def told(self, number: int) -> None:
        """A part of a slice was handed over: what came up later is of the next."""
        self._told[number] = self._tally.of_slice(number, but=HARMLESS)
