"""One scan from beginning to end: its settings, the reconstruction, and what the receiver is told.

A stream is configuration (a name or a text), header, optionally one TEXT with JSON parameters (FIRE),
readouts and waveforms, CLOSE. How its sender speaks is told in `opening`, where the readouts come from in
`sources`, how the other end is spoken to in `receivers`; here they are all the same.
"""

from __future__ import annotations

import logging
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import ismrmrd

from whorl.config import (
    LOCAL,
    Settings,
    SettingsError,
    properties_from_json,
    properties_from_xml,
)
from whorl.doors import wire
from whorl.doors.opening import Opening, is_empty
from whorl.doors.receivers import Gadgetron, Mrd2Reader, MrdClient, Receiver
from whorl.doors.sources import Source, StreamSource
from whorl.doors.spool import Spool
from whorl.doors.transport import Channel, StreamTimeout
from whorl.runtime.logs import current_scan, event
from whorl.scan.failure import EndOfStream, ScanError
from whorl.scan.readout import Readout

logger = logging.getLogger("whorl")

#: After our last message a peer has so long to read it and close; see `Channel.linger`.
LINGER_S = 10.0
#: Scanners with OpenRecon ask for this configuration, whatever the package is called.
_ALIASES = {"openrecon": "whorl"}
_LEVELS = {"DBG": logging.INFO, "WRN": logging.WARNING, "ERR": logging.ERROR}


class Outcome(Protocol):
    """What a reconstruction returns; `whorl.pipeline.scan.Outcome` is one."""

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


def configurations() -> dict[str, Path]:
    """The configurations that may be asked for by name: those installed for Gadgetron, by file stem."""
    folders = (
        Path(sysconfig.get_path("data")) / "share" / "gadgetron" / "config",
        Path(__file__).parents[3] / "config_xml",  # a source tree that is not installed
    )
    return {path.stem: path for folder in reversed(folders) for path in sorted(folder.glob("whorl*.xml"))}


def _named_properties(name: str | None) -> dict[str, str]:
    if name is None:
        return {}
    known = configurations()
    stem = name.removesuffix(".xml")
    # The name is compared, never joined to a path.
    path = known.get(_ALIASES.get(stem, stem))
    if path is None:
        names = ", ".join(sorted(known.keys() | _ALIASES))
        raise SettingsError(f'configuration "{name[:80]}" is not known: expected one of {names}')
    return properties_from_xml(path.read_bytes())


@dataclass(frozen=True, slots=True)
class Operator:
    """What the operator of this program has set, and how much its senders may.

    Parameters
    ----------
    properties
        Names and values.
    senders
        ``network``: what a sender sets counts more, but nothing that concerns this machine (files, limits)
        is taken from him. ``local``: that too, as from Gadgetron, whose configuration is a file here.
        ``recorded``: what a stream from a file or a pipe says counts less than what the operator says now;
        ``replaced``: it does not count.
    """

    properties: Mapping[str, object] = field(default_factory=dict)
    senders: Literal["network", "local", "recorded", "replaced"] = "network"

    def machine(self, opening: Opening) -> Settings:
        """The settings that concern this machine: spool and limits. They hold even if others are wrong.

        Raises
        ------
        SettingsError
            If one of them cannot be read.
        """
        found = dict(self.properties)
        if opening.config and self.senders == "local":
            found.update(_properties_of(opening))
        return Settings.from_properties({name: value for name, value in found.items() if name in LOCAL})

    def settings(self, opening: Opening, parameters: str, log: Log) -> Settings:
        """All settings of a scan.

        Raises
        ------
        SettingsError
            If a property is not known or cannot be read, or the sender must not set it.
        """
        if self.senders == "replaced":
            return Settings.from_properties(self.properties)
        sent = dict(properties_from_json(parameters)) if parameters else {}
        # FIRE may name the configuration here too; an empty name is none.
        named = [str(value) for key in ("config", "customconfig") if (value := sent.pop(key, ""))]
        installed = _named_properties(named[-1] if named else opening.name)
        sent = {**_properties_of(opening), **sent}
        if self.senders == "recorded":
            if left_out := sorted(sent.keys() & LOCAL):
                log(
                    "WRN", f"recorded with {', '.join(left_out)}, which a replay does not use: set it with -p"
                )
            kept = {name: value for name, value in sent.items() if name not in LOCAL}
            return Settings.from_properties({**installed, **kept, **self.properties})
        own = {**self.properties, **installed}
        if self.senders == "network":
            # What the operator named is fine, what came over the network is not.
            Settings.from_properties({k: v for k, v in own.items() if k not in LOCAL} | sent, local=False)
        return Settings.from_properties(own | sent)

    def wants_error_image(self, opening: Opening, parameters: str) -> bool:
        """Whether `error_image` is set by whoever counts most, even if other properties cannot be used."""
        sent: dict[str, object] = {}
        if self.senders != "replaced":
            with suppress(SettingsError):
                sent.update(_properties_of(opening))
            with suppress(SettingsError):
                sent.update(properties_from_json(parameters) if parameters else {})
        wanted = {**sent, **self.properties} if self.senders == "recorded" else {**self.properties, **sent}
        with suppress(SettingsError):
            return Settings.from_properties({"error_image": wanted.get("error_image", False)}).error_image
        return False


