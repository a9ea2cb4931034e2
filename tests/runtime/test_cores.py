"""Pieces of work on cores: in order, one thread each, and the same bits however many there are."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from whorl.runtime.cores import cores, limit_this_thread, one_thread, pieces, spread

N = 3


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    """More than the machine may have: what is tested does not depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(N)
    yield
    torch.set_num_threads(before)


def in_a_thread(work: object) -> object:
    """What a function gives in a thread of its own."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(work()))  # type: ignore[operator]
    thread.start()
    thread.join()
    return found[0]


def test_results_come_in_the_order_of_their_pieces() -> None:
    def work(piece: int) -> int:
        time.sleep(0.002 * (5 - piece % 5))  # later ones are ready first
        return piece * piece

    assert spread(work, range(20)) == [n * n for n in range(20)]
    assert spread(work, [7]) == [49]
    assert spread(work, []) == []


def test_as_many_pieces_at_a_time_as_there_are_cores() -> None:
    meeting = threading.Barrier(N)
    # Each waits for two others: with fewer at a time nobody would ever go on.
    names = spread(lambda piece: (meeting.wait(10), threading.current_thread().name)[1], range(2 * N))
    assert len(set(names)) == N
    assert all(name.startswith("shared-core") for name in names)
    running, most, lock = 0, 0, threading.Lock()

    def count(piece: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1

    spread(count, range(4 * N))
    assert most == N


@pytest.mark.parametrize("n", [1, 2, 10])
def test_within_a_piece_there_is_one_thread(n: int) -> None:
    assert spread(lambda piece: torch.get_num_threads(), range(n)) == [1] * n
    assert torch.get_num_threads() == N  # and outside as many as before


def test_pieces_of_pieces_run_one_after_the_other_in_the_same_thread() -> None:
    def inner(piece: int) -> tuple[str, int]:
        return threading.current_thread().name, torch.get_num_threads()

    def outer(piece: int) -> tuple[str, list[tuple[str, int]], int]:
        return threading.current_thread().name, spread(inner, range(4)), cores()

    for name, found, n in spread(outer, range(8)):
        assert found == [(name, 1)] * 4
        assert n == 1


@pytest.mark.parametrize("n", [1, 6])
def test_what_a_piece_raises_is_raised(n: int) -> None:
    def work(piece: int) -> int:
        if piece == n - 1:
            raise KeyError(f"piece {piece}")
        return piece

    with pytest.raises(KeyError, match=f"piece {n - 1}"):
        spread(work, range(n))
    # The pool is as good as before.
    assert spread(lambda piece: piece, range(6)) == list(range(6))
    assert torch.get_num_threads() == N


def test_gradients_are_not_recorded() -> None:
    weight = torch.ones(3, requires_grad=True)
    for n in (1, 4):
        assert not any(result.requires_grad for result in spread(lambda piece: 2 * weight, range(n)))
    assert torch.is_grad_enabled()


def test_one_thread_is_a_limit_for_pytorch_and_none_for_pieces() -> None:
    assert cores() == N
    with one_thread():
        assert torch.get_num_threads() == 1
        assert cores() == N
        names = set(spread(lambda piece: (time.sleep(0.02), threading.current_thread().name)[1], range(9)))
        assert len(names) == N
        with one_thread():
            assert (torch.get_num_threads(), cores()) == (1, N)
        assert (torch.get_num_threads(), cores()) == (1, N)
    assert (torch.get_num_threads(), cores()) == (N, N)
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert (torch.get_num_threads(), cores()) == (N, N)


def test_the_limit_is_that_of_its_thread() -> None:
    with one_thread():
        # Another thread has what PyTorch gives to any.
        assert in_a_thread(torch.get_num_threads) == N
        assert torch.get_num_threads() == 1

    def limited() -> tuple[int, int]:
        torch.set_num_threads(N)
        limit_this_thread()
        return torch.get_num_threads(), cores()

    assert in_a_thread(limited) == (1, N)
    assert torch.get_num_threads() == N


def test_several_threads_may_spread_at_once() -> None:
    def busy() -> list[int]:
        torch.set_num_threads(N)
        return spread(lambda piece: (time.sleep(0.001), piece)[1], range(40))

    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(busy())) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [list(range(40))] * 5


@pytest.mark.parametrize(("n", "size"), [(0, 4), (1, 4), (8, 4), (9, 4), (3, 1)])
def test_pieces_cover_all_once(n: int, size: int) -> None:
    found = pieces(n, size, torch.device("cpu"))
    assert [k for some in found for k in range(n)[some]] == list(range(n))
    assert all(0 < some.stop - some.start <= size for some in found)
    # On an accelerator all at once: it has cores of its own.
    assert pieces(n, size, torch.device("meta")) == ([slice(0, n)] if n else [])


# --- The same bits ----------------------------------------------------------------------------------------

#: What a slice's reconstruction is made of; prints a digest of each result.
_RUN = """
import hashlib, sys

