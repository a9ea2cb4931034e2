"""A server process under load, and what it comes through: dead, slow, silent and mad clients, signals.

Everything is real: `whorl serve` as a process, sockets, files, and the low-rank reconstruction of a small
scan.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ismrmrd
import numpy as np
import pytest

from doors.gadgetron_parent import external, run_external, talk
from doors.messages import bytes_of
from doors.processes import (
    ENVIRONMENT,
    WAIT_S,
    Client,
    Served,
    Usage,
    send_scan,
    serving,
    until_refused,
    wait_until,
)
from scan_edit import Result, Scan
from whorl.doors import client, files, wire
from whorl.doors.client import Received
from whorl.doors.spool import Spool
from whorl.kspace.nufft import FinufftNufft
from whorl.kspace.slicebuffer import SliceBuffer
from whorl.scan.failure import ScanError
from whorl.scan.readout import HEAD_DTYPE, Readout

PATIENT = ("Mustermann^Erika", "4711-XYZ")
#: One event, one line; nothing else is written to the log.
LINE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z (debug|info|warning|error) (scan=[0-9a-f]{8} )?event=\S.*")
#: float32 pixels: more than the system keeps for a client that does not read.
MUCH = {"output_dtype": "float32"}


@dataclass
class Tended:
    """A server with what it held when it had nothing to do, after some work."""

    served: Served
    idle: Usage

    @property
    def port(self) -> int:
        return self.served.port

    def settle(self, of_libraries: int = 0) -> None:
        """Wait until it holds no more threads and descriptors than before, but for some threads."""
        now = self.served.usage

        def settled() -> bool:
            nonlocal now
            now = self.served.usage
            threads = self.idle.threads + of_libraries
            return now.threads <= threads and now.descriptors <= self.idle.descriptors

        try:
            wait_until(settled, 20.0)
        except AssertionError:
            pytest.fail(f"the server holds {now}, before it held {self.idle}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, loaded_scan: Scan) -> Iterator[Tended]:
    """One server for most of this module, that takes 8 scans; it has seen a patient's name."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(log, "--max-scans", 8, "-p", "method=lowrank") as served:
        for _ in range(2):
            assert send_scan(served.port, with_patient(loaded_scan.header), loaded_scan.readouts()).images
        time.sleep(0.5)
        yield Tended(served, served.usage)


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spool") / "streams"


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, spool: Path) -> Iterator[Served]:
    """A server with short patience that keeps the latest streams and logs patients as JSON."""
    log = tmp_path_factory.mktemp("strict") / "log"
    properties = ["method=lowrank", f"spool={spool}", "spool_scans=3", "idle_timeout_s=3"]
    options = [word for text in properties for word in ("-p", text)]
    with serving(log, "--max-scans", 2, "--log-patient", *options, first=("--log-format", "json")) as served:
        yield served


@pytest.fixture(scope="module")
def expected(untouched: Result) -> list[ismrmrd.Image]:
    return untouched.images


def with_patient(header: bytes) -> bytes:
    name, number = PATIENT
    subject = (
        f"<subjectInformation><patientName>{name}</patientName><patientID>{number}</patientID>"
        "</subjectInformation>"
    )
    at = header.index(b">", header.index(b"<ismrmrdHeader")) + 1
    return header[:at] + subject.encode() + header[at:]


def assert_right(received: Received, expected: list[ismrmrd.Image]) -> None:
    """Nothing was said but what is said of a good scan, and the pixels are those of the scan alone."""
    assert (received.problems, received.exit_code) == ([], 0), received.texts
    assert_same_pixels(received.images, expected)


def assert_same_pixels(images: list[ismrmrd.Image], expected: list[ismrmrd.Image]) -> None:
    assert len(images) == len(expected)
    for image, other in zip(images, expected, strict=True):
        assert image.meta["GADGETRON_DataRole"] == other.meta["GADGETRON_DataRole"]
        np.testing.assert_array_equal(image.data, other.data)


def errors(received: Received) -> list[str]:
    return [text for text in received.texts if text.startswith("ERR")]


def begun(served: Served) -> int:
    return sum("event=begins" in line for line in served.lines())


def opening(scan: Scan) -> bytes:
    return bytes_of(
        lambda channel: wire.write_config_name(channel, "whorl"),
        lambda channel: wire.write_header(channel, scan.header),
    )


