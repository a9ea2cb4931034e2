"""A text as an image, for receivers that show nothing but images."""

from __future__ import annotations

import ismrmrd
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from whorl import __version__
from whorl.maps.images import ascii_text
from whorl.scan.header import Space

#: Series of the status image, apart from those of the maps.
SERIES = 99
_TITLE = "whorl: no maps"
#: Edge of the image in pixels below which text cannot be read, and in mm where no field of view is known.
_SMALLEST, _FOV_MM = 256, 256.0
#: Value of a white pixel.
_WHITE = 4000
#: Fonts for the text, the largest that fits is taken; relative to the shorter edge of the image.
_SIZES = (0.07, 0.06, 0.05, 0.045)


def status_image(text: str, space: Space | None, head: np.void | None = None) -> ismrmrd.Image:
    """A readable image of a text: white letters on black, headed "whorl: no maps".

    Parameters
    ----------
    text
        What to say; it is wrapped, and cut with "..." if the image is full. Letters beyond ASCII are
        replaced as in `whorl.maps.images.ascii_text`.
    space
        The header's reconSpace, whose matrix and field of view the image has; a matrix below 256 in x or y
        becomes 256x256, and no space is one of 256 mm.
    head
        Acquisition header of the first imaging readout, whose place and orientation the image has; without
        it the image is axial, at the isocentre.

    Returns
    -------
    ismrmrd.Image
        uint16 magnitude, 0 to 4000.
    """
    said = ascii_text(text)
    matrix, fov_mm = (_SMALLEST, _SMALLEST), (_FOV_MM, _FOV_MM, 5.0)
    if space is not None:
        fov_mm = space.fov_mm
        if min(space.matrix[:2]) >= _SMALLEST:
            matrix = space.matrix[:2]
    image = ismrmrd.Image.from_array(_drawn(said, *matrix)[None, None], transpose=False)
    header = image.getHead()
    if head is None:
        header.read_dir[:], header.phase_dir[:], header.slice_dir[:] = (1, 0, 0), (0, 1, 0), (0, 0, 1)
    else:
        for name in ("measurement_uid", "acquisition_time_stamp"):
            setattr(header, name, int(head[name]))
        for name in ("position", "read_dir", "phase_dir", "slice_dir", "patient_table_position"):
            getattr(header, name)[:] = [float(v) for v in head[name]]
    header.field_of_view[:] = fov_mm
    header.image_type = ismrmrd.IMTYPE_MAGNITUDE
    header.image_index = 1
    header.image_series_index = SERIES
    image.setHead(header)
    meta = ismrmrd.Meta()
    meta.update(
        {
            "DataRole": "Image",
            "GADGETRON_DataRole": "STATUS",
            "ImageComments": said,
            "ImageComment": said,
            "GADGETRON_ImageComment": said,
            "SeriesDescription": "whorl_status",
            "WindowCenter": str(_WHITE // 2),
            "WindowWidth": str(_WHITE),
            "GADGETRON_WindowCenter": str(_WHITE // 2),
            "GADGETRON_WindowWidth": str(_WHITE),
            "ImageRowDir": [f"{v:.18f}" for v in header.read_dir],
            "ImageColumnDir": [f"{v:.18f}" for v in header.phase_dir],
            "Keep_image_geometry": "1",
            "whorl_version": __version__,
            "whorl_status": "failed",
        }
    )
    image.meta = meta
    return image


def _drawn(text: str, width: int, height: int) -> NDArray[np.uint16]:
    """Pixels `(Y, X)` of a title and a text below it."""
    edge = min(width, height)
    margin = edge // 24
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    title = ImageFont.load_default(max(12, round(0.08 * edge)))
    draw.text((margin, margin), _TITLE, fill=255, font=title)
    top = 2 * margin + _line_height(title)
    for size in _SIZES:
        font = ImageFont.load_default(max(12, round(size * edge)))
        room = (height - margin - top) // _line_height(font)
        lines = _wrapped(text, font, width - 2 * margin, room)
        if len(lines) <= room:
            break
    else:
        lines = lines[:room]
        while font.getlength(lines[-1] + "...") > width - 2 * margin:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "..."
    for n, line in enumerate(lines):
        draw.text((margin, top + n * _line_height(font)), line, fill=255, font=font)
    return (np.asarray(canvas, dtype=np.float32) * (_WHITE / 255)).round().astype(np.uint16)


def _line_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    _, top, _, bottom = font.getbbox("Ag|")
    return int(1.25 * (bottom - top)) + 1


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, room: int
) -> list[str]:
    """Lines of at most `width` pixels, as soon as they are more than `room`; a long word is broken."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".lstrip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        line = word
        while len(lines) <= room and font.getlength(line) > width:
            n = next(n for n in range(1, len(line)) if font.getlength(line[: n + 1]) > width)
            lines.append(line[:n])
            line = line[n:]
        if len(lines) > room:
            return lines
    return [*lines, line] if line else lines
