"""The maps of a result in the formats of other programs: NIfTI, DICOM, BIDS.

Letters: Z slices, Y X pixels.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from whorl.maps.volumes import Volume, attribute
from whorl.scan.failure import ScanError
from whorl.scan.header import header_root

#: Quantities by role, as BIDS calls their maps; all others keep their role in lower case.
_MAPS = {"T1": "T1map", "T2": "T2map", "M0": "M0map", "B1": "B1map"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What an MRD header says about patient, study, scanner and sequence; empty or None where it does not.

    `texts` by the names of MRD's elements (`patientID`, `studyInstanceUID`, ...), `flip_deg`, `tr_ms`,
    `te_ms`, `ti_ms` the lists of its sequenceParameters.
    """

    texts: dict[str, str] = field(default_factory=dict)
    flip_deg: tuple[float, ...] = ()
    tr_ms: tuple[float, ...] = ()
    te_ms: tuple[float, ...] = ()
    ti_ms: tuple[float, ...] = ()
    xml: bytes = b""

    def text(self, name: str) -> str:
        return self.texts.get(name, "")

    def number(self, name: str) -> float | None:
        """A text as a number; None if it is not a positive one."""
        try:
            value = float(self.text(name))
        except ValueError:
            return None
        return value if 0 < value < float("inf") else None


_GROUPS = (
    "subjectInformation",
    "studyInformation",
    "measurementInformation",
    "acquisitionSystemInformation",
    "experimentalConditions",
)


def facts_of(xml: bytes) -> Facts:
    """Facts of an MRD header; `ScanError` if it cannot be read, none of an empty one."""
    if not xml.strip(b"\0 \r\n\t"):
        return Facts()
    root = header_root(xml)
    texts = {
        element.tag.rpartition("}")[2]: " ".join(element.text.split())
        for group in _GROUPS
        for element in root.findall(f"{{*}}{group}/*")
        if element.text and element.text.strip()
    }
    sequence = root.find("{*}sequenceParameters")
    if sequence is not None:
        kind = " ".join((sequence.findtext("{*}sequence_type") or "").split())
        texts |= {"sequence_type": kind} if kind else {}
    flip_deg, tr_ms, te_ms, ti_ms = (_numbers(sequence, n) for n in ("flipAngle_deg", "TR", "TE", "TI"))
    return Facts(texts, flip_deg, tr_ms, te_ms, ti_ms, xml)


def _numbers(parent: ET.Element | None, name: str) -> tuple[float, ...]:
    """All numbers of that name; none if one of them is not a number."""
    if parent is None:
        return ()
    try:
        return tuple(float(e.text or "") for e in parent.findall(f"{{*}}{name}"))
    except ValueError:
        return ()


def quantity_and_kind(volume: Volume) -> tuple[str, str]:
    """Of a role: quantity, and what is special about it: (`T1`, ``), (`T1`, `lowrank`), (`T2`, `sd`)."""
    quantity, _, kind = volume.role.partition("_")
    return quantity or "image", kind.lower()


def map_name(volume: Volume) -> str:
    """`T1map`, `T1map_lowrank`, `T2map_sd`, `quality`, `subspace`."""
    quantity, kind = quantity_and_kind(volume)
    name = _MAPS.get(quantity) or re.sub(r"[^a-z0-9]+", "", quantity.lower()) or "image"
    kind = re.sub(r"[^a-z0-9]+", "", kind)
    return f"{name}_{kind}" if kind else name


def numbered(names: Sequence[str], join: Callable[[str, int], str]) -> list[str]:
    """Names without two alike: those that occur more than once get `join(name, n)`, n from 1 on."""
    count, seen = Counter(names), Counter[str]()
    result = []
    for name in names:
        seen[name] += 1
        result.append(join(name, seen[name]) if count[name] > 1 else name)
    return result


def said(volume: Volume) -> dict[str, str]:
    """What the images of a volume say about themselves, by names of their meta attributes; status and
    notes are those of all slices."""
    names = ("whorl_version", "whorl_method", "whorl_settings", "SeriesDescription")
    told = {name: volume.attribute(name) for name in names}
    for name, between in (("whorl_status", " "), ("whorl_notes", "; ")):
        told[name] = between.join(dict.fromkeys(text for i in volume.images if (text := attribute(i, name))))
    return {name: text for name, text in told.items() if text}


def exportable(volumes: Sequence[Volume]) -> list[Volume]:
    """The maps and images, without the status picture, which is a text, and pictures of the fit.

    Raises
    ------
    ScanError
        If there are none.
    """
    kept = [v for v in volumes if v.role != "STATUS" and not v.role.startswith("FIT_")]
    if not kept:
        raise ScanError("nothing can be exported: the result has a status image only, and no maps")
    return kept


def target_folder(folder: Path, force: bool) -> None:
    """Make the folder for the files.

    Raises
    ------
    ScanError
        If it has something in it, unless `force`: then files of the same names are replaced.
    """
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise ScanError(
            f"{folder} is not empty: expected a new folder; --force replaces files of equal names"
        )
    folder.mkdir(parents=True, exist_ok=True)
