"""A scan that is damaged on its way: the reader gives messages or a declared error, never hangs or swells."""

from __future__ import annotations

import socket
import threading
import tracemalloc
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from doors.mutations import CONFIG, HEADER, SCAN, mutated_scan
from whorl.doors import session, wire
from whorl.doors.wire import Channel
from whorl.scan.failure import EndOfStream
from whorl.scan.readout import Readout

#: The sender closes after its last byte: only a reader that waits for nothing meets this.
SILENCE_S = 5.0
#: What the largest array may take, twice (as received and in an image), and the largest text.
MEMORY_BYTES = 2 * wire.MAX_ARRAY_BYTES + 2 * wire.MAX_HEADER_BYTES + (1 << 20)

DECLARED = (wire.ProtocolError, EndOfStream)


def received(stream: bytes, read: Callable[[Channel], None]) -> None:
    """Let `read` receive `stream` over a real socket, whose sender closes at the end."""
    left, right = socket.socketpair()

    def send() -> None:
        with left, suppress(OSError):  # the reader may have gone
            left.sendall(stream)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        with right:
            read(Channel(right, SILENCE_S))
    finally:
        sender.join()


def read_to_end(channel: Channel, messages: list[wire.Message]) -> None:
    while True:
        message = wire.read_message(channel, keep_images=True)
        messages.append(message)
        if isinstance(message, Readout):
            head = message.head
            assert message.data.shape == (head["active_channels"], head["number_of_samples"])
            assert message.trajectory.shape == (head["number_of_samples"], head["trajectory_dimensions"])


def test_the_scan_itself_is_read_to_its_end() -> None:
    messages: list[wire.Message] = []
    with pytest.raises(EndOfStream, match="after 4 readouts: expected a message"):
        received(b"".join(SCAN), lambda channel: read_to_end(channel, messages))
    kinds = [type(message).__name__ for message in messages]
    assert kinds == ["ConfigText", "HeaderText", "Text", *["Readout"] * 4, "Skipped", "Close"]


damaged = settings(
    derandomize=True, deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow]
)


@damaged
@given(st.data())
def test_a_damaged_scan_gives_messages_or_a_declared_error(data: st.DataObject) -> None:
    stream = mutated_scan(lambda low, high: data.draw(st.integers(low, high)))
    tracemalloc.start()
    try:
        with pytest.raises(DECLARED) as caught:
            received(stream, lambda channel: read_to_end(channel, []))
        assert tracemalloc.get_traced_memory()[1] <= MEMORY_BYTES
    finally:
        tracemalloc.stop()
    assert str(caught.value)


@damaged
@given(st.data())
def test_a_damaged_opening_is_read_or_refused(data: st.DataObject) -> None:
    stream = mutated_scan(lambda low, high: data.draw(st.integers(low, high)))

    def read(channel: Channel) -> None:
        # What comes back is what was sent, in this order, or nothing.
        with suppress(*DECLARED):
            opening = session.read_opening(channel)
            assert opening.header in stream
            assert opening.config is None or opening.config in stream

    received(stream, read)


def test_the_opening_of_the_scan_itself() -> None:
    def read(channel: Channel) -> None:
        opening = session.read_opening(channel)
        assert (opening.config, opening.header) == (CONFIG + b"\0", HEADER + b"\0")
        assert not opening.gadgetron

    received(b"".join(SCAN), read)
