"""Streams of MRD version 2 as the package `mrd-python` writes them."""

from __future__ import annotations

import datetime as dt
import enum
import io
import itertools
import types
import typing
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ismrmrd
import numpy as np
import pytest

from whorl.doors.files import read_header, read_readouts
from whorl.scan.readout import Readout

with warnings.catch_warnings():
    # On Python 3.12 the package uses a deprecated function of datetime while it is imported.
    warnings.simplefilter("ignore", DeprecationWarning)
    mrd = pytest.importorskip("mrd")


def written(items: Iterable[Any], header: Any = None) -> bytes:
    """The bytes of a stream; the header is the full one if none is given."""
    stream = io.BytesIO()
    with mrd.BinaryMrdWriter(stream) as writer:
        writer.write_header(full_header() if header is None else header)
        writer.write_data(list(items))
    return stream.getvalue()


def header_of(path: Path) -> Any:
    """The header of an MRD file in version 2, as far as spiral MRF needs it."""
    old = ismrmrd.xsd.CreateFromDocument(read_header(path))
    (encoding,) = old.encoding

    def space(of: Any) -> Any:
        size, field = of.matrixSize, of.fieldOfView_mm
        return mrd.EncodingSpaceType(
            matrix_size=mrd.MatrixSizeType(x=size.x, y=size.y, z=size.z),
            field_of_view_mm=mrd.FieldOfViewMm(x=field.x, y=field.y, z=field.z),
        )

    def limit(of: Any) -> Any:
        return of and mrd.LimitType(minimum=of.minimum, maximum=of.maximum, center=of.center)

    limits, sequence = encoding.encodingLimits, old.sequenceParameters
    measurement = old.measurementInformation
    return mrd.Header(
        measurement_information=measurement
        and mrd.MeasurementInformationType(protocol_name=measurement.protocolName),
        acquisition_system_information=mrd.AcquisitionSystemInformationType(
            receiver_channels=old.acquisitionSystemInformation.receiverChannels
        ),
        encoding=[
            mrd.EncodingType(
                encoded_space=space(encoding.encodedSpace),
                recon_space=space(encoding.reconSpace),
                encoding_limits=mrd.EncodingLimitsType(
                    slice=limit(limits.slice), repetition=limit(limits.repetition)
                ),
                trajectory=mrd.Trajectory.SPIRAL,
            )
        ],
        sequence_parameters=mrd.SequenceParametersType(
            t_r=sequence.TR, t_e=sequence.TE, t_i=sequence.TI, flip_angle_deg=sequence.flipAngle_deg
        ),
    )


def stream_of(path: Path) -> bytes:
    """A scan in an MRD file as a stream of version 2."""
    return written(map(_item, read_readouts(path)), header_of(path))


def _item(readout: Readout) -> Any:
    head = readout.head
    idx = {name: int(head["idx"][name]) for name in ("kspace_encode_step_1", "slice", "repetition")}
    places = {
        name: head[name].copy()
        for name in ("position", "read_dir", "phase_dir", "slice_dir", "patient_table_position")
    }
    return mrd.StreamItem.Acquisition(
        mrd.Acquisition(
            head=mrd.AcquisitionHeader(
                flags=mrd.AcquisitionFlags(int(head["flags"])),
                idx=mrd.EncodingCounters(**idx),
                measurement_uid=int(head["measurement_uid"]),
                scan_counter=int(head["scan_counter"]),
                acquisition_time_stamp=int(head["acquisition_time_stamp"]),
                channel_order=list(range(len(readout.data))),
                sample_time_us=float(head["sample_time_us"]),
                user_int=[int(value) for value in head["user_int"]],
                **places,
            ),
            data=readout.data.copy(),
            trajectory=np.ascontiguousarray(readout.trajectory.T),
        )
    )


def preamble() -> bytes:
    """Magic, format version and schema: what comes before the header."""
    with_header = written([], mrd.Header())
    return with_header[: with_header.index(mrd.BinaryMrdReader.schema.encode()) + schema_bytes()]


def schema_bytes() -> int:
    return len(mrd.BinaryMrdReader.schema.encode())


def full_header() -> Any:
    """A header in which every field that MRD version 2 has is filled, with values that differ."""
    return _filled(mrd.Header, itertools.count(1))


def _filled(kind: Any, numbers: Any) -> Any:
    origin, arms = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        n = next(numbers)
        return n if arms[0] is int else float(np.float32(n + 0.1))
    if origin in (typing.Union, types.UnionType):
        return _filled(next(arm for arm in arms if arm is not type(None)), numbers)
    if origin is list:
        return [_filled(arms[0], numbers) for _ in range(3)]
    if kind is str:
        return f"text {next(numbers)} µ <&>"
    if kind is dt.date:
        return dt.date(2001, 2, 3) + dt.timedelta(next(numbers))
    if kind is mrd.yardl_types.Time:
        return mrd.yardl_types.Time.from_components(13, 14, 15, 10**6 * next(numbers))
    if issubclass(kind, enum.Enum):
        return list(kind)[-1]
    hints = typing.get_type_hints(kind, include_extras=True)
    values = {name: _filled(hint, numbers) for name, hint in hints.items()}
    if kind is mrd.UserParameterBase64Type:
        values["value"] = "AAECAwQ="
    return kind(**values)


