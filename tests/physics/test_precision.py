"""How errors of coefficients move T1 and T2: as the match itself moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from whorl.physics.dictionary import Dictionary, DictionaryParameters, build_dictionary
from whorl.physics.matching import match
from whorl.physics.precision import sensitivity
from whorl.physics.real import as_real
from whorl.scan.train import Train
from whorl.simulation.signals import jiang_train

TISSUES = ((832.0, 60.0), (1350.0, 85.0), (400.0, 30.0), (2200.0, 300.0))


@pytest.fixture(scope="module", params=["T1 and T2", "B1 too"])
def dictionary(request: pytest.FixtureRequest) -> Dictionary:
    played = jiang_train(300)
    train = Train(played.flip_deg, played.tr_ms, played.te_ms, played.phase_deg, played.ti_ms, source="test")
    b1_range = (1.0, 1.0) if request.param == "T1 and T2" else (0.9, 1.1)
    return build_dictionary(DictionaryParameters(train, b1_range=b1_range))


def voxels(dictionary: Dictionary, *, real: bool) -> Tensor:
    """Coefficients `(V, K)` that lie on the surface, of M0 with another size, sign and phase each."""
    found = []
    for (t1_ms, t2_ms), m0 in zip(TISSUES, (1.0, -0.3, 2.0, 5.0), strict=True):
        grid = dictionary.grid
        atoms = [values.numpy() for values in grid.atoms()]
        distance = np.abs(np.log(atoms[0] / t1_ms)) + np.abs(np.log(atoms[1] / t2_ms)) + np.abs(atoms[2] - 1)
        atom = dictionary.coefficients[int(distance.argmin())]
        found.append(atom * m0 * (1 if real else np.exp(1j * m0)))
    return torch.stack(found)


@pytest.mark.parametrize("real", [True, False], ids=["real", "complex"])
def test_it_is_the_derivative_of_the_match(dictionary: Dictionary, real: bool) -> None:
    x = voxels(dictionary, real=real)
    joint = len(dictionary.grid.b1_axis) > 1
    at = match(x, dictionary)
    moved = sensitivity(
        x, at.t1_ms, at.t2_ms, dictionary, b1=at.b1 if joint else None, joint=joint
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        direction = torch.randn(x.shape, dtype=x.dtype, generator=generator)
        step = 2e-3 * torch.linalg.vector_norm(x, dim=1, keepdim=True) * direction / direction.abs().norm()
        plus, minus = match(x + step, dictionary), match(x - step, dictionary)
        predicted = (moved @ as_real(step, 1)[:, :, None])[:, :, 0]
        for n, name in enumerate(("t1_ms", "t2_ms")):
            true = (getattr(plus, name) / getattr(minus, name)).log() / 2
            # The surface is made of parabolas, whose slopes jump by some per cent from one to the next.
            scale = float(predicted[:, n].abs().max())
            torch.testing.assert_close(predicted[:, n], true, rtol=0.15, atol=0.05 * scale)
