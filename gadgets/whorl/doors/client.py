"""An MRD client: streams a file to a server and takes what comes back at the same time."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import ismrmrd

from whorl.doors import files, wire
from whorl.doors.opening import PING
from whorl.doors.transport import Channel, StreamTimeout
from whorl.scan.failure import EndOfStream, ScanError


@dataclass(slots=True)
class Received:
    """What a server sent for one scan.

    Parameters
    ----------
    images
        In the order of their arrival.
    texts
        What the server said; the first three letters are `DBG`, `WRN` or `ERR`.
    problems
        What went wrong on the way, as far as this side sees it.
    n_sent
        Readouts sent.
    """

    images: list[ismrmrd.Image] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    n_sent: int = 0

    @property
    def exit_code(self) -> int:
        """0 all is delivered and complete, 1 nothing is delivered, 3 something is degraded or missing."""
        if all(image.meta.get("whorl_status") == "failed" for image in self.images):
            return 1
        said = any(text.startswith(("ERR", "WRN")) for text in self.texts)
        complete = all(image.meta.get("whorl_status") == "complete" for image in self.images)
        return 3 if said or self.problems or not complete else 0


def ping(host: str = "127.0.0.1", port: int = 9002, timeout_s: float = 5.0) -> str:
    """Ask a whorl server whether it answers, without a scan: what it says.

    Raises
    ------
    ScanError
        If nothing answers in time, it is not whorl, or it is being stopped.
    """
    with _connect(host, port, timeout_s) as connection:
        channel, received = Channel(connection, timeout_s), Received()
        try:
            wire.write_config_name(channel, PING)
            wire.write_close(channel)
        except OSError as error:
            received.problems.append(str(error))
        _receive(channel, received, None, None)
    said = "; ".join((*received.texts, *received.problems)) or "nothing"
    if received.problems or not said.startswith("DBG whorl "):
        raise ScanError(f"what listens at {host}:{port} does not answer as a whorl server: {said}")
    return said.removeprefix("DBG ")


def _connect(host: str, port: int, timeout_s: float) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout=timeout_s)
    except OSError as error:
        raise ScanError(
            f"no MRD server answers at {host}:{port} ({error}): start one with: whorl serve --port {port}"
        ) from error


def send_file(
    path: str | os.PathLike[str],
    host: str = "127.0.0.1",
    port: int = 9002,
    *,
    properties: Mapping[str, object] | None = None,
    config_text: str | bytes | None = None,
    config_name: str = "whorl",
    on_image: Callable[[ismrmrd.Image], None] | None = None,
    on_text: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    timeout_s: float = 1800.0,
) -> Received:
    """Stream an MRD file to a server and collect what it answers, until it closes.

    Parameters
    ----------
    path
        MRD file with a scan.
    host, port
        Of the server.
    properties
        Sent as JSON parameters after the header; they count more than those of the configuration.
    config_text
        A configuration: a whole document, or a bare `<configuration>` with properties.
    config_name
        Name of a configuration that the server has; sent if there is no `config_text`.
    on_image, on_text
        Called for each image and each text as it arrives, from another thread.
    progress
        Called with the readouts sent and the number of them all.
    timeout_s
        Longest silence of the server.

    Raises
    ------
    ScanError
        If the file cannot be read, or there is no server.
    """
    header = files.read_header(path)
    n_readouts = files.count_readouts(path)
    readouts = files.read_readouts(path)
    connection = _connect(host, port, 30.0)
    received = Received()
    failures: list[Exception] = []
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        channel = Channel(connection, timeout_s)
        closed = threading.Event()

        def receive() -> None:
            try:
                _receive(channel, received, on_image, on_text)
            except Exception as error:
                failures.append(error)
            finally:
                closed.set()
                # Nothing more comes back. A sender that still waits for the server is woken by this.
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

        receiver = threading.Thread(target=receive, name="receiver", daemon=True)
        receiver.start()
        try:
            if config_text is None:
                wire.write_config_name(channel, config_name)
            else:
                wire.write_config_text(channel, config_text)
            wire.write_header(channel, header)
            if properties:
                parameters = {name: str(value) for name, value in properties.items()}
                wire.write_text(channel, json.dumps({"version": "1.1.0", "parameters": parameters}))
            try:
                for readout in readouts:
                    if closed.is_set():
                        break
                    wire.write_readout(channel, readout)
                    received.n_sent += 1
                    if progress is not None:
                        progress(received.n_sent, n_readouts)
                wire.write_close(channel)
            except EndOfStream:
                # The server is to see that this is not the end of the scan.
                received.problems.append(f"the scan broke off in its file after {received.n_sent} readouts")
                connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            # The server has left; why, stands in the texts that are still to be read.
            received.problems.append(f"the server stopped reading after {received.n_sent} readouts: {error}")
        receiver.join()
    if failures:
        raise failures[0]
    if received.n_sent < n_readouts and not received.problems:
        received.problems.append(f"the server closed after {received.n_sent} of {n_readouts} readouts")
    return received


def _receive(
    channel: Channel,
    received: Received,
    on_image: Callable[[ismrmrd.Image], None] | None,
    on_text: Callable[[str], None] | None,
) -> None:
    while True:
        try:
            message = wire.read_message(channel, keep_images=True)
        except (EndOfStream, StreamTimeout, wire.ProtocolError) as error:
            received.problems.append(f"the server did not end its answer with CLOSE: {error}")
            return
        if isinstance(message, wire.Close):
            return
        if isinstance(message, wire.ImageMessage):
            received.images.append(message.image)
            if on_image is not None:
                on_image(message.image)
        elif isinstance(message, wire.Text | wire.Error):
            text = message.text if isinstance(message, wire.Text) else f"ERR {message.text}"
            received.texts.append(text)
            if on_text is not None:
                on_text(text)
