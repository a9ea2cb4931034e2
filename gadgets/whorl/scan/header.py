"""What the MRD header says about a scan."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, field

import ismrmrd
import numpy as np

from whorl.scan.failure import ScanError

#: Elements that a reconstruction reads, and one that the binding asks for. The others are not even bound:
#: what is wrong with them, or whom they name, must neither stop a scan nor turn up in a text.
_BOUND = ("experimentalConditions", "encoding", "sequenceParameters")
#: Counters that may number repetitions of the whole scan.
REPETITIONS = ("average", "contrast", "phase", "repetition", "set")
#: Beyond it a number of single precision is infinite.
_LARGEST = 3e38
#: Receivers have a relative noise bandwidth of 0.8 or so.
_WIDEST = 2.0


@dataclass(frozen=True, slots=True)
class Space:
    """A matrix and its field of view, both in order (x, y, z); millimetres."""

    matrix: tuple[int, int, int]
    fov_mm: tuple[float, float, float]

    @property
    def pixel_mm(self) -> tuple[float, float]:
        return self.fov_mm[0] / self.matrix[0], self.fov_mm[1] / self.matrix[1]


@dataclass(frozen=True, slots=True)
class Header:
    """The part of an MRD header that a reconstruction needs; lists are empty where the header has none.

    `n_timepoints_announced` is the largest of the repetition, contrast and set limits plus one.
    `n_slices_announced`, `n_arms_announced` and `n_segments_announced` are the limits of slice,
    kspace_encoding_step_1 and segment plus one, or 0 if the header has none; `limits` those of counters that
    may number repetitions. `encoding` is the place of the encoding that is read, of `n_encodings`.
    `noise_bandwidth` is that of the receiver's noise relative to the inverse of the dwell time; 0 if the
    header has no plausible one. `user` holds the parameters of ``userParameters``, as texts by name.
    """

    encoded: Space
    recon: Space
    flip_deg: tuple[float, ...]
    tr_ms: tuple[float, ...]
    te_ms: tuple[float, ...]
    ti_ms: tuple[float, ...]
    n_timepoints_announced: int
    n_slices_announced: int
    protocol_name: str
    n_arms_announced: int = 0
    n_segments_announced: int = 0
    limits: Mapping[str, int] = field(default_factory=dict)
    encoding: int = 0
    n_encodings: int = 1
    noise_bandwidth: float = 0.0
    user: Mapping[str, str] = field(default_factory=dict)


def read_header(xml: bytes | str) -> Header:
    """Read an MRD header document.

    Raises
    ------
    ScanError
        If the document cannot be read, declares entities, or lacks a usable matrix or field of view.
    """
    root = header_root(xml)
    try:
        protocol_name = root.findtext("{*}measurementInformation/{*}protocolName", "").strip()
        user = {
            parameter.findtext("{*}name", "").strip(): parameter.findtext("{*}value", "").strip()
            for parameter in root.findall("{*}userParameters/*")
        }
        bandwidth = root.findtext("{*}acquisitionSystemInformation/{*}relativeReceiverNoiseBandwidth", "")
        for element in [e for e in root if e.tag.rpartition("}")[2] not in _BOUND]:
            root.remove(element)
        document = ismrmrd.xsd.CreateFromDocument(ET.tostring(root))
    except Exception as error:  # whatever the XML binding raises, the operator needs one sentence
        raise _unreadable(error) from error
    encodings = list(getattr(document, "encoding", None) or [])
    if not encodings:
        raise ScanError("the MRD header has no encoding: matrix and field of view are not known")
    spiral = [e for e in encodings if "spiral" in str(getattr(e.trajectory, "value", e.trajectory)).lower()]
    encoding = (spiral or encodings)[0]
    sequence = document.sequenceParameters

    def values(name: str) -> tuple[float, ...]:
        try:
            numbers = tuple(float(v) for v in (getattr(sequence, name, None) or []))
        except (TypeError, ValueError, OverflowError) as error:
            raise ScanError(f"{name} of the MRD header cannot be read: expected numbers") from error
        if not all(abs(number) < _LARGEST for number in numbers):
            raise ScanError(f"{name} of the MRD header is not finite: expected numbers")
        # Single precision by MRD's schema, and all that version 2 carries: the same scan, the same train.
        return tuple(float(np.float32(number)) for number in numbers)

    def announced(name: str) -> int:
        limit = getattr(encoding.encodingLimits, name, None)
        try:
            return 0 if limit is None or limit.maximum is None else int(limit.maximum) + 1
        except (TypeError, ValueError, OverflowError) as error:
            raise ScanError(
                f"the limit {name} of the MRD header cannot be read: expected a number"
            ) from error

    return Header(
        encoded=_space(encoding.encodedSpace, "encodedSpace"),
        recon=_space(encoding.reconSpace, "reconSpace"),
        flip_deg=values("flipAngle_deg"),
        tr_ms=values("TR"),
        te_ms=values("TE"),
        ti_ms=values("TI"),
        n_timepoints_announced=max(1, *(announced(name) for name in ("repetition", "contrast", "set"))),
        n_slices_announced=announced("slice"),
        protocol_name=protocol_name,
        n_arms_announced=announced("kspace_encoding_step_1"),
        n_segments_announced=announced("segment"),
        limits={name: announced(name) for name in REPETITIONS},
        encoding=encodings.index(encoding),
        n_encodings=len(encodings),
        noise_bandwidth=_noise_bandwidth(bandwidth),
        user=user,
    )


def _noise_bandwidth(text: str) -> float:
    """It scales the noise and no map: what cannot be one is taken as if the header had none."""
    try:
        bandwidth = float(text)
    except ValueError:
        return 0.0
    return bandwidth if 0 < bandwidth <= _WIDEST else 0.0


def header_root(xml: bytes | str) -> ET.Element:
    """The header document, which must not declare anything; `ScanError` if it does, or is no XML."""
    raw = xml.encode() if isinstance(xml, str) else xml
    raw = raw.rstrip(b"\0 \r\n\t")
    if b"\0" in raw:  # UTF-16, in which the next line would find nothing
        raise ScanError("the MRD header cannot be read: expected UTF-8, got NUL bytes")
    if b"<!DOCTYPE" in raw or b"<!ENTITY" in raw:
        raise ScanError("the MRD header declares a document type or entities, which are not accepted")
    try:
        return ET.fromstring(raw)
    except (ET.ParseError, ValueError, LookupError) as error:  # the latter for unknown encodings
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> ScanError:
    what = str(error).splitlines() or [type(error).__name__]
    return ScanError(f"the MRD header cannot be read: {what[0]}")


def _space(space: object, name: str) -> Space:
    try:
        matrix = tuple(int(getattr(space.matrixSize, axis)) for axis in "xyz")  # type: ignore[attr-defined]
        fov_mm = tuple(float(getattr(space.fieldOfView_mm, axis)) for axis in "xyz")  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ScanError(f"{name} of the MRD header lacks a readable matrix or field of view") from error
    if not (min(matrix[:2]) >= 2 and max(matrix[:2]) <= 2048 and matrix[2] >= 1):
        raise ScanError(f"{name} of the MRD header has matrix {matrix}: expected 2 to 2048 in x and y")
    if not all(0 < edge < 1e5 for edge in fov_mm[:2]):
        raise ScanError(f"{name} of the MRD header has a field of view of {fov_mm} mm: expected more than 0")
    return Space(matrix, fov_mm)  # type: ignore[arg-type]


def field_strength_t(xml: bytes) -> float:
    """Field of the scanner in tesla; 0 if the header does not say it."""
    try:
        text = header_root(xml).findtext(
            "{*}acquisitionSystemInformation/{*}systemFieldStrength_T", "0"
        )  # fmt: skip
        return float(text)
    except (ScanError, ValueError):
        return 0.0


def patient_of(xml: bytes) -> dict[str, str]:
    """Id and name of the patient, as far as they can be read: for an operator who wants them in the log."""
    try:
        subject = header_root(xml).find("{*}subjectInformation")
    except ScanError:
        return {}
    if subject is None:
        return {}
    texts = {name: (subject.findtext(f"{{*}}{name}") or "").strip() for name in ("patientID", "patientName")}
    return {name: text for name, text in texts.items() if text}
