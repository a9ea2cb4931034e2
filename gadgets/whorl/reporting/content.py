"""What a report says about a result, apart from its pictures.

Letters: Z slices, R regions, Y X pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ismrmrd
import numpy as np
from numpy.typing import NDArray

from whorl.maps.images import Frame, SliceMaps
from whorl.maps.plate import Plate, Spheres, find_spheres, reference, sphere_labels
from whorl.maps.rois import QUANTITIES, RegionStatistics, mean_cov_percent, r_squared, region_statistics
from whorl.maps.volumes import Volume, attribute, volumes
from whorl.scan.failure import ScanError

#: Of the limits of agreement, in standard deviations.
_LIMITS_OF_AGREEMENT = 1.96


@dataclass(frozen=True, slots=True)
class Agreement:
    """How the means of regions agree with their reference, of one quantity.

    Parameters
    ----------
    rows
        The regions.
    r2
        Coefficient of determination about the line of identity; NaN for a single region.
    cov_percent
        Mean coefficient of variation.
    bias_percent, low_percent, high_percent
        Bland–Altman: mean relative difference, and limits of agreement (1.96 SD about it).

    References
    ----------
    Bland & Altman, Lancet 327:307 (1986), doi:10.1016/S0140-6736(86)90837-8.
    """

    rows: tuple[RegionStatistics, ...]
    r2: float
    cov_percent: float
    bias_percent: float
    low_percent: float
    high_percent: float


def agreement(rows: Sequence[RegionStatistics]) -> Agreement | None:
    """Agreement of regions whose reference is known; None if there are none."""
    known = [row for row in rows if np.isfinite(row.truth) and row.truth > 0]
    if not known:
        return None
    difference = np.array([200 * (row.mean - row.truth) / (row.mean + row.truth) for row in known])
    bias = float(difference.mean())
    reach = _LIMITS_OF_AGREEMENT * float(difference.std(ddof=1)) if len(known) > 1 else float("nan")
    return Agreement(
        tuple(known), r_squared(known), mean_cov_percent(known), bias, bias - reach, bias + reach
    )


@dataclass(frozen=True, slots=True)
class Regions:
    """Regions of a result beside their reference.

    Parameters
    ----------
    title
        Where they and their reference are from.
    labels
        `(Z, Y, X)`: region n has label n + 1; slices as in the volumes.
    names
        `(R,)`.
    agreements
        By quantity; without those whose reference is not known.
    spheres
        Where they were found, by place of the slice in the volumes.
    """

    title: str
    labels: NDArray[np.int16]
    names: tuple[str, ...]
    agreements: Mapping[str, Agreement]
    spheres: Mapping[int, Spheres] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ObjectStatistics:
    """A map over the whole object of a slice: number of voxels, median, quartiles, mean and SD."""

    quantity: str
    units: str
    slice_number: int
    repetition: int
    n_voxels: int
    median: float
    lower: float
    upper: float
    mean: float
    sd: float


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """All that a report is made of.

    Parameters
    ----------
    maps
        Volumes of the maps by role, of the first repetition.
    repeated
        Volumes of further repetitions.
    lowrank
        Those of low-rank maps that were sent ahead, by the role of the map.
    objects
        Statistics over the whole object.
    regions
        Of a truth or of a plate.
    notes
        Each note with the slices that it is about.
    slices
        Of each slice what its images say: see `SliceFacts`.
    resolved
        (what, value, source).
    settings
        Those that were changed.
    versions
        Programs and their versions.
    frames
        Of the fit, of the middle slice that has them.
    remarks
        What the report itself could not do.
    """

    title: str
    maps: Mapping[str, Volume]
    repeated: Sequence[Volume]
    lowrank: Mapping[str, Volume]
    objects: Sequence[ObjectStatistics]
    regions: Sequence[Regions]
    notes: Mapping[str, list[int]]
    slices: Sequence[SliceFacts]
    resolved: Sequence[tuple[str, str, str]]
    settings: Mapping[str, object]
    settings_hash: str
    versions: Mapping[str, str]
    frames: Sequence[Frame]
    remarks: Sequence[str]


@dataclass(frozen=True, slots=True)
class SliceFacts:
    """What the T1 image of a slice says about how it was made; seconds by stage, losses by iteration."""

    number: int
    repetition: int
    method: str
    status: str
    flags: tuple[str, ...]
    seconds: Mapping[str, float]
    losses: tuple[float, ...]
    n_iterations: int


def _words(image: ismrmrd.Image, name: str) -> list[str]:
    return attribute(image, name).split()


def slice_facts(image: ismrmrd.Image) -> SliceFacts:
    """From the attributes of an image."""
    seconds = {}
    for pair in _words(image, "whorl_seconds"):
        name, _, value = pair.partition("=")
        seconds[name] = float(value)
    return SliceFacts(
        number=int(image.slice),
        repetition=int(image.repetition),
        method=attribute(image, "whorl_method"),
        status=attribute(image, "whorl_status"),
        flags=tuple(_words(image, "whorl_flags")),
        seconds=seconds,
        losses=tuple(float(word) for word in _words(image, "whorl_losses")),
        n_iterations=int(attribute(image, "whorl_iterations") or 0),
    )


def _resolved(text: str) -> list[tuple[str, str, str]]:
    """(what, value, source) of texts like "matrix: 256 x 256 (header reconSpace); ..."."""
    rows = []
    for item in filter(None, text.split("; ")):
        name, _, rest = item.partition(": ")
        value, bracket, source = rest.rpartition(" (")
        rows.append((name, value, source.removesuffix(")")) if bracket else (name, "", rest))
    return rows


def _objects(volume: Volume) -> list[ObjectStatistics]:
    rows = []
    for image, values in zip(volume.images, volume.values, strict=True):
        inside = values[values > 0]
        if len(inside):
            lower, median, upper = (float(q) for q in np.percentile(inside, (25, 50, 75)))
            rows.append(
                ObjectStatistics(
                    volume.role,
                    volume.units,
                    int(image.slice),
                    volume.repetition,
                    len(inside),
                    median,
                    lower,
                    upper,
                    float(inside.mean()),
                    float(inside.std()),
                )
            )
    return rows


def regions_of_truth(maps: Mapping[str, Volume], path: Path) -> Regions:
    """Regions of a simulated scan.

    Raises
    ------
    ScanError
        If the file has no truth, or one of another matrix.
    """
    from whorl.simulation.truth import read_truth

    try:
        truth = read_truth(path)
    except (OSError, ValueError) as error:
        raise ScanError(f"no truth in {path}: {error}") from error
    places = [int(image.slice) for image in maps["T1"].images]
    if truth.labels.shape[1:] != maps["T1"].values.shape[1:] or max(places) >= len(truth.labels):
        raise ScanError(
            f"the truth in {path} has {len(truth.labels)} slices of {truth.labels.shape[1:]} pixels, the "
            f"result slices {places} of {maps['T1'].values.shape[1:]}: expected the scan that it is of"
        )
    labels = truth.labels[places]
    agreements = {}
    for quantity, name in QUANTITIES:
        if quantity in maps:
            rows = region_statistics(
                maps[quantity].values, labels, truth.roi_names, getattr(truth, f"roi_{name}")
            )
            if found := agreement(rows):
                agreements[quantity] = found
    return Regions(f"simulated truth of {path.name}", labels, truth.roi_names, agreements)


def regions_of_plate(
    maps: Mapping[str, Volume], plate: Plate | None, version: int, temperature_c: float, field_t: float
) -> Regions | None:
    """Spheres of a NIST plate, in the slices in which they are found; None if they are in none.

    Raises
    ------
    ValueError
        If there are no reference values for such a phantom.
    """
    t1 = maps["T1"]
    pixel_mm = t1.geometries[0].pixel_mm
    found: dict[int, Spheres] = {}
    for place, values in enumerate(t1.values):
        spheres = find_spheres(values, pixel_mm, plate=plate, quantity="T1")
        if spheres is None and "T2" in maps:
            spheres = find_spheres(maps["T2"].values[place], pixel_mm, plate=plate, quantity="T2")
        if spheres is not None:
            found[place] = spheres
    if not found:
        return None
    kinds = {spheres.plate for spheres in found.values() if spheres.plate}
    if len(kinds) != 1:
        return None
    (kind,) = kinds
    known = reference(kind, version=version, temperature_c=temperature_c, field_t=field_t)
    shape = t1.geometries[0].matrix[::-1]
    labels = np.zeros((len(t1.images), *shape), dtype=np.int16)
    for place, spheres in found.items():
        labels[place] = sphere_labels(spheres, (shape[0], shape[1]), pixel_mm)
    agreements = {}
    for quantity, truth in (("T1", known.t1_ms), ("T2", known.t2_ms)):
        if quantity in maps:
            rows = region_statistics(maps[quantity].values, labels, known.names, truth)
            if one := agreement(rows):
                agreements[quantity] = one
    title = (
        f"NIST system phantom version {version}, {kind.upper()} plate, {temperature_c:g} °C, {field_t:g} T; "
        f"spheres found in slice {', '.join(str(t1.images[n].slice) for n in found)}"
    )
    return Regions(title, labels, known.names, agreements, found)


def _frames(stacks: Sequence[Volume]) -> list[Frame]:
    """Frames of the fit, of the middle slice that has them."""
    by_frame: dict[int, dict[str, Volume]] = {}
    for volume in stacks:
        if volume.role.startswith("FIT_") and volume.repetition == 0:
            by_frame.setdefault(volume.contrast, {})[volume.role] = volume
    frames = []
    for _, parts in sorted(by_frame.items()):
        if {"FIT_SUBSPACE", "FIT_T1", "FIT_T2", "FIT_FEATURES"} <= parts.keys():
            middle = len(parts["FIT_T1"].images) // 2
            t1_ms, t2_ms, images, features = (
                parts[f"FIT_{name}"].values[middle] for name in ("T1", "T2", "SUBSPACE", "FEATURES")
            )
            images, features = (a if a.ndim == 3 else a[None] for a in (images, features))
            title = parts["FIT_T1"].attribute("whorl_frame")
            frames.append(Frame(title, features, images, SliceMaps(t1_ms, t2_ms, t1_ms, t1_ms)))
    return frames


def gather(
    images: Sequence[ismrmrd.Image],
    *,
    truth: Path | None = None,
    plate: Plate | None = None,
    look_for_plate: bool = True,
    version: int = 1,
    temperature_c: float = 20.0,
    field_t: float = 3.0,
) -> Content:
    """What there is to say about the images of a result.

    Raises
    ------
    ScanError
        If there are no T1 maps among them, or the truth is not that of this scan.
    """
    stacks = volumes(images)
    maps: dict[str, Volume] = {}
    lowrank: dict[str, Volume] = {}
    repeated = []
    for volume in stacks:
        if volume.role.endswith("_LOWRANK") and volume.repetition == 0:
            lowrank.setdefault(volume.role.removesuffix("_LOWRANK"), volume)
        elif volume.role in ("T1", "T2", "M0", "QUALITY", "B1", "T1_SD", "T2_SD"):
            if volume.role in maps:
                repeated.append(volume)
            else:
                maps[volume.role] = volume
    if "T1" not in maps:
        said = [attribute(image, "ImageComments") for image in images]
        shown = next((text for text in said if text), "")
        raise ScanError("the result has no T1 maps" + (f', but says: "{shown}"' if shown else ""))
    remarks, regions = [], []
    if truth is not None:
        regions.append(regions_of_truth(maps, truth))
    elif look_for_plate:
        try:
            found = regions_of_plate(maps, plate, version, temperature_c, field_t)
        except ValueError as error:
            remarks.append(f"Spheres of the NIST plate were not compared: {error}.")
            found = None
        if found is not None:
            regions.append(found)
        elif plate is not None and not remarks:
            remarks.append("The 14 spheres of the NIST plate were not found in any slice.")
    t1 = maps["T1"]
    notes: dict[str, list[int]] = {}
    for image in t1.images:
        for note in filter(None, attribute(image, "whorl_notes").split("; ")):
            notes.setdefault(note, []).append(int(image.slice))
    of_t1 = [image for volume in (t1, *(v for v in repeated if v.role == "T1")) for image in volume.images]
    return Content(
        title=t1.attribute("SeriesDescription").removesuffix("_T1").replace("_", " ") or "MR Fingerprinting",
        maps=maps,
        repeated=repeated,
        lowrank=lowrank,
        objects=[
            row
            for role in ("T1", "T2", "QUALITY")
            if role in maps
            for volume in (maps[role], *(v for v in repeated if v.role == role))
            for row in _objects(volume)
        ],
        regions=regions,
        notes=notes,
        slices=[slice_facts(image) for image in of_t1],
        resolved=_resolved(t1.attribute("whorl_resolved")),
        settings=json.loads(t1.attribute("whorl_changed") or "{}"),
        settings_hash=t1.attribute("whorl_settings"),
        versions={
            "whorl": t1.attribute("whorl_version"),
            **dict(pair.split("=", 1) for pair in t1.attribute("whorl_versions").split()),
        },
        frames=_frames(stacks),
        remarks=remarks,
    )
