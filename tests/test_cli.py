"""The command line: exit codes, and one sentence where something is wrong."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from pulseq_files import write_sequence
from scan_edit import Scan
from whorl import __version__
from whorl.cli import main
from whorl.config import PROPERTIES, Settings, SettingsError, properties_from_json
from whorl.doors.files import read_images
from whorl.simulation.truth import read_truth

_FAST = ("-p", "method=lowrank")


def whorl(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    # Whatever happens, an operator does not read tracebacks.
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def started(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The program as a user starts it."""
    command = [sys.executable, "-m", "whorl", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_replay_delivers_all_maps(tiny_scan: Path, tmp_path: Path) -> None:
    target = tmp_path / "maps.h5"
    done = started("replay", tiny_scan, "-o", target, *_FAST)
    assert (done.returncode, done.stdout) == (0, f"4 images in {target}\n")
    images = read_images(target)
    assert [image.meta["GADGETRON_DataRole"] for image in images] == ["T1", "T2", "M0", "QUALITY"]
    assert {image.meta["whorl_status"] for image in images} == {"complete"}
    assert [path.name for path in tmp_path.iterdir()] == ["maps.h5"]


def test_help_lists_the_commands() -> None:
    done = started("--help")
    assert done.returncode == 0
    for command in ("serve", "replay", "simulate", "demo", "properties"):
        assert f"\n  {command} " in done.stdout
        assert whorl(command, "--help").exit_code == 0


def test_version() -> None:
    assert __version__ in whorl("--version").output


def test_properties_lists_all() -> None:
    lines = whorl("properties").output.splitlines()
    # Names stand in the margin of two columns, headings at the edge.
    assert re.findall(r"^  (\w+)", "\n".join(lines), re.M) == [f.name for f in fields(Settings)]
    groups = dict.fromkeys(known.group for known in PROPERTIES.values())
    assert [line for line in lines if line and line[0] != " "][: len(groups)] == list(groups)


@pytest.mark.parametrize("columns", [80, 120])
def test_properties_are_wrapped_beside_their_names(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = whorl("properties").output.splitlines()
    # The longest line is less than the longest word away from the edge.
    assert columns - 20 < max(len(line) for line in lines) <= columns
    names = [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]
    margin = 4 + max(len(name) for name in names)
    beside = [line for line in lines if line.startswith("  ")]
    assert all(line[margin - 1] == " " != line[margin] for line in beside)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("method", "[one of inr, llr, lowrank; default inr]"),
        ("t1_min_ms", "[number in ms, at least 1; default 20]"),
        ("ridge", "[number, at least 0; default 0.0001]"),
        ("rgb", "[true or false; default false; maps unchanged]"),
        ("girf", "[path; default empty; not over the network]"),
        ("cache_mb", "[whole number in MiB, at least 0; default 512; not over the network; maps unchanged]"),
        ("spoiler_cycles_per_mm", "[number in cycles/mm, 0 to 1000; default 0]"),
    ],
)
def test_what_is_said_of_one_property(name: str, says: str) -> None:
    output = whorl("properties", name).output
    unwrapped = " ".join(output.split())
    assert says in unwrapped
    assert PROPERTIES[name].text in unwrapped


def test_some_properties_alone() -> None:
    result = whorl("properties", "girf", "method", "girf")
    assert re.findall(r"^  (\w+)", result.output, re.M) == ["method", "girf"]
    found = json.loads(whorl("properties", "--json", "girf", "method").output)
    assert [known["name"] for known in found] == ["method", "girf"]


def test_a_property_that_does_not_exist() -> None:
    for options in ([], ["--json"]):
        result = whorl("properties", "method", "n_coefs", *options)
        assert result.exit_code == 2
        assert 'unknown property "n_coefs", did you mean "n_coefficients"?' in result.output


# --- What a program can do with the JSON alone -------------------------------------------------------------

#: Ends of a range that contradict the defaults of others: what goes with them.
_COMPANY: dict[tuple[str, str], dict[str, object]] = {
    ("t1_max_ms", "low"): {"t1_min_ms": 1, "t2_min_ms": 0.5},
    ("t2_max_ms", "low"): {"t2_min_ms": 0.5},
    ("b1_min", "high"): {"b1_max": 3},
    ("b1_max", "low"): {"b1_min": 0.1},
    ("diffusion_um2_per_ms", "high"): {"spoiler_cycles_per_mm": 1},
    ("spoiler_cycles_per_mm", "high"): {"diffusion_um2_per_ms": 1},
}


@pytest.fixture(scope="module")
def document() -> dict[str, dict[str, Any]]:
    return {known["name"]: known for known in json.loads(whorl("properties", "--json").output)}


