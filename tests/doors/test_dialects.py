"""One small scan through every door: the same images come out, byte by byte."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import ismrmrd
import numpy as np
import pytest

import whorl
from doors.gadgetron_parent import external, run_external, talk
from doors.messages import bytes_of, served
from doors.mrd2_peer import mrd, stream_of
from whorl.doors import client, files, wire
from whorl.doors.server import Server
from whorl.doors.transport import Channel
from whorl.scan.integrity import kept

#: The joint INR, and series of every type of pixels.
FAST = {"method": "inr", "rgb": "true", "subspace_images": "true"}
OPTIONS = [word for name, value in FAST.items() for word in ("-p", f"{name}={value}")]
WAIT_S = 60.0


def content(image: ismrmrd.Image) -> tuple[bytes, bytes, dict[str, object]]:
    """Header, pixels and meta attributes of an image, without the times that it took."""
    meta = dict(ismrmrd.Meta.deserialize(image.attribute_string))
    assert meta.pop("whorl_seconds")
    head = image.getHead()
    head.attribute_string_len = 0  # goes with the times
    return bytes(head), np.ascontiguousarray(image.data).tobytes(), meta


def of_stream(raw: bytes) -> list[ismrmrd.Image]:
    """Images of an MRD version 1 stream that begins with its header and ends with CLOSE."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(target=lambda: (ours.sendall(raw), ours.close()))
        thread.start()
        channel = Channel(theirs, WAIT_S)
        assert isinstance(wire.read_message(channel), wire.HeaderText)
        images = []
        while not isinstance(message := wire.read_message(channel, keep_images=True), wire.Close):
            assert isinstance(message, wire.ImageMessage)
            images.append(message.image)
        assert channel.n_bytes == len(raw)
        thread.join()
    return images


def version_1(path: Path) -> bytes:
    """A scan as `ismrmrd_hdf5_to_stream` writes it: header, readouts, CLOSE."""
    return bytes_of(
        lambda channel: wire.write_header(channel, files.read_header(path), terminate=False),
        *(partial(wire.write_readout, readout=kept(readout)) for readout in files.read_readouts(path)),
        wire.write_close,
    )


