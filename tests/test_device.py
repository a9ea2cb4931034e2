"""On a device that is not the CPU, without one: no mixed devices, no wait in a loop, the CPU's results.

What is the same code with the same numbers gives the same bits; elsewhere it is said why not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pretend_nufft
import whorl.pipeline.scan
from kspace.spirals import complex_normal, orthonormal_basis, rotated_spiral
from physics.test_dictionary import train_of
from pretend_device import PRETEND, Transfers, transfers
from pretend_scan import run_on_pretend_device
from scan_edit import QUANTITIES, Scan
from whorl.config import Settings
from whorl.kspace.accumulate import fold, fold_gram
from whorl.kspace.coilmaps import ExternalMaps, maps_from_centre, polynomial_maps, polynomials
from whorl.kspace.coils import compression_matrix, smooth
from whorl.kspace.density import attached_density, density_compensation
from whorl.kspace.nufft import make_nufft
from whorl.kspace.rovir import low_resolution_images, region_energies, rovir_matrix
from whorl.physics import search
from whorl.physics.dictionary import Dictionary, DictionaryParameters, build_dictionary
from whorl.physics.matching import match
from whorl.recon.corrected import conjugate_gradients
from whorl.recon.guide import guide
from whorl.recon.inr import fit_inr
from whorl.recon.lowrank import adjoint_coil_images
from whorl.recon.mask import box_around, object_mask, widen
from whorl.recon.normal import Kernel, Normal, Sampling, make_kernel
from whorl.scan.failure import ScanError
from whorl.simulation.scan import simulate

CPU = torch.device("cpu")
T, K, C, I, S = 40, 3, 4, 8, 60  # noqa: E741 - the field's letter
SHAPE = (30, 27)


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_nufft.install(monkeypatch, "cufinufft", "cupy")
    # On a CPU few atoms are compared with a voxel, on a device all of them: to rounding the same, see
    # tests/physics/test_search.py. Here both compare all.
    monkeypatch.setattr(search, "_search_blocks", search._search_all)


def moved(value: Any, device: torch.device) -> Any:
    """Whatever there is with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(one, device) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for one in value for tensor in tensors(one)]
    return tensors([getattr(value, f.name) for f in fields(value)]) if is_dataclass(value) else []


#: The refined match works on lots of other sizes on a device, whose ends other vector instructions compute;
#: where the way up ends is known to its own tolerance.
APART = 0.02


def same_on_both(work: Callable[..., Any], *inputs: Any, climbs: bool = False) -> Transfers:
    """Assert that work gives the same bits on the CPU and on the device, nearly so where it `climbs`; what it
    transferred there."""
    there = moved(inputs, PRETEND)
    with transfers() as counted:
        found = tensors(work(*there))
    expected = tensors(work(*inputs))
    assert expected
    for a, b in zip(found, expected, strict=True):
        assert a.device == PRETEND
        assert a.dtype == b.dtype
        if climbs:
            # Two maxima of a noisy voxel may be as high.
            assert float(torch.isclose(a.cpu(), b, rtol=APART, atol=1e-6).double().mean()) > 0.99
        else:
            assert torch.equal(a.cpu(), b)
    return counted


# --- Physics ----------------------------------------------------------------------------------------------


def parameters(b1_range: tuple[float, float] = (1.0, 1.0)) -> DictionaryParameters:
    return DictionaryParameters(train_of(T), step=0.3, b1_range=b1_range, b1_step=0.1, n_coefficients=5)


def test_a_dictionary() -> None:
    here, there = build_dictionary(parameters()), build_dictionary(parameters(), PRETEND)
    for a, b in ((there.basis, here.basis), (there.coefficients, here.coefficients)):
        assert a.device == PRETEND
        assert torch.equal(a.cpu(), b)
    assert there.kept == here.kept


def test_a_dictionary_with_a_transmit_field() -> None:
    here, there = (build_dictionary(parameters((0.9, 1.1)), device) for device in (CPU, PRETEND))
    # The rotations of a pulse are numbers in double precision where atoms share their B1, as on the CPU, else
    # tensors in single precision: eps for each of T pulses.
    for a, b in ((there.basis, here.basis), (there.coefficients, here.coefficients)):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=T * 1.2e-7 * float(b.abs().max()))


