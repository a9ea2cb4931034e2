"""Bytes of a stream, over a socket or a pair of pipes: exact reads, whole writes, limits of time.

Whatever is read can be given to a recorder as well, as it came.
"""

from __future__ import annotations

import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from whorl.scan.failure import EndOfStream

#: A pipe that is ready to be written takes at least as much without blocking (POSIX: at least 512).
_PIPE_CHUNK = min(select.PIPE_BUF, 4096)


class StreamTimeout(TimeoutError):  # noqa: N818 - as TimeoutError
    """The peer was silent for too long; the text says for how long and what was being read."""


class Connection(Protocol):
    """What a `Channel` needs of a socket; `Pipes` has it too."""

    def recv_into(self, buffer: memoryview, /) -> int:
        """Read what there is, at least one byte; 0 at the end."""

    def sendall(self, data: bytes, /) -> None:
        """Write everything."""

    def settimeout(self, value: float | None, /) -> None:
        """Longest wait of a read or a write."""

    def shutdown(self, how: int, /) -> None:
        """End reading or writing."""

    def fileno(self) -> int:
        """Descriptor for reading."""


class Pipes:
    """An input and an output pipe, or files, that behave like one connected socket.

    Parameters
    ----------
    source, target
        Descriptors; whoever opened them closes them. `target` is -1 where nothing is written.
    """

    def __init__(self, source: int, target: int = -1) -> None:
        self._source, self._target = source, target
        self._timeout_ms: float | None = None
        self._ended = False

    def recv_into(self, buffer: memoryview, /) -> int:
        """Read what there is; `TimeoutError` if nothing comes in time."""
        if self._ended:
            return 0
        self._wait(self._source, select.POLLIN)
        return os.readv(self._source, [buffer])

    def sendall(self, data: bytes, /) -> None:
        """Write everything; `TimeoutError` if the reader does not take it in time."""
        view = memoryview(data)
        while view:
            self._wait(self._target, select.POLLOUT)
            view = view[os.write(self._target, view[:_PIPE_CHUNK]) :]

    def _wait(self, descriptor: int, event: int) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(self._timeout_ms):
            raise TimeoutError("timed out")

    def settimeout(self, value: float | None, /) -> None:
        """Longest wait of one read or write, in seconds."""
        self._timeout_ms = None if value is None else value * 1000

    def shutdown(self, how: int, /) -> None:
        """End reading; pipes are closed by whoever opened them."""
        self._ended = self._ended or how != socket.SHUT_WR

    def fileno(self) -> int:
        """Descriptor of the input."""
        return self._source


