"""The raw stream of each scan on disk: what is in it, how long it stays, and how it is replayed."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ismrmrd
import numpy as np
import pytest
from click.testing import CliRunner

import whorl
from doors.gadgetron_parent import external, run_external, send_messages
from doors.messages import HEADER, bytes_of, count, make_readout, make_waveform, served
from doors.test_failures import read_output
from doors.test_gadget import FULL_HEADER
from scan_edit import Scan
from whorl.cli import main
from whorl.doors import files, wire
from whorl.doors.server import Server
from whorl.doors.spool import Spool
from whorl.doors.transport import Channel
from whorl.scan.failure import EndOfStream, ScanError

WAIT_S = 60.0


def stream_of(
    *messages: bytes,
    name: str | None = "whorl",
    config: bytes | None = None,
    header: bytes = HEADER,
    parameters: Mapping[str, object] | None = None,
    n: int = 3,
    close: bool = True,
) -> bytes:
    """A scan as an MRD client sends it, ending with some `messages`."""
    write: list[Callable[[Channel], None]] = []
    if config is not None:
        write.append(lambda channel: wire.write_config_text(channel, config))
    elif name is not None:
        write.append(lambda channel: wire.write_config_name(channel, name))
    write.append(lambda channel: wire.write_header(channel, header))
    if parameters is not None:
        text = json.dumps({"version": "1.1.0", "parameters": dict(parameters)})
        write.append(lambda channel: wire.write_text(channel, text))
    readouts = [make_readout(2, 9, 2, seed) for seed in range(n)]
    write.append(lambda channel: send_messages(channel, [*readouts, *messages]))
    if close:
        write.append(wire.write_close)
    return bytes_of(*write)


def answer(server: Server, stream: bytes) -> tuple[list[ismrmrd.Image], list[str]]:
    """Send a stream to its end; images and texts."""
    images, texts = [], []
    with socket.create_connection(("127.0.0.1", server.port), WAIT_S) as connection:
        connection.sendall(stream)
        connection.shutdown(socket.SHUT_WR)
        channel = Channel(connection, WAIT_S)
        while not isinstance(message := wire.read_message(channel, keep_images=True), wire.Close):
            if isinstance(message, wire.ImageMessage):
                images.append(message.image)
            else:
                assert isinstance(message, wire.Text)
                texts.append(message.text)
    return images, texts


def kept(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.mrd"))]


# --- What is kept ------------------------------------------------------------------------------------

STREAMS = {
    "a configuration by name": stream_of(),
    "a configuration as text": stream_of(config=b"<configuration/>"),
    "the header first": stream_of(name=None),
    "parameters": stream_of(parameters={"method": "lowrank"}),
    "waveforms and an unknown message": stream_of(make_waveform(), b"\x67\x12 and what follows"),
    "no end": stream_of(close=False),
    "an end within a readout": stream_of()[:-100],
    "a configuration that is not known": stream_of(name="spiral"),
    "an unknown property": stream_of(parameters={"n_coefs": 5}),
    "a property of the machine": stream_of(parameters={"sequence": "/etc/passwd"}),
    "a header that is none": stream_of(header=b"<html/>"),
}
#: What never became a scan: kept, it would drive scans out of the spool.
NO_SCANS = {
    "no header": stream_of(n=0)[: 2 + wire.CONFIG_NAME_BYTES],
    "no opening": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_server_keeps_what_was_sent_also_of_a_refused_scan(kind: str, tmp_path: Path) -> None:
    stream = STREAMS[kind]
    folder = tmp_path / "not there" / "spool"
    with served(properties={"spool": str(folder)}) as server:
        answer(server, stream)
    (raw,) = kept(folder)
    # Of what cannot be read message by message there may be more behind.
    whole = kind != "waveforms and an unknown message"
    assert raw == stream if whole else (raw and stream.startswith(raw))
    # Streams carry patient data.
    (path,) = folder.iterdir()
    assert (folder.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)


@pytest.mark.parametrize("kind", NO_SCANS)
def test_what_never_became_a_scan_is_not_kept(kind: str, tmp_path: Path) -> None:
    with served(properties={"spool": str(tmp_path / "spool")}) as server:
        answer(server, NO_SCANS[kind])
    assert not (tmp_path / "spool").exists()


def test_a_scan_that_is_one_too_many_is_kept(tmp_path: Path) -> None:
    inside, gate = threading.Event(), threading.Event()

    def wait(*arguments: Any) -> Any:
        inside.set()
        assert gate.wait(WAIT_S)
        return count(*arguments)

    first, second = stream_of(n=3), stream_of(n=500)
    with (
        served(wait, properties={"spool": str(tmp_path)}, max_scans=1) as server,
        socket.create_connection(("127.0.0.1", server.port), WAIT_S) as connection,
    ):
        connection.sendall(first)
        assert inside.wait(WAIT_S)
        _, (text,) = answer(server, second)
        assert "which is the limit" in text
        gate.set()
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass
    assert sorted(kept(tmp_path), key=len) == [first, second]


def test_a_port_probe_leaves_nothing(tmp_path: Path) -> None:
    with served(properties={"spool": str(tmp_path)}) as server:
        socket.create_connection(("127.0.0.1", server.port), WAIT_S).close()
        answer(server, stream_of())
    assert kept(tmp_path) == [stream_of()]


@pytest.mark.parametrize("way", ["parameters", "configuration", "Gadgetron"])
def test_the_spool_is_not_taken_from_the_network(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    config = f'<configuration><property name="spool" value="{folder}"/></configuration>'.encode()
    stream = stream_of(parameters={"spool": str(folder)}) if way == "parameters" else stream_of(config=config)
    if way == "Gadgetron":
        stream = bytes_of(
            lambda channel: wire.write_config_text(channel, config, terminate=False),
            lambda channel: wire.write_header(channel, HEADER, terminate=False),
            wire.write_close,
        )
    with served() as server:
        if way == "Gadgetron":
            with socket.create_connection(("127.0.0.1", server.port), WAIT_S) as connection:
                connection.sendall(stream)
                message = wire.read_message(Channel(connection, WAIT_S))
            assert isinstance(message, wire.Error)
            text = message.text
        else:
            images, (text,) = answer(server, stream)
            assert images == []
    assert 'property "spool" concerns the machine that reconstructs' in text
    assert not folder.exists()


def test_the_external_keeps_what_gadgetron_sent(tmp_path: Path) -> None:
    """With its configuration, although that was read before by the `gadgetron` package."""
    properties = {"spool": str(tmp_path / "spool"), "n_coefs": "5"}
    readouts = [make_readout(2, 9, 2, seed) for seed in range(3)]
    said = run_external(FULL_HEADER, readouts, properties=properties)
    assert "unknown property" in said.errors[0]
    _, config = external("whorl", properties)
    assert kept(tmp_path / "spool") == [
        bytes_of(
            lambda channel: wire.write_config_text(channel, config, terminate=False),
            lambda channel: wire.write_header(channel, FULL_HEADER, terminate=False),
            lambda channel: send_messages(channel, readouts),
            wire.write_close,
        )
    ]


def whorl_stream(
    stream: bytes, *arguments: str, limit_bytes: int | None = None
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "whorl", "stream", *arguments]
    if limit_bytes is not None:
        # The process limits itself, and then becomes the program.
        limiter = (
            "import os, resource, sys; n = int(sys.argv[1]); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)); os.execv(sys.argv[2], sys.argv[2:])"
        )
        command = [sys.executable, "-c", limiter, str(limit_bytes), *command]
    return subprocess.run(
        command,
        input=stream,
        capture_output=True,
        timeout=WAIT_S,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(whorl.__file__).parents[1])},
    )


def test_whorl_stream_keeps_its_input(tmp_path: Path) -> None:
    stream = stream_of(config=b'<configuration><property name="n_coefs" value="5"/></configuration>')
    done = whorl_stream(stream, "-p", f"spool={tmp_path}")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b'unknown property "n_coefs"' in done.stderr
    assert kept(tmp_path) == [stream]


# --- A spool that cannot be written ------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with served(properties={"spool": str(tmp_path / "file" / "spool")}) as server:
        images, texts = answer(server, stream_of())
    assert images[0].meta["n"] == "3"
    (warning,) = (text for text in texts if text.startswith("WRN"))
    assert str(tmp_path / "file" / "spool") in warning
    assert warning.endswith("; the scan goes on")


def test_a_scan_larger_than_the_spool_is_kept_up_to_there(tmp_path: Path) -> None:
    large = bytes_of(lambda channel: send_messages(channel, [make_readout(8, 2000, 2)] * 12))
    stream = stream_of(large)
    with served(properties={"spool": str(tmp_path), "spool_mb": 1}) as server:
        images, texts = answer(server, stream)
    assert images[0].meta["n"] == "15"
    assert [text for text in texts if "spool_mb=1" in text and text.startswith("WRN")]
    (raw,) = kept(tmp_path)
    assert len(raw) >= 1 << 20
    assert stream.startswith(raw)
    assert len(raw) < len(stream)


def test_a_full_disk_ends_the_spool_and_not_the_scan(scan: Scan, tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    limit = 1_000_003
    stream = bytes_of(
        lambda channel: wire.write_header(channel, scan.header, terminate=False),
        lambda channel: send_messages(channel, scan.readouts()),
        wire.write_close,
    )
    spool = tmp_path / "spool"
    properties = ("-p", f"spool={spool}", "-p", "method=lowrank", "-p", "cache_mb=0")
    done = whorl_stream(stream, *properties, limit_bytes=limit)
    assert len(read_output(done.stdout, tmp_path / "output")) == 4
    assert f"the raw stream is not kept any further in {spool}" in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    (raw,) = kept(spool)
    assert raw == stream[:limit]


# --- How long it stays -------------------------------------------------------------------------------


def record(folder: Path, data: bytes, *, max_scans: int = 100, max_bytes: int = 1 << 30) -> Path:
    warnings: list[str] = []
    spool = Spool(folder, "scan", max_scans, max_bytes, warnings.append)
    spool(memoryview(data))
    spool.close()
    assert warnings == []
    return spool.path


def test_the_oldest_scans_go_first(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a scan")
    paths = [record(tmp_path, b"x" * n, max_scans=3) for n in range(1, 8)]
    assert sorted(paths) == paths
    assert sorted(tmp_path.glob("*.mrd")) == paths[-3:]
    assert (tmp_path / "notes.txt").exists()


def test_the_folder_is_kept_within_its_size(tmp_path: Path) -> None:
    paths = [record(tmp_path, bytes(1000)) for _ in range(5)]
    # Of 5000 bytes three scans may stay beside what comes.
    paths.append(record(tmp_path, bytes(10), max_bytes=3500))
    assert sorted(tmp_path.glob("*.mrd")) == paths[2:]
    # Room is made while a scan arrives, too.
    paths.append(record(tmp_path, bytes(2500), max_bytes=2500))
    assert sorted(tmp_path.glob("*.mrd")) == paths[-1:]


@pytest.mark.parametrize("who", ["this process", "another process"])
def test_a_scan_that_is_being_written_stays(who: str, tmp_path: Path) -> None:
    if who == "this process":
        busy = Spool(tmp_path, "busy", 1, 1 << 20, lambda text: None)
        path, end = busy.path, busy.close
        busy(memoryview(b"first half"))
    else:
        program = (
            "import sys; from whorl.doors.spool import Spool\n"
            "spool = Spool(sys.argv[1], 'busy', 1, 1 << 20, print); spool(memoryview(b'first half'))\n"
            "print(spool.path, flush=True); sys.stdin.read()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(whorl.__file__).parents[1])},
        )
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())

        def end() -> None:
            with process:
                process.communicate(timeout=WAIT_S)

    later = [record(tmp_path, b"x", max_scans=1) for _ in range(3)]
    assert sorted(tmp_path.glob("*.mrd")) == sorted([path, later[-1]])
    assert path.read_bytes() == b"first half"
    end()
    # Then it is as old as it is.
    last = record(tmp_path, b"x", max_scans=1)
    assert list(tmp_path.glob("*.mrd")) == [last]


def test_the_file_is_locked_as_long_as_it_is_written(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "scan", 1, 1 << 20, lambda text: None)
    spool(memoryview(b"x"))
    with spool.path.open("rb") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        spool.close()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    spool(memoryview(b"late"))
    spool.close()
    assert spool.path.read_bytes() == b"x"


# --- Replay ------------------------------------------------------------------------------------------


def replay(path: Path, *arguments: str) -> tuple[int, str, list[ismrmrd.Image]]:
    """Exit code, what was said, and images."""
    target = path.with_suffix(".maps.h5")
    result = CliRunner().invoke(main, ["replay", str(path), "-o", str(target), *arguments])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code, result.output, files.read_images(target) if target.exists() else []


CUTS = ["before CLOSE", "within a readout's samples", "within a readout's header", "between two readouts"]


@pytest.mark.parametrize("cut", CUTS)
def test_of_a_spool_that_breaks_off_all_whole_readouts_are_read(cut: str, tmp_path: Path) -> None:
    one = len(bytes_of(lambda channel: wire.write_readout(channel, make_readout(2, 9, 2))))
    stream = stream_of(n=7)
    end, n_whole = {
        "before CLOSE": (-2, 7),
        "within a readout's samples": (-3, 6),
        "within a readout's header": (-2 - 3 * one + 100, 4),
        "between two readouts": (-2 - 2 * one, 5),
    }[cut]
    path = tmp_path / "scan.mrd"
    path.write_bytes(stream[:end])
    assert files.count_readouts(path) == n_whole
    readouts = files.read_readouts(path)
    for seed in range(n_whole):
        readout, expected = next(readouts), make_readout(2, 9, 2, seed)
        np.testing.assert_array_equal(readout.data, expected.data)
        np.testing.assert_array_equal(readout.trajectory, expected.trajectory)
    with pytest.raises(EndOfStream, match=f"after {n_whole} readouts"):
        next(readouts)


@pytest.mark.parametrize("size", [2, 500, 1026, 1040])
def test_a_spool_without_its_header_is_no_scan(size: int, tmp_path: Path) -> None:
    path = tmp_path / "scan.mrd"
    path.write_bytes(stream_of()[:size])
    with pytest.raises(ScanError, match="cannot be read as a recorded stream: the stream ended before"):
        files.read_header(path)
    code, said, images = replay(path)
    assert (code, images) == (1, [])
    assert "cannot be read as a recorded stream" in said


def recorded(
    scan: Scan, path: Path, properties: Mapping[str, str], *, by: str = "configuration", n: int | None = None
) -> Path:
    """The tiny scan as it was spooled, up to `n` readouts or whole."""
    text = json.dumps({"version": "1.1.0", "parameters": dict(properties)})
    _, config = external("whorl", properties)
    readouts = list(scan.readouts())
    opening: list[Callable[[Channel], None]] = [
        lambda channel: wire.write_config_text(channel, config, terminate=False),
        lambda channel: wire.write_header(channel, scan.header, terminate=False),
    ]
    if by == "parameters":
        opening = [
            lambda channel: wire.write_config_name(channel, "whorl"),
            lambda channel: wire.write_header(channel, scan.header),
            lambda channel: wire.write_text(channel, text),
        ]
    path.write_bytes(
        bytes_of(
            *opening,
            lambda channel: send_messages(channel, readouts[:n]),
            *([wire.write_close] if n is None else []),
        )
    )
    return path


def test_a_spool_that_breaks_off_late_still_gives_maps(scan: Scan, tmp_path: Path) -> None:
    path = recorded(scan, tmp_path / "scan.mrd", {"method": "lowrank"}, n=4 + 115)
    code, said, images = replay(path)
    assert (code, len(images)) == (3, 4)
    assert "ERR the stream ended early: the stream ended before CLOSE, after 119 readouts" in said


def test_a_spool_that_breaks_off_is_sent_as_far_as_it_goes(scan: Scan, tmp_path: Path) -> None:
    path = recorded(scan, tmp_path / "scan.mrd", {}, n=30)
    with served() as server:
        code, said, images = replay(path, "--address", f"127.0.0.1:{server.port}")
    assert (code, len(images)) == (3, 1)
    assert images[0].meta["n"] == "30"
    # Both sides know that there should have been more.
    assert "ERR the stream ended before CLOSE, after 30 readouts" in said
    assert "the scan broke off in its file after 30 readouts" in said


@pytest.mark.parametrize("by", ["configuration", "parameters"])
def test_the_recorded_properties_are_used_and_others_count_more(by: str, scan: Scan, tmp_path: Path) -> None:
    path = recorded(scan, tmp_path / "scan.mrd", {"method": "lowrank", "output_dtype": "float32"}, by=by)
    config = tmp_path / "config.xml"
    config.write_text('<configuration><property name="method" value="lowrank"/></configuration>')
    for arguments, expected in (
        ((), np.float32),
        (("-p", "output_dtype=uint16"), np.uint16),
        (("-C", str(config)), np.uint16),
        (("-C", str(config), "-p", "output_dtype=float32"), np.float32),
    ):
        code, said, images = replay(path, *arguments)
        assert code == 0, said
        assert {image.data.dtype for image in images} == {np.dtype(expected)}
        assert {image.meta["whorl_method"] for image in images} == {"lowrank"}


def test_what_concerned_the_machine_is_left_out(scan: Scan, tmp_path: Path) -> None:
    properties = {"method": "lowrank", "spool": str(tmp_path / "spool"), "sequence": "/not/there.csv"}
    path = recorded(scan, tmp_path / "scan.mrd", properties)
    _, said, images = replay(path)
    assert len(images) == 4
    assert "WRN recorded with sequence, spool, which a replay does not use" in said
    assert not (tmp_path / "spool").exists()
    # What is set now is used.
    code, said, _ = replay(path, "-p", "sequence=/not/here.csv")
    assert code == 1
    assert "/not/here.csv" in said


def test_a_scan_that_failed_for_a_property_can_be_made_from_its_spool(scan: Scan, tmp_path: Path) -> None:
    path = recorded(scan, tmp_path / "scan.mrd", {"n_coefs": "5"})
    code, said, images = replay(path, "-p", "method=lowrank")
    assert (code, images) == (1, [])
    assert 'unknown property "n_coefs"' in said
    config = tmp_path / "config.xml"
    config.write_text("<configuration/>")
    code, said, images = replay(path, "-C", str(config), "-p", "method=lowrank")
    assert (code, len(images)) == (0, 4), said


@pytest.mark.parametrize("arguments", [("-p", "error_image=false"), ("-C",)], ids=["-p", "-C"])
def test_a_recorded_wish_for_a_status_image_counts_less(
    arguments: tuple[str, ...], scan: Scan, tmp_path: Path
) -> None:
    path = recorded(scan, tmp_path / "scan.mrd", {"error_image": "true"}, n=5)
    config = tmp_path / "config.xml"
    config.write_text("<configuration/>")
    if arguments == ("-C",):
        arguments = ("-C", str(config))
    assert replay(path, "-p", "method=lowrank", *arguments)[::2] == (1, [])
    code, _, images = replay(path, "-p", "method=lowrank")
    assert (code, len(images)) == (1, 1)
