"""Framing of MRD version 1: bytes of a socket <-> typed messages.

Whatever a length field announces is checked against a limit before memory is taken or bytes are
waited for.

Letters: C coils, S samples, D trajectory columns.
"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
import xml.etree.ElementTree as ET
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ismrmrd
import numpy as np
from numpy.typing import NDArray

from whorl.scan.failure import EndOfStream
from whorl.scan.readout import HEAD_DTYPE, Readout

CONFIG_FILE = 1
CONFIG = 2
HEADER = 3
CLOSE = 4
TEXT = 5
ERROR = 8
ACQUISITION = 1008
IMAGE = 1022
WAVEFORM = 1026

CONFIG_NAME_BYTES = 1024
MAX_HEADER_BYTES = 4 << 20
MAX_CONFIG_BYTES = 1 << 20
MAX_TEXT_BYTES = 1 << 20
MAX_CHANNELS = 1024
MAX_TRAJECTORY_DIMENSIONS = 4
#: 65535 samples (the largest that the header can say) of 512 coils; also the bound of an image or a waveform.
MAX_ARRAY_BYTES = 256 << 20

_UINT16 = struct.Struct("<H")
_UINT32 = struct.Struct("<I")
_UINT64 = struct.Struct("<Q")

_ACQUISITION_FIELDS = [
    HEAD_DTYPE.fields[name][1]  # type: ignore[index]
    for name in ("number_of_samples", "active_channels", "trajectory_dimensions")
]

# On the wire int32 has 4 bytes; the ismrmrd package takes it for int64.
_PIXELS: dict[int, np.dtype[Any]] = {
    ismrmrd.DATATYPE_USHORT: np.dtype("<u2"),
    ismrmrd.DATATYPE_SHORT: np.dtype("<i2"),
    ismrmrd.DATATYPE_UINT: np.dtype("<u4"),
    ismrmrd.DATATYPE_INT: np.dtype("<i4"),
    ismrmrd.DATATYPE_FLOAT: np.dtype("<f4"),
    ismrmrd.DATATYPE_DOUBLE: np.dtype("<f8"),
    ismrmrd.DATATYPE_CXFLOAT: np.dtype("<c8"),
    ismrmrd.DATATYPE_CXDOUBLE: np.dtype("<c16"),
}
_IMAGE_HEAD = ismrmrd.hdf5.image_header_dtype
_WAVEFORM_HEAD = ismrmrd.hdf5.waveform_header_dtype
assert _IMAGE_HEAD.itemsize == 198
assert _WAVEFORM_HEAD.itemsize == 40


class ProtocolError(ValueError):
    """Bytes that are not MRD version 1, or more of them than is accepted; the stream cannot be read on."""


class StreamTimeout(TimeoutError):  # noqa: N818 - as TimeoutError
    """The peer was silent for too long; the text says for how long and what was being read."""


@dataclass(frozen=True, slots=True)
class ConfigName:
    """Name of a configuration that the receiver has (id 1)."""

    name: str


@dataclass(frozen=True, slots=True)
class ConfigText:
    """A configuration (id 2) as it came, with its NUL if it had one: that tells senders apart."""

    text: bytes


@dataclass(frozen=True, slots=True)
class HeaderText:
    """The MRD header (id 3) as it came, with its NUL if it had one."""

    xml: bytes


@dataclass(frozen=True, slots=True)
class Text:
    """A text for the operator, or parameters (id 5)."""

    text: str


@dataclass(frozen=True, slots=True)
class Error:
    """The failure of the peer (id 8)."""

    text: str


@dataclass(frozen=True, slots=True)
class ImageMessage:
    """An image (id 1022)."""

    image: ismrmrd.Image


@dataclass(frozen=True, slots=True)
class Skipped:
    """A message that was read past: a waveform, or an image nobody asked for."""

    kind: str


@dataclass(frozen=True, slots=True)
class Close:
    """The end of the stream (id 4)."""


Message = ConfigName | ConfigText | HeaderText | Text | Error | ImageMessage | Skipped | Close | Readout


class Channel:
    """A connected socket from which exact numbers of bytes are read and to which whole messages are written.

    One thread reads; any thread may write.

    Parameters
    ----------
    connection
        The socket; whoever made it closes it.
    timeout_s
        Longest silence while reading, and longest time a write may wait for the peer; None: no limit.
    """

    def __init__(self, connection: socket.socket, timeout_s: float | None = None) -> None:
        self._socket = connection
        self._timeout_s = timeout_s
        self._write_lock = threading.Lock()
        self._buffer = np.empty(0, np.uint8)
        self._deadline: float | None = None
        self.n_readouts = 0
        self.n_bytes = 0
        connection.settimeout(timeout_s)

    def limit_time(self, seconds: float | None) -> None:
        """Let all further reads together take at most so long; None lifts the limit."""
        self._deadline = None if seconds is None else time.monotonic() + seconds
        if seconds is None:
            self._socket.settimeout(self._timeout_s)

    def _receive(self, view: memoryview, what: str) -> int:
        wait_s = self._timeout_s
        if self._deadline is not None:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                # A peer that sends a byte now and then never falls silent.
                raise StreamTimeout(f"the time was over after {self.n_readouts} readouts: expected {what}")
            wait_s = left_s if wait_s is None else min(wait_s, left_s)
            self._socket.settimeout(wait_s)
        try:
            n = self._socket.recv_into(view)
        except TimeoutError as error:
            raise StreamTimeout(
                f"nothing was received for {wait_s:.3g} s after {self.n_readouts} readouts: expected {what}"
            ) from error
        except OSError as error:
            raise EndOfStream(
                f"the connection broke after {self.n_readouts} readouts, expected {what}: {error}"
            ) from error
        self.n_bytes += n
        return n

    def wait(self, timeout_s: float) -> None:
        """Return when there is something to read, or the end, or after `timeout_s`."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.select(timeout_s)

    def read_into(self, view: memoryview, what: str) -> None:
        """Fill `view`.

        Raises
        ------
        EndOfStream
            If the stream ends first; the text names `what` was read and after how many readouts.
        StreamTimeout
            If the peer is silent for too long.
        """
        at, size = 0, len(view)
        while at < size:
            n = self._receive(view[at:], what)
            if n == 0:
                raise EndOfStream(
                    f"the stream ended before CLOSE, after {self.n_readouts} readouts: "
                    f"expected {what}, {size} bytes, got {at}"
                )
            at += n

    def read(self, size: int, what: str) -> bytearray:
        """Read `size` bytes; errors as `read_into`. Check `size` against a limit first."""
        data = bytearray(size)
        self.read_into(memoryview(data), what)
        return data

    def read_reused(self, size: int, what: str) -> NDArray[np.uint8]:
        """Read `size` bytes into a buffer that the next call overwrites; errors as `read_into`."""
        if self._buffer.size < size:
            self._buffer = np.empty(size, np.uint8)
        view = self._buffer[:size]
        self.read_into(view.data, what)
        return view

    def skip(self, size: int, what: str) -> None:
        """Read past `size` bytes without keeping them; errors as `read_into`."""
        chunk = 1 << 20
        while size > 0:
            self.read_reused(min(size, chunk), what)
            size -= chunk

    def write(self, *parts: bytes | bytearray | memoryview) -> None:
        """Send one message as a whole; `OSError` if the peer is gone or does not read."""
        data = b"".join(parts)
        with self._write_lock:
            self._socket.sendall(data)

    def linger(self, seconds: float, limit_bytes: int = 1 << 30) -> None:
        """End writing, then discard what still comes until the peer closes, within bounds.

        A socket that is closed with unread bytes answers with a TCP reset, and the reset can overtake
        the last texts on their way to the peer.
        """
        with suppress(OSError, EndOfStream):
            self._socket.shutdown(socket.SHUT_WR)
            self.limit_time(seconds)
            scratch = memoryview(bytearray(1 << 16))
            while limit_bytes > 0 and (n := self._receive(scratch, "the end")):
                limit_bytes -= n

    def interrupt(self) -> None:
        """Let a read that waits in another thread end as if the peer had stopped sending."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)


def _check(what: str, limit: int, got: int, unit: str = "bytes") -> None:
    if got > limit:
        raise ProtocolError(f"{what} announces {got} {unit}: expected at most {limit}")


def _read_string(channel: Channel, what: str, limit: int, length: struct.Struct = _UINT32) -> bytes:
    (size,) = length.unpack(channel.read(length.size, f"the length of {what}"))
    _check(what, limit, size)
    return bytes(channel.read(size, what))


def _readable(text: bytes) -> str:
    return text.rstrip(b"\0").decode("utf-8", "replace")


def _read_acquisition(channel: Channel) -> Readout:
    raw = channel.read(HEAD_DTYPE.itemsize, "the header of an acquisition")
    n_samples, n_coils, n_columns = (_UINT16.unpack_from(raw, at)[0] for at in _ACQUISITION_FIELDS)
    _check("an acquisition", MAX_CHANNELS, n_coils, "active channels")
    _check("an acquisition", MAX_TRAJECTORY_DIMENSIONS, n_columns, "trajectory dimensions")
    split, size = 4 * n_samples * n_columns, 4 * n_samples * (n_columns + 2 * n_coils)
    _check("an acquisition", MAX_ARRAY_BYTES, size)
    samples = channel.read_reused(size, "the samples of an acquisition")
    channel.n_readouts += 1
    return Readout(
        head=np.frombuffer(raw, HEAD_DTYPE)[0],
        trajectory=samples[:split].view(np.float32).reshape(n_samples, n_columns),  # (S, D)
        data=samples[split:].view(np.complex64).reshape(n_coils, n_samples),  # (C, S)
    )


def _read_image(channel: Channel, keep: bool) -> ImageMessage | Skipped:
    raw = channel.read(_IMAGE_HEAD.itemsize, "the header of an image")
    head = np.frombuffer(raw, _IMAGE_HEAD)[0]
    pixel = _PIXELS.get(int(head["data_type"]))
    if pixel is None:
        raise ProtocolError(f"an image has data type {head['data_type']}: expected 1 to {max(_PIXELS)}")
    size = pixel.itemsize * int(head["channels"])
    for n in head["matrix_size"]:
        size *= int(n)
    _check("an image", MAX_ARRAY_BYTES, size)
    attributes = _read_string(channel, "the attributes of an image", MAX_TEXT_BYTES, _UINT64)
    if not keep:
        channel.skip(size, "the pixels of an image")
        return Skipped("image")
    try:
        image = ismrmrd.Image(raw, _readable(attributes))
    except (ET.ParseError, AssertionError, ValueError) as error:
        raise ProtocolError(f"the attributes of an image are not MRD meta XML: {error}") from error
    pixels = channel.read_reused(size, "the pixels of an image").view(pixel)
    image.data[...] = pixels.reshape(image.data.shape)
    return ImageMessage(image)


def _read_waveform(channel: Channel) -> Skipped:
    raw = channel.read(_WAVEFORM_HEAD.itemsize, "the header of a waveform")
    head = np.frombuffer(raw, _WAVEFORM_HEAD)[0]
    size = 4 * int(head["channels"]) * int(head["number_of_samples"])
    _check("a waveform", MAX_ARRAY_BYTES, size)
    channel.skip(size, "the samples of a waveform")
    return Skipped("waveform")


def read_message(channel: Channel, *, keep_images: bool = False) -> Message:
    """Read the next message.

    A `Readout` is a view of the channel's buffer and valid until the next call.

    Parameters
    ----------
    channel
        Where it comes from.
    keep_images
        Whether an image is returned, or read past as waveforms are.

    Raises
    ------
    ProtocolError
        For an id that is not known, or a message that announces more than its limit.
    EndOfStream
        If the stream ends, between two messages or inside one.
    StreamTimeout
        If the peer is silent for too long.
    """
    (message_id,) = _UINT16.unpack(channel.read(2, "a message"))
    if message_id == ACQUISITION:
        return _read_acquisition(channel)
    if message_id == CLOSE:
        return Close()
    if message_id == TEXT:
        return Text(_readable(_read_string(channel, "a text", MAX_TEXT_BYTES)))
    if message_id == IMAGE:
        return _read_image(channel, keep_images)
    if message_id == WAVEFORM:
        return _read_waveform(channel)
    if message_id == CONFIG_FILE:
        name = bytes(channel.read(CONFIG_NAME_BYTES, "the name of a configuration"))
        return ConfigName(_readable(name.split(b"\0", 1)[0]))
    if message_id == CONFIG:
        return ConfigText(_read_string(channel, "a configuration", MAX_CONFIG_BYTES))
    if message_id == HEADER:
        return HeaderText(_read_string(channel, "the header", MAX_HEADER_BYTES))
    if message_id == ERROR:
        return Error(_readable(_read_string(channel, "an error", MAX_TEXT_BYTES, _UINT64)))
    raise ProtocolError(
        f"message id {message_id} after {channel.n_readouts} readouts is not known, nothing behind it can be "
        f"read: expected acquisitions ({ACQUISITION}), waveforms ({WAVEFORM}) or CLOSE ({CLOSE})"
    )


def _write_string(
    channel: Channel,
    message_id: int,
    text: str | bytes,
    limit: int,
    end: bytes = b"\0",
    length: struct.Struct = _UINT32,
) -> None:
    raw = (text.encode("utf-8", "replace") if isinstance(text, str) else text).rstrip(b"\0") + end
    if len(raw) > limit:
        raise ProtocolError(
            f"a text for message id {message_id} has {len(raw)} bytes: expected at most {limit}"
        )
    channel.write(_UINT16.pack(message_id), length.pack(len(raw)), raw)


def write_config_name(channel: Channel, name: str) -> None:
    """Send the name of a configuration; `ProtocolError` if it does not fit into its 1024 bytes."""
    raw = name.encode()
    if len(raw) >= CONFIG_NAME_BYTES:
        limit = CONFIG_NAME_BYTES - 1
        raise ProtocolError(f"a configuration name has {len(raw)} bytes: expected at most {limit}")
    channel.write(_UINT16.pack(CONFIG_FILE), raw.ljust(CONFIG_NAME_BYTES, b"\0"))


def write_config_text(channel: Channel, text: str | bytes, *, terminate: bool = True) -> None:
    """Send a configuration; with a NUL at its end as all but Gadgetron do. `ProtocolError` if too long."""
    _write_string(channel, CONFIG, text, MAX_CONFIG_BYTES, b"\0" if terminate else b"")


def write_header(channel: Channel, xml: str | bytes, *, terminate: bool = True) -> None:
    """Send the MRD header; with a NUL at its end as all but Gadgetron do. `ProtocolError` if too long."""
    _write_string(channel, HEADER, xml, MAX_HEADER_BYTES, b"\0" if terminate else b"")


def write_text(channel: Channel, text: str) -> None:
    """Send a text, NUL-terminated; the NUL counts in its length. Never to Gadgetron."""
    _write_string(channel, TEXT, text, MAX_TEXT_BYTES)


def write_error(channel: Channel, text: str) -> None:
    """Send a failure to Gadgetron, after its CLOSE was read. Never to an MRD client: it would abort."""
    _write_string(channel, ERROR, text, MAX_TEXT_BYTES, b"", _UINT64)


def write_close(channel: Channel) -> None:
    """Send the end of the stream."""
    channel.write(_UINT16.pack(CLOSE))


def write_readout(channel: Channel, readout: Readout) -> None:
    """Send one acquisition.

    Raises
    ------
    ProtocolError
        If its arrays do not have the sizes that its header says: the receiver would lose the frame.
    """
    head = readout.head
    n_samples = int(head["number_of_samples"])
    data_shape = (int(head["active_channels"]), n_samples)
    trajectory_shape = (n_samples, int(head["trajectory_dimensions"]))
    if readout.data.shape != data_shape or readout.trajectory.shape != trajectory_shape:
        raise ProtocolError(
            f"a readout has data {readout.data.shape} and trajectory {readout.trajectory.shape}: "
            f"expected {data_shape} and {trajectory_shape} as its header says"
        )
    channel.write(
        _UINT16.pack(ACQUISITION),
        head.tobytes(),
        readout.trajectory.astype("<f4", copy=False).tobytes(),
        readout.data.astype("<c8", copy=False).tobytes(),
    )


def write_image(channel: Channel, image: ismrmrd.Image) -> None:
    """Send one image.

    Raises
    ------
    ProtocolError
        If the pixels are not uint16 or float32: Gadgetron and scanners fail on several other types.
    """
    if image.data_type not in (ismrmrd.DATATYPE_USHORT, ismrmrd.DATATYPE_FLOAT):
        raise ProtocolError(f"an image has pixels of type {image.data.dtype}: expected uint16 or float32")
    parts = [_UINT16.pack(IMAGE)]
    image.serialize_into(lambda part: parts.append(bytes(part)))
    channel.write(*parts)
