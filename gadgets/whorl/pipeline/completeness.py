"""When a slice is complete: by its train, the header, flags, and the slice that follows."""

from __future__ import annotations

from whorl.config import Settings
from whorl.kspace.slicebuffer import SliceBuffer
from whorl.pipeline.protocol import Protocol, Sources
from whorl.scan import resolve


def n_announced(sources: Sources, settings: Settings) -> int:
    """Readouts of a slice by the header."""
    announced, measured = sources.header.n_timepoints_announced, settings.timepoints
    return min(announced, measured) if measured else announced


def n_expected(sources: Sources, settings: Settings) -> int:
    """Readouts of a slice by its train, as far as that is known; else by the header."""
    train, pulseq = sources.train, sources.pulseq
    if train is None:
        return settings.timepoints or n_announced(sources, settings)
    T = min(settings.timepoints or train.n_timepoints, train.n_timepoints)
    return T if pulseq is None else int(pulseq.measured[:T].sum())


def may_be_complete(buffer: SliceBuffer, sources: Sources, settings: Settings) -> bool:
    """Whether a slice's timepoints have all come, as far as can be told while it still arrives.

    Counts that contradict each other, or a flag alone, do not tell: then the next slice does.
    """
    if settings.timepoint == "arrival":
        return False
    expected, announced = n_expected(sources, settings), n_announced(sources, settings)
    if sources.pulseq is not None:  # which knows how many there are
        return buffer.n_waiting >= expected
    if announced < 2 or buffer.n_waiting < announced:
        return False
    return buffer.flagged if sources.train is None else expected == announced


def may_be_over(buffer: SliceBuffer, sources: Sources, settings: Settings) -> bool:
    """Whether a slice may be complete that another has followed, before its train is known.

    A flag is believed if as much came as was announced.
    """
    waiting = buffer.n_waiting
    believed = buffer.flagged and waiting >= resolve.COVERAGE * n_announced(sources, settings)
    return believed or waiting >= max(n_expected(sources, settings), 2)


def is_whole(n_seen: int, protocol: Protocol) -> bool:
    """Whether all timepoints have come; by order of arrival only the end tells."""
    return n_seen == protocol.n_measured and protocol.counter != "arrival"


def has_enough(n_seen: int, n_arrived: int, protocol: Protocol, share: float) -> bool:
    """Whether a slice that is over has the share of its timepoints that it needs.

    By order of arrival it needs exactly all.
    """
    if protocol.counter == "arrival":
        return n_arrived == protocol.n_measured
    return n_seen >= share * protocol.n_measured


class SliceChanges:
    """Where the slice changes in the stream.

    One readout between two of the same slice changes nothing: its slice number may be damaged.
    """

    def __init__(self) -> None:
        self.latest: int | None = None
        # A slice that one readout has named since, and whether it was known before.
        self._other: tuple[int, bool] | None = None
        self._interleaved = False

    def follow(self, number: int, is_known: bool) -> int | None:
        """Take notice of a readout.

        Parameters
        ----------
        number
            Of its slice.
        is_known
            Whether there are readouts of this slice already.

        Returns
        -------
        int | None
            The slice that may be over by that; ``None`` also where slices take turns.
        """
        left = None
        if self.latest is None:
            self.latest = number
        if self._other is not None and number != self.latest:
            left, (self.latest, known) = self.latest, self._other
            self._interleaved |= known
        self._other = (number, is_known) if number != self.latest else None
        return None if self._interleaved else left
