"""One scan over one channel: what is expected of the sender, and how the receiver is told what happened.

The order is configuration (a name or a text), header, optionally one TEXT with JSON parameters
(FIRE), readouts and waveforms, CLOSE. Whoever is at the other end wants failures in his own way:

* Gadgetron takes a TEXT for a broken stream, and an ERROR only after its CLOSE was read. What is said
  during the scan goes to the log; a failure is an ERROR between its CLOSE and ours.
* MRD clients and FIRE abort at an ERROR. Here TEXT is the log, its first three letters are the level;
  a failure is sent at once, the rest of the scan is read past, and CLOSE always comes at the end.

Everything that differs between the two is in this module.
"""

from __future__ import annotations

import logging
import re
import sysconfig
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Protocol

import ismrmrd

from whorl.config import Settings, SettingsError, properties_from_json, properties_from_xml
from whorl.doors import wire
from whorl.scan.failure import EndOfStream, ScanError
from whorl.scan.readout import Readout

logger = logging.getLogger("whorl")

#: After a failure the rest of the scan is read past for at most so long.
DRAIN_S = 1800.0
#: After our last message a peer has so long to read it and close; see `Channel.linger`.
LINGER_S = 10.0
#: Letters of one text; operators read sentences.
MAX_TEXT = 4000
#: DBG texts that are sent for one scan; all of them go to the log.
MAX_DEBUG_TEXTS = 40
_LEVELS = {"DBG": logging.INFO, "WRN": logging.WARNING, "ERR": logging.ERROR}


class Outcome(Protocol):
    """What a reconstruction returns; `whorl.pipeline.Outcome` is one."""

    @property
    def delivered(self) -> int:
        """Images sent."""

    @property
    def failures(self) -> tuple[str, ...]:
        """What was not delivered."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What is degraded, or a fall-back."""

    @property
    def exit_code(self) -> int:
        """0, 1 or 3."""


Log = Callable[[str, str], None]
Reconstruct = Callable[[bytes, Iterable[Readout], Settings, Callable[[ismrmrd.Image], None], Log], Outcome]


@dataclass(frozen=True, slots=True)
class Opening:
    """What a sender says before its readouts, as it came.

    Parameters
    ----------
    name
        Name of a configuration, or None.
    config
        Text of a configuration, or None.
    header
        MRD header.
    gadgetron
        Whether the sender speaks as Gadgetron does to an external.
    """

    name: str | None
    config: bytes | None
    header: bytes
    gadgetron: bool


def read_opening(channel: wire.Channel) -> Opening:
    """Read configuration and header. A stream that begins with the header has no configuration.

    Raises
    ------
    ProtocolError
        If something else comes first.
    EndOfStream, StreamTimeout
        If the header does not come.
    """
    name: str | None = None
    config: bytes | None = None
    while True:
        message = wire.read_message(channel)
        if isinstance(message, wire.ConfigName):
            name = message.name
        elif isinstance(message, wire.ConfigText):
            config = message.text
        elif isinstance(message, wire.HeaderText):
            gadgetron = name is None and config is not None and is_gadgetron(config, message.xml)
            return Opening(name, config, message.xml, gadgetron)
        else:
            raise wire.ProtocolError(
                f"{type(message).__name__.lower()} came before the header: "
                f"expected configuration, header, readouts"
            )


def is_gadgetron(config: bytes, header: bytes) -> bool:
    """Whether the sender is Gadgetron speaking to an external, as through its `<connect>`.

    Nothing in the protocol says so; two habits together do. Gadgetron's core writes strings without a
    NUL, its C++ client, FIRE and the client of python-ismrmrd-server with one. And Gadgetron sends
    only the external's own `<configuration>`, where others send a whole document with `<version>`,
    `<readers>` and `<stream>`.
    """
    if config.endswith(b"\0") or header.endswith(b"\0"):
        return False
    if _is_empty(config):
        return True
    if b"<!DOCTYPE" in config:
        return False
    try:
        root = ET.fromstring(config)
    except (ET.ParseError, ValueError, LookupError):  # the latter two for an encoding that is not known
        return False
    tags = {child.tag for child in root}
    return root.tag == "configuration" and tags.isdisjoint({"stream", "readers", "version"})


