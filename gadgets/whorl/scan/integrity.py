"""Which readouts of a stream can be used, and what was lost on the way.

Letters: C coils, S samples, D trajectory columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from whorl.scan.readout import NOT_IMAGING, Flag, Readout

#: Readouts by whose majority the size of a scan's readouts is settled.
_VOTERS = 16


class Tally(Counter[str]):
    """Readouts that were not used, counted by reason."""

    def sentences(self) -> list[str]:
        """One remark for each reason, in the order in which they came up."""
        return [
            f"{count} readout{'s' if count > 1 else ''} {reason}" for reason, count in self.items() if count
        ]


def trimmed(readout: Readout) -> Readout:
    """Without the samples that the header marks to be discarded at both ends."""
    first = int(readout.head["discard_pre"])
    # More than there is to discard leaves nothing; a negative end would count from behind.
    last = max(first, readout.data.shape[1] - int(readout.head["discard_post"]))
    if first == 0 and last == readout.data.shape[1]:
        return readout
    return Readout(readout.head, readout.trajectory[first:last], readout.data[:, first:last])


def kept(readout: Readout) -> Readout:
    """A copy that outlives the receive buffer."""
    return Readout(readout.head.copy(), readout.trajectory.copy(), readout.data.copy())


def usable(readouts: Iterable[Readout], tally: Tally) -> Iterator[Readout]:
    """Noise and imaging readouts that are whole; the others are counted in `tally`.

    The size of an imaging readout (coils, samples, trajectory columns) is what most of the first
    ones have; others are dropped, as is whatever is not finite. Navigators and the like are passed
    over without a count: they are no loss.

    Exceptions of `readouts` come after what had been read before them.
    """
    waiting: list[Readout] = []
    shape: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def fits(readout: Readout) -> bool:
        if (readout.data.shape, readout.trajectory.shape) != shape:
            tally["of the wrong size were dropped"] += 1
            return False
        return finite(readout)

    def finite(readout: Readout) -> bool:
        if np.isfinite(readout.data).all() and np.isfinite(readout.trajectory).all():
            return True
        tally["with values that are not finite were dropped"] += 1
        return False

    def vote() -> None:
        nonlocal shape
        shape = Counter((r.data.shape, r.trajectory.shape) for r in waiting).most_common(1)[0][0]

    source = iter(readouts)
    failure: Exception | None = None
    while True:
        try:
            readout = next(source)
        except StopIteration:
            break
        except Exception as error:  # delivered to the caller below, after the readouts that wait
            failure = error
            break
        if readout.flags & Flag.IS_NOISE_MEASUREMENT:
            if finite(readout):
                yield readout
        elif not readout.flags & NOT_IMAGING:
            readout = trimmed(readout)
            if shape is None:
                waiting.append(kept(readout))
                if len(waiting) == _VOTERS:
                    vote()
                    yield from (r for r in waiting if fits(r))
                    waiting.clear()
            elif fits(readout):
                yield readout
    if waiting:
        vote()
        yield from (r for r in waiting if fits(r))
    if failure is not None:
        raise failure
