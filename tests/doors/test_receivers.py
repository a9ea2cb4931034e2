"""Receivers: what each is sent, once, in his own way, and nothing after the end."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import ismrmrd
import pytest

from doors.messages import HEADER, make_image
from whorl.doors import files, wire
from whorl.doors.receivers import (
    MAX_DEBUG_TEXTS,
    MAX_TEXT,
    File,
    Gadgetron,
    MrdClient,
    PipeReader,
    Receiver,
)
from whorl.doors.transport import Channel, Pipes
from whorl.scan.failure import EndOfStream

WAIT_S = 10.0

Said = list[tuple[str, str]]


def maker(kind: str) -> Callable[[Channel, Said], Receiver]:
    def say(said: Said) -> Callable[[str, str], None]:
        return lambda level, text: said.append((level, text))

    return {
        "Gadgetron": lambda channel, said: Gadgetron(channel, say(said)),
        "MRD client": lambda channel, said: MrdClient(channel, say(said)),
        "pipe": lambda channel, said: PipeReader(channel, HEADER, say(said)),
    }[kind]


KINDS = ("Gadgetron", "MRD client", "pipe")


class Wire:
    """A receiver at one end of a socket, and what came at the other."""

    def __init__(self, kind: str) -> None:
        self._near, self._far = socket.socketpair()
        self.said: Said = []
        self.receiver = maker(kind)(Channel(self._near, WAIT_S), self.said)
        self.got: list[wire.Message] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        channel = Channel(self._far, WAIT_S)
        try:
            while True:
                self.got.append(wire.read_message(channel, keep_images=True))
        except EndOfStream:
            pass

    def end(self) -> list[wire.Message]:
        """Everything that was sent."""
        self._near.close()
        self._reader.join(WAIT_S)
        assert not self._reader.is_alive()
        self._far.close()
        return self.got

    def hang_up(self) -> None:
        """Leave as a receiver whose machine is gone."""
        self._far.shutdown(socket.SHUT_RDWR)
        self._reader.join(WAIT_S)


@pytest.fixture
def connected() -> Iterator[Callable[[str], Wire]]:
    made: list[Wire] = []

    def make(kind: str) -> Wire:
        made.append(Wire(kind))
        return made[-1]

    yield make
    for one in made:
        one.end()


def kinds_of(messages: list[wire.Message]) -> list[str]:
    return [type(message).__name__ for message in messages]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("Gadgetron", ["ImageMessage", "Error", "Close"]),
        ("MRD client", ["Text", "Text", "ImageMessage", "Text", "Close"]),
        ("pipe", ["HeaderText", "ImageMessage", "Close"]),
    ],
)
def test_what_each_is_sent(connected, kind: str, expected: list[str]) -> None:
    one = connected(kind)
    one.receiver.log("DBG", "a train")
    one.receiver.log("WRN", "few readouts")
    one.receiver.image(make_image())
    one.receiver.log("ERR", "slice 1 failed")
    one.receiver.finish()
    messages = one.end()
    assert kinds_of(messages) == expected
    if kind == "Gadgetron":
        assert messages[1] == wire.Error("whorl: slice 1 failed")
    if kind == "MRD client":
        texts = [message.text for message in messages if isinstance(message, wire.Text)]
        assert texts == ["DBG a train", "WRN few readouts", "ERR slice 1 failed"]
    if kind == "pipe":
        assert messages[0] == wire.HeaderText(HEADER)
    # The operator of this program reads all of it, whatever the receiver is told.
    assert one.said == [("DBG", "a train"), ("WRN", "few readouts"), ("ERR", "slice 1 failed")]
    assert one.receiver.failures == ["slice 1 failed"]
    assert one.receiver.delivered == 1


@pytest.mark.parametrize(
    ("kind", "expected"), [("Gadgetron", ["Close"]), ("MRD client", ["Close"]), ("pipe", [])]
)
def test_an_end_without_images(connected, kind: str, expected: list[str]) -> None:
    """Behind a pipe an empty result must not look like a whole one."""
    one = connected(kind)
    one.receiver.finish()
    assert kinds_of(one.end()) == expected


def test_a_pipe_gets_its_header_once_and_with_the_first_image(connected) -> None:
    one = connected("pipe")
    for level in ("DBG", "WRN", "ERR"):
        one.receiver.log(level, "text")
    one.receiver.explain(make_image())
    one.receiver.image(make_image())
    one.receiver.finish()
    messages = one.end()
    assert kinds_of(messages) == ["HeaderText", "ImageMessage", "ImageMessage", "Close"]
    # An image that explains is no result.
    assert one.receiver.delivered == 1


def test_gadgetron_is_left_to_somebody_else_to_close() -> None:
    near, far = socket.socketpair()
    with near, far:
        receiver = Gadgetron(Channel(near, WAIT_S), lambda level, text: None, send_close=False)
        receiver.log("ERR", "one")
        receiver.log("ERR", "two")
        receiver.finish()
        near.shutdown(socket.SHUT_WR)
        channel = Channel(far, WAIT_S)
        assert wire.read_message(channel) == wire.Error("whorl: one; two")
        with pytest.raises(EndOfStream):
            wire.read_message(channel)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["finish", "abandon", "abandon early"])
def test_nothing_is_sent_after_the_end(connected, kind: str, end: str) -> None:
    one = connected(kind)
    one.receiver.image(make_image())
    if end == "finish":
        one.receiver.finish()
    else:
        one.receiver.abandon("the server is stopped", early=end == "abandon early")
    with pytest.raises(ConnectionError, match="given up"):
        one.receiver.image(make_image())
    with pytest.raises(ConnectionError, match="given up"):
        one.receiver.explain(make_image())
    for level in ("DBG", "WRN", "ERR"):
        one.receiver.log(level, "late")
    one.receiver.finish()
    one.receiver.abandon("once more", early=False)
    names = kinds_of(one.end())
    assert names.count("ImageMessage") == one.receiver.delivered == 1
    if kind == "Gadgetron" and end == "abandon early":
        # While its readouts come an ERROR may crash it, and a CLOSE alone would look like success.
        assert names == ["ImageMessage"]
    else:
        assert names.count("Close") == 1
        assert names[-1] == "Close"
    texts = [message.text for message in one.got if isinstance(message, wire.Text | wire.Error)]
    assert not any("late" in text or "once more" in text for text in texts)
    # For the log it is still said.
    assert ("ERR", "late") in one.said
    assert ("ERR", "once more") not in one.said


@pytest.mark.parametrize("kind", KINDS)
def test_a_scan_is_abandoned_while_images_are_sent(connected, kind: str) -> None:
    """The end comes between two images, never within one, and stops the thread that sends them."""
    one = connected(kind)
    image, begun, stopped = make_image(ny=64, nx=65), threading.Event(), threading.Event()

    def send() -> None:
        try:
            while True:
                one.receiver.image(image)
                begun.set()
        except ConnectionError:
            stopped.set()

    threads = [threading.Thread(target=send, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(WAIT_S)
    one.receiver.abandon("the server is stopped", early=False)
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert stopped.is_set()
    names = kinds_of(one.end())
    once = {"Gadgetron": ["Error", "Close"], "MRD client": ["Text", "Close"], "pipe": ["HeaderText", "Close"]}
    assert sorted(name for name in names if name != "ImageMessage") == sorted(once[kind])
    assert names[-1] == "Close"
    assert kind != "Gadgetron" or names[-2] == "Error"


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_is_said_once(connected, kind: str) -> None:
    one = connected(kind)
    for _ in range(3):
        one.receiver.log("WRN", "degraded")
        one.receiver.log("ERR", "slice 1 failed")
        one.receiver.log("ERR", "x" * (MAX_TEXT + 1))
        one.receiver.log("ERR", "x" * (MAX_TEXT + 2))  # the same when it is cut
    one.receiver.finish()
    one.end()
    assert [level for level, _ in one.said] == ["WRN", "ERR", "ERR"]
    assert one.receiver.failures == ["slice 1 failed", "x" * MAX_TEXT]


def test_what_was_a_warning_can_still_fail(connected) -> None:
    one = connected("Gadgetron")
    one.receiver.log("WRN", "no train")
    one.receiver.log("ERR", "no train")
    one.receiver.finish()
    assert one.end() == [wire.Error("whorl: no train"), wire.Close()]


def test_threads_say_the_same_text_once(connected) -> None:
    one = connected("MRD client")
    barrier = threading.Barrier(8)

    def say() -> None:
        barrier.wait(WAIT_S)
        for n in range(50):
            one.receiver.log("WRN", f"warning {n}")

    threads = [threading.Thread(target=say) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    one.receiver.finish()
    texts = [message.text for message in one.end() if isinstance(message, wire.Text)]
    assert sorted(texts) == sorted(f"WRN warning {n}" for n in range(50))


def test_few_debug_texts_are_sent_but_all_are_said(connected) -> None:
    one = connected("MRD client")
    for _ in range(MAX_DEBUG_TEXTS + 10):
        one.receiver.log("DBG", "the same")
    one.receiver.finish()
    assert kinds_of(one.end()) == ["Text"] * MAX_DEBUG_TEXTS + ["Close"]
    assert len(one.said) == MAX_DEBUG_TEXTS + 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_receiver_that_is_gone(connected, kind: str) -> None:
    one = connected(kind)
    one.hang_up()
    with pytest.raises(ConnectionError, match="does not take images any more"):
        one.receiver.image(make_image())
    assert one.receiver.gone
    assert one.receiver.delivered == 0
    one.receiver.log("ERR", "slice 0 failed")
    one.receiver.finish()
    assert ("ERR", "slice 0 failed") in one.said


def test_a_receiver_that_is_gone_when_he_is_told_something(connected) -> None:
    one = connected("MRD client")
    one.hang_up()
    one.receiver.log("WRN", "first")
    one.receiver.log("WRN", "second")
    one.receiver.finish()
    assert one.receiver.gone
    # Said once, to the operator here.
    assert [text for _, text in one.said if text.startswith("the receiver is gone")] == [one.said[1][1]]


def test_a_pipe_whose_reader_is_gone() -> None:
    read, write = os.pipe()
    os.close(read)
    said: Said = []
    receiver = PipeReader(Channel(Pipes(-1, write), WAIT_S), HEADER, lambda *one: said.append(one))
    with pytest.raises(ConnectionError, match="Broken pipe"):
        receiver.image(make_image())
    receiver.finish()
    os.close(write)
    assert (receiver.gone, receiver.delivered) == (True, 0)


def test_a_file_takes_images_and_no_texts(tmp_path: Path) -> None:
    path, said = tmp_path / "maps.h5", []
    with files.ResultFile(path, HEADER) as result:
        receiver = File(result, lambda *one: said.append(one))
        receiver.log("WRN", "few readouts")
        receiver.image(make_image(role="T1"))
        receiver.finish()
        with pytest.raises(ConnectionError, match="given up"):
            receiver.image(make_image())
    images: list[ismrmrd.Image] = files.read_images(path)
    assert [image.meta["role"] for image in images] == ["T1"]
    assert said == [("WRN", "few readouts")]
