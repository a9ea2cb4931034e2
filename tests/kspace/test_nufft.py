"""NUFFT back ends against direct sums, the FFT, and each other.

Letters: B batch, M samples, Y X pixels.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from whorl.kspace.nufft import make_nufft

BACKENDS = ["finufft", "sigpy"]
SHAPES = [(8, 7), (7, 10), (13, 9), (16, 24)]  # Y != X, odd and even in each place
# FINUFFT was asked for 1e-4; SigPy's kernel reaches about 1e-4. Both relative to the whole.
ACCURACY = 4e-4


def random_points(M: int, seed: int = 3) -> Tensor:
    return torch.rand(M, 2, generator=torch.Generator().manual_seed(seed)) * 0.998 - 0.499


def random_complex(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.complex64)


def direct_matrix(trajectory: Tensor, shape: tuple[int, int]) -> Tensor:
    """`(M, Y·X)` in float64: exp(-i 2π (kx x + ky y)), pixel j at j - n // 2."""
    y, x = (torch.arange(n, dtype=torch.float64) - n // 2 for n in shape)
    kx, ky = trajectory.double().T
    turns = ky[:, None, None] * y[:, None] + kx[:, None, None] * x
    return torch.polar(torch.ones_like(turns), -2 * torch.pi * turns).reshape(len(trajectory), -1)


def distance(result: Tensor, expected: Tensor) -> float:
    assert result.shape == expected.shape
    return float(torch.linalg.vector_norm(result - expected) / torch.linalg.vector_norm(expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestBackend:
    def test_forward_and_adjoint_belong_together(self, shape: tuple[int, int], backend: str) -> None:
        nufft = make_nufft(random_points(53), shape, backend=backend)
        x, y = random_complex(3, *shape), random_complex(3, 53)
        forward, adjoint = nufft.forward(x), nufft.adjoint(y)
        assert forward.shape == y.shape
        assert adjoint.shape == x.shape
        assert forward.dtype == adjoint.dtype == torch.complex64
        difference = torch.vdot(forward.flatten(), y.flatten()) - torch.vdot(x.flatten(), adjoint.flatten())
        # The two directions of one back end use one kernel, but FINUFFT's window is only fitted: its
        # errors are as large as what was asked for.
        assert float(difference.abs()) < ACCURACY * float(forward.norm() * y.norm())

    def test_equals_the_direct_sum(self, shape: tuple[int, int], backend: str) -> None:
        points = random_points(53)
        nufft = make_nufft(points, shape, backend=backend)
        matrix = direct_matrix(points, shape)
        x, y = random_complex(2, *shape), random_complex(2, 53)
        assert distance(nufft.forward(x), x.reshape(2, -1).to(matrix) @ matrix.T) < ACCURACY
        expected = (y.to(matrix) @ matrix.conj()).reshape(2, *shape)
        assert distance(nufft.adjoint(y), expected) < ACCURACY

    def test_equals_the_fft_on_its_grid(self, shape: tuple[int, int], backend: str) -> None:
        Y, X = shape
        ky, kx = ((torch.arange(n) - n // 2) / n for n in shape)
        grid = torch.stack(torch.broadcast_tensors(kx[None, :], ky[:, None]), dim=-1).reshape(-1, 2)
        nufft = make_nufft(grid, shape, backend=backend)
        x = random_complex(2, Y, X)
        expected = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(x, dim=(1, 2))), dim=(1, 2))
        assert distance(nufft.forward(x).reshape(2, Y, X), expected) < ACCURACY
        # On the grid the adjoint is the inverse, but for the number of pixels.
        assert distance(nufft.adjoint(nufft.forward(x)) / (Y * X), x) < 2 * ACCURACY

    def test_a_shifted_delta_is_a_phase_ramp(self, shape: tuple[int, int], backend: str) -> None:
        Y, X = shape
        points = random_points(41)
        nufft = make_nufft(points, shape, backend=backend)
        for right, down in [(0, 0), (2, 0), (0, 3), (-3, 1)]:
            delta = torch.zeros(1, Y, X, dtype=torch.complex64)
            delta[0, Y // 2 + down, X // 2 + right] = 1
            turns = points[:, 0] * right + points[:, 1] * down
            ramp = torch.polar(torch.ones(41), -2 * torch.pi * turns)
            assert float((nufft.forward(delta)[0] - ramp).abs().max()) < 10 * ACCURACY

    def test_batches_of_different_sizes_in_one_object(self, shape: tuple[int, int], backend: str) -> None:
        points = random_points(29)
        nufft = make_nufft(points, shape, backend=backend)
        x, y = random_complex(6, *shape), random_complex(6, 29)
        forward, adjoint = nufft.forward(x), nufft.adjoint(y)
        kept = forward.clone()
        for B in (1, 4, 6, 1):
            # The same kernel on the same numbers, but the back end may sum in another order.
            assert distance(nufft.forward(x[:B]), forward[:B]) < 1e-5
            assert distance(nufft.adjoint(y[:B]), adjoint[:B]) < 1e-5
        assert torch.equal(kept, forward)  # results are not overwritten by later calls

    def test_views_are_read_as_they_are(self, shape: tuple[int, int], backend: str) -> None:
        Y, X = shape
        nufft = make_nufft(random_points(29), shape, backend=backend)
        wide, long = random_complex(2, X, Y), random_complex(29, 2)
        assert distance(nufft.forward(wide.mT), nufft.forward(wide.mT.clone().contiguous())) < 1e-5
        assert distance(nufft.adjoint(long.T), nufft.adjoint(long.T.clone().contiguous())) < 1e-5
        # Conjugation is lazy in PyTorch: a flag that other programs do not see.
        x, y = random_complex(2, Y, X), random_complex(2, 29)
        assert distance(nufft.forward(x.conj()), nufft.forward(x.conj().resolve_conj())) < 1e-5
        assert distance(nufft.adjoint(y.conj()), nufft.adjoint(y.conj().resolve_conj())) < 1e-5


def test_back_ends_agree_at_the_edge_of_k_space() -> None:
    angle = torch.linspace(0, 2 * np.pi, 64)
    rim = 0.5 * torch.stack([angle.cos(), angle.sin()], dim=1)
    rim = torch.cat([rim, torch.tensor([[-0.5, -0.5], [0.5, 0.5], [0.0, 0.0]])]).clamp(-0.5, 0.5)
    x, y = random_complex(2, 18, 11), random_complex(2, len(rim))
    finufft, sigpy = (make_nufft(rim, (18, 11), backend=name) for name in BACKENDS)
    assert distance(finufft.forward(x), sigpy.forward(x)) < 2 * ACCURACY
    assert distance(finufft.adjoint(y), sigpy.adjoint(y)) < 2 * ACCURACY


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
def test_the_tolerance_is_kept(tolerance: float) -> None:
    points, x = random_points(200), random_complex(1, 20, 30)
    matrix = direct_matrix(points, (20, 30))
    expected = x.reshape(1, -1).to(matrix) @ matrix.T
    # FINUFFT promises its tolerance up to a small factor.
    assert distance(make_nufft(points, (20, 30), tolerance=tolerance).forward(x), expected) < 3 * tolerance


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_coarse_kernel_of_a_large_tolerance(backend: str) -> None:
    points, x = random_points(200), random_complex(1, 20, 30)
    matrix = direct_matrix(points, (20, 30))
    nufft = make_nufft(points, (20, 30), backend=backend, tolerance=1e-2)
    assert distance(nufft.forward(x), x.reshape(1, -1).to(matrix) @ matrix.T) < 3e-2


@pytest.mark.parametrize("shape", [(3, 5, 2), (5, 3), (5,)])
def test_a_trajectory_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(samples, 2\)"):
        make_nufft(torch.zeros(shape), (8, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_threads_may_use_one_at_once(backend: str) -> None:
    nufft = make_nufft(random_points(5000), (64, 48), backend=backend)
    ys = [random_complex(2, 5000, seed=n) for n in range(24)]
    expected = [nufft.adjoint(y) for y in ys]
    with ThreadPoolExecutor(4) as pool:
        for result, one in zip(pool.map(nufft.adjoint, ys), expected, strict=True):
            assert torch.equal(result, one)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gpu_equals_the_cpu(backend: str) -> None:
    pytest.importorskip("cufinufft" if backend == "finufft" else "cupy")
    points, x, y = random_points(53), random_complex(3, 13, 8), random_complex(3, 53)
    here = make_nufft(points, (13, 8), backend=backend)
    there = make_nufft(points.cuda(), (13, 8), backend=backend)
    assert distance(there.forward(x.cuda()).cpu(), here.forward(x)) < ACCURACY
    assert distance(there.adjoint(y.cuda()).cpu(), here.adjoint(y)) < ACCURACY
