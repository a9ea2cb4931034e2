"""DICOM objects of maps: Parametric Maps, and by choice MR images.

A Parametric Map holds the physical values in single precision, with their unit and quantity in codes. Few
viewers show it, so the same maps can also be written as secondary MR images, 16 bit with a rescale slope.

Letters: Z slices, Y X pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whorl import __version__
from whorl.exports.facts import LOWRANK, Facts, kept
from whorl.exports.nifti import sidecar
from whorl.maps.images import ascii_text
from whorl.maps.volumes import Volume

#: Characters of a long string and of a short text in DICOM.
_LONG, _TEXT = 64, 1024
_TITLES = {
    "T1": "T1",
    "T2": "T2",
    "M0": "M0",
    "QUALITY": "match quality",
    "B1": "B1, relative",
    "T1_SD": "standard deviation of T1",
    "T2_SD": "standard deviation of T2",
}
#: The largest value of 16 bits without a sign that is left as it is by programs that read a sign.
_LARGEST = 32767


def export_dicom(
    volumes: Sequence[Volume], facts: Facts, folder: Path, *, mr_images: bool, lowrank: bool
) -> list[Path]:
    """One Parametric Map for each volume, or one MR image for each slice; the paths.

    The same result gives the same unique identifiers. Study and frame of reference are those of the MRD
    header if it names them.

    Parameters
    ----------
    mr_images
        Whether MR images are written instead of Parametric Maps.

    Raises
    ------
    ScanError
        If there is nothing to export.
    """
    maps = kept(volumes, lowrank=lowrank)
    identity = _Identity(maps, facts)
    written = []
    for n, volume in enumerate(maps, start=1):
        number = volume.series + 100 * volume.repetition
        name = f"{volume.role.lower()}_{n:02d}"
        if not mr_images:
            path = folder / f"{name}.dcm"
            _parametric_map(volume, facts, identity, number).save_as(path, enforce_file_format=True)
            written.append(path)
            continue
        for place in range(len(volume.images)):
            path = folder / f"{name}_{place + 1:03d}.dcm"
            mr_image(volume, place, facts, identity, number).save_as(path, enforce_file_format=True)
            written.append(path)
    return written


class _Identity:
    """Unique identifiers of a result: from what is in it, so that it always has the same."""

    def __init__(self, maps: Sequence[Volume], facts: Facts) -> None:
        digest = hashlib.sha256(repr(facts).encode())
        for volume in maps:
            digest.update(np.ascontiguousarray(volume.values).tobytes())
            digest.update(repr([geometry.position for geometry in volume.geometries]).encode())
        self._root = digest.hexdigest()
        self.study = _uid(facts.study_uid) or self.make("study")
        self.frame = _uid(facts.frame_of_reference_uid) or self.make("frame")

    def make(self, *what: object) -> str:
        from pydicom.uid import generate_uid

        return str(generate_uid(entropy_srcs=[self._root, *map(str, what)]))


def _uid(text: str) -> str:
    from pydicom.uid import UID

    return text if text and UID(text).is_valid else ""


def _patient_and_study(facts: Facts, identity: _Identity, modality: str) -> Any:
    from pydicom.dataset import Dataset

    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientName, ds.PatientID = facts.patient_name, facts.patient_id[:_LONG]
    ds.PatientBirthDate = _date(facts.patient_birthdate)
    ds.PatientSex = facts.patient_gender if facts.patient_gender in ("M", "F", "O") else ""
    if facts.patient_weight_kg:
        ds.PatientWeight = facts.patient_weight_kg
    ds.StudyInstanceUID = identity.study
    ds.StudyID, ds.AccessionNumber = facts.study_id[:16], facts.accession_number[:16]
    ds.StudyDate = _date(facts.study_date) or _date(facts.series_date)
    ds.StudyTime = _time(facts.study_time) or _time(facts.series_time)
    ds.ReferringPhysicianName = facts.referring_physician
    if facts.study_description:
        ds.StudyDescription = facts.study_description[:_LONG]
    ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = identity.frame, ""
    ds.Modality = modality
    ds.Manufacturer = facts.vendor[:_LONG]
    if facts.model:
        ds.ManufacturerModelName = facts.model[:_LONG]
    if facts.institution:
        ds.InstitutionName = facts.institution[:_LONG]
    return ds


def _date(text: str) -> str:
    digits = "".join(c for c in text if c.isdigit())[:8]
    try:
        datetime.strptime(digits, "%Y%m%d")
    except ValueError:
        return ""
    return digits


def _time(text: str) -> str:
    digits = "".join(c for c in text.split(".")[0].split("+")[0].rstrip("Z") if c.isdigit())[:6]
    return digits if len(digits) == 6 and digits[:2] < "24" and digits[2:4] < "60" else ""


def _title(volume: Volume) -> str:
    title = _TITLES[volume.role.removesuffix(LOWRANK)]
    return f"{title}, low-rank" if volume.role.endswith(LOWRANK) else title


def _explained(volume: Volume, facts: Facts, place: int | None = None) -> str:
    known = sidecar(volume, facts, volume.units)
    image = volume.images[place or 0]
    comment = str(image.meta.get("ImageComments") or _title(volume))
    return ascii_text(f"{comment}. whorl {__version__}, settings {known.get('WhorlSettings', 'unknown')}")[
        :_TEXT
    ]


def mr_image(volume: Volume, place: int, facts: Facts, identity: _Identity, number: int) -> Any:
    """A slice as a secondary MR image (PS3.3 A.4), physical = stored × slope.

    Parameters
    ----------
    place
        Of the slice in the volume.
    number
        Of the series.
    """
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

    geometry, values = volume.geometries[place], volume.values[place]
    slope, stored = _stored(volume, values)
    ds = _patient_and_study(facts, identity, "MR")
    ds.SOPClassUID = MRImageStorage
    ds.SOPInstanceUID = identity.make("mr", number, place)
    ds.SeriesInstanceUID = identity.make("mr", number)
    ds.SeriesNumber, ds.InstanceNumber = number, place + 1
    ds.SeriesDescription = ascii_text(volume.attribute("SeriesDescription") or _title(volume))[:_LONG]
    ds.SeriesDate, ds.SeriesTime = _date(facts.series_date), _time(facts.series_time)
    ds.ContentDate, ds.ContentTime = ds.SeriesDate or ds.StudyDate, ds.SeriesTime or ds.StudyTime
    ds.ProtocolName = ascii_text(facts.protocol_name)[:_LONG]
    ds.PatientPosition, ds.Laterality = facts.patient_position, ""
    ds.SoftwareVersions = f"whorl {__version__}"
    role = volume.role.removesuffix(LOWRANK)
    kind = {"T1": "T1 MAP", "T2": "T2 MAP", "M0": "DENSITY MAP"}.get(role, "OTHER")
    ds.ImageType = ["DERIVED", "SECONDARY", kind, "QUANTITATIVE", role]
    ds.DerivationDescription = _explained(volume, facts, place)
    ds.ImageComments = ds.DerivationDescription
    ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions = "GR", "SS", ""
    ds.MRAcquisitionType, ds.SequenceName = "2D", ascii_text(facts.sequence_name)[:16]
    ds.EchoTime = ds.RepetitionTime = ds.EchoTrainLength = None  # each readout has its own
    if facts.field_t:
        ds.MagneticFieldStrength = f"{float(facts.field_t):g}"
    ds.ImagePositionPatient = [_decimal(v) for v in geometry.first_pixel]
    ds.ImageOrientationPatient = [_decimal(v) for v in (*geometry.read_dir, *geometry.phase_dir)]
    dx, dy = geometry.pixel_mm
    ds.PixelSpacing = [_decimal(dy), _decimal(dx)]  # between rows, between columns
    ds.SliceThickness = _decimal(geometry.fov_mm[2])
    if len(volume.images) > 1 and volume.is_even:
        ds.SpacingBetweenSlices = _decimal(volume.spacing_mm)
    ds.SliceLocation = _decimal(geometry.along_mm)
    ds.Rows, ds.Columns = stored.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, 0
    ds.PixelPaddingValue = 0
    ds.RescaleSlope, ds.RescaleIntercept = _decimal(slope), "0"
    ds.RescaleType = volume.units[:16] if volume.units != "1" else "US"
    centre, width = (float(volume.attribute(f"Window{name}") or 0) for name in ("Center", "Width"))
    if not width or volume.units == "a.u.":
        centre, width = float(values.max()) / 2, float(values.max()) or 1.0
    ds.WindowCenter, ds.WindowWidth = _decimal(centre), _decimal(width)
    ds.PixelData = stored.astype("<u2").tobytes()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    return ds


def _stored(volume: Volume, values: NDArray[Any]) -> tuple[float, NDArray[np.uint16]]:
    """Slope of the volume and integers of a slice: those of the MRD image, or scaled to 15 bits."""
    slope = float(volume.attribute("RescaleSlope") or 1)
    if volume.images[0].data.dtype.kind == "f":
        slope = {"T1": 1.0, "T2": 0.1}.get(volume.role.removesuffix(LOWRANK), 0.0)
        largest = float(volume.values.max())
        if not slope or largest / slope > _LARGEST:
            slope = largest / _LARGEST if largest > 0 else 1.0
    # 0 is outside the object; what is inside is not.
    stored = np.clip(np.rint(values / slope), (values > 0).astype(np.float32), _LARGEST)
    return slope, stored.astype(np.uint16)


def _decimal(value: float) -> str:
    """At most 16 characters, as a decimal string must have."""
    from pydicom.valuerep import format_number_as_ds

    return format_number_as_ds(float(value))


def _parametric_map(volume: Volume, facts: Facts, identity: _Identity, number: int) -> Any:
    """A volume as a Parametric Map (PS3.3 A.75)."""
    import highdicom as hd
    from pydicom.sr.coding import Code
    from pydicom.uid import ExplicitVRLittleEndian

    role = volume.role.removesuffix(LOWRANK)
    quantity = {
        "T1": Code("113063", "DCM", "T1"),
        "T2": Code("113065", "DCM", "T2"),
    }.get(role, Code(role, "99WHORL", _TITLES[role]))
    unit = Code("ms", "UCUM", "millisecond") if volume.units == "ms" else Code("1", "UCUM", "no units")
    values = np.ascontiguousarray(volume.values, dtype=np.float32)
    first = volume.geometries[0]
    dx, dy = first.pixel_mm
    sources = [mr_image(volume, place, facts, identity, number) for place in range(len(volume.images))]
    largest = float(values.max())
    mapping = hd.pm.RealWorldValueMapping(
        lut_label=role[:16],
        lut_explanation=_title(volume)[:_LONG],
        unit=unit,
        value_range=(0.0, max(largest, 1.0)),
        slope=1.0,
        intercept=0.0,
        quantity_definition=quantity,
    )
    made = hd.pm.ParametricMap(
        source_images=sources,
        pixel_array=values,
        series_instance_uid=identity.make("map", number),
        series_number=number,
        sop_instance_uid=identity.make("map", number, "instance"),
        instance_number=1,
        manufacturer="whorl",
        manufacturer_model_name="whorl",
        software_versions=__version__,
        device_serial_number="0",
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[
            hd.VOILUTTransformation(window_center=largest / 2, window_width=max(largest, 1e-6))
        ],
        transfer_syntax_uid=ExplicitVRLittleEndian,
        content_description=_title(volume)[:_LONG],
        content_label=role.replace(" ", "_")[:16],
        pixel_measures=hd.PixelMeasuresSequence(
            pixel_spacing=(dy, dx),
            slice_thickness=first.fov_mm[2],
            spacing_between_slices=abs(volume.spacing_mm) if len(volume.images) > 1 else None,
        ),
        plane_orientation=hd.PlaneOrientationSequence(
            coordinate_system="PATIENT", image_orientation=(*first.read_dir, *first.phase_dir)
        ),
        plane_positions=[
            hd.PlanePositionSequence(coordinate_system="PATIENT", image_position=geometry.first_pixel)
            for geometry in volume.geometries
        ],
    )
    made.SeriesDescription = ascii_text(volume.attribute("SeriesDescription") or _title(volume))[:_LONG]
    made.ImageComments = _explained(volume, facts)
    made.Laterality = ""
    # It is made of raw data: there are no images in the archive that it could refer to.
    for sequence in (*made.PerFrameFunctionalGroupsSequence, *made.SharedFunctionalGroupsSequence):
        if "DerivationImageSequence" in sequence:
            del sequence.DerivationImageSequence
    if "ReferencedSeriesSequence" in made:
        del made.ReferencedSeriesSequence
    return made
