"""How errors of the coefficients move T1 and T2.

To first order the match is a least-squares fit of ``m0 d(T1, T2)`` to a voxel's coefficients x, with m0
complex: a small error e of x moves log T1 and log T2 by ``M⁻¹ Re(D⊥ᴴ e / m0)``, where D⊥ holds the
derivatives of the atom without their share along it, and ``M = Re(D⊥ᴴ D⊥)``.

Letters: V voxels, K coefficients, J = K or 2 K real numbers of a voxel's coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whorl.physics.dictionary import Dictionary
from whorl.physics.interpolation import Surface

#: Of the largest curvature: below it a direction is not seen, and its deviation no number.
_BLIND = 1e-9


def sensitivity(
    coefficients: Tensor,
    t1_ms: Tensor,
    t2_ms: Tensor,
    dictionary: Dictionary,
    *,
    b1: Tensor | None = None,
    joint: bool = False,
) -> Tensor:
    """Change of log T1 and log T2 for a small change of the coefficients, `(V, 2, J)`.

    Parameters
    ----------
    coefficients
        `(V, K)`, real or complex; changes are those of `whorl.physics.real.as_real`.
    t1_ms, t2_ms
        `(V,)`: what was matched.
    b1
        `(V,)` relative transmit field; ``None``: as planned.
    joint
        Whether it was matched too.

    References
    ----------
    Derivation in the head of this module (the Jacobian of a separable least-squares fit: Golub & Pereyra,
    SIAM J Numer Anal 10:413 (1973), doi:10.1137/0710036).
    """
    surface = Surface(dictionary)
    points = surface.tangents(surface.place_of(t1_ms, t2_ms, b1), 3 if joint else 2)  # (V, 1+J', K)
    points = points.to(torch.complex128 if points.is_complex() else torch.float64)
    atom, slopes = points[:, :1], points[:, 1:]
    norm = atom.abs().square().sum(2, keepdim=True).clamp_min(1e-30)
    m0 = (atom.conj() * coefficients[:, None]).sum(2, keepdim=True) / norm  # (V, 1, 1)
    across = slopes - (atom.conj() * slopes).sum(2, keepdim=True) / norm * atom
    metric = (across.conj() @ across.mT).real
    size = metric.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-30)
    ridge = torch.eye(metric.shape[1], dtype=metric.dtype, device=metric.device) * _BLIND
    inverse = torch.linalg.inv(metric / size[:, None, None] + ridge) / size[:, None, None]
    row = across.conj() / torch.where(m0.abs() > 0, m0, 1)  # Re(row · e) is what moves
    real = row.real if not coefficients.is_complex() else torch.cat([row.real, -row.imag], 2)
    moved: Tensor = (inverse @ real)[:, :2]
    return moved.float()
