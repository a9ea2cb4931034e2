"""Whatever goes wrong with a scan, each receiver is told in the way in which he listens.

The same streams go to Gadgetron (to which this program is an external, started as a process from the shipped
configuration, or reached through `<connect>`), to an MRD client, through pipes and into a file.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import ismrmrd
import numpy as np
import pytest
from click.testing import CliRunner

import whorl
from doors.gadgetron_parent import Conversation, external, run_external, send_messages, talk
from doors.messages import bytes_of, make_waveform, served
from doors.test_gadget import FULL_HEADER
from scan_edit import QUANTITIES, Scan
from whorl.cli import main
from whorl.doors import files, pipes, wire
from whorl.doors.transport import Channel, Pipes
from whorl.maps.status import SERIES
from whorl.pipeline.scan import reconstruct_scan
from whorl.scan.failure import EndOfStream
from whorl.scan.readout import Readout

WAIT_S = 60.0
FAST = {"method": "lowrank"}
#: Of the tiny scan come four noise readouts first, then 120 timepoints.
HALF, NEARLY_ALL = 64, 4 + 116

Messages = list[Readout | bytes]


def opening(scan: Scan) -> bytes:
    return bytes_of(
        lambda channel: wire.write_config_text(channel, b"<configuration/>", terminate=False),
        lambda channel: wire.write_header(channel, scan.header, terminate=False),
    )


def not_finite(scan: Scan) -> Messages:
    for data in scan.data:
        data[:] = np.nan
    return list(scan.readouts())


def second_slice_not_finite(scan: Scan) -> Messages:
    scan.two_slices()
    for data in scan.data[4 + 120 + 10 :]:
        data[:] = np.nan
    return list(scan.readouts())


def second_slice_in_partitions(scan: Scan) -> Messages:
    scan.two_slices()
    scan.heads["idx"]["kspace_encode_step_2"][scan.imaging[150:]] = 1
    return list(scan.readouts())


def put(scan: Scan, place: int, *messages: bytes) -> Messages:
    """The scan with other messages in between."""
    readouts: Messages = list(scan.readouts())
    return [*readouts[:place], *messages, *readouts[place:]]


TEXT = struct.pack("<HI", wire.TEXT, 6) + b"hello\0"
UNKNOWN = struct.pack("<H", 4711)


@dataclass(frozen=True)
class Kind:
    """A stream, and what must come of it: a part of the error, images, exit code."""

    says: str
    messages: Callable[[Scan], Messages] = lambda scan: list(scan.readouts())
    n_images: int = 0
    code: int = 1
    properties: Mapping[str, str] = field(default_factory=dict)
    header: bytes = b""
    close: bool = True

    def of(self, scan: Scan) -> tuple[bytes, Messages]:
        """Header and messages; the messages first, for they may change the header."""
        messages = self.messages(scan)
        return self.header or scan.header, messages


KINDS = {
    "unknown property": Kind(
        'unknown property "n_coefs", did you mean "n_coefficients"?', properties={"n_coefs": "5"}
    ),
    "no readouts": Kind("no imaging readouts arrived", lambda scan: []),
    # So does a scan end whose sender died behind Gadgetron: with a CLOSE like any other.
    "too few readouts": Kind("60 of 120 timepoints arrived", lambda scan: list(scan.readouts())[:HALF]),
    "header that is no header": Kind("encoding", header=FULL_HEADER),
    "unknown message id": Kind(
        "message id 4711 after 64 readouts is not known", lambda scan: put(scan, HALF, UNKNOWN)
    ),
    "EOF without CLOSE": Kind(
        "ended before CLOSE, after 64 readouts", lambda scan: list(scan.readouts())[:HALF], close=False
    ),
    "NaN everywhere": Kind("not finite", not_finite),
    "a second opening": Kind(
        "a second opening came after 64 readouts", lambda scan: put(scan, HALF, opening(scan))
    ),
    "unknown message id near the end": Kind(
        "message id 4711 after 120 readouts", lambda scan: put(scan, NEARLY_ALL, UNKNOWN), 4, 3
    ),
    "EOF near the end": Kind(
        "before CLOSE, after 120 readouts", lambda scan: list(scan.readouts())[:NEARLY_ALL], 4, 3, close=False
    ),
    "a slice that fails": Kind("slice 1 failed", second_slice_not_finite, 4, 3),
    # What was sent must not be lost although the rest of the scan is still to come.
    "a scan that stops after a slice": Kind("kspace_encode_step_2", second_slice_in_partitions, 4, 3),
    "TEXT from the sender": Kind("", lambda scan: put(scan, HALF, TEXT, TEXT), 4, 3),
    "waveforms": Kind("", lambda scan: put(scan, HALF, make_waveform(), make_waveform()), 4, 0),
}


@dataclass
class Told:
    """What a receiver got; the exit code is that of the process behind it, if there is one for the scan."""

    images: list[ismrmrd.Image] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    code: int | None = None


# --- One function for each receiver ------------------------------------------------------------------


def config_of(properties: Mapping[str, str]) -> bytes:
    _, config = external("whorl", {**FAST, **properties})
    return config


def stream_of(kind: Kind, scan: Scan, *, terminate: bool) -> bytes:
    """The whole stream as it is sent by others than Gadgetron."""
    header, messages = kind.of(scan)
    return bytes_of(
        lambda channel: wire.write_config_text(channel, config_of(kind.properties), terminate=terminate),
        lambda channel: wire.write_header(channel, header, terminate=terminate),
        lambda channel: send_messages(channel, messages),
        *([wire.write_close] if kind.close else []),
    )


def checked(said: Conversation) -> Told:
    """What Gadgetron was told, in the only way in which it listens."""
    assert said.ended == "close", (said.ended, said.output)
    # Never a TEXT, nor anything else that kills its stream.
    assert set(said.ids) <= {wire.IMAGE, wire.ERROR, wire.CLOSE}
    assert said.early_errors == []
    # All failures in one ERROR, right before the one CLOSE, after all images.
    n_images = len(said.images)
    assert said.ids == [wire.IMAGE] * n_images + [wire.ERROR] * len(said.errors) + [wire.CLOSE]
    assert len(said.errors) <= 1
    assert said.after_close == b""
    return Told(said.images, said.errors, said.exit_code)


def through_the_external(kind: Kind, scan: Scan) -> Told:
    said = run_external(
        *kind.of(scan),
        properties={**FAST, **kind.properties},
        close=kind.close,
        wait_s=WAIT_S,
    )
    # An operator does not read tracebacks of what is wrong with his scan.
    assert "Traceback" not in said.output
    return checked(said)


def through_connect(kind: Kind, scan: Scan, port: int) -> Told:
    with socket.create_connection(("localhost", port), WAIT_S) as connection:
        return checked(
            talk(connection, config_of(kind.properties), *kind.of(scan), close=kind.close, wait_s=WAIT_S)
        )


def read_answer(channel: Channel) -> Told:
    """What an MRD client was told until CLOSE, and nothing after it."""
    told = Told()
    while not isinstance(message := wire.read_message(channel, keep_images=True), wire.Close):
        if isinstance(message, wire.ImageMessage):
            told.images.append(message.image)
        else:
            # Never an ERROR: clients abort at one.
            assert isinstance(message, wire.Text), message
            level, text = message.text.split(" ", 1)
            assert level in ("DBG", "WRN", "ERR")
            if level == "ERR":
                told.errors.append(text)
    with pytest.raises(EndOfStream):
        wire.read_message(channel)
    return told


def to_a_client(kind: Kind, scan: Scan, port: int) -> Told:
    stream = stream_of(kind, scan, terminate=True)
    with socket.create_connection(("127.0.0.1", port), WAIT_S) as connection:

        def send() -> None:
            connection.sendall(stream)
            if not kind.close:
                connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        told = read_answer(Channel(connection, WAIT_S))
        # The rest of the scan was read past, so that nothing is left to be sent.
        sender.join(WAIT_S)
        assert not sender.is_alive()
    return told


def read_output(output: bytes, path: Path) -> list[ismrmrd.Image]:
    """Images of an MRD stream behind a pipe: header, images, CLOSE; or nothing at all."""
    if not output:
        return []
    path.write_bytes(output)
    images = []
    with path.open("rb") as file:
        channel = Channel(Pipes(file.fileno()))
        assert isinstance(wire.read_message(channel), wire.HeaderText)
        while not isinstance(message := wire.read_message(channel, keep_images=True), wire.Close):
            assert isinstance(message, wire.ImageMessage)
            images.append(message.image)
        assert file.read() == b""
    return images


def through_pipes(kind: Kind, scan: Scan, folder: Path) -> Told:
    """`whorl stream`, but in this process, where everything is imported already."""
    told, output = Told(), bytearray()
    source, feed = os.pipe()
    drain, target = os.pipe()
    stream = stream_of(kind, scan, terminate=False)

    def send() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(feed, "wb") as file:
            file.write(stream)

    def receive() -> None:
        with os.fdopen(drain, "rb") as file:
            output.extend(file.read())

    threads = [threading.Thread(target=work, daemon=True) for work in (send, receive)]
    for thread in threads:
        thread.start()
    try:
        told.code = pipes.run(
            source,
            target,
            {},
            reconstruct_scan,
            lambda level, text: told.errors.append(text) if level == "ERR" else None,
        )
    finally:
        os.close(source)
        os.close(target)
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    told.images = read_output(bytes(output), folder / "output.mrd")
    return told


def errors_of(stderr: str) -> list[str]:
    return re.findall(r"^ERR (.*)$", stderr, flags=re.MULTILINE)


def into_a_file(kind: Kind, scan: Scan, folder: Path) -> Told:
    recorded, target = folder / "recorded.mrd", folder / "maps.h5"
    recorded.write_bytes(stream_of(kind, scan, terminate=True))
    result = CliRunner().invoke(main, ["replay", str(recorded), "-o", str(target)])
    assert isinstance(result.exception, SystemExit | None), result.exception
    images = files.read_images(target) if target.exists() else []
    return Told(images, errors_of(result.output), result.exit_code)


@pytest.fixture(autouse=True)
def _soon_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sends what cannot be read is waited for less long here; the external waits as it does."""
    monkeypatch.setattr("whorl.doors.sources.QUIET_S", 0.5)


