"""Variable-density spirals from the parameters of Hargreaves' design, computed from its equations.

Letters: I interleaves, S samples.

The path is ``k = r exp(iθ)`` with ``dθ/dr = 2π F(r) / I``: at radius r the I interleaves fill a field of view
of F(r). With ``w(r) = 2π F(r) / I`` its velocity and acceleration are

    |k'|² = r'² (1 + r² w²)
    |k''|² = (r'' - r w² r'²)² + (2 w r'² + r w' r'² + r w r'')²,    w' = dw/dr,

so that the largest r'' at a given slew rate is the root of a quadratic equation, and the largest r' at a
given gradient is known. It is run through with whichever of them limits.

References
----------
Lee, Hargreaves, Hu, Nishimura, Magn Reson Med 50:1276 (2003), doi:10.1002/mrm.10644.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from whorl.scan.failure import ScanError
from whorl.scan.header import header_root
from whorl.scan.trajectories import Trajectories
from whorl.scan.trajectory_file import rotated

_GAMMA_HZ_PER_G = 4257.747892
#: Steps of the integration for each sample.
_FINE = 8
_MOST_SAMPLES = 65536
#: Names in the header, as siemens_to_ismrmrd writes and Gadgetron reads them.
_NEEDED = (
    "interleaves",
    "SamplingTime_ns",
    "MaxGradient_G_per_cm",
    "MaxSlewRate_G_per_cm_per_s",
    "FOVCoeff_1_cm",
    "krmax_per_cm",
)
_IDENTIFIER = "HargreavesVDS2000"


def vds_spiral(
    fov_cm: Sequence[float],
    krmax_per_cm: float,
    n_interleaves: int,
    max_gradient_g_per_cm: float,
    max_slew_g_per_cm_per_s: float,
    sampling_us: float,
) -> NDArray[np.float64]:
    """One interleaf, from the centre of k-space to its edge.

    Parameters
    ----------
    fov_cm
        Coefficients of the field of view, ``F(r) = fov_cm[0] + fov_cm[1] r + ...`` with r in 1/cm.
    krmax_per_cm
        Radius at which it ends.
    n_interleaves
        Number I of rotations that fill k-space.
    max_gradient_g_per_cm, max_slew_g_per_cm_per_s
        Limits for the length of the vectors.
    sampling_us
        Time between two samples; between them k moves by at most 1/F(r).

    Returns
    -------
    ndarray
        `(S, 2)` kx, ky in 1/cm at the times s · sampling, s = 0, 1, ...; the last lies within krmax.

    Raises
    ------
    ValueError
        If a value is not positive, or the edge is not reached in 65536 samples.
    """
    values = {
        "krmax_per_cm": krmax_per_cm,
        "interleaves": n_interleaves,
        "MaxGradient_G_per_cm": max_gradient_g_per_cm,
        "MaxSlewRate_G_per_cm_per_s": max_slew_g_per_cm_per_s,
        "SamplingTime": sampling_us,
        "FOVCoeff_1_cm": fov_cm[0],
    }
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value:g}: expected more than 0")
    field = np.polynomial.Polynomial(np.asarray(fov_cm, dtype=np.float64))
    if not (field(np.linspace(0, krmax_per_cm, 257)) > 0).all():
        raise ValueError(
            "the field of view becomes 0 or less on the way to krmax_per_cm: expected more than 0"
        )
    w = 2 * np.pi / n_interleaves * field
    slope, angle = w.deriv(), w.integ()
    slew = _GAMMA_HZ_PER_G * max_slew_g_per_cm_per_s
    sampling_s = sampling_us * 1e-6

    # Polynomials by plain arithmetic: thousands of steps, one after the other.
    f, u, du = (p.coef.tolist() for p in (field, w, slope))

    def at(coefficients: list[float], r: float) -> float:
        value = 0.0
        for c in reversed(coefficients):
            value = value * r + c
        return value

    def fastest(r: float) -> float:
        speed = min(_GAMMA_HZ_PER_G * max_gradient_g_per_cm, 1 / (at(f, r) * sampling_s))
        return speed / math.hypot(1, r * at(u, r))

    def acceleration(r: float, v: float) -> float:
        w_, dw = at(u, r), at(du, r)
        across = 2 * w_ * v * v + r * dw * v * v  # of the second term, without r''
        along = r * w_ * w_ * v * v
        a = 1 + (r * w_) ** 2
        b = r * w_ * across - along
        c = along**2 + across**2 - slew**2
        return (-b + math.sqrt(max(b * b - a * c, 0.0))) / a

    step = sampling_s / _FINE
    r = v = 0.0
    radii = [0.0]
    while True:
        for _ in range(_FINE):  # midpoint rule
            half = min(v + acceleration(r, v) * step / 2, fastest(r))
            middle = r + v * step / 2
            v = min(v + acceleration(middle, half) * step, fastest(r + half * step))
            r += half * step
        if r > krmax_per_cm:
            break
        radii.append(r)
        if len(radii) > _MOST_SAMPLES:
            raise ValueError(f"krmax_per_cm {krmax_per_cm:g} is not reached in {_MOST_SAMPLES} samples")
    radius = np.array(radii)
    theta = angle(radius)
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=-1)


def trajectories_from_header(xml: bytes, rotation_deg: float = 0.0) -> Trajectories | None:
    """The spiral that the header's parameters describe, by arm; ``None`` if it has none.

    They stand in `encoding/trajectoryDescription` or in `userParameters`. As in Gadgetron
    (toolboxes/mri/spiral/vds.cpp) k has the opposite sign of the design, and arm n is interleaf 0 turned
    clockwise by 360° n / I (or by `rotation_deg` n): a scan with that trajectory attached lies the same.

    Raises
    ------
    ScanError
        If some of the parameters are missing, or make no spiral.
    """
    root = header_root(xml)
    found: dict[str, float] = {}
    places = [*root.findall(".//{*}trajectoryDescription"), *root.findall("{*}userParameters")]
    identified = False
    for place in places:
        identified |= place.findtext("{*}identifier", "").strip() == _IDENTIFIER
        for parameter in (*place.findall("{*}userParameterLong"), *place.findall("{*}userParameterDouble")):
            name, text = parameter.findtext("{*}name", "").strip(), parameter.findtext("{*}value", "")
            if name in _NEEDED or name.startswith("FOVCoeff_"):
                try:
                    found[name] = float(text)
                except ValueError as error:
                    raise ScanError(
                        f"{name} of the spiral in the MRD header is {text!r}: expected a number"
                    ) from error
    missing = [name for name in _NEEDED if name not in found]
    # Names that many spirals have in common do not make it one of this kind.
    if not identified and ("krmax_per_cm" not in found or "FOVCoeff_1_cm" not in found):
        return None
    if missing:
        raise ScanError(
            f"the MRD header describes a spiral ({_IDENTIFIER}) without {', '.join(missing)}: expected "
            f"{', '.join(_NEEDED)}"
        )
    coefficients: list[float] = []
    while (name := f"FOVCoeff_{len(coefficients) + 1}_cm") in found:
        coefficients.append(found[name])
    I, sampling_us = int(found["interleaves"]), found["SamplingTime_ns"] * 1e-3  # noqa: E741 - the field's letter
    try:
        if not 1 <= I <= 65536:
            raise ValueError(f"interleaves is {I}: expected 1 to 65536")
        one = vds_spiral(
            coefficients,
            found["krmax_per_cm"],
            I,
            found["MaxGradient_G_per_cm"],
            found["MaxSlewRate_G_per_cm_per_s"],
            sampling_us,
        )
    except ValueError as error:
        raise ScanError(f"the spiral in the MRD header cannot be computed: {error}") from error
    return Trajectories(
        points=rotated(-one, I, rotation_deg or -360.0 / I),
        units="1/cm",
        source=f"{_IDENTIFIER} parameters of the header",
        by="arm",
        dwell_us=sampling_us,
    )
