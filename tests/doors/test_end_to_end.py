"""A simulated scan through every door with the real reconstruction behind it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from doors.gadgetron_parent import external, run_external, talk
from doors.messages import served
from doors.test_gadget import assert_failed_as_gadgetron_understands
from whorl.doors import client, files, wire
from whorl.doors.server import Server
from whorl.doors.transport import Channel

FAST = {"method": "lowrank"}
QUANTITIES = ["T1", "T2", "M0", "QUALITY"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(None) as server:
        yield server


def roles(images: list) -> list[str]:
    return [
        image.meta["GADGETRON_DataRole"]
        for image in sorted(images, key=lambda image: image.image_series_index)
    ]


def test_an_mrd_client_gets_the_maps(server: Server, tiny_scan: Path, tmp_path: Path) -> None:
    received = client.send_file(tiny_scan, "127.0.0.1", server.port, properties=FAST)
    assert received.exit_code == 0, (received.texts, received.problems)
    assert roles(received.images) == QUANTITIES
    assert all(image.meta["whorl_method"] == "lowrank" for image in received.images)
    assert all(image.data.dtype == np.uint16 and image.data.any() for image in received.images)
    # Only a few lines for the scanner's console.
    assert len(received.texts) <= 40
    path = tmp_path / "maps.h5"
    with files.ResultFile(path, files.read_header(tiny_scan)) as result:
        for image in received.images:
            result.append(image)
    assert roles(files.read_images(path)) == QUANTITIES


def test_gadgetron_starts_the_external_and_gets_the_maps(tiny_scan: Path) -> None:
    said = run_external(files.read_header(tiny_scan), files.read_readouts(tiny_scan), properties=FAST)
    assert said.ended == "close", said.output
    assert said.exit_code == 0, said.output
    assert (said.errors, said.early_errors) == ([], [])
    assert roles(said.images) == QUANTITIES
    assert set(said.ids) == {wire.IMAGE, wire.CLOSE}
    assert said.after_close == b""


def test_gadgetron_connects_and_gets_the_same_maps(server: Server, tiny_scan: Path) -> None:
    _, config = external("whorl_connect", FAST)
    with socket.create_connection(("localhost", server.port), 10.0) as connection:
        said = talk(
            connection,
            config,
            files.read_header(tiny_scan),
            files.read_readouts(tiny_scan),
            close=True,
            wait_s=60.0,
        )
    assert said.ended == "close"
    assert set(said.ids) == {wire.IMAGE, wire.CLOSE}
    by_client = client.send_file(tiny_scan, "127.0.0.1", server.port, properties=FAST)
    for one, other in zip(said.images, by_client.images, strict=True):
        np.testing.assert_array_equal(one.data, other.data)


def test_two_scans_at_the_same_time_give_what_one_gives(server: Server, tiny_scan: Path) -> None:
    results: dict[int, client.Received] = {}

    def send(n: int) -> None:
        results[n] = client.send_file(tiny_scan, "127.0.0.1", server.port, properties=FAST)

    threads = [threading.Thread(target=send, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert [results[n].exit_code for n in range(2)] == [0, 0]
    for one, other in zip(results[0].images, results[1].images, strict=True):
        np.testing.assert_array_equal(one.data, other.data)


def test_a_scan_that_breaks_off_is_reported_to_an_mrd_client(server: Server, tiny_scan: Path) -> None:
    readouts = files.read_readouts(tiny_scan)
    with socket.create_connection(("127.0.0.1", server.port), 10.0) as connection:
        channel = Channel(connection, 60.0)
        wire.write_config_name(channel, "whorl")
        wire.write_header(channel, files.read_header(tiny_scan))
        for _ in range(5):
            wire.write_readout(channel, next(readouts))
        connection.shutdown(socket.SHUT_WR)
        received = client.Received()
        client._receive(channel, received, None, None)
    assert received.problems == []
    assert received.images == []
    assert any(text.startswith("ERR") and "before CLOSE" in text for text in received.texts), received.texts


def test_a_scan_that_breaks_off_is_an_error_for_gadgetron(tiny_scan: Path) -> None:
    readouts = files.read_readouts(tiny_scan)
    said = run_external(files.read_header(tiny_scan), [next(readouts)], properties=FAST, close=False)
    assert_failed_as_gadgetron_understands(said, "before CLOSE")


def test_too_few_readouts_are_an_error_for_gadgetron(tiny_scan: Path) -> None:
    readouts = files.read_readouts(tiny_scan)
    # The genuine server sends CLOSE after partial data if its own client died.
    said = run_external(files.read_header(tiny_scan), [next(readouts)], properties=FAST)
    assert_failed_as_gadgetron_understands(said, "")
    assert said.images == []


def test_gadgetron_vanishes_in_the_middle(tiny_scan: Path) -> None:
    readouts = files.read_readouts(tiny_scan)
    said = run_external(
        files.read_header(tiny_scan), [next(readouts) for _ in range(5)], properties=FAST, vanish=True
    )
    assert said.exit_code not in (0, None)


def test_a_header_that_is_no_mrd_header_is_said(server: Server, tiny_scan: Path) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10.0) as connection:
        channel = Channel(connection, 60.0)
        wire.write_config_name(channel, "whorl")
        wire.write_header(channel, b"<html/>")
        for readout in files.read_readouts(tiny_scan):
            wire.write_readout(channel, readout)
        wire.write_close(channel)
        received = client.Received()
        client._receive(channel, received, None, None)
    assert received.problems == []
    errors = [text for text in received.texts if text.startswith("ERR")]
    assert errors
    assert not any("internal error" in text for text in errors)
