"""What OpenRecon is told about whorl: its metadata, and the parameters of its card at the console.

The platform reads them from a label of the image: JSON in base64.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema

from whorl.config import PROPERTIES, Settings, SettingsError, id_of
from whorl.scan.failure import ScanError

#: Name of the label.
LABEL = "com.siemens-healthineers.magneticresonance.openrecon.metadata:1.1.0"
PORT = 9002
_SCHEMA = Path(__file__).with_name("schema.json")
_SAFETY = "Research use only. Not a medical device: the maps must not be used for diagnosis or treatment."

#: Properties on the card, with their names there and, where there is a choice, those of the values. Numbers
#: are a choice too: the platform's generations differ in what they want to know of a number.
_CHOICES: dict[str, tuple[str, dict[str, str]]] = {
    "method": (
        "Method",
        {"inr": "INR (best maps)", "llr": "LLR (iterative, slow)", "lowrank": "Low-rank (fastest)"},
    ),
    "preset": ("INR", {"default": "Fast and accurate", "seed": "As published"}),
    "scan_deadline_s": (
        "Deadline after the scan",
        {
            "0": "None",
            "5": "5 s",
            "10": "10 s",
            "20": "20 s",
            "30": "30 s",
            "60": "1 min",
            "120": "2 min",
            "300": "5 min",
        },
    ),
    "fallback": (
        "If the INR fails",
        {"lowrank": "Low-rank", "llr": "LLR, then low-rank"},
    ),
    "output_dtype": (
        "Pixels",
        {"uint16": "Integers (1 ms, 0.1 ms)", "float32": "Floating point"},
    ),
    "fov_shift": (
        "Off-centre shift",
        {"none": "Data are shifted already", "nominal": "Shift to the slice", "off": "Leave off-centre"},
    ),
    "coil_maps": (
        "Coil maps",
        {"polynomial": "Polynomials", "walsh": "Adaptive combination", "espirit": "ESPIRiT"},
    ),
    "compression": (
        "Virtual coils",
        {"svd": "Strongest", "rovir": "For the field of view (ROVir)", "off": "All coils"},
    ),
    "b1": ("Transmit field", {"nominal": "As planned", "match": "Matched, and sent as a map"}),
}
_SWITCHES = {
    "preview": "Low-rank maps first",
    "rgb": "Maps in colour too",
    "uncertainty": "Standard deviations too",
    "error_image": "Image with the reason if it fails",
}


@dataclass(frozen=True, slots=True)
class Application:
    """What a site calls its package, and what the package asks of the platform.

    Parameters
    ----------
    vendor, name
        Letters and digits (the vendor may have hyphens); they name the package.
    version
        Three numbers.
    address, made_in
        Of whoever made the package.
    gpu
        Whether it uses a GPU where there is one.
    memory_mb, gpu_memory_mb, cores
        What it needs at most: the platform keeps that for it.
    """

    vendor: str
    name: str
    version: str
    address: str
    made_in: str
    gpu: bool
    memory_mb: int
    gpu_memory_mb: int
    cores: int

    @property
    def stem(self) -> str:
        """Name of the package and of the files in it, which the platform checks."""
        return f"OpenRecon_{self.vendor}_{self.name}_V{self.version}"


def metadata(application: Application, settings: Settings) -> dict[str, Any]:
    """The metadata of a package.

    Parameters
    ----------
    application
        What the package is called and needs.
    settings
        What stands on the card until somebody chooses otherwise.

    Raises
    ------
    ScanError
        If they are not as the platform wants them; see `check`.
    """
    made = {
        "general": {
            "name": {"en": application.name},
            "version": application.version,
            "vendor": application.vendor,
            "information": {
                "en": "T1 and T2 maps from spiral MR Fingerprinting by an implicit neural representation. "
                + _SAFETY
            },
            "id": application.name,
            "regulatory_information": {
                "device_trade_name": application.name,
                "production_identifier": application.version,
                "manufacturer_address": application.address,
                "made_in": application.made_in,
                "manufacture_date": date.today().strftime("%Y/%m/%d"),
                "material_number": f"{application.name}_{application.version}",
                "gtin": "",
                "udi": "",
                "safety_advices": _SAFETY,
                "special_operating_instructions": "For spiral FISP MR Fingerprinting protocols alone.",
                "additional_relevant_information": "MR Fingerprinting is patented.",
            },
        },
        "reconstruction": {
            "transfer_protocol": {"protocol": "ISMRMRD", "version": "1.4.1"},
            "port": PORT,
            "emitter": "raw",
            "injector": "image",
            "can_process_adjustment_data": False,
            "can_use_gpu": application.gpu,
            "min_count_required_gpus": 0,
            "min_required_gpu_memory": application.gpu_memory_mb if application.gpu else 0,
            "min_required_memory": application.memory_mb,
            "min_count_required_cpu_cores": application.cores,
            "content_qualification_type": "RESEARCH",
        },
        "parameters": _parameters(settings),
    }
    check(made)
    return made


def label(made: Mapping[str, Any]) -> str:
    """The value of `LABEL`."""
    return base64.b64encode(json.dumps(made, ensure_ascii=True, separators=(",", ":")).encode()).decode()


def check(made: Mapping[str, Any]) -> None:
    """Hold metadata against the schema, and against what it cannot say.

    Raises
    ------
    ScanError
        With the first thing that is wrong, and where.
    """
    schema = json.loads(_SCHEMA.read_text(encoding="utf-8"))
    wrong = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(made))
    if wrong is not None:
        raise ScanError(f"the OpenRecon metadata are wrong at {wrong.json_path}: {wrong.message}")
    ids = [parameter["id"] for parameter in made["parameters"]]
    if len(set(ids)) < len(ids):
        raise ScanError(f"the OpenRecon parameters have an id twice: {', '.join(sorted(ids))}")
    for parameter in made["parameters"]:
        known = [value["id"] for value in parameter.get("values", ())]
        if known and parameter["default"] not in known:
            raise ScanError(
                f'the OpenRecon parameter {parameter["id"]} is "{parameter["default"]}": '
                f"expected one of {', '.join(known)}"
            )


def _parameters(settings: Settings) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, (title, values) in _CHOICES.items():
        value = getattr(settings, name)
        default = f"{value:.15g}" if isinstance(value, float) else str(value)
        values = {key: said for key, said in values.items() if _is_possible(settings, name, key)}
        # A site's own value of a number stands among the others.
        named = (
            values
            if default in values or not isinstance(value, float)
            else {**values, default: f"{default} {PROPERTIES[name].unit}"}
        )
        found.append(
            {
                "id": id_of(name),
                "label": {"en": title},
                "type": "choice",
                "values": [{"id": key, "name": {"en": said}} for key, said in named.items()],
                "default": default,
                "information": {"en": PROPERTIES[name].text},
            }
        )
    for name, title in _SWITCHES.items():
        found.append(
            {
                "id": id_of(name),
                "label": {"en": title},
                "type": "boolean",
                "default": bool(getattr(settings, name)),
                "information": {"en": PROPERTIES[name].text},
            }
        )
    return found


def _is_possible(settings: Settings, name: str, choice: str) -> bool:
    """Whether a choice goes together with what the package has set."""
    try:
        Settings.from_properties({**settings.changed(), name: choice})
    except SettingsError:
        return False
    return True
