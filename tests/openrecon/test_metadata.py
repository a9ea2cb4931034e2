"""What the platform is told is as it wants it, and means to whorl what it says."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from whorl.config import Settings, properties_from_json
from whorl.openrecon.metadata import Application, check, label, metadata
from whorl.scan.failure import ScanError


def _application(**changed: Any) -> Application:
    told: dict[str, Any] = {
        "vendor": "Uni-Ulm",
        "name": "whorl",
        "version": "1.2.3",
        "address": "Ulm",
        "made_in": "Germany",
        "gpu": False,
        "memory_mb": 8000,
        "gpu_memory_mb": 6000,
        "cores": 2,
    }
    return Application(**{**told, **changed})


@pytest.fixture
def made() -> dict[str, Any]:
    return metadata(_application(), Settings())


def test_label_holds_the_metadata(made: dict[str, Any]) -> None:
    assert json.loads(base64.b64decode(label(made))) == made
    assert made["reconstruction"]["emitter"] == "raw"
    assert made["reconstruction"]["injector"] == "image"
    assert made["reconstruction"]["port"] == 9002
    assert made["reconstruction"]["content_qualification_type"] == "RESEARCH"


@pytest.mark.parametrize("gpu", [False, True])
def test_a_gpu_is_used_and_never_required(gpu: bool) -> None:
    told = metadata(_application(gpu=gpu), Settings())["reconstruction"]
    assert (told["can_use_gpu"], told["min_required_gpu_memory"]) == (gpu, 6000 if gpu else 0)
    assert told["min_count_required_gpus"] == 0


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(method="llr", scan_deadline_s=20, fallback="llr", output_dtype="float32", preview=True),
        Settings.from_properties(
            {"scan_deadline_s": 47.5, "preset": "seed", "b1": "match", "error_image": True}
        ),
    ],
)
def test_what_stands_on_the_card_is_what_the_package_was_made_with(settings: Settings) -> None:
    parameters = metadata(_application(), settings)["parameters"]
    sent = {parameter["id"]: parameter["default"] for parameter in parameters}
    # The platform may send all values as texts.
    for values in (sent, {name: str(value) for name, value in sent.items()}):
        properties = properties_from_json(json.dumps({"version": "1.1.0", "parameters": values}))
        assert Settings.from_properties(properties) == settings


def test_every_choice_is_one(made: dict[str, Any]) -> None:
    for parameter in made["parameters"]:
        choices = [value["id"] for value in parameter.get("values", [])] or ["True", "False"]
        for choice in choices:
            text = json.dumps({"parameters": {parameter["id"]: choice}})
            Settings.from_properties(properties_from_json(text))


@pytest.mark.parametrize(
    ("settings", "parameter", "left"),
    [
        (Settings(virtual_coils=6), "compression", {"svd", "rovir"}),
        (Settings(coil_maps_file="maps.npy"), "coilmaps", {"polynomial"}),
        (Settings(b1_map="b1.npy"), "b1", {"nominal"}),
        (Settings(rovir_region="0 1 0 1", compression="rovir"), "compression", {"rovir"}),
    ],
)
def test_what_does_not_go_with_the_package_is_not_offered(
    settings: Settings, parameter: str, left: set[str]
) -> None:
    (found,) = (p for p in metadata(_application(), settings)["parameters"] if p["id"] == parameter)
    assert {value["id"] for value in found["values"]} == left


def test_a_long_number_stays_what_it_is() -> None:
    parameters = metadata(_application(), Settings(scan_deadline_s=1234567.5))["parameters"]
    assert {p["id"]: p["default"] for p in parameters}["scandeadlines"] == "1234567.5"


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"vendor": "Uni_Ulm"}, "general.vendor"),
        ({"vendor": ""}, "general.vendor"),
        ({"vendor": "Uni-"}, "general.vendor"),
        ({"name": "whorl recon"}, "general.id"),
        ({"version": "1.2"}, "general.version"),
        ({"version": "1.2.3.dev1"}, "general.version"),
        ({"address": ""}, "manufacturer_address"),
        ({"memory_mb": 0}, "min_required_memory"),
    ],
)
def test_names_that_the_platform_refuses_are_refused_here(changed: dict[str, Any], place: str) -> None:
    with pytest.raises(ScanError, match=place):
        metadata(_application(**changed), Settings())


def _without(path: str) -> Any:
    def change(made: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            made = made[name]
        del made[last]

    return change


@pytest.mark.parametrize(
    "change",
    [
        _without("parameters"),
        _without("general.id"),
        _without("general.name.en"),
        _without("general.regulatory_information.udi"),
        _without("reconstruction.can_use_gpu"),
        _without("reconstruction.transfer_protocol.version"),
        lambda made: made["parameters"].extend([{**made["parameters"][0], "id": f"p{n}"} for n in range(2)]),
        lambda made: made["parameters"].append(made["parameters"][0]),
        lambda made: made["parameters"][0].update(id="scan_deadline"),
        lambda made: made["parameters"][0].update(type="float"),
        lambda made: made["parameters"][0].update(default="other"),
        lambda made: made["parameters"][0].pop("values"),
        lambda made: made["parameters"][-1].update(default="yes"),
        lambda made: made["parameters"][-1].pop("information"),
        lambda made: made["reconstruction"].update(emitter="image", injector="compleximage"),
        lambda made: made["reconstruction"].update(port="9002"),
        lambda made: made["reconstruction"].update(injector="raw"),
        lambda made: made["general"]["regulatory_information"].update(manufacture_date="2026-01-02"),
        lambda made: made.update(more={}),
    ],
)
def test_the_check_finds_what_is_wrong(made: dict[str, Any], change: Any) -> None:
    check(made)
    change(made)
    with pytest.raises(ScanError, match="OpenRecon"):
        check(made)


def test_schema_is_a_schema() -> None:
    import jsonschema

    from whorl.openrecon import metadata as module

    schema = json.loads(Path(module.__file__).with_name("schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
