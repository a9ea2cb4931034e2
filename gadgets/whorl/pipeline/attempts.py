"""The first of some attempts that succeeds, in time: deadlines, fall-backs and progress, whatever is made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from whorl.pipeline.deadlines import Deadline, DeadlinePassed, in_time
from whorl.recon.slicedata import Progress
from whorl.runtime.cores import one_thread

_logger = logging.getLogger("whorl")

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Attempt(Generic[_Result]):
    """One way to make something.

    Parameters
    ----------
    name, title
        For programs and for people.
    make
        Takes what it shall tell of its progress to; what that raises ends it.
    """

    name: str
    title: str
    make: Callable[[Progress], _Result]


def first_success(
    attempts: Sequence[Attempt[_Result]],
    ready: _Result | None,
    deadline: Deadline | None,
    progress: Progress,
) -> tuple[Attempt[_Result], _Result, list[tuple[str, str]]]:
    """The first attempt that succeeds before the deadline.

    Parameters
    ----------
    attempts
        In the order in which they are wanted. What the last one raises is not caught.
    ready
        What the last one gives, if it was made before; past the deadline it is taken.
    deadline
        At which an attempt is left alone, whatever it hangs in; ``None``: there is none.
    progress
        Takes what an attempt is at, from its thread.

    Returns
    -------
    Attempt, object, list
        The one taken, its result, and title and reason of each that was given up.
    """
    given_up: list[tuple[str, str]] = []
    for attempt in attempts[:-1]:
        state = _State(progress, deadline)
        try:
            state.check()
            return attempt, state.run(attempt.make), given_up
        except Exception as error:
            # Whatever it was: what is late or wrong helps nobody at the console; others are ready.
            late = isinstance(error, DeadlinePassed)
            why = f"it was at {state.where} when its time was over" if late else str(error)
            why = why or type(error).__name__
            _logger.warning("the %s was given up: %s", attempt.title, why, exc_info=None if late else error)
            given_up.append((attempt.title, why))
            if late:
                break
    last = attempts[-1]
    return last, last.make(progress) if ready is None else ready, given_up


class _State:
    """How far an attempt has come; it ends when its time is over."""

    def __init__(self, progress: Progress, deadline: Deadline | None) -> None:
        self.where = "its start"
        self._progress, self._deadline = progress, deadline

    def check(self) -> None:
        if self._deadline is not None:
            self._deadline.check("")

    def _told(self, what: str, done: int, of: int) -> None:
        self.where = f"{what} {done} of {of}"
        self.check()
        self._progress(what, done, of)

    def run(self, make: Callable[[Progress], _Result]) -> _Result:
        def alone() -> _Result:
            with one_thread():
                return make(self._told)

        return alone() if self._deadline is None else in_time(alone, self._deadline, "whorl-fit")
