"""Encoders of the INR: what each makes of places and values, exactly, and that it can show an object."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from whorl.recon.encoders import (
    ENCODERS,
    Encoder,
    FourierEncoder,
    GridEncoder,
    HashEncoder,
    SirenEncoder,
    interpolation_matrix,
    make_encoder,
    raster,
)
from whorl.recon.inr import fit_inr

CPU, ALL = torch.device("cpu"), slice(None)
SHAPE = (11, 8)
NAMES = pytest.mark.parametrize("name", ENCODERS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small gain nothing from a second thread, and lose much where another program has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encoder_of(name: str, *, seed: int = 1, **changed: Any) -> Encoder:
    """An encoder with grids of 3 x 2, 5 x 4 and 8 x 6 points, if it has grids."""
    options: dict[str, Any] = {
        "share": 0.5, "levels": 3, "features": 2, "base": 6, "finest": 16, "log2_table": 5, "frequencies": 7,
        "sigma": 3.0, "layers": 2, "hidden": 12, "omega": 30.0, **changed,
    }  # fmt: skip
    return make_encoder(name, SHAPE, **options, generator=generator_of(seed), device=CPU)


@pytest.mark.parametrize(("points", "pixels"), [(2, 9), (5, 9), (4, 11), (7, 8), (9, 9), (2, 1), (1, 5)])
def test_interpolation_is_linear_and_exact_at_its_points(points: int, pixels: int) -> None:
    matrix = interpolation_matrix(points, pixels)
    assert matrix.shape == (pixels, points)
    torch.testing.assert_close(matrix.sum(1), torch.ones(pixels))
    assert float(matrix.min()) >= 0
    assert int((matrix > 0).sum(1).max()) <= 2
    if points > 1 and pixels > 1:
        # A straight line stays one, from the first pixel to the last.
        line = matrix @ torch.linspace(-1, 3, points)
        torch.testing.assert_close(line, torch.linspace(-1, 3, pixels))
    if points == pixels:
        torch.testing.assert_close(matrix, torch.eye(points))


def test_places_are_in_fields_of_view_around_the_centre() -> None:
    places = raster((5, 3), 0.5)
    torch.testing.assert_close(places[0], (0.1 * torch.arange(-2.0, 3))[:, None].expand(5, 3))
    torch.testing.assert_close(places[1], (0.1 * torch.arange(-1.0, 2)).expand(5, 3))


@NAMES
def test_lines_are_those_of_the_whole_raster(name: str) -> None:
    encoder = encoder_of(name)
    whole = encoder(ALL)
    assert whole.shape == (encoder.n_features, 88)
    for lines in (slice(0, None, 2), slice(1, None, 2), slice(3, 5)):
        some = whole.reshape(-1, *SHAPE)[:, lines].flatten(1)
        torch.testing.assert_close(encoder(lines), some, rtol=0, atol=1e-6)
    assert torch.equal(encoder_of(name)(ALL), whole)
    assert not torch.equal(encoder_of(name, seed=2)(ALL), whole)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        *(
            (name, changed)
            for name in ("grid", "hash")
            for changed in ({"share": 1.0}, {"levels": 4}, {"features": 3}, {"base": 8}, {"finest": 12})
        ),
        ("hash", {"log2_table": 4}),
        *(("fourier", changed) for changed in ({"share": 1.0}, {"frequencies": 6}, {"sigma": 4.0})),
        *(("siren", changed) for changed in ({"share": 1.0}, {"layers": 3}, {"hidden": 10}, {"omega": 20.0})),
    ],
)
def test_every_parameter_of_an_encoder_is_used(name: str, changed: dict[str, Any]) -> None:
    plain, other = encoder_of(name)(ALL), encoder_of(name, **changed)(ALL)
    assert plain.shape != other.shape or not torch.equal(plain, other)


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match='encoder is "grids": expected one of grid, hash, fourier, siren'):
        encoder_of("grids")


@NAMES
def test_gradients_are_difference_quotients(name: str) -> None:
    encoder = encoder_of(name, omega=3.0)
    weight = torch.randn(encoder(slice(1, None, 2)).shape, generator=generator_of(2))
    parameters = list(encoder.parameters())
    assert bool(parameters) == (name != "fourier")  # which trains nothing
    # Tables are linear in their values; of sines a short way is straight but for its square.
    step = 1e-2 if name == "siren" else 1.0

    def value() -> Tensor:
        return (encoder(slice(1, None, 2)) * weight).sum()

    gradients = torch.autograd.grad(value(), parameters) if parameters else ()
    generator = generator_of(3)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert gradient.shape == parameter.shape
        change = step * torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.add_(change)
            after = value()
            parameter.sub_(2 * change)
            before = value()
            parameter.add_(change)
        expected = float((change * gradient).sum())
        # <E d, w> = <d, Eᵀ w>; sums of some hundred products in float32.
        assert float(after - before) / 2 == pytest.approx(expected, rel=5e-3, abs=1e-3 * step)


def bilinear(grid: Tensor, shape: tuple[int, ...]) -> Tensor:
    """By PyTorch: `(D, *grid points)` to `(D, pixels)`."""
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    read = torch.nn.functional.interpolate(grid[None], size=shape, mode=mode, align_corners=True)
    return read[0].flatten(1)


def test_grid_is_read_bilinearly() -> None:
    encoder = encoder_of("grid")
    assert isinstance(encoder, GridEncoder)
    features = encoder(ALL)
    for level, grid in enumerate(encoder.grids):
        expected = bilinear(grid, SHAPE)
        torch.testing.assert_close(features[2 * level : 2 * level + 2], expected, rtol=0, atol=1e-9)
    # The longer side has the nominal number of points, the shorter one its share; levels get finer.
    assert [tuple(grid.shape[1:]) for grid in encoder.grids] == [(3, 2), (5, 4), (8, 6)]


def test_hash_with_a_large_table_is_the_grid() -> None:
    large = encoder_of("hash", log2_table=6)  # 48 grid points at most
    torch.testing.assert_close(large(ALL), encoder_of("grid")(ALL), rtol=0, atol=1e-9)
    small = encoder_of("hash", log2_table=5)
    assert sum(p.numel() for p in small.parameters()) == 2 * (6 + 20 + 32)
    # The first two levels fit still.
    torch.testing.assert_close(small(ALL)[:4], large(ALL)[:4], rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 7), (4, 5, 6)], ids=["2D", "3D"])
def test_hash_is_that_of_the_paper(shape: tuple[int, ...]) -> None:
    """One level with a grid point on each pixel: features are table entries."""
    encoder = HashEncoder(
        shape, share=1.0, levels=1, features=3, base=max(shape), finest=max(shape), log2_table=4,
        generator=generator_of(0), device=CPU,
    )  # fmt: skip
    features = encoder(ALL).reshape(3, *shape)
    assert encoder.table.shape == (16, 3)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():
        x, y, z = (*reversed(place), 0)[:3]
        entry = (x ^ (y * 2654435761) ^ (z * 805459861)) % 2**32 % 16
        torch.testing.assert_close(features[(slice(None), *place)], encoder.table[entry], rtol=1e-5, atol=0)


def test_hash_of_a_volume_is_read_trilinearly() -> None:
    shape = (5, 9, 7)
    encoder = HashEncoder(
        shape, share=1.0, levels=2, features=2, base=4, finest=6, log2_table=8, generator=generator_of(0),
        device=CPU,
    )  # fmt: skip
    sizes = [(2, 4, 3), (3, 6, 5)]
    first, second = encoder.table.split([math.prod(size) for size in sizes])
    expected = [
        bilinear(table.T.reshape(2, *size), shape) for table, size in zip((first, second), sizes, strict=True)
    ]
    features = encoder(ALL)
    torch.testing.assert_close(features, torch.cat(expected), rtol=0, atol=1e-9)
    planes = features.reshape(4, *shape)[:, 1::2].flatten(1)
    torch.testing.assert_close(encoder(slice(1, None, 2)), planes, rtol=0, atol=1e-9)


def test_fourier_features_are_waves_of_their_frequencies() -> None:
    encoder = encoder_of("fourier")
    assert isinstance(encoder, FourierEncoder)
    y, x = torch.arange(11) - 5.0, torch.arange(8) - 3.5
    cosines, sines = encoder(ALL).reshape(2, 7, *SHAPE)
    for (fy, fx), cosine, sine in zip(encoder.frequencies.tolist(), cosines, sines, strict=True):
        # 11 pixels are half a field of view.
        angle = 2 * math.pi * (fy * y[:, None] + fx * x) * 0.5 / 11
        torch.testing.assert_close(cosine, angle.cos(), rtol=0, atol=1e-5)
        torch.testing.assert_close(sine, angle.sin(), rtol=0, atol=1e-5)


def test_fourier_frequencies_have_their_spread() -> None:
    encoder = encoder_of("fourier", frequencies=4000, sigma=6.0)
    assert isinstance(encoder, FourierEncoder)
    # Of 8000 numbers: 0.8 % and 0.07.
    assert float(encoder.frequencies.std()) == pytest.approx(6.0, rel=0.04)
    assert abs(float(encoder.frequencies.mean())) < 0.3


def test_siren_keeps_the_spread_of_its_sines() -> None:
    encoder = encoder_of("siren", layers=4, hidden=256, share=1.0)
    assert isinstance(encoder, SirenEncoder)
    assert float(encoder.weights[0].detach().abs().max()) == pytest.approx(1 / 2, rel=0.02)
    for weight in [w.detach() for w in encoder.weights[1:]]:
        bound = math.sqrt(6 / 256) / 30
        assert float(weight.abs().max()) == pytest.approx(bound, rel=0.01)
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    # A sine of a wide angle has the variance 1/2, at each layer.
    assert float(encoder(ALL).detach().square().mean()) == pytest.approx(0.5, abs=0.05)


def test_siren_is_layers_of_sines() -> None:
    encoder = encoder_of("siren", share=1.0)
    assert isinstance(encoder, SirenEncoder)
    for row, column in ((0, 0), (3, 6), (10, 7)):
        # The field of view, here 11 pixels, is from -1 to 1.
        x = torch.tensor([[row - 5.0], [column - 3.5]]) * 2 / 11
        for weight, bias in zip(encoder.weights, encoder.biases, strict=True):
            x = torch.sin(30 * (weight @ x + bias))
        torch.testing.assert_close(encoder(ALL)[:, 8 * row + column], x[:, 0], rtol=0, atol=1e-4)


# --- Grids that begin with images -------------------------------------------------------------------------


def some_grid(shape: tuple[int, int], *, levels: int, finest: int, features: int = 3) -> GridEncoder:
    return GridEncoder(
        shape, share=1.0, levels=levels, features=features, base=4, finest=finest, generator=generator_of(0),
        device=CPU,
    )  # fmt: skip


def read_out(encoder: GridEncoder, shape: tuple[int, int]) -> Tensor:
    """Sum of the levels, `(D, Y, X)`."""
    levels: Tensor = encoder(ALL).detach().reshape(len(encoder.grids), -1, *shape)
    return levels.sum(0)


@pytest.mark.parametrize("levels", [2, 4, 7])
@pytest.mark.parametrize("shape", [(23, 17), (12, 30), (5, 5), (9, 1), (1, 1)], ids=str)
def test_levels_add_up_to_what_fills_them(shape: tuple[int, int], levels: int) -> None:
    encoder = some_grid(shape, levels=levels, finest=max(shape))
    images = torch.randn((3, *shape), generator=generator_of(1))
    encoder.fill(images, torch.ones(shape, dtype=torch.bool))
    # The last level has a point for each pixel and takes what is left: float32.
    torch.testing.assert_close(read_out(encoder, shape), images, rtol=0, atol=1e-5)


def test_only_pixels_that_count_fill_the_levels() -> None:
    shape = (23, 17)
    images, mask = torch.randn((3, *shape), generator=generator_of(1)), raster(shape, 1.0).norm(dim=0) < 0.35
    encoder, other = (some_grid(shape, levels=3, finest=23) for _ in range(2))
    encoder.fill(images, mask)
    torch.testing.assert_close(read_out(encoder, shape)[:, mask], images[:, mask], rtol=0, atol=1e-5)
    other.fill(torch.where(mask, images, 1e3), mask)
    for grid, same in zip(encoder.grids, other.grids, strict=True):
        assert torch.equal(grid, same)


def test_each_level_takes_what_the_coarser_ones_left() -> None:
    shape = (41, 34)
    y, x = raster(shape, 1.0)
    mask = torch.hypot(y, x) < 0.45
    slow, fine = 3 + y, 0.2 * torch.sign(torch.sin(60 * x) * torch.sin(50 * y))
    encoder = some_grid(shape, levels=4, finest=41, features=1)
    encoder.fill((slow + fine)[None], mask)
    levels = encoder(ALL).detach().reshape(4, *shape)
    # The first has the slow part but for its smoothing, the last the fine one.
    assert float((levels[0] - slow)[mask].abs().mean()) < 0.1
    assert float(torch.corrcoef(torch.stack([levels[3][mask], fine[mask]]))[0, 1]) > 0.9
    left = [float((slow + fine - levels[:n].sum(0))[mask].square().sum()) for n in range(5)]
    assert all(after < before for before, after in pairwise(left))


@NAMES
@pytest.mark.parametrize("fit", ["varpro", "adam"])
def test_a_smooth_object_is_fitted(name: str, fit: str) -> None:
    y, x = torch.arange(40)[:, None] - 22.0, torch.arange(34)[None, :] - 15.0
    mask = (y / 16) ** 2 + (x / 13) ** 2 < 1
    truth = torch.stack(
        [1 + 0.3 * torch.cos(0.2 * y) * torch.sin(0.15 * x), 0.3 * torch.sin(0.2 * x + 0.1 * y)]
    )
    truth = truth * mask
    fitted = fit_inr(truth, mask, encoder=name, fit=fit, iterations=100).coefficients
    error = float((fitted - truth).norm() / truth.norm())
    # Measured: 4.5 % for Adam on Fourier features, 0.6 to 1.7 % for all others.
    assert error < (0.07 if (name, fit) == ("fourier", "adam") else 0.03)
