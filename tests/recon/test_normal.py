"""Normal operator against the encoding of each timepoint by direct sums, and what inverts it roughly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kspace.spirals import complex_normal, orthonormal_basis, rotated_spiral
from recon.spiral_slice import FIELD, measure, relative_error
from whorl.kspace.accumulate import fold_gram
from whorl.kspace.nufft import make_nufft
from whorl.recon.normal import Kernel, Normal, Sampling, make_kernel

T, C, I, S = 17, 2, 5, 40  # noqa: E741 - the field's letter
# The kernel comes from one NUFFT that is asked for 1e-4.
ERROR = 3e-4
SHAPES = pytest.mark.parametrize(
    "shape",
    [(14, 11), (9, 16), (7, 7), (8, 8), (1, 12), (13, 1), (1, 1), (2, 3)],
    ids=lambda shape: "x".join(map(str, shape)),
)
BASES = pytest.mark.parametrize("basis", ["real", "complex"])
# 1, 3, 6, 10 and 15 pairs of coefficients: real weights are transformed two at a time.
SIZES = pytest.mark.parametrize("K", [1, 2, 3, 4, 5])


@dataclass(frozen=True)
class Train:
    """T readouts, timepoint t along arm 3 t mod 5."""

    basis: Tensor  # (T, K)
    points: Tensor  # (I, S, 2)
    dcf: Tensor  # (I, S)
    interleaf: Tensor  # (T,)

    def sampling(self, backend: str = "finufft") -> Sampling:
        K = self.basis.shape[1]
        gram = torch.zeros((I, K, K), dtype=torch.complex64)
        fold_gram(gram, torch.arange(T), self.interleaf, self.basis)
        points = self.points.reshape(-1, 2)
        return Sampling(gram, self.dcf, points, make_nufft(points, (16, 16)), backend)

    def normal(self, x: Tensor, csm: Tensor) -> Tensor:
        """What the coils see of each timepoint, sampled, weighted and put back, `(K, C, H, W)` complex128."""
        K, H, W = x.shape
        x, csm, basis = (part.to(torch.complex128) for part in (x, csm, self.basis))
        y, column = torch.meshgrid(torch.arange(H) - 5.0, torch.arange(W) + 3.0, indexing="ij")
        places = torch.stack([column.flatten(), y.flatten()], 1).double()  # anywhere: only distances count
        result = torch.zeros((K, C, H * W), dtype=torch.complex128)
        for t in range(T):
            waves = torch.exp(-2j * math.pi * (self.points[self.interleaf[t]].double() @ places.T))  # (S, HW)
            seen = (torch.einsum("k,kyx->yx", basis[t], x) * csm).flatten(1)
            samples = (seen @ waves.T) * I * self.dcf[self.interleaf[t]]
            result += basis[t].conj()[:, None, None] * (samples @ waves.conj())
        return result.reshape(K, C, H, W)


def train(basis: str, K: int) -> Train:
    columns = orthonormal_basis(T, K, seed=5)
    if basis == "real":
        columns = torch.linalg.qr(columns.real).Q
    dcf = torch.rand((I, S), generator=torch.Generator().manual_seed(4))
    return Train(columns, rotated_spiral(I, S, 2), dcf, 3 * torch.arange(T) % I)


def distance(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@SHAPES
@BASES
@pytest.mark.parametrize("backend", ["finufft", "sigpy"])
def test_is_the_encoding_forward_and_back(shape: tuple[int, int], basis: str, backend: str) -> None:
    one = train(basis, 3)
    normal = Normal(make_kernel(one.sampling(backend), shape), complex_normal(C, *shape, seed=3))
    x = complex_normal(3, *shape)
    expected = one.normal(x, normal.csm)
    assert normal.coil_images(x).dtype == normal(x).dtype == torch.complex64
    assert distance(normal.coil_images(x), expected) < ERROR
    assert distance(normal(x), (expected * normal.csm.conj()).sum(1)) < ERROR


@SIZES
@BASES
def test_each_pair_of_coefficients_has_its_place(K: int, basis: str) -> None:
    one, shape = train(basis, K), (6, 5)
    kernel = make_kernel(one.sampling(), shape)
    assert kernel.spectrum.is_complex() == (basis == "complex" and K > 1)
    ones = torch.ones((C, *shape), dtype=torch.complex64)
    for k in range(K):
        x = torch.zeros((K, *shape), dtype=torch.complex64)
        x[k] = complex_normal(*shape, seed=k)
        found, expected = Normal(kernel, ones).coil_images(x), one.normal(x, ones)
        whole = float(expected.abs().max())
        # Of each coefficient in that of each other, relative to the largest.
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=3 * ERROR * whole)


@SHAPES
@BASES
def test_is_self_adjoint_and_positive(shape: tuple[int, int], basis: str) -> None:
    kernel = make_kernel(train(basis, 3).sampling(), shape)
    normal = Normal(kernel, complex_normal(C, *shape, seed=3))
    x, y = complex_normal(3, *shape), complex_normal(3, *shape, seed=1)
    nx, ny = normal(x), normal(y)
    assert nx.shape == x.shape
    left, right = torch.vdot(nx.flatten(), y.flatten()), torch.vdot(x.flatten(), ny.flatten())
    energy = torch.vdot(x.flatten(), nx.flatten())
    assert float(energy.real) > 0
    # Its matrices are Hermitian whatever the NUFFT missed: to rounding of float32.
    assert abs(left - right) < 1e-6 * nx.norm() * y.norm()
    assert abs(energy.imag) < 1e-6 * abs(energy)


def test_a_measured_slice_is_what_it_makes_of_the_truth() -> None:
    measured = measure(order="sequential")
    data = measured.slice_data("true")
    normal = Normal(measured.kernel(), measured.csm)
    everywhere = torch.ones_like(measured.mask)
    # Folded, transformed back and cut out of the field of view: the same but for two NUFFTs.
    assert relative_error(normal(measured.truth), data.x0, everywhere) < ERROR
    assert measured.mask.shape != FIELD


def test_what_differs_from_the_timepoints_by_more_than_the_nufft_is_seen() -> None:
    """Of the oracle itself: it is not blind to a missing conjugate."""
    one, shape = train("complex", 3), (6, 5)
    conjugated = Train(one.basis.conj(), one.points, one.dcf, one.interleaf)
    x, ones = complex_normal(3, *shape), torch.ones((C, *shape))
    assert distance(conjugated.normal(x, ones), one.normal(x, ones)) > 0.1


# --- What inverts it roughly ------------------------------------------------------------------------------


def waves(shape: tuple[int, int]) -> Tensor:
    """Orthonormal waves of the box `(H·W, H, W)`, in the order of the spectrum."""
    count = math.prod(shape)
    return torch.fft.ifft2(torch.eye(count, dtype=torch.complex64).reshape(count, *shape)) * count**0.5


def circulants(kernel: Kernel, shape: tuple[int, int], K: int) -> Tensor:
    """What the operator makes of each wave of each coefficient, seen in that wave: `(H·W, K, K)`."""
    table = []
    for wave in waves(shape):
        x = torch.eye(K, dtype=torch.complex64)[:, :, None, None] * wave  # (K, K, H, W), as K coils
        table.append((kernel.convolve(x) * wave.conj()).sum((2, 3)).T)
    return torch.stack(table)


@pytest.mark.parametrize("shape", [(6, 5), (5, 4), (1, 7), (1, 1)], ids=str)
@BASES
@pytest.mark.parametrize("ridge", [1.0, 0.1])
def test_the_rough_inverse_is_that_of_chans_circulant(
    shape: tuple[int, int], basis: str, ridge: float
) -> None:
    K = 3
    kernel = make_kernel(train(basis, K).sampling(), shape, ridge=ridge)
    # Of all circulant operators the nearest is that with the same quadratic form for each wave of the box.
    nearest = circulants(kernel, shape, K)
    level = ridge * nearest.diagonal(dim1=1, dim2=2).real.mean()
    expected = torch.linalg.inv(nearest + level * torch.eye(K))
    for k in range(K):
        for number, wave in enumerate(waves(shape)):
            x = torch.zeros((K, *shape), dtype=torch.complex64)
            x[k] = wave
            found = kernel.invert_roughly(x)
            # Float32, of matrices whose condition the ridge keeps below some tens.
            size = float(expected[number].abs().max())
            torch.testing.assert_close(
                found, expected[number, :, k, None, None] * wave, rtol=0, atol=1e-4 * size
            )


@SHAPES
@BASES
def test_the_rough_inverse_is_hermitian_and_positive_definite(shape: tuple[int, int], basis: str) -> None:
    kernel = make_kernel(train(basis, 3).sampling(), shape)
    x, y = complex_normal(3, *shape), complex_normal(3, *shape, seed=1)
    mx, my = kernel.invert_roughly(x), kernel.invert_roughly(y)
    assert mx.shape == x.shape
    left, right = torch.vdot(mx.flatten(), y.flatten()), torch.vdot(x.flatten(), my.flatten())
    assert abs(left - right) < 1e-5 * mx.norm() * y.norm()
    values = torch.linalg.eigvalsh(kernel.inverse)
    assert float(values.min()) > 0
    # Nothing is amplified by more than the ridge allows, which is the mean eigenvalue.
    assert float(values.max()) <= float(1 / level_of(kernel, shape)) * (1 + 1e-4)
    assert float(torch.vdot(x.flatten(), mx.flatten()).real) > 0


def level_of(kernel: Kernel, shape: tuple[int, int]) -> Tensor:
    """Mean diagonal of the circulant matrices, which is that of the operator: its value at no distance."""
    K = kernel.inverse.shape[1]
    point = torch.zeros((K, *shape), dtype=torch.complex64)
    point[:, shape[0] // 2, shape[1] // 2] = 1
    found = [
        float(kernel.convolve(torch.eye(K)[k, None, :, None, None] * point)[0, k].abs().max())
        for k in range(K)
    ]
    return torch.tensor(found).mean()


@pytest.mark.parametrize("shape", [(6, 5), (5, 8)], ids=str)
@BASES
def test_where_the_operator_is_circulant_it_is_inverted(shape: tuple[int, int], basis: str) -> None:
    """A full grid, each line of which has weights and a train of its own."""
    (H, W), K = shape, 3
    column, row = torch.meshgrid(torch.arange(H) - H // 2, torch.arange(W) - W // 2, indexing="ij")
    points = torch.stack([row / W, column / H], -1).reshape(-1, 2)  # (H·W, 2): lines are interleaves
    mixed = complex_normal(H, K, 9, seed=2)
    mixed = mixed.real + 0j if basis == "real" else mixed
    gram = mixed @ mixed.mH / 9
    dcf = 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(3))
    kernel = make_kernel(Sampling(gram, dcf, points, make_nufft(points, shape)), shape, ridge=0.0)
    x = complex_normal(K, *shape)
    back = kernel.invert_roughly(kernel.convolve(x[None])[0])
    # Condition of some tens times the NUFFT's error.
    assert distance(back, x) < 30 * ERROR
