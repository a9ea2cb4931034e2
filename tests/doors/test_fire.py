"""A scanner's FIRE or OpenRecon, and clients that speak as they do.

The bytes are put together here as those programs do it, not by the code that is tested.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import ismrmrd
import numpy as np
import pytest

from doors.messages import HEADER, make_readout, served
from whorl.doors.session import configurations

WAIT_S = 10.0


def string(message_id: int, text: str | bytes) -> bytes:
    """A text whose length counts the NUL at its end."""
    raw = (text.encode() if isinstance(text, str) else text) + b"\0"
    return struct.pack("<HI", message_id, len(raw)) + raw


def config_name(name: str) -> bytes:
    return struct.pack("<H1024s", 1, name.encode())


def config_text(text: str) -> bytes:
    return string(2, text)


def parameters(**values: object) -> bytes:
    return string(5, json.dumps({"version": "1.1.0", "parameters": values}))


def acquisition() -> bytes:
    readout = make_readout(2, 9, 2)
    samples = ismrmrd.Acquisition.from_array(readout.data, readout.trajectory)
    return struct.pack("<H", 1008) + samples.to_bytes()


def waveform() -> bytes:
    return struct.pack("<H", 1026) + ismrmrd.Waveform.from_array(np.zeros((3, 7), np.uint32)).to_bytes()


def image(pixels: type) -> bytes:
    one = ismrmrd.Image.from_array(np.ones((2, 4, 5), pixels))
    one.meta = {"DataRole": "Image"}
    return struct.pack("<H", 1022) + one.to_bytes()


CLOSE = struct.pack("<H", 4)
OPENING = config_name("openrecon") + string(3, HEADER)


@dataclass
class Answer:
    """What the scanner gets: ids in their order, texts, and the attributes of images."""

    ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    metas: list[dict[str, str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served() as server:
        yield server.port


def ask(port: int, *messages: bytes) -> Answer:
    """Send messages as the scanner does, which closes only when it has got a CLOSE, and read as it does."""
    answer = Answer()
    with (
        socket.create_connection(("127.0.0.1", port), WAIT_S) as connection,
        connection.makefile("rb") as file,
    ):
        connection.sendall(b"".join(messages))

        def exactly(size: int) -> bytes:
            data = file.read(size)
            assert len(data) == size, "the answer ends without CLOSE"
            return data

        while True:
            (message_id,) = struct.unpack("<H", exactly(2))
            answer.ids.append(message_id)
            if message_id == 4:
                break
            if message_id == 5:
                raw = exactly(*struct.unpack("<I", exactly(4)))
                assert raw.endswith(b"\0")
                assert raw.count(b"\0") == 1
                answer.texts.append(raw[:-1].decode())
            else:
                assert message_id == 1022
                one = ismrmrd.Image.deserialize_from(exactly)
                answer.metas.append(dict(one.meta))
        # CLOSE is the last that is said.
        assert file.read() == b""
    # By its first three letters a text is coloured.
    assert all(text[:4] in ("DBG ", "WRN ", "ERR ") for text in answer.texts)
    return answer


@pytest.mark.parametrize("name", ["openrecon", "whorl", "whorl.xml", "openrecon.xml"])
def test_a_scan_with_a_configuration_by_name(port: int, name: str) -> None:
    answer = ask(port, config_name(name), string(3, HEADER), acquisition(), acquisition(), CLOSE)
    (meta,) = answer.metas
    assert (meta["n"], meta["method"], meta["header"]) == ("2", "inr", HEADER.decode())
    assert answer.texts == ["DBG 2 readouts"]
    assert sorted(answer.ids) == [4, 5, 1022]


@pytest.mark.parametrize(
    ("values", "method", "fit"),
    [
        ({}, "inr", "varpro"),
        ({"method": "lowrank", "error_image": "True", "min_readouts": "0.5"}, "lowrank", "varpro"),
        ({"method": "LowRank", "error_image": "FALSE", "iterations": "20"}, "lowrank", "varpro"),
        ({"fit": "adam", "error_image": True, "min_readouts": 0.5, "iterations": "20.0"}, "inr", "adam"),
        ({"config": "", "customconfig": "", "method": "lowrank"}, "lowrank", "varpro"),
        ({"config": "openrecon", "customconfig": "", "method": "lowrank"}, "lowrank", "varpro"),
        ({"config": "whorl", "customconfig": "whorl_connect.xml", "fit": "adam"}, "inr", "adam"),
    ],
    ids=str,
)
def test_parameters_behind_the_header(port: int, values: dict[str, object], method: str, fit: str) -> None:
    answer = ask(port, OPENING, parameters(**values), acquisition(), CLOSE)
    assert [(meta["n"], meta["method"], meta["fit"]) for meta in answer.metas] == [("1", method, fit)]
    assert answer.texts == ["DBG 1 readouts"]


@pytest.mark.parametrize("text", ["", json.dumps({}), json.dumps({"version": "1.1.0"})], ids=repr)
def test_parameters_without_any(port: int, text: str) -> None:
    answer = ask(port, OPENING, string(5, text), acquisition(), CLOSE)
    assert [meta["n"] for meta in answer.metas] == ["1"]


@pytest.mark.parametrize("key", ["config", "customconfig"])
def test_a_configuration_that_is_not_known_is_answered_with_those_that_are(port: int, key: str) -> None:
    answer = ask(port, OPENING, parameters(**{key: "spiral"}), acquisition(), CLOSE)
    assert answer.metas == []
    (text,) = answer.texts
    known = ", ".join(sorted({"openrecon", *configurations()}))
    assert text == f'ERR configuration "spiral" is not known: expected one of {known}'


def test_a_name_in_the_parameters_replaces_the_first(port: int) -> None:
    """The scanner's own is a fixed one that only its installation knows."""
    opening = config_name("vendor_default") + string(3, HEADER)
    answer = ask(port, opening, parameters(config="openrecon"), acquisition(), CLOSE)
    assert [meta["n"] for meta in answer.metas] == ["1"]
    answer = ask(port, opening, parameters(config=""), acquisition(), CLOSE)
    assert answer.metas == []
    assert answer.texts[0].startswith('ERR configuration "vendor_default" is not known')


