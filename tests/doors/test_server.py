"""Sessions through a real server: who is told what, and that nobody waits for ever or blocks others.

The reconstruction is stood in for by one that counts; the real one is in `test_end_to_end.py`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from doors.messages import HEADER, Counted, count, make_image, make_readout, make_waveform
from doors.processes import until_refused
from whorl.doors import session, wire
from whorl.doors.opening import is_gadgetron
from whorl.doors.receivers import MAX_DEBUG_TEXTS
from whorl.doors.server import MAX_WAITING, Server
from whorl.doors.transport import Channel
from whorl.scan.failure import EndOfStream, ScanError

WAIT_S = 10.0


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Start servers; at the end each must stop, and all its threads with it."""
    before = set(threading.enumerate())
    started: list[tuple[Server, threading.Thread]] = []

    def start(reconstruct: Any = count, **options: Any) -> Server:
        server = Server("127.0.0.1", 0, reconstruct=reconstruct, **options)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join(WAIT_S)
        assert not thread.is_alive()
    left = set(threading.enumerate()) - before
    assert not left


@contextlib.contextmanager
def connect(server: Server) -> Iterator[Channel]:
    with socket.create_connection(("127.0.0.1", server.port), WAIT_S) as connection:
        channel = Channel(connection, WAIT_S)
        channel.raw = connection  # type: ignore[attr-defined]
        yield channel


def raw(channel: Channel) -> socket.socket:
    return channel.raw  # type: ignore[attr-defined,no-any-return]


def answer(channel: Channel) -> tuple[list[Any], list[str]]:
    """Images and texts until CLOSE, and after it the end of the stream."""
    images, texts = [], []
    while True:
        message = wire.read_message(channel, keep_images=True)
        if isinstance(message, wire.Close):
            break
        if isinstance(message, wire.ImageMessage):
            images.append(message.image)
        else:
            assert isinstance(message, wire.Text), f"{message} came to an MRD client"
            texts.append(message.text)
    with pytest.raises(EndOfStream):
        wire.read_message(channel)
    return images, texts


def open_scan(channel: Channel, name: str = "whorl", parameters: str = "") -> None:
    wire.write_config_name(channel, name)
    wire.write_header(channel, HEADER)
    if parameters:
        wire.write_text(channel, parameters)


def scan(
    server: Server, n: int = 3, name: str = "whorl", parameters: str = ""
) -> tuple[list[Any], list[str]]:
    with connect(server) as channel:
        open_scan(channel, name, parameters)
        for seed in range(n):
            wire.write_readout(channel, make_readout(2, 9, 2, seed))
        wire.write_close(channel)
        return answer(channel)


def test_fire_name_header_with_nul_and_json_parameters(serve) -> None:
    server = serve()
    parameters = '{"version": "1.1.0", "parameters": {"method": "lowrank", "iterations": "20"}}'
    images, texts = scan(server, 5, "whorl.xml", parameters)
    assert [dict(image.meta) for image in images] == [
        {
            "n": "5",
            "method": "lowrank",
            "fit": "varpro",
            "header": HEADER.decode(),
            "whorl_status": "complete",
        }
    ]
    assert texts == ["DBG 5 readouts"]


def test_what_counts_more(serve) -> None:
    server = serve(properties={"method": "lowrank", "fit": "adam"})
    assert scan(server)[0][0].meta["method"] == "lowrank"
    with connect(server) as channel:
        wire.write_config_text(
            channel,
            "<configuration><version>2</version><property name='fit' value='varpro'/></configuration>",
        )
        wire.write_header(channel, HEADER)
        wire.write_text(channel, '{"parameters": {"method": "inr"}}')
        wire.write_close(channel)
        images, _ = answer(channel)
    assert (images[0].meta["method"], images[0].meta["fit"]) == ("inr", "varpro")


def test_a_stream_that_begins_with_its_header(serve) -> None:
    with connect(serve()) as channel:
        wire.write_header(channel, HEADER, terminate=False)
        wire.write_readout(channel, make_readout())
        wire.write_close(channel)
        images, texts = answer(channel)
    assert images[0].meta["n"] == "1"
    assert texts == ["DBG 1 readouts"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "spiral", "", "../config_xml/whorl"])
def test_a_configuration_that_is_not_shipped_is_refused(serve, name: str) -> None:
    images, texts = scan(serve(), name=name)
    assert images == []
    assert texts == [
        f'ERR configuration "{name}" is not known: expected one of openrecon, whorl, whorl_connect'
    ]


