"""Normal operator against the encoding of each timepoint, and its two forms against each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kspace.spirals import complex_normal, orthonormal_basis, rotated_spiral
from whorl.kspace.accumulate import fold, fold_gram
from whorl.kspace.coils import combine
from whorl.kspace.nufft import make_nufft
from whorl.recon.lowrank import adjoint_coil_images
from whorl.recon.normal import GramNormal, Normal, ToeplitzNormal, make_normal

T, K, C, I, S = 17, 3, 2, 5, 40  # noqa: E741 - the field's letter
# Two NUFFTs that are asked for 1e-4 each.
ERROR = 5e-4


def encoding(shape: tuple[int, int], backend: str = "finufft") -> tuple[GramNormal, Tensor, Tensor, Tensor]:
    """The operator with its basis, weights and maps; timepoint t is measured along arm 3 t mod 5."""
    trajectory = rotated_spiral(I, S, 2)
    basis, csm = orthonormal_basis(T, K), complex_normal(C, *shape, seed=3)
    dcf = torch.rand((I, S), generator=torch.Generator().manual_seed(4))
    gram = torch.zeros((I, K, K), dtype=torch.complex64)
    fold_gram(gram, torch.arange(T), 3 * torch.arange(T) % I, basis)
    nufft = make_nufft(trajectory.reshape(-1, 2), shape, backend=backend)
    return GramNormal(gram, dcf, csm, nufft), basis, dcf, csm


@pytest.mark.parametrize("backend", ["finufft", "sigpy"])
@pytest.mark.parametrize("shape", [(14, 11), (9, 16)], ids=str)
def test_is_the_encoding_forward_and_back(shape: tuple[int, int], backend: str) -> None:
    normal, basis, dcf, csm = encoding(shape, backend)
    x = complex_normal(K, *shape)
    result = normal(x)
    expected = torch.zeros_like(x)
    trajectory = rotated_spiral(I, S, 2)
    for t in range(T):
        i = 3 * t % I
        arm = make_nufft(trajectory[i], shape)
        samples = arm.forward(torch.einsum("k,kyx->yx", basis[t], x) * csm)  # (C, S)
        back = (arm.adjoint(samples * I * dcf[i]) * csm.conj()).sum(0)
        expected += basis[t].conj()[:, None, None] * back
    assert result.shape == x.shape
    assert float((result - expected).norm() / expected.norm()) < ERROR


def test_is_self_adjoint_and_positive() -> None:
    normal = encoding((14, 11))[0]
    x, y = complex_normal(K, 14, 11), complex_normal(K, 14, 11, seed=1)
    nx, ny = normal(x), normal(y)
    assert nx.shape == x.shape
    left, right = torch.vdot(nx.flatten(), y.flatten()), torch.vdot(x.flatten(), ny.flatten())
    assert abs(left - right) < ERROR * nx.norm() * y.norm()
    energy = torch.vdot(x.flatten(), nx.flatten())
    assert float(energy.real) > 0
    assert abs(energy.imag) < ERROR * abs(energy)


def test_agrees_with_what_is_folded_and_transformed_back() -> None:
    shape = (14, 11)
    normal, basis, dcf, csm = encoding(shape)
    nufft = make_nufft(rotated_spiral(I, S, 2).reshape(-1, 2), shape)
    x = complex_normal(K, *shape)
    arms = nufft.forward((x[:, None] * csm).reshape(K * C, *shape)).reshape(K, C, I, S)
    t = torch.arange(T)
    measured = torch.einsum("tk,kcts->tcs", basis, arms[:, :, 3 * t % I])
    bins = torch.zeros((I, K, C, S), dtype=torch.complex64)
    fold(bins, measured, t, 3 * t % I, basis)
    start = combine(adjoint_coil_images(bins, dcf, nufft), csm)
    assert float((normal(x) - start).norm() / start.norm()) < ERROR


def real_encoding(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gram matrices of a real basis, weights, maps, trajectory `(I·S, 2)`."""
    basis = torch.linalg.qr(torch.randn((T, K), generator=torch.Generator().manual_seed(5))).Q
    gram = torch.zeros((I, K, K), dtype=torch.complex64)
    fold_gram(gram, torch.arange(T), 3 * torch.arange(T) % I, basis)
    dcf = torch.rand((I, S), generator=torch.Generator().manual_seed(4))
    return gram, dcf, complex_normal(C, *shape, seed=3), rotated_spiral(I, S, 2).reshape(-1, 2)


def both_forms(
    shape: tuple[int, int], box: tuple[slice, slice], backend: str = "finufft"
) -> tuple[GramNormal, ToeplitzNormal]:
    gram, dcf, csm, trajectory = real_encoding(shape)
    nufft = make_nufft(trajectory, shape, backend=backend)
    toeplitz = ToeplitzNormal(gram, dcf, csm, trajectory, box, backend=backend)
    return GramNormal(gram, dcf, csm, nufft), toeplitz


