"""A slice's buffer: whichever way the readouts take, the sum over them is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kspace.spirals import complex_normal, orthonormal_basis
from whorl.kspace.coils import compression_matrix, whitening_matrix
from whorl.kspace.slicebuffer import (
    Compress,
    Interleaves,
    SliceBuffer,
    SubspaceKspace,
    digest,
)
from whorl.scan.readout import HEAD_DTYPE, Readout

T, K, C, S = 150, 3, 5, 9
CPU = torch.device("cpu")
#: timepoint and interleaf of each readout; interleaves grow, number 3 is never visited.
ORDER = [(t, min(t // 20, 6) + (1 if t // 20 >= 3 else 0)) for t in range(T - 11)]


def strongest(n_virtual: int) -> Compress:
    return lambda block, places: (compression_matrix(block, n_virtual), "")


def place(heads: NDArray[np.void]) -> NDArray[np.int64]:
    return heads["idx"]["repetition"].astype(np.int64) - 5


def readout(t: int, data: NDArray[np.complex64]) -> Readout:
    head = np.zeros((), dtype=HEAD_DTYPE)
    head["idx"]["repetition"] = t + 5
    return Readout(head[()], np.zeros((S, 2), dtype=np.float32), data)


def samples(t: int) -> NDArray[np.complex64]:
    return complex_normal(C, S, seed=1000 + t).numpy()


def naive(
    order: list[tuple[int, int]], basis: Tensor, matrix: Tensor
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    bins: dict[int, Tensor] = {}
    gram: dict[int, Tensor] = {}
    for t, i in order:
        u, y = basis[t], matrix @ torch.from_numpy(samples(t))
        bins[i] = bins.get(i, 0) + u.conj()[:, None, None] * y
        gram[i] = gram.get(i, 0) + u.conj()[:, None] * u
    return bins, gram


def check(result: SubspaceKspace, order: list[tuple[int, int]], basis: Tensor, matrix: Tensor) -> None:
    bins, gram = naive(order, basis, matrix)
    assert result.interleaves.tolist() == sorted(bins)
    assert result.bins.shape == (len(bins), K, len(matrix), S)
    # Sums of some twenty products in float32.
    for position, i in enumerate(sorted(bins)):
        torch.testing.assert_close(result.bins[position], bins[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(result.gram[position], gram[i], rtol=0, atol=1e-6)


def raw(buffer: SliceBuffer, basis: Tensor) -> Callable[[Any, int, int], None]:
    """Timepoints become known at the end only."""
    return lambda one, i, t: buffer.add(one, i, None, digest(one))


def folded(buffer: SliceBuffer, basis: Tensor) -> Callable[[Any, int, int], None]:
    """Timepoints are known from the start; each readout is followed by an attempt to fold."""

    def add(one: Readout, i: int, t: int) -> None:
        buffer.add(one, i, t, digest(one))
        buffer.fold(basis)

    return add


def midway(buffer: SliceBuffer, basis: Tensor) -> Callable[[Any, int, int], None]:
    """Timepoints become known after 70 readouts, in the middle of a block."""
    count = 0

    def add(one: Readout, i: int, t: int) -> None:
        nonlocal count
        buffer.add(one, i, None if count < 70 else t, digest(one))
        count += 1
        if count == 70:
            buffer.number_timepoints(place(buffer.heads))
        if count > 70 and count % 31 == 0:
            buffer.fold(basis)

    return add


PATHS = pytest.mark.parametrize("path", [raw, folded, midway])


def run(path: Any, order: list[tuple[int, int]], **options: Any) -> SubspaceKspace:
    """The readouts of some timepoints and interleaves; -1: no timepoint."""
    basis = orthonormal_basis(T, K)
    buffer = SliceBuffer(
        readout(0, samples(0)),
        options.get("whitening"),
        strongest(options.get("n_virtual", C)),
        CPU,
    )
    add = path(buffer, basis)
    for t, i in order:
        data = samples(t)
        add(readout(t, data), i, t)
        data[:] = np.nan  # the memory of a receive buffer: what it holds later does not count
    assert path is not raw or buffer.n_waiting == len(order)
    if buffer.n_waiting:
        buffer.number_timepoints(place(buffer.heads))
    assert buffer.n_waiting == 0
    return buffer.finish(basis)


def first_block_matrix(whitening: Tensor | None, n_virtual: int) -> Tensor:
    """Compression is decided by the first 64 readouts."""
    block = torch.from_numpy(np.stack([samples(t) for t, _ in ORDER[:64]]))
    white = block if whitening is None else whitening @ block
    compression = compression_matrix(white, n_virtual)
    return compression if whitening is None else compression @ whitening


@PATHS
@pytest.mark.parametrize("count", [1, 63, 64, 65, 128, len(ORDER)])
def test_all_ways_give_the_sum_over_readouts(path: Any, count: int) -> None:
    order = ORDER[:count]
    result = run(path, order)
    block = torch.from_numpy(np.stack([samples(t) for t, _ in order[:64]]))
    check(result, order, orthonormal_basis(T, K), compression_matrix(block, C))


@PATHS
@pytest.mark.parametrize("n_virtual", [2, 0], ids=["two coils", "by energy"])
def test_coils_are_whitened_then_compressed(path: Any, n_virtual: int) -> None:
    mixing = complex_normal(C, 3 * C, seed=5)
    whitening = whitening_matrix(mixing @ mixing.conj().T)
    matrix = first_block_matrix(whitening, n_virtual)
    assert len(matrix) == 2 or n_virtual == 0
    result = run(path, ORDER, whitening=whitening, n_virtual=n_virtual)
    check(result, ORDER, orthonormal_basis(T, K), matrix)


def test_what_has_no_timepoint_is_not_used() -> None:
    order = [*ORDER[:100], (-1, 7), *ORDER[100:], (-1, 2)]
    check(run(raw, order), ORDER, orthonormal_basis(T, K), first_block_matrix(None, C))


@pytest.mark.parametrize("count", [70, 64, 30])
def test_parts_are_as_if_each_had_come_alone(count: int) -> None:
    # Of two repetitions that came as one, with the compression that the first readouts chose.
    first, second = ORDER[:count], ORDER[20 : 20 + count]
    buffer = SliceBuffer(readout(0, samples(0)), None, strongest(3), CPU)
    turns = [*first, *second]
    for t, i in turns:
        buffer.add(readout(t, samples(t)), i, None, digest(readout(t, samples(t))))
    whole = torch.from_numpy(np.stack([samples(t) for t, _ in turns[:64]]))
    parts = buffer.divide(np.repeat([0, 1], [count, count]))
    basis = orthonormal_basis(T, K)
    for part, order in zip(parts, (first, second), strict=True):
        assert part.n_arrived == count
        assert part.head["idx"]["repetition"] == order[0][0] + 5
        part.number_timepoints(place(part.heads))
        result = part.finish(basis)
        check(result, order, basis, compression_matrix(whole, 3))


def test_interleaves_may_be_told_with_the_timepoints() -> None:
    buffer = SliceBuffer(readout(0, samples(0)), None, strongest(C), CPU)
    basis = orthonormal_basis(T, K)
    for t, _ in ORDER[:70]:
        buffer.add(readout(t, samples(t)), 0, None, t)
    buffer.number_timepoints(place(buffer.heads), np.array([i for _, i in ORDER[:70]]))
    for t, i in ORDER[70:]:
        buffer.add(readout(t, samples(t)), i, t, t)
    check(buffer.finish(basis), ORDER, basis, first_block_matrix(None, C))


@pytest.mark.parametrize("path", [raw, folded])
def test_the_receiver_is_brought_into_the_frame_of_the_signal(path: Any) -> None:
    # With data y exp(-i delta) of a receiver that is off by delta, the factors exp(i delta) give those of y.
    basis, buffer = (
        orthonormal_basis(T, K),
        SliceBuffer(readout(0, samples(0)), None, strongest(C), CPU),
    )
    delta = np.random.default_rng(2).uniform(-3, 3, T)
    for t, i in ORDER:
        off = samples(t) * np.complex64(np.exp(-1j * delta[t]))
        buffer.add(readout(t, off), i, None if path is raw else t, t)
        if path is folded:
            buffer.fold(basis, torch.from_numpy(np.exp(1j * delta)).to(torch.complex64))
    if path is raw:
        buffer.number_timepoints(place(buffer.heads))
    result = buffer.finish(basis, torch.from_numpy(np.exp(1j * delta)).to(torch.complex64))
    # Virtual coils do not depend on the phase of a readout.
    check(result, ORDER, basis, first_block_matrix(None, C))


def test_data_are_turned_by_interleaf_and_sample() -> None:
    result = run(folded, ORDER)
    phase = torch.from_numpy(np.random.default_rng(3).uniform(-9, 9, (len(result.interleaves), S))).float()
    turned = result.turned(phase)
    factor = torch.exp(1j * phase)
    torch.testing.assert_close(turned.bins, torch.einsum("ikcs,is->ikcs", result.bins, factor))
    assert torch.equal(turned.gram, result.gram)


@PATHS
@pytest.mark.parametrize("dead", [False, True], ids=["all alive", "one dead"])
def test_the_matrix_of_all_readouts_is_handed_over(path: Any, dead: bool) -> None:
    mixing = complex_normal(C, 3 * C, seed=5)
    if dead:
        mixing[2] = 0
    whitening = whitening_matrix(mixing @ mixing.conj().T)
    result = run(path, ORDER, whitening=whitening, n_virtual=3)
    torch.testing.assert_close(result.matrix, first_block_matrix(whitening, 3))
    assert result.matrix.shape == (3, C)
    assert bool((result.matrix[:, 2] == 0).all()) == dead
    check(result, ORDER, orthonormal_basis(T, K), result.matrix)


@pytest.mark.parametrize(("block", "chosen"), [(64, 64), (100, 100), (500, len(ORDER))])
def test_who_chooses_the_coils_gets_the_first_block_and_its_trajectories(block: int, chosen: int) -> None:
    calls: list[tuple[Tensor, NDArray[np.float32]]] = []
    own = complex_normal(2, C, seed=9)

    def compress(first: Tensor, places: Callable[[], NDArray[np.float32]]) -> tuple[Tensor, str]:
        calls.append((first.clone(), places()))
        return own, "not as asked for"

    basis = orthonormal_basis(T, K)
    buffer = SliceBuffer(readout(0, samples(0)), None, compress, CPU, block=block)
    for t, i in ORDER:
        trajectory = np.full((S, 2), i, np.float32)
        one = Readout(readout(t, samples(t)).head, trajectory, samples(t))
        buffer.add(one, buffer.interleaves.number(trajectory), t, t)
        buffer.fold(basis)
    result = buffer.finish(basis)
    ((first, trajectories),) = calls
    assert torch.equal(first, torch.from_numpy(np.stack([samples(t) for t, _ in ORDER[:chosen]])))
    assert trajectories.shape == (chosen, S, 2)
    assert trajectories[:, 0, 0].tolist() == [i for _, i in ORDER[:chosen]]
    assert (result.note, result.scaled(2).note) == ("not as asked for",) * 2
    assert torch.equal(result.matrix, own)


def test_interleaves_are_told_apart_by_their_places() -> None:
    interleaves = Interleaves()
    first, second = np.zeros((4, 2), np.float32), np.ones((4, 2), np.float32)
    assert [interleaves.number(x) for x in (first, second, first.copy(), second)] == [0, 1, 0, 1]
    second[:] = 7  # memory that is used again
    assert len(interleaves) == 2
    np.testing.assert_array_equal(
        interleaves.stack(np.array([1, 0, 1])), np.stack([np.ones((4, 2)), first, np.ones((4, 2))])
    )


def test_interleaves_that_differ_by_rounding_are_one() -> None:
    interleaves = Interleaves()
    turns = [np.exp(2j * np.pi * i / 7) for i in range(7)]
    arm = np.linspace(0, 0.5, 40) * np.exp(1j * np.linspace(0, 5, 40))
    for visit in range(3):
        for i, turn in enumerate(turns):
            # Computed anew, with an error of some units in the last place.
            k = arm * turn * np.exp(1e-7j * visit)
            trajectory = np.stack([k.real, k.imag], axis=1).astype(np.float32)
            assert interleaves.number(trajectory) == i
    assert len(interleaves) == 7
    k = arm * np.exp(1e-3j)
    assert interleaves.number(np.stack([k.real, k.imag], axis=1).astype(np.float32)) == 7


ARRIVALS = pytest.mark.parametrize("arrival", ["in order", "reversed", "shuffled"])


@PATHS
@ARRIVALS
def test_readouts_may_come_in_any_order(path: Any, arrival: str) -> None:
    order = list(ORDER)
    if arrival == "reversed":
        order.reverse()
    elif arrival == "shuffled":
        order = [order[n] for n in np.random.default_rng(1).permutation(len(order))]
    matrix = compression_matrix(torch.from_numpy(np.stack([samples(t) for t, _ in order[:64]])), C)
    check(run(path, order), order, orthonormal_basis(T, K), matrix)


def test_another_unit_is_that_of_all() -> None:
    result = run(folded, ORDER)
    scaled = result.scaled(1 / 4)
    assert torch.equal(scaled.bins * 4, result.bins)
    assert torch.equal(scaled.gram, result.gram)
