"""Held-out readouts: taken out exactly, and predicted by the true images up to their noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kspace.spirals import complex_normal
from recon.spiral_slice import Measured, measure
from whorl.kspace.nufft import make_nufft
from whorl.kspace.slicebuffer import HeldOut
from whorl.recon.heldout import held_out_error, without


@pytest.fixture(scope="module")
def clean() -> Measured:
    return measure(order="mixed")


@pytest.fixture(scope="module")
def noisy() -> Measured:
    return measure(order="mixed", noise=0.3)


def error(images: Tensor, held: HeldOut, measured: Measured, *, scaled: bool = False) -> float:
    points = measured.trajectory[held.interleaf].reshape(-1, 2)
    nufft = make_nufft(points, (images.shape[1], images.shape[2]))
    dcf = measured.dcf[held.interleaf]
    return held_out_error(images, held, measured.basis, measured.csm, dcf, nufft, scaled=scaled)


def test_without_them_is_as_if_they_had_not_been_measured(noisy: Measured) -> None:
    rest, held = noisy.split()
    bins, gram = noisy.folded()
    before = bins.clone(), gram.clone()
    found, found_gram = without(bins, gram, held, noisy.basis)
    expected, expected_gram = rest.folded()
    # Differences of float32 sums.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(bins.abs().max()))
    torch.testing.assert_close(found_gram, expected_gram, rtol=0, atol=1e-6)
    assert float((found - bins).norm() / bins.norm()) > 0.05
    assert torch.equal(bins, before[0])  # not changed in place
    assert torch.equal(gram, before[1])


def test_the_true_images_predict_data_without_noise(clean: Measured) -> None:
    held = clean.split()[1]
    # The square of what two NUFFTs miss.
    assert error(clean.truth, held, clean) < 1e-6
    assert error(clean.truth, held, clean, scaled=True) < 1e-6


def test_of_the_true_images_the_noise_is_left(clean: Measured, noisy: Measured) -> None:
    held = noisy.split()[1]
    noise = (held.readouts - clean.split()[1].readouts).abs().square()
    area = noisy.dcf[held.interleaf][:, None]
    share = float((area * noise).sum() / (area * held.readouts.abs().square()).sum())
    assert 0.3 < share < 0.9  # high frequencies weigh more
    assert error(noisy.truth, held, noisy) == pytest.approx(share, rel=1e-3)


def test_other_images_predict_less(clean: Measured) -> None:
    held = clean.split()[1]
    shifted = clean.truth.roll(1, 2)
    weak = clean.truth * torch.tensor([1.0, 1.0, 0.0]).reshape(3, 1, 1)
    assert error(shifted, held, clean) > 0.01
    assert error(weak, held, clean) > 1e-4
    assert error(-clean.truth, held, clean) == pytest.approx(4, rel=1e-3)
    for scaled in (False, True):
        assert error(0 * clean.truth, held, clean, scaled=scaled) == 1
    assert error(clean.truth.conj(), held, clean, scaled=True) > 0.01


@pytest.mark.parametrize("factor", [3.0, 1e-4, -0.5 + 2j], ids=str)
def test_a_common_factor_is_forgiven_if_asked(noisy: Measured, factor: complex) -> None:
    held = noisy.split()[1]
    images = noisy.truth + 0.2 * complex_normal(*noisy.truth.shape)
    best = error(images, held, noisy, scaled=True)
    assert error(images * factor, held, noisy, scaled=True) == pytest.approx(best, rel=1e-4)
    assert error(images * factor, held, noisy) > best
    # No other factor is better.
    assert all(error(images * f, held, noisy) >= best * (1 - 1e-5) for f in (0.8, 0.95, 1.0, 1.1))


def test_the_order_of_the_readouts_does_not_matter_but_belongs_to_them(clean: Measured) -> None:
    held = clean.split()[1]
    images = 0.9 * clean.truth
    order = torch.randperm(len(held.timepoint), generator=torch.Generator().manual_seed(3))
    permuted = HeldOut(held.readouts[order], held.timepoint[order], held.interleaf[order])
    assert error(images, permuted, clean) == pytest.approx(error(images, held, clean), rel=1e-3)
    for wrong in (
        replace(held, readouts=held.readouts[order]),
        replace(held, timepoint=held.timepoint[order]),
        replace(held, interleaf=held.interleaf[order]),
    ):
        assert error(images, wrong, clean) > 5 * error(images, held, clean)


def test_a_complex_basis_predicts(clean: Measured) -> None:
    """A conjugate too many would go unseen with a real one."""
    turn = torch.polar(torch.ones(3), torch.tensor([0.4, -1.0, 2.0]))
    basis = clean.basis * turn
    images = clean.truth * turn.conj().reshape(3, 1, 1)
    held = clean.split()[1]
    assert error(images, held, replace(clean, basis=basis)) < 1e-6
