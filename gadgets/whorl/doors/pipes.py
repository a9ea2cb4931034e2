"""A scan through pipes: an MRD stream comes in, one of the same version with the images goes out."""

from __future__ import annotations

from collections.abc import Mapping

from whorl.doors import session, wire
from whorl.doors.opening import read_opening
from whorl.doors.receivers import Mrd2Reader, PipeReader, Receiver, Say
from whorl.doors.sources import StreamSource
from whorl.doors.transport import Channel, Pipes, StreamTimeout
from whorl.runtime.logs import new_scan
from whorl.scan.failure import EndOfStream


def run(
    source: int,
    target: int,
    properties: Mapping[str, object],
    reconstruct: session.Reconstruct,
    say: Say,
) -> int:
    """Reconstruct the scan that comes in.

    Parameters
    ----------
    source, target
        Descriptors of the input and of the output, to which nothing but the stream is written.
    properties
        What the operator sets; it counts more than what the stream says.
    reconstruct
        `whorl.pipeline.scan.reconstruct_scan`.
    say
        Takes (level, text) for the operator.

    Returns
    -------
    int
        The exit code: 0, 1 or 3.
    """
    new_scan()
    channel = Channel(Pipes(source, target), received=b"")
    operator = session.Operator(properties, "recorded")
    try:
        opening = read_opening(channel)
    except (wire.ProtocolError, StreamTimeout, EndOfStream) as error:
        say("ERR", str(error))
        return 1
    receiver: Receiver
    if opening.mrd2 is not None:
        receiver = Mrd2Reader(channel, opening.mrd2.header, say)
    else:
        receiver = PipeReader(channel, opening.header, say)
    with session.on_this_machine(channel, opening, operator, receiver):
        return session.run_scan(StreamSource(channel, opening), receiver, operator, reconstruct)
