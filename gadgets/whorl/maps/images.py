"""Maps of a slice, and what else there is to see of it, as MRD images that receivers understand.

Letters: K coefficients, F features, Y X pixels.
"""

from __future__ import annotations

import json
import platform
import threading
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ismrmrd
import numpy as np
from numpy.typing import NDArray

from whorl import __version__
from whorl.maps.geometry import orientation
from whorl.scan.header import Space

#: The largest value that every receiver takes in a uint16 pixel.
_LARGEST = 32767
#: What a receiver cannot show and a program does not need stays short.
_MOST_LOSSES = 100


@dataclass(frozen=True, slots=True)
class SliceMaps:
    """Maps of one slice, each `(Y, X)` float32, 0 outside the object: ms, ms, a.u., 0 to 1, and the relative
    transmit field where it was matched. `turn` is the phase factor of m0, complex64."""

    t1_ms: NDArray[np.float32]
    t2_ms: NDArray[np.float32]
    m0: NDArray[np.float32]
    quality: NDArray[np.float32]
    b1: NDArray[np.float32] | None = None
    turn: NDArray[np.complex64] | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a slice's maps came about: ends up in each image.

    Parameters
    ----------
    method, status, notes
        `inr`, `llr` or `lowrank`; `complete`, `degraded` or `fallback`; and why.
    settings
        Their hash.
    protocol_name
        Of the scan.
    seconds
        By stage.
    flags
        What a program should know: `fallback`, `readouts_lost=6`, `uneven_order`.
    resolved
        What was taken for the scan, and from where: one sentence each.
    changed
        Settings other than the default.
    losses
        Data term before each iteration of the fit, and at its end.
    """

    method: str
    status: str
    notes: tuple[str, ...]
    settings: str
    protocol_name: str
    seconds: dict[str, float]
    flags: tuple[str, ...] = ()
    resolved: tuple[str, ...] = ()
    changed: Mapping[str, Any] = field(default_factory=dict)
    losses: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class _Quantity:
    """What an image shows: name, role, series, unit, slope of integer pixels (0: by the values), and window
    (centre and width in physical units; 0: by the slope)."""

    name: str
    role: str
    series: int
    units: str
    slope: float
    window: tuple[float, float]
    data_role: str = "Quantitative"


#: Maps by their field in `SliceMaps`.
_MAPS = {
    "t1_ms": _Quantity("T1", "T1", 1, "ms", 1.0, (1250, 2500)),
    "t2_ms": _Quantity("T2", "T2", 2, "ms", 0.1, (75, 150)),
    "m0": _Quantity("M0", "M0", 3, "a.u.", 0.0, (0, 0)),
    "quality": _Quantity("quality", "QUALITY", 4, "1", 0.001, (1, 1)),
    "b1": _Quantity("B1", "B1", 5, "1", 0.001, (1, 1)),
}
_DEVIATIONS = (
    _Quantity("T1 SD", "T1_SD", 6, "ms", 0.1, (50, 100)),
    _Quantity("T2 SD", "T2_SD", 7, "ms", 0.05, (10, 20)),
)
#: Series of low-rank maps that are sent ahead: so much above those of the maps.
_PREVIEW = 10
_COLOURED = {
    "t1_ms": _Quantity("T1 colour", "T1_RGB", 21, "1", 1.0, (128, 256), "Image"),
    "t2_ms": _Quantity("T2 colour", "T2_RGB", 22, "1", 1.0, (128, 256), "Image"),
}
_SUBSPACE = _Quantity("subspace image", "SUBSPACE", 31, "a.u.", 1.0, (1, 2), "Image")
_FRAMES = {
    "images": _Quantity("fit, subspace images", "FIT_SUBSPACE", 41, "a.u.", 1.0, (1, 2), "Image"),
    "t1_ms": _Quantity("fit, T1", "FIT_T1", 42, "ms", 1.0, (1250, 2500), "Image"),
    "t2_ms": _Quantity("fit, T2", "FIT_T2", 43, "ms", 0.1, (75, 150), "Image"),
    "features": _Quantity("fit, features", "FIT_FEATURES", 44, "1", 1.0, (1, 2), "Image"),
}


def ascii_text(text: str) -> str:
    """Text as every receiver takes it: DICOM's default characters, and none that XML forbids.

    Accents are dropped, other letters beyond ASCII become a question mark, white space one space.
    """
    letters = (
        c for c in unicodedata.normalize("NFKD", " ".join(text.split())) if not unicodedata.combining(c)
    )
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in letters)


@dataclass(frozen=True, slots=True)
class Frame:
    """The fit of the INR at one iteration.

    Parameters
    ----------
    title
        Which one; "sent" for what came of it at last.
    features
        `(F, Y, X)` joint features φ, zero outside the mask.
    images
        `(K, Y, X)` magnitude of the subspace images.
    maps
        As they would have been sent.
    """

    title: str
    features: NDArray[np.float32]
    images: NDArray[np.float32]
    maps: SliceMaps


class ImageMaker:
    """Makes the images of one scan; indices and the scale of M0 are those of the whole scan.

    Parameters
    ----------
    space
        The header's reconSpace.
    dtype
        ``uint16`` (scaled) or ``float32`` (physical values).
    """

    def __init__(self, space: Space, dtype: str) -> None:
        self._space = space
        self._dtype = dtype
        self._count = 0
        self._m0_slopes: dict[int, float] = {}
        self._lock = threading.Lock()

    def images(
        self, maps: SliceMaps, head: np.void, provenance: Provenance, *, preview: bool = False
    ) -> list[ismrmrd.Image]:
        """One image for each map.

        Parameters
        ----------
        head
            Acquisition header of the slice's first imaging readout: place, orientation, time; its
            `idx.repetition` is that of the whole scan.
        preview
            Whether these are low-rank maps that are sent ahead of the maps: in series of their own.
        """
        made = []
        for name, quantity in _MAPS.items():
            values = getattr(maps, name)
            if values is None:
                continue
            if preview:
                quantity = replace(
                    quantity,
                    name=f"{quantity.name} low-rank",
                    role=f"{quantity.role}_LOWRANK",
                    series=quantity.series + _PREVIEW,
                )
            if name == "m0":
                quantity = replace(quantity, slope=self._m0_slope(quantity.series, values))
            made.append(self._scaled(quantity, values, maps.t1_ms > 0, head, provenance))
        return made

    def deviations(
        self,
        t1_sd_ms: NDArray[np.float32],
        t2_sd_ms: NDArray[np.float32],
        head: np.void,
        provenance: Provenance,
    ) -> list[ismrmrd.Image]:
        """Standard deviations of T1 and T2, each `(Y, X)`, 0 outside the object."""
        return [
            self._scaled(quantity, values, values > 0, head, provenance)
            for quantity, values in zip(_DEVIATIONS, (t1_sd_ms, t2_sd_ms), strict=True)
        ]

    def coloured(self, maps: SliceMaps, head: np.void, provenance: Provenance) -> list[ismrmrd.Image]:
        """T1 and T2 in the colours of the field over their windows, 0 to 255 in three channels; 0 outside.

        Raises
        ------
        ImportError
            If cmcrameri, which has the colours, is not installed.

        References
        ----------
        Fuderer et al., Magn Reson Med 93:490 (2025), doi:10.1002/mrm.30290 (lipari for T1, navia for T2).
        """
        made = []
        for name, quantity in _COLOURED.items():
            centre, width = _MAPS[name].window
            values: NDArray[np.float32] = getattr(maps, name)
            share = np.clip((values - centre) / width + 0.5, 0, 1)
            table = colour_table("lipari" if name == "t1_ms" else "navia")
            pixels = table[np.rint(255 * share).astype(np.int64)]  # (Y, X, 3)
            pixels[values <= 0] = 0
            image = self._image(
                quantity, np.moveaxis(pixels, -1, 0), ismrmrd.IMTYPE_RGB, head, provenance, 1.0
            )
            made.append(image)
        return made

    def subspace(
        self, images: NDArray[np.complex64], head: np.void, provenance: Provenance
    ) -> list[ismrmrd.Image]:
        """Complex subspace images `(K, Y, X)`, one MRD image each, `contrast` being the coefficient."""
        return [
            self._image(_SUBSPACE, image[None], ismrmrd.IMTYPE_COMPLEX, head, provenance, 1.0, contrast=k)
            for k, image in enumerate(images)
        ]

    def frames(
        self, frames: Iterable[Frame], n_features: int, head: np.void, provenance: Provenance
    ) -> list[ismrmrd.Image]:
        """Pictures of a fit: `contrast` is the frame, channels are coefficients or features."""
        made = []
        for number, frame in enumerate(frames):
            values = {
                "images": frame.images,
                "t1_ms": frame.maps.t1_ms[None],
                "t2_ms": frame.maps.t2_ms[None],
                "features": frame.features[:n_features],
            }
            for name, quantity in _FRAMES.items():
                image = self._image(
                    quantity,
                    np.ascontiguousarray(values[name], dtype=np.float32),
                    ismrmrd.IMTYPE_MAGNITUDE,
                    head,
                    provenance,
                    1.0,
                    contrast=number,
                )
                meta = image.meta
                meta["whorl_frame"] = ascii_text(frame.title)
                image.meta = meta
                made.append(image)
        return made

    def _m0_slope(self, series: int, m0: NDArray[np.float32]) -> float:
        with self._lock:
            if series not in self._m0_slopes and m0.any():
                # The first slice with signal sets the scale for the series.
                self._m0_slopes[series] = float(np.percentile(m0[m0 > 0], 99.5)) / 4000
            return self._m0_slopes.get(series, 1.0)

    def _scaled(
        self,
        quantity: _Quantity,
        values: NDArray[np.float32],
        inside: NDArray[np.bool_],
        head: np.void,
        provenance: Provenance,
    ) -> ismrmrd.Image:
        """A map of real numbers, as integers if they are asked for."""
        slope = quantity.slope
        if not quantity.window[1]:
            quantity = replace(quantity, window=(2000 * slope, 4000 * slope))
        if self._dtype == "uint16":
            # 0 means outside: what is inside and rounds to it gets the smallest value.
            pixels: NDArray[Any] = np.clip(np.rint(values / slope), inside.astype(np.float32), _LARGEST)
            pixels = pixels.astype(np.uint16)
        else:
            pixels, slope = values.astype(np.float32), 1.0
        return self._image(quantity, pixels[None], ismrmrd.IMTYPE_MAGNITUDE, head, provenance, slope)

    def _image(
        self,
        quantity: _Quantity,
        pixels: NDArray[Any],
        image_type: int,
        head: np.void,
        provenance: Provenance,
        slope: float,
        *,
        contrast: int = 0,
    ) -> ismrmrd.Image:
        """An image of pixels `(channels, Y, X)`."""
        with self._lock:
            self._count += 1
            index = self._count
        (read, phase, normal), position, _ = orientation(head)
        image = ismrmrd.Image.from_array(pixels[:, None], transpose=False)  # (channels, z, y, x)
        header = image.getHead()
        for name in ("measurement_uid", "acquisition_time_stamp"):
            setattr(header, name, int(head[name]))
        header.read_dir[:], header.phase_dir[:], header.slice_dir[:] = read, phase, normal
        header.position[:] = position
        header.patient_table_position[:] = [float(v) for v in head["patient_table_position"]]
        header.physiology_time_stamp[:] = [int(v) for v in head["physiology_time_stamp"]]
        header.field_of_view[:] = self._space.fov_mm
        header.slice = int(head["idx"]["slice"])
        header.repetition = int(head["idx"]["repetition"])
        header.contrast = contrast
        header.image_type = image_type
        header.image_index = index
        header.image_series_index = quantity.series
        image.setHead(header)
        # Not as text: read back, an empty value is None, and that is written as "None".
        image.meta = _meta(quantity, slope, (read, phase), provenance)
        return image


def _meta(
    quantity: _Quantity,
    slope: float,
    directions: tuple[Iterable[float], Iterable[float]],
    provenance: Provenance,
) -> ismrmrd.Meta:
    stored = [max(1, round(value / slope)) for value in quantity.window]
    # The scanner breaks at fractions; a small M0 can then only be seen with the stored window.
    physical = [max(1, round(value)) for value in quantity.window]
    comment = f"{quantity.name} map ({quantity.units})" if "fit" not in quantity.name else quantity.name
    comment = f"{comment}, whorl {provenance.method}, {provenance.status}"
    notes = ascii_text("; ".join(provenance.notes))
    if notes:
        comment += f": {notes}"
    short = quantity.name.replace(" ", "_").replace(",", "")
    meta = ismrmrd.Meta()
    meta.update(
        {
            "DataRole": quantity.data_role,
            "GADGETRON_DataRole": quantity.role,
            "RescaleSlope": repr(slope),
            "RescaleIntercept": "0",
            "Units": quantity.units,
            "WindowCenter": str(physical[0]),
            "WindowWidth": str(physical[1]),
            "GADGETRON_WindowCenter": str(stored[0]),
            "GADGETRON_WindowWidth": str(stored[1]),
            "GADGETRON_ScaleRatio": repr(1 / slope),
            "ImageComments": comment,
            "ImageComment": comment,
            "GADGETRON_ImageComment": comment,
            "SeriesDescription": f"{ascii_text(provenance.protocol_name)}_{short}".lstrip("_"),
            "SequenceDescriptionAdditional": f"{short}_whorl",
            "GADGETRON_SeqDescription": f"_{short}_whorl",
            "GADGETRON_ImageProcessingHistory": ["whorl", provenance.method],
            "ImageRowDir": [f"{v:.18f}" for v in directions[0]],
            "ImageColumnDir": [f"{v:.18f}" for v in directions[1]],
            "Keep_image_geometry": "1",
            "whorl_version": __version__,
            "whorl_versions": versions(),
            "whorl_method": provenance.method,
            "whorl_settings": provenance.settings,
            "whorl_changed": ascii_text(json.dumps(dict(provenance.changed), sort_keys=True)),
            "whorl_status": provenance.status,
            "whorl_notes": notes,
            "whorl_flags": " ".join(provenance.flags),
            "whorl_resolved": ascii_text("; ".join(provenance.resolved)),
            "whorl_losses": " ".join(f"{loss:.4g}" for loss in _thinned(provenance.losses)),
            "whorl_iterations": str(max(len(provenance.losses) - 1, 0)),
            "whorl_seconds": " ".join(f"{name}={value:.3f}" for name, value in provenance.seconds.items()),
        }
    )
    return meta


def _thinned(losses: tuple[float, ...]) -> tuple[float, ...]:
    """At most a hundred of them, the last one among them."""
    step = -(-len(losses) // _MOST_LOSSES) or 1
    return losses[::-1][::step][::-1]


@cache
def versions() -> str:
    """Programs that make the maps: `name=version` each."""
    names = ("torch", "numpy", "scipy", "finufft", "cufinufft", "sigpy", "ismrmrd")
    found = {"python": platform.python_version()}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return " ".join(f"{name}={version}" for name, version in found.items())


@cache
def colour_table(name: str) -> NDArray[np.uint16]:
    """A colour map of cmcrameri with 256 entries, `(256, 3)`, 0 to 255.

    Raises
    ------
    ImportError
        If cmcrameri is not installed.
    """
    # Its tables alone: to import it takes Matplotlib with it, and half a second beside the scanner.
    found = find_spec("cmcrameri")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'cmcrameri'", name="cmcrameri")
    colours = np.loadtxt(Path(found.origin).with_name("cmaps") / f"{name}.txt")
    table: NDArray[np.uint16] = np.rint(255 * colours).astype(np.uint16)
    return table
