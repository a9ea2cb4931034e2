"""Bytes over pipes and sockets: read exactly, written whole, recorded once, and nobody waits for ever."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from whorl.doors.transport import Channel, Pipes, StreamTimeout
from whorl.scan.failure import EndOfStream

#: Short enough to wait for.
SHORT_S = 0.2
WAIT_S = 10.0


class Tube:
    """A pipe with both ends; each is closed once, at the latest when the test is over."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        self._open = {self.read, self.write}

    def close(self, *ends: int) -> None:
        for end in ends or tuple(self._open):
            self._open.discard(end)
            os.close(end)


@pytest.fixture
def tube() -> Iterator[Tube]:
    made = Tube()
    yield made
    made.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def noise(n: int) -> bytes:
    return np.random.default_rng(n).bytes(n)


# --- Pipes -------------------------------------------------------------------------------------------


def test_what_comes_in_pieces_is_read_exactly(tube: Tube) -> None:
    data = noise(1001)

    def send() -> None:
        for at in range(0, len(data), 7):
            os.write(tube.write, data[at : at + 7])
            if at % 70 == 0:
                time.sleep(0.001)

    thread = threading.Thread(target=send)
    thread.start()
    channel = Channel(Pipes(tube.read), WAIT_S)
    assert channel.read(1, "a byte") == data[:1]
    assert channel.read_reused(500, "some").tobytes() == data[1:501]
    channel.skip(100, "others")
    assert channel.read(400, "the rest") == data[601:]
    thread.join(WAIT_S)
    assert channel.n_bytes == 1001


def test_more_than_a_pipe_holds_is_written_whole(tube: Tube) -> None:
    data = noise(1 << 20)
    capacity = fcntl.fcntl(tube.write, fcntl.F_GETPIPE_SZ)
    assert len(data) > 4 * capacity
    got = bytearray()

    def receive() -> None:
        while len(got) < len(data):
            got.extend(os.read(tube.read, 3001))

    thread = threading.Thread(target=receive)
    thread.start()
    Channel(Pipes(-1, tube.write), WAIT_S).write(data[:100], bytearray(data[100:200]), memoryview(data)[200:])
    thread.join(WAIT_S)
    assert bytes(got) == data


def test_files_are_pipes_too(tmp_path: Path) -> None:
    path, data = tmp_path / "stream", noise(70_001)
    with path.open("wb") as file:
        Channel(Pipes(-1, file.fileno()), SHORT_S).write(data)
    with path.open("rb") as file:
        channel = Channel(Pipes(file.fileno()), SHORT_S)
        assert channel.read(len(data), "all") == data
        with pytest.raises(EndOfStream, match="expected more, 2 bytes, got 0"):
            channel.read(2, "more")


def test_a_silent_writer_is_left(tube: Tube) -> None:
    os.write(tube.write, b"ab")
    channel = Channel(Pipes(tube.read), SHORT_S)
    with pytest.raises(StreamTimeout, match=r"nothing was received for 0\.2 s .* expected three bytes"):
        channel.read(3, "three bytes")


def test_a_reader_that_does_not_read_is_left(tube: Tube) -> None:
    with pytest.raises(TimeoutError):
        Channel(Pipes(-1, tube.write), SHORT_S).write(bytes(1 << 20))


def test_a_full_pipe_is_written_on_when_there_is_room(tube: Tube) -> None:
    capacity = fcntl.fcntl(tube.write, fcntl.F_GETPIPE_SZ)
    channel = Channel(Pipes(-1, tube.write), WAIT_S)
    channel.write(bytes(capacity))
    thread = threading.Thread(target=channel.write, args=(b"more",))
    thread.start()
    got = b""
    while not got.endswith(b"more"):
        got += os.read(tube.read, capacity)
    thread.join(WAIT_S)
    assert got == bytes(capacity) + b"more"


def test_the_end_of_a_pipe_says_what_is_lacking(tube: Tube) -> None:
    os.write(tube.write, b"abc")
    tube.close(tube.write)
    channel = Channel(Pipes(tube.read), WAIT_S)
    with pytest.raises(EndOfStream, match="after 0 readouts: expected a word, 4 bytes, got 3"):
        channel.read(4, "a word")


def test_a_reader_that_is_gone_is_an_error_and_no_signal(tube: Tube) -> None:
    tube.close(tube.read)
    with pytest.raises(BrokenPipeError):
        Channel(Pipes(-1, tube.write), WAIT_S).write(b"x")


def test_a_reader_that_goes_while_it_is_written_to(tube: Tube) -> None:
    errors: list[OSError] = []

    def send() -> None:
        try:
            Channel(Pipes(-1, tube.write), WAIT_S).write(bytes(1 << 20))
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    os.read(tube.read, 1000)
    tube.close(tube.read)
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert isinstance(errors[0], BrokenPipeError)


