"""Volumes as DICOM: Parametric Maps (float32 with units), or MR images of 16 bits that each viewer shows.

Letters: Z slices, Y X pixels.

UIDs of study and frame of reference are those of the MRD header; all others follow from the content of the
result: who exports it twice gets the same objects.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pydicom.valuerep import format_number_as_ds

from whorl import __version__
from whorl.exports import Facts, map_name, numbered, quantity_and_kind, said
from whorl.maps.images import ascii_text
from whorl.maps.volumes import Volume, attribute
from whorl.scan.failure import ScanError

_LARGEST = 65535
#: Value 3 of Image Type as the MR Image module has it.
_IMAGE_TYPES = {"T1": "T1 MAP", "T2": "T2 MAP", "M0": "DENSITY MAP"}
#: Parts of the body of which there is one: they have no side.
_UNPAIRED = ("ABDOMEN", "BRAIN", "CHEST", "HEAD", "HEART", "LIVER", "NECK", "PELVIS", "PROSTATE")
_SEXES = {sex: sex for sex in "MFO"}


def write(
    volumes: Sequence[Volume], facts: Facts, folder: Path, mr_images: bool = False
) -> tuple[list[Path], list[str]]:
    """Write each volume as a Parametric Map, or each slice as an MR image.

    Parameters
    ----------
    volumes, facts
        Of one result.
    folder
        Exists.
    mr_images
        MR Image Storage instead of Parametric Map Storage.

    Returns
    -------
    list, list
        The files, and sentences for the user.

    Raises
    ------
    ScanError
        If there is no volume of real numbers with one channel.
    """
    kept = [v for v in volumes if v.values.ndim == 3 and not np.iscomplexobj(v.values)]
    without = sorted({v.role or "without a role" for v in volumes if not any(v is k for k in kept)})
    said_ = [f"not in DICOM, which takes real maps: {', '.join(without)}; see --to nifti"] if without else []
    if not kept:
        raise ScanError("nothing can be exported: the result has no real-valued maps")
    entropy = digest(volumes, facts)
    names = [map_name(v) + (f"_run-{v.repetition + 1}" if v.repetition else "") for v in kept]
    paths = []
    for number, (volume, name) in enumerate(
        zip(kept, numbered(names, lambda s, n: f"{s}_{n}"), strict=True), start=1
    ):
        images = mr_image_datasets(volume, facts, entropy, number)
        if mr_images:
            (folder / name).mkdir(parents=True, exist_ok=True)
            for n, image in enumerate(images, start=1):
                paths.append(folder / name / f"{n:04d}.dcm")
                image.save_as(paths[-1], enforce_file_format=True)
        else:
            paths.append(folder / f"{name}.dcm")
            parametric_map(volume, facts, entropy, number, images).save_as(paths[-1])
    return paths, said_


def digest(volumes: Sequence[Volume], facts: Facts) -> str:
    """Of the content of a result: what its UIDs are made of."""
    content = hashlib.sha256(facts.xml)
    for volume in volumes:
        content.update(repr((volume.role, volume.series, volume.repetition, volume.contrast)).encode())
        content.update(repr((volume.geometries, sorted(said(volume).items()))).encode())
        content.update(np.ascontiguousarray(volume.values).tobytes())
    return content.hexdigest()


def parametric_map(
    volume: Volume, facts: Facts, entropy: str, number: int, sources: Sequence[Dataset]
) -> hd.pm.ParametricMap:
    """A volume as one object with a frame for each slice, float32 in the unit of the volume.

    Parameters
    ----------
    volume, facts, entropy, number
        As for `mr_image_datasets`.
    sources
        Its MR images: patient, study and place of the frames are taken from them.
    """
    centre, width = _window(volume)
    unit, quantity = _codes(volume)
    told = said(volume)
    values = np.nan_to_num(volume.values.astype(np.float32))
    mapping = hd.pm.RealWorldValueMapping(
        lut_label=_text(map_name(volume), 16),
        lut_explanation=_text(_title(volume), 64),
        unit=unit,
        value_range=(float(values.min()), float(values.max())),
        slope=1.0,
        intercept=0.0,
        quantity_definition=quantity,
    )
    made = hd.pm.ParametricMap(
        sources,
        values,
        series_instance_uid=_uid(entropy, number, "pm series"),
        series_number=number,
        sop_instance_uid=_uid(entropy, number, "pm"),
        instance_number=1,
        manufacturer="whorl",
        manufacturer_model_name="whorl",
        software_versions=__version__,
        device_serial_number=facts.text("deviceSerialNumber")[:64] or "none",
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[
            hd.VOILUTTransformation(centre, width, voi_lut_function=hd.VOILUTFunctionValues.LINEAR_EXACT)
        ],
        content_label=re.sub(r"[^A-Z0-9_ ]", "_", map_name(volume).upper())[:16],
        content_description=_text(_title(volume), 64),
        contributing_equipment=None,
        series_description=_series(volume),
    )
    # The sources were made for their attributes and are stored nowhere: nothing may refer to them.
    for name in ("ReferencedSeriesSequence", "SourceImageSequence", "ReferencedInstanceSequence"):
        if name in made:
            delattr(made, name)
    for frame in made.PerFrameFunctionalGroupsSequence:
        if "DerivationImageSequence" in frame:
            del frame.DerivationImageSequence
    if facts.text("protocolName"):
        made.ProtocolName = _text(facts.text("protocolName"), 64)
    made.ImageComments = _comment(volume)
    made.ContributingEquipmentSequence = _equipment(told, facts)
    if sources[0].PatientPosition:
        made.PatientPosition = sources[0].PatientPosition
    _body_part(made, facts)
    return made


def mr_image_datasets(volume: Volume, facts: Facts, entropy: str, number: int) -> list[FileDataset]:
    """The slices of a volume as MR images, 16 bits with a slope to the unit of the volume.

    Parameters
    ----------
    volume
        Of real numbers, `(Z, Y, X)`.
    facts
        Of the header: patient, study, scanner.
    entropy
        What the UIDs are made of, `digest`.
    number
        Of the series.
    """
    pixels, slope, intercept = _stored(volume)
    return [
        _mr_image(volume, n, stored, (slope, intercept), facts, entropy, number)
        for n, stored in enumerate(pixels)
    ]


def _stored(volume: Volume) -> tuple[NDArray[np.uint16], str, str]:
    """Pixels, slope and intercept: the images' own if they are integers of one scale, else of their range."""
    values = np.nan_to_num(volume.values.astype(np.float64))
    scales = {tuple(attribute(i, n) for n in ("RescaleSlope", "RescaleIntercept")) for i in volume.images}
    if len(scales) == 1 and all(image.data.dtype == np.uint16 for image in volume.images):
        ((told_slope, told_intercept),) = scales
        slope, intercept = float(told_slope or 1), float(told_intercept or 0)
    else:  # a slice without signal, for instance, has a scale of its own
        intercept = min(0.0, float(values.min()))
        slope = (float(values.max()) - intercept) / _LARGEST or 1.0
    # As text of at most 16 characters, and those are what the pixels are made with.
    texts = format_number_as_ds(slope), format_number_as_ds(intercept)
    pixels = np.clip(np.rint((values - float(texts[1])) / float(texts[0])), 0, _LARGEST)
    return pixels.astype(np.uint16), *texts


