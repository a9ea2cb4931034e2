"""What is simulated: the parameters of a scan, and what its file says of them.

Letters: Z slices, T timepoints, C coils, I interleaves.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whorl.simulation.signals import Train

# Beyond these there is no head, or no spiral.
_MOST_HZ, _LONGEST_DELAY_US = 2000, 50


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file says about its scan beside the samples.

    Parameters
    ----------
    attached
        Whether the trajectory is attached to each readout.
    told
        Whether the train is told: in lists of the header and in `user_int`. If not, the header has values of
        a protocol, as that of a Pulseq scan.
    noise_flagged
        Whether the noise readouts are flagged. If not, the counters run through them too.
    numbered
        Whether `repetition` (and, with `told`, `user_int`) numbers the timepoints.
    """

    attached: bool = True
    told: bool = True
    noise_flagged: bool = True
    numbered: bool = True


#: How a scan of a Pulseq sequence without labels looks.
PULSEQ = Layout(attached=False, told=False, noise_flagged=False)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Parameters:
    """What is simulated.

    Parameters
    ----------
    phantom
        `nist` (14 spheres in water, see `plate`), `brain` (needs nilearn) or `texture` (a brain whose
        relaxation varies within the tissue, with lesions; see `textured_brain`), `letters` (an object without
        any symmetry).
    timepoints
        Number T of pulses and readouts of the train.
    interleaves
        Number I of rotations of the spiral.
    order
        `golden` or `sequential`, see `interleaf_order`; or `golden-angle`: timepoint t is interleaf 0 turned
        by t · 360° (1 - 1/φ), with φ the golden ratio.
    coils
        Number C of receive coils.
    noise
        Standard deviation of the complex noise, relative to the largest sample of the scan and averaged
        over the coils, which are correlated.
    slices
        Number Z of slices, each with its own inversion and train, 5 mm apart.
    matrix, fov_mm
        Size of the square image.
    seed
        Of the noise and its covariance, and of the texture.
    plate
        Plate of the NIST phantom: `t1` or `t2`.
    readout_ms
        Length of the readout.
    train
        Pulses and times; a train of `jiang_train` if None.
    b1
        Largest deviation of the transmit field from the nominal one: within the object it runs from
        ``1 - b1`` to ``1 + b1``, see `transmit_field`. The header keeps the nominal flip angles.
    inversion_efficiency, slice_profile
        See `fisp_signals`.
    b0_hz
        Largest off-resonance: within the object it runs from -b0_hz to b0_hz, see `off_resonance`.
    gradient_delay_us
        Time by which the gradients lag the samples, -50 to 50 µs: what is played is ``k(t - delay)``. The
        file holds the nominal trajectory.
    phase_jump_rad
        Angle by which the phase of the object jumps at the border of an ellipse, see `phase_jump`.
    motion_pixels
        Way of the object along x, in pixels, between the first and the second half of the train. It takes
        its off-resonance, its phase and the transmit field along; the coils stay. The truth is where it
        was at first.
    fat
        Whether a ring of fat lies around the object, see `with_fat`.
    sequence
        Pulseq file, whose train, trajectory, noise prescans, matrix and field of view take the place of
        `timepoints`, `interleaves`, `order`, `readout_ms`, `train`, `matrix` and `fov_mm`; see `read_played`.
    girf
        File (.npy) with the impulse response of the gradient system, see `whorl.simulation.gradients.play`.
        The scan holds the nominal trajectory.
    noise_covariance
        `(C, C)` of the coils' noise, in any unit; `noise` is the mean over the coils. Random if None.
    noise_dwell_us
        Dwell time of the noise readouts: the variance of a sample goes with the bandwidth. That of the
        others if None.
    layout
        What the file says about the scan.
    turned_deg
        Angles about x, y and z of the patient (LPS), one after the other, by which the stack of slices is
        turned from axial; the object turns with it.
    centre_mm
        Where the middle of the stack lies, LPS. The data are demodulated to each slice's position, as a
        scanner delivers them.

    Raises
    ------
    ValueError
        If one is out of its range.
    """

    phantom: str
    timepoints: int = 500
    interleaves: int = 96
    order: str = "golden"
    coils: int = 8
    noise: float = 1e-3
    slices: int = 1
    matrix: int = 256
    fov_mm: float = 300.0
    seed: int = 0
    plate: str = "t2"
    readout_ms: float = 2.21
    train: Train | None = None
    b1: float = 0.0
    inversion_efficiency: float = 1.0
    slice_profile: Sequence[float] = ()
    b0_hz: float = 0.0
    gradient_delay_us: float = 0.0
    phase_jump_rad: float = 0.0
    motion_pixels: float = 0.0
    fat: bool = False
    sequence: str | os.PathLike[str] | None = None
    girf: str | os.PathLike[str] | None = None
    noise_covariance: NDArray[Any] | None = None
    noise_dwell_us: float | None = None
    layout: Layout = Layout()
    turned_deg: Sequence[float] = (0.0, 0.0, 0.0)
    centre_mm: Sequence[float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        for name, low, high in (
            ("timepoints", 1, 65535),
            ("interleaves", 1, 65535),
            ("matrix", 16, 2048),
            ("slices", 1, 65535),
            ("coils", 1, 128),
            ("seed", 0, 2**63),
            ("b0_hz", 0, _MOST_HZ),
            ("gradient_delay_us", -_LONGEST_DELAY_US, _LONGEST_DELAY_US),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}: expected {low} to {high}")
        if not (self.noise >= 0 and math.isfinite(self.noise)):
            raise ValueError(f"noise is {self.noise}: expected at least 0")
        if not (self.fov_mm > 0 and math.isfinite(self.fov_mm)):
            raise ValueError(f"fov_mm is {self.fov_mm}: expected a positive number")
        if not 0 <= self.b1 < 1:
            raise ValueError(f"b1 is {self.b1}: expected at least 0 and less than 1")
        for name in ("phase_jump_rad", "motion_pixels"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}: expected a finite number")
        if abs(self.motion_pixels) > self.matrix / 4:
            raise ValueError(
                f"motion_pixels is {self.motion_pixels}: expected at most a quarter of the matrix"
            )
        shape = np.shape(self.noise_covariance) if self.noise_covariance is not None else None
        if shape not in (None, (self.coils, self.coils)):
            raise ValueError(f"noise_covariance has shape {shape}: expected {(self.coils, self.coils)}")
        for name in ("turned_deg", "centre_mm"):
            vector = getattr(self, name)
            if len(vector) != 3 or not all(math.isfinite(value) for value in vector):
                raise ValueError(f"{name} is {vector}: expected three numbers")