def test_an_unknown_property_is_answered_with_the_nearest_name(serve) -> None:
    server = serve()
    images, texts = scan(server, parameters='{"parameters": {"n_coefs": 5}}')
    assert images == []
    assert texts == ['ERR unknown property "n_coefs", did you mean "n_coefficients"?']
    assert len(scan(server)[0]) == 1


def test_a_path_is_not_taken_from_the_network_but_from_the_operator(serve) -> None:
    own = serve(properties={"sequence": "train.csv"})
    assert len(scan(own)[0]) == 1
    images, texts = scan(own, parameters='{"parameters": {"sequence": "/etc/passwd"}}')
    assert images == []
    assert len(texts) == 1
    assert texts[0].startswith(
        'ERR property "sequence" concerns the machine that reconstructs and is not taken from the network'
    )


@pytest.mark.parametrize("text", ["{", "[1]", "hello"])
def test_parameters_that_cannot_be_read(serve, text: str) -> None:
    images, texts = scan(serve(), parameters=text)
    assert images == []
    assert len(texts) == 1
    assert texts[0].startswith("ERR the ")
    assert "JSON" in texts[0]


def test_other_messages_are_counted_in_one_warning(serve) -> None:
    with connect(serve()) as channel:
        open_scan(channel)
        raw(channel).sendall(make_waveform())
        for _ in range(3):
            wire.write_readout(channel, make_readout())
            wire.write_image(channel, make_image())
            wire.write_text(channel, "late")
        wire.write_close(channel)
        images, texts = answer(channel)
    assert images[0].meta["n"] == "3"
    assert texts[1:] == ["WRN messages that are no readouts were ignored: 3 × image, 3 × text"]


def test_few_debug_texts_reach_the_operator_but_all_warnings(serve) -> None:
    def talk(header: bytes, readouts: Any, settings: Any, send_image: Any, log: Any) -> Counted:
        for n in range(MAX_DEBUG_TEXTS + 50):
            log("DBG", f"debug {n}")
        for n in range(60):
            log("WRN", f"warning {n}")
        log("WRN", "twice")
        list(readouts)
        return Counted(1, notes=("twice",))

    _, texts = scan(serve(talk))
    assert sum(text.startswith("DBG") for text in texts) == MAX_DEBUG_TEXTS
    assert sum(text.startswith("WRN") for text in texts) == 61


def failing(error: BaseException) -> Any:
    def fail(header: bytes, readouts: Any, settings: Any, send_image: Any, log: Any) -> Counted:
        next(iter(readouts))
        raise error

    return fail


def test_a_failure_comes_at_once_and_close_after_the_scan(serve) -> None:
    with connect(serve(failing(ScanError("the train has two lengths")))) as channel:
        open_scan(channel)
        wire.write_readout(channel, make_readout())
        # Said while the scan is still running, not after it.
        assert wire.read_message(channel) == wire.Text("ERR the train has two lengths")
        for _ in range(2000):
            wire.write_readout(channel, make_readout(8, 884, 2))
        wire.write_close(channel)
        assert answer(channel) == ([], [])


def test_a_programming_error_is_a_sentence_and_a_traceback_in_the_log(serve, caplog) -> None:
    images, texts = scan(serve(failing(KeyError("slice"))))
    assert (images, texts) == ([], ["ERR internal error: KeyError: 'slice'"])
    assert any(record.exc_info for record in caplog.records)


def test_the_next_scan_after_a_failed_one(serve) -> None:
    calls = iter([failing(ScanError("no")), failing(ValueError("x")), count])
    server = serve(lambda *arguments: next(calls)(*arguments), max_scans=1)
    assert scan(server) == ([], ["ERR no"])
    assert scan(server) == ([], ["ERR internal error: ValueError: x"])
    assert len(scan(server)[0]) == 1


VIOLATIONS = {
    "4 GiB header": (struct.pack("<HI", 3, 0xFFFFFFFF), "the header announces 4294967295 bytes"),
    "4 GiB config": (struct.pack("<HI", 2, 0xFFFFFFFF), "a configuration announces"),
    "HTTP": (b"GET / HTTP/1.1\r\n\r\n", "message id 17735"),
    "readout first": (struct.pack("<H", 1008) + bytes(340), "readout came before the header"),
}


@pytest.mark.parametrize("kind", VIOLATIONS)
def test_what_is_no_opening_is_answered_at_once(serve, kind: str) -> None:
    """And not when the time of an opening is over, for which this client would not wait."""
    message, text = VIOLATIONS[kind]
    with connect(serve(opening_timeout_s=3 * WAIT_S)) as channel:
        raw(channel).sendall(message)
        images, texts = answer(channel)
    assert images == []
    assert len(texts) == 1
    assert texts[0].startswith("ERR ")
    assert text in texts[0]


