"""Low-rank adjoint: unit gain, and plain SENSE where there is nothing low-rank about it."""

from __future__ import annotations

import pytest
import torch

from kspace.spirals import complex_normal, orthonormal_basis, rotated_spiral
from whorl.kspace.accumulate import fold
from whorl.kspace.coils import combine
from whorl.kspace.density import density_compensation
from whorl.kspace.nufft import make_nufft
from whorl.recon.lowrank import adjoint_coil_images

SHAPE = (26, 21)


def test_one_timepoint_is_the_plain_adjoint_of_each_coil() -> None:
    trajectory = rotated_spiral(1, 90, 4)
    nufft = make_nufft(trajectory.reshape(-1, 2), SHAPE)
    dcf = torch.rand((1, 90), generator=torch.Generator().manual_seed(1))
    kspace, csm = complex_normal(1, 1, 3, 90), complex_normal(3, *SHAPE, seed=1)
    images = adjoint_coil_images(kspace, dcf, nufft)
    assert images.shape == (1, 3, *SHAPE)
    sense = sum(csm[c].conj() * nufft.adjoint((kspace[0, 0, c] * dcf[0])[None])[0] for c in range(3))
    assert isinstance(sense, torch.Tensor)
    # The same sums in batches of another size: rounding.
    torch.testing.assert_close(combine(images, csm)[0], sense, rtol=0, atol=1e-5 * float(sense.abs().max()))


def test_every_sample_keeps_its_interleaf_coil_and_coefficient() -> None:
    I, K, C, S = 4, 2, 3, 50  # noqa: E741 - the field's letter
    trajectory = rotated_spiral(I, S, 2)
    nufft = make_nufft(trajectory.reshape(-1, 2), SHAPE)
    dcf = torch.rand((I, S), generator=torch.Generator().manual_seed(2))
    kspace = complex_normal(I, K, C, S)
    images = adjoint_coil_images(kspace, dcf, nufft)
    assert images.shape == (K, C, *SHAPE)
    for k in range(K):
        for c in range(C):
            expected = torch.zeros(SHAPE, dtype=torch.complex64)
            for i in range(I):
                arm = make_nufft(trajectory[i], SHAPE)
                expected += arm.adjoint((kspace[i, k, c] * I * dcf[i])[None])[0]
            # Two NUFFTs of relative error 1e-4.
            torch.testing.assert_close(
                images[k, c], expected, rtol=0, atol=5e-4 * float(expected.abs().max())
            )


@pytest.mark.parametrize(("T", "K"), [(9, 1), (90, 1), (900, 3)])
def test_a_train_that_visits_each_interleaf_equally_has_unit_gain(T: int, K: int) -> None:
    I = 9  # noqa: E741 - the field's letter
    trajectory = rotated_spiral(I, 200, 3)
    nufft = make_nufft(trajectory.reshape(-1, 2), SHAPE)
    dcf = density_compensation(trajectory, SHAPE)
    # A column that is constant for K = 1: then each interleaf gets exactly its share of the energy.
    basis = torch.full((T, 1), T**-0.5 * 1j, dtype=torch.complex64) if K == 1 else orthonormal_basis(T, K)
    y, x = (torch.arange(n) - n // 2 for n in SHAPE)
    blob = torch.exp(-((y[:, None] - 3) ** 2 + (x + 2) ** 2) / (2 * 2.5**2))
    coefficients = torch.tensor([2.0 - 1j, -0.5j, 0.3])[:K]
    arms = nufft.forward(blob[None].to(torch.complex64)).reshape(I, 1, 200)
    signal = basis @ coefficients
    # 19 is prime to 9 and neither small nor periodic in the basis.
    t = torch.arange(T)
    bins = torch.zeros((I, K, 1, 200), dtype=torch.complex64)
    fold(bins, signal[:, None, None] * arms[(19 * t) % I], t, (19 * t) % I, basis)
    images = adjoint_coil_images(bins, dcf, nufft)[:, 0]
    expected = coefficients[:, None, None] * blob
    # Sum over 200 rings instead of an integral; a random basis shares its energy between the
    # interleaves evenly to 1/√(T/I) = 10 %, which goes into side lobes more than into the gain.
    tolerance = 5e-3 if K == 1 else 0.1
    assert float((images - expected).abs().max()) < tolerance * 2.3
