"""Maps as a derivative dataset of BIDS: ``derivatives/whorl/sub-<label>/anat/sub-<label>_T1map.nii.gz``.

The dataset is the folder `derivatives/whorl`: inside a raw dataset it is where BIDS wants it, and alone it is
valid too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whorl import __version__
from whorl.exports import Facts, nifti, numbered, quantity_and_kind, said, target_folder
from whorl.maps.volumes import Volume
from whorl.scan.failure import ScanError

_VERSION = "1.10.0"
#: Folder, suffix, unit and factor to it of each quantity that BIDS has a name for.
_SUFFIXES = {
    "T1": ("anat", "T1map", "s", 1e-3),
    "T2": ("anat", "T2map", "s", 1e-3),
    "M0": ("anat", "M0map", "arbitrary", 1.0),
    # Recommended in percent of the nominal flip angle.
    "B1": ("fmap", "TB1map", "arbitrary", 100.0),
}
_README = """\
Quantitative maps from spiral MR Fingerprinting, made by whorl {version} (research use only).

T1map and T2map are in seconds, M0map is in arbitrary units, TB1map is in percent of the nominal flip angle.
0 is outside the object. desc-sd: standard deviation of the map; desc-lowrank: the low-rank preview of it.
The sidecars say how each map was made (Method), whether something was missing (Status), and why (Notes).
"""


def label(text: str) -> str:
    """What is left of a text in a label of BIDS: letters and digits."""
    return re.sub(r"[^a-zA-Z0-9]", "", text)


def write(
    volumes: Sequence[Volume],
    facts: Facts,
    folder: Path,
    subject: str = "",
    session: str = "",
    force: bool = False,
) -> tuple[list[Path], list[str]]:
    """Write a subject into the derivative dataset `folder`/derivatives/whorl, which is made if need be.

    Parameters
    ----------
    volumes, facts
        Of one result.
    folder
        Of the raw dataset, or any.
    subject, session
        Labels; by default the subject is the header's patient id as far as it is letters and digits, or 01.
    force
        Replace files of a subject (or session) that is there already.

    Returns
    -------
    list, list
        The NIfTI files, and sentences for the user.

    Raises
    ------
    ScanError
        If a label has other characters, the subject has files already, or there is nothing to write.
    """
    for what, text in (("subject", subject), ("session", session)):
        if text != label(text):
            raise ScanError(f'the {what} is "{text}": expected letters and digits only, as BIDS labels have')
    subject = subject or label(facts.text("patientID")) or "01"
    stem = f"sub-{subject}" + (f"_ses-{session}" if session else "")
    place = Path(f"sub-{subject}") / (f"ses-{session}" if session else "")
    kept = [v for v in volumes if quantity_and_kind(v)[0] in _SUFFIXES and quantity_and_kind(v)[1] != "rgb"]
    without = sorted({v.role or "without a role" for v in volumes if not any(v is k for k in kept)})
    notes = (
        [f"not in BIDS, which has no name for them: {', '.join(without)}; see --to nifti"] if without else []
    )
    if not kept:
        raise ScanError("nothing can be exported: BIDS has no name for any of the images")
    root = folder / "derivatives" / "whorl"
    target_folder(root / place, force)
    for name, text in (("dataset_description.json", _json(_description())), ("README", _README)):
        if not (root / name).exists():
            (root / name).write_text(text.format(version=__version__) if name == "README" else text)
    written: list[Path] = []
    several = len({v.repetition for v in kept}) > 1
    for volume, name, slices in _files(kept, stem, several):
        quantity, _ = quantity_and_kind(volume)
        directory, _, unit, factor = _SUFFIXES[quantity]
        paths, _ = nifti.write([volume], root / place / directory, factor, [name])
        written += paths
        sidecar = _json(_sidecar(volume, facts, unit))
        for path in paths:
            path.with_name(path.name.replace(".nii.gz", ".json")).write_text(sidecar)
        if slices:
            notes.append(slices)
    return written, list(dict.fromkeys(notes))


def _files(volumes: Sequence[Volume], stem: str, several: bool) -> list[tuple[Volume, str, str]]:
    """Volume, name without extension, and a sentence; a stack of unequal distances as one chunk a slice."""
    parts: list[tuple[Volume, str]] = []
    for volume in volumes:
        if volume.is_even:
            parts.append((volume, ""))
            continue
        sentence = (
            "the slices do not lie at equal distances, which a NIfTI file cannot tell: each is its own chunk"
        )
        parts += [(single, sentence) for single in _slices(volume)]
    names = []
    for volume, _ in parts:
        quantity, kind = quantity_and_kind(volume)
        run = f"_run-{volume.repetition + 1}" if several else ""
        description = f"_desc-{label(kind)}" if label(kind) else ""
        # The mark is where BIDS wants the chunk.
        names.append(f"{stem}{run}|{description}_{_SUFFIXES[quantity][1]}")
    unique = numbered(names, lambda name, n: name.replace("|", f"_chunk-{n}"))
    return [(v, name.replace("|", ""), text) for (v, text), name in zip(parts, unique, strict=True)]


def _slices(volume: Volume) -> list[Volume]:
    """Each slice as a volume."""
    return [
        Volume(
            *(volume.role, volume.series, volume.repetition, volume.contrast, volume.units),
            volume.values[n : n + 1],
            volume.geometries[n : n + 1],
            volume.images[n : n + 1],
        )
        for n in range(len(volume.images))
    ]


def _description() -> dict[str, Any]:
    return {
        "Name": "whorl: maps from MR Fingerprinting",
        "BIDSVersion": _VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "whorl", "Version": __version__}],
    }


def _sidecar(volume: Volume, facts: Facts, unit: str) -> dict[str, Any]:
    told = said(volume)
    names = {
        "whorl_method": "Method",
        "whorl_status": "Status",
        "whorl_notes": "Notes",
        "whorl_settings": "SettingsDigest",
        "whorl_version": "SoftwareVersions",
        "SeriesDescription": "SeriesDescription",
    }
    sidecar: dict[str, Any] = {
        "Description": f"{volume.role} of MR Fingerprinting; 0 outside the object",
        "Units": unit,
        # What is 0 is air: skull and scalp are kept.
        "SkullStripped": False,
    }
    sidecar |= {name: told[key] for key, name in names.items() if key in told}
    for name, key in (
        ("Manufacturer", "systemVendor"),
        ("ManufacturersModelName", "systemModel"),
        ("PulseSequenceDetails", "protocolName"),
        ("SequenceName", "sequenceName"),
        ("BodyPart", "bodyPartExamined"),
    ):
        if facts.text(key):
            sidecar[name] = facts.text(key)
    if field := facts.number("systemFieldStrength_T"):
        sidecar["MagneticFieldStrength"] = field
    # The train of a fingerprint has its lists; BIDS' own names want single numbers.
    sidecar |= {
        name: list(values)
        for name, values in (
            ("TrainFlipAngle", facts.flip_deg),
            ("TrainRepetitionTime", tuple(value / 1e3 for value in facts.tr_ms)),
            ("TrainEchoTime", tuple(value / 1e3 for value in facts.te_ms)),
        )
        if values
    }
    if len(facts.ti_ms) == 1 and facts.ti_ms[0] > 0:
        sidecar["InversionTime"] = facts.ti_ms[0] / 1e3
    return sidecar


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
