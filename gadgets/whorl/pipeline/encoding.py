"""How a slice was encoded: trajectory, density compensation, transform, and virtual coils.

Letters: C coils, V virtual coils, I interleaves, S samples, D trajectory columns, Y X pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.config import Settings
from whorl.kspace.coils import compression_matrix
from whorl.kspace.density import attached_density, density_compensation
from whorl.kspace.nufft import Nufft, make_nufft
from whorl.kspace.rovir import low_resolution_images, region_energies, rovir_matrix
from whorl.kspace.slicebuffer import Compress
from whorl.pipeline.protocol import Sources
from whorl.scan.failure import ScanError
from whorl.scan.girf import Girf, corrected, read_girf
from whorl.scan.header import Header
from whorl.scan.integrity import LARGEST
from whorl.scan.trajectory import resolve_units, to_recon_pixels

#: Readouts of which the virtual coils are chosen by region: enough for a full set of interleaves, whatever
#: their order.
ROVIR_BLOCK = 128
#: Density weights that differ by less, relative to the largest one, are one.
_SAME_WEIGHT = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """How one set of interleaves was encoded.

    Parameters
    ----------
    shape
        (Y, X) of the images.
    dcf
        `(I, S)`: area of k-space for each sample, (cycles per pixel)².
    central
        `(I, S)` boolean: samples in the middle tenth of k-space.
    points
        `(I·S, 2)` trajectory in cycles per pixel.
    nufft
        Transform for these samples.
    phase
        `(I, S)` radians by which the data are to be turned; ``None``: not at all.
    note
        What could not be made as the readouts say; empty if all could.
    """

    shape: tuple[int, int]
    dcf: Tensor
    central: Tensor
    points: Tensor
    nufft: Nufft
    phase: Tensor | None = None
    note: str = ""


def encode(
    trajectory: NDArray[np.float32],
    head: np.void,
    header: Header,
    settings: Settings,
    girf: Girf | None,
    device: torch.device,
    log: Callable[[str, str], None],
    *,
    units: str = "auto",
) -> Encoding:
    """Density compensation and transform for a set of interleaves.

    Parameters
    ----------
    trajectory
        `(I, S, D)` as it came: two columns kx, ky, and perhaps a third with density weights.
    head
        Acquisition header of the slice's first readout: dwell time, position and directions.
    girf
        Impulse response of the gradients, by which the trajectory is corrected.
    units
        Of the trajectory, if its source says it; property ``trajectory_units`` counts more.

    Raises
    ------
    ScanError
        If it has other columns, or its unit is not clear.
    """
    columns = trajectory.shape[-1]
    if columns not in (2, 3):
        raise ScanError(f"the trajectory has {columns} columns: expected kx, ky and perhaps a density weight")
    told = units if settings.trajectory_units == "auto" else settings.trajectory_units
    units = resolve_units(trajectory[..., :2], header.encoded, told)
    nominal = to_recon_pixels(trajectory[..., :2], units, header.encoded, header.recon)
    played, phase = _played(nominal, head, header, settings, girf, log)
    points = torch.from_numpy(played).to(device)
    shape = (header.recon.matrix[1], header.recon.matrix[0])
    dcf, note = None, ""
    if columns == 3 and settings.density == "attached" and not _is_constant(trajectory[..., 2]):
        try:
            dcf = attached_density(torch.from_numpy(trajectory[..., 2].copy()).to(device), points)
        except ValueError as error:
            note = f"{error}. Computed weights were used"
    attached = dcf is not None
    if dcf is None:
        dcf = density_compensation(points, shape)
    # What the reconstructed matrix cannot resolve would fold back.
    dcf = dcf * (points.abs() <= 0.5).all(-1)
    radius = torch.linalg.vector_norm(points, dim=-1)
    log("DBG", f"{len(trajectory)} interleaves of {trajectory.shape[1]} samples, trajectory in {units}, "
        f"density {'attached' if attached else 'computed'}")  # fmt: skip
    points = points.clamp(-0.5, 0.5).reshape(-1, 2)
    nufft = make_nufft(points, shape, backend=settings.nufft)
    turn = None if phase is None else torch.from_numpy(phase.astype(np.float32)).to(device)
    return Encoding(shape, dcf, radius <= 0.1 * radius.max(), points, nufft, turn, note)


def _is_constant(column: NDArray[np.float32]) -> bool:
    """Whether a column weighs nothing: it is a kz, but for rounding."""
    low, high = float(column.min()), float(column.max())
    return math.isfinite(low + high) and high - low <= _SAME_WEIGHT * max(abs(low), abs(high))


class Encoder:
    """Encodings of a scan's slices, which mostly share one.

    Parameters
    ----------
    header, settings, device, log
        See `encode`.

    Raises
    ------
    ScanError
        If the gradients' impulse response cannot be read.
    """

    def __init__(
        self, header: Header, settings: Settings, device: torch.device, log: Callable[[str, str], None]
    ) -> None:
        self._header, self._settings, self._device, self._log = header, settings, device, log
        self._girf = read_girf(settings.girf, settings.girf_raster_us) if settings.girf else None
        self._latest: tuple[bytes, Encoding] | None = None

    def __call__(self, trajectory: NDArray[np.float32], head: np.void, units: str) -> Encoding:
        """Parameters: see `encode`."""
        place = ("read_dir", "phase_dir", "slice_dir", "position")
        moves = self._girf is not None or self._settings.fov_shift == "nominal"
        key = b"".join([trajectory.tobytes(), *(head[name].tobytes() for name in place if moves)])
        if self._latest is None or self._latest[0] != key:
            encoding = encode(
                trajectory,
                head,
                self._header,
                self._settings,
                self._girf,
                self._device,
                self._log,
                units=units,
            )
            self._latest = key, encoding
        return self._latest[1]


def _played(
    nominal: NDArray[np.float32],
    head: np.void,
    header: Header,
    settings: Settings,
    girf: Girf | None,
    log: Callable[[str, str], None],
) -> tuple[NDArray[np.float32], NDArray[np.float64] | None]:
    """Trajectory `(I, S, 2)` that was played, cycles per pixel, and phase `(I, S)` to be added to the data.

    The phase takes back what the gradients' response adds to the field, and with fov_shift=nominal moves the
    centre of the image from the isocentre to the position of the slice: with ``y(k) = Σ ρ(r) exp(-i 2π k·r)``
    and ``r = r' + c``, the data about c are ``y(k) exp(+i 2π k·c)``.
    """
    played, phase = nominal, None
    directions = np.stack([head["read_dir"], head["phase_dir"], head["slice_dir"]]).astype(np.float64)
    delay_us = (settings.gradient_delay_x_us, settings.gradient_delay_y_us)
    pixel_m = np.array(header.recon.pixel_mm) * 1e-3
    if girf is not None or any(delay_us):
        dwell_us = float(head["sample_time_us"])
        if not dwell_us > 0:
            raise ScanError(
                f"sample_time_us of the readouts is {dwell_us:g}: expected the time between two samples, "
                f"without which girf and gradient_delay cannot be used"
            )
        moved, turned = corrected(nominal / pixel_m, dwell_us, girf, delay_us, directions)
        played = (moved * pixel_m).astype(np.float32)
        phase = turned  # which the data lack: the field adds to that of the gradients, exp(-i 2π k·r)
        shift = np.abs(played - nominal).max() * max(header.recon.matrix[:2])
        log("DBG", f"trajectory corrected by up to {shift:.2g} cycles per field of view")
    if settings.fov_shift == "nominal":
        centre = directions[:2] @ head["position"] / (pixel_m * 1e3)  # pixels along x and y
        ramp = 2 * np.pi * (nominal.astype(np.float64) @ centre)
        phase = ramp if phase is None else phase + ramp
        log("DBG", f"data shifted by {centre[0]:.2f} and {centre[1]:.2f} pixels to the slice's position")
    return played, phase


def make_compression(sources: Sources, settings: Settings) -> Compress:
    """What chooses the virtual coils of a slice, whitened.

    It raises a `ScanError` if the readouts are beyond what can be computed with.
    """
    header, table = sources.header, sources.trajectories
    V, energy = settings.virtual_coils, settings.coil_energy
    shape = (header.recon.matrix[1], header.recon.matrix[0])
    region = settings.region_of_interest()

    def svd(block: Tensor, _: object) -> tuple[Tensor, str]:
        return compression_matrix(block, V, energy=energy), ""

    def nothing(block: Tensor, _: object) -> tuple[Tensor, str]:
        return torch.eye(block.shape[1], dtype=block.dtype, device=block.device), ""

    def rovir(block: Tensor, places: Callable[[], NDArray[np.float32]]) -> tuple[Tensor, str]:
        trajectory = places()
        if trajectory.shape[-1] not in (2, 3):
            return (
                compression_matrix(block, V, energy=energy),
                "where the first readouts lie is known too late to choose virtual coils by region: "
                "the strongest ones instead of rovir",
            )
        trajectory = trajectory[..., :2]
        told: str = settings.trajectory_units
        if told == "auto" and table is not None:
            told = table.units
        units = resolve_units(trajectory, header.encoded, told)
        points = torch.from_numpy(to_recon_pixels(trajectory, units, header.encoded, header.recon))
        low = low_resolution_images(block, points.to(block.device), shape)
        if low is None and region != (0, 1, 0, 1):  # what is around the region may be seen all the same
            low = low_resolution_images(block, points.to(block.device), shape, zoom=1)
        if low is None:
            return (
                compression_matrix(block, V, energy=energy),
                f"the centre of k-space of the first {len(block)} readouts is not sampled densely enough to "
                f"tell what lies around the region: the strongest virtual coils instead of rovir",
            )
        return rovir_matrix(*region_energies(low, region), V, energy=energy), ""

    choose: Compress = {"svd": svd, "rovir": rovir, "off": nothing}[settings.compression]

    def checked(block: Tensor, places: Callable[[], NDArray[np.float32]]) -> tuple[Tensor, str]:
        largest = float(block.abs().max())
        if not largest < LARGEST:
            times = f"{largest:.1e}" if math.isfinite(largest) else "more than 1e38"
            raise ScanError(
                f"the data are {times} times as large as the noise of the noise readouts: expected less than "
                f"{LARGEST:g} times. Scale both alike where they are written, or set property whiten to off"
            )
        return choose(block, places)

    return checked
