"""NUFFT back ends on a device that is not the CPU, with stand-ins for cuFINUFFT and CuPy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import pretend_nufft
from kspace.test_nufft import BACKENDS, SHAPES, random_complex, random_points
from pretend_device import PRETEND, transfers
from whorl.kspace.nufft import CufinufftNufft, Nufft, SigpyNufft, make_nufft


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_nufft.install(monkeypatch, "cufinufft", "cupy")


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_device_it_gives_what_it_gives_on_the_cpu(shape: tuple[int, int], backend: str) -> None:
    points, x, y = random_points(53), random_complex(3, *shape), random_complex(3, 53)
    wide, long = random_complex(2, *shape[::-1]), random_complex(53, 2)
    here = make_nufft(points, shape, backend=backend)
    there = make_nufft(points.to(PRETEND), shape, backend=backend)

    def transformed(nufft: Nufft, x: Tensor, y: Tensor, wide: Tensor, long: Tensor) -> list[Tensor]:
        images, samples = [x, x[:1], x.conj(), wide.mT], [y, y[:1], y.conj(), long.T]
        return [*map(nufft.forward, images), *map(nufft.adjoint, samples)]

    moved = [one.to(PRETEND) for one in (x, y, wide, long)]
    with transfers() as counted:
        results = transformed(there, *moved)
    assert counted.events == []
    # The stand-ins compute as the CPU's back ends do.
    for result, expected in zip(results, transformed(here, x, y, wide, long), strict=True):
        assert result.device == PRETEND
        assert torch.equal(result.cpu(), expected)


@pytest.mark.usefixtures("packages")
def test_several_threads_may_use_one_at_once_on_a_device() -> None:
    nufft = make_nufft(random_points(5000).to(PRETEND), (64, 48))
    ys = [random_complex(2, 5000, seed=n).to(PRETEND) for n in range(24)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(nufft.adjoint, ys))  # the stand-in for a plan refuses two threads at once


@pytest.mark.parametrize(
    ("there", "backend", "taken"),
    [
        (["cufinufft", "cupy"], "auto", CufinufftNufft),
        (["cufinufft"], "auto", CufinufftNufft),
        (["cupy"], "auto", SigpyNufft),
        (["cufinufft", "cupy"], "finufft", CufinufftNufft),
        (["cufinufft", "cupy"], "sigpy", SigpyNufft),
    ],
)
def test_what_serves_on_a_device(
    there: list[str], backend: str, taken: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_nufft.install(monkeypatch, *there)
    assert type(make_nufft(random_points(5).to(PRETEND), (8, 8), backend=backend)) is taken


@pytest.mark.parametrize(
    ("there", "backend", "missing"),
    [
        ([], "auto", "cufinufft: .*; cupy: "),
        (["cupy"], "finufft", "cufinufft"),
        (["cufinufft"], "sigpy", "cupy"),
    ],
)
def test_without_what_a_device_needs(
    there: list[str], backend: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_nufft.uninstall(monkeypatch)
    pretend_nufft.install(monkeypatch, *there)
    with pytest.raises(ImportError, match=rf"no NUFFT for the GPU \({missing}.*expected cuFINUFFT or CuPy"):
        make_nufft(random_points(5).to(PRETEND), (8, 8), backend=backend)