def _mr_image(
    volume: Volume,
    n: int,
    pixels: NDArray[np.uint16],
    rescale: tuple[str, str],
    facts: Facts,
    entropy: str,
    number: int,
) -> FileDataset:
    place = volume.geometries[n]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = _uid(entropy, number, "mr", n)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(pydicom.uid.PYDICOM_IMPLEMENTATION_UID)
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SpecificCharacterSet = "ISO_IR 192"
    quantity, kind = quantity_and_kind(volume)
    last = [_code_string(kind)] if kind else []
    ds.ImageType = ["DERIVED", "SECONDARY", _IMAGE_TYPES.get(quantity, "OTHER"), *last]
    ds.SOPClassUID, ds.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
    _patient_and_study(ds, facts, entropy)
    _body_part(ds, facts)
    ds.Modality, ds.SeriesNumber, ds.InstanceNumber = "MR", number, n + 1
    ds.SeriesInstanceUID = _uid(entropy, number, "mr series")
    ds.SeriesDescription = _series(volume)
    if facts.text("protocolName"):
        ds.ProtocolName = _text(facts.text("protocolName"), 64)
    if re.fullmatch(r"(HF|FF)(S|P|DR|DL)", facts.text("patientPosition")):
        ds.PatientPosition = facts.text("patientPosition")
    else:
        ds.PatientPosition = ""
    ds.Manufacturer, ds.ManufacturerModelName, ds.SoftwareVersions = "whorl", "whorl", __version__
    if facts.text("institutionName"):
        ds.InstitutionName = _text(facts.text("institutionName"), 64)
    # MR Image: what a fingerprint has no single value of stays empty.
    ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions = "RM", "NONE", ""
    ds.MRAcquisitionType = "2D"
    ds.RepetitionTime = ds.EchoTime = ds.EchoTrainLength = None
    if field := facts.number("systemFieldStrength_T"):
        ds.MagneticFieldStrength = format_number_as_ds(field)
    ds.ImageComments = _comment(volume, n)
    ds.DerivationDescription = _text(_derivation(said(volume)), 1024)
    ds.ContributingEquipmentSequence = _equipment(said(volume), facts)
    # Place. Pixel Spacing is the distance of rows first, then that of columns.
    step_x, step_y = place.pixel_mm
    ds.PixelSpacing = [format_number_as_ds(step_y), format_number_as_ds(step_x)]
    ds.SliceThickness = format_number_as_ds(place.fov_mm[2])
    if len(volume.geometries) > 1 and volume.is_even:
        ds.SpacingBetweenSlices = format_number_as_ds(volume.spacing_mm)
    ds.ImageOrientationPatient = [format_number_as_ds(v) for v in (*place.read_dir, *place.phase_dir)]
    ds.ImagePositionPatient = [format_number_as_ds(v) for v in place.first_pixel]
    ds.FrameOfReferenceUID = _known_uid(facts.text("frameOfReferenceUID")) or _uid(entropy, 0, "frame")
    ds.PositionReferenceIndicator = ""
    # Pixels.
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, 0
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = rescale[0], rescale[1], "US"
    centre, width = _window(volume)
    # The plain linear function is for steps of whole numbers: of a width of 1 it makes black and white.
    ds.VOILUTFunction = "LINEAR_EXACT"
    ds.WindowCenter, ds.WindowWidth = format_number_as_ds(centre), format_number_as_ds(width)
    ds.PixelData = pixels.astype("<u2").tobytes()
    return ds