RECEIVERS = ("external", "connect", "client", "pipes", "file")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served(reconstruct_scan) as server:
        yield server.port


@pytest.fixture(scope="module")
def externals(request: pytest.FixtureRequest, loaded_scan: Scan) -> Iterator[dict[str, Future[Told]]]:
    """What the external did with each kind that is asked for; several at once, for each has to start."""
    asked = {
        item.callspec.params["kind"]
        for item in request.session.items
        if item.name.startswith("test_each_failure") and item.callspec.params["receiver"] == "external"
    }
    with ThreadPoolExecutor(3) as pool:
        yield {
            name: pool.submit(through_the_external, kind, loaded_scan.copy())
            for name, kind in KINDS.items()
            if name in asked
        }


# --- Each failure, told to each receiver -------------------------------------------------------------


def send(receiver: str, kind: Kind, scan: Scan, port: int, folder: Path) -> Told:
    if receiver == "external":
        return through_the_external(kind, scan)
    if receiver == "connect":
        return through_connect(kind, scan, port)
    if receiver == "client":
        return to_a_client(kind, scan, port)
    return (through_pipes if receiver == "pipes" else into_a_file)(kind, scan, folder)


def assert_told(told: Told, kind: Kind) -> None:
    if kind.says:
        assert any(kind.says in text for text in told.errors), told.errors
        assert not any("internal error" in text for text in told.errors)
    else:
        assert told.errors == []
    roles = [image.meta["GADGETRON_DataRole"] for image in told.images]
    assert roles == list(QUANTITIES)[: kind.n_images]
    assert told.code in (None, kind.code)


