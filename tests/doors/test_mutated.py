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
from whorl.doors import wire
from whorl.doors.opening import read_opening
from whorl.doors.transport import Channel
from whorl.scan.failure import EndOfStream
from whorl.scan.readout import Readout

#: The sender closes after its last byte: a reader that waits for so long waits for nothing.
SILENCE_S = 10.0
DECLARED = (wire.ProtocolError, EndOfStream)

#: Limits that are small beside what a damaged length announces, yet let the scan pass.
TEXT_BYTES, ARRAY_BYTES = 1 << 12, 1 << 16
#: The largest array as received and in an image, the chunk that is skipped at once, and texts and objects.
MEMORY_BYTES = 2 * ARRAY_BYTES + (1 << 20) + (1 << 18)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_HEADER_BYTES", "MAX_CONFIG_BYTES", "MAX_TEXT_BYTES"):
        monkeypatch.setattr(wire, name, TEXT_BYTES)
    monkeypatch.setattr(wire, "MAX_ARRAY_BYTES", ARRAY_BYTES)


def received(stream: bytes, read: Callable[[Channel], None]) -> None:
    """Let `read` receive `stream` over a real socket, whose sender closes at the end."""
    left, right = socket.socketpair()
    raised: list[Exception] = []

    def receive() -> None:
        with right:
            try:
                read(Channel(right, SILENCE_S))
            except Exception as error:  # raised again below
                raised.append(error)

    # A thread, for a reader that runs in a circle cannot be stopped.
    reader = threading.Thread(target=receive, daemon=True)
    reader.start()
    with left, suppress(OSError):  # the reader may have gone
        left.sendall(stream)
    reader.join(SILENCE_S + 5)
    assert not reader.is_alive(), "the reader hangs"
    if raised:
        raise raised[0]


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
    assert kinds == ["ConfigText", "HeaderText", "Text", *["Readout"] * 4, "Skipped", "ImageMessage", "Close"]


damaged = settings(
    derandomize=True,
    deadline=None,
    max_examples=400,
    # The limits are the same for all examples.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@damaged
@given(data=st.data())
@pytest.mark.usefixtures("small_limits")
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
@given(data=st.data())
def test_a_damaged_opening_is_read_or_refused(data: st.DataObject) -> None:
    stream = mutated_scan(lambda low, high: data.draw(st.integers(low, high)))

    def read(channel: Channel) -> None:
        # What comes back is what was sent, in this order, or nothing.
        with suppress(*DECLARED):
            opening = read_opening(channel)
            assert opening.header in stream
            assert opening.config is None or opening.config in stream

    received(stream, read)


def test_the_opening_of_the_scan_itself() -> None:
    def read(channel: Channel) -> None:
        opening = read_opening(channel)
        assert (opening.config, opening.header) == (CONFIG + b"\0", HEADER + b"\0")
        assert opening.dialect == "MRD client"

    received(b"".join(SCAN), read)
