"""NIfTI files of maps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whorl.exports.facts import LOWRANK, Facts, kept, single_slices
from whorl.maps.volumes import Volume

#: DICOM and MRD have x to the left and y to the back, NIfTI to the right and to the front.
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_NAMES = {
    "T1": "T1map",
    "T2": "T2map",
    "M0": "M0map",
    "QUALITY": "quality",
    "B1": "TB1map",
    "T1_SD": "T1map_sd",
    "T2_SD": "T2map_sd",
}


def affine_ras(volume: Volume) -> NDArray[np.float64]:
    """`(4, 4)`: index (column, row, slice, 1) to mm, RAS."""
    return np.asarray(_LPS_TO_RAS @ volume.affine)


def write_nifti(volume: Volume, path: Path, *, factor: float = 1.0) -> None:
    """A volume of real values in one file, axes (column, row, slice), RAS.

    Parameters
    ----------
    factor
        Of the physical values.
    """
    import nibabel

    # Its methods have no types.
    new: Any = nibabel.Nifti1Image
    values = np.ascontiguousarray(volume.values.transpose(2, 1, 0) * np.float32(factor), dtype=np.float32)
    image = new(values, affine_ras(volume))
    image.set_qform(affine_ras(volume), code="scanner")
    image.set_sform(affine_ras(volume), code="scanner")
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = f"whorl {volume.attribute('whorl_version')}"[:79]
    nibabel.save(image, path)


def sidecar(volume: Volume, facts: Facts, units: str) -> dict[str, Any]:
    """What is known of a map, in the names of BIDS."""
    found: dict[str, Any] = {
        "Units": units,
        "Manufacturer": facts.vendor,
        "ManufacturersModelName": facts.model,
        "InstitutionName": facts.institution,
        "ProtocolName": facts.protocol_name,
        "PulseSequenceType": "spiral FISP MR Fingerprinting",
        "SeriesDescription": volume.attribute("SeriesDescription"),
        "EstimationReference": "doi:10.1038/nature11971",
        "EstimationAlgorithm": f"whorl {volume.attribute('whorl_method')}".strip(),
        "EstimationSoftware": f"whorl {volume.attribute('whorl_version')}".strip(),
        "WhorlStatus": _worst(volume),
        "WhorlNotes": _notes(volume),
        "WhorlFlags": volume.attribute("whorl_flags").split(),
        "WhorlSettings": volume.attribute("whorl_settings"),
    }
    if facts.field_t:
        found["MagneticFieldStrength"] = float(facts.field_t)
    return {name: value for name, value in found.items() if value not in ("", [])}


def _worst(volume: Volume) -> str:
    order = ("", "complete", "degraded", "fallback")
    statuses = [str(image.meta.get("whorl_status") or "") for image in volume.images]
    return max(statuses, key=lambda status: order.index(status) if status in order else len(order))


def _notes(volume: Volume) -> list[str]:
    notes = [str(image.meta.get("whorl_notes") or "") for image in volume.images]
    return list(dict.fromkeys(note for note in notes if note))


def names(volumes: Sequence[Volume]) -> list[str]:
    """File names without ending; each once."""
    bases = []
    for volume in volumes:
        name = _NAMES[volume.role.removesuffix(LOWRANK)]
        name += "_lowrank" if volume.role.endswith(LOWRANK) else ""
        bases.append(name + (f"_repetition-{volume.repetition}" if volume.repetition else ""))
    counts, seen, result = Counter(bases), Counter[str](), []
    for base in bases:
        seen[base] += 1
        result.append(f"{base}_stack-{seen[base]}" if counts[base] > 1 else base)
    return result


def export_nifti(volumes: Sequence[Volume], facts: Facts, folder: Path, *, lowrank: bool) -> list[Path]:
    """One ``.nii.gz`` with a JSON sidecar for each map, values in ms; the paths.

    Slices at unequal distances become one file each: a NIfTI file has one affine.

    Raises
    ------
    ScanError
        If there is nothing to export.
    """
    parts = [part for volume in kept(volumes, lowrank=lowrank) for part in single_slices(volume)]
    written = []
    for volume, name in zip(parts, names(parts), strict=True):
        path = folder / f"{name}.nii.gz"
        write_nifti(volume, path)
        text = json.dumps(sidecar(volume, facts, volume.units), indent=2)
        (folder / f"{name}.json").write_text(text + "\n")
        written.append(path)
    return written
