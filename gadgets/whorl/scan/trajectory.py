"""The unit of a trajectory that came with the data.

Letters: I interleaves, S samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from whorl.scan.failure import ScanError
from whorl.scan.header import Space

#: Units in use.
UNITS = ("cycles/pixel", "±1", "rad/pixel", "cycles/FOV", "1/m", "1/cm")


def unit_scales(encoded: Space) -> dict[str, tuple[float, float]]:
    """For each unit in use, the factors (x, y) that turn it into cycles per encoded pixel."""
    (n_x, n_y, _), (p_x, p_y) = encoded.matrix, encoded.pixel_mm
    return {
        "cycles/pixel": (1.0, 1.0),
        "±1": (0.5, 0.5),
        "rad/pixel": (0.5 / np.pi, 0.5 / np.pi),
        "cycles/FOV": (1 / n_x, 1 / n_y),
        "1/m": (p_x * 1e-3, p_y * 1e-3),
        "1/cm": (p_x * 1e-1, p_y * 1e-1),
    }


def resolve_units(trajectory: NDArray[np.float32], encoded: Space, choice: str = "auto") -> str:
    """Find the unit of a trajectory: the one in which its largest radius is 0.8 to 1.05 of the edge.

    Parameters
    ----------
    trajectory
        `(I, S, 2)` as it came.
    encoded
        Encoded space, whose edge of k-space is 0.5 cycles per pixel.
    choice
        Property ``trajectory_units``; anything but ``auto`` is believed.

    Raises
    ------
    ScanError
        If no unit fits, or several do.
    """
    if choice != "auto":
        return choice
    reach = {
        name: float(np.max(np.hypot(trajectory[..., 0] * scale[0], trajectory[..., 1] * scale[1]))) / 0.5
        for name, scale in unit_scales(encoded).items()
    }
    fitting = [name for name, share in reach.items() if 0.8 <= share <= 1.05]
    if len(fitting) != 1:
        listed = ", ".join(f"{name} {share:.3g}" for name, share in reach.items())
        found = f"several units fit ({', '.join(fitting)})" if fitting else "no unit fits"
        raise ScanError(
            f"the unit of the trajectory is not clear, {found}: its largest radius relative to the edge "
            f"of the encoded matrix would be {listed}; expected 0.8 to 1.05 for one. "
            f"Set property trajectory_units"
        )
    return fitting[0]


def to_recon_pixels(
    trajectory: NDArray[np.float32], units: str, encoded: Space, recon: Space
) -> NDArray[np.float32]:
    """Trajectory in cycles per pixel of the reconstructed image.

    Parameters
    ----------
    trajectory
        `(I, S, 2)` in `units`.

    Returns
    -------
    ndarray
        `(I, S, 2)`; beyond ±0.5 lies what the reconstructed matrix cannot resolve.
    """
    scale = np.array(unit_scales(encoded)[units], dtype=np.float64)
    zoom = np.array(recon.pixel_mm) / np.array(encoded.pixel_mm)
    points: NDArray[np.float32] = (trajectory * (scale * zoom)).astype(np.float32)
    return points
