"""What a sender says before its readouts; from it is told which dialect he speaks."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from whorl.doors import wire
from whorl.doors.transport import Channel

if TYPE_CHECKING:
    from whorl.doors import mrd2

Dialect = Literal["Gadgetron", "MRD client", "MRD version 2", "ping"]

#: Who names this configuration and closes, without a header, asks whether a server answers.
PING = "whorl_ping"


@dataclass(frozen=True, slots=True)
class Opening:
    """What a sender says before its readouts.

    Parameters
    ----------
    dialect
        How the sender speaks, and is spoken to.
    header
        MRD header, version 1.
    name
        Name of a configuration, or None.
    config
        Text of a configuration, as it came, or None.
    mrd2
        Reader of a stream of MRD version 2.
    """

    dialect: Dialect
    header: bytes
    name: str | None = None
    config: bytes | None = None
    mrd2: mrd2.Reader | None = None


def read_opening(channel: Channel) -> Opening:
    """Read configuration and header. A stream that begins with the header has no configuration.

    Raises
    ------
    ProtocolError
        If something else comes first.
    EndOfStream, StreamTimeout
        If the header does not come.
    """
    first = bytes(channel.read(2, "a message"))
    if first == b"ya":  # of "yardl", and no message id
        from whorl.doors import mrd2

        reader = mrd2.Reader(channel, first)
        return Opening("MRD version 2", reader.header_xml(), mrd2=reader)
    message = wire.read_message(channel, first=first)
    name: str | None = None
    config: bytes | None = None
    while not isinstance(message, wire.HeaderText):
        if isinstance(message, wire.ConfigName) and name is None:
            name = message.name
        elif isinstance(message, wire.ConfigText) and config is None:
            config = message.text
        elif isinstance(message, wire.Close) and name == PING:
            return Opening("ping", b"", name)
        else:
            raise wire.ProtocolError(
                f"{type(message).__name__.lower()} came before the header: "
                f"expected configuration, header, readouts"
            )
        message = wire.read_message(channel)
    gadgetron = name is None and config is not None and is_gadgetron(config, message.xml)
    return Opening("Gadgetron" if gadgetron else "MRD client", message.xml, name, config)


def is_gadgetron(config: bytes, header: bytes) -> bool:
    """Whether the sender is Gadgetron speaking to an external, as through its `<connect>`.

    Nothing in the protocol says so; two habits together do. Gadgetron's core writes strings without a
    NUL, its C++ client, FIRE and the client of python-ismrmrd-server with one. And Gadgetron sends
    only the external's own `<configuration>`, where others send a whole document with `<version>`,
    `<readers>` and `<stream>`.
    """
    if config.endswith(b"\0") or header.endswith(b"\0"):
        return False
    if is_empty(config):
        return True
    if b"<!DOCTYPE" in config:
        return False
    try:
        root = ET.fromstring(config)
    except (ET.ParseError, ValueError, LookupError):  # the latter two for an encoding that is not known
        return False
    tags = {child.tag for child in root}
    return root.tag == "configuration" and tags.isdisjoint({"stream", "readers", "version"})


def is_empty(config: bytes) -> bool:
    """Whether a configuration says nothing.

    Gadgetron sends an empty document, perhaps with its declaration, if the external has no configuration.
    """
    text = config.strip(b"\0 \t\r\n")
    if text.startswith(b"<?xml"):
        text = text.partition(b"?>")[2].strip()
    return not text
