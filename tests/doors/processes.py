"""A `whorl serve` process under observation, and clients that say exactly what they are told to."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import whorl
from whorl.doors import wire
from whorl.doors.client import Received, _receive
from whorl.doors.transport import Channel
from whorl.scan.readout import Readout

#: Nothing here takes so long; whatever does hangs.
WAIT_S = 60.0
ENVIRONMENT = {"PYTHONPATH": str(Path(whorl.__file__).parents[1])}


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process holds."""

    rss_mb: float
    peak_mb: float
    threads: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        status = Path(f"/proc/{pid}/status").read_text()

        def number(name: str) -> int:
            found = re.search(rf"^{name}:\s*(\d+)", status, re.MULTILINE)
            assert found is not None
            return int(found[1])

        n_descriptors = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - those that close meanwhile
        return cls(number("VmRSS") / 1024, number("VmHWM") / 1024, number("Threads"), n_descriptors)


@dataclass(slots=True)
class Served:
    """A server process."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int = 0

    @property
    def usage(self) -> Usage:
        return Usage.of(self.process.pid)

    def lines(self) -> list[str]:
        """Whole lines: the last one may be on its way."""
        return self.log.read_text().rpartition("\n")[0].splitlines()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def serving(log: Path, *options: object, first: tuple[str, ...] = (), port: int = 0) -> Iterator[Served]:
    """`whorl FIRST serve OPTIONS` on a free port, from when it listens until the end of the block."""
    command = [sys.executable, "-m", "whorl", *first, "serve", "--port", str(port), *map(str, options)]
    with (
        log.open("wb") as stderr,
        subprocess.Popen(command, stderr=stderr, env=os.environ | ENVIRONMENT) as process,
    ):
        served = Served(process, log)
        try:
            wait_until(lambda: process.poll() is not None or "listening" in log.read_text())
            found = re.search(r"127\.0\.0\.1:(\d+)", log.read_text())
            assert found is not None, log.read_text()
            served.port = int(found[1])
            yield served
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool], seconds: float = WAIT_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def until_refused(port: int) -> None:
    """Wait until nobody listens any more."""

    def refused() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), WAIT_S).close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:  # it was in the queue when the listener was closed
            pass
        return False

    wait_until(refused)


@dataclass(slots=True)
class Client:
    """A connection to a server that is written to step by step while the answer is collected.

    Parameters
    ----------
    port
        Of the server on this machine.
    listen
        Whether the answer is read; if not the peer is left to wait.
        The other end can send some 40 kB then before it is stopped, not megabytes.
    """

    port: int
    listen: bool = True
    raw: socket.socket = field(init=False)
    channel: Channel = field(init=False)
    received: Received = field(default_factory=Received)
    _reader: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.raw = socket.socket()
        self.raw.settimeout(WAIT_S)
        if not self.listen:
            # The system sizes the buffers of both ends by these two.
            self.raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        self.raw.connect(("127.0.0.1", self.port))
        self.channel = Channel(self.raw, WAIT_S)
        self._reader = threading.Thread(target=_receive, args=(self.channel, self.received, None, None))
        if self.listen:
            self.begin_to_listen()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.raw.shutdown(socket.SHUT_RDWR)  # wakes the reader
        self.raw.close()

    def begin_to_listen(self) -> None:
        self._reader.start()

    def die(self, *, reset: bool) -> None:
        """Be gone as a process that ends, or with a reset."""
        if reset:
            self.raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.raw.close()

    def open(self, header: bytes, parameters: Mapping[str, object] | None = None) -> None:
        wire.write_config_name(self.channel, "whorl")
        wire.write_header(self.channel, header)
        if parameters:
            wire.write_text(self.channel, json.dumps({"parameters": parameters}))

    def send(self, readouts: Iterable[Readout]) -> None:
        for readout in readouts:
            wire.write_readout(self.channel, readout)

    def close(self) -> None:
        wire.write_close(self.channel)

    def answer(self) -> Received:
        """All that came until CLOSE, or until the connection ended."""
        self._reader.join(WAIT_S)
        assert not self._reader.is_alive(), "the server does not end its answer"
        return self.received


def send_scan(
    port: int, header: bytes, readouts: Iterable[Readout], parameters: Mapping[str, object] | None = None
) -> Received:
    """Send a whole scan; what came back."""
    with Client(port) as client:
        client.open(header, parameters)
        client.send(readouts)
        client.close()
        return client.answer()
