"""Plays Gadgetron's part: starts the external of a shipped configuration and streams a scan to it.

It behaves as the server of Gadgetron 4.7 was seen to: only the external's own `<configuration>` is sent,
strings have no NUL, a TEXT is the death of the stream, an ERROR counts only after our CLOSE.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ismrmrd

import whorl
from whorl.doors import wire
from whorl.doors.transport import Channel, StreamTimeout
from whorl.scan.failure import EndOfStream
from whorl.scan.readout import Readout

CONFIG_XML = Path(__file__).parents[2] / "config_xml"


@dataclass
class Conversation:
    """What came back from the external."""

    ids: list[int] = field(default_factory=list)
    images: list[ismrmrd.Image] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    early_errors: list[str] = field(default_factory=list)
    ended: str = ""
    after_close: bytes = b""
    exit_code: int | None = None
    output: str = ""


def external(name: str, properties: Mapping[str, str] | None = None) -> tuple[ET.Element, bytes]:
    """The node that says where the external is, and the configuration that Gadgetron sends it."""
    root = ET.parse(CONFIG_XML / f"{name}.xml").getroot()
    node = root.find("./stream/external")
    assert node is not None
    configuration = node.find("configuration")
    assert configuration is not None
    for key, value in (properties or {}).items():
        ET.SubElement(configuration, "property", name=key, value=value)
    return node, ET.tostring(configuration)


def send_messages(channel: Channel, messages: Iterable[Readout | bytes]) -> None:
    """Send readouts, and whatever else as it is."""
    for message in messages:
        if isinstance(message, bytes):
            channel.write(message)
        else:
            wire.write_readout(channel, message)


def talk(
    connection: socket.socket,
    config: bytes,
    header: bytes,
    readouts: Iterable[Readout | bytes],
    *,
    close: bool,
    wait_s: float,
) -> Conversation:
    """Stream a scan as Gadgetron does and record the answer, until CLOSE or what kills the stream."""
    said = Conversation()
    channel = Channel(connection, wait_s)
    closed = threading.Event()

    def send() -> None:
        try:
            wire.write_config_text(channel, config, terminate=False)
            wire.write_header(channel, header, terminate=False)
            send_messages(channel, readouts)
            # Set before, for the answer may be here before the next line runs.
            closed.set()
            if close:
                wire.write_close(channel)
            else:
                connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            said.ended = f"sending failed: {error}"

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        while not said.ended:
            (message_id,) = struct.unpack("<H", channel.read(2, "a message id"))
            said.ids.append(message_id)
            if message_id == wire.CLOSE:
                said.ended = "close"
            elif message_id == wire.IMAGE:
                message = wire._read_image(channel, keep=True)
                assert isinstance(message, wire.ImageMessage)
                said.images.append(message.image)
            elif message_id == wire.ERROR:
                text = wire._read_string(channel, "an error", 1 << 20, struct.Struct("<Q")).decode()
                (said.errors if closed.is_set() else said.early_errors).append(text)
            else:
                said.ended = f"Received illegal message id from external peer: {message_id}"
    except EndOfStream as error:
        said.ended = f"the external died: {error}"
    except StreamTimeout as error:
        said.ended = f"the external hangs: {error}"
    sender.join(wait_s)
    if said.ended == "close":
        connection.settimeout(wait_s)
        said.after_close = b"".join(iter(lambda: connection.recv(65536), b""))
    return said


def run_external(
    header: bytes,
    readouts: Iterable[Readout | bytes],
    *,
    properties: Mapping[str, str] | None = None,
    close: bool = True,
    vanish: bool = False,
    wait_s: float = 60.0,
    first_on_path: Path | None = None,
    started: Callable[[subprocess.Popen[str]], object] = lambda process: None,
) -> Conversation:
    """Start the external of `whorl.xml` as a process and stream a scan to it.

    `close=False` ends the stream without CLOSE; `vanish` drops the connection after the readouts.
    Modules in `first_on_path` hide those that are installed; `started` is given the process.
    """
    node, config = external("whorl", properties)
    execute = node.find("execute")
    assert execute is not None
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(wait_s)
        port = str(listener.getsockname()[1])
        command = [sys.executable, "-m", "gadgetron", port, execute.attrib["name"], execute.attrib["target"]]
        folders = [str(first_on_path)] * (first_on_path is not None) + [str(Path(whorl.__file__).parents[1])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process:
            started(process)
            try:
                connection, _ = listener.accept()
                with connection:
                    if vanish:
                        channel = Channel(connection, wait_s)
                        wire.write_config_text(channel, config, terminate=False)
                        wire.write_header(channel, header, terminate=False)
                        send_messages(channel, readouts)
                        said = Conversation(ended="vanished")
                    else:
                        said = talk(connection, config, header, readouts, close=close, wait_s=wait_s)
                said.output, _ = process.communicate(timeout=wait_s)
                said.exit_code = process.returncode
            finally:
                process.kill()
    return said
