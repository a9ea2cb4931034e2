"""The client: what it makes of a server that answers, refuses, dies or lies."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from doors.messages import Counted, count, make_image, make_readout
from doors.test_files import write_file
from whorl.doors import client, wire
from whorl.doors.server import Server
from whorl.doors.transport import Channel
from whorl.scan.failure import ScanError

#: How long a server hangs that should be left: much longer than a client takes on a busy machine.
HANGS_S = 60.0


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return write_file(tmp_path / "scan.h5", [make_readout(4, 201, 2, seed=n) for n in range(300)])


@pytest.fixture
def serve() -> Iterator[Callable[[Any], int]]:
    """Serve with a reconstruction and return the port."""
    started: list[tuple[Server, threading.Thread]] = []

    def start(reconstruct: Any) -> int:
        server = Server("127.0.0.1", 0, reconstruct=reconstruct)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        started.append((server, thread))
        return server.port

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join(10.0)
        assert not thread.is_alive()


@pytest.fixture
def lying() -> Iterator[Callable[[Callable[[Channel, socket.socket], None]], int]]:
    """A server of one connection that does what a test tells it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads: list[threading.Thread] = []

        def start(act: Callable[[Channel, socket.socket], None]) -> int:
            def run() -> None:
                connection, _ = listener.accept()
                with connection:
                    act(Channel(connection, 10.0), connection)

            threads.append(threading.Thread(target=run))
            threads[0].start()
            return int(listener.getsockname()[1])

        yield start
        for thread in threads:
            thread.join(10.0)
            assert not thread.is_alive()


def test_all_is_sent_and_delivered(scan: Path, serve) -> None:
    images, texts, steps = [], [], []
    received = client.send_file(
        scan,
        "127.0.0.1",
        serve(count),
        properties={"method": "lowrank", "iterations": 20},
        on_image=images.append,
        on_text=texts.append,
        progress=lambda n, total: steps.append((n, total)),
    )
    assert received.exit_code == 0
    assert received.problems == []
    assert received.n_sent == 300
    assert received.images == images
    assert (images[0].meta["n"], images[0].meta["method"]) == ("300", "lowrank")
    assert received.texts == texts == ["DBG 300 readouts"]
    assert steps[0] == (1, 300)
    assert steps[-1] == (300, 300)


def test_a_configuration_text_is_not_taken_for_gadgetron(scan: Path, serve) -> None:
    received = client.send_file(
        scan,
        "127.0.0.1",
        serve(count),
        config_text="<configuration><property name='method' value='lowrank'/></configuration>",
    )
    assert received.images[0].meta["method"] == "lowrank"
    assert received.texts == ["DBG 300 readouts"]


def outcome(images: list[Any], failures: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> Any:
    def reconstruct(header: bytes, readouts: Any, settings: Any, send_image: Any, log: Any) -> Counted:
        list(readouts)
        for image in images:
            send_image(image)
        return Counted(len(images), failures, notes)

    return reconstruct


GOOD = {"whorl_status": "complete"}
CASES = {
    "complete": (outcome([make_image(**GOOD)]), 0),
    "nothing": (outcome([]), 1),
    "nothing, with an error": (outcome([], ("no",)), 1),
    "degraded": (outcome([make_image(**GOOD), make_image(whorl_status="degraded")]), 3),
    "no status": (outcome([make_image()]), 3),
    "a failure": (outcome([make_image(**GOOD)], ("slice 1 failed",)), 3),
    "a note": (outcome([make_image(**GOOD)], (), ("slow",)), 3),
}


@pytest.mark.parametrize("case", CASES)
def test_exit_codes(scan: Path, serve, case: str) -> None:
    reconstruct, code = CASES[case]
    assert client.send_file(scan, "127.0.0.1", serve(reconstruct)).exit_code == code


def test_nobody_listens(scan: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(
        ScanError, match=f"no MRD server answers at 127.0.0.1:{port} .*whorl serve --port {port}"
    ):
        client.send_file(scan, "127.0.0.1", port)


def test_a_wrong_file_needs_no_server(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match="is not a file"):
        client.send_file(tmp_path / "no.h5", "127.0.0.1", 1)


def test_the_reason_is_read_when_the_server_leaves_early(scan: Path, lying) -> None:
    def leave(channel: Channel, connection: socket.socket) -> None:
        channel.read(100, "something")
        wire.write_text(channel, "ERR no room")
        wire.write_close(channel)
        channel.linger(0.3)

    received = client.send_file(scan, "127.0.0.1", lying(leave))
    assert received.texts == ["ERR no room"]
    assert received.exit_code == 1


def test_an_answer_without_close_is_no_success(scan: Path, lying) -> None:
    def die(channel: Channel, connection: socket.socket) -> None:
        while not isinstance(wire.read_message(channel), wire.Close):
            pass
        wire.write_image(channel, make_image(**GOOD))

    received = client.send_file(scan, "127.0.0.1", lying(die))
    assert len(received.images) == 1
    assert "did not end its answer with CLOSE" in received.problems[0]
    assert received.exit_code == 3


def test_a_server_that_hangs_is_left(scan: Path, lying) -> None:
    done, over = threading.Event(), threading.Event()

    def hang(channel: Channel, connection: socket.socket) -> None:
        done.wait(HANGS_S)
        over.set()

    received = client.send_file(scan, "127.0.0.1", lying(hang), timeout_s=0.5)
    hangs = not over.is_set()
    done.set()
    assert hangs
    assert received.exit_code == 1
    assert received.problems


def test_a_server_that_has_closed_but_does_not_read_is_left(tmp_path: Path, lying) -> None:
    # More than the socket's buffers hold: sending would wait until the timeout of half an hour.
    large = write_file(tmp_path / "large.h5", [make_readout(16, 8000, 2)] * 40)
    done, over = threading.Event(), threading.Event()

    def refuse(channel: Channel, connection: socket.socket) -> None:
        wire.write_text(channel, "ERR no room")
        time.sleep(0.5)
        wire.write_close(channel)
        done.wait(HANGS_S)
        over.set()

    received = client.send_file(large, "127.0.0.1", lying(refuse))
    hangs = not over.is_set()
    done.set()
    assert hangs
    assert received.texts == ["ERR no room"]
    assert received.exit_code == 1


def test_an_image_that_announces_too_much_is_refused(scan: Path, lying) -> None:
    def lie(channel: Channel, connection: socket.socket) -> None:
        while not isinstance(wire.read_message(channel), wire.Close):
            pass
        connection.sendall(
            struct.pack("<H", wire.IMAGE) + b"\x01\0\x01\0" + b"\xff" * 194 + struct.pack("<Q", 0)
        )

    received = client.send_file(scan, "127.0.0.1", lying(lie))
    assert "an image announces" in received.problems[0]
    assert received.exit_code == 1


def test_an_exception_of_the_caller_is_not_swallowed(scan: Path, serve) -> None:
    def fail(image: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        client.send_file(scan, "127.0.0.1", serve(count), on_image=fail)
