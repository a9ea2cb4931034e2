"""The binary protocol of MRD version 2 (package `mrd-python` 2.1) <-> whorl's typed messages.

The package's own reader takes memory on the word of any length field. Here its field descriptions are
used, but the bytes come from `_Input`, which holds each item to a budget, and an item that is not a
readout is read past without being built.

Letters: C coils, S samples, D trajectory columns.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
import struct
import types
import typing
from enum import Enum
from functools import cache
from typing import Any, NoReturn, TypeAlias

import ismrmrd
import numpy as np
from numpy.typing import NDArray
from xsdata.models.datatype import XmlDate, XmlTime

from whorl.doors import wire
from whorl.doors.transport import Channel
from whorl.doors.wire import ProtocolError
from whorl.scan.failure import EndOfStream
from whorl.scan.readout import HEAD_DTYPE, Readout

#: An `mrd.Header`; the package may be missing, and has no types.
Header: TypeAlias = Any

#: The first bytes of a stream of MRD version 2.
MAGIC = b"yardl"
_FORMAT_VERSION = 1
_INT32 = struct.Struct("<i")
#: Numbers and texts in a header: trains of thousands, and a bound for the Python objects made of them.
_MAX_HEADER_VALUES = 1 << 18
#: Numbers in the head of a readout: version 2 has vectors there.
_MAX_HEAD_VALUES = 1 << 13
_BUFFER_BYTES = 1 << 16
_VARINT_BITS = 70  # ten bytes hold 64 bits

_NO_FIT = "readout whose counters do not fit MRD version 1"
_NO_PLACES = "readout whose trajectory has not the samples of its data"


@cache
def _package() -> Any:
    """Return `mrd`, with `mrd.binary` and `mrd._binary` loaded."""
    try:
        import mrd
        import mrd.binary
    except ImportError as error:
        raise ProtocolError(
            "a stream of MRD version 2 came, for which the package mrd-python is missing: "
            'pip install "whorl-mrf[mrd2]"'
        ) from error
    return mrd


class _Input:
    """Bytes of a channel in the form in which the package's serializers ask for them, within a budget.

    It waits only for what is asked for: a sender may wait for our answer.
    """

    def __init__(self, channel: Channel, first: bytes) -> None:
        self._channel = channel
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._view[: len(first)] = first
        self._at, self._end = 0, len(first)
        self._what, self._bytes_left, self._values_left = "the stream", 0, 0

    @property
    def n_buffered(self) -> int:
        return self._end - self._at

    def allow(self, what: str, n_bytes: int, n_values: int) -> None:
        """Let what is read from here on, named `what`, have at most so many bytes and values."""
        self._what, self._bytes_left, self._values_left = what, n_bytes, n_values

    def _spend(self, n_bytes: int) -> None:
        if not 0 <= n_bytes <= self._bytes_left:
            raise ProtocolError(
                f"{self._what} announces {n_bytes} bytes more: expected at most {self._bytes_left}"
            )
        self._bytes_left -= n_bytes
        self._values_left -= 1
        if self._values_left < 0:
            raise ProtocolError(f"{self._what} has more numbers than the limit of this reader")

    def _fill(self, size: int) -> None:
        """Have `size` bytes in the buffer, at most as many as it holds."""
        n = self.n_buffered
        if n >= size:
            return
        self._view[:n] = bytes(self._view[self._at : self._end])
        self._at, self._end = 0, n
        while self._end < size:
            n = self._channel.read_some(self._view[self._end :], self._what)
            if n == 0:
                raise EndOfStream(
                    f"the stream ended before its end mark, after {self._channel.n_readouts} readouts: "
                    f"expected {self._what}"
                )
            self._end += n

    def read(self, formatter: struct.Struct) -> tuple[Any, ...]:
        self._spend(formatter.size)
        self._fill(formatter.size)
        at = self._at
        self._at += formatter.size
        return formatter.unpack_from(self._buffer, at)

    def read_byte(self) -> int:
        self._spend(1)
        self._fill(1)
        byte = self._buffer[self._at]
        self._at += 1
        return byte

    def read_unsigned_varint(self) -> int:
        value = 0
        for shift in range(0, _VARINT_BITS, 7):
            byte = self.read_byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ProtocolError(f"{self._what} has a number of more than {_VARINT_BITS // 7} bytes")

    def read_signed_varint(self) -> int:
        value = self.read_unsigned_varint()
        return (value >> 1) ^ -(value & 1)

    def read_bytearray(self, count: int) -> memoryview:
        """Read `count` bytes into memory of their own."""
        self._spend(count)
        data = np.empty(count, np.uint8).data
        n = min(count, self.n_buffered)
        data[:n] = self._view[self._at : self._at + n]
        self._at += n
        if count - n > _BUFFER_BYTES:
            self._channel.read_into(data[n:], self._what)
        elif n < count:
            self._fill(count - n)
            data[n:] = self._view[self._at : self._at + count - n]
            self._at += count - n
        return data

    read_view = read_bytearray

    def skip(self, count: int) -> None:
        """Read past `count` bytes."""
        self._spend(count)
        n = min(count, self.n_buffered)
        self._at += n
        self._channel.skip(count - n, self._what)

    def skip_varints(self, count: int) -> None:
        """Read past `count` numbers of variable length."""
        while count > 0:
            self._fill(1)
            block = np.frombuffer(self._view[self._at : self._end], np.uint8)
            ends = np.flatnonzero(block < 0x80)[:count]  # the last byte of each number
            count -= ends.size
            n = block.size if count else int(ends[-1]) + 1
            self._spend(n)
            self._at += n


def _skip(serializer: Any, stream: _Input) -> None:
    """Read past what `serializer` would read."""
    kinds = _package()._binary
    if isinstance(serializer, kinds.RecordSerializer):
        for _, field in serializer._field_serializers:
            _skip(field, stream)
    elif isinstance(serializer, kinds.OptionalSerializer):
        if stream.read_byte():
            _skip(serializer._element_serializer, stream)
    elif isinstance(serializer, kinds.UnionSerializer):
        tag = stream.read_byte()
        if tag >= len(serializer._cases):
            raise ProtocolError(f"a value has type {tag}: expected 0 to {len(serializer._cases) - 1}")
        _skip(serializer._cases[tag][1], stream)
    elif isinstance(serializer, kinds.MapSerializer):
        for _ in range(stream.read_unsigned_varint()):
            _skip(serializer._key_serializer, stream)
            _skip(serializer._value_serializer, stream)
    elif isinstance(serializer, kinds.VectorSerializer):
        _skip_elements(serializer._element_serializer, stream.read_unsigned_varint(), stream)
    elif isinstance(serializer, kinds.FixedNDArraySerializer):
        _skip_elements(serializer.element_serializer, math.prod(serializer._shape), stream)
    elif isinstance(serializer, kinds.NDArraySerializerBase):
        fixed = isinstance(serializer, kinds.NDArraySerializer)
        n_dimensions = serializer._ndims if fixed else stream.read_unsigned_varint()
        n = 1
        for _ in range(n_dimensions):
            # A product is not left to grow: with ten bytes for each factor it would take memory of its own.
            n = min(n * stream.read_unsigned_varint(), wire.MAX_ARRAY_BYTES + 1)
        _skip_elements(serializer.element_serializer, n, stream)
    elif isinstance(serializer, kinds.StringSerializer):
        stream.skip(stream.read_unsigned_varint())
    else:
        _skip_elements(serializer, 1, stream)


def _skip_elements(serializer: Any, count: int, stream: _Input) -> None:
    if isinstance(serializer, _package()._binary.StructSerializer):
        stream.skip(count * serializer._struct.size)
    elif serializer.overall_dtype().kind in "iu":
        stream.skip_varints(count)
    else:
        for _ in range(count):
            _skip(serializer, stream)


@cache
def _items() -> list[tuple[str, Any]]:
    """Name and serializer of each kind of item, in the order of the schema's tags."""
    binary = _package().binary
    numbers = binary._binary
    pixels = ["uint16", "int16", "uint32", "int32", "float32", "float64", "complexfloat32", "complexfloat64"]
    return [
        ("readout", binary.AcquisitionSerializer()),
        ("waveform", binary.WaveformSerializer(numbers.uint32_serializer)),
        *(("image", binary.ImageSerializer(getattr(numbers, f"{pixel}_serializer"))) for pixel in pixels),
        ("acquisition bucket", binary.AcquisitionBucketSerializer()),
        ("reconstruction buffers", binary.ReconDataSerializer()),
        ("array", numbers.DynamicNDArraySerializer(numbers.complexfloat32_serializer)),
        ("image array", binary.ImageArraySerializer()),
    ]