@pytest.mark.parametrize("receiver", RECEIVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_failure_is_told_to_each_receiver(
    kind: str,
    receiver: str,
    scan: Scan,
    port: int,
    externals: dict[str, Future[Told]],
    tmp_path: Path,
) -> None:
    if receiver == "external":
        told = externals[kind].result(4 * WAIT_S)
        assert told.code == KINDS[kind].code
    else:
        told = send(receiver, KINDS[kind], scan, port, tmp_path)
    assert_told(told, KINDS[kind])


@pytest.mark.parametrize("name", ["EOF without CLOSE", "a slice that fails"])
def test_whorl_stream_as_a_process(name: str, scan: Scan, tmp_path: Path) -> None:
    kind = KINDS[name]
    done = subprocess.run(
        [sys.executable, "-m", "whorl", "stream"],
        input=stream_of(kind, scan, terminate=False),
        capture_output=True,
        timeout=WAIT_S,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(whorl.__file__).parents[1])},
    )
    stderr = done.stderr.decode()
    assert "Traceback" not in stderr
    assert_told(Told(read_output(done.stdout, tmp_path / "o"), errors_of(stderr), done.returncode), kind)


# --- The reconstruction itself fails -----------------------------------------------------------------


def broken(folder: Path, module: str) -> Path:
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(f"raise RuntimeError('{module} is broken')\n")
    return folder


