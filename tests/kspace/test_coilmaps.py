"""Coil maps from the centre of k-space and from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from kspace.spirals import complex_normal
from scan_edit import Result, Scan, assert_close
from whorl.kspace.coilmaps import (
    ExternalMaps,
    enlarge,
    low_resolution,
    maps_from_centre,
    polynomial_maps,
    read_external_maps,
)
from whorl.kspace.coilmaps import polynomials as within
from whorl.scan.failure import ScanError
from whorl.simulation.phantoms import coil_maps as simulated_maps

K, C, SHAPE = 3, 5, (90, 101)


def places(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """y and x of the pixels, in fields of view, 0 in the middle."""
    y, x = ((torch.arange(n) - n // 2) / n for n in shape)
    return torch.meshgrid(y, x, indexing="ij")


def smooth_maps(shape: tuple[int, int]) -> Tensor:
    """`(C, Y, X)`, unit norm, each with a phase of its own."""
    y, x = places(shape)
    angle = 2 * np.pi * torch.arange(C) / C
    away = (x - 0.6 * torch.cos(angle)[:, None, None]) ** 2 + (y - 0.6 * torch.sin(angle)[:, None, None]) ** 2
    turn = 1.5 * (x * torch.sin(angle)[:, None, None] + y) + angle[:, None, None]
    maps = torch.polar(torch.exp(-1.5 * away), turn)
    return maps / torch.linalg.vector_norm(maps, dim=0)


def scene(shape: tuple[int, int], noise: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Coil images `(K, C, Y, X)` of an ellipse with structure, and where it is."""
    y, x = places(shape)
    inside = (x / 0.33) ** 2 + (y / 0.4) ** 2 < 1
    images = torch.stack([(1 + 0.4 * torch.sin(20 * x + k)) * (k + 1) ** -1.5 for k in range(K)]) * inside
    clean = images[:, None] * smooth_maps(shape)
    return clean + noise * complex_normal(K, C, *shape, seed=3), inside


def overlap(maps: Tensor, true: Tensor, inside: Tensor) -> Tensor:
    """Share of the signal that a combination by `maps` keeps, in each pixel of the object."""
    return (maps.conj() * true).sum(0).abs()[inside]


@pytest.mark.parametrize("shape", [(60, 61), (61, 60)])
def test_the_centre_of_kspace_is_the_same_field_of_view(shape: tuple[int, int]) -> None:
    y, x = places(shape)
    slow = torch.exp(2j * np.pi * (2 * x - y)) + 0.3
    small = low_resolution(slow[None], (16, 17))[0]
    y, x = places((16, 17))
    wave = torch.exp(2j * np.pi * (2 * x - y))
    factor = np.cos(np.pi * 1 / 18) ** 2 * np.cos(np.pi * 2 / 19) ** 2  # of the apodisation
    torch.testing.assert_close(small, factor * wave + 0.3, atol=2e-6, rtol=0)
    back = enlarge(torch.ones(1, 16, 17, dtype=torch.complex64), shape)
    torch.testing.assert_close(back, torch.ones(1, *shape, dtype=torch.complex64))


def test_pixels_between_those_of_low_resolution_are_linear() -> None:
    y, x = places((16, 17))
    big = enlarge((3 * x + 2j * y).to(torch.complex64)[None], (64, 51))[0]
    y, x = places((64, 51))
    # Beyond the outermost pixels their value counts.
    middle = (slice(4, -8), slice(3, -5))
    torch.testing.assert_close(big[middle], (3 * x + 2j * y).to(torch.complex64)[middle], atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["walsh", "espirit"])
def test_maps_are_those_of_the_coils(method: str) -> None:
    images, inside = scene(SHAPE)
    maps = maps_from_centre(images, method)
    assert maps.shape == (C, *SHAPE)
    torch.testing.assert_close(torch.linalg.vector_norm(maps, dim=0)[inside], torch.ones(int(inside.sum())))
    kept = overlap(maps, smooth_maps(SHAPE), inside)
    # At the rim the maps of neighbours outside mix in.
    assert float(kept.median()) > 0.999
    assert float(kept.min()) > 0.9
    combined = (images[0] * maps.conj()).sum(0)[inside]
    assert float(combined.real.min()) > 0  # its phase is taken out
    assert float((combined.imag.abs() / combined.abs()).median()) < 0.05