def voxels(dictionary: Dictionary, n: int = 400) -> Tensor:
    """`(V, K)` coefficients of atoms, with noise and a phase."""
    generator = torch.Generator().manual_seed(3)
    atoms = dictionary.coefficients[torch.randint(len(dictionary.coefficients), (n,), generator=generator)]
    noise = 0.03 * torch.linalg.vector_norm(atoms, dim=1, keepdim=True)
    turn = torch.polar(torch.ones(n, 1), 2 * math.pi * torch.rand((n, 1), generator=generator))
    return (atoms + noise * torch.randn(atoms.shape, generator=generator)) * turn


@pytest.mark.parametrize("refine", [True, False], ids=["refined", "on the grid"])
@pytest.mark.parametrize("b1", ["none", "known", "matched"])
def test_a_match(b1: str, refine: bool) -> None:
    dictionary = build_dictionary(parameters() if b1 == "none" else parameters((0.9, 1.1)))
    x = voxels(dictionary)
    x[7], x[8] = 0, math.nan
    inputs = [x, dictionary]
    if b1 == "known":
        inputs.append(torch.linspace(0.8, 1.2, len(x)))
    counted = same_on_both(
        lambda x, d, field=None: match(x, d, b1=field, refine=refine), *inputs, climbs=refine
    )
    # Between rounds of steps it asks who is not done; a known B1 chooses the voxels of each of its values.
    assert len(counted.waits) <= 10 * refine + 3 * (b1 == "known")


# --- k-space ----------------------------------------------------------------------------------------------


