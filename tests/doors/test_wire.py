"""Framing: each message makes the round trip, and no sender makes the reader hang or swell."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator

import ismrmrd
import numpy as np
import pytest

from doors.messages import bytes_of, make_image, make_readout, make_waveform
from whorl.doors import wire
from whorl.doors.transport import Channel, StreamTimeout
from whorl.scan.failure import EndOfStream
from whorl.scan.readout import HEAD_DTYPE, Readout


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, Channel, Channel]]:
    """Two ends of a real socket: the raw one, a channel on it, and the channel that reads."""
    left, right = socket.socketpair()
    with left, right:
        yield left, Channel(left, 5.0), Channel(right, 5.0)


def send_in_background(send: Callable[[], None]) -> threading.Thread:
    # A message may be larger than the socket's buffers.
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("n_coils", "n_samples", "n_columns"), [(1, 7, 2), (3, 8, 3), (8, 883, 2), (5, 1, 0), (2, 0, 2)]
)
def test_readout_round_trip(pair, n_coils: int, n_samples: int, n_columns: int) -> None:
    _, sender, receiver = pair
    first, second = (make_readout(n_coils, n_samples, n_columns, seed) for seed in (1, 2))
    send_in_background(lambda: (wire.write_readout(sender, first), wire.write_readout(sender, second)))
    for sent in (first, second):
        got = wire.read_message(receiver)
        assert isinstance(got, Readout)
        assert got.head.tobytes() == sent.head.tobytes()
        assert got.data.dtype == np.complex64
        assert got.data.shape == (n_coils, n_samples)
        np.testing.assert_array_equal(got.data, sent.data)
        assert got.trajectory.shape == (n_samples, n_columns)
        np.testing.assert_array_equal(got.trajectory, sent.trajectory)
    assert receiver.n_readouts == 2


def test_the_head_outlives_the_samples(pair) -> None:
    _, sender, receiver = pair
    wire.write_readout(sender, make_readout(2, 5, 2, 1))
    first = wire.read_message(receiver)
    assert isinstance(first, Readout)
    before, samples = first.head.tobytes(), first.data
    other = make_readout(2, 5, 2, 9)
    other.head["scan_counter"] = 77
    wire.write_readout(sender, other)
    wire.read_message(receiver)
    assert first.head.tobytes() == before
    # The samples' memory is used again: nothing is allocated for a readout.
    np.testing.assert_array_equal(samples, other.data)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize(("ny", "nx"), [(7, 8), (64, 33)])
def test_image_round_trip(pair, dtype: type, ny: int, nx: int) -> None:
    _, sender, receiver = pair
    sent = make_image(dtype, ny, nx, whorl_status="complete", Units="ms", ImageComments="µ ± <&>")
    send_in_background(lambda: wire.write_image(sender, sent))
    got = wire.read_message(receiver, keep_images=True)
    assert isinstance(got, wire.ImageMessage)
    assert got.image.data.dtype == dtype
    assert got.image.data.shape == (1, 1, ny, nx)
    np.testing.assert_array_equal(got.image.data, sent.data)
    assert dict(got.image.meta) == dict(sent.meta)
    assert (got.image.image_series_index, got.image.image_index) == (2, 7)


def test_an_image_of_another_type_is_not_sent(pair) -> None:
    _, sender, _ = pair
    with pytest.raises(wire.ProtocolError, match="expected uint16, float32 or complex64"):
        wire.write_image(sender, make_image(np.int16, 4, 4))


def test_images_are_read_like_the_ismrmrd_package_writes_them(pair) -> None:
    raw, _, receiver = pair
    sent = make_image(np.uint16, 5, 6, a="b")
    raw.sendall(struct.pack("<H", wire.IMAGE) + sent.to_bytes())
    got = wire.read_message(receiver, keep_images=True)
    assert isinstance(got, wire.ImageMessage)
    np.testing.assert_array_equal(got.image.data, sent.data)


def test_readouts_are_those_of_the_ismrmrd_package(pair) -> None:
    raw, _, receiver = pair
    data = np.arange(6, dtype=np.complex64).reshape(2, 3) * (1 - 2j)
    sent = ismrmrd.Acquisition.from_array(data, np.arange(6, dtype=np.float32).reshape(3, 2))
    sent.user_int[3] = -5
    raw.sendall(struct.pack("<H", wire.ACQUISITION) + sent.to_bytes())
    got = wire.read_message(receiver)
    assert isinstance(got, Readout)
    np.testing.assert_array_equal(got.data, data)
    np.testing.assert_array_equal(got.trajectory, sent.traj)
    assert int(got.head["user_int"][3]) == -5


@pytest.mark.parametrize("text", ["", "a", "odd", "Größe ±1 µs", "x" * 100_001])
def test_texts_round_trip(pair, text: str) -> None:
    _, sender, receiver = pair

    def send() -> None:
        wire.write_text(sender, text)
        wire.write_error(sender, text)
        wire.write_config_text(sender, text, terminate=False)
        wire.write_config_text(sender, text)
        wire.write_header(sender, text, terminate=False)
        wire.write_header(sender, text)
        wire.write_config_name(sender, text[:500])
        wire.write_close(sender)

    send_in_background(send)
    raw = text.encode()
    got = [wire.read_message(receiver) for _ in range(8)]
    assert got == [
        wire.Text(text),
        wire.Error(text),
        wire.ConfigText(raw),
        wire.ConfigText(raw + b"\0"),
        wire.HeaderText(raw),
        wire.HeaderText(raw + b"\0"),
        wire.ConfigName(text[:500]),
        wire.Close(),
    ]


def test_the_length_of_a_text_counts_its_nul(pair) -> None:
    _, sender, receiver = pair
    wire.write_text(sender, "WRN x")
    assert bytes(receiver.read(12, "bytes")) == struct.pack("<HI", 5, 6) + b"WRN x\0"
    wire.write_error(sender, "x")
    assert bytes(receiver.read(11, "bytes")) == struct.pack("<HQ", 8, 1) + b"x"


def test_waveforms_and_unwanted_images_are_read_past(pair) -> None:
    raw, sender, receiver = pair

    def send() -> None:
        raw.sendall(make_waveform(3, 11))
        wire.write_image(sender, make_image(np.uint16, 9, 4))
        raw.sendall(make_waveform(100, 6001))
        wire.write_close(sender)

    send_in_background(send)
    got = [wire.read_message(receiver) for _ in range(4)]
    assert got == [wire.Skipped("waveform"), wire.Skipped("image"), wire.Skipped("waveform"), wire.Close()]


COMPLETE = {
    "config name": bytes_of(lambda c: wire.write_config_name(c, "whorl")),
    "config": bytes_of(lambda c: wire.write_config_text(c, "<configuration/>")),
    "header": bytes_of(lambda c: wire.write_header(c, "<ismrmrdHeader/>")),
    "text": bytes_of(lambda c: wire.write_text(c, "DBG x")),
    "error": bytes_of(lambda c: wire.write_error(c, "failed")),
    "acquisition": bytes_of(lambda c: wire.write_readout(c, make_readout(2, 9, 2))),
    "image": bytes_of(lambda c: wire.write_image(c, make_image(np.uint16, 3, 5, a="b"))),
    "waveform": make_waveform(),
    "close": bytes_of(wire.write_close),
}


@pytest.mark.parametrize("kind", COMPLETE)
def test_a_stream_that_ends_inside_a_message_says_so(kind: str) -> None:
    message = COMPLETE[kind]
    cuts = sorted({0, 1, 2, 3, 5, len(message) // 2, len(message) - 1} & set(range(len(message))))
    for cut in cuts:
        left, right = socket.socketpair()
        with left, right:
            left.sendall(COMPLETE["acquisition"] + message[:cut])
            left.close()
            receiver = Channel(right, 5.0)
            wire.read_message(receiver)
            with pytest.raises(EndOfStream, match="before CLOSE, after 1 readouts: expected"):
                wire.read_message(receiver, keep_images=True)


def acquisition_head(**fields: int) -> bytes:
    head = np.zeros(1, HEAD_DTYPE)
    for name, value in fields.items():
        head[name] = value
    return struct.pack("<H", wire.ACQUISITION) + head.tobytes()


def image_head(nx: int, n_attributes: int, data_type: int = 1) -> bytes:
    head = ismrmrd.ImageHeader()
    head.data_type, head.channels = data_type, 1
    head.matrix_size = (nx, nx, 1)
    return struct.pack("<H", wire.IMAGE) + bytes(head) + struct.pack("<Q", n_attributes)


TOO_LARGE = {
    "header of 4 GiB": (struct.pack("<HI", 3, 0xFFFFFFFF), "header announces 4294967295 bytes: .* 4194304"),
    "header": (struct.pack("<HI", 3, (4 << 20) + 1), "at most 4194304"),
    "config": (struct.pack("<HI", 2, (1 << 20) + 1), "configuration announces 1048577 bytes"),
    "text": (struct.pack("<HI", 5, (1 << 20) + 1), "a text announces"),
    "error": (struct.pack("<HQ", 8, 1 << 63), "an error announces"),
    "channels": (acquisition_head(active_channels=1025, number_of_samples=1), "1025 active channels"),
    "columns": (acquisition_head(trajectory_dimensions=5, number_of_samples=1), "5 trajectory dimensions"),
    "samples": (acquisition_head(active_channels=1024, number_of_samples=65535), "acquisition announces"),
    "image": (image_head(20000, 0), "an image announces"),
    "attributes": (image_head(2, 1 << 62), "attributes of an image announces"),
    "pixel type": (image_head(2, 0, 9), "data type 9"),
    "waveform": (
        struct.pack("<H", 1026) + np.full(1, 65535, wire._WAVEFORM_HEAD).tobytes(),
        "a waveform announces",
    ),
    "unknown id": (struct.pack("<H", 4711), "message id 4711"),
    "Gadgetron's query": (struct.pack("<H", 6), "message id 6 "),
}


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_a_limit_refuses_before_anything_is_read_or_taken(pair, kind: str) -> None:
    raw, _, receiver = pair
    message, text = TOO_LARGE[kind]
    # Nothing follows and the sender stays: whoever waits for the announced bytes runs into the timeout.
    raw.sendall(message)
    with pytest.raises(wire.ProtocolError, match=text):
        wire.read_message(receiver, keep_images=True)
    assert receiver._buffer.size == 0


def test_attributes_that_are_no_xml_are_refused(pair) -> None:
    raw, _, receiver = pair
    raw.sendall(image_head(2, 3) + b"<a>" + bytes(8))
    with pytest.raises(wire.ProtocolError, match="not MRD meta XML"):
        wire.read_message(receiver, keep_images=True)


def test_a_silent_peer_is_left_after_the_timeout() -> None:
    left, right = socket.socketpair()
    with (
        left,
        right,
        pytest.raises(StreamTimeout, match=r"nothing was received for 0.1 s after 0 readouts"),
    ):
        wire.read_message(Channel(right, 0.1))


def test_a_peer_that_drips_is_left_when_the_time_is_over() -> None:
    left, right = socket.socketpair()
    with left, right:
        done = threading.Event()

        def drip() -> None:
            left.sendall(struct.pack("<HI", 3, 100_000))  # 20 s of drops
            while not done.wait(0.0002):
                left.sendall(b"x")

        thread = send_in_background(drip)
        channel = Channel(right, 5.0)
        channel.limit_time(0.3)
        with pytest.raises(StreamTimeout):
            wire.read_message(channel)
        done.set()
        thread.join()


def test_a_readout_whose_arrays_contradict_its_head_is_not_sent(pair) -> None:
    _, sender, _ = pair
    good = make_readout(2, 9, 2)
    with pytest.raises(wire.ProtocolError, match=r"data \(2, 8\)"):
        wire.write_readout(sender, Readout(good.head, good.trajectory, good.data[:, :8]))


def test_messages_of_several_threads_do_not_mix(pair) -> None:
    _, sender, receiver = pair

    def send(n: int) -> None:
        for _ in range(50):
            wire.write_text(sender, str(n) * 3001)

    threads = [send_in_background(lambda n=n: send(n)) for n in range(4)]
    for _ in range(200):
        message = wire.read_message(receiver)
        assert isinstance(message, wire.Text)
        assert len(message.text) == 3001
        assert len(set(message.text)) == 1
    for thread in threads:
        thread.join()
