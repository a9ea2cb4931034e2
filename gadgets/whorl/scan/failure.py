"""What can go wrong with a scan as a whole, in words for the operator."""

from __future__ import annotations


class ScanError(ValueError):
    """Nothing can be delivered for this scan; the text is for the operator."""


class EndOfStream(EOFError):  # noqa: N818 - the stream's end is the message, as with EOFError
    """The stream ended before CLOSE; the text says what was being read and after how many readouts."""