def readout_bytes(scan: Scan) -> list[bytes]:
    return [bytes_of(partial(wire.write_readout, readout=readout)) for readout in scan.readouts()]


# --- Load ---------------------------------------------------------------------------------------


def test_eight_scans_at_once_and_one_too_many(server: Tended, scan: Scan, expected: list) -> None:
    readouts = list(scan.readouts())
    before = begun(server.served)
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(server.port)) for _ in range(8)]
        for n, one in enumerate(clients):
            one.open(scan.header)
            one.send(readouts[: 10 * n + 1])
        wait_until(lambda: begun(server.served) == before + 8)
        refused = send_scan(server.port, scan.header, readouts)
        assert refused.images == []
        assert refused.texts == [
            "ERR 8 scans are being reconstructed, which is the limit: send it again later"
        ]

        def finish(n: int) -> None:
            clients[n].send(readouts[10 * n + 1 :])
            clients[n].close()

        threads = [threading.Thread(target=finish, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        for one in clients:
            assert_right(one.answer(), expected)
    server.settle()
    assert_right(send_scan(server.port, scan.header, readouts), expected)


@pytest.mark.parametrize("n_readouts", [124, 60], ids=["a good scan", "one that fails"])
def test_nothing_of_a_scan_waits_for_the_collector(scan: Scan, n_readouts: int) -> None:
    """Samples, plans and their threads go with the scan: cycles are looked for late, and memory is short."""
    gc.collect()
    gc.disable()
    try:
        scan.take(range(n_readouts))
        with suppress(ScanError):
            scan.run()
        wait_until(lambda: not any(t.name.startswith("whorl-") for t in threading.enumerate()), 5.0)
        held = [o for o in gc.get_objects() if type(o) in (SliceBuffer, FinufftNufft)]
        assert held == []
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["noise", "imaging"])
def test_a_sample_whose_square_overflows_costs_its_readout(scan: Scan, kind: str) -> None:
    """One wrong bit of an exponent is enough; it must not cost the scan."""
    place = 1 if kind == "noise" else scan.imaging[3]
    scan.data[place][0, 5] = 1e30
    result = scan.run()
    assert result.slices() == [0]
    assert "1 readout with samples of 1e15 or more were dropped" in result.said


def test_slow_clients_do_not_keep_a_fast_one_waiting(server: Tended, scan: Scan, expected: list) -> None:
    """One trickles its opening, one its readouts, until the fast one has its maps."""
    begin, readouts = opening(scan), readout_bytes(scan)
    fast_is_done = threading.Event()

    def trickle(slow: Client, data: bytes, piece: int) -> None:
        at = 0
        while at < len(data) and not fast_is_done.is_set():
            slow.raw.sendall(data[at : at + piece])
            at += piece
            time.sleep(0.003)
        assert at < len(data), "it was not slow enough to be in the way"
        slow.raw.sendall(data[at:])

    def slow_opening(slow: Client) -> None:
        trickle(slow, begin, 1)
        slow.raw.sendall(b"".join(readouts))
        slow.close()

    def slow_readouts(slow: Client) -> None:
        slow.raw.sendall(begin)
        trickle(slow, b"".join(readouts), 700)
        slow.close()

    with Client(server.port) as one, Client(server.port) as other:
        threads = [
            threading.Thread(target=slow_opening, args=(one,)),
            threading.Thread(target=slow_readouts, args=(other,)),
        ]
        for thread in threads:
            thread.start()
        fast = send_scan(server.port, scan.header, scan.readouts())
        fast_is_done.set()
        for thread in threads:
            thread.join(WAIT_S)
        for received in (fast, one.answer(), other.answer()):
            assert_right(received, expected)
    server.settle()


# --- Clients that die ---------------------------------------------------------------------------

DEATHS = {
    "after connecting": lambda begin, readouts: 0,
    "within the name of the configuration": lambda begin, readouts: 500,
    "after the configuration": lambda begin, readouts: 2 + wire.CONFIG_NAME_BYTES,
    "within the header": lambda begin, readouts: begin - 100,
    "after the header": lambda begin, readouts: begin,
    "after the first readout": lambda begin, readouts: begin + len(readouts[0]),
    "within a readout": lambda begin, readouts: begin + sum(map(len, readouts[:60])) + 1000,
    "before CLOSE": lambda begin, readouts: begin + sum(map(len, readouts)),
    "after CLOSE": lambda begin, readouts: begin + sum(map(len, readouts)) + 2,
}


@pytest.mark.parametrize("phase", DEATHS)
def test_a_client_that_dies(server: Tended, scan: Scan, expected: list, phase: str) -> None:
    begin, readouts = opening(scan), readout_bytes(scan)
    stream = begin + b"".join(readouts) + bytes_of(wire.write_close)
    for reset in (False, True):
        dying = Client(server.port, listen=False)
        dying.raw.sendall(stream[: DEATHS[phase](len(begin), readouts)])
        dying.die(reset=reset)
    assert_right(send_scan(server.port, scan.header, scan.readouts()), expected)
    server.settle()


def test_a_client_that_dies_while_images_come_back(server: Tended, scan: Scan, expected: list) -> None:
    dying = Client(server.port, listen=False)
    dying.open(scan.header, MUCH)
    dying.send(scan.readouts())
    dying.close()
    # More than the texts: the first image has begun.
    wait_until(lambda: len(dying.raw.recv(4096, socket.MSG_PEEK)) > 600)
    dying.die(reset=True)
    assert_right(send_scan(server.port, scan.header, scan.readouts()), expected)
    server.settle()


def test_a_client_that_never_reads_loses_its_place(strict: Served, scan: Scan) -> None:
    """It is waited for once, not for each of its slices, and then it is sent nothing more."""
    # Images of 0.3 MB: those of 64² a kernel may keep for the receiver.
    scan.two_slices().space("reconSpace", (288, 288), (300, 300))
    with ExitStack() as stack:
        deaf = [stack.enter_context(Client(strict.port, listen=False)) for _ in range(2)]
        for one in deaf:
            one.open(scan.header, MUCH)
            one.send(scan.readouts())
            one.close()

        def served() -> bool:
            return len(send_scan(strict.port, scan.header, scan.readouts()).images) == 8

        assert not served()
        wait_until(served)
        for one in deaf:
            one.begin_to_listen()
            assert len(one.answer().images) < 4
            assert one.received.problems
    said = [json.loads(line)["text"] for line in strict.lines() if '"ERR slice' in line]
    assert sorted(said) == sorted(
        2
        * [
            "ERR slice 0 failed: the receiver does not take images any more: timed out",
            "ERR slice 1 failed: the receiver is gone",
        ]
    )


# --- Signals ------------------------------------------------------------------------------------


def test_scans_may_end_when_the_server_is_terminated(tmp_path: Path, scan: Scan, expected: list) -> None:
    """One is all sent, and the server waits to send its maps; of the other half is still to come."""
    readouts = list(scan.readouts())
    with serving(tmp_path / "log", "-p", "method=lowrank", "--grace", 30) as served:
        with Client(served.port, listen=False) as sent, Client(served.port) as half:
            sent.open(scan.header, MUCH)
            sent.send(readouts)
            sent.close()
            half.open(scan.header)
            half.send(readouts[:60])
            wait_until(lambda: len(sent.raw.recv(4096, socket.MSG_PEEK)) > 600 and begun(served) == 2)
            served.terminate()
            until_refused(served.port)
            half.send(readouts[60:])
            half.close()
            assert_right(half.answer(), expected)
            sent.begin_to_listen()
            received = sent.answer()
            assert (received.exit_code, len(received.images)) == (0, 4), received
        assert served.process.wait(WAIT_S) == 0
        assert not any("given up" in line for line in served.lines())


def test_a_scan_that_does_not_end_is_told_when_the_server_is_terminated(tmp_path: Path, scan: Scan) -> None:
    readouts = list(scan.readouts())
    with serving(tmp_path / "log", "-p", "method=lowrank", "--grace", 0.5) as served:
        with Client(served.port) as half:
            half.open(scan.header)
            half.send(readouts[:60])
            wait_until(lambda: begun(served) == 1)
            served.terminate()
            until_refused(served.port)
            received = half.answer()  # up to CLOSE
            assert received.problems == []
            assert errors(received) == ["ERR the server was stopped before the scan was ready: send it again"]
            assert received.texts[-1] == errors(received)[0]
            assert received.images == []
            assert half.raw.recv(1) == b""
        assert served.process.wait(WAIT_S) == 1


def test_a_server_that_is_killed(tmp_path: Path, tiny_scan: Path, scan: Scan, expected: list) -> None:
    """Its clients end with a text, the next server takes the port, and the stream is on disk."""
    folder = tmp_path / "spool"
    options = ("-p", "method=lowrank", "-p", f"spool={folder}")
    stream = opening(scan) + b"".join(readout_bytes(scan))
    with serving(tmp_path / "log", *options) as served:
        port = served.port
        with Client(port) as cut_off:
            cut_off.raw.sendall(stream)
            wait_until(lambda: [path.stat().st_size for path in folder.glob("*")] == [len(stream)])
            served.process.kill()
            received = cut_off.answer()
        assert received.exit_code in (1, 3)
        assert "did not end its answer with CLOSE" in received.problems[0]
    (kept,) = folder.iterdir()
    assert kept.read_bytes() == stream
    replayed = started("replay", kept, "-o", tmp_path / "maps.h5", "-p", "method=lowrank")
    assert replayed.returncode == 3, replayed.stderr
    assert "the stream ended before CLOSE" in replayed.stderr
    assert_same_pixels(files.read_images(tmp_path / "maps.h5"), expected)

    with serving(tmp_path / "log", *options, port=port) as served:
        assert_right(send_scan(port, scan.header, scan.readouts()), expected)
        # Two that are in the middle of it: it takes them, and reads no further.
        served.process.send_signal(signal.SIGSTOP)
        results: list[Received] = []
        sender = threading.Thread(
            target=lambda: results.append(client.send_file(tiny_scan, port=port)), daemon=True
        )
        sender.start()
        with subprocess.Popen(
            command("replay", tiny_scan, "-o", tmp_path / "none.h5", "--address", f"127.0.0.1:{port}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
        ) as replay:
            wait_until(lambda: established(port) == 2)
            served.process.kill()
            output, said = replay.communicate(timeout=WAIT_S)
        sender.join(WAIT_S)
        assert not sender.is_alive()
    assert (replay.returncode, output) == (1, "")
    assert "whorl: the server " in said
    assert "whorl: nothing was delivered" in said
    assert not (tmp_path / "none.h5").exists()
    assert results[0].exit_code == 1
    assert results[0].problems


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "whorl", *map(str, arguments)]


def started(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
        env=os.environ | ENVIRONMENT,
    )


def established(port: int) -> int:
    """Clients on this machine that are connected to a port."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


def test_an_external_that_is_killed(tmp_path: Path, scan: Scan, expected: list) -> None:
    """Gadgetron sees it die and starts the next one; the stream is on disk."""
    folder = tmp_path / "spool"
    properties = {"method": "lowrank", "spool": str(folder)}
    _, config = external("whorl", properties)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(WAIT_S)
        port = str(listener.getsockname()[1])
        with subprocess.Popen(
            [sys.executable, "-m", "gadgetron", port, "whorl.gadget", "reconstruct"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | ENVIRONMENT,
        ) as process:
            connection, _ = listener.accept()
            size = len(wire.gadgetron_opening(config, scan.header)) + sum(map(len, readout_bytes(scan)))

            def readouts() -> Iterator[Readout]:
                yield from scan.readouts()
                wait_until(lambda: [path.stat().st_size for path in folder.glob("*")] == [size])
                process.kill()

            with connection:
                said = talk(connection, config, scan.header, readouts(), close=False, wait_s=WAIT_S)
    assert said.ended.startswith("the external died"), said
    assert said.errors == said.early_errors == []
    (kept,) = folder.iterdir()
    replayed = started("replay", kept, "-o", tmp_path / "maps.h5", "-p", "method=lowrank")
    assert replayed.returncode == 3, replayed.stderr
    assert_same_pixels(files.read_images(tmp_path / "maps.h5"), expected)
    following = run_external(scan.header, scan.readouts(), properties=properties)
    assert (following.ended, following.exit_code) == ("close", 0), following.output
    assert_same_pixels(following.images, expected)
    assert len(list(folder.iterdir())) == 2


# --- Bytes that are no scan ---------------------------------------------------------------------


def answer_to(port: int, data: bytes, *, end: bool = True) -> bytes:
    """What a server says to some bytes, and perhaps the end of the stream, until it closes."""
    with socket.create_connection(("127.0.0.1", port), WAIT_S) as connection:
        answer = bytearray()

        def read() -> None:
            try:
                while part := connection.recv(65536):
                    answer.extend(part)
            except ConnectionResetError:
                pass

        reader = threading.Thread(target=read)
        reader.start()
        try:
            connection.sendall(data)
            if end:
                connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has said what it thinks of this
        reader.join(WAIT_S)
        assert not reader.is_alive(), "the server neither answers nor closes"
    return bytes(answer)


def damaged_streams(scan: Scan) -> Iterator[bytes]:
    """Bytes that mean nothing, and scans with some wrong bytes."""
    rng = np.random.default_rng(11)
    begin, readouts = opening(scan), readout_bytes(scan)
    for n in rng.integers(1, 5000, 20):
        yield rng.bytes(int(n))
    starts = np.cumsum([0, *map(len, readouts)])
    for n in range(16):
        stream = bytearray(b"".join(readouts))
        # Every other time within the heads of readouts.
        for _ in range(int(rng.integers(1, 30))):
            in_head = int(rng.choice(starts[:-1])) + 2 + int(rng.integers(HEAD_DTYPE.itemsize))
            stream[in_head if n % 2 else int(rng.integers(len(stream)))] = int(rng.integers(256))
        yield begin + bytes(stream) + bytes_of(wire.write_close)


def test_garbage_ends_with_a_text_and_leaves_nothing_behind(
    server: Tended, scan: Scan, expected: list
) -> None:
    before = server.served.usage
    close = bytes_of(wire.write_close)
    for stream in damaged_streams(scan):
        answer = answer_to(server.port, stream)
        # First a text or an image, or an error for what looks like Gadgetron; CLOSE at the end.
        assert struct.unpack("<H", answer[:2])[0] in (wire.TEXT, wire.IMAGE, wire.ERROR), answer[:80]
        assert answer.endswith(close)
        assert b"internal error" not in answer
    assert_right(send_scan(server.port, scan.header, scan.readouts()), expected)
    # What only a damaged trajectory needs is compiled once, with 150 MiB and a thread of a progress bar.
    server.settle(of_libraries=1)
    assert server.served.usage.rss_mb < before.rss_mb + 300


@pytest.mark.parametrize("name", ["CONFIG", "HEADER", "TEXT", "ERROR", "ACQUISITION", "WAVEFORM", "IMAGE"])
def test_what_a_length_announces_is_not_waited_for(server: Tended, scan: Scan, name: str) -> None:
    """The stream goes on after it, and does not end."""
    message = struct.pack("<H", getattr(wire, name)) + bytes([255]) * 400
    for before in (b"", opening(scan), opening(scan) + readout_bytes(scan)[0]):
        answer = answer_to(server.port, before + message, end=False)
        assert answer.endswith(bytes_of(wire.write_close))
        assert (b"an image has data type" if name == "IMAGE" else b"announces") in answer
    server.settle(of_libraries=1)


# --- The log ------------------------------------------------------------------------------------


def test_no_patient_in_log_and_texts(server: Tended, scan: Scan, expected: list) -> None:
    texts: list[str] = []
    header = with_patient(scan.header)

    def send(header: bytes, n_readouts: int | None = None, **parameters: object) -> Received:
        received = send_scan(server.port, header, list(scan.readouts())[:n_readouts], parameters)
        texts.extend(received.texts + received.problems)
        return received

    assert_right(send(header), expected)
    broken = [
        header.replace(b"</patientID>", b"</patientID"),
        header.replace(PATIENT[1].encode(), PATIENT[1].encode() + b"</patientID><patientBirthdate>x"),
        header.replace(b"<matrixSize>", b"<matrixSize>" + PATIENT[0].encode()),
        header[: header.index(b"</patientName>")],
    ]
    sent = [send(header, 10), send(header, n_coefs=4), *map(send, broken)]
    assert all(errors(received) for received in sent[:3])
    with Client(server.port) as named:
        wire.write_config_name(named.channel, "whorl\n2026-01-01T00:00:00Z error event=forged")
        wire.write_header(named.channel, header)
        named.send(scan.readouts())
        named.close()
        received = named.answer()
        assert len(errors(received)) == 1
        assert "is not known" in errors(received)[0]
        texts += received.texts
    lines = server.served.lines()
    assert [
        line.partition(" ")[2].startswith("error event=forged") for line in lines if "forged" in line
    ] == [False]
    for secret in PATIENT:
        assert not any(secret in text for text in (*lines, *texts))
    assert [line for line in lines if not LINE.fullmatch(line)] == []


def test_each_line_of_a_json_log_is_an_object_with_its_scan(strict: Served, scan: Scan) -> None:
    header = with_patient(scan.header)
    before = len(strict.lines())
    assert send_scan(strict.port, header, scan.readouts()).exit_code == 0
    assert send_scan(strict.port, header, scan.readouts(), {"a\nb": "c\r\nd"}).exit_code == 1
    wait_until(lambda: sum('"ends"' in line for line in strict.lines()[before:]) == 2)
    events = [json.loads(line) for line in strict.lines()]
    assert events[0]["event"] == "listening"
    assert all(re.fullmatch("[0-9a-f]{8}", event["scan"]) for event in events[1:])
    scans = {event["scan"] for event in events[before:]}
    assert len(scans) == 2
    for number in scans:
        own = [event for event in events if event.get("scan") == number]
        assert {"begins", "patient", "said", "ends"} <= {event["event"] for event in own}
        (patient,) = (event for event in own if event["event"] == "patient")
        assert (patient["patientName"], patient["patientID"]) == PATIENT


def test_a_warning_of_a_library_is_one_line_of_the_log() -> None:
    code = "from whorl.runtime import logs; logs.configure(20); import warnings; warnings.warn('two\\nlines')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | ENVIRONMENT,
    )
    (line,) = done.stderr.splitlines()
    assert LINE.fullmatch(line)
    assert "two" in line


# --- The spool ----------------------------------------------------------------------------------


def test_a_spool_that_is_full_costs_no_scan(strict: Served, scan: Scan, expected: list, spool: Path) -> None:
    limits = resource.prlimit(strict.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(strict.process.pid, resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        received = send_scan(strict.port, scan.header, scan.readouts())
    finally:
        resource.prlimit(strict.process.pid, resource.RLIMIT_FSIZE, limits)
    (warning,) = [text for text in received.texts if not text.startswith("DBG")]
    assert warning.startswith("WRN the raw stream is not kept any further")
    assert "File too large" in warning
    assert received.problems == []
    assert_same_pixels(received.images, expected)
    wait_until(lambda: '"ends"' in strict.lines()[-1])
    assert json.loads(strict.lines()[-1])["code"] == 0
    assert max(path.stat().st_size for path in spool.iterdir()) >= 1 << 20


def test_the_spool_keeps_the_latest_and_what_is_being_written(
    strict: Served, scan: Scan, expected: list, spool: Path
) -> None:
    readouts = readout_bytes(scan)
    begin = opening(scan)
    with Client(strict.port) as held:
        older = set(spool.iterdir())
        held.raw.sendall(begin + readouts[0])
        wait_until(lambda: len(set(spool.iterdir()) - older) == 1)
        (own,) = set(spool.iterdir()) - older
        for _ in range(4):
            assert_right(send_scan(strict.port, scan.header, scan.readouts()), expected)
        kept = sorted(spool.iterdir())
        assert len(kept) == 3
        assert kept[0] == own
        held.raw.sendall(b"".join(readouts[1:]))
        held.close()
        assert_right(held.answer(), expected)
    stream = begin + b"".join(readouts) + bytes_of(wire.write_close)
    for path in kept:
        wait_until(lambda path=path: path.read_bytes() == stream)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(spool.stat().st_mode) == 0o700


def test_the_spool_is_kept_within_its_size(tmp_path: Path) -> None:
    """When a scan begins, the older ones leave room; one that is being written stays, though it is oldest."""
    warnings: list[str] = []
    held = Spool(tmp_path, "held", 100, 2500, warnings.append)
    held(memoryview(bytes(100)))
    for n in range(5):
        with closing(Spool(tmp_path, f"scan{n}", 100, 2500, warnings.append)) as one:
            older = [path.stat().st_size for path in tmp_path.iterdir()]
            assert sum(older) <= 2500
            one(memoryview(bytes(1000)))
    kept = sorted(path.name.rpartition("-")[2] for path in tmp_path.iterdir())
    assert kept == ["held.mrd", "scan2.mrd", "scan3.mrd", "scan4.mrd"]
    for name in ("too much", "and goes on"):
        held(memoryview(name.encode() * 250))
    held.close()
    (warning,) = warnings
    assert "this scan alone has more than spool_mb" in warning
