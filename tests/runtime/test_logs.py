"""Lines of the log: one for each event, whatever is in it, and each with its scan."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from doors.messages import HEADER, Counted, make_readout
from scan_edit import Scan
from whorl.doors import client, wire
from whorl.doors.server import Server
from whorl.doors.transport import Channel
from whorl.pipeline.scan import reconstruct_scan
from whorl.runtime import logs
from whorl.scan.readout import Readout

WAIT_S = 60.0


class _Lines(logging.Handler):
    """Keeps what would be written to stderr."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.setFormatter(logs.EventFormatter(style))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def lines(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The log of the test, as JSON unless `text` is asked for."""
    handler = _Lines(getattr(request, "param", "json"))
    logger = logging.getLogger("whorl")
    level = logger.level
    logger.setLevel(logging.DEBUG)  # not the attribute: a logger remembers which levels were off before
    logger.addHandler(handler)
    token = logs.current_scan.set("")
    yield handler.lines
    logs.current_scan.reset(token)
    logger.removeHandler(handler)
    logger.setLevel(level)


as_text = pytest.mark.parametrize("lines", ["text"], indirect=True)
as_both = pytest.mark.parametrize("lines", ["text", "json"], indirect=True)


@as_text
def test_a_line_for_people(lines: list[str]) -> None:
    scan = logs.new_scan()
    logs.event("ends", code=3, seconds=1.23456, peer="[::1]:9002", text="two words", nothing="")
    (line,) = lines
    time, rest = line.split(" ", 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert rest == (
        f'info scan={scan} event=ends code=3 seconds=1.23 peer=[::1]:9002 text="two words" nothing=""'
    )


def test_a_line_for_programs(lines: list[str]) -> None:
    scan = logs.new_scan()
    logs.event("ends", logging.WARNING, code=3, seconds=1.5, file=Path("/a b"), text='say "x"')
    values = json.loads(lines[0])
    del values["time"]
    assert values == {
        "level": "warning",
        "scan": scan,
        "event": "ends",
        "code": 3,
        "seconds": 1.5,
        "file": "/a b",
        "text": 'say "x"',
    }


HOSTILE = [
    "a\nb",
    "a\r\nb",
    "a\x0bb\x0cc",
    "a\x85b\u2028c\u2029d",
    'text="forged" level=error',
    "\x1b[31mred",
    "\ud800",
]


@as_both
@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_no_text_begins_a_new_line_or_a_new_value(lines: list[str], text: str) -> None:
    logs.event("said", text=text)
    logging.getLogger("whorl.other").warning("%s", text)
    assert len(lines) == 2
    for line in lines:
        assert len(line.splitlines()) == 1
        assert line.isprintable()
        # What was said can be read back whole.
        said = json.loads(line)["text"] if line.startswith("{") else json.loads(line.split("text=", 1)[1])
        assert said == text


@as_both
def test_a_traceback_is_one_line(lines: list[str]) -> None:
    try:
        raise KeyError("slice\nwith two lines")
    except KeyError:
        logging.getLogger("whorl").exception("internal error")
    (line,) = lines
    assert len(line.splitlines()) == 1
    assert "Traceback" in line
    assert "test_logs.py" in line


def test_lines_of_other_packages_name_them(lines: list[str]) -> None:
    logging.getLogger("whorl.recon").info("built in %d s", 3)
    values = json.loads(lines[0])
    assert (values["event"], values["logger"], values["text"]) == ("log", "whorl.recon", "built in 3 s")
    assert "scan" not in values


@pytest.mark.parametrize("style", ["text", "json"])
def test_the_log_goes_to_stderr_alone(style: str) -> None:
    program = (
        "import logging, sys; sys.path.insert(0, sys.argv[1]); from whorl.runtime import logs\n"
        "logging.basicConfig(level=0, stream=sys.stdout)\n"  # as who starts this program may have done
        f"logs.configure(logging.INFO, {style!r})\n"
        "logs.event('debug', logging.DEBUG); logs.event('begins', peer='x'); logging.warning('other')\n"
    )
    folder = str(Path(logs.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program, folder], capture_output=True, text=True, timeout=WAIT_S, check=True
    )
    assert done.stdout == ""
    begins, other = done.stderr.splitlines()
    if style == "text":
        assert begins.endswith(" info event=begins peer=x")
        assert other.endswith(" warning event=log logger=root text=other")
    else:
        assert json.loads(begins)["event"] == "begins"
        assert json.loads(other)["text"] == "other"


def test_lines_of_scans_at_the_same_time_name_their_own(lines: list[str], scan: Scan, tmp_path: Path) -> None:
    """Also those of the threads in which slices and dictionaries are made."""
    paths = []
    for n_lost in range(3):
        # The scans differ in what is said of their only slice.
        lost = [10, 20, 30][:n_lost]
        paths.append(scan.copy().without(scan.imaging[lost]).write(tmp_path / f"{n_lost}.h5"))
    server = Server("127.0.0.1", 0, reconstruct=reconstruct_scan)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    received: dict[int, client.Received] = {}

    def send(n: int) -> None:
        received[n] = client.send_file(paths[n], "127.0.0.1", server.port, properties={"method": "lowrank"})

    threads = [threading.Thread(target=send, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    server.shutdown()
    serving.join(WAIT_S)
    events = [json.loads(line) for line in lines]
    stray = [e for e in events if "scan" not in e and e["event"] not in ("listening", "stopped")]
    assert stray == []
    scans: dict[str, list[str]] = {}
    for e in events:
        if "scan" in e:
            scans.setdefault(e["scan"], []).append(e["text"] if e["event"] == "said" else e["event"])
    assert len(scans) == 3
    # What each client was told stands under one scan, in the same order, and nothing else does.
    told = sorted(received[n].texts for n in range(3))
    assert sorted([text for text in s if text[:3] in ("DBG", "WRN")] for s in scans.values()) == told
    assert all(any("slice 0 sent" in text for text in texts) for texts in told)
    for said in scans.values():
        assert (said[0], said[-1]) == ("begins", "ends")


def test_a_scan_that_is_given_up_is_named(lines: list[str]) -> None:
    inside = threading.Event()

    def wait_for_readouts(header: bytes, readouts: Iterable[Readout], *rest: object) -> Counted:
        inside.set()
        return Counted(sum(1 for _ in readouts))

    server = Server("127.0.0.1", 0, reconstruct=wait_for_readouts)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    with socket.create_connection(("127.0.0.1", server.port), WAIT_S) as connection:
        channel = Channel(connection, WAIT_S)
        wire.write_header(channel, HEADER)
        wire.write_readout(channel, make_readout())
        assert inside.wait(WAIT_S)
        server.shutdown()
        server.shutdown()
        message = wire.read_message(channel)
        assert isinstance(message, wire.Text)
        serving.join(WAIT_S)
    events = [json.loads(line) for line in lines]
    (begins,) = (e for e in events if e["event"] == "begins")
    (given_up,) = (e for e in events if e.get("text") == message.text)
    assert given_up["scan"] == begins["scan"]
