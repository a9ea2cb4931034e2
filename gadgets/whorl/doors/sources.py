"""A scan that comes in: what was said before it, and its readouts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, Protocol

from whorl.doors import wire
from whorl.doors.opening import Opening
from whorl.doors.transport import Channel, StreamTimeout
from whorl.runtime.logs import event
from whorl.scan.failure import EndOfStream
from whorl.scan.readout import Readout

#: After a failure the rest of the scan is read past for at most so long.
DRAIN_S = 1800.0
#: Who sends what cannot be read has come to an end if he is silent for so long.
QUIET_S = 3.0
_RECEIVER_CHANNELS = re.compile(rb"<(?:\w+:)?receiverChannels>\s*(\d{1,6})\s*<")


class Source(Protocol):
    """Where a scan comes from."""

    @property
    def opening(self) -> Opening:
        """What came before the readouts."""

    @property
    def passed(self) -> dict[str, int]:
        """Messages that were read past, by kind."""

    def parameters(self) -> str:
        """The text that may follow the header; empty if none does."""

    def readouts(self) -> Iterator[Readout]:
        """All readouts; `EndOfStream` if there should have been more."""

    def drain(self) -> None:
        """Read past what is left of the scan."""


class StreamSource:
    """A scan on a channel, up to its CLOSE.

    Parameters
    ----------
    channel
        Behind its opening.
    opening
        What was read of it.
    """

    def __init__(self, channel: Channel, opening: Opening) -> None:
        self.opening = opening
        self.passed: dict[str, int] = {}
        self.ended: Literal["", "close", "early", "unreadable"] = ""
        self._channel = channel
        self._first: wire.Message | None = None
        announced = _RECEIVER_CHANNELS.search(opening.header)
        self._n_announced = int(announced[1]) if announced else 0

    def _next(self) -> wire.Message:
        """The next message; what is read past is counted."""
        if self._first is not None:
            message, self._first = self._first, None
        else:
            message = self._read()
        if isinstance(message, wire.Close):
            self.ended = "close"
        elif isinstance(message, wire.Text):
            self._pass("text")
        elif isinstance(message, wire.Skipped) and message.kind != "waveform":
            self._pass(message.kind)
        return message

    def _read(self) -> wire.Message:
        try:
            if self.opening.mrd2 is not None:
                return self.opening.mrd2.read_message()
            return wire.read_message(self._channel, n_announced=self._n_announced)
        except wire.ProtocolError:
            self.ended = "unreadable"
            raise
        except (EndOfStream, StreamTimeout):
            self.ended = "early"
            raise

    def _pass(self, kind: str) -> None:
        self.passed[kind] = self.passed.get(kind, 0) + 1

    def parameters(self) -> str:
        """The text that may follow the header.

        This waits for the next message, whatever it is: had the reconstruction begun before, it
        might have begun with the wrong parameters. Gadgetron and MRD version 2 send none.
        """
        if self.opening.dialect != "MRD client":
            return ""
        message = self._read()
        if isinstance(message, wire.Text):
            return message.text
        self._first = message
        return ""

    def readouts(self) -> Iterator[Readout]:
        """All readouts until CLOSE; `EndOfStream` for whatever ends the stream otherwise."""
        try:
            while True:
                message = self._next()
                if isinstance(message, Readout):
                    yield message
                elif isinstance(message, wire.Close):
                    return
                elif isinstance(message, wire.Error):
                    raise EndOfStream(
                        f"the sender failed after {self._channel.n_readouts} readouts: {message.text}"
                    )
                elif not isinstance(message, wire.Skipped | wire.Text):
                    raise EndOfStream(f"a second opening came after {self._channel.n_readouts} readouts")
        except (wire.ProtocolError, StreamTimeout) as error:
            raise EndOfStream(str(error)) from error

    def drain(self) -> None:
        """Read past what is left of the scan, within `DRAIN_S`."""
        self._channel.limit_time(DRAIN_S)
        try:
            while not self.ended:
                self._next()
            if self.ended == "unreadable" and self.opening.dialect == "Gadgetron":
                # It must not be answered while it sends, and where its CLOSE is nobody knows.
                self._channel.discard(QUIET_S)
        except (EndOfStream, StreamTimeout, wire.ProtocolError) as error:
            event("rest", text=str(error))
        self._channel.limit_time(None)


class FileSource:
    """A scan that lies in a file.

    Parameters
    ----------
    header
        MRD header.
    readouts
        All of them.
    """

    def __init__(self, header: bytes, readouts: Iterator[Readout]) -> None:
        self.opening = Opening("MRD client", header)
        self.passed: dict[str, int] = {}
        self._readouts = readouts

    def parameters(self) -> str:
        """None."""
        return ""

    def readouts(self) -> Iterator[Readout]:
        """All readouts."""
        return self._readouts

    def drain(self) -> None:
        """Nothing is left."""
