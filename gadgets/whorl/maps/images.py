"""T1, T2, M0 and quality of a slice as MRD images that console and DICOM writer understand.

Letters: Y X pixels.
"""

from __future__ import annotations

import threading
import unicodedata
from dataclasses import dataclass

import ismrmrd
import numpy as np
from numpy.typing import NDArray

from whorl import __version__
from whorl.scan.header import Space

#: The largest value that every receiver takes in a uint16 pixel.
_LARGEST = 32767


@dataclass(frozen=True, slots=True)
class SliceMaps:
    """Maps of one slice, each `(Y, X)` float32, 0 outside the object: ms, ms, a.u., 0 to 1, and the relative
    transmit field where it was matched."""

    t1_ms: NDArray[np.float32]
    t2_ms: NDArray[np.float32]
    m0: NDArray[np.float32]
    quality: NDArray[np.float32]
    b1: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a slice's maps came about: ends up in each image."""

    method: str
    status: str
    notes: tuple[str, ...]
    settings: str
    protocol_name: str
    seconds: dict[str, float]
    preset: str = ""


@dataclass(frozen=True, slots=True)
class _Quantity:
    name: str
    role: str
    field: str
    units: str
    slope: float
    window: tuple[float, float]  # centre and width in physical units; 0: by the slope


_QUANTITIES = (
    _Quantity("T1", "T1", "t1_ms", "ms", 1.0, (1250, 2500)),
    _Quantity("T2", "T2", "t2_ms", "ms", 0.1, (75, 150)),
    _Quantity("M0", "M0", "m0", "a.u.", 0.0, (0, 0)),
    _Quantity("quality", "QUALITY", "quality", "1", 0.001, (1, 1)),
    _Quantity("B1", "B1", "b1", "1", 0.001, (1, 1)),
)


def ascii_text(text: str) -> str:
    """Text as every receiver takes it: DICOM's default characters, and none that XML forbids.

    Accents are dropped, other letters beyond ASCII become a question mark, white space one space.
    """
    letters = (
        c for c in unicodedata.normalize("NFKD", " ".join(text.split())) if not unicodedata.combining(c)
    )
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in letters)


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
        self._m0_slope = 0.0
        self._lock = threading.Lock()

    def images(
        self, maps: SliceMaps, head: np.void, provenance: Provenance, repetition: int = 0
    ) -> list[ismrmrd.Image]:
        """One image for each quantity.

        Parameters
        ----------
        maps
            The slice's maps.
        head
            Acquisition header of the slice's first imaging readout: place, orientation, time.
        provenance
            What to say about them.
        repetition
            Of the whole scan, from 0 on.
        """
        with self._lock:
            if not self._m0_slope and maps.m0.any():
                # The first slice with signal sets the scale for the series.
                self._m0_slope = float(np.percentile(maps.m0[maps.m0 > 0], 99.5)) / 4000
            first, slope = self._count + 1, self._m0_slope or 1.0
            quantities = [q for q in _QUANTITIES if getattr(maps, q.field) is not None]
            self._count += len(quantities)
        return [
            self._image(quantity, maps, head, provenance, first + n, n + 1, slope, repetition)
            for n, quantity in enumerate(quantities)
        ]

    def _image(
        self,
        quantity: _Quantity,
        maps: SliceMaps,
        head: np.void,
        provenance: Provenance,
        index: int,
        series: int,
        m0_slope: float,
        repetition: int,
    ) -> ismrmrd.Image:
        values: NDArray[np.float32] = getattr(maps, quantity.field)
        slope = quantity.slope or m0_slope
        centre, width = quantity.window
        if not width:
            centre, width = 2000 * slope, 4000 * slope
        if self._dtype == "uint16":
            # 0 means outside: what is inside and rounds to it gets the smallest value.
            smallest = (maps.t1_ms > 0).astype(np.float32)
            pixels = np.clip(np.rint(values / slope), smallest, _LARGEST).astype(np.uint16)
        else:
            pixels, slope = values.astype(np.float32), 1.0
        image = ismrmrd.Image.from_array(pixels[None, None], transpose=False)  # (channels, z, y, x)
        header = image.getHead()
        for name in ("measurement_uid", "acquisition_time_stamp"):
            setattr(header, name, int(head[name]))
        for name in ("position", "read_dir", "phase_dir", "slice_dir", "patient_table_position"):
            getattr(header, name)[:] = [float(v) for v in head[name]]
        header.physiology_time_stamp[:] = [int(v) for v in head["physiology_time_stamp"]]
        header.field_of_view[:] = self._space.fov_mm
        header.slice = int(head["idx"]["slice"])
        header.repetition = repetition
        header.image_type = ismrmrd.IMTYPE_MAGNITUDE
        header.image_index = index
        header.image_series_index = series
        image.setHead(header)
        # Not as text: read back, an empty value is None, and that is written as "None".
        image.meta = self._meta(quantity, slope, (centre, width), head, provenance)
        return image

    def _meta(
        self,
        quantity: _Quantity,
        slope: float,
        window: tuple[float, float],
        head: np.void,
        provenance: Provenance,
    ) -> ismrmrd.Meta:
        stored = [max(1, round(value / slope)) for value in window]
        # The scanner breaks at fractions; a small M0 can then only be seen with the stored window.
        physical = [max(1, round(value)) for value in window]
        title = f"{quantity.name} map ({quantity.units})"
        comment = f"{title}, whorl {provenance.method}, {provenance.status}"
        notes = ascii_text("; ".join(provenance.notes))
        if notes:
            comment += f": {notes}"
        meta = ismrmrd.Meta()
        meta.update(
            {
                "DataRole": "Quantitative",
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
                "SeriesDescription": f"{ascii_text(provenance.protocol_name)}_{quantity.name}".lstrip("_"),
                "SequenceDescriptionAdditional": f"{quantity.name}_whorl",
                "GADGETRON_SeqDescription": f"_{quantity.name}_whorl",
                "GADGETRON_ImageProcessingHistory": ["whorl", provenance.method],
                "ImageRowDir": [f"{v:.18f}" for v in head["read_dir"]],
                "ImageColumnDir": [f"{v:.18f}" for v in head["phase_dir"]],
                "Keep_image_geometry": "1",
                "whorl_version": __version__,
                "whorl_method": provenance.method,
                "whorl_settings": provenance.settings,
                "whorl_preset": provenance.preset,
                "whorl_status": provenance.status,
                "whorl_notes": notes,
                "whorl_seconds": " ".join(
                    f"{name}={value:.3f}" for name, value in provenance.seconds.items()
                ),
            }
        )
        return meta