def test_the_two_methods_differ() -> None:
    images, inside = scene(SHAPE)
    walsh, espirit = maps_from_centre(images, "walsh"), maps_from_centre(images, "espirit")
    assert float((walsh - espirit).abs()[:, inside].max()) > 1e-3


# --- Polynomials ------------------------------------------------------------------------------------------


def distance(maps: Tensor, true: Tensor, inside: Tensor) -> float:
    """Share of the signal that maps miss, root mean square: as an amplitude."""
    kept = overlap(maps, true, inside).double()
    return float((1 - kept.square()).clamp_min(0).mean().sqrt())


def polynomials(shape: tuple[int, int], degree: int) -> Tensor:
    """`(C, Y, X)` of unit norm: polynomials of the place but for a factor that all coils share."""
    y, x = (2 * axis for axis in places(shape))
    maps = torch.zeros((C, *shape), dtype=torch.complex64)
    for i in range(degree + 1):
        for j in range(degree + 1 - i):
            maps = maps + 0.35 ** (i + j) * complex_normal(C, 1, 1, seed=10 * i + j) * y**i * x**j
    return maps / torch.linalg.vector_norm(maps, dim=0)


def sharp(shape: tuple[int, int], what: str) -> Tensor:
    """A factor for an object: fields of about two pixels, in magnitude, in phase or in sign."""
    y, x = places(shape)
    fields = (x * 40).floor() + (y * 37).floor()
    if what == "magnitude":
        return torch.where(fields % 2 > 0, 1.0, 0.3) + 0j
    if what == "phase":
        return torch.polar(torch.ones(shape), 2.0 * (fields % 3))
    return (torch.where(x + 0.3 * y > 0.05, -1.0, 1.0) if what == "sign" else torch.ones(shape)) + 0j


