"""The external as Gadgetron starts it, up to the reconstruction: that itself is in `test_end_to_end.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import whorl
from doors.gadgetron_parent import CONFIG_XML, Conversation, external, run_external
from doors.messages import HEADER, make_readout
from whorl.config import Settings, properties_from_xml
from whorl.doors import wire

FULL_HEADER = (
    HEADER.replace(b"/>", b">")
    + b"<experimentalConditions><H1resonanceFrequency_Hz>123000000</H1resonanceFrequency_Hz>"
    b"</experimentalConditions></ismrmrdHeader>"
)


def assert_failed_as_gadgetron_understands(said: Conversation, text: str) -> None:
    assert said.ended == "close", said.output
    assert said.early_errors == []
    assert len(said.errors) == 1
    assert text in said.errors[0]
    # One CLOSE and nothing after it, the error right before.
    assert said.ids[-2:] == [wire.ERROR, wire.CLOSE]
    assert said.after_close == b""
    assert said.exit_code not in (0, None)


@pytest.mark.parametrize("name", ["whorl", "whorl_connect"])
def test_the_shipped_configurations(name: str) -> None:
    root = ET.parse(CONFIG_XML / f"{name}.xml").getroot()
    assert root.findtext("version") == "2"
    readers = {
        reader.findtext("slot"): reader.findtext("classname") for reader in root.findall("./readers/reader")
    }
    assert readers == {"1008": "AcquisitionReader", "1026": "WaveformReader"}
    assert [writer.findtext("classname") for writer in root.findall("./writers/writer")] == ["ImageWriter"]
    node, config = external(name)
    # The commented properties are real ones, and none is set.
    assert properties_from_xml(config) == {}
    text = (CONFIG_XML / f"{name}.xml").read_text()
    commented = {line.split('"')[1]: line.split('"')[3] for line in text.splitlines() if "<property" in line}
    assert len(commented) >= 4
    Settings.from_properties(commented)
    if name == "whorl":
        execute = node.find("execute")
        assert execute is not None
        assert execute.attrib == {"name": "whorl.gadget", "target": "reconstruct", "type": "python"}
    else:
        connect = node.find("connect")
        assert connect is not None
        assert connect.attrib == {"port": "9003", "address": "localhost"}


def test_an_unknown_property_reaches_gadgetron_as_an_error() -> None:
    readouts = [make_readout(8, 884, 2)] * 500
    said = run_external(FULL_HEADER, readouts, properties={"n_coefs": "5"})
    assert_failed_as_gadgetron_understands(said, 'unknown property "n_coefs", did you mean "n_coefficients"?')
    assert said.images == []


def test_the_stream_ends_without_close() -> None:
    said = run_external(FULL_HEADER, [make_readout()], properties={"n_coefs": "5"}, close=False)
    assert_failed_as_gadgetron_understands(said, "unknown property")


def test_gadgetron_vanishes() -> None:
    said = run_external(FULL_HEADER, [make_readout()], properties={"n_coefs": "5"}, vanish=True)
    assert said.exit_code not in (0, None)
    assert "Traceback" not in said.output


def test_a_refusal_does_not_wait_for_heavy_imports() -> None:
    # torch and sigpy take seconds; a cold start pays for them when the reconstruction begins.
    program = (
        "import sys, whorl.gadget, whorl.doors.session; "
        "sys.exit('torch' in sys.modules or 'sigpy' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(whorl.__file__).parents[1])}
    assert (
        subprocess.run([sys.executable, "-c", program], env=environment, timeout=30, check=False).returncode
        == 0
    )
