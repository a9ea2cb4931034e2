"""Which readouts of a stream can be used, and what was lost on the way.

Letters: C coils, S samples, D trajectory columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator

import numpy as np

from whorl.scan.failure import ScanError
from whorl.scan.readout import NOT_IMAGING, Flag, Readout

#: Readouts by whose majority it is settled how a scan's readouts are.
_VOTERS = 16


class UnusableScan(ScanError):  # noqa: N818 - as `EndOfStream`
    """Most of the readouts are of a kind that cannot be reconstructed."""


class Tally(Counter[str]):
    """Readouts that were not used, counted by reason; `by_slice` counts those that tell their slice."""

    def __init__(self) -> None:
        super().__init__()
        self.by_slice: dict[int, Counter[str]] = {}

    def lose(self, reason: str, slice_number: int) -> None:
        """Count one readout that carries the number of a slice."""
        self[reason] += 1
        self.by_slice.setdefault(slice_number, Counter())[reason] += 1

    def of_slice(self, number: int, but: Collection[str] = ()) -> Counter[str]:
        """Counts of one slice, without some reasons."""
        counts = self.by_slice.get(number, Counter())
        return Counter({reason: count for reason, count in counts.items() if reason not in but})

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
    places, data = readout.trajectory[first:last], readout.data[:, first:last]
    return Readout(readout.head, places, data, readout.placed)


def kept(readout: Readout) -> Readout:
    """A copy that outlives the receive buffer."""
    return Readout(readout.head.copy(), readout.trajectory.copy(), readout.data.copy(), readout.placed)


_Shape = tuple[tuple[int, ...], tuple[int, ...]]


def _shape(readout: Readout) -> _Shape:
    return readout.data.shape, readout.trajectory.shape


def _check_shape(shape: _Shape, *, attached: bool) -> None:
    (n_coils, n_samples), (_, n_columns) = shape
    if not n_coils:
        raise UnusableScan("the readouts have no coils: expected at least one active channel")
    if not n_samples:
        raise UnusableScan("the readouts have no samples left: expected some between discard_pre and _post")
    if attached and not n_columns:
        raise UnusableScan(
            "the readouts carry no trajectory: expected kx, ky for each sample, attached to the data, or "
            "Hargreaves parameters in the header, or property trajectory or sequence with a file that has it"
        )


_PARTITIONS = "the readouts number partitions (kspace_encode_step_2): only 2D scans are reconstructed"


def _is_numbered(readout: Readout) -> bool:
    return bool(readout.head["idx"]["kspace_encode_step_2"])


class _Partitions:
    """Readouts with a partition number: a few are damaged, many are a 3D scan."""

    def __init__(self) -> None:
        self._total = self._numbered = 0

    def has(self, readout: Readout) -> bool:
        self._total += 1
        numbered = _is_numbered(readout)
        self._numbered += numbered
        if numbered and self._total >= _VOTERS and 2 * self._numbered >= self._total:
            raise UnusableScan(_PARTITIONS)
        return numbered


def usable(
    readouts: Iterable[Readout], tally: Tally, *, attached: bool = True, encoding: int | None = None
) -> Iterator[Readout]:
    """Noise and imaging readouts that are whole; the others are counted in `tally`.

    The size of an imaging readout (coils, samples, trajectory columns) is what most of the first
    ones have; others are dropped, as is whatever is not finite or numbers a partition. Navigators and
    the like are passed over without a count: they are no loss.

    Exceptions of `readouts` come after what had been read before them.

    Parameters
    ----------
    readouts
        As they come.
    tally
        Counts what is dropped.
    attached
        Whether readouts without a trajectory are of no use.
    encoding
        Readouts of other encodings of the header are passed over; ``None``: there is one.

    Raises
    ------
    UnusableScan
        If most of the readouts have no coils, samples or trajectory, number partitions, or are larger or
        smaller than what can be computed with.
    """
    waiting: list[Readout] = []
    shape: _Shape | None = None
    partitions = _Partitions()

    def vote() -> Iterator[Readout]:
        nonlocal shape
        shape = Counter(_shape(r) for r in waiting).most_common(1)[0][0]
        _check_shape(shape, attached=attached)
        _check_range(waiting)
        if 2 * sum(map(_is_numbered, waiting)) > len(waiting):
            raise UnusableScan(_PARTITIONS)
        yield from (r for r in waiting if fits(r))
        waiting.clear()

    def fits(readout: Readout) -> bool:
        number = int(readout.head["idx"]["slice"])
        if _shape(readout) != shape:
            tally.lose("of the wrong size were dropped", number)
        elif partitions.has(readout):
            tally.lose("with a partition number (kspace_encode_step_2) were dropped", number)
        elif why := _unusable_values(readout):
            tally.lose(why, number)
        else:
            return True
        return False

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
            if why := _unusable_values(readout):
                tally[why] += 1
            else:
                yield readout
        elif not (
            readout.flags & NOT_IMAGING
            or (encoding is not None and int(readout.head["encoding_space_ref"]) != encoding)
        ):
            readout = trimmed(readout)
            if shape is None:
                waiting.append(kept(readout))
                if len(waiting) == _VOTERS:
                    yield from vote()
            elif fits(readout):
                yield readout
    if waiting:
        yield from vote()
    if failure is not None:
        raise failure


_NOT_FINITE = "with values that are not finite were dropped"
#: Largest sample of a scan, and least: squares of others, and sums of these, leave single precision.
LARGEST, _LEAST = 1e15, 1e-15
_TOO_LARGE = "with samples of 1e15 or more were dropped"


def _largest(readout: Readout) -> float:
    """Of the real and imaginary parts of its samples; NaN if one is."""
    return float(np.max([np.abs(part).max(initial=0) for part in (readout.data.real, readout.data.imag)]))


def _unusable_values(readout: Readout) -> str:
    """What is wrong with the values of a readout; empty if nothing is."""
    largest = _largest(readout)
    # What the weights in a third column are worth is seen when all of them are there.
    if not np.isfinite(largest) or not np.isfinite(readout.trajectory[:, :2]).all():
        return _NOT_FINITE
    return "" if largest < LARGEST else _TOO_LARGE


def _check_range(readouts: Collection[Readout]) -> None:
    """Refuse a scan whose unit is beyond what can be computed with; zeros are samples like others."""
    largest = [value for value in map(_largest, readouts) if np.isfinite(value) and value > 0]
    beyond = [value for value in largest if not _LEAST < value < LARGEST]
    if 2 * len(beyond) > len(readouts):
        raise UnusableScan(
            f"the largest sample of most readouts is beyond what can be computed with: expected more than "
            f"{_LEAST:g} and less than {LARGEST:g}, got {np.median(beyond):.1e}. Scale data and noise "
            f"readouts where they are written"
        )