def test_the_report_is_not_lost_when_the_sender_goes_on_sending(serve) -> None:
    for _ in range(5):
        with connect(serve()) as channel:
            raw(channel).sendall(struct.pack("<HI", 3, 0xFFFFFFFF))
            for _ in range(200):
                raw(channel).sendall(bytes(65536))
            raw(channel).shutdown(socket.SHUT_WR)
            time.sleep(0.05)
            _, texts = answer(channel)
        assert len(texts) == 1


def test_an_unknown_message_within_a_scan_ends_it_with_what_came(serve) -> None:
    with connect(serve()) as channel:
        open_scan(channel)
        wire.write_readout(channel, make_readout())
        raw(channel).sendall(struct.pack("<H", 4711))
        images, texts = answer(channel)
    assert images[0].meta["n"] == "1"
    assert [text[:24] for text in texts] == ["DBG 1 readouts", "ERR message id 4711 afte"]


def test_a_sender_that_ends_without_close_is_told(serve) -> None:
    with connect(serve()) as channel:
        open_scan(channel)
        wire.write_readout(channel, make_readout())
        raw(channel).shutdown(socket.SHUT_WR)
        images, texts = answer(channel)
    assert len(images) == 1
    assert texts[-1].startswith("ERR the stream ended before CLOSE, after 1 readouts")


def test_a_sender_that_falls_silent_is_told(serve) -> None:
    with connect(serve(properties={"idle_timeout_s": 0.3})) as channel:
        open_scan(channel)
        wire.write_readout(channel, make_readout())
        images, texts = answer(channel)
    assert len(images) == 1
    assert texts[-1].startswith("ERR nothing was received for 0.3 s after 1 readouts")


def test_a_sender_that_falls_silent_after_its_header_is_told(serve) -> None:
    with connect(serve(properties={"idle_timeout_s": 0.3})) as channel:
        open_scan(channel)
        images, texts = answer(channel)
    assert images == []
    assert texts == ["ERR nothing was received for 0.3 s after 0 readouts: expected a message"]


def test_a_scan_that_never_ends_is_ended(serve) -> None:
    """A sender that says something now and then is not silent; the time of a scan is limited too."""
    with connect(serve(properties={"scan_timeout_s": 0.5})) as channel:
        open_scan(channel)
        over = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not over.wait(0.05):
                    wire.write_readout(channel, make_readout())

        thread = threading.Thread(target=drip)
        thread.start()
        message = wire.read_message(channel, keep_images=True)
        while not isinstance(message, wire.Text) or message.text.startswith("DBG"):
            message = wire.read_message(channel, keep_images=True)
        over.set()
        thread.join()
        assert message.text.startswith("ERR the time was over after ")


def test_a_readout_larger_than_the_header_announces_is_read_past(serve) -> None:
    """65535 samples of each of the announced channels are the most that is taken into memory."""
    header = HEADER.replace(
        b"/>",
        b"><acquisitionSystemInformation><receiverChannels>2</receiverChannels>"
        b"</acquisitionSystemInformation></ismrmrdHeader>",
    )
    with connect(serve()) as channel:
        wire.write_config_name(channel, "whorl")
        wire.write_header(channel, header)
        for n_coils, n_samples in ((2, 9), (3, 9), (2, 65535), (3, 43691), (2, 9)):
            wire.write_readout(channel, make_readout(n_coils, n_samples))
        wire.write_close(channel)
        images, texts = answer(channel)
    assert images[0].meta["n"] == "4"
    assert texts[-1] == (
        "WRN messages that are no readouts were ignored: 1 × readout of 3 coils × 43691 samples, "
        "more than 2 receiverChannels of the header can have"
    )


def test_a_client_that_dies_costs_nobody_else(serve) -> None:
    server = serve(max_scans=1)
    for linger in (0, 1):
        with connect(server) as channel:
            open_scan(channel)
            wire.write_readout(channel, make_readout(8, 884, 2))
            raw(channel).sendall(struct.pack("<H", 1008) + bytes(100))
            if linger == 0:  # die with a reset
                raw(channel).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: len(scan(server)[0]) == 1)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_receiver_that_is_gone_does_not_keep_its_slot(serve) -> None:
    def send_much(header: bytes, readouts: Any, settings: Any, send_image: Any, log: Any) -> Counted:
        for _ in range(1000):
            send_image(make_image(ny=300, nx=300))
        list(readouts)
        return Counted(1000)

    server = serve(send_much, max_scans=1, properties={"idle_timeout_s": 1.0})
    with connect(server) as channel:
        open_scan(channel)
        wire.write_readout(channel, make_readout())
        time.sleep(0.1)
    # Another that is there, but does not read.
    with connect(server) as deaf:
        open_scan(deaf)
        wire.write_readout(deaf, make_readout())
        time.sleep(1.5)

        def served() -> bool:
            with connect(server) as channel:
                open_scan(channel)
                wire.write_close(channel)
                return len(answer(channel)[0]) == 1000

        wait_until(served)


