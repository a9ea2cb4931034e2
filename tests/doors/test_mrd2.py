"""MRD version 2: the package `mrd-python` and whorl read each other, and no length field is believed."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import ismrmrd
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doors import mrd2_peer as peer
from doors.messages import make_image
from doors.mrd2_peer import mrd
from whorl.doors import mrd2, wire
from whorl.doors.transport import Channel, StreamTimeout
from whorl.scan.failure import EndOfStream
from whorl.scan.header import read_header
from whorl.scan.readout import HEAD_DTYPE, Flag, Readout

Item = mrd.StreamItem


@contextlib.contextmanager
def arriving(raw: bytes, *, end: bool = True, timeout_s: float = 10.0) -> Iterator[Channel]:
    """A channel on a real socket through which `raw` comes, and then the end if it is not to stay open."""
    left, right = socket.socketpair()

    def send() -> None:
        with contextlib.suppress(OSError):  # a reader that refused the bytes is gone
            left.sendall(raw)
            if end:
                left.shutdown(socket.SHUT_WR)

    with left, right:
        sender = threading.Thread(target=send)
        sender.start()
        try:
            yield Channel(right, timeout_s)
        finally:
            right.close()
            sender.join()


def messages(raw: bytes) -> list[Any]:
    """All messages of a stream that comes and ends."""
    got: list[Any] = []
    with arriving(raw) as channel:
        reader = mrd2.Reader(channel)
        while not (got and isinstance(got[-1], wire.Close)):
            got.append(reader.read_message())
    return got


def only(raw: bytes) -> Any:
    message, close = messages(raw)
    assert close == wire.Close()
    return message


@pytest.mark.parametrize(
    ("n_coils", "n_samples", "n_columns"), [(1, 7, 2), (3, 8, 3), (5, 1, 0), (2, 0, 2), (20, 4001, 2)]
)
def test_readouts_arrive(n_coils: int, n_samples: int, n_columns: int) -> None:
    sent = [peer.acquisition(n_coils, n_samples, n_columns, seed) for seed in (1, 2)]
    *got, close = messages(peer.written([Item.Acquisition(a) for a in sent]))
    assert close == wire.Close()
    assert len(got) == 2
    columns = n_columns if n_samples else 0
    for readout, acquisition in zip(got, sent, strict=True):
        assert readout.data.dtype == np.complex64
        assert readout.data.shape == (n_coils, n_samples)
        np.testing.assert_array_equal(readout.data, acquisition.data)
        assert readout.trajectory.dtype == np.float32
        assert readout.trajectory.shape == (n_samples, columns)
        if columns:
            np.testing.assert_array_equal(readout.trajectory, acquisition.trajectory.T)


def test_the_head_becomes_that_of_version_1() -> None:
    sent = peer.acquisition(3, 7, 2)
    readout = only(peer.written([Item.Acquisition(sent)]))
    head = readout.head
    assert head.dtype == HEAD_DTYPE
    assert readout.flags == Flag.LAST_IN_SLICE == 1 << 7
    assert [head[name] for name in ("version", "active_channels", "available_channels")] == [1, 3, 3]
    assert [head[name] for name in ("number_of_samples", "trajectory_dimensions")] == [7, 2]
    assert head["channel_mask"].tolist() == [0b111] + 15 * [0]
    assert head["idx"].item()[:9] == (1, 2, 3, 4, 5, 6, 7, 8, 65535)
    assert head["idx"]["user"].tolist() == [10, 11, 12, 0, 0, 0, 0, 0]  # shorter: padded
    assert head["physiology_time_stamp"].tolist() == [21, 22, 23]  # longer: cut
    assert head["user_int"].tolist() == [-1, 2, -3, 4, -5, 6, -7, 8]
    assert head["user_float"].tolist() == [0.5, -1.5, 0, 0, 0, 0, 0, 0]
    same = "measurement_uid scan_counter acquisition_time_stamp discard_pre discard_post center_sample "
    same += "encoding_space_ref sample_time_us"
    for name in same.split():
        assert head[name] == getattr(sent.head, name), name
    for name in ("position", "read_dir", "phase_dir", "slice_dir", "patient_table_position"):
        np.testing.assert_array_equal(head[name], getattr(sent.head, name))


def test_fields_that_are_not_given_are_zero() -> None:
    sent = mrd.Acquisition(data=np.ones((2, 3), np.complex64))
    readout = only(peer.written([Item.Acquisition(sent)]))
    sizes = {"version": 1, "active_channels": 2, "available_channels": 2, "number_of_samples": 3}
    for name in HEAD_DTYPE.names:
        assert readout.head[name].tobytes().strip(b"\0") == bytes([sizes[name]] if name in sizes else []), (
            name
        )


@pytest.mark.parametrize(
    "head",
    [
        {"idx": mrd.EncodingCounters(slice=65536)},
        {"idx": mrd.EncodingCounters(user=[0, 65536])},
        {"discard_post": 65536},
        {"center_sample": 1 << 20},
        {"flags": mrd.AcquisitionFlags(1 << 40)},
    ],
    ids=["slice", "user", "discard", "centre", "flags that fit"],
)
def test_a_counter_that_does_not_fit_is_not_wrapped(head: dict[str, Any]) -> None:
    fits = peer.acquisition()
    *got, _ = messages(peer.written([Item.Acquisition(peer.acquisition(**head)), Item.Acquisition(fits)]))
    if "flags" in head:
        assert got[0].flags == 1 << 40
    else:
        assert got[0] == wire.Skipped("readout whose counters do not fit MRD version 1")
    np.testing.assert_array_equal(got[1].data, fits.data)


def test_arrays_that_do_not_fit_are_named() -> None:
    long, wide, deep = peer.acquisition(1, 65536), peer.acquisition(1025, 1), peer.acquisition(1, 2, 5)
    odd = peer.acquisition(1, 4, 2)
    odd.trajectory = odd.trajectory[:, :3].copy()
    *got, _ = messages(peer.written([Item.Acquisition(a) for a in (long, wide, deep, odd)]))
    counters = wire.Skipped("readout whose counters do not fit MRD version 1")
    assert got == [counters] * 3 + [wire.Skipped("readout whose trajectory has not the samples of its data")]


def test_other_items_are_skipped_and_named() -> None:
    acquisition = peer.acquisition()
    waveform = mrd.Waveform(data=np.arange(10, dtype=np.uint32).reshape(2, 5) * 10**8)
    bucket = mrd.AcquisitionBucket(
        data=[acquisition, acquisition],
        datastats=[mrd.EncodingLimitsType(slice=mrd.LimitType(maximum=300))],
        waveforms=[waveform],
    )
    pixels = {
        "ImageUint16": np.uint16,
        "ImageInt16": np.int16,
        "ImageUint32": np.uint32,
        "ImageInt32": np.int32,
        "ImageFloat": np.float32,
        "ImageDouble": np.float64,
        "ImageComplexFloat": np.complex64,
        "ImageComplexDouble": np.complex128,
    }
    sent = [
        Item.WaveformUint32(waveform),
        *(getattr(Item, name)(peer.image(pixel)) for name, pixel in pixels.items()),
        Item.ImageUint16(peer.image(np.uint16, (2, 3, 211, 101))),
        Item.AcquisitionBucket(bucket),
        Item.ArrayComplexFloat(np.ones((2, 0, 3), np.complex64)),
        Item.ArrayComplexFloat(np.ones((2, 4, 3), np.complex64)),
    ]
    # A readout behind each: only what was read past exactly leaves it whole.
    raw = peer.written([item for one in sent for item in (one, Item.Acquisition(acquisition))])
    got = messages(raw)[:-1]
    kinds = ["waveform", *9 * ["image"], "acquisition bucket", "array", "array"]
    assert got[::2] == [wire.Skipped(kind) for kind in kinds]
    for readout in got[1::2]:
        np.testing.assert_array_equal(readout.data, acquisition.data)


def test_arrays_of_records_are_skipped_and_named() -> None:
    acquisition = peer.acquisition()
    waveform = mrd.Waveform(data=np.arange(10, dtype=np.uint32).reshape(2, 5) * 10**8)
    recon, images = peer.recon_data(acquisition.head), peer.image_array(peer.image(np.uint16), waveform)
    readout = peer.written([Item.Acquisition(acquisition)], mrd.Header())[len(EMPTY) :]
    *got, close = messages(_item(11, recon) + b"\1\x0d" + images + readout)
    assert got[:2] == [wire.Skipped("reconstruction buffers"), wire.Skipped("image array")]
    np.testing.assert_array_equal(got[2].data, acquisition.data)
    assert close == wire.Close()


def test_a_readout_is_given_before_more_comes() -> None:
    raw = peer.written([Item.Acquisition(peer.acquisition())])
    with arriving(raw[:-1], end=False, timeout_s=0.2) as channel:
        reader = mrd2.Reader(channel)
        assert isinstance(reader.read_message(), Readout)
        assert channel.n_readouts == 1
        with pytest.raises(StreamTimeout, match="after 1 readouts: expected an item"):
            reader.read_message()


def test_bytes_that_told_the_version_are_not_lost() -> None:
    raw = peer.written([])
    for n in range(6):
        with arriving(raw[n:]) as channel:
            reader = mrd2.Reader(channel, raw[:n])
            assert reader.header == peer.full_header()
            assert reader.read_message() == wire.Close()


def same(old: Any, new: Any, where: str) -> int:
    """Compare a header of version 2 with one of version 1 field by field; the number of values compared."""
    assert new is not None, where
    if isinstance(old, list):
        assert len(old) == len(new), where
        return sum(same(*pair, f"{where}[{i}]") for i, pair in enumerate(zip(old, new, strict=True)))
    if isinstance(old, enum.Enum):
        got = new.value if isinstance(new, enum.Enum) else new
        assert got.replace("_", "").lower() == old.name.replace("_", "").lower(), where
        return 1
    if dataclasses.is_dataclass(new):
        names = {f.name.replace("_", "").lower(): f.name for f in dataclasses.fields(new)}
        assert {name.replace("_", "") for name in vars(old)} == set(names), where
        return sum(
            same(value, getattr(new, names[name.replace("_", "")]), f"{where}.{name}")
            for name, value in vars(old).items()
        )
    if isinstance(new, bytes):
        assert new == bytes(range(5)), where
    elif isinstance(old, int | float | str):
        assert new == old, where  # float32 in both: exactly
    else:
        assert str(new) == str(old), where  # dates and times
    return 1


def test_every_field_of_the_header_survives() -> None:
    header = peer.full_header()
    with arriving(peer.written([], header)) as channel:
        reader = mrd2.Reader(channel)
    assert reader.header == header
    assert same(header, ismrmrd.xsd.CreateFromDocument(reader.header_xml()), "header") == 500


def test_what_the_reconstruction_needs_survives() -> None:
    flips = np.random.default_rng(0).uniform(5, 75, 1000).astype(np.float32).tolist()

    def space(x: int, y: int) -> Any:
        fov = mrd.FieldOfViewMm(x=300.5, y=299.25, z=5.0)
        return mrd.EncodingSpaceType(matrix_size=mrd.MatrixSizeType(x=x, y=y, z=1), field_of_view_mm=fov)

    encoding = mrd.EncodingType(
        encoded_space=space(257, 250),
        recon_space=space(192, 190),
        encoding_limits=mrd.EncodingLimitsType(
            slice=mrd.LimitType(maximum=2), repetition=mrd.LimitType(maximum=999)
        ),
        trajectory=mrd.Trajectory.SPIRAL,
    )
    header = mrd.Header(
        encoding=[encoding],
        sequence_parameters=mrd.SequenceParametersType(
            t_r=[12.5, 13.25], t_e=[2.0], t_i=[20.5], flip_angle_deg=flips
        ),
        measurement_information=mrd.MeasurementInformationType(
            protocol_name="mrf µ <&>\x01", patient_position=mrd.PatientPosition.H_FS
        ),
    )
    with arriving(peer.written([], header)) as channel:
        got = read_header(mrd2.Reader(channel).header_xml())
    assert (got.encoded.matrix, got.recon.matrix) == ((257, 250, 1), (192, 190, 1))
    assert got.recon.fov_mm == (300.5, 299.25, 5.0)
    assert (got.flip_deg, got.tr_ms, got.te_ms, got.ti_ms) == (tuple(flips), (12.5, 13.25), (2.0,), (20.5,))
    assert (got.n_timepoints_announced, got.n_slices_announced) == (1000, 3)
    assert got.protocol_name == "mrf µ <&>\ufffd"


def test_a_word_that_version_1_has_not_is_left_out() -> None:
    header = peer.full_header()
    header.encoding[0].parallel_imaging.calibration_mode = mrd.CalibrationMode.NOACCELERATION
    with arriving(peer.written([], header)) as channel:
        document = ismrmrd.xsd.CreateFromDocument(mrd2.Reader(channel).header_xml())
    assert document.encoding[0].parallelImaging.calibrationMode is None


def test_a_value_that_no_version_has_is_refused() -> None:
    header = peer.full_header()
    header.encoding[0].trajectory = mrd.Trajectory(17)
    with arriving(peer.written([], header)) as channel:
        reader = mrd2.Reader(channel)
    with pytest.raises(wire.ProtocolError, match="Trajectory 17"):
        reader.header_xml()


def test_images_are_read_by_the_package() -> None:
    header = peer.full_header()
    sent = [make_image(np.uint16, 7, 300, Units="ms", empty=""), make_image(np.float32, 33, 5)]
    sent[0].meta["ImageRowDir"] = ["1.0", "0.0"]
    sent[0].meta["count"], sent[0].meta["slope"] = 3, 0.25
    head = sent[0].getHead()
    for i, (name, kind) in enumerate(ismrmrd.ImageHeader._fields_):
        if name in ("version", "data_type", "matrix_size", "channels", "attribute_string_len"):
            continue
        if hasattr(kind, "_length_"):
            getattr(head, name)[:] = [i + k for k in range(kind._length_)]
        else:
            setattr(head, name, i)
    sent[0].setHead(head)
    left, right = socket.socketpair()
    with left, right:
        channel = Channel(left, 10.0)

        def send() -> None:
            writer = mrd2.Writer(channel, header)
            for image in sent:
                writer.image(image)
            writer.close()
            left.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        with right.makefile("rb") as stream, mrd.BinaryMrdReader(stream) as reader:
            assert reader.read_header() == header
            items = list(reader.read_data())
            assert stream.read() == b""
        sender.join()
    assert [type(item) for item in items] == [Item.ImageUint16, Item.ImageFloat]
    for item, image in zip(items, sent, strict=True):
        assert item.value.data.dtype == image.data.dtype
        np.testing.assert_array_equal(item.value.data, image.data)
    got = items[0].value
    other = {"read_dir": "col_dir", "phase_dir": "line_dir"}
    for i, (name, kind) in enumerate(ismrmrd.ImageHeader._fields_):
        value = getattr(got.head, other.get(name, name), None)
        if value is not None:
            value = getattr(value, "value", value)
            expected = [i + k for k in range(kind._length_)] if hasattr(kind, "_length_") else i
            np.testing.assert_array_equal(value, expected, name)
    assert got.head.image_series_index is not None
    kind = mrd.ImageMetaValue
    assert got.meta["Units"] == [kind.String("ms")]
    assert got.meta["empty"] == [kind.String("")]
    assert got.meta["ImageRowDir"] == [kind.String("1.0"), kind.String("0.0")]
    assert (got.meta["count"], got.meta["slope"]) == ([kind.Int64(3)], [kind.Float64(0.25)])


def test_nothing_is_sent_before_there_is_something() -> None:
    left, right = socket.socketpair()
    with left, right:
        writer = mrd2.Writer(Channel(left, 5.0), peer.full_header())
        right.setblocking(False)
        with pytest.raises(BlockingIOError):
            right.recv(1)
        with pytest.raises(wire.ProtocolError, match="float64: expected uint16, float32 or complex64"):
            writer.image(make_image(np.float64))
        writer.close()
        left.shutdown(socket.SHUT_WR)
        right.setblocking(True)
        with right.makefile("rb") as stream:
            assert stream.read() == peer.written([])


def varint(value: int) -> bytes:
    raw = b""
    while value >= 0x80:
        raw += bytes([value & 0x7F | 0x80])
        value >>= 7
    return raw + bytes([value])


START = peer.preamble()
EMPTY = peer.written([], mrd.Header())[:-1]  # up to the first block of items
HUGE = varint((1 << 62) + 1)


def _item(tag: int, raw: bytes) -> bytes:
    return EMPTY + b"\x01" + bytes([tag]) + raw


def _acquisition(*shape: int, after: bytes = b"") -> bytes:
    """A readout that ends after the announced shape of its data, and `after`."""
    whole = peer.written([Item.Acquisition(mrd.Acquisition())], mrd.Header())
    assert whole.endswith(bytes(5))  # two shapes of 0 and the end mark
    return whole[:-5] + b"".join(varint(n) for n in shape) + after


def _image(tag: int, *shape: int, after: bytes = b"") -> bytes:
    image = mrd.Image(
        head=mrd.ImageHeader(image_type=mrd.ImageType.PHASE), data=np.zeros((0, 0, 0, 0), np.uint16)
    )
    whole = peer.written([Item.ImageUint16(image)], mrd.Header())
    at = len(EMPTY) + 1
    return whole[:at] + bytes([tag]) + whole[at + 1 : -6] + b"".join(varint(n) for n in shape) + after


REFUSED: dict[str, tuple[bytes, str]] = {
    "magic": (b"yarda" + START[5:], "starts with"),
    "format": (START[:5] + b"\2" + START[6:], "binary format 2: expected 1"),
    "schema": (START[:-1] + b"]", "schema mismatch"),
    "schema length": (START[:9] + HUGE, "schema mismatch"),
    "no header": (START + b"\0", "without a header"),
    "varint without end": (START[:9] + b"\xff" * 20, "more than 10 bytes"),
    "header string": (START + b"\1\0\1" + b"\1" + HUGE, "announces 4611686018427387905 bytes more"),
    "header not UTF-8": (START + b"\1\0\1" + b"\1\2\xff\xfe", "cannot be read"),
    "header vector": (
        START + b"\1" + bytes(5) + b"\2" + HUGE + bytes(1 << 23),
        "more numbers than the limit|bytes more",
    ),
    "item tag": (_item(14, b""), "type 14: expected 0 to 13"),
    "data shape": (_acquisition(1 << 31, 1 << 31), "announces"),
    "data shape that wraps to 0": (_acquisition(1 << 33, 1 << 31, after=bytes(99)), "readout"),
    "data shape that wraps below 0": (_acquisition(1 << 32, 1 << 31), "announces -"),
    "data shape beyond 64 bits": (_acquisition((1 << 70) - 1, (1 << 70) - 1), "readout"),
    "data of 257 MiB": (_acquisition(257, 1 << 17), "announces"),
    "trajectory shape": (_acquisition(0, 0, 1 << 40, 2), "announces"),
    "vector in a head": (_item(0, bytes(10) + HUGE + bytes(1 << 20)), "more numbers than the limit"),
    "integer image": (_image(2, 1, 1, 1 << 31, 1 << 31, after=bytes(300 << 20)), "bytes more"),
    "float image": (_image(6, 1, 1, 1 << 31, 1 << 31), "announces"),
    "image of factors without end": (_image(6, *[(1 << 70) - 1] * 4), "announces"),
    "image meta type": (_image(6, 0, 0, 0, 0, after=b"\1\1a\1\7"), "type 7: expected 0 to 2"),
    "image meta string": (_image(6, 0, 0, 0, 0, after=b"\1" + HUGE), "announces"),
    "array dimensions": (_item(12, HUGE + b"\xff" * 10), "more than 10 bytes"),
    "bytes behind the end": (EMPTY + b"\0" + b"x", "follow the end mark"),
}


@pytest.mark.parametrize(("raw", "text"), REFUSED.values(), ids=list(REFUSED))
def test_what_a_length_field_says_is_not_believed(raw: bytes, text: str) -> None:
    with pytest.raises(wire.ProtocolError, match=text):
        messages(raw)


def test_the_package_is_named_when_it_is_missing() -> None:
    code = "import sys; sys.modules['mrd'] = None\nfrom whorl.doors import mrd2\nmrd2.Reader(None)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'package mrd-python is missing: pip install "whorl-mrf[mrd2]"' in run.stderr


def _small_header() -> Any:
    full = peer.full_header()
    return mrd.Header(
        study_information=full.study_information, sequence_parameters=full.sequence_parameters, version=1
    )


SMALL = peer.written(
    [
        Item.Acquisition(peer.acquisition(1, 2, 2)),
        Item.ImageUint16(peer.image(np.uint16, (1, 1, 2, 2))),
        Item.WaveformUint32(mrd.Waveform(data=np.ones((1, 2), np.uint32))),
    ],
    _small_header(),
)


def test_a_stream_that_ends_anywhere_says_so() -> None:
    # Of the schema, a text of 21336 bytes, some places will do.
    inside = range(20, len(START) - 20, 1999)
    for n in [*range(20), *inside, *range(len(START) - 20, len(SMALL))]:
        with pytest.raises(EndOfStream, match="the stream ended"):
            messages(SMALL[:n])


def outcome(raw: bytes) -> None:
    """Read a stream to its end; the two errors are the only ones."""
    with contextlib.suppress(wire.ProtocolError, EndOfStream), arriving(raw) as channel:
        reader = mrd2.Reader(channel)
        with contextlib.suppress(wire.ProtocolError):
            reader.header_xml()
        while not isinstance(reader.read_message(), wire.Close):
            pass


@settings(derandomize=True, deadline=None, max_examples=400, database=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(len(START), len(SMALL)), st.binary(max_size=11), st.integers(0, 11)),
        min_size=1,
        max_size=4,
    )
)
def test_changed_bytes_give_messages_or_a_sentence(edits: list[tuple[int, bytes, int]]) -> None:
    raw = SMALL
    for at, new, n_removed in edits:
        raw = raw[:at] + new + raw[at + n_removed :]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome(raw)
    # KiB; an array of a readout is at most 256 MiB and is touched only as far as it is filled.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