def test_the_document_has_all_properties_and_all_about_them(document: dict[str, dict[str, Any]]) -> None:
    assert list(document) == [f.name for f in fields(Settings)]
    about = {"group", "type", "choices", "low", "high", "unit", "default", "local", "changes_maps", "text"}
    assert all(set(known) == {"name", *about} for known in document.values())


def test_the_defaults_together_are_the_settings(document: dict[str, dict[str, Any]]) -> None:
    defaults = {name: known["default"] for name, known in document.items()}
    assert Settings.from_properties(defaults) == Settings()
    # As a FIRE text, and over a network those that may come by it.
    text = json.dumps({"parameters": {n: v for n, v in defaults.items() if not document[n]["local"]}})
    assert Settings.from_properties(properties_from_json(text), local=False) == Settings()


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_default_and_each_choice_are_accepted(name: str, document: dict[str, dict[str, Any]]) -> None:
    known = document[name]
    python = {"integer": int, "number": float, "boolean": bool}.get(known["type"], str)
    for value in (known["default"], *known["choices"]):
        accepted = getattr(Settings.from_properties({name: value}), name)
        assert accepted == value
        assert type(accepted) is python
    if known["choices"]:
        with pytest.raises(SettingsError, match=f'property "{name}" is "none of them": expected one of'):
            Settings.from_properties({name: "none of them"})


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_ends_of_a_range_belong_to_it(name: str, document: dict[str, dict[str, Any]]) -> None:
    known = document[name]
    for end, beyond in (("low", -1), ("high", 1)):
        value = known[end]
        if value is None:
            continue
        company = _COMPANY.get((name, end), {})
        assert getattr(Settings.from_properties({**company, name: value}), name) == value
        outside = value + beyond if known["type"] == "integer" else math.nextafter(value, beyond * math.inf)
        with pytest.raises(SettingsError, match=f'property "{name}" is ".*": expected'):
            Settings.from_properties({**company, name: outside})


@pytest.mark.parametrize("name", PROPERTIES)
def test_what_is_local_is_not_taken_from_the_network(name: str, document: dict[str, dict[str, Any]]) -> None:
    value = document[name]["default"] or ("x" if document[name]["type"] == "path" else 1)
    if document[name]["local"]:
        with pytest.raises(SettingsError, match=f'property "{name}" .* not taken from the network'):
            Settings.from_properties({name: value}, local=False)
    else:
        Settings.from_properties({name: document[name]["default"]}, local=False)


def test_something_lost_is_exit_code_3(scan: Scan, tmp_path: Path) -> None:
    scan.data[scan.imaging[17]][1, 5] = np.nan
    target = tmp_path / "maps.h5"
    result = whorl("replay", scan.write(tmp_path / "scan.h5"), "-o", target, *_FAST)
    assert result.exit_code == 3
    assert "not finite" in result.output
    assert {image.meta["whorl_status"] for image in read_images(target)} == {"degraded"}


def test_nothing_delivered_is_exit_code_1(scan: Scan, tmp_path: Path) -> None:
    scan.trajectory(lambda points: points[:, :0])
    target = tmp_path / "maps.h5"
    result = whorl("replay", scan.write(tmp_path / "scan.h5"), "-o", target, *_FAST)
    assert result.exit_code == 1
    assert "no trajectory" in result.output
    assert not target.exists()


def test_too_few_readouts_are_exit_code_1(scan: Scan, tmp_path: Path) -> None:
    scan.without(scan.imaging[::3])
    target = tmp_path / "maps.h5"
    result = whorl("replay", scan.write(tmp_path / "scan.h5"), "-o", target, *_FAST)
    assert result.exit_code == 1
    assert "ERR 80 of 120 timepoints arrived, expected at least 90%" in result.output
    assert not target.exists()


def test_an_older_result_outlives_a_failure(scan: Scan, tmp_path: Path) -> None:
    target = tmp_path / "maps.h5"
    target.write_bytes(b"older")
    assert (
        whorl("replay", scan.without(scan.imaging).write(tmp_path / "scan.h5"), "-o", target).exit_code == 1
    )
    assert target.read_bytes() == b"older"


def test_a_file_that_is_no_scan(tmp_path: Path) -> None:
    path = tmp_path / "text.h5"
    path.write_text("no HDF5")
    result = whorl("replay", path, "-o", tmp_path / "maps.h5")
    assert result.exit_code == 1
    assert result.output.startswith(f"whorl: {path} cannot be read as an MRD file")


def test_a_result_that_cannot_be_written(tiny_scan: Path, tmp_path: Path) -> None:
    result = whorl("replay", tiny_scan, "-o", tmp_path / "nowhere" / "maps.h5", *_FAST)
    assert result.exit_code == 1
    assert "maps.h5 cannot be written" in result.output