def silent_clients(server: Server, stack: contextlib.ExitStack) -> list[Channel]:
    """Many that say nothing, and one that says half of something."""
    silent = [stack.enter_context(connect(server)) for _ in range(21)]
    raw(silent[-1]).sendall(struct.pack("<HI", 2, 100) + b"<conf")
    return silent


def test_silent_clients_block_nobody(serve) -> None:
    """Who comes after them does not wait until their time is over."""
    server = serve(max_scans=1, opening_timeout_s=3 * WAIT_S)
    with contextlib.ExitStack() as stack:
        silent_clients(server, stack)
        assert len(scan(server)[0]) == 1


def test_silent_clients_are_told_that_their_time_is_over(serve) -> None:
    server = serve(max_scans=1, opening_timeout_s=0.3)
    with contextlib.ExitStack() as stack:
        for channel in silent_clients(server, stack):
            images, texts = answer(channel)
            assert images == []
            assert texts[0].startswith("ERR the time was over after 0 readouts")


def test_too_many_silent_clients_are_sent_away(serve) -> None:
    server = serve(max_scans=1)
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_WAITING + 1):
            stack.enter_context(connect(server))
        with connect(server) as one_more:
            assert answer(one_more) == ([], ["ERR too many connections are open: try again later"])


def test_scans_at_the_same_time_and_one_too_many(serve) -> None:
    gate, inside = threading.Event(), threading.Semaphore(0)

    def wait(header: bytes, readouts: Any, settings: Any, send_image: Any, log: Any) -> Counted:
        inside.release()
        assert gate.wait(WAIT_S)
        return count(header, readouts, settings, send_image, log)

    server = serve(wait, max_scans=2)
    with connect(server) as first, connect(server) as second, connect(server) as third:
        for n, channel in enumerate((first, second)):
            open_scan(channel, parameters=json.dumps({"parameters": {"method": ("inr", "lowrank")[n]}}))
            for _ in range(n + 1):
                wire.write_readout(channel, make_readout())
            assert inside.acquire(timeout=WAIT_S)
        open_scan(third)
        for _ in range(300):
            wire.write_readout(third, make_readout(8, 884, 2))
        wire.write_close(third)
        images, texts = answer(third)
        assert images == []
        assert texts == ["ERR 2 scans are being reconstructed, which is the limit: send it again later"]
        gate.set()
        for n, channel in enumerate((first, second)):
            wire.write_close(channel)
            images, _ = answer(channel)
            assert (images[0].meta["n"], images[0].meta["method"]) == (str(n + 1), ("inr", "lowrank")[n])
    wait_until(lambda: len(scan(server)[0]) == 1)


def test_gadgetron_through_connect_is_spoken_to_as_gadgetron(serve) -> None:
    server = serve(lambda *arguments: count(*arguments[:4], lambda level, text: arguments[4]("WRN", text)))
    with connect(server) as channel:
        wire.write_config_text(
            channel,
            '<configuration><property name="method" value="lowrank"/></configuration>',
            terminate=False,
        )
        wire.write_header(channel, HEADER, terminate=False)
        wire.write_readout(channel, make_readout())
        wire.write_close(channel)
        message = wire.read_message(channel, keep_images=True)
        assert isinstance(message, wire.ImageMessage)
        assert message.image.meta["method"] == "lowrank"
        # No TEXT at all.
        assert isinstance(wire.read_message(channel), wire.Close)


def test_a_failure_for_gadgetron_is_an_error_after_its_close(serve) -> None:
    with connect(serve()) as channel:
        wire.write_config_text(
            channel, '<configuration><property name="n_coefs" value="5"/></configuration>', terminate=False
        )
        wire.write_header(channel, HEADER, terminate=False)
        wire.write_readout(channel, make_readout())
        raw(channel).settimeout(0.3)
        with pytest.raises(TimeoutError):
            raw(channel).recv(1)
        raw(channel).settimeout(WAIT_S)
        wire.write_close(channel)
        assert wire.read_message(channel) == wire.Error(
            'whorl: unknown property "n_coefs", did you mean "n_coefficients"?'
        )
        assert isinstance(wire.read_message(channel), wire.Close)


