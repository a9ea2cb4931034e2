"""Until when work is worth waiting for."""

from __future__ import annotations

import contextvars
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")

#: Seconds between two looks at a deadline that may have come closer.
_LOOK_S = 0.02


class DeadlinePassed(TimeoutError):  # noqa: N818 - as TimeoutError
    """There was no time left for the rest of the work."""


class Deadline:
    """A time (`time.monotonic`) that may come closer while work is under way, but never move away.

    Parameters
    ----------
    until
        The time; infinity: none as yet.
    within
        A deadline that this one cannot be later than.
    """

    def __init__(self, until: float = math.inf, within: Deadline | None = None) -> None:
        self._until, self._within = until, within

    @property
    def until(self) -> float:
        outer = self._within.until if self._within is not None else math.inf
        return min(self._until, outer)

    @property
    def has_passed(self) -> bool:
        return time.monotonic() > self.until

    def bring_forward(self, until: float) -> None:
        """Not later than `until`."""
        self._until = min(self._until, until)

    def check(self, what: str) -> None:
        """Raise `DeadlinePassed` with a sentence if it has passed."""
        if self.has_passed:
            raise DeadlinePassed(f"{what} when its time was over")


class SliceDeadlines:
    """Deadlines of the slices of a scan.

    Parameters
    ----------
    slice_s
        Seconds that a slice has from its last readout on; 0: any number.
    scan_s
        Seconds that all have from the end of the scan on, or from when it is held up: then nobody sees its
        end; 0: any number.
    n_open
        Slices that are complete and not sent yet, at most.
    """

    def __init__(self, slice_s: float, scan_s: float, n_open: int) -> None:
        self._slice_s, self._scan_s = slice_s or math.inf, scan_s or math.inf
        self._of_scan = Deadline()  # known when it ends
        self._latest: deque[Deadline] = deque(maxlen=n_open)

    def of_slice(self, arrived: float) -> Deadline | None:
        """That of a slice that was complete at a time (`time.monotonic`); ``None``: there is none."""
        if math.isinf(self._slice_s) and math.isinf(self._scan_s):
            return None
        self._latest.append(Deadline(arrived + self._slice_s, self._of_scan))
        return self._latest[-1]

    def scan_is_held_up(self, since: float) -> None:
        """No readouts are taken, from a time on, until one of the latest slices is sent."""
        for deadline in self._latest:
            deadline.bring_forward(since + self._scan_s)

    def scan_ended(self, at: float) -> None:
        """No readouts will come, from a time on."""
        self._of_scan.bring_forward(at + self._scan_s)


def in_time(work: Callable[[], _Result], deadline: Deadline, name: str) -> _Result:
    """The result of `work`, which runs in a thread of its own, or `DeadlinePassed` at the deadline.

    Work that is late is left alone, whatever it hangs in: it must change nothing that others see, and should
    look at the deadline itself so that it ends. Its errors are raised here.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    # What it logs is of the scan of who waits; and it may not keep the process.
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), name=name, daemon=True).start()
    while not done.wait(_LOOK_S):
        deadline.check("the work was not ready")
    if errors:
        # Who waits must not keep the frames of the work alive by a cycle.
        raise errors.pop()
    return results.pop()
