"""Coils: whitening, compression, smoothing, sensitivity maps.

Letters: C coils, V virtual coils, S samples, R readouts, Y X pixels, K coefficients.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from whorl.kspace.coils import (
    NoiseStatistics,
    coil_maps,
    combine,
    compression_matrix,
    dependent_coils,
    smooth,
    whitening_matrix,
)


def random_complex(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("scale", [1.0, 1e-7], ids=lambda scale: f"scale {scale:g}")
def test_whitening_makes_the_covariance_the_identity(scale: float) -> None:
    mixing = random_complex(5, 5, dtype=torch.complex128) * torch.tensor([1.0, 2, 0.3, 5, 1])[:, None] * scale
    noise = mixing @ random_complex(5, 4000, dtype=torch.complex128)
    covariance = noise @ noise.mH / 4000
    white = whitening_matrix(covariance) @ noise
    assert float((white @ white.mH / 4000 - torch.eye(5)).abs().max()) < 1e-10  # float64 rounding


@pytest.mark.parametrize("case", ["dead coil", "hardly alive", "two equal coils", "a sum of others"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_coils_without_noise_of_their_own_are_dropped_and_the_rest_is_whitened(
    case: str, dtype: torch.dtype
) -> None:
    noise = random_complex(5, 5) @ random_complex(5, 500)
    bad = 3
    if case == "dead coil":
        noise[bad] = 0
    elif case == "hardly alive":
        noise[bad] *= 1e-6
    elif case == "two equal coils":
        noise[bad] = 2j * noise[0]
    else:
        noise[bad] = (1 + 0.5j) * noise[0] - 0.7 * noise[2]
    noise = noise.to(dtype)
    covariance = noise @ noise.mH / 500
    assert dependent_coils(covariance) == [bad]
    matrix = whitening_matrix(covariance)
    assert matrix.shape == (4, 5)
    assert not matrix[:, bad].any()
    white = matrix @ noise
    # Rounding of single precision, times the condition of the mixing.
    assert float((white @ white.mH / 500 - torch.eye(4)).abs().max()) < 1e-3


def test_weak_and_nearly_equal_coils_are_kept() -> None:
    noise = random_complex(4, 2000, dtype=torch.complex128)
    noise[1] *= 1e-4
    noise[2] = noise[0] + 0.02 * noise[2]  # a share of 4e-4 of its own
    covariance = noise @ noise.mH / 2000
    assert dependent_coils(covariance) == []
    white = whitening_matrix(covariance) @ noise
    assert float((white @ white.mH / 2000 - torch.eye(4)).abs().max()) < 1e-6  # float64 rounding


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_noise_that_is_none_is_refused(value: float) -> None:
    noise = random_complex(4, 500)
    if value == 0:
        noise = noise * 0
    else:
        noise[1, 7] = value
    with pytest.raises(ValueError, match="noise of 4 coils has variances of"):
        whitening_matrix(noise @ noise.mH / noise.shape[1])


@pytest.mark.parametrize("dwell_us", [1.25, 10.0])
@pytest.mark.parametrize("bandwidth", [1.0, 0.8])
def test_noise_is_scaled_to_the_dwell_time_of_the_data(dwell_us: float, bandwidth: float) -> None:
    """A receiver with noise of spectral density N per µs samples a variance of N / dwell."""
    mixing = random_complex(3, 3, dtype=torch.complex128)
    density = mixing @ mixing.mH
    statistics = NoiseStatistics()
    for n, noise_dwell_us in enumerate((5.0, 2.5, 5.0)):
        # The filters of the receiver take a share of the noise of its own readouts.
        sd = np.sqrt(bandwidth / noise_dwell_us)
        noise = sd * mixing @ random_complex(3, 40_000 + n, dtype=torch.complex128)
        statistics.add(noise.numpy().astype(np.complex64), noise_dwell_us)
    assert statistics.n_usable(3) == 3
    assert statistics.dwell_us(3) == 5.0
    found = statistics.covariance(3, dwell_us, bandwidth)
    # 120 000 samples: 0.3 % of the largest variance.
    assert float((found - density / dwell_us).abs().max()) < 0.015 * float(density.abs().max()) / dwell_us
    white = whitening_matrix(found) @ mixing @ random_complex(3, 50_000, dtype=torch.complex128)
    white = white / dwell_us**0.5
    # Variance 1 for each complex sample, not for real and imaginary part each.
    assert float((white @ white.mH / 50_000 - torch.eye(3)).abs().max()) < 0.03


@pytest.mark.parametrize("odd", [0.0, -2.0, float("nan"), float("inf")])
def test_noise_of_no_known_dwell_time_is_not_scaled(odd: float) -> None:
    noise = random_complex(2, 50).numpy()
    plain, mixed, other = NoiseStatistics(), NoiseStatistics(), NoiseStatistics()
    plain.add(noise, odd)
    for dwell_us in (4.0, odd):
        mixed.add(noise, dwell_us)
    other.add(noise, 4.0)
    expected = noise @ noise.conj().T / 50
    for statistics in (plain, mixed):
        assert statistics.dwell_us(2) == 0
        np.testing.assert_allclose(statistics.covariance(2, 1.0, 0.5).numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(other.covariance(2, odd, 0.5).numpy(), expected, rtol=1e-5)


def test_compression_keeps_the_strongest_directions() -> None:
    # Readouts (R, C, S) of 3 strong sources in 7 coils, and a little of everything.
    mixing = random_complex(7, 3)
    kspace = mixing @ random_complex(11, 3, 40) + 0.02 * random_complex(11, 7, 40, seed=1)
    matrix = compression_matrix(kspace, 3)
    assert matrix.shape == (3, 7)
    product = matrix @ matrix.mH
    assert float((product - torch.eye(3)).abs().max()) < 1e-5  # float32 rounding
    compressed = matrix @ kspace
    total = float(kspace.abs().square().sum())
    # A conjugate too many would keep about 3 / 7.
    assert float(compressed.abs().square().sum()) / total > 0.999
    # What is kept can be put back.
    assert float((matrix.mH @ compressed - kspace).norm() / kspace.norm()) < 0.04
    # As good as the singular value decomposition says that any 3 can be.
    singular = torch.linalg.svdvals(kspace.permute(1, 0, 2).reshape(7, -1)).square()
    assert bool((compressed.abs().square().sum((0, 2)).diff() < 0).all())  # the strongest comes first
    assert float(compressed.abs().square().sum()) == pytest.approx(float(singular[:3].sum()), rel=1e-5)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.995])
def test_compression_by_energy_takes_the_smallest_number(energy: float) -> None:
    kspace = random_complex(6, 9, 30) * torch.logspace(0, -2, 9)[:, None]
    matrix = compression_matrix(kspace, energy=energy)
    total = float(kspace.abs().square().sum())
    V = len(matrix)
    assert float((matrix @ kspace).abs().square().sum()) >= energy * total * (1 - 1e-5)
    assert V == 1 or float((matrix[: V - 1] @ kspace).abs().square().sum()) < energy * total


def test_compression_to_more_coils_than_there_are() -> None:
    kspace = random_complex(6, 4, 30)
    matrix = compression_matrix(kspace, 9)
    assert matrix.shape == (4, 4)
    # A rotation: no energy is lost (float32 rounding).
    assert float((matrix @ kspace).norm()) == pytest.approx(float(kspace.norm()), rel=1e-5)


def test_compression_of_nothing() -> None:
    matrix = compression_matrix(torch.zeros(6, 4, 30, dtype=torch.complex64))
    assert matrix.shape[1] == 4
    assert bool(torch.isfinite(matrix.abs()).all())


@pytest.mark.parametrize("shape", [(2, 31, 40), (2, 3, 40, 31)], ids=str)
def test_smoothing(shape: tuple[int, ...]) -> None:
    constant = torch.full(shape, 2.5)
    result = smooth(constant, 1.5)
    assert result.shape == shape
    inside = result[..., 5:-5, 5:-5]  # the taps reach 5 pixels
    assert float((inside - 2.5).abs().max()) < 1e-5  # float32 rounding
    assert float(result[..., 0, 0].max()) < 2.5 / 2  # zero outside the field of view


def test_smoothing_spreads_a_point_as_a_gaussian() -> None:
    point = torch.zeros(1, 41, 45, dtype=torch.complex64)
    point[0, 20, 21] = 2 - 3j
    spread = smooth(point, 2.0)[0] / (2 - 3j)
    assert float(spread.imag.abs().max()) < 1e-6  # float32 rounding
    spread = spread.real
    assert float(spread.sum()) == pytest.approx(1, rel=1e-5)
    assert float((spread - spread.flip(0)[:, :]).abs().max()) < 1e-7  # 41 rows, centre 20
    centred = spread[:, 1:42]  # 41 columns around 21
    assert float((centred - centred.flip(1)).abs().max()) < 1e-7
    assert float((centred - centred.T).abs().max()) < 1e-7
    expected = np.exp(-0.5 * (3 / 2) ** 2)
    assert float(spread[23, 21] / spread[20, 21]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("sigma", [0.4, 1.5, 4.0, 30.0])
@pytest.mark.parametrize("shape", [(2, 13, 16), (1, 7), (3, 2, 40, 31)], ids=str)
def test_smoothing_is_a_convolution_along_each_axis(shape: tuple[int, ...], sigma: float) -> None:
    images = random_complex(*shape)
    reach = max(1, int(np.ceil(3 * sigma)))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    expected = images.numpy().astype(np.complex128)
    for axis in (-2, -1):
        n = shape[axis]
        expected = np.apply_along_axis(
            lambda line, n=n: np.convolve(line, taps / taps.sum())[reach : reach + n], axis, expected
        )
    result = smooth(images, sigma)
    assert result.dtype == images.dtype
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=1e-6)  # float32 rounding
    np.testing.assert_allclose(smooth(images.real, sigma).numpy(), expected.real, rtol=0, atol=1e-6)


def test_smoothing_is_self_adjoint_for_complex_images() -> None:
    a, b = random_complex(2, 13, 16), random_complex(2, 13, 16, seed=1)
    left, right = smooth(a, 2.0), smooth(b, 2.0)
    difference = torch.vdot(left.flatten(), b.flatten()) - torch.vdot(a.flatten(), right.flatten())
    assert float(difference.abs()) < 1e-6 * float(a.norm() * b.norm())  # float32 rounding


def smooth_maps(C: int, Y: int, X: int) -> Tensor:
    """`(C, Y, X)` complex maps of unit norm that vary slowly."""
    y, x = torch.linspace(-1, 1, Y)[:, None], torch.linspace(-1, 1, X)[None, :]
    maps = []
    for coil in range(C):
        angle = 2 * np.pi * coil / C
        size = torch.exp(-0.5 * ((x - np.cos(angle)) ** 2 + (y - np.sin(angle)) ** 2))
        maps.append(torch.polar(size, 0.9 * np.cos(coil) * x + 1.1 * np.sin(coil) * y + coil))
    stacked = torch.stack(maps)
    return stacked / torch.linalg.vector_norm(stacked, dim=0)


def disc(Y: int, X: int) -> Tensor:
    y, x = torch.linspace(-1, 1, Y)[:, None], torch.linspace(-1, 1, X)[None, :]
    return (x**2 + y**2) < 0.7**2


class TestCoilMaps:
    shape = (61, 48)

    def measured(self, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Images `(K, C, Y, X)` of a disc with structure and a smooth phase; maps; where the disc is."""
        csm, inside = smooth_maps(5, *self.shape), disc(*self.shape)
        y = torch.linspace(-1, 1, self.shape[0])[:, None]
        structure = 1 + 0.3 * torch.rand(self.shape, generator=torch.Generator().manual_seed(1))
        first = torch.polar(structure, 0.8 * y + 0.3) * inside
        images = torch.stack([first, 0.2j * first.flip(1), 0.05 * first.conj()]) * scale
        return images[:, None] * csm, csm, inside

    @pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6], ids=lambda scale: f"scale {scale:g}")
    def test_known_maps_are_found_up_to_a_phase(self, scale: float) -> None:
        images, csm, inside = self.measured(scale)
        found = coil_maps(images, sigma=2.0)
        assert found.shape == csm.shape
        norm = torch.linalg.vector_norm(found, dim=0)
        assert float((norm - 1).abs()[inside].max()) < 1e-5  # float32 rounding
        overlap = (found.conj() * csm).sum(0).abs()
        # 1 where the maps are the same up to a phase; they turn by some degrees within sigma, which
        # costs the square of that angle. A conjugate too many would give about 0.6.
        assert float(overlap[inside].min()) > 0.995

    def test_the_combined_first_coefficient_is_real_and_positive(self) -> None:
        images, _, inside = self.measured()
        found = coil_maps(images, sigma=2.0)
        combined = combine(smooth(images[:1], 2.0), found)[0]
        assert float(combined.real[inside].min()) > 0
        assert float((combined.imag.abs() / combined.abs())[inside].max()) < 1e-4  # float32 rounding

    def test_the_phase_of_a_coil_goes_into_its_map(self) -> None:
        # The combined images are those of a receiver without the phases of the coils.
        images, _, inside = self.measured()
        turn = torch.polar(torch.ones(5), torch.arange(5) * 1.3)
        before = combine(images, coil_maps(images))
        turned = images * turn[:, None, None]
        after = combine(turned, coil_maps(turned))
        difference = (after - before).abs()[:, inside].max() / before.abs().max()
        assert float(difference) < 1e-4  # float32 rounding

    def test_nothing_gives_no_nan(self) -> None:
        found = coil_maps(torch.zeros(2, 3, 20, 17, dtype=torch.complex64))
        assert bool(torch.isfinite(torch.view_as_real(found)).all())

    def test_one_coil(self) -> None:
        images = random_complex(2, 1, 20, 17) + 3
        found = coil_maps(images)
        assert found.shape == (1, 20, 17)
        assert float((found.abs() - 1).abs().max()) < 1e-5  # float32 rounding


def test_combination_is_the_adjoint_of_the_sensitivities() -> None:
    csm, x, y = random_complex(4, 9, 6), random_complex(3, 9, 6), random_complex(3, 4, 9, 6)
    combined = combine(y, csm)
    assert combined.shape == x.shape
    spread = x[:, None] * csm
    assert spread.shape == y.shape
    difference = torch.vdot(spread.flatten(), y.flatten()) - torch.vdot(x.flatten(), combined.flatten())
    assert float(difference.abs()) < 1e-6 * float(spread.norm() * y.norm())  # float32 rounding
    # Maps of unit norm give the object back.
    unit = csm / torch.linalg.vector_norm(csm, dim=0)
    assert float((combine(x[:, None] * unit, unit) - x).abs().max()) < 1e-5  # float32 rounding