class Channel:
    """A connection from which exact numbers of bytes are read and to which whole messages are written.

    One thread reads; any thread may write.

    Parameters
    ----------
    connection
        Socket or pipes; whoever made it closes it.
    timeout_s
        Longest silence while reading, and longest time a write may wait for the peer; None: no limit.
    received
        What somebody else read before, perhaps nothing: kept together with what comes until `record` says
        for whom. None: there will be no recorder.
    """

    def __init__(
        self, connection: Connection, timeout_s: float | None = None, *, received: bytes | None = None
    ) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._write_lock = threading.Lock()
        self._buffer = np.empty(0, np.uint8)
        self._deadline: float | None = None
        self._recorder: Callable[[memoryview], None] | None = None
        self._early: bytearray | None = None if received is None else bytearray(received)
        self.n_readouts = 0
        self.n_bytes = 0
        connection.settimeout(timeout_s)

    def record(self, recorder: Callable[[memoryview], None] | None) -> None:
        """Give all bytes to `recorder`, those that were read already first; None: to nobody."""
        early, self._early = self._early, None
        self._recorder = recorder
        if recorder is not None and early:
            recorder(memoryview(early))

    def limit_silence(self, seconds: float | None) -> None:
        """Set another longest silence."""
        self._timeout_s = seconds
        self._connection.settimeout(seconds)

    def limit_time(self, seconds: float | None) -> None:
        """Let all further reads together take at most so long; None lifts the limit."""
        self._deadline = None if seconds is None else time.monotonic() + seconds
        if seconds is None:
            self._connection.settimeout(self._timeout_s)

    def read_some(self, view: memoryview, what: str) -> int:
        """Read at least one byte into `view`, 0 at the end of the stream; errors as `read_into`."""
        left_s = self._timeout_s
        if self._deadline is not None:
            # A peer that sends a byte now and then never falls silent.
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                raise self._timed_out("the time was over", what)
            if self._timeout_s is not None:
                left_s = min(left_s, self._timeout_s)
            self._connection.settimeout(left_s)
        try:
            n = self._connection.recv_into(view)
        except TimeoutError as error:
            silent = left_s == self._timeout_s
            why = f"nothing was received for {left_s:.3g} s" if silent else "the time was over"
            raise self._timed_out(why, what) from error
        except OSError as error:
            raise EndOfStream(
                f"the connection broke after {self.n_readouts} readouts, expected {what}: {error}"
            ) from error
        self.n_bytes += n
        if self._recorder is not None:
            self._recorder(view[:n])
        elif self._early is not None:
            self._early += view[:n]
        return n

    def _timed_out(self, why: str, what: str) -> StreamTimeout:
        return StreamTimeout(f"{why} after {self.n_readouts} readouts: expected {what}")

    def wait(self) -> None:
        """Return when there is something to read, or the end, or after the longest silence."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            selector.select(self._timeout_s)

    def read_into(self, view: memoryview, what: str) -> None:
        """Fill `view`.

        Raises
        ------
        EndOfStream
            If the stream ends first; the text names `what` was read and after how many readouts.
        StreamTimeout
            If the peer is silent for too long.
        """
        at, size = 0, len(view)
        while at < size:
            n = self.read_some(view[at:], what)
            if n == 0:
                raise EndOfStream(
                    f"the stream ended before CLOSE, after {self.n_readouts} readouts: "
                    f"expected {what}, {size} bytes, got {at}"
                )
            at += n

    def read(self, size: int, what: str) -> bytearray:
        """Read `size` bytes; errors as `read_into`. Check `size` against a limit first."""
        data = bytearray(size)
        self.read_into(memoryview(data), what)
        return data

    def read_reused(self, size: int, what: str) -> NDArray[np.uint8]:
        """Read `size` bytes into a buffer that the next call overwrites; errors as `read_into`."""
        if self._buffer.size < size:
            self._buffer = np.empty(size, np.uint8)
        view = self._buffer[:size]
        self.read_into(view.data, what)
        return view

    def skip(self, size: int, what: str) -> None:
        """Read past `size` bytes without keeping them; errors as `read_into`."""
        chunk = 1 << 20
        while size > 0:
            self.read_reused(min(size, chunk), what)
            size -= chunk

    def write(self, *parts: bytes | bytearray | memoryview) -> None:
        """Send one message as a whole; `OSError` if the peer is gone or does not read."""
        data = b"".join(parts)
        with self._write_lock:
            self._connection.sendall(data)

    def linger(self, seconds: float, limit_bytes: int = 1 << 30) -> None:
        """End writing, then discard what still comes until the peer closes, within bounds.

        A socket that is closed with unread bytes answers with a TCP reset, and the reset can overtake
        the last texts on their way to the peer.
        """
        self.record(None)
        with suppress(OSError, EndOfStream):
            self._connection.shutdown(socket.SHUT_WR)
            self.limit_time(seconds)
            scratch = memoryview(bytearray(1 << 16))
            while limit_bytes > 0 and (n := self.read_some(scratch, "the end")):
                limit_bytes -= n

    def discard(self, quiet_s: float) -> None:
        """Discard what still comes until the peer ends its stream or sends nothing for `quiet_s`."""
        silence_s = self._timeout_s
        self.limit_silence(quiet_s)
        scratch = memoryview(bytearray(1 << 16))
        with suppress(StreamTimeout):
            while self.read_some(scratch, "the end"):
                pass
        self.limit_silence(silence_s)

    def interrupt(self) -> None:
        """Let a read that waits in another thread end as if the peer had stopped sending."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RD)