@pytest.mark.parametrize(
    ("module", "says"),
    [("torch", "internal error: RuntimeError: torch is broken"), ("finufft", "slice 0 failed: finufft is")],
)
def test_the_external_raises(module: str, says: str, scan: Scan, tmp_path: Path) -> None:
    """Never a CLOSE without a word, which would look like an empty result."""
    said = run_external(
        scan.header,
        scan.readouts(),
        properties={**FAST, "nufft": "finufft"},
        first_on_path=broken(tmp_path, module),
    )
    told = checked(said)
    assert says in told.errors[0]
    assert (told.images, told.code) == ([], 1)
    # This is nothing that an operator can mend: whoever does needs the place.
    assert f"{module} is broken" in said.output
    assert "Traceback" in said.output


def test_a_status_image_that_cannot_be_drawn_hides_no_failure(scan: Scan, tmp_path: Path) -> None:
    said = run_external(
        scan.header,
        scan.readouts(),
        properties={"n_coefs": "5", "error_image": "true"},
        first_on_path=broken(tmp_path, "PIL"),
    )
    told = checked(said)
    assert 'unknown property "n_coefs"' in told.errors[0]
    assert (told.images, told.code) == ([], 1)


def test_the_external_dies(scan: Scan) -> None:
    """Gadgetron sees the death, and the external of the next scan knows nothing of it."""
    processes: list[subprocess.Popen[str]] = []

    def readouts() -> Iterator[Readout]:
        for n, readout in enumerate(scan.readouts()):
            if n == 20:
                processes[0].kill()
                processes[0].wait(WAIT_S)
            yield readout

    said = run_external(scan.header, readouts(), properties=FAST, started=processes.append)
    assert said.ended.startswith(("the external died", "sending failed")), said.ended
    assert (said.ids, said.exit_code) == ([], -9)
    after = checked(run_external(scan.header, scan.readouts(), properties=FAST))
    assert (len(after.images), after.errors, after.code) == (4, [], 0)


