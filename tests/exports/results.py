"""Results that see mistakes of place: double-oblique, off-centre, not square, pixels not square, 3 slices.

Letters: Z slices, Y X pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ismrmrd
import numpy as np
from numpy.typing import NDArray

from whorl.doors.files import ResultFile
from whorl.maps.images import ImageMaker, Provenance, SliceMaps
from whorl.scan.header import Space
from whorl.scan.readout import HEAD_DTYPE

N_X, N_Y, N_Z = 20, 14, 3
FOV_MM = (300.0, 252.0, 4.0)  # pixels of 15 × 18 mm
GAP_MM = 5.5  # of slices of 4 mm
MARK = (13, 4, 2)  # column, row, slice counted along slice_dir
T1_MS, T2_MS = 1234.0, 56.7

XML = b"""<?xml version="1.0"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
<subjectInformation><patientName>M\xc3\xbcller^Eva</patientName><patientWeight_kg>61.5</patientWeight_kg>
<patientID>AB-12_3</patientID><patientBirthdate>1970-02-28</patientBirthdate>
<patientGender>F</patientGender></subjectInformation>
<studyInformation><studyDate>2026-03-04</studyDate><studyTime>10:20:30</studyTime><studyID>77</studyID>
<accessionNumber>4711</accessionNumber><bodyPartExamined>HEAD</bodyPartExamined>
<studyInstanceUID>1.2.3.4.5.6</studyInstanceUID></studyInformation>
<measurementInformation><patientPosition>HFS</patientPosition><protocolName>MRF head</protocolName>
<frameOfReferenceUID>1.2.3.4.5.7</frameOfReferenceUID></measurementInformation>
<acquisitionSystemInformation><systemVendor>Vendor</systemVendor><systemModel>Model</systemModel>
<systemFieldStrength_T>2.89</systemFieldStrength_T></acquisitionSystemInformation>
<experimentalConditions><H1resonanceFrequency_Hz>123000000</H1resonanceFrequency_Hz></experimentalConditions>
<sequenceParameters><TR>12</TR><TR>13</TR><TE>2</TE><TI>20</TI><flipAngle_deg>10</flipAngle_deg>
</sequenceParameters></ismrmrdHeader>"""


def directions(left_handed: bool) -> tuple[NDArray[np.float64], ...]:
    """Read, phase and slice, LPS, rotated about two axes."""
    a, b = np.deg2rad([25, -35])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    read, phase, normal = (about_x @ about_z).T
    return read, phase, -normal if left_handed else normal


def positions(left_handed: bool, gaps: Sequence[float] = (GAP_MM, GAP_MM)) -> list[NDArray[np.float64]]:
    normal = directions(left_handed)[2]
    return [np.array([31.0, -17.5, 42.25]) + normal * d for d in np.cumsum([0.0, *gaps])]


def marked_lps(left_handed: bool) -> NDArray[np.float64]:
    """Place of the marked voxel, from the formula in the head of whorl.maps.geometry."""
    read, phase, _ = directions(left_handed)
    column, row, n = MARK
    place: NDArray[np.float64] = (
        positions(left_handed)[n] + (column - N_X // 2) * 15.0 * read + (row - N_Y // 2) * 18.0 * phase
    )
    return place


def slice_maps(marked: bool) -> SliceMaps:
    y, x = np.mgrid[:N_Y, :N_X]
    t1 = (100 + x + 20 * y).astype(np.float32)
    t2 = (20 + 0.1 * x + y).astype(np.float32)
    if marked:
        t1[MARK[1], MARK[0]], t2[MARK[1], MARK[0]] = T1_MS, T2_MS
    return SliceMaps(
        t1, t2, (x + 1.0).astype(np.float32), np.full((N_Y, N_X), 0.97, np.float32), t1 / t1.max()
    )


def make_images(
    left_handed: bool = False,
    dtype: str = "uint16",
    repetitions: int = 1,
    gaps: Sequence[float] = (GAP_MM, GAP_MM),
    **provenance: Any,
) -> list[ismrmrd.Image]:
    """The images of all slices, in an order in which no scanner measures them."""
    maker = ImageMaker(Space((N_X, N_Y, 1), FOV_MM), dtype)
    told = {"status": "degraded", "notes": ("3 readouts \\ missing",), **provenance}
    how = Provenance(method="inr", settings="abc", protocol_name="MRF head", seconds={"fit": 1.0}, **told)
    read, phase, normal = directions(left_handed)
    found = []
    for repetition in range(repetitions):
        for n in (1, 2, 0):
            head = np.zeros(1, HEAD_DTYPE)
            head["idx"]["slice"] = n
            head["position"] = positions(left_handed, gaps)[n]
            head["read_dir"], head["phase_dir"], head["slice_dir"] = read, phase, normal
            head["idx"]["repetition"] = repetition
            found += maker.images(slice_maps(n == MARK[2]), head[0], how)
    return found


def extra(
    like: ismrmrd.Image, pixels: NDArray[Any], role: str, series: int, contrast: int = 0
) -> ismrmrd.Image:
    """An image at the same place: `(C, 1, Y, X)` pixels of another role."""
    image = ismrmrd.Image.from_array(pixels, transpose=False)
    head, old = image.getHead(), like.getHead()
    for name in ("position", "read_dir", "phase_dir", "slice_dir", "field_of_view"):
        getattr(head, name)[:] = list(getattr(old, name))
    head.slice, head.image_series_index, head.contrast = old.slice, series, contrast
    image.setHead(head)
    meta = ismrmrd.Meta()
    meta.update({"GADGETRON_DataRole": role, "Units": "ms"})
    image.meta = meta
    return image


def extras(images: Sequence[ismrmrd.Image]) -> list[ismrmrd.Image]:
    """SD, low-rank preview, colours and two coefficients of each slice."""
    y, x = np.mgrid[:N_Y, :N_X]
    found = []
    for image in (i for i in images if i.meta["GADGETRON_DataRole"] == "T1"):
        real = (x + 100 * y).astype(np.float32)[None, None]
        colours = np.stack([x, 2 * y, 0 * x + 200]).astype(np.uint16)[:, None]
        found += [extra(image, real, role, n) for n, role in ((11, "T1_SD"), (12, "T2_LOWRANK"))]
        found += [extra(image, colours, "T1_RGB", 13)]
        found += [
            extra(image, ((k + 1) * (x + 1j * y)).astype(np.complex64)[None, None], "SUBSPACE", 14, k)
            for k in (0, 1)
        ]
    return found


def write_result(path: Path, images: Sequence[ismrmrd.Image], xml: bytes = XML) -> Path:
    with ResultFile(path, xml) as result:
        for image in images:
            result.append(image)
    return path