def _is_empty(config: bytes) -> bool:
    # Gadgetron sends an empty document, perhaps with its declaration, if the external has no configuration.
    return re.fullmatch(rb"\s*(<\?xml[^>]*\?>)?\s*", config.rstrip(b"\0")) is not None


def configurations() -> dict[str, Path]:
    """The configurations that may be asked for by name: those installed for Gadgetron, by file stem."""
    folders = (
        Path(sysconfig.get_path("data")) / "share" / "gadgetron" / "config",
        Path(__file__).parents[3] / "config_xml",  # a source tree that is not installed
    )
    return {path.stem: path for folder in reversed(folders) for path in sorted(folder.glob("whorl*.xml"))}


def _named_properties(name: str) -> dict[str, str]:
    known = configurations()
    # The name is compared, never joined to a path.
    path = known.get(name.removesuffix(".xml"))
    if path is None:
        names = ", ".join(sorted(known))
        raise SettingsError(f'configuration "{name[:80]}" is not known: expected one of {names}')
    return properties_from_xml(path.read_bytes())


def _settings(opening: Opening, parameters: str, defaults: Mapping[str, object], paths: bool) -> Settings:
    own = dict(defaults)
    if opening.name is not None:
        own.update(_named_properties(opening.name))
    sent: dict[str, object] = {}
    if opening.config is not None and not _is_empty(opening.config):
        sent.update(properties_from_xml(opening.config))
    if parameters:
        sent.update(properties_from_json(parameters))
    if not paths:
        # Files that the operator of this program named are fine, those that came over the network are not.
        files = {f.name for f in fields(Settings) if f.metadata["path"]}
        Settings.from_properties({k: v for k, v in own.items() if k not in files} | sent, paths=False)
    return Settings.from_properties(own | sent)


class _Receiver:
    """The other end as a receiver: images, what is logged and what failed, in its dialect. Thread-safe."""

    def __init__(self, channel: wire.Channel, gadgetron: bool, label: str) -> None:
        self._channel = channel
        self._gadgetron = gadgetron
        self._label = label
        self._said: set[str] = set()
        self._n_debug = 0
        self.failures: list[str] = []
        self.gone = False

    def image(self, image: ismrmrd.Image) -> None:
        try:
            wire.write_image(self._channel, image)
        except OSError as error:
            self.gone = True
            raise ConnectionError(f"the receiver does not take images any more: {error}") from error

    def log(self, level: str, text: str) -> None:
        text = text[:MAX_TEXT]
        logger.log(_LEVELS.get(level, logging.ERROR), "%s%s", self._label, text)
        if level == "DBG":
            self._n_debug += 1
        elif text in self._said:
            return
        else:
            self._said.add(text)
        if self._gadgetron:
            if level == "ERR":
                self.failures.append(text)
        elif level != "DBG" or self._n_debug <= MAX_DEBUG_TEXTS:
            self._send(lambda: wire.write_text(self._channel, f"{level} {text}"))

    def finish(self, send_close: bool) -> None:
        if self._gadgetron and self.failures:
            text = "whorl: " + "; ".join(self.failures)
            self._send(lambda: wire.write_error(self._channel, text[:MAX_TEXT]))
        if send_close:
            self._send(lambda: wire.write_close(self._channel))

    def _send(self, send: Callable[[], None]) -> None:
        if self.gone:
            return
        try:
            send()
        except OSError as error:
            self.gone = True
            logger.warning("%sthe receiver is gone: %s", self._label, error)


