"""What the order of the interleaves does: the spread of a point, and predicted biases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kspace.spirals import complex_normal, orthonormal_basis, rotated_spiral
from whorl.config import Settings
from whorl.kspace.accumulate import fold_gram
from whorl.kspace.density import density_compensation
from whorl.kspace.nufft import make_nufft
from whorl.physics.dictionary import Dictionary, build_dictionary
from whorl.pipeline.dictionaries import dictionary_parameters
from whorl.scan.train import Train
from whorl.simulation.encoding import interleaf_order
from whorl.simulation.signals import jiang_train
from whorl.tools.pointspread import OrderCheck, TissueBias, check_order, disc, spread

I, S, T, SHAPE = 24, 300, 480, (64, 60)  # noqa: E741


def setting(interleaf: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor, object]:
    points = rotated_spiral(I, S, 4)
    gram = torch.zeros((I, basis.shape[1], basis.shape[1]), dtype=torch.complex64)
    fold_gram(gram, torch.arange(len(basis)), interleaf, basis)
    dcf = density_compensation(points, SHAPE)
    return gram, dcf, points, make_nufft(points.reshape(-1, 2), SHAPE)


def test_a_point_is_the_sum_over_readouts() -> None:
    basis = orthonormal_basis(T, 3)
    interleaf = torch.randint(0, I, (T,), generator=torch.Generator().manual_seed(0))
    gram, dcf, points, nufft = setting(interleaf, basis)
    c = complex_normal(3, seed=4)
    found = spread(gram, dcf, nufft, c)  # type: ignore[arg-type]
    assert found.shape == (3, *SHAPE)
    signal = basis.to(torch.complex128) @ c.to(torch.complex128)  # of the point, at each timepoint
    for y, x in ((32, 30), (30, 41), (5, 17)):
        place = torch.tensor([x - 30, y - 32], dtype=torch.float64)
        total = torch.zeros(3, dtype=torch.complex128)
        for t in range(T):
            waves = torch.exp(2j * math.pi * (points[interleaf[t]].double() @ place))
            total += basis[t].conj() * signal[t] * (I * dcf[interleaf[t]] * waves).sum()
        torch.testing.assert_close(found[:, y, x], total.to(torch.complex64), atol=2e-4, rtol=1e-3)


def test_the_transform_of_a_disc() -> None:
    k = torch.tensor([[0.0, 0.0], [0.03, 0.01], [0.1, -0.02]])
    # Against the sum over a fine raster of points within.
    radius, fine = 9.0, torch.arange(-10, 10, 0.05, dtype=torch.float64) + 0.025
    y, x = torch.meshgrid(fine, fine, indexing="ij")
    inside = torch.stack([x, y], -1)[torch.hypot(x, y) < radius]
    total = torch.exp(-2j * math.pi * (inside @ k.double().T)).sum(0).real * 0.05**2
    torch.testing.assert_close(disc(k, radius).double(), total, atol=0.3, rtol=0)  # of an area of 254


@pytest.fixture(scope="module")
def dictionary() -> Dictionary:
    played = jiang_train(T)
    train = Train(played.flip_deg, played.tr_ms, played.te_ms, played.phase_deg, played.ti_ms, "here")
    return build_dictionary(dictionary_parameters(train, Settings(dictionary_step=0.08)), torch.device("cpu"))


def checked(order: str, dictionary: Dictionary) -> OrderCheck:
    interleaf = (
        torch.randint(0, I, (T,), generator=torch.Generator().manual_seed(1))
        if order == "random"
        else torch.from_numpy(interleaf_order(order, T, I))
    )
    gram, dcf, points, nufft = setting(interleaf, dictionary.basis)
    return check_order(gram, dcf, points, nufft, SHAPE, dictionary)  # type: ignore[arg-type]


def test_orders(dictionary: Dictionary) -> None:
    golden, sequential = checked("golden", dictionary), checked("sequential", dictionary)
    assert not golden.biased
    assert sequential.biased
    assert sequential.side_lobe > 2 * golden.side_lobe
    assert {one.tissue for one in golden.bias} == {"white matter", "grey matter", "muscle"}
    white = sequential.bias[0]
    assert abs(white.t2_largest) >= abs(white.t2)
    assert "biases low-rank T2" in sequential.warning()
    assert f"{white.t2:+.1%}" in "\n".join(sequential.lines())


def test_interleaves_that_all_see_the_same_bias_nothing(dictionary: Dictionary) -> None:
    gram, dcf, points, nufft = setting(torch.arange(T) % I, dictionary.basis)
    alike = gram.mean(0, keepdim=True).expand_as(gram)
    found = check_order(alike, dcf, points, nufft, SHAPE, dictionary)  # type: ignore[arg-type]
    assert found.side_lobe < 1e-5  # float32
    for one in found.bias:
        assert max(abs(one.t1), abs(one.t2), abs(one.t2_largest)) < 1e-3


def test_five_per_cent_of_t2_count() -> None:
    def with_bias(t2: float) -> OrderCheck:
        return OrderCheck(0.1, 3.0, (TissueBias("white matter", 0.3, 0.0, t2),))

    assert [with_bias(t2).biased for t2 in (0.04, -0.04, 0.06, -0.06)] == [False, False, True, True]
    assert np.isfinite(with_bias(0.06).side_lobe)