# --- When it is told ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("unknown property", "external"),
        ("unknown property", "connect"),
        ("a second opening", "connect"),
        ("unknown message id", "connect"),
    ],
)
def test_gadgetron_is_told_nothing_while_it_sends(name: str, way: str, scan: Scan, port: int) -> None:
    """The failure is known after the first readouts, the others are slow."""
    kind = KINDS[name]
    rest = list(scan.readouts())[:40]
    first: Messages = [UNKNOWN] if name == "unknown message id" else [opening(scan)]

    def slowly() -> Iterator[Readout | bytes]:
        yield from first if name != "unknown property" else []
        for readout in rest:
            time.sleep(0.04)
            yield readout

    if way == "external":
        said = run_external(scan.header, slowly(), properties={**FAST, **kind.properties})
    else:
        with socket.create_connection(("localhost", port), WAIT_S) as connection:
            config = config_of(kind.properties)
            said = talk(connection, config, scan.header, slowly(), close=True, wait_s=WAIT_S)
    # `checked` looks for errors that came before CLOSE was sent.
    (error,) = checked(said).errors
    assert kind.says.split(" after")[0].split("came")[0] in error


@pytest.mark.parametrize(
    "name", ["unknown property", "header that is no header", "unknown message id", "a second opening"]
)
def test_a_client_is_told_at_once(name: str, scan: Scan, port: int) -> None:
    kind = KINDS[name]
    with socket.create_connection(("127.0.0.1", port), WAIT_S) as connection:
        channel = Channel(connection, WAIT_S)
        wire.write_config_text(channel, config_of(kind.properties))
        wire.write_header(channel, kind.header or scan.header)
        send_messages(channel, kind.messages(scan)[: HALF + 1])
        # No CLOSE was sent, yet the reason is here.
        while (message := wire.read_message(channel)) and isinstance(message, wire.Text):
            if message.text.startswith("ERR"):
                break
        assert isinstance(message, wire.Text)
        assert kind.says in message.text
        send_messages(channel, scan.readouts())
        wire.write_close(channel)
        assert read_answer(channel).images == []


def test_all_failures_are_in_the_one_error(scan: Scan, port: int) -> None:
    kind = Kind("", second_slice_not_finite, close=False)
    (error,) = through_connect(kind, scan, port).errors
    assert error.startswith("whorl: ")
    assert "slice 1 failed" in error
    assert "; the stream ended early" in error


# --- A status image ----------------------------------------------------------------------------------

WITHOUT_MAPS = ["unknown property", "no readouts", "header that is no header", "EOF without CLOSE"]


def with_error_image(kind: Kind) -> Kind:
    return Kind(
        kind.says,
        kind.messages,
        kind.n_images,
        kind.code,
        {**kind.properties, "error_image": "true"},
        kind.header,
        kind.close,
    )


# Through the external two tell enough: it is as through connect, but each costs seconds.
@pytest.mark.parametrize(
    ("name", "receiver"),
    [
        (name, receiver)
        for name in WITHOUT_MAPS
        for receiver in RECEIVERS
        if receiver != "external" or name in ("unknown property", "header that is no header")
    ],
)
def test_a_status_image_if_there_are_no_maps(
    name: str, receiver: str, scan: Scan, port: int, tmp_path: Path
) -> None:
    kind = with_error_image(KINDS[name])
    told = send(receiver, kind, scan, port, tmp_path)
    (image,) = told.images
    assert image.image_series_index == SERIES
    assert image.meta["whorl_status"] == "failed"
    assert kind.says.replace('"', "")[:20] in image.meta["ImageComments"].replace('"', "")
    assert image.data.any()
    # It is no result.
    assert any(kind.says in text for text in told.errors)
    assert told.code in (None, 1)


@pytest.mark.parametrize("receiver", ["connect", "client", "pipes", "file"])
def test_no_status_image_beside_maps(receiver: str, scan: Scan, port: int, tmp_path: Path) -> None:
    kind = with_error_image(KINDS["a slice that fails"])
    assert_told(send(receiver, kind, scan, port, tmp_path), kind)
