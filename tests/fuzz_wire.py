"""Fuzzing of all that is read from the network, guided by coverage.

Not a test: ``python tests/fuzz_wire.py -runs=1000000 [folder for the corpus]``; options of libFuzzer.
It needs the package atheris, and Linux. The first byte of an input chooses what is read. Only the exceptions
that are declared may come, no readout may differ from its bytes, and an input may take at most 1 GiB.
"""

from __future__ import annotations

import logging
import resource
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["whorl"]):
    from doors.mrd2_peer import acquisition, mrd, preamble, written
    from doors.mutations import CONFIG, HEADER, PARAMETERS, SCAN, mutated_scan
    from whorl import config
    from whorl.doors import mrd2, opening, wire
    from whorl.doors.sources import StreamSource
    from whorl.doors.transport import Channel, StreamTimeout
    from whorl.scan import header
    from whorl.scan.failure import EndOfStream, ScanError
    from whorl.scan.readout import Readout

MEMORY_BYTES = 1 << 30
#: So many bytes come at once: less than a message, as from a network.
PIECE_BYTES = 509


class Memory:
    """Stands in for a connected socket: what is received lies there, what is sent is kept."""

    def __init__(self, received: bytes = b"") -> None:
        self.received = memoryview(received)
        self.at = 0
        self.sent = bytearray()

    def settimeout(self, seconds: float | None) -> None:
        pass

    def recv_into(self, view: memoryview) -> int:
        piece = self.received[self.at : self.at + min(len(view), PIECE_BYTES)]
        view[: len(piece)] = piece
        self.at += len(piece)
        return len(piece)

    def sendall(self, data: bytes) -> None:
        self.sent += data


def read_stream(data: bytes) -> None:
    """Messages until the stream ends; what is read of a readout is what was sent."""
    memory = Memory(data)
    channel = Channel(memory, 1.0)
    try:
        while True:
            began = memory.at
            message = wire.read_message(channel, keep_images=True)
            if isinstance(message, Readout):
                again = Memory()
                wire.write_readout(Channel(again, 1.0), message)
                assert again.sent == data[began : memory.at]
    except (wire.ProtocolError, StreamTimeout, EndOfStream):
        pass


def read_scan(data: bytes) -> None:
    """Opening, parameters, readouts to the end, of either version."""
    channel = Channel(Memory(data), 1.0, received=b"")
    with suppress(wire.ProtocolError, StreamTimeout, EndOfStream):
        source = StreamSource(channel, opening.read_opening(channel))
        source.parameters()
        for readout in source.readouts():
            assert readout.data.ndim == readout.trajectory.ndim == 2


def read_version_2(data: bytes) -> None:
    """A stream of MRD version 2 behind its schema."""
    read_scan(PREAMBLE + data)


def read_mutated(data: bytes) -> None:
    """A valid scan that was changed as the input says."""
    provider = atheris.FuzzedDataProvider(data)
    scan = mutated_scan(provider.ConsumeIntInRange)
    read_stream(scan)
    read_scan(scan)


def read_config(data: bytes) -> None:
    """A configuration down to the settings."""
    opening.is_gadgetron(data, b"")
    with suppress(config.SettingsError):
        config.Settings.from_properties(config.properties_from_xml(data), local=False)


def read_json(data: bytes) -> None:
    """Parameters down to the settings."""
    with suppress(config.SettingsError):
        config.Settings.from_properties(config.properties_from_json(data), local=False)


def read_header(data: bytes) -> None:
    """An MRD header."""
    with suppress(ScanError):
        header.read_header(data)


#: Magic, format and schema.
PREAMBLE = preamble()
assert PREAMBLE.startswith(mrd2.MAGIC)
#: An MRD header takes as long as fifty others, so it comes seldom.
READERS: tuple[Callable[[bytes], None], ...] = (
    *([read_stream] * 9),
    *([read_scan] * 5),
    *([read_version_2] * 3),
    *([read_mutated] * 9),
    *([read_config] * 4),
    *([read_json] * 4),
    read_header,
)


def read_one(data: bytes) -> None:
    """What the fuzzer calls."""
    if data:
        READERS[data[0] % len(READERS)](data[1:])


def write_seeds(folder: Path) -> None:
    """Begin an empty corpus with valid inputs."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        return
    scan = b"".join(SCAN)
    seeds = {read_stream: scan, read_scan: scan, read_mutated: bytes(64), read_config: CONFIG}
    version_2 = written([mrd.StreamItem.Acquisition(acquisition())], mrd.Header())[len(PREAMBLE) :]
    seeds |= {read_json: PARAMETERS.encode(), read_header: HEADER, read_version_2: version_2}
    for reader, data in seeds.items():
        (folder / reader.__name__).write_bytes(bytes([READERS.index(reader)]) + data)


def main() -> None:
    for argument in sys.argv[1:]:
        if not argument.startswith("-") and not Path(argument).is_file():
            write_seeds(Path(argument))
    logging.disable()
    warnings.simplefilter("ignore")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    atheris.Setup([sys.argv[0], "-timeout=10", *sys.argv[1:]], read_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