def both_maps(images: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Polynomials, and the maps of the centre of k-space that they begin with."""
    walsh = maps_from_centre(images)
    return polynomial_maps(images, within(inside), walsh), walsh


@pytest.mark.parametrize("what", ["nothing", "magnitude", "phase", "sign"])
@pytest.mark.parametrize("kind", ["degree 1", "degree 3", "Gauss"])
def test_maps_that_are_polynomials_come_back(kind: str, what: str) -> None:
    true = smooth_maps(SHAPE) if kind == "Gauss" else polynomials(SHAPE, int(kind[-1]))
    images, inside = scene(SHAPE, noise=0)
    images = images[:, :1] / smooth_maps(SHAPE)[:1] * true * sharp(SHAPE, what)
    noisy = images + 1e-3 * complex_normal(K, C, *SHAPE, seed=3)
    found, walsh = both_maps(noisy, inside)
    torch.testing.assert_close(
        torch.linalg.vector_norm(found, dim=0), inside.float(), rtol=0, atol=1e-6
    )  # unit norm in the object, 0 outside
    # Measured: 3e-4 to 5e-4 of noise; 1 to 3 % for Walsh's.
    assert distance(found, true, inside) < 1e-3
    assert distance(walsh, true, inside) > 5e-3
    # Their free phase is as smooth as they are, whatever the object does: none of it is in there.
    turn = (found * true.conj()).sum(0)
    steps = (turn[1:] * turn[:-1].conj()).angle()[inside[1:] & inside[:-1]]
    assert float(steps.abs().max()) < 0.2


@pytest.mark.parametrize("turns", [0.2, 1.0, 3.0])
def test_combined_images_are_flat_whatever_smooth_phase_the_object_has(turns: float) -> None:
    images, inside = scene(SHAPE, noise=1e-3)
    y, x = places(SHAPE)
    # Turns across the field of view, straight and curved; and images of either sign.
    smooth_phase = torch.polar(torch.ones(SHAPE), 2 * np.pi * turns * (x - 0.4 * y + x * y))
    signs = torch.stack([sharp(SHAPE, "sign"), sharp(SHAPE, "sign").flip(1), sharp(SHAPE, "nothing")])
    found, _ = both_maps(images * smooth_phase * signs[:, None], inside)
    true = smooth_maps(SHAPE)
    assert distance(found, true, inside) < 1e-3
    combined = (images * smooth_phase * signs[:, None] * found.conj()).sum(1)[:, inside]
    # Real but for the phase that noise of a thousandth gives; the coils have the phase of 1.5 x at most.
    share = combined.imag.square().sum() / combined.abs().square().sum()
    assert float(share) < 1e-3
    # Nowhere do the maps change their sign.
    steps = (found[:, 1:] * found[:, :-1].conj()).sum(0).angle()[inside[1:] & inside[:-1]]
    assert float(steps.abs().max()) < 0.5


def test_a_phase_that_is_none_is_not_taken_over() -> None:
    images, inside = scene(SHAPE, noise=1e-3)
    any_phase = torch.polar(
        torch.ones(SHAPE), 6.3 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))
    )
    found, _ = both_maps(images * any_phase, inside)
    turn = (found * smooth_maps(SHAPE).conj()).sum(0)
    steps = (turn[1:] * turn[:-1].conj()).angle()[inside[1:] & inside[:-1]]
    assert float(steps.abs().max()) < 0.2


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("shape", [SHAPE, (48, 41)], ids=str)
def test_polynomials_are_better_than_the_centre_of_kspace(shape: tuple[int, int], noise: float) -> None:
    images, inside = scene(shape, noise=noise)
    found, walsh = both_maps(images, inside)
    true = smooth_maps(shape)
    y, x = places(shape)
    border = inside & ~((x / 0.28) ** 2 + (y / 0.35) ** 2 < 1)
    # Measured: half of it with the most noise, a hundredth without.
    assert distance(found, true, inside) < 0.7 * distance(walsh, true, inside)
    assert distance(found, true, border) < 0.7 * distance(walsh, true, border)


def test_only_every_other_pixel_of_a_large_object_is_looked_at() -> None:
    shape = (150, 141)
    images, inside = scene(shape, noise=0.01)
    start = smooth_maps(shape)
    assert int(inside.sum()) > 8000
    found = polynomial_maps(images, within(inside), start)
    other = images.clone()
    other[..., 1::2, :] = other[..., 1::2] = 1e3
    assert torch.equal(polynomial_maps(other, within(inside), start), found)
    assert distance(found, start, inside) < 0.01


def test_the_unit_of_the_images_does_not_matter() -> None:
    images, inside = scene((24, 31))
    found, walsh = both_maps(images, inside)
    for scale in (2.0**-60, 2.0**60):  # powers of two change no digit
        torch.testing.assert_close(
            polynomial_maps(scale * images, within(inside), walsh), found, rtol=0, atol=1e-6
        )


def test_where_the_start_says_nothing_the_polynomials_do() -> None:
    images, inside = scene((40, 31))
    _, walsh = both_maps(images, inside)
    half = walsh.clone()
    half[:, :, :12] = 0
    found = polynomial_maps(images, within(inside), half)
    assert float(overlap(found, smooth_maps((40, 31)), inside).min()) > 0.999


@pytest.mark.parametrize(
    "place",
    [(10, 8), (11, 9), (slice(5, 14), 9), (9, slice(4, 13)), (slice(9, 11), slice(8, 10))],
    ids=["even pixel", "odd pixel", "column", "row", "block"],
)
def test_the_smallest_objects_have_maps(place: tuple[slice | int, slice | int]) -> None:
    shape = (20, 17)
    images, _ = scene(shape)
    inside = torch.zeros(shape, dtype=torch.bool)
    inside[place] = True
    found, _ = both_maps(images, inside)
    # As far as noise of 1e-3 allows, and the prior for what so few pixels do not tell.
    assert float(overlap(found, smooth_maps(shape), inside).min()) > 0.99
    torch.testing.assert_close(torch.linalg.vector_norm(found, dim=0), inside.float(), rtol=0, atol=1e-6)


def test_nothing_comes_of_nothing() -> None:
    images, inside = scene((20, 17))
    walsh = maps_from_centre(images)
    none = torch.zeros_like(inside)
    assert float(polynomial_maps(images, within(none), walsh).abs().max()) == 0
    for start in (walsh, torch.zeros_like(walsh)):
        assert bool(torch.isfinite(polynomial_maps(0 * images, within(inside), start).abs()).all())


def test_one_coil_keeps_the_map_that_it_has() -> None:
    images, inside = scene((20, 17))
    one = smooth_maps((20, 17))[:1]
    assert torch.equal(polynomial_maps(images[:, :1], within(inside), one), one * inside)


# --- Maps from elsewhere --------------------------------------------------------------------------------


def test_maps_of_the_coils_become_those_of_virtual_ones() -> None:
    images, _ = scene((24, 31))
    matrix = torch.linalg.qr(complex_normal(C, 3, seed=1)).Q.mH.contiguous()  # (V, C)
    true = smooth_maps((24, 31))
    seen = torch.einsum("vc,kcyx->kvyx", matrix, images)
    two = torch.stack([torch.zeros_like(true), 3j * true])
    maps = ExternalMaps(two.numpy(), None, "here").on_slice(1, matrix, seen)
    expected = torch.einsum("vc,cyx->vyx", matrix, 1j * true)
    expected = expected / torch.linalg.vector_norm(expected, dim=0)
    torch.testing.assert_close(maps, expected)
    one = ExternalMaps(two[1:].numpy(), None, "here").on_slice(7, matrix, seen)
    torch.testing.assert_close(one, maps)
    with pytest.raises(ScanError, match="are 0 throughout slice 0"):
        ExternalMaps(two.numpy(), None, "here").on_slice(0, matrix, seen)
    with pytest.raises(ScanError, match="2 slices, and none for slice 2"):
        ExternalMaps(two.numpy(), None, "here").on_slice(2, matrix, seen)
    with pytest.raises(ScanError, match="have 4 coils, the scan has 5"):
        ExternalMaps(two[:, :4].numpy(), None, "here").on_slice(1, matrix, seen)


def test_another_matrix_covers_the_same_field_of_view() -> None:
    images, inside = scene((48, 62))
    maps = ExternalMaps(smooth_maps((24, 31))[None].numpy(), None, "here")
    found = maps.on_slice(0, torch.eye(C, dtype=torch.complex64), images)
    assert float(overlap(found, smooth_maps((48, 62)), inside).min()) > 0.999


def test_maps_by_a_body_coil() -> None:
    shape = (48, 62)
    images, inside = scene(shape, noise=1e-4)
    y, x = places(shape)
    object_phase = torch.polar(torch.ones(shape), 3 * x - 2 * y)
    images = images * object_phase
    body = (images[0].abs().square().sum(0).sqrt() * object_phase).to(torch.complex64)
    maps = ExternalMaps(None, body[None].numpy(), "here").on_slice(
        0, torch.eye(C, dtype=torch.complex64), images
    )
    assert float(overlap(maps, smooth_maps(shape), inside).median()) > 0.999
    # Relative to the body coil the object's phase is gone: what is left is that of the coils.
    turn = (maps * smooth_maps(shape).conj()).sum(0)[inside]
    assert float(turn.angle().abs().median()) < 0.05


Write = Callable[[Path], None]


def test_files(tmp_path: Path) -> None:
    csm = smooth_maps((12, 13)).numpy()
    np.save(tmp_path / "a.npy", csm)
    np.savez(tmp_path / "b.npz", csm=np.stack([csm, csm]), other=1)
    np.savez(tmp_path / "c.npz", body=csm[0])
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["csm"] = csm
    for name, shape in (("a.npy", (1, C, 12, 13)), ("b.npz", (2, C, 12, 13)), ("d.h5", (1, C, 12, 13))):
        found = read_external_maps(str(tmp_path / name))
        assert found.csm is not None
        assert (found.csm.shape, found.body) == (shape, None)
        # In a unit of its own (float32 rounding).
        np.testing.assert_allclose(found.csm[-1], csm / np.abs(csm).max(), rtol=1e-6)
    found = read_external_maps(str(tmp_path / "c.npz"))
    assert found.csm is None
    assert found.body is not None
    assert found.body.shape == (1, 12, 13)
    infinite = csm.copy()
    infinite[0, 0, 0] = np.nan
    for number, (values, says) in enumerate(
        (
            ({"one": csm, "two": csm}, "have one, two: expected an array csm"),
            ({"csm": csm, "body": csm[0]}, "expected an array csm"),
            ({"csm": csm[0]}, r"has shape \(12, 13\)"),
            ({"csm": infinite}, "not of finite numbers"),
            ({"csm": 0 * csm}, "is 0 throughout"),
            ({"csm": np.array([{}], dtype=object)}, "holds no arrays of numbers"),
        )
    ):
        path = tmp_path / f"{number}.npz"
        np.savez(path, **values)
        with pytest.raises(ScanError, match=says) as caught:
            read_external_maps(str(path))
        assert str(path) in str(caught.value)
    with pytest.raises(ScanError, match="cannot be read"):
        read_external_maps(str(tmp_path / "none.npy"))


@pytest.mark.parametrize("scale", [1e300, 1e30, 1.0, 1e-30], ids="{:g}".format)
@pytest.mark.parametrize("name", ["csm", "body"])
def test_the_unit_of_a_file_does_not_matter(tmp_path: Path, name: str, scale: float) -> None:
    images, inside = scene((24, 31), noise=0)
    true = smooth_maps((24, 31)).numpy().astype(np.complex128)
    values = true if name == "csm" else np.ones((24, 31))
    np.savez(tmp_path / "maps.npz", **{name: scale * values})
    maps = read_external_maps(str(tmp_path / "maps.npz")).on_slice(
        0, torch.eye(C, dtype=torch.complex64), images
    )
    np.testing.assert_allclose(torch.linalg.vector_norm(maps, dim=0)[inside], 1, rtol=1e-5)
    # By the body coil they are smoothed over 4 of 24 pixels.
    least = 0.9999 if name == "csm" else 0.95
    assert float(overlap(maps, smooth_maps((24, 31)), inside).min()) > least


# --- Scans ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lowrank", "inr"])
def test_a_scan_with_maps_from_a_file(scan: Scan, untouched: Result, tmp_path: Path, method: str) -> None:
    from whorl.simulation.phantoms import coil_maps

    fine = coil_maps(4, matrix=64, fov_mm=300.0, height_mm=0.0)
    true = fine.reshape(4, 64, -1, 64, fine.shape[-1] // 64).mean((2, 4))
    np.save(tmp_path / "csm.npy", true.astype(np.complex64))
    properties: dict[str, object] = {"method": method, "coil_maps_file": str(tmp_path / "csm.npy")}
    if method == "inr":
        properties.update(iterations=3)
    result = scan.copy().run(**properties)
    assert result.outcome.exit_code == 0
    if method == "lowrank":
        assert_close(result, untouched, share=0.8)  # aliasing combines otherwise
    other = scan.copy().run(**{**properties, "coil_maps_file": ""})
    assert not np.array_equal(result.of("T1").data, other.of("T1").data)
    np.save(tmp_path / "three.npy", true[:3].astype(np.complex64))
    with pytest.raises(ScanError, match=r"none\.npy cannot be read"):
        scan.run(coil_maps_file=str(tmp_path / "none.npy"))
    failed = scan.run(**{**properties, "coil_maps_file": str(tmp_path / "three.npy")})
    assert "have 3 coils, the scan has 4: expected the same" in "\n".join(failed.outcome.failures)


def test_espirit_is_used(scan: Scan, untouched: Result) -> None:
    result = scan.run(coil_maps="espirit")
    assert result.outcome.exit_code == 0
    assert not np.array_equal(result.of("M0").data, untouched.of("M0").data)
    assert_close(result, untouched, share=0.8)


def test_an_object_between_the_coils_has_maps() -> None:
    """The combination that is strongest in it is dark at some places, around which its phase turns."""
    true = torch.as_tensor(simulated_maps(8, matrix=80, fov_mm=300.0))[:, ::2, ::2].to(torch.complex64)
    true = true / torch.linalg.vector_norm(true, dim=0)
    y, x = places((80, 80))
    inside = (x.abs() < 0.47) & (y.abs() < 0.47)
    images = torch.stack([(1 + 0.3 * torch.sin(30 * x + k)) / (k + 1) for k in range(K)]) * inside
    coil_images = images[:, None] * true + 1e-3 * complex_normal(K, 8, 80, 80, seed=3)
    found = polynomial_maps(coil_images, within(inside), maps_from_centre(coil_images))
    # 0.020; 0.035 with the strongest combination as reference. What is left lies at the coils themselves.
    assert float((1 - overlap(found, true, inside)).mean()) < 0.025