def run_whorl(*arguments: object, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONPATH": str(Path(whorl.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-m", "whorl", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        env=environment,
        timeout=WAIT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spool")


@pytest.fixture(scope="module")
def server(spool: Path) -> Iterator[Server]:
    with served(None, properties={"spool": str(spool)}) as server:
        yield server


@pytest.fixture(scope="module")
def reference(tiny_scan: Path, tmp_path_factory: pytest.TempPathFactory) -> list[ismrmrd.Image]:
    """The images of the file, reconstructed in a process that reads it."""
    path = tmp_path_factory.mktemp("reference") / "maps.h5"
    assert run_whorl("replay", tiny_scan, "-o", path, *OPTIONS).returncode == 0
    images = files.read_images(path)
    roles = [image.meta["GADGETRON_DataRole"] for image in images]
    assert roles[:6] == ["T1", "T2", "M0", "QUALITY", "T1_RGB", "T2_RGB"]
    assert set(roles[8:]) == {"SUBSPACE"}
    assert all(image.data.any() for image in images)
    return images


def through_a_client(server: Server, scan: Path) -> list[ismrmrd.Image]:
    received = client.send_file(scan, "127.0.0.1", server.port, properties=FAST)
    assert received.exit_code == 0, (received.texts, received.problems)
    return received.images


def through_connect(server: Server, scan: Path) -> list[ismrmrd.Image]:
    _, config = external("whorl_connect", FAST)
    with socket.create_connection(("localhost", server.port), WAIT_S) as connection:
        said = talk(
            connection, config, files.read_header(scan), files.read_readouts(scan), close=True, wait_s=WAIT_S
        )
    assert said.ended == "close"
    return said.images


def through_execute(server: Server, scan: Path) -> list[ismrmrd.Image]:
    said = run_external(files.read_header(scan), files.read_readouts(scan), properties=FAST)
    assert said.ended == "close", said.output
    return said.images


def through_pipes(server: Server, scan: Path) -> list[ismrmrd.Image]:
    done = run_whorl("stream", *OPTIONS, stdin=version_1(scan))
    assert done.returncode == 0, done.stderr
    return of_stream(done.stdout)


def through_a_stream_in_a_file(server: Server, scan: Path) -> list[ismrmrd.Image]:
    recorded, maps = scan.with_name("recorded.mrd"), scan.with_name("recorded_maps.h5")
    recorded.write_bytes(version_1(scan))
    done = run_whorl("replay", recorded, "-o", maps, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return files.read_images(maps)


@pytest.mark.parametrize(
    "through",
    [through_a_client, through_connect, through_execute, through_pipes, through_a_stream_in_a_file],
    ids=lambda through: through.__name__,
)
def test_every_door_gives_the_same_images(
    server: Server, tiny_scan: Path, reference: list[ismrmrd.Image], through
) -> None:
    images = sorted(through(server, tiny_scan), key=lambda image: image.image_series_index)
    for image, expected in zip(images, reference, strict=True):
        assert content(image) == content(expected)


def test_a_recorded_stream_gives_the_same_images_as_the_scan(
    server: Server, spool: Path, tiny_scan: Path, tmp_path: Path, reference: list[ismrmrd.Image]
) -> None:
    before = set(spool.iterdir())
    through_a_client(server, tiny_scan)
    (kept,) = set(spool.iterdir()) - before
    # The method is not given: it was recorded too.
    done = run_whorl("replay", kept, "-o", tmp_path / "maps.h5")
    assert done.returncode == 0, done.stderr
    for image, expected in zip(files.read_images(tmp_path / "maps.h5"), reference, strict=True):
        assert content(image) == content(expected)


def assert_the_same_in_version_2(raw: bytes, expected: list[ismrmrd.Image], sent: bytes) -> None:
    with mrd.BinaryMrdReader(io.BytesIO(sent)) as reader:
        header = reader.read_header()
        for _ in reader.read_data():
            pass
    with mrd.BinaryMrdReader(io.BytesIO(raw)) as reader:
        assert reader.read_header() == header
        items = list(reader.read_data())
    items.sort(key=lambda item: item.value.head.image_series_index)
    kinds = {"uint16": mrd.StreamItem.ImageUint16, "complex64": mrd.StreamItem.ImageComplexFloat}
    for item, other in zip(items, expected, strict=True):
        assert isinstance(item, kinds[other.data.dtype.name])
        image = item.value
        _, pixels, meta = content(other)
        assert image.data.tobytes() == pixels
        texts = {name: [str(value.value) for value in values] for name, values in image.meta.items()}
        texts.pop("whorl_seconds")
        assert texts == {
            # The ismrmrd package makes "None" of a text without letters when it reads it back.
            name: [value.replace("None", "")] if isinstance(value, str) else list(value)
            for name, value in meta.items()
        }
        v1 = other.getHead()
        for ours, theirs in (
            (image.head.position, v1.position),
            (image.head.col_dir, v1.read_dir),
            (image.head.line_dir, v1.phase_dir),
            (image.head.slice_dir, v1.slice_dir),
            (image.head.field_of_view, v1.field_of_view),
        ):
            np.testing.assert_array_equal(ours, np.array(theirs, np.float32))
        is_complex = other.data.dtype == np.complex64
        assert image.head.image_type == (mrd.ImageType.COMPLEX if is_complex else mrd.ImageType.MAGNITUDE)
        assert (image.head.image_index, image.head.image_series_index) == (
            v1.image_index,
            v1.image_series_index,
        )


def test_version_2_through_pipes(tiny_scan: Path, reference: list[ismrmrd.Image]) -> None:
    done = run_whorl("stream", *OPTIONS, stdin=stream_of(tiny_scan))
    assert done.returncode == 0, done.stderr
    assert_the_same_in_version_2(done.stdout, reference, stream_of(tiny_scan))


def test_version_2_through_a_socket(tiny_scan: Path, reference: list[ismrmrd.Image]) -> None:
    with (
        served(None, properties=FAST) as server,
        socket.create_connection(("127.0.0.1", server.port), WAIT_S) as connection,
    ):
        raw = stream_of(tiny_scan)
        sender = threading.Thread(target=connection.sendall, args=(raw,))
        sender.start()
        answer = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        sender.join()
    assert_the_same_in_version_2(answer, reference, stream_of(tiny_scan))
