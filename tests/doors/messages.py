"""What the tests of the doors send, and a handler that only counts."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ismrmrd
import numpy as np

from whorl.config import Settings
from whorl.doors import wire
from whorl.doors.server import Server
from whorl.doors.transport import Channel
from whorl.scan.failure import EndOfStream
from whorl.scan.readout import HEAD_DTYPE, Readout

#: Nothing here takes so long; whatever does hangs.
WAIT_S = 30.0
HEADER = b'<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"/>'


def make_readout(n_coils: int = 2, n_samples: int = 9, n_columns: int = 2, seed: int = 0) -> Readout:
    rng = np.random.default_rng(seed)
    head = np.zeros(1, HEAD_DTYPE)[0]
    head["version"], head["flags"] = 1, 1 << 40
    head["active_channels"], head["number_of_samples"] = n_coils, n_samples
    head["trajectory_dimensions"], head["idx"]["slice"] = n_columns, 513
    head["user_int"] = np.arange(8) - 3
    data = rng.standard_normal((n_coils, n_samples)) + 1j * rng.standard_normal((n_coils, n_samples))
    trajectory = rng.standard_normal((n_samples, n_columns)).astype(np.float32)
    return Readout(head, trajectory, data.astype(np.complex64))


def make_image(dtype: type = np.uint16, ny: int = 3, nx: int = 5, **meta: str) -> ismrmrd.Image:
    pixels = np.random.default_rng(1).integers(0, 30000, (1, 1, ny, nx)).astype(dtype)
    image = ismrmrd.Image.from_array(
        pixels, transpose=False, image_type=1, image_series_index=2, image_index=7
    )
    image.meta = meta
    return image


def make_waveform(n_channels: int = 2, n_samples: int = 5) -> bytes:
    data = np.zeros((n_channels, n_samples), np.uint32)
    return struct.pack("<H", wire.WAVEFORM) + ismrmrd.Waveform.from_array(data).to_bytes()


class _Sink:
    """Keeps what is written to it, as the connection of a `Channel`."""

    def __init__(self) -> None:
        self.data = bytearray()

    def sendall(self, data: bytes, /) -> None:
        self.data += data

    def settimeout(self, value: float | None, /) -> None:
        pass


def bytes_of(*writes: Callable[[Channel], None]) -> bytes:
    """What some writers of `wire` send."""
    sink = _Sink()
    for write in writes:
        write(Channel(sink))  # type: ignore[arg-type]
    return bytes(sink.data)


@dataclass(frozen=True)
class Counted:
    """Outcome of `count`."""

    delivered: int
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return 3 if self.failures or self.notes else 0


def count(
    header: bytes,
    readouts: Iterable[Readout],
    settings: Settings,
    send_image: Callable[[ismrmrd.Image], None],
    log: Callable[[str, str], None],
) -> Counted:
    """Stand in for the reconstruction: an image that says how many readouts came, and with which settings."""
    n, failures = 0, []
    try:
        for readout in readouts:
            assert readout.data.shape == (readout.head["active_channels"], readout.head["number_of_samples"])
            n += 1
    except EndOfStream as error:
        failures.append(str(error))
    log("DBG", f"{n} readouts")
    send_image(
        make_image(
            n=str(n),
            method=settings.method,
            fit=settings.fit,
            header=header.decode(),
            whorl_status="complete",
        )
    )
    return Counted(1, tuple(failures))


@contextmanager
def served(reconstruct: Any = count, **options: Any) -> Iterator[Server]:
    """A server; when the block is left all its scans are over, and their spools closed.

    `reconstruct` is None for the real reconstruction.
    """
    server = Server("127.0.0.1", 0, reconstruct=reconstruct, grace_s=WAIT_S, **options)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(WAIT_S)
        assert not thread.is_alive()