def test_a_configuration_as_text(port: int) -> None:
    text = '<configuration><property name="method" value="lowrank"/></configuration>'
    answer = ask(port, config_text(text), string(3, HEADER), acquisition(), CLOSE)
    assert [meta["method"] for meta in answer.metas] == ["lowrank"]
    # An empty one, which a NUL tells from Gadgetron's.
    answer = ask(port, config_text(""), string(3, HEADER), acquisition(), CLOSE)
    assert [meta["n"] for meta in answer.metas] == ["1"]
    assert answer.texts == ["DBG 1 readouts"]


def test_other_data_in_between(port: int) -> None:
    """Waveforms belong to a scan; images and texts are not what is asked for, and said to be ignored."""
    answer = ask(
        port,
        OPENING,
        parameters(),
        waveform(),
        acquisition(),
        waveform(),
        image(np.uint16),
        acquisition(),
        image(np.complex64),
        image(np.float32),
        string(5, "a late text"),
        acquisition(),
        waveform(),
        CLOSE,
    )
    assert [meta["n"] for meta in answer.metas] == ["3"]
    assert answer.texts == [
        "DBG 3 readouts",
        "WRN messages that are no readouts were ignored: 3 × image, 1 × text",
    ]


def test_a_failure_is_a_text_and_then_close(port: int) -> None:
    answer = ask(port, OPENING, parameters(n_coefs="5"), acquisition(), CLOSE)
    assert answer.ids == [5, 4]
    assert answer.texts == ['ERR unknown property "n_coefs", did you mean "n_coefficients"?']


@pytest.mark.parametrize(
    "messages",
    [[config_name("openrecon"), CLOSE], [config_text("<configuration/>"), CLOSE], [CLOSE]],
    ids=["a name", "a text", "nothing"],
)
def test_a_close_instead_of_the_header_is_answered(port: int, messages: list[bytes]) -> None:
    """As a query for what depends on the configuration ends; the scanner must not wait for ever."""
    answer = ask(port, *messages)
    assert answer.ids == [5, 4]
    assert "close came before the header" in answer.texts[0]


def test_a_scan_without_readouts_is_answered(port: int) -> None:
    answer = ask(port, OPENING, CLOSE)
    assert [meta["n"] for meta in answer.metas] == ["0"]
    # Nor does it count that settings fail when the CLOSE was read instead of parameters.
    answer = ask(port, config_name("spiral"), string(3, HEADER), CLOSE)
    assert answer.ids == [5, 4]