def _fields(serializer: Any, stream: _Input) -> dict[str, Any]:
    """Read a record into plain values.

    The package's flags remember each value that they ever had; as integers they do not.
    """
    kinds = _package()._binary
    values = {}
    for name, field in serializer._field_serializers:
        plain = field._integer_serializer if isinstance(field, kinds.EnumSerializer) else field
        record = isinstance(field, kinds.RecordSerializer)
        values[name] = _fields(field, stream) if record else plain.read(stream)
    return values


def _fill_record(record: np.void, values: dict[str, Any]) -> bool:
    """Copy `values` into the fields of a version 1 record that have their names; False if one is too large.

    None becomes 0, lists are cut or padded with 0.
    """
    for name, (dtype, *_) in (record.dtype.fields or {}).items():
        value = values.get(name)
        if value is None:
            continue
        if isinstance(value, dict):
            if not _fill_record(record[name], value):
                return False
            continue
        size = math.prod(dtype.shape)
        numbers = list(value[:size]) if dtype.shape else [value]
        if dtype.base.kind in "iu":
            bounds = np.iinfo(dtype.base)
            if min(numbers, default=0) < bounds.min or max(numbers, default=0) > bounds.max:
                return False
        record[name] = numbers + [0] * (size - len(numbers)) if dtype.shape else value
    return True