def test_folding() -> None:
    timepoint = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    kspace, basis = complex_normal(T, C, S), orthonormal_basis(T, K)

    def work(kspace: Tensor, timepoint: Tensor, interleaf: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        bins, gram = kspace.new_zeros((I, K, C, S)), kspace.new_zeros((I, K, K))
        fold(bins, kspace, timepoint, interleaf, basis)
        fold_gram(gram, timepoint, interleaf, basis)
        return bins, gram

    same_on_both(work, kspace, timepoint, 3 * timepoint % I, basis)


@pytest.mark.parametrize("warp", [0.0, 0.02], ids=["rotated spiral", "any trajectory"])
def test_density(warp: float) -> None:
    trajectory = rotated_spiral(I, S, 2)
    trajectory[1, :, 0] *= 1 - 10 * warp
    same_on_both(partial(density_compensation, shape=SHAPE), trajectory)
    same_on_both(attached_density, 3 * density_compensation(trajectory, SHAPE), trajectory)


@pytest.mark.parametrize("n_virtual", [0, 2])
def test_coil_compression(n_virtual: int) -> None:
    same_on_both(lambda block: compression_matrix(block, n_virtual, energy=0.9), complex_normal(20, C, S))


def test_compression_by_region() -> None:
    trajectory = rotated_spiral(I, 400, 10)
    y = complex_normal(I, C, 400) / (0.02 + torch.linalg.vector_norm(trajectory, dim=-1))[:, None]

    def work(kspace: Tensor, points: Tensor) -> Tensor:
        low = low_resolution_images(kspace, points, (60, 60))
        assert low is not None
        return rovir_matrix(*region_energies(low, (0.2, 0.7, 0.3, 0.8)), 2)

    same_on_both(work, y, trajectory)


def coil_images() -> Tensor:
    """`(K, C, Y, X)`, smooth."""
    return smooth(complex_normal(K, C, *SHAPE), 1.5) + 0.3


@pytest.mark.parametrize("method", ["walsh", "espirit"])
def test_coil_maps(method: str) -> None:
    counted = same_on_both(partial(maps_from_centre, method=method), coil_images())
    assert counted.waits == [] or method == "espirit"  # SigPy computes these on the CPU


def test_polynomial_coil_maps() -> None:
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[BOX] = True
    images = coil_images()

    def fitted(images: Tensor, mask: Tensor, start: Tensor) -> Tensor:
        return polynomial_maps(images, polynomials(mask), start)

    same_on_both(fitted, images, mask, maps_from_centre(images))
    basis = polynomials(mask.to(PRETEND))
    there = images.to(PRETEND)
    start = maps_from_centre(there)
    with transfers() as counted:
        polynomial_maps(there, basis, start)
    assert counted.waits == []  # it lies between the steps of the corrected start


@pytest.mark.parametrize("kind", ["csm", "body"])
def test_external_maps(kind: str) -> None:
    values = {"csm": complex_normal(1, C, 20, 18).numpy(), "body": complex_normal(1, 20, 18).abs().numpy()}
    maps = ExternalMaps(**{"csm": None, "body": None, kind: values[kind].astype(np.complex64)}, source="file")
    same_on_both(partial(maps.on_slice, 0), torch.eye(C, dtype=torch.complex64), coil_images())


# --- Reconstruction -----------------------------------------------------------------------------------------


def encoding() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gram matrices `(I, K, K)` of a real basis, weights, maps and trajectory `(I·S, 2)`."""
    basis = torch.linalg.qr(torch.randn((T, K), generator=torch.Generator().manual_seed(5))).Q
    gram = torch.zeros((I, K, K), dtype=torch.complex64)
    fold_gram(gram, torch.arange(T), 3 * torch.arange(T) % I, basis)
    trajectory = rotated_spiral(I, S, 2)
    dcf = density_compensation(trajectory, SHAPE).contiguous()
    return gram, dcf, maps_from_centre(coil_images()), trajectory.reshape(-1, 2)


BOX = (slice(2, 28), slice(3, 25))


def kernel_of(gram: Tensor, dcf: Tensor, trajectory: Tensor) -> Kernel:
    return make_kernel(Sampling(gram, dcf, trajectory, make_nufft(trajectory, SHAPE)), (26, 22))


def in_box() -> Tensor:
    return complex_normal(K, 26, 22, seed=2)


def test_the_normal_operator_transfers_nothing() -> None:
    def work(
        images: Tensor, gram: Tensor, dcf: Tensor, csm: Tensor, trajectory: Tensor
    ) -> tuple[Tensor, ...]:
        normal = Normal(kernel_of(gram, dcf, trajectory), csm[:, BOX[0], BOX[1]])
        with transfers() as counted:
            result = normal(images), normal.coil_images(images), normal.kernel.invert_roughly(images)
        assert counted.events == []
        return result

    same_on_both(work, in_box(), *encoding())


def test_conjugate_gradients_never_transfer() -> None:
    def work(
        right: Tensor, gram: Tensor, dcf: Tensor, csm: Tensor, trajectory: Tensor
    ) -> tuple[Tensor, Tensor]:
        normal = Normal(kernel_of(gram, dcf, trajectory), csm[:, BOX[0], BOX[1]])
        with transfers() as counted:
            result = conjugate_gradients(
                normal,
                right,
                torch.zeros_like(right),
                5,
                project=lambda x: x,
                precondition=normal.kernel.invert_roughly,
            )
        assert counted.events == []
        return result

    same_on_both(work, in_box(), *encoding())


@pytest.mark.parametrize("iterations", [0, 4])
def test_the_guide_and_the_fit(iterations: int) -> None:
    images, mask = in_box().real, torch.ones((26, 22), dtype=torch.bool)
    mask[0, :3] = False

    def work(images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        found = guide(images, mask)
        return found, fit_inr(images, mask, guide=found, iterations=iterations).coefficients

    same_on_both(work, images, mask)


def test_the_adjoint_transfers_nothing() -> None:
    _, dcf, _, trajectory = encoding()
    bins = complex_normal(I, K, C, S)

    def work(bins: Tensor, dcf: Tensor, trajectory: Tensor) -> Tensor:
        return adjoint_coil_images(bins, dcf, make_nufft(trajectory, SHAPE))

    assert same_on_both(work, bins, dcf, trajectory).events == []


def test_masks() -> None:
    y, x = (torch.linspace(-1, 1, n) for n in SHAPE)
    disc = ((y[:, None] ** 2 + x**2) < 0.5) + 0.02 * complex_normal(K, *SHAPE)
    energies = torch.tensor([1.0, 0.2, 0.02])
    same_on_both(object_mask, disc, energies)
    mask = object_mask(disc, energies)
    same_on_both(partial(widen, pixels=2), mask)
    there = mask.to(PRETEND)
    with transfers() as counted:
        assert box_around(there) == box_around(mask)
    assert len(counted.events) == 1


# --- Whole scans --------------------------------------------------------------------------------------------

#: Properties, and those that change the number of iterations.
METHODS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "lowrank": ({"method": "lowrank"}, [{}]),
    "llr": ({"method": "llr"}, [{"llr_iterations": 2}, {"llr_iterations": 5}]),
    "inr": ({"method": "inr"}, [{"correction_steps": 2}, {"correction_steps": 5}]),
    "inr, trained": ({"method": "inr", "guide": "off"}, [{"iterations": 3}, {"iterations": 7}]),
}


@pytest.fixture(scope="module")
def uneven_scan(tmp_path_factory: pytest.TempPathFactory) -> Scan:
    """Interleaves in sequential order: coil maps and phase are refined between steps of the correction."""
    path = tmp_path_factory.mktemp("uneven") / "scan.h5"
    simulate(path, phantom="nist", timepoints=120, interleaves=24, coils=4, matrix=64, order="sequential")
    return Scan.load(path)


def on_both(scan: Scan, **properties: Any) -> Transfers:
    """Assert that a scan gives the same maps on the CPU and on the device; what it transferred there."""
    here = scan.copy().run(**properties)
    there, counted = run_on_pretend_device(scan.copy(), **properties)
    assert there.outcome == here.outcome
    assert there.outcome.exit_code == 0
    for role in QUANTITIES:
        a, b = there.physical(role), here.physical(role)
        assert np.isclose(a, b, rtol=APART).mean() > 0.995
        assert np.median(np.abs(a - b)[b > 0] / b[b > 0]) < 1e-3
    assert (here.physical("T1") > 0).sum() > 1000
    return counted


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_scan_gives_the_maps_of_the_cpu_and_waits_in_no_loop(method: str, scan: Scan) -> None:
    properties, lengths = METHODS[method]
    waits = []
    for length in lengths:
        counted = on_both(scan, **properties, **length)
        # How often the match asks who is not done depends on the data.
        waits.append(Counter(event for event in counted.waits if not event.line.startswith("physics/")))
    grown = waits[-1] - waits[0]
    assert {event.operation for event in grown} <= ({"aten::_linalg_eigh"} if method == "llr" else set())


def test_an_uneven_order_gives_the_maps_of_the_cpu(uneven_scan: Scan) -> None:
    waits = []
    for n in (6, 12):
        counted = on_both(uneven_scan, method="inr", correction_steps=n)
        waits.append(Counter(event for event in counted.waits if not event.line.startswith("physics/")))
    # Neither a step waits, nor the coil maps that are fitted again after each third one.
    assert not waits[1] - waits[0]


# --- Which device it is -------------------------------------------------------------------------------------


def device_of(**properties: Any) -> tuple[torch.device, str]:
    return whorl.pipeline.scan.device_of(Settings.from_properties(properties))


def test_a_gpu_is_used_if_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of() == device_of(device="cuda") == (torch.device("cuda"), "")
    assert device_of(device="cpu") == (CPU, "")


def test_a_gpu_without_a_nufft_is_not_used_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, scan: Scan
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pretend_nufft.uninstall(monkeypatch)
    device, why = device_of()
    assert device == CPU
    assert "no NUFFT for the GPU" in why
    with pytest.raises(ScanError, match=r"device=cuda, but there is no NUFFT .*expected cuFINUFFT or CuPy"):
        device_of(device="cuda")
    result = scan.run()
    assert result.outcome.exit_code == 0
    assert "on the CPU: there is no NUFFT for the GPU" in result.said