def within(box: tuple[slice, slice], shape: tuple[int, int]) -> Tensor:
    inside = torch.zeros(shape)
    inside[box] = 1
    return inside


BOXES = pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((14, 11), (slice(2, 9), slice(3, 9))),  # odd by even, off the centre
        ((14, 11), (slice(0, 14), slice(0, 11))),  # all of it
        ((9, 16), (slice(1, 9), slice(0, 15))),  # even by odd, at two edges
        ((9, 16), (slice(4, 5), slice(2, 12))),  # a line
        ((9, 9), (slice(8, 9), slice(0, 1))),  # a pixel
    ],
    ids=["odd even", "all", "even odd", "line", "pixel"],
)


@BOXES
@pytest.mark.parametrize("backend", ["finufft", "sigpy"])
def test_both_forms_agree_inside_the_box(
    shape: tuple[int, int], box: tuple[slice, slice], backend: str
) -> None:
    gram_form, toeplitz = both_forms(shape, box, backend)
    inside = within(box, shape)
    x = complex_normal(K, *shape) * inside
    expected, coils = gram_form(x) * inside, gram_form.coil_images(x) * inside
    found, found_coils = toeplitz(x), toeplitz.coil_images(x)
    assert found.shape == x.shape
    assert found_coils.shape == (K, C, *shape)
    assert float((found - expected).norm() / expected.norm()) < ERROR
    assert float((found_coils - coils).norm() / coils.norm()) < ERROR
    # Neither gives nor takes anything outside.
    assert float((found * (1 - inside)).abs().max()) == 0
    assert float((found_coils * (1 - inside)).abs().max()) == 0
    torch.testing.assert_close(toeplitz(x + 5 * (1 - inside)), found, rtol=0, atol=0)


@BOXES
def test_the_toeplitz_form_is_self_adjoint_and_positive(
    shape: tuple[int, int], box: tuple[slice, slice]
) -> None:
    toeplitz = both_forms(shape, box)[1]
    x, y = complex_normal(K, *shape), complex_normal(K, *shape, seed=1)
    nx, ny = toeplitz(x), toeplitz(y)
    left, right = torch.vdot(nx.flatten(), y.flatten()), torch.vdot(x.flatten(), ny.flatten())
    # Its kernel is real and symmetric whatever the NUFFT missed: to rounding of float32.
    assert abs(left - right) < 1e-6 * nx.norm() * y.norm()
    energy = torch.vdot(x.flatten(), nx.flatten())
    assert float(energy.real) > 0
    assert abs(energy.imag) < 1e-6 * abs(energy)


@pytest.mark.parametrize("form", ["gram", "toeplitz"])
def test_other_maps_take_their_place(form: str) -> None:
    shape, box = (14, 11), (slice(2, 9), slice(3, 9))
    gram, dcf, csm, trajectory = real_encoding(shape)
    nufft, mask = make_nufft(trajectory, shape), within(box, shape) > 0

    def made(maps: Tensor) -> Normal:
        return make_normal(gram, dcf, maps, trajectory, nufft, mask, form=form)

    other = complex_normal(C, *shape, seed=8)
    normal, x = made(csm), complex_normal(K, *shape) * mask
    before = normal(x)
    exchanged = normal.with_maps(other)
    assert exchanged.csm is other
    # The same sums; threads of the NUFFT may add in another order.
    torch.testing.assert_close(exchanged(x), made(other)(x), rtol=0, atol=1e-5 * float(before.abs().max()))
    torch.testing.assert_close(normal(x), before, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert float((exchanged(x) - before).norm() / before.norm()) > 0.5


def test_the_form_is_chosen_by_size_and_basis() -> None:
    shape = (14, 11)
    gram, dcf, csm, trajectory = real_encoding(shape)
    nufft = make_nufft(trajectory, shape)

    def form(box: tuple[slice, slice], gram: Tensor = gram, form: str = "auto") -> type:
        mask = within(box, shape) > 0
        return type(make_normal(gram, dcf, csm, trajectory, nufft, mask, form=form))

    # 200 samples: a padded box of 400 points pays, one of 440 does not.
    fits, exceeds = (slice(2, 12), slice(1, 11)), (slice(2, 12), slice(0, 11))
    assert form(fits) is ToeplitzNormal
    assert form(exceeds) is GramNormal
    assert form(exceeds, form="toeplitz") is ToeplitzNormal
    assert form(fits, form="gram") is GramNormal
    complex_gram = encoding(shape)[0]._gram
    assert form(fits, complex_gram) is GramNormal
    # A kernel of 400 points and more than 819² coefficients is larger than 1 GiB.
    assert form(fits, torch.zeros((1, 820, 820), dtype=torch.complex64)) is GramNormal


def test_a_complex_basis_has_no_toeplitz_form() -> None:
    shape = (14, 11)
    _, dcf, csm, trajectory = real_encoding(shape)
    with pytest.raises(ValueError, match="real basis"):
        ToeplitzNormal(encoding(shape)[0]._gram, dcf, csm, trajectory, (slice(0, 7), slice(0, 7)))