from whorl.cohort.work import prepare

prepare(int(sys.argv[1]), (), "")
import torch

assert torch.get_num_threads() == int(sys.argv[1])

from whorl.kspace.coilmaps import maps_from_centre, polynomial_maps, polynomials
from whorl.kspace.nufft import make_nufft
from whorl.recon.guide import guide, joint_bilateral
from whorl.recon.inr import fit_inr
from whorl.recon.normal import Sampling, make_kernel
from whorl.runtime.cores import cores, one_thread

def show(name, *tensors):
    digest = hashlib.sha256(b"".join(t.resolve_conj().contiguous().numpy().tobytes() for t in tensors))
    print(name, digest.hexdigest())

generator = torch.Generator().manual_seed(1)
def noise(*shape, dtype=torch.complex64):
    return torch.randn(shape, generator=generator, dtype=dtype)

K, C, I, S, shape = 5, 4, 16, 300, (90, 84)
root = noise(I, K, K)
points = torch.rand((I * S, 2), generator=generator) - 0.5
y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
mask = y * y + x * x < 0.9
images = noise(K, *shape, dtype=torch.float32) + 3 * (x > 0.1)
maps = torch.polar(1 + 0.3 * y * noise(C, 1, 1).real, x * noise(C, 1, 1).real)

with one_thread():
    assert cores() == int(sys.argv[1])
    for name, gram in (("real", (root @ root.mH).real + 0j), ("complex", root @ root.mH)):
        nufft = make_nufft(points, shape)
        dcf = torch.full((I, S), 1.0 / S)
        kernel = make_kernel(Sampling(gram, dcf, points, nufft), shape)
        show(name + " kernel", kernel.spectrum, kernel.inverse)
        show(name + " convolve", kernel.convolve(noise(C, K, *shape)))
        show(name + " invert_roughly", kernel.invert_roughly(noise(K, *shape)))
    show("joint_bilateral", *joint_bilateral(images, images, torch.ones(shape), mask, 6.0))
    guided = guide(images, mask)
    show("guide", guided)
    coil_images = images[:3, None] * maps * mask + 0.05 * noise(3, C, *shape)
    show("polynomial_maps", polynomial_maps(coil_images, polynomials(mask), maps_from_centre(coil_images)))
    for options in ({"guide": guided}, {"guide": guided, "iterations": 3}, {"iterations": 3},
                    {"iterations": 3, "encoder": "hash"}, {"iterations": 3, "fit": "adam"}):
        fit = fit_inr(images, mask, **options)
        show("fit_inr " + str(sorted(options)), fit.coefficients, fit.features)
"""


def digests(threads: int) -> dict[str, str]:
    run = subprocess.run(
        [sys.executable, "-c", _RUN, str(threads)],
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = dict(line.rsplit(" ", 1) for line in run.stdout.splitlines())
    assert len(found) == 14
    return found


def test_the_same_bits_with_one_thread_and_with_two() -> None:
    one = digests(1)
    assert len(set(one.values())) == len(one)  # each is a result of its own
    assert digests(2) == one
