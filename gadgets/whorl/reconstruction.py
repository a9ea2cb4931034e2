"""From a slice's subspace k-space to its maps: the method's figure, step by step.

Letters: K coefficients, C coils, I interleaves, S samples, D trajectory columns, Y X pixels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.config import Settings
from whorl.kspace.coils import coil_maps, combine
from whorl.kspace.density import attached_density, density_compensation
from whorl.kspace.nufft import Nufft, make_nufft
from whorl.kspace.slicebuffer import SubspaceKspace
from whorl.maps.images import SliceMaps
from whorl.physics.dictionary import Dictionary
from whorl.physics.matching import match
from whorl.recon.corrected import corrected_start, imaginary_share
from whorl.recon.inr import DeadlinePassed, fit_inr
from whorl.recon.lowrank import adjoint_coil_images
from whorl.recon.mask import object_mask, widen
from whorl.recon.normal import make_normal
from whorl.scan.failure import ScanError
from whorl.scan.header import Header
from whorl.scan.trajectory import resolve_units, to_recon_pixels

_logger = logging.getLogger("whorl")

#: Share of the object in which B1 may be taken from the nearest place where it was measured.
_GUESSED_B1 = 0.05
#: Energy that a joint phase may leave in the imaginary part before its model is not trusted.
_IMAGINARY = 0.15


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
    nufft
        Transform for the I·S samples.
    """

    shape: tuple[int, int]
    dcf: Tensor
    central: Tensor
    nufft: Nufft


@dataclass(slots=True)
class SliceResult:
    """Maps of a slice with what there is to say about them."""

    maps: SliceMaps
    method: str
    status: str = "complete"
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def remark(self, status: str, note: str) -> None:
        """Lower the status and say why."""
        order = ("complete", "degraded", "fallback")
        self.status = max(self.status, status, key=order.index)
        self.notes.append(note)


def encode(
    trajectory: NDArray[np.float32],
    header: Header,
    settings: Settings,
    device: torch.device,
    log: Callable[[str, str], None],
) -> Encoding:
    """Density compensation and transform for a set of interleaves.

    Parameters
    ----------
    trajectory
        `(I, S, D)` as it came: two columns kx, ky, and perhaps a third with density weights.

    Raises
    ------
    ScanError
        If its unit is not clear or its weights cannot be used.
    """
    columns = trajectory.shape[-1]
    if columns not in (2, 3):
        raise ScanError(f"the trajectory has {columns} columns: expected kx, ky and perhaps a density weight")
    units = resolve_units(trajectory[..., :2], header.encoded, settings.trajectory_units)
    points = torch.from_numpy(to_recon_pixels(trajectory[..., :2], units, header.encoded, header.recon)).to(
        device
    )
    shape = (header.recon.matrix[1], header.recon.matrix[0])
    # A column that is constant weighs nothing (it may be a kz).
    attached = columns == 3 and settings.density == "attached" and float(np.ptp(trajectory[..., 2])) > 0
    try:
        if attached:
            dcf = attached_density(torch.from_numpy(trajectory[..., 2].copy()).to(device), points)
        else:
            dcf = density_compensation(points, shape)
    except ValueError as error:
        raise ScanError(str(error)) from error
    # What the reconstructed matrix cannot resolve would fold back.
    dcf = dcf * (points.abs() <= 0.5).all(-1)
    radius = torch.linalg.vector_norm(points, dim=-1)
    log("DBG", f"{len(trajectory)} interleaves of {trajectory.shape[1]} samples, trajectory in {units}, "
        f"density {'attached' if attached else 'computed'}")  # fmt: skip
    nufft = make_nufft(points.clamp(-0.5, 0.5).reshape(-1, 2), shape, backend=settings.nufft)
    return Encoding(shape, dcf, radius <= 0.1 * radius.max(), nufft)


def has_signal(kspace: SubspaceKspace, encoding: Encoding) -> bool:
    """Whether a slice holds an object: its k-space is denser in the middle than outside, noise is not."""
    power = kspace.bins[:, 0].abs().square().sum(1)  # (I, S), first coefficient
    inner, outer = power[encoding.central], power[~encoding.central]
    if not len(inner) or not len(outer):
        return bool(power.any())
    return float(inner.mean()) > 3 * float(outer.mean())