def test_a_server_that_is_not_there(tiny_scan: Path, tmp_path: Path) -> None:
    result = whorl("replay", tiny_scan, "-o", tmp_path / "maps.h5", "--address", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "no MRD server answers at 127.0.0.1:1" in result.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-p", "n_coefs=5"], 'unknown property "n_coefs", did you mean "n_coefficients"?'),
        (["-p", "iterations=-2"], "expected -1 to 100000"),
        (["-p", "method"], "expected name=value"),
        (["-C", "{broken}"], "the configuration is not readable XML"),
        (["-C", "{absent}"], "does not exist"),
        (["--address", "localhost"], "expected HOST:PORT"),
        (["--nonsense"], "No such option"),
    ],
)
def test_usage(options: list[str], says: str, tiny_scan: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.xml"
    broken.write_text("<configuration>")
    filled = [option.format(broken=broken, absent=tmp_path / "absent.xml") for option in options]
    result = whorl("replay", tiny_scan, "-o", tmp_path / "maps.h5", *filled)
    assert result.exit_code == 2
    # Click breaks lines where they are long.
    assert says in " ".join(result.output.split())
    assert not (tmp_path / "maps.h5").exists()


def test_usage_as_a_process(tiny_scan: Path, tmp_path: Path) -> None:
    done = started("replay", tiny_scan, "-o", tmp_path / "maps.h5", "-p", "methd=inr")
    assert done.returncode == 2
    assert 'did you mean "method"?' in done.stderr
    assert "Traceback" not in done.stderr
    assert whorl("replay", tiny_scan).exit_code == 2
    assert whorl("replay", tmp_path / "absent.h5", "-o", tmp_path / "maps.h5").exit_code == 2


def test_an_assignment_counts_more_than_the_configuration(tiny_scan: Path, tmp_path: Path) -> None:
    config, target = tmp_path / "config.xml", tmp_path / "maps.h5"
    config.write_text(
        "<configuration><property name='method' value='lowrank'/>"
        "<property name='output_dtype' value='uint16'/></configuration>"
    )
    result = whorl("replay", tiny_scan, "-o", target, "-C", config, "-p", "output_dtype = float32")
    assert result.exit_code == 0
    for image in read_images(target):
        assert image.meta["whorl_method"] == "lowrank"
        assert image.data.dtype == np.float32


def test_simulate_writes_a_scan_that_can_be_replayed(tmp_path: Path) -> None:
    path, target = tmp_path / "scan.h5", tmp_path / "maps.h5"
    done = whorl(
        "simulate", path, "--timepoints", 120, "--interleaves", 12, "--matrix", 48, "--coils", 2,
        "--order", "sequential", "--slices", 2,
    )  # fmt: skip
    assert done.exit_code == 0
    assert done.output.endswith(f"scan in {path}\n")
    truth = read_truth(path)
    assert truth.t1_ms.shape == (2, 48, 48)
    assert truth.parameters["order"] == "sequential"
    assert whorl("replay", path, "-o", target, *_FAST).exit_code == 0
    assert sorted(int(image.slice) for image in read_images(target)) == [0] * 4 + [1] * 4


def test_simulate_refuses(tmp_path: Path) -> None:
    assert whorl("simulate", tmp_path / "scan.h5", "--coils", 0).exit_code == 2
    assert whorl("simulate", tmp_path / "scan.h5", "--phantom", "cube").exit_code == 2
    result = whorl("simulate", tmp_path / "nowhere" / "scan.h5", "--matrix", 32)
    assert result.exit_code == 1
    assert "there is no folder" in result.output
    assert not list(tmp_path.iterdir())


def test_serve_refuses_a_wrong_property_before_it_listens() -> None:
    result = whorl("serve", "--port", 0, "-p", "methd=inr")
    assert result.exit_code == 2
    assert 'did you mean "method"?' in " ".join(result.output.split())


def test_a_scan_is_not_overwritten_by_its_maps(tiny_scan: Path) -> None:
    before = tiny_scan.read_bytes()
    result = CliRunner().invoke(main, ["replay", str(tiny_scan), "-o", str(tiny_scan)])
    assert result.exit_code == 2
    assert "is the scan itself" in result.output
    assert tiny_scan.read_bytes() == before


# --- whorl dictionary ------------------------------------------------------------------------------------


def test_dictionary_from_scan_to_clear(tiny_scan: Path, tmp_path: Path) -> None:
    cache = ("-p", f"cache_dir={tmp_path / 'cache'}")
    small = ("-p", "dictionary_step=0.2", *cache)
    built = whorl("dictionary", "build", tiny_scan, *small)
    assert built.exit_code == 0
    assert re.fullmatch(r"\d+ atoms, \d+ coefficients, ready after \d+\.\d s\n", built.output)
    (kept,) = (tmp_path / "cache").iterdir()
    shown = whorl("dictionary", "show", tiny_scan, *small).output
    assert "120 timepoints from header lists; inversion: 20 ms, efficiency 1" in shown
    assert f"{built.output.split()[0]}: " in shown
    assert "T1 from 20 to 5000 ms" in shown
    assert re.search(r"states +\d+ for T2 = 4 ms, \d+ for T2 = 80 ms, 60 for T2 = 3000 ms", shown)
    energies = [float(value) for value in re.findall(r"together ([\d.]+)%", shown)]
    assert energies == sorted(energies)
    assert len(energies) == int(built.output.split()[2])
    assert 99.99 <= energies[-1] <= 100
    assert str(kept) in shown
    listed = whorl("dictionary", "show", *cache).output
    assert kept.name in listed
    assert "120 timepoints from header lists" in listed
    cleared = whorl("dictionary", "clear", *cache)
    assert cleared.output.startswith("1 dictionaries removed from")
    assert not kept.exists()
    assert whorl("dictionary", "show", *cache).output == f"no dictionaries in {tmp_path / 'cache'}\n"


def test_dictionary_of_a_train_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("flip_deg,tr_ms,te_ms\n" + "".join(f"{10 + t % 40},10,2\n" for t in range(90)))
    train = ("-p", f"sequence={path}", "-p", "dictionary_step=0.2", "-p", "cache_mb=0")
    shown = whorl("dictionary", "show", *train)
    assert "90 timepoints" in shown.output
    assert "inversion: none" in shown.output
    assert "cache         off" in shown.output
    assert "inversion: 15 ms" in whorl("dictionary", "show", *train, "-p", "inversion_time_ms=15").output
    picture = tmp_path / "dictionary.png"
    assert whorl("dictionary", "plot", *train, "-o", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused = whorl("dictionary", "plot", *train, "-o", tmp_path / "dictionary.xyz")
    assert refused.exit_code == 2
    assert "not supported" in refused.output


def test_dictionary_reads_the_train_of_the_readouts(scan: Scan, tmp_path: Path) -> None:
    path = scan.no_header_train().write(tmp_path / "scan.h5")
    shown = whorl("dictionary", "show", path, "-p", "dictionary_step=0.2", "-p", "cache_mb=0")
    assert "120 timepoints from user_int of the readouts" in shown.output


def test_dictionary_refuses(tmp_path: Path, tiny_scan: Path) -> None:
    nothing = whorl("dictionary", "build")
    assert nothing.exit_code == 2
    assert "give a SCAN, or -p sequence=train.csv" in " ".join(nothing.output.split())
    assert whorl("dictionary", "clear", "-p", "cache_mb=0").exit_code == 2
    assert whorl("dictionary", "show", "-p", "cache_mb=0").exit_code == 2
    absent = whorl("dictionary", "build", "-p", f"sequence={tmp_path / 'absent.csv'}")
    assert absent.exit_code == 1
    assert "cannot be read" in absent.output
    t1_below_t2 = whorl("dictionary", "build", tiny_scan, "-p", "t2_min_ms=900", "-p", "t1_max_ms=800")
    assert t1_below_t2.exit_code == 2
    bad = tmp_path / "bad.csv"
    for row, says in (
        ("nan,9,2", "expected a number"),
        ("0,9,2", "all flip angles"),
        ("30,9,12", "TE 12 ms and TR 9 ms"),
    ):
        bad.write_text("flip_deg,tr_ms,te_ms\n" + f"{row}\n" * 30)
        refused = whorl("dictionary", "build", "-p", f"sequence={bad}")
        assert refused.exit_code == 1
        assert says in refused.output
    negative = whorl("dictionary", "build", tiny_scan, "-p", "inversion_time_ms=-20")
    assert negative.exit_code == 2
    assert "expected at least -1" in negative.output


def test_a_cache_that_is_damaged_is_said_and_mended(tiny_scan: Path, tmp_path: Path) -> None:
    cache = ("-p", f"cache_dir={tmp_path / 'cache'}", "-p", "dictionary_step=0.21")
    assert started("dictionary", "build", tiny_scan, *cache).returncode == 0
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:5000])
    assert "cannot be read" in whorl("dictionary", "show", *cache[:2]).output
    mended = started("dictionary", "build", tiny_scan, *cache)
    assert mended.returncode == 0
    assert "It is built anew" in mended.stderr
    assert "built anew" not in started("dictionary", "build", tiny_scan, *cache).stderr


def test_the_dictionary_of_a_pulseq_file(tmp_path: Path) -> None:
    sequence = write_sequence(tmp_path / "a.seq", n_pulses=60).path
    shown = []
    for timepoints in (0, 50):
        arguments = ["-p", f"sequence={sequence}", "-p", f"timepoints={timepoints}"]
        result = CliRunner().invoke(main, ["dictionary", "show", *arguments])
        assert result.exit_code == 0, result.output
        shown.append(result.output)
    assert "60" in shown[0]
    assert "50" in shown[1]
    assert shown[0] != shown[1]