def _patient_and_study(ds: Dataset, facts: Facts, entropy: str) -> None:
    ds.PatientName = _text(facts.text("patientName"), 64, plain=False)
    ds.PatientID = _text(facts.text("patientID"), 64, plain=False)
    ds.PatientBirthDate = _date(facts.text("patientBirthdate"))
    ds.PatientSex = _SEXES.get(facts.text("patientGender").upper()[:1], "")
    if weight := facts.number("patientWeight_kg"):
        ds.PatientWeight = format_number_as_ds(weight)
    ds.StudyInstanceUID = _known_uid(facts.text("studyInstanceUID")) or _uid(entropy, 0, "study")
    ds.StudyDate, ds.StudyTime = _date(facts.text("studyDate")), _time(facts.text("studyTime"))
    ds.StudyID, ds.AccessionNumber = (
        _text(facts.text("studyID"), 16),
        _text(facts.text("accessionNumber"), 16),
    )
    ds.ReferringPhysicianName = _text(facts.text("referringPhysicianName"), 64, plain=False)
    if facts.text("studyDescription"):
        ds.StudyDescription = _text(facts.text("studyDescription"), 64, plain=False)


def _body_part(ds: Dataset, facts: Facts) -> None:
    part = _code_string(facts.text("bodyPartExamined"))
    if part:
        ds.BodyPartExamined = part
    if part not in _UNPAIRED:
        ds.Laterality = ""  # must be there, empty if it is not known