class _Source:
    """The other end as a sender: its readouts until CLOSE, and whether CLOSE came."""

    def __init__(self, channel: wire.Channel) -> None:
        self._channel = channel
        self._first: wire.Message | None = None
        self._parameters = ""
        self.ended: Literal["", "close", "early", "violation"] = ""
        self.passed: dict[str, int] = {}

    def _read(self) -> wire.Message:
        try:
            return wire.read_message(self._channel)
        except wire.ProtocolError:
            self.ended = "violation"
            raise
        except (EndOfStream, wire.StreamTimeout):
            self.ended = "early"
            raise

    def parameters(self) -> str:
        """The text that may follow the header.

        This waits for the next message, whatever it is: had the reconstruction begun before, it
        might have begun with the wrong parameters.
        """
        message = self._read()
        if isinstance(message, wire.Text):
            return message.text
        self._first = message
        return ""

    def readouts(self) -> Iterator[Readout]:
        """All readouts until CLOSE; `EndOfStream` for whatever ends the stream otherwise."""
        try:
            while True:
                message, self._first = self._first or self._read(), None
                if isinstance(message, Readout):
                    yield message
                elif isinstance(message, wire.Close):
                    self.ended = "close"
                    return
                elif isinstance(message, wire.Skipped):
                    if message.kind != "waveform":
                        self._pass(message.kind)
                elif isinstance(message, wire.Text):
                    self._pass("text")
                elif isinstance(message, wire.Error):
                    self.ended = "early"
                    raise EndOfStream(
                        f"the sender failed after {self._channel.n_readouts} readouts: {message.text}"
                    )
                else:
                    self.ended = "violation"
                    raise EndOfStream(f"a second opening came after {self._channel.n_readouts} readouts")
        except (wire.ProtocolError, wire.StreamTimeout) as error:
            raise EndOfStream(str(error)) from error

    def _pass(self, kind: str) -> None:
        self.passed[kind] = self.passed.get(kind, 0) + 1

    def drain(self) -> None:
        """Read past what is left of the scan, within `DRAIN_S`."""
        if self.ended:
            return
        self._channel.limit_time(DRAIN_S)
        try:
            for _ in self.readouts():
                pass
        except EndOfStream as error:
            logger.info("while reading past the rest of a scan: %s", error)
        self._channel.limit_time(None)


def run_scan(
    channel: wire.Channel,
    opening: Opening,
    *,
    reconstruct: Reconstruct,
    defaults: Mapping[str, object] | None = None,
    paths: bool = False,
    send_close: bool = True,
    label: str = "",
) -> int:
    """Read one scan, reconstruct it and answer, until everything is said. Failures are told, never raised.

    Parameters
    ----------
    channel
        Both directions.
    opening
        What was read of it already.
    reconstruct
        `whorl.pipeline.reconstruct_scan`.
    defaults
        Properties of the operator; what the sender sets counts more.
    paths
        Whether the sender may set properties that name files; not if it is at the other end of a network.
    send_close
        Whether CLOSE is sent at the end, or by somebody else.
    label
        Put before each line of the log.

    Returns
    -------
    int
        0 all maps delivered, 1 nothing delivered, 3 something is degraded or missing.
    """
    receiver = _Receiver(channel, opening.gadgetron, label)
    source = _Source(channel)
    code = 1
    try:
        parameters = "" if opening.gadgetron else source.parameters()
        settings = _settings(opening, parameters, defaults or {}, paths)
        # ICE and C++ clients count the NUL as a part of the header, XML readers do not.
        header = opening.header.rstrip(b"\0")
        outcome = reconstruct(header, source.readouts(), settings, receiver.image, receiver.log)
        for text in outcome.failures:
            receiver.log("ERR", text)
        for text in outcome.notes:
            receiver.log("WRN", text)
        code = outcome.exit_code
    except (ScanError, SettingsError, EndOfStream, wire.ProtocolError, wire.StreamTimeout) as error:
        receiver.log("ERR", str(error))
    except Exception as error:
        if receiver.gone:
            logger.warning("%sgiven up: %s", label, error)
        else:
            logger.exception("%sinternal error", label)
            receiver.log("ERR", f"internal error: {type(error).__name__}: {error}")
    source.drain()
    if source.passed:
        counts = ", ".join(f"{n} × {kind}" for kind, n in source.passed.items())
        receiver.log("WRN", f"messages that are no readouts were ignored: {counts}")
        code = code or 3
    receiver.finish(send_close)
    if receiver.gone:
        code = 1
    elif receiver.failures:
        code = code or 3
    return code


def refuse(channel: wire.Channel, opening: Opening | None, text: str) -> None:
    """Tell a sender why its scan is not taken, read past what it sends, and close.

    Without an `opening` the stream cannot be read past message by message; then it is discarded as bytes.
    """
    receiver = _Receiver(channel, opening is not None and opening.gadgetron, "")
    receiver.log("ERR", text)
    if opening is not None:
        source = _Source(channel)
        source.drain()
    receiver.finish(send_close=True)
    channel.linger(LINGER_S)
