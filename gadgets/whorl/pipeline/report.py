"""What is said about a scan."""

from __future__ import annotations

from collections.abc import Callable


class Report:
    """What is said about a scan, and what of it counts at the end.

    Parameters
    ----------
    log
        Takes (level, text) with level ``DBG``, ``WRN`` or ``ERR``.
    """

    def __init__(self, log: Callable[[str, str], None]) -> None:
        self.say = log
        self.failures: list[str] = []
        self.notes: list[str] = []
        self.of_each_slice: list[str] = []

    def note(self, text: str, *, each_slice: bool = False) -> None:
        """Something is degraded, or made in another way than asked for."""
        self.notes.append(text)
        if each_slice:
            self.of_each_slice.append(text)
        self.say("WRN", text)

    def fail(self, text: str) -> None:
        """Something is not delivered."""
        self.failures.append(text)
        self.say("ERR", text)