def _readout(head: dict[str, Any], data: NDArray[Any], trajectory: NDArray[Any]) -> Readout | wire.Skipped:
    """Turn an acquisition of version 2 (data `(C, S)`, trajectory `(D, S)`) into a readout."""
    n_coils, n_samples = data.shape
    n_columns = trajectory.shape[0] if trajectory.size else 0
    if n_columns and trajectory.shape[1] != n_samples:
        return wire.Skipped(_NO_PLACES)
    record = np.zeros(1, HEAD_DTYPE)[0]
    sizes = {
        "version": 1,
        "number_of_samples": n_samples,
        "active_channels": n_coils,
        "available_channels": n_coils,
        "trajectory_dimensions": n_columns,
    }
    fits = n_coils <= wire.MAX_CHANNELS and n_columns <= wire.MAX_TRAJECTORY_DIMENSIONS
    if not (fits and _fill_record(record, head | sizes)):
        return wire.Skipped(_NO_FIT)
    for channel in head["channel_order"]:
        if channel < wire.MAX_CHANNELS:
            record["channel_mask"][channel // 64] |= np.uint64(1 << channel % 64)
    places = trajectory.T if n_columns else np.zeros((n_samples, 0), np.float32)  # (S, D)
    return Readout(record, np.ascontiguousarray(places), data)


class Reader:
    """The receiving side of a stream of MRD version 2.

    Parameters
    ----------
    channel
        Where the bytes come from; its count of readouts is kept.
    first
        Bytes of `MAGIC` that were read already, to tell the versions apart.

    Attributes
    ----------
    header
        The header, an `mrd.Header`, as it came.

    Raises
    ------
    ProtocolError
        If the package is missing, or the bytes are not a stream of MRD 2.1 with a header within 4 MiB.
    EndOfStream, StreamTimeout
        As `Channel.read_into`.
    """

    def __init__(self, channel: Channel, first: bytes = b"") -> None:
        package = _package()
        self._channel = channel
        self._stream = stream = _Input(channel, first)
        stream.allow("the start of a stream of MRD version 2", wire.MAX_HEADER_BYTES, _MAX_HEADER_VALUES)
        magic = bytes(stream.read_bytearray(len(MAGIC)))
        if magic != MAGIC:
            raise ProtocolError(f"a stream starts with {magic!r}: expected {MAGIC!r} (MRD version 2)")
        (version,) = stream.read(_INT32)
        if version != _FORMAT_VERSION:
            raise ProtocolError(
                f"a stream of MRD version 2 has binary format {version}: expected {_FORMAT_VERSION}"
            )
        schema = package.binary.MrdWriterBase.schema.encode()
        n_bytes = stream.read_unsigned_varint()
        if n_bytes > wire.MAX_HEADER_BYTES or bytes(stream.read_bytearray(n_bytes)) != schema:
            raise ProtocolError(
                f"schema mismatch: a stream of MRD version 2 has another schema ({n_bytes} bytes) than "
                f"that of MRD 2.1 ({len(schema)} bytes), the only one that is read: send with mrd-python 2.1"
            )
        self._items = _items()
        self._left_in_block = 0
        self._closed = False
        self.header: Header = self._read_header(package)

    def _read_header(self, package: Any) -> Header:
        if not self._stream.read_byte():
            raise ProtocolError(
                "a stream of MRD version 2 came without a header: matrix and train are unknown"
            )
        try:
            return package.binary.HeaderSerializer().read(self._stream)
        except (ValueError, OverflowError) as error:
            _refuse("the header of a stream of MRD version 2", error)

    def header_xml(self) -> bytes:
        """Return the header as a document of MRD version 1; `ProtocolError` if a value has no counterpart."""
        try:
            document = _convert(self.header, ismrmrd.xsd.ismrmrdHeader)
            return bytes(ismrmrd.xsd.ToXML(document, encoding="UTF-8"), "utf-8")
        except (ValueError, OverflowError) as error:
            _refuse("the header of a stream of MRD version 2", error)

    def read_message(self) -> wire.Message:
        """Read the next item: a `Readout`, `Skipped`, or `Close` for the end mark.

        A readout that the header of version 1 cannot express is skipped, not cut.

        Raises
        ------
        ProtocolError
            For an item that is malformed or exceeds a limit, and for bytes behind the end mark.
        EndOfStream, StreamTimeout
            As `Channel.read_into`.
        """
        stream = self._stream
        if self._closed:
            raise ProtocolError("a message was asked for behind the end mark of a stream of MRD version 2")
        stream.allow("an item", 16, 16)
        if self._left_in_block == 0:
            self._left_in_block = stream.read_unsigned_varint()
            if self._left_in_block == 0:
                self._closed = True
                if stream.n_buffered:
                    raise ProtocolError(f"{stream.n_buffered} bytes follow the end mark: expected none")
                return wire.Close()
        self._left_in_block -= 1
        tag = stream.read_byte()
        if tag >= len(self._items):
            raise ProtocolError(f"an item has type {tag}: expected 0 to {len(self._items) - 1} (MRD 2.1)")
        kind, serializer = self._items[tag]
        if tag > 0:
            stream.allow(f"an item ({kind})", wire.MAX_ARRAY_BYTES, wire.MAX_ARRAY_BYTES)
            _skip(serializer, stream)
            return wire.Skipped(kind)
        stream.allow("an item (readout)", wire.MAX_ARRAY_BYTES, _MAX_HEAD_VALUES)
        try:
            fields = _fields(serializer, stream)
            message = _readout(**fields)
        except (ValueError, OverflowError) as error:
            _refuse("a readout", error)
        self._channel.n_readouts += 1
        return message


def _refuse(what: str, error: Exception) -> NoReturn:
    if isinstance(error, ProtocolError):
        raise error
    raise ProtocolError(f"{what} cannot be read: {error}") from error


# Characters that no XML document can have, not even as a reference.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _bare(name: str) -> str:
    return name.replace("_", "").lower()


@cache
def _targets(kind: type) -> dict[str, tuple[str, Any]]:
    """Name and type of the fields of a version 1 class, by their bare names."""
    hints = typing.get_type_hints(kind)
    return {_bare(field.name): (field.name, hints[field.name]) for field in dataclasses.fields(kind)}


def _convert(value: Any, kind: Any) -> Any:
    """Turn a value of a version 2 header into the type `kind` of version 1; fields are matched by name."""
    if isinstance(value, Enum) and not value.name:
        raise ProtocolError(f"a header has {type(value).__name__} {value.value}, which MRD 2.1 does not know")
    if isinstance(kind, types.UnionType):
        (kind,) = (arm for arm in typing.get_args(kind) if arm is not type(None))
    if typing.get_origin(kind) is list:
        (element,) = typing.get_args(kind)
        return [_convert(item, element) for item in value]
    if dataclasses.is_dataclass(kind):
        targets = _targets(kind)  # type: ignore[arg-type]
        both = {targets[_bare(name)]: item for name, item in vars(value).items() if _bare(name) in targets}
        return kind(  # type: ignore[operator]
            **{name: _convert(item, hint) for (name, hint), item in both.items() if item is not None}
        )
    if issubclass(kind, Enum):
        # Version 1 has no word for NOACCELERATION: it leaves the (optional) field out.
        return next((member for member in kind if _bare(member.value) == _bare(value.name)), None)
    if kind is XmlDate:
        return XmlDate.from_date(value)
    if kind is XmlTime:
        seconds, nanoseconds = divmod(int(value.numpy_value.astype(np.int64)), 10**9)
        return XmlTime(seconds // 3600, seconds // 60 % 60, seconds % 60, nanoseconds)
    if kind is bytes:
        return base64.b64decode(value)
    if kind is str:
        return _NOT_XML.sub("\ufffd", value.name if isinstance(value, Enum) else value)
    return kind(value)


class Writer:
    """The sending side of a stream of MRD version 2.

    Nothing is sent before the first image or the end: a peer that sends all its data before it reads is
    not waited for.

    Parameters
    ----------
    channel
        Where the bytes go; whoever made it closes it.
    header
        The header that came, which is copied through.
    """

    def __init__(self, channel: Channel, header: Header) -> None:
        self._channel = channel
        self._package = package = _package()
        start = io.BytesIO()
        out = package._binary.CodedOutputStream(start)
        out.write_bytes(MAGIC)
        out.write(_INT32, _FORMAT_VERSION)
        package._binary.string_serializer.write(out, package.binary.MrdWriterBase.schema)
        out.ensure_capacity(1)
        out.write_byte_no_check(1)  # there is a header
        package.binary.HeaderSerializer().write(out, header)
        out.flush()
        self._start = start.getvalue()

    def _write(self, item: bytes) -> None:
        self._channel.write(self._start, item)
        self._start = b""

    def image(self, image: ismrmrd.Image) -> None:
        """Send one image; `OSError` if the peer is gone.

        Raises
        ------
        ProtocolError
            If the pixels are not uint16, float32 or complex64.
        """
        package, pixels = self._package, np.ascontiguousarray(image.data)  # (C, Z, Y, X)
        items = package.StreamItem
        kinds = {
            "uint16": items.ImageUint16,
            "float32": items.ImageFloat,
            "complex64": items.ImageComplexFloat,
        }
        kind = kinds.get(pixels.dtype.name)
        if kind is None:
            raise ProtocolError(
                f"an image has pixels of type {pixels.dtype}: expected uint16, float32 or complex64"
            )
        meta = {name: self._meta_values(value) for name, value in image.meta.items()}
        item = io.BytesIO()
        out = package._binary.CodedOutputStream(item)
        out.write_unsigned_varint(1)  # a block of one item
        out.write_unsigned_varint(kind.index)
        _, serializer = _items()[kind.index]
        serializer.write(out, package.Image(head=self._head(image), data=pixels, meta=meta))
        out.flush()
        self._write(item.getvalue())

    def _head(self, image: ismrmrd.Image) -> Any:
        package = self._package
        head = image.getHead()
        counters = "measurement_uid average slice contrast phase repetition set acquisition_time_stamp"
        places = {
            "field_of_view": head.field_of_view,
            "position": head.position,
            "col_dir": head.read_dir,
            "line_dir": head.phase_dir,
            "slice_dir": head.slice_dir,
            "patient_table_position": head.patient_table_position,
        }
        lists = ("physiology_time_stamp", "user_int", "user_float")
        return package.ImageHeader(
            flags=package.ImageFlags(head.flags),
            # Version 2 has no type for colours: three channels of magnitudes.
            image_type=package.ImageType(
                ismrmrd.IMTYPE_MAGNITUDE if head.image_type == ismrmrd.IMTYPE_RGB else head.image_type
            ),
            image_index=head.image_index,
            image_series_index=head.image_series_index,
            **{name: getattr(head, name) for name in counters.split()},
            **{name: np.array(place, np.float32) for name, place in places.items()},
            **{name: list(getattr(head, name)) for name in lists},
        )

    def _meta_values(self, value: Any) -> list[Any]:
        kinds = self._package.ImageMetaValue
        values = []
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float):
                values.append(kinds.Float64(float(item)))
            elif isinstance(item, int) and not isinstance(item, bool) and -(2**63) <= item < 2**63:
                values.append(kinds.Int64(int(item)))
            else:  # an empty text of version 1 is read back as None
                values.append(kinds.String("" if item is None else str(item)))
        return values

    def close(self) -> None:
        """Send the end mark; the preamble and the header before it, if no image went out."""
        self._write(b"\0")