def acquisition(n_coils: int = 3, n_samples: int = 7, n_columns: int = 2, seed: int = 0, **head: Any) -> Any:
    """A readout in which each field of the head differs from the others."""
    rng = np.random.default_rng(seed)
    values: dict[str, Any] = {
        "flags": mrd.AcquisitionFlags.LAST_IN_SLICE,
        "idx": mrd.EncodingCounters(
            kspace_encode_step_1=1,
            kspace_encode_step_2=2,
            average=3,
            slice=4,
            contrast=5,
            phase=6,
            repetition=7,
            set=8,
            segment=65535,
            user=[10, 11, 12],
        ),
        "measurement_uid": 4000000000,
        "scan_counter": 70000,
        "acquisition_time_stamp": 123456,
        "physiology_time_stamp": [21, 22, 23, 24],
        "channel_order": list(range(n_coils)),
        "discard_pre": 1,
        "discard_post": 2,
        "center_sample": 3,
        "encoding_space_ref": 4,
        "sample_time_us": 2.5,
        **{
            name: rng.standard_normal(3).astype(np.float32)
            for name in ("position", "read_dir", "phase_dir", "slice_dir", "patient_table_position")
        },
        "user_int": [-1, 2, -3, 4, -5, 6, -7, 8, -9],
        "user_float": [0.5, -1.5],
    }
    data = rng.standard_normal((n_coils, n_samples)) + 1j * rng.standard_normal((n_coils, n_samples))
    return mrd.Acquisition(
        head=mrd.AcquisitionHeader(**(values | head)),
        data=data.astype(np.complex64),
        trajectory=rng.standard_normal((n_columns, n_samples if n_columns else 0)).astype(np.float32),
    )


def image(pixel: type, shape: tuple[int, ...] = (1, 1, 5, 6)) -> Any:
    """An image with each kind of meta value."""
    kind = mrd.ImageMetaValue
    meta = {"a": [kind.String("µ"), kind.Int64(-5), kind.Float64(0.25)], "empty": []}
    pixels = (np.arange(np.prod(shape)) * 700).astype(np.uint16).astype(pixel).reshape(shape)
    head = mrd.ImageHeader(image_type=mrd.ImageType.MAGNITUDE, user_int=[1, -2], user_float=[0.5])
    return mrd.Image(head=head, data=pixels, meta=meta)


def recon_data(head: Any) -> bytes:
    """Bytes of a ReconData with one buffer and one head, which the package can read but not write."""
    return _bytes(
        lambda out, b: (
            out.write_unsigned_varint(1),
            _array(out, b.complexfloat32_serializer, [1 + 2j, 3 - 4j], (2, 1, 1, 1, 1, 1, 1)),
            _array(out, b.float32_serializer, [], (0, 1, 1, 1, 1, 1, 1)),
            out.write_unsigned_varint(0),  # no density
            _array(out, mrd.binary.AcquisitionHeaderSerializer(), [head], (1, 1, 1, 1, 1)),
            mrd.binary.SamplingDescriptionSerializer().write(out, mrd.SamplingDescription()),
            out.write_unsigned_varint(0),  # no reference
        )
    )


def image_array(image: Any, waveform: Any) -> bytes:
    """Bytes of an ImageArray with two images, which the package can read but not write."""
    _, _, (_, meta) = mrd.binary.ImageSerializer(mrd._binary.uint16_serializer)._field_serializers
    return _bytes(
        lambda out, b: (
            _array(out, b.complexfloat32_serializer, [1 + 2j, 3 - 4j], (2, 1, 1, 1, 1, 1, 1)),
            _array(out, mrd.binary.ImageHeaderSerializer(), 2 * [image.head], (2, 1, 1)),
            _array(out, meta, 2 * [image.meta], (1, 2, 1)),
            b.VectorSerializer(mrd.binary.WaveformSerializer(b.uint32_serializer)).write(out, [waveform]),
        )
    )


def _array(out: Any, serializer: Any, values: list[Any], shape: tuple[int, ...]) -> None:
    for size in shape:
        out.write_unsigned_varint(size)
    for value in values:
        serializer.write(out, value)


def _bytes(write: Callable[[Any, Any], object]) -> bytes:
    stream = io.BytesIO()
    out = mrd._binary.CodedOutputStream(stream)
    write(out, mrd._binary)
    out.flush()
    return stream.getvalue()
