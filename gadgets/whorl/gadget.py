"""What Gadgetron starts: `python -m gadgetron PORT whorl.gadget reconstruct`."""

from __future__ import annotations

import logging
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from whorl.runtime import logs

if TYPE_CHECKING:
    from whorl.doors.transport import Channel


class _Ending:
    """Ends the connection when the `gadgetron` package leaves it: its own way fails if Gadgetron is gone."""

    def __init__(self, connection: socket.socket, channel: Channel) -> None:
        self._connection = connection
        self._channel = channel
        self.failed = False

    def close(self) -> None:
        from whorl.doors import wire

        with self._connection, suppress(OSError):
            wire.write_close(self._channel)
            if self.failed:
                self._channel.linger(2.0)


def reconstruct(connection: Any) -> None:
    """Reconstruct the scan that Gadgetron sends, and send the maps back.

    Gadgetron ignores an exception and the exit code; what the operator sees is the ERROR that is
    sent at the end of a failed scan. From the `gadgetron` package come the process and the opening
    of the connection; its reader is not used, for it waits for ever if Gadgetron is gone.

    Parameters
    ----------
    connection
        `gadgetron.external.Connection`, configuration and header read. Whoever made it closes it.

    Raises
    ------
    SystemExit
        With code 1 or 3 if something was not delivered, after it was reported.
    """
    from whorl.config import properties_from_environment
    from whorl.doors import session, wire
    from whorl.doors.opening import Opening
    from whorl.doors.receivers import Gadgetron
    from whorl.doors.sources import StreamSource
    from whorl.doors.transport import Channel

    logs.configure(logging.getLogger().level)
    logs.new_scan()
    raw: socket.socket = connection.socket.socket
    config, header = connection.raw_bytes.config, connection.raw_bytes.header
    channel = Channel(raw, received=wire.gadgetron_opening(config, header))
    ending = connection.socket = _Ending(raw, channel)
    opening = Opening("Gadgetron", header, config=config)
    # CLOSE is sent by the package when it leaves the connection.
    receiver = Gadgetron(channel, session.say_to_log, send_close=False)
    operator = session.Operator(properties_from_environment(), senders="local")

    def late(*arguments: Any) -> Any:
        # Imported within the scan, so that a broken installation is reported like any other failure.
        from whorl.pipeline.scan import reconstruct_scan

        return reconstruct_scan(*arguments)

    with session.on_this_machine(channel, opening, operator, receiver):
        code = session.run_scan(StreamSource(channel, opening), receiver, operator, late)
    if code:
        ending.failed = True
        raise SystemExit(code)