def reconstruct_slice(
    kspace: SubspaceKspace,
    encoding: Encoding,
    dictionary: Dictionary,
    settings: Settings,
    deadline: float | None,
    b1: tuple[NDArray[np.float32], NDArray[np.bool_]] | None = None,
) -> SliceResult:
    """From subspace k-space to maps.

    Parameters
    ----------
    kspace
        The slice's readouts, folded: ``Uᴴy``.
    encoding, dictionary
        Of the scan, on the same device.
    deadline
        Time (`time.monotonic`) after which the low-rank maps are taken.
    b1
        Known transmit field and where it was measured, both `(Y, X)`; see `whorl.scan.transmit`.
    """
    seconds: dict[str, float] = {}
    started = time.monotonic()

    def lap(name: str) -> None:
        nonlocal started
        now = time.monotonic()
        seconds[name] = now - started
        started = now

    # Data in units of 1e-10 or 1e10 shall not leave the range of float32 where they are squared.
    scale = float(kspace.bins.abs().max()) or 1.0
    kspace = replace(kspace, bins=kspace.bins / scale)
    if not has_signal(kspace, encoding):
        empty = np.zeros(encoding.shape, dtype=np.float32)
        result = SliceResult(
            SliceMaps(empty, empty, empty, empty, empty if settings.b1 == "match" else None), settings.method
        )
        result.remark("degraded", "the slice has no signal, its maps are zero")
        return result

    coil_images = adjoint_coil_images(kspace.bins, encoding.dcf, encoding.nufft)  # (K, C, Y, X)
    lap("adjoint")
    csm = coil_maps(coil_images)
    x0 = combine(coil_images, csm)  # x0 = A'W(U'y), (K, Y, X)
    del coil_images
    lap("coils")
    mask = object_mask(x0)
    result = SliceResult(SliceMaps(*[np.empty(0, np.float32)] * 4), settings.method)
    images = x0
    if settings.method == "inr":
        around = widen(mask, 2)
        start = x0
        try:
            if settings.start == "corrected":
                normal = NormalOperator(kspace.gram, encoding.dcf, csm, encoding.nufft)
                energies = dictionary.coefficients.abs().square().sum(0)
                z, phase = corrected_start(
                    x0, around, normal, energies / energies[0], steps=settings.correction_steps
                )
                unexplained = imaginary_share(x0[:1], phase, mask)
                lap("start")
                if unexplained < _IMAGINARY and bool(torch.isfinite(z).all()):
                    start = z  # a common phase changes no map
                else:
                    result.remark(
                        "fallback",
                        f"no common phase ({unexplained:.0%} of the energy is left over): "
                        f"the INR was fitted to x0",
                    )
            images = fit_inr(
                start,
                around,
                fit=settings.fit,
                iterations=settings.iterations,
                levels=settings.levels,
                features=settings.features,
                base_resolution=settings.base_resolution,
                finest_resolution=settings.finest_resolution,
                hidden=settings.hidden,
                learning_rate=settings.learning_rate,
                lambda_enc=settings.lambda_enc,
                lambda_mlp=settings.lambda_mlp,
                ridge=settings.ridge,
                seed=settings.seed,
                deadline=deadline,
            ).coefficients
        except Exception as error:
            # Whatever it was: maps that are late or wrong help nobody at the console; these are ready.
            late = isinstance(error, DeadlinePassed)
            _logger.warning("the INR was given up: %s", error, exc_info=None if late else error)
            result.method = "lowrank"
            why = str(error) or type(error).__name__
            result.remark("fallback", f"low-rank maps instead of the INR: {why}")
            images = x0
        lap("fit")
    joint = settings.b1 == "match"
    field = None
    if len(dictionary.grid.b1_axis) > 1 and not joint:
        field = _known_b1(b1, mask, dictionary, result)
    found = match(images[:, mask].T.contiguous(), dictionary, b1=field, refine=settings.refine == "on")
    result.maps = SliceMaps(
        t1_ms=_on_raster(found.t1_ms, mask),
        t2_ms=_on_raster(found.t2_ms, mask),
        m0=_on_raster(found.m0.abs() * scale, mask),
        quality=_on_raster(found.quality, mask),
        b1=_on_raster(found.b1, mask) if joint else None,
    )
    lap("match")
    result.seconds = seconds
    return result


def _known_b1(
    b1: tuple[NDArray[np.float32], NDArray[np.bool_]] | None,
    mask: Tensor,
    dictionary: Dictionary,
    result: SliceResult,
) -> Tensor:
    """Transmit field `(V,)` in the mask: as measured, or 1. What had to be assumed is remarked."""
    inside = mask.cpu().numpy()
    if b1 is None:
        return torch.ones(int(inside.sum()), device=mask.device)
    values, measured = b1[0][inside], b1[1][inside]
    axis = dictionary.grid.b1_axis
    guessed = float(np.mean(~measured))
    beyond = float(np.mean((values < axis[0] - 1e-3) | (values > axis[-1] + 1e-3)))
    if guessed > _GUESSED_B1:
        result.remark(
            "degraded", f"B1 was not measured in {guessed:.0%} of the object: the nearest value counts"
        )
    if beyond > 0:
        result.remark(
            "degraded",
            f"B1 is beyond {axis[0]:g} to {axis[-1]:g} in {beyond:.1%} of the object: "
            f"the nearest end counts. Set properties b1_min and b1_max",
        )
    return torch.from_numpy(values).to(mask.device)


def _on_raster(values: Tensor, mask: Tensor) -> NDArray[np.float32]:
    image = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    image[mask] = values.float()
    return image.cpu().numpy()