def _equipment(told: dict[str, str], facts: Facts) -> Any:
    made: list[Dataset] = [
        hd.ContributingEquipment(
            "whorl",
            codes.DCM.ProcessingEquipment,
            software_versions=_text(told.get("whorl_version", __version__), 64),
            contribution_description=_text(_derivation(told), 1024),
        )
    ]
    if facts.text("systemVendor"):
        made.append(
            hd.ContributingEquipment(
                _text(facts.text("systemVendor"), 64),
                codes.DCM.AcquisitionEquipment,
                manufacturer_model_name=_text(facts.text("systemModel"), 64) or None,
                device_serial_number=_text(facts.text("deviceSerialNumber"), 64) or None,
                institution_name=_text(facts.text("institutionName"), 64) or None,
                station_name=_text(facts.text("stationName"), 16) or None,
            )
        )
    return made


def _codes(volume: Volume) -> tuple[Any, Any]:
    """Unit (UCUM) and quantity (DCM); None where there is no code that says just that."""
    units = {"ms": codes.UCUM.Millisecond, "a.u.": codes.UCUM.ArbitraryUnit}
    quantity, kind = quantity_and_kind(volume)
    # A standard deviation is no T1.
    quantities = {} if kind == "sd" else {"T1": codes.DCM.T1, "T2": codes.DCM.T2}
    return units.get(volume.units, codes.UCUM.NoUnits), quantities.get(quantity)


def _window(volume: Volume) -> tuple[float, float]:
    """Centre and width in the unit of the volume: as the images say, else the range that is not outliers.

    The images' own are whole numbers, which for arbitrary units may be far too coarse.
    """
    try:
        centre, width = (float(volume.attribute(name)) for name in ("WindowCenter", "WindowWidth"))
    except ValueError:
        width = 0.0
    if not width > 0 or volume.units == "a.u.":
        values = np.nan_to_num(volume.values)
        top = float(np.percentile(values[values > 0], 99.5)) if (values > 0).any() else 1.0
        centre, width = top / 2, top
    return centre, width


def _title(volume: Volume) -> str:
    quantity, kind = quantity_and_kind(volume)
    return " ".join(part for part in (quantity, kind, f"map ({volume.units or '1'})") if part)


def _series(volume: Volume) -> str:
    run = f" run {volume.repetition + 1}" if volume.repetition else ""
    return _text(volume.attribute("SeriesDescription") or map_name(volume), 64 - len(run)) + run


def _comment(volume: Volume, n: int = 0) -> str:
    return _text(attribute(volume.images[n], "ImageComments") or _title(volume), 1024)


def _derivation(told: dict[str, str]) -> str:
    parts = [
        f"{name.removeprefix('whorl_')}: {text}" for name, text in told.items() if name.startswith("whorl_")
    ]
    return "MR Fingerprinting; " + "; ".join(parts)


def _text(text: str, longest: int, plain: bool = True) -> str:
    """As DICOM takes it: no backslash, which separates values, and no longer than its kind allows."""
    text = ascii_text(text) if plain else " ".join(text.split())
    return text.replace("\\", "/")[:longest].strip()


def _code_string(text: str) -> str:
    return re.sub(r"[^A-Z0-9_ ]", "_", text.upper())[:16]


def _date(text: str) -> str:
    found = re.match(r"(\d{4})-?(\d\d)-?(\d\d)", text)
    try:
        return date(*map(int, found.groups())).strftime("%Y%m%d") if found else ""
    except ValueError:  # no such day
        return ""


def _time(text: str) -> str:
    found = re.match(r"([01]\d|2[0-3]):?([0-5]\d):?([0-5]\d)", text)
    return "".join(found.groups()) if found else ""


def _known_uid(text: str) -> str:
    return text if text and UID(text, validation_mode=pydicom.config.IGNORE).is_valid else ""


def _uid(entropy: str, number: int, what: str, n: int = 0) -> UID:
    return generate_uid(entropy_srcs=[entropy, what, str(number), str(n)])
