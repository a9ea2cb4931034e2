"""A server says that it answers, by its own protocol, and that costs nothing."""

import socket
import struct
import subprocess
import sys
import threading

import pytest

from whorl.doors import wire
from whorl.doors.client import ping
from whorl.doors.opening import PING
from whorl.doors.server import Server
from whorl.doors.transport import Channel
from whorl.scan.failure import ScanError


@pytest.fixture
def server(tmp_path):
    server = Server(port=0, properties={"spool": str(tmp_path / "spool")}, reconstruct=lambda *_: None)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join(20)
    assert not thread.is_alive()


def test_a_server_answers_a_ping_and_keeps_nothing_of_it(server, tmp_path):
    for _ in range(70):  # more than connections may be open at once
        assert "0 of 4 scans" in ping(port=server.port)
    assert not (tmp_path / "spool").exists()


def test_a_silent_listener_is_not_taken_for_a_server():
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ScanError, match="does not answer"):
        ping(port=silent.getsockname()[1], timeout_s=0.2)


def test_the_command_tells_by_its_exit_code(server):
    def run(port):
        return subprocess.run(
            [sys.executable, "-m", "whorl", "ping", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    answered = run(server.port)
    assert answered.returncode == 0
    assert answered.stdout.startswith("whorl ")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    refused = run(port)
    assert refused.returncode == 1
    assert "no MRD server answers" in refused.stderr


def test_who_does_not_wait_for_the_answer_is_no_error(server, caplog):
    with caplog.at_level("INFO", "whorl"):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                channel = Channel(connection, 20)
                wire.write_config_name(channel, PING)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                wire.write_close(channel)
        ping(port=server.port)
    assert "error" not in caplog.text