WHOLE = b"<configuration><version>2</version><readers/><stream/></configuration>"


@pytest.mark.parametrize(
    ("config", "header", "expected"),
    [
        (b"<configuration/>", HEADER, True),
        (b"", HEADER, True),
        (b'<?xml version="1.0"?>\n', HEADER, True),
        (b'<configuration>\n<property name="a" value="b"/></configuration>\n', HEADER, True),
        (b"<configuration/>\0", HEADER, False),
        (b"<configuration/>", HEADER + b"\0", False),
        (WHOLE, HEADER, False),
        (b"<other/>", HEADER, False),
        (b"<configuration", HEADER, False),
    ],
)
def test_who_is_gadgetron(config: bytes, header: bytes, expected: bool) -> None:
    assert is_gadgetron(config, header) is expected


def test_the_shipped_configurations_are_found_by_name() -> None:
    shipped = Path(__file__).parents[2] / "config_xml"
    assert {path.stem for path in shipped.glob("*.xml")} == set(session.configurations())


def test_both_loopbacks_answer(serve) -> None:
    server = serve()
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            with socket.socket(family) as probe:
                probe.bind((address, 0))
        except OSError:
            assert family == socket.AF_INET6  # a machine without IPv6
            continue
        with socket.create_connection((address, server.port), WAIT_S) as connection:
            channel = Channel(connection, WAIT_S)
            open_scan(channel)
            wire.write_close(channel)
            assert len(answer(channel)[0]) == 1


def test_a_port_that_is_taken_is_named(serve) -> None:
    server = serve()
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{server.port}"):
        Server("127.0.0.1", server.port)


def test_a_port_probe_is_no_event(serve, caplog) -> None:
    server = serve()
    with caplog.at_level(logging.INFO, "whorl"):
        with connect(server):
            pass
        assert len(scan(server)[0]) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@contextlib.contextmanager
def server_process(**options: object) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server in a process of its own, and its port; it prints whether all scans have ended."""
    program = (
        "from doors.messages import count\nfrom whorl.doors.server import Server\n"
        f"server = Server('127.0.0.1', 0, reconstruct=count, **{options})\nprint(server.port, flush=True)\n"
        "print(server.serve_forever(), flush=True)"
    )
    folders = [str(Path(session.__file__).parents[2]), str(Path(__file__).parents[1])]
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
    ) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_scan_may_end_when_the_server_is_stopped(number: int) -> None:
    with (
        server_process() as (process, port),
        socket.create_connection(("127.0.0.1", port), WAIT_S) as connection,
    ):
        channel = Channel(connection, WAIT_S)
        open_scan(channel)
        wire.write_readout(channel, make_readout())
        time.sleep(0.3)
        process.send_signal(number)
        until_refused(port)
        wire.write_readout(channel, make_readout())
        wire.write_close(channel)
        images, texts = answer(channel)
        assert [image.meta["n"] for image in images] == ["2"]
        assert texts == ["DBG 2 readouts"]
        connection.close()
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert process.wait(WAIT_S) == 0


@pytest.mark.parametrize("signals", [1, 2], ids=["the grace is over", "a second signal"])
def test_a_scan_that_does_not_end_is_told_when_the_server_is_stopped(signals: int) -> None:
    with (
        server_process(grace_s=0.5 if signals == 1 else 60.0) as (process, port),
        socket.create_connection(("127.0.0.1", port), WAIT_S) as connection,
    ):
        channel = Channel(connection, WAIT_S)
        open_scan(channel)
        wire.write_readout(channel, make_readout())
        time.sleep(0.3)
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            until_refused(port)
        images, texts = answer(channel)
        assert images == []
        assert texts == ["ERR the server was stopped before the scan was ready: send it again"]
        assert process.stdout is not None
        assert process.stdout.readline() == "False\n"
        assert process.wait(WAIT_S) == 0


def test_gadgetron_is_left_without_an_error_when_the_server_is_stopped_within_its_scan() -> None:
    with (
        server_process(grace_s=0.3) as (process, port),
        socket.create_connection(("127.0.0.1", port), WAIT_S) as connection,
    ):
        channel = Channel(connection, WAIT_S)
        wire.write_config_text(channel, "<configuration/>", terminate=False)
        wire.write_header(channel, HEADER, terminate=False)
        wire.write_readout(channel, make_readout())
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(EndOfStream):
            wire.read_message(channel)