def _properties_of(opening: Opening) -> dict[str, object]:
    if opening.config is None or is_empty(opening.config):
        return {}
    return dict(properties_from_xml(opening.config))


def say_to_log(level: str, text: str) -> None:
    """Log what a scan's receiver is told."""
    event("said", _LEVELS.get(level, logging.ERROR), text=f"{level} {text}")


def receiver_of(channel: Channel, opening: Opening) -> Receiver:
    """The sender as the receiver of what he gets back, over the same connection."""
    if opening.dialect == "Gadgetron":
        return Gadgetron(channel, say_to_log)
    if opening.mrd2 is not None:
        return Mrd2Reader(channel, opening.mrd2.header, say_to_log)
    return MrdClient(channel, say_to_log)


@contextmanager
def on_this_machine(
    channel: Channel, opening: Opening, operator: Operator, receiver: Receiver
) -> Iterator[None]:
    """Read a scan's stream within the operator's limits of time, and keep it as it came if he wants that."""
    try:
        machine = operator.machine(opening)
    except SettingsError:  # said when all settings are read
        machine = Settings()
    channel.limit_silence(machine.idle_timeout_s)
    channel.limit_time(machine.scan_timeout_s)
    spool: Spool | None = None
    if machine.spool:
        spool = Spool(
            machine.spool,
            current_scan.get(),
            machine.spool_scans,
            machine.spool_mb << 20,
            lambda text: receiver.log("WRN", text),
        )
        event("spool", file=spool.path)
    channel.record(spool)
    try:
        yield
    finally:
        channel.record(None)
        if spool is not None:
            spool.close()


def run_scan(source: Source, receiver: Receiver, operator: Operator, reconstruct: Reconstruct) -> int:
    """Read one scan, reconstruct it and answer, until everything is said. Failures are told, never raised.

    Parameters
    ----------
    source
        Where it comes from.
    receiver
        Who gets the images.
    operator
        What is set here.
    reconstruct
        `whorl.pipeline.scan.reconstruct_scan`.

    Returns
    -------
    int
        0 all maps delivered, 1 nothing delivered, 3 something is degraded or missing.
    """
    code = 1
    header = source.opening.header.rstrip(b"\0")  # ICE and C++ clients count the NUL, XML readers do not
    parameters = ""
    try:
        parameters = source.parameters()
        settings = operator.settings(source.opening, parameters, receiver.log)
        outcome = reconstruct(header, source.readouts(), settings, receiver.image, receiver.log)
        for text in outcome.failures:
            receiver.log("ERR", text)
        for text in outcome.notes:
            receiver.log("WRN", text)
        code = outcome.exit_code
    except (ScanError, SettingsError, EndOfStream, wire.ProtocolError, StreamTimeout) as error:
        receiver.log("ERR", str(error))
    except Exception as error:
        if receiver.gone:
            event("given up", logging.WARNING, text=str(error))
        else:
            logger.exception("internal error")
            receiver.log("ERR", f"internal error: {type(error).__name__}: {error}")
    source.drain()
    if source.passed:
        counts = ", ".join(f"{n} × {kind}" for kind, n in source.passed.items())
        receiver.log("WRN", f"messages that are no readouts were ignored: {counts}")
        code = code or 3
    if not receiver.delivered and operator.wants_error_image(source.opening, parameters):
        _explain(receiver, header)
    receiver.finish()
    if receiver.gone or not receiver.delivered:
        return 1
    return code or (3 if receiver.failures else 0)


def _explain(receiver: Receiver, header: bytes) -> None:
    try:
        from whorl.maps.status import status_image
        from whorl.scan.header import read_header

        try:
            space = read_header(header).recon
        except ScanError:
            space = None
        receiver.explain(status_image("; ".join(receiver.failures), space))
    except ConnectionError as error:
        event("given up", logging.WARNING, text=str(error))
    except Exception as error:
        # An extra must not cost what is still to be said.
        logger.exception("internal error")
        receiver.log("WRN", f"no status image could be made: {type(error).__name__}: {error}")


def refuse(channel: Channel, source: StreamSource | None, receiver: Receiver, text: str) -> None:
    """Tell a sender why its scan is not taken, read past what it sends, and close.

    Without a `source` the stream cannot be read past message by message; then it is discarded as bytes.
    """
    receiver.log("ERR", text)
    if source is not None:
        source.drain()
    receiver.finish()
    channel.linger(LINGER_S)