def test_interrupted_pipes_have_come_to_their_end(tube: Tube) -> None:
    os.write(tube.write, b"abc")
    channel = Channel(Pipes(tube.read, tube.write), WAIT_S)
    channel.interrupt()
    with pytest.raises(EndOfStream):
        channel.read(1, "a byte")
    # Writing goes on.
    channel.write(b"d")
    assert os.read(tube.read, 4) == b"abcd"


# --- A recorder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("received", [b"", b"read by somebody else"])
def test_the_recorder_gets_each_byte_once_and_in_order(pair, received: bytes) -> None:
    one, other = pair
    data = noise(5000)
    one.sendall(data)
    channel = Channel(other, WAIT_S, received=received)
    channel.read(2, "an id")
    channel.read_reused(98, "a head")
    kept = bytearray()
    channel.record(kept.extend)
    assert bytes(kept) == received + data[:100]
    channel.read(900, "some")
    channel.skip(2000, "others")
    channel.read_into(memoryview(bytearray(1000)), "more")
    assert bytes(kept) == received + data[:4000]
    channel.record(None)
    channel.read(500, "what nobody records")
    channel.record(kept.extend)
    channel.read(500, "the last")
    assert bytes(kept) == received + data[:4000] + data[4500:]


def test_nothing_is_kept_for_a_recorder_that_does_not_come(pair) -> None:
    one, other = pair
    one.sendall(b"abcdef")
    kept = bytearray()
    for received in (None, b""):
        channel = Channel(other, WAIT_S, received=received)
        channel.read(2, "two")
        if received is not None:
            channel.record(None)
        channel.record(kept.extend)
    assert kept == b""
    channel.read(2, "two")
    assert kept == b"ef"


def test_what_is_discarded_at_the_end_is_not_recorded(pair) -> None:
    one, other = pair
    channel = Channel(other, WAIT_S, received=b"")
    kept = bytearray()
    channel.record(kept.extend)
    one.sendall(b"late")
    one.shutdown(socket.SHUT_WR)
    channel.linger(WAIT_S)
    assert kept == b""
    assert one.recv(1) == b""


# --- Limits of time ----------------------------------------------------------------------------------


@contextlib.contextmanager
def dripping(connection: socket.socket) -> Iterator[None]:
    """Send a byte now and then, for as long as the block lasts."""
    over = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not over.wait(0.02):
                connection.sendall(b".")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(WAIT_S)


def test_a_limit_of_time_holds_for_all_reads_together(pair) -> None:
    one, other = pair
    channel = Channel(other, WAIT_S)
    with dripping(one):
        channel.limit_time(SHORT_S)
        with pytest.raises(StreamTimeout, match="the time was over after 0 readouts: expected a mass"):
            channel.read(1 << 20, "a mass")
        # A lifted limit is none, and the silence that is allowed is the old one again.
        channel.limit_time(None)
        assert other.gettimeout() == WAIT_S
        channel.read(5, "some")


def test_the_shorter_of_both_limits_counts(pair) -> None:
    one, other = pair
    channel = Channel(other, SHORT_S)
    channel.limit_time(1000.0)
    with pytest.raises(StreamTimeout, match=r"nothing was received for 0\.2 s"):
        channel.read(1, "a byte")
    channel.limit_silence(1000.0)
    channel.limit_time(SHORT_S)
    with pytest.raises(StreamTimeout, match="the time was over after"):
        channel.read(1, "a byte")
    one.sendall(b"x")
    channel.limit_time(None)
    assert channel.read(1, "a byte") == b"x"


def test_a_time_that_is_over_ends_the_reading_of_what_is_there(pair) -> None:
    one, other = pair
    one.sendall(b"abc")
    channel = Channel(other, WAIT_S)
    channel.limit_time(0.0)
    with pytest.raises(StreamTimeout, match="the time was over"):
        channel.read(1, "a byte")


def test_a_longer_silence_may_be_allowed_later(pair) -> None:
    one, other = pair
    channel = Channel(other, 0.05)
    channel.limit_silence(WAIT_S)
    timer = threading.Timer(0.3, one.sendall, (b"x",))
    timer.start()
    assert channel.read(1, "a byte") == b"x"
    timer.join()


def test_discarding_ends_with_silence_or_with_the_stream(pair) -> None:
    one, other = pair
    channel = Channel(other, WAIT_S)
    one.sendall(noise(10_000))
    channel.discard(SHORT_S)
    assert channel.n_bytes == 10_000
    assert other.gettimeout() == WAIT_S
    one.sendall(b"x")
    one.shutdown(socket.SHUT_WR)
    channel.discard(1000.0)
    assert channel.n_bytes == 10_001


def test_a_reset_is_an_end() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()) as connection:
        peer, _ = listener.accept()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.close()
        with pytest.raises(EndOfStream, match="the connection broke after 0 readouts, expected a byte"):
            Channel(connection, WAIT_S).read(1, "a byte")


def test_a_read_that_waits_is_interrupted(pair) -> None:
    _, other = pair
    channel = Channel(other, WAIT_S)
    timer = threading.Timer(0.1, channel.interrupt)
    timer.start()
    with pytest.raises(EndOfStream):
        channel.read(1, "a byte")
    timer.join()
