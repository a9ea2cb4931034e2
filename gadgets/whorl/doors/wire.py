"""Framing of MRD version 1: bytes of a channel <-> typed messages.

Whatever a length field announces is checked against a limit before memory is taken or bytes are
waited for.

Letters: C coils, S samples, D trajectory columns.
"""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import Any

import ismrmrd
import numpy as np

from whorl.doors.transport import Channel
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
#: The most samples that the header of a readout can say.
MAX_SAMPLES = 65535
MAX_TRAJECTORY_DIMENSIONS = 4
#: The most samples of 512 coils; also the bound of an image or a waveform.
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
    """A message that was read past: a waveform, an image nobody asked for, a readout that is too large."""

    kind: str


@dataclass(frozen=True, slots=True)
class Close:
    """The end of the stream (id 4)."""


Message = ConfigName | ConfigText | HeaderText | Text | Error | ImageMessage | Skipped | Close | Readout


def _check(what: str, limit: int, got: int, unit: str = "bytes") -> None:
    if got > limit:
        raise ProtocolError(f"{what} announces {got} {unit}: expected at most {limit}")


def _read_string(channel: Channel, what: str, limit: int, length: struct.Struct = _UINT32) -> bytes:
    (size,) = length.unpack(channel.read(length.size, f"the length of {what}"))
    _check(what, limit, size)
    return bytes(channel.read(size, what))


def _readable(text: bytes) -> str:
    return text.rstrip(b"\0").decode("utf-8", "replace")


def _read_acquisition(channel: Channel, n_announced: int) -> Readout | Skipped:
    raw = channel.read(HEAD_DTYPE.itemsize, "the header of an acquisition")
    n_samples, n_coils, n_columns = (_UINT16.unpack_from(raw, at)[0] for at in _ACQUISITION_FIELDS)
    _check("an acquisition", MAX_CHANNELS, n_coils, "active channels")
    _check("an acquisition", MAX_TRAJECTORY_DIMENSIONS, n_columns, "trajectory dimensions")
    split, size = 4 * n_samples * n_columns, 4 * n_samples * (n_columns + 2 * n_coils)
    _check("an acquisition", MAX_ARRAY_BYTES, size)
    if n_announced and n_samples * n_coils > MAX_SAMPLES * n_announced:
        channel.skip(size, "the samples of an acquisition")
        channel.n_readouts += 1
        return Skipped(
            f"readout of {n_coils} coils × {n_samples} samples, more than {n_announced} receiverChannels "
            f"of the header can have"
        )
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


def read_message(
    channel: Channel, *, first: bytes = b"", keep_images: bool = False, n_announced: int = 0
) -> Message:
    """Read the next message.

    A `Readout` is a view of the channel's buffer and valid until the next call.

    Parameters
    ----------
    channel
        Where it comes from.
    first
        Its id, if that was read already.
    keep_images
        Whether an image is returned, or read past as waveforms are.
    n_announced
        Receiver channels that the MRD header announces, 0 if it does not: a readout that is larger than these
        can be is read past.

    Raises
    ------
    ProtocolError
        For an id that is not known, or a message that announces more than its limit.
    EndOfStream
        If the stream ends, between two messages or inside one.
    StreamTimeout
        If the peer is silent for too long.
    """
    (message_id,) = _UINT16.unpack(first or channel.read(2, "a message"))
    if message_id == ACQUISITION:
        return _read_acquisition(channel, n_announced)
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


def _string(
    message_id: int, text: str | bytes, limit: int, end: bytes = b"\0", length: struct.Struct = _UINT32
) -> bytes:
    raw = (text.encode("utf-8", "replace") if isinstance(text, str) else text).rstrip(b"\0") + end
    if len(raw) > limit:
        raise ProtocolError(
            f"a text for message id {message_id} has {len(raw)} bytes: expected at most {limit}"
        )
    return _UINT16.pack(message_id) + length.pack(len(raw)) + raw


def write_config_name(channel: Channel, name: str) -> None:
    """Send the name of a configuration; `ProtocolError` if it does not fit into its 1024 bytes."""
    raw = name.encode()
    if len(raw) >= CONFIG_NAME_BYTES:
        limit = CONFIG_NAME_BYTES - 1
        raise ProtocolError(f"a configuration name has {len(raw)} bytes: expected at most {limit}")
    channel.write(_UINT16.pack(CONFIG_FILE), raw.ljust(CONFIG_NAME_BYTES, b"\0"))


def write_config_text(channel: Channel, text: str | bytes, *, terminate: bool = True) -> None:
    """Send a configuration; with a NUL at its end as all but Gadgetron do. `ProtocolError` if too long."""
    channel.write(_string(CONFIG, text, MAX_CONFIG_BYTES, b"\0" if terminate else b""))


def write_header(channel: Channel, xml: str | bytes, *, terminate: bool = True) -> None:
    """Send the MRD header; with a NUL at its end as all but Gadgetron do. `ProtocolError` if too long."""
    channel.write(_string(HEADER, xml, MAX_HEADER_BYTES, b"\0" if terminate else b""))


def gadgetron_opening(config: bytes, header: bytes) -> bytes:
    """What Gadgetron sends first, from what the `gadgetron` package made of it."""
    return _string(CONFIG, config, MAX_CONFIG_BYTES, b"") + _string(HEADER, header, MAX_HEADER_BYTES, b"")


def write_text(channel: Channel, text: str) -> None:
    """Send a text, NUL-terminated; the NUL counts in its length. Never to Gadgetron."""
    channel.write(_string(TEXT, text, MAX_TEXT_BYTES))


def write_error(channel: Channel, text: str) -> None:
    """Send a failure to Gadgetron, after its CLOSE was read. Never to an MRD client: it would abort."""
    channel.write(_string(ERROR, text, MAX_TEXT_BYTES, b"", _UINT64))


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
        If the pixels are not uint16, float32 or complex64: Gadgetron and scanners fail on several other
        types.
    """
    if image.data_type not in (ismrmrd.DATATYPE_USHORT, ismrmrd.DATATYPE_FLOAT, ismrmrd.DATATYPE_CXFLOAT):
        raise ProtocolError(
            f"an image has pixels of type {image.data.dtype}: expected uint16, float32 or complex64"
        )
    parts = [_UINT16.pack(IMAGE)]
    image.serialize_into(lambda part: parts.append(bytes(part)))
    channel.write(*parts)
