"""What an export says beside the maps: patient, study and scanner, as far as the MRD header tells them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from whorl.maps.volumes import Volume
from whorl.scan.failure import ScanError
from whorl.scan.header import header_root

#: Roles of maps that quantities of a scan have, in the order in which they are written.
MAPS = ("T1", "T2", "M0", "QUALITY", "B1", "T1_SD", "T2_SD")
LOWRANK = "_LOWRANK"


@dataclass(frozen=True, slots=True)
class Facts:
    """Texts as the MRD header has them; empty where it says nothing."""

    patient_name: str = ""
    patient_id: str = ""
    patient_birthdate: str = ""
    patient_gender: str = ""
    patient_weight_kg: str = ""
    study_uid: str = ""
    study_id: str = ""
    study_date: str = ""
    study_time: str = ""
    study_description: str = ""
    accession_number: str = ""
    referring_physician: str = ""
    series_date: str = ""
    series_time: str = ""
    measurement_id: str = ""
    frame_of_reference_uid: str = ""
    patient_position: str = ""
    protocol_name: str = ""
    sequence_name: str = ""
    vendor: str = ""
    model: str = ""
    device_id: str = ""
    institution: str = ""
    field_t: str = ""
    frequency_hz: str = ""


_PLACES = {
    "patient_name": "subjectInformation/patientName",
    "patient_id": "subjectInformation/patientID",
    "patient_birthdate": "subjectInformation/patientBirthdate",
    "patient_gender": "subjectInformation/patientGender",
    "patient_weight_kg": "subjectInformation/patientWeight_kg",
    "study_uid": "studyInformation/studyInstanceUID",
    "study_id": "studyInformation/studyID",
    "study_date": "studyInformation/studyDate",
    "study_time": "studyInformation/studyTime",
    "study_description": "studyInformation/studyDescription",
    "accession_number": "studyInformation/accessionNumber",
    "referring_physician": "studyInformation/referringPhysicianName",
    "series_date": "measurementInformation/seriesDate",
    "series_time": "measurementInformation/seriesTime",
    "measurement_id": "measurementInformation/measurementID",
    "frame_of_reference_uid": "measurementInformation/frameOfReferenceUID",
    "patient_position": "measurementInformation/patientPosition",
    "protocol_name": "measurementInformation/protocolName",
    "sequence_name": "measurementInformation/sequenceName",
    "vendor": "acquisitionSystemInformation/systemVendor",
    "model": "acquisitionSystemInformation/systemModel",
    "device_id": "acquisitionSystemInformation/deviceID",
    "institution": "acquisitionSystemInformation/institutionName",
    "field_t": "acquisitionSystemInformation/systemFieldStrength_T",
    "frequency_hz": "experimentalConditions/H1resonanceFrequency_Hz",
}


def read_facts(header_xml: bytes) -> Facts:
    """From an MRD header; what cannot be read is empty."""
    if not header_xml.strip():
        return Facts()
    try:
        root = header_root(header_xml)
    except ScanError:
        return Facts()
    found = {}
    for f in fields(Facts):
        path = "/".join("{*}" + part for part in _PLACES[f.name].split("/"))
        found[f.name] = " ".join((root.findtext(path) or "").split())
    return Facts(**found)


def kept(volumes: Iterable[Volume], *, lowrank: bool) -> list[Volume]:
    """Volumes of maps, and of low-rank maps that were sent ahead if they are asked for.

    Raises
    ------
    ScanError
        If there are none.
    """
    all_of_them = list(volumes)
    roles = [*MAPS, *(role + LOWRANK for role in MAPS if lowrank)]
    found = [volume for volume in all_of_them if volume.role in roles]
    if not found:
        there = ", ".join(sorted({volume.role or "unnamed" for volume in all_of_them}))
        raise ScanError(f"the result has no maps to export: expected {', '.join(MAPS[:4])}, got {there}")
    return sorted(found, key=lambda volume: roles.index(volume.role))


def single_slices(volume: Volume) -> Sequence[Volume]:
    """The volume itself, or its slices where they do not lie at equal distances."""
    if volume.is_even:
        return [volume]
    return [
        Volume(
            volume.role,
            volume.series,
            volume.repetition,
            volume.contrast,
            volume.units,
            volume.values[n : n + 1],
            volume.geometries[n : n + 1],
            volume.images[n : n + 1],
        )
        for n in range(len(volume.images))
    ]
