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
from whorl.kspace.slicebuffer import Interleaves, SliceBuffer, SubspaceKspace
from whorl.scan.integrity import Tally
from whorl.scan.readout import HEAD_DTYPE, Readout

T, K, C, S = 150, 3, 5, 9
CPU = torch.device("cpu")
#: timepoint and interleaf of each readout; interleaves grow, number 3 is never visited.
ORDER = [(t, min(t // 20, 6) + (1 if t // 20 >= 3 else 0)) for t in range(T - 11)]


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


def raw(buffer: SliceBuffer, tally: Tally, basis: Tensor) -> Callable[[Any, int], None]:
    """Timepoints become known at the end only."""
    return lambda one, i: buffer.add(one, i, tally)


def folded(buffer: SliceBuffer, tally: Tally, basis: Tensor) -> Callable[[Any, int], None]:
    """Timepoints are known from the start; each readout is followed by an attempt to fold."""
    buffer.number_timepoints(place, T, tally)

    def add(one: Readout, i: int) -> None:
        buffer.add(one, i, tally)
        buffer.fold(basis)

    return add


def midway(buffer: SliceBuffer, tally: Tally, basis: Tensor) -> Callable[[Any, int], None]:
    """Timepoints become known after 70 readouts, in the middle of a block."""
    count = 0

    def add(one: Readout, i: int) -> None:
        nonlocal count
        buffer.add(one, i, tally)
        count += 1
        if count == 70:
            buffer.number_timepoints(place, T, tally)
        if count > 70 and count % 31 == 0:
            buffer.fold(basis)

    return add


PATHS = pytest.mark.parametrize("path", [raw, folded, midway])


def run(
    path: Any, sequence: list[Readout], numbers: list[int], **options: Any
) -> tuple[SubspaceKspace, Tally]:
    tally, basis = Tally(), orthonormal_basis(T, K)
    buffer = SliceBuffer(sequence[0], options.get("whitening"), options.get("n_virtual", C), CPU)
    add = path(buffer, tally, basis)
    for one, i in zip(sequence, numbers, strict=True):
        reused = one.data.copy()  # the memory of a receive buffer: what it holds later does not count
        add(Readout(one.head, one.trajectory, reused), i)
        reused[:] = np.nan
    assert path is not raw or buffer.n_waiting == len(sequence)
    if buffer.n_waiting:
        buffer.number_timepoints(place, T, tally)
    assert buffer.n_waiting == 0
    return buffer.finish(basis), tally


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
    result, tally = run(path, [readout(t, samples(t)) for t, _ in order], [i for _, i in order])
    block = torch.from_numpy(np.stack([samples(t) for t, _ in order[:64]]))
    check(result, order, orthonormal_basis(T, K), compression_matrix(block, C))
    assert not tally


@PATHS
@pytest.mark.parametrize("n_virtual", [2, 0], ids=["two coils", "by energy"])
def test_coils_are_whitened_then_compressed(path: Any, n_virtual: int) -> None:
    mixing = complex_normal(C, 3 * C, seed=5)
    whitening = whitening_matrix(mixing @ mixing.conj().T)
    matrix = first_block_matrix(whitening, n_virtual)
    assert len(matrix) == 2 or n_virtual == 0
    result, _ = run(
        path,
        [readout(t, samples(t)) for t, _ in ORDER],
        [i for _, i in ORDER],
        whitening=whitening,
        n_virtual=n_virtual,
    )
    check(result, ORDER, orthonormal_basis(T, K), matrix)


@PATHS
def test_of_duplicates_the_first_counts_and_strangers_are_dropped(path: Any) -> None:
    sequence, numbers = [readout(t, samples(t)) for t, _ in ORDER], [i for _, i in ORDER]
    for where, one in (
        (130, readout(2, samples(2))),  # the same again, long after the first was folded
        (110, readout(90, samples(3))),  # other data
        (100, readout(T, samples(4))),  # behind the train
        (95, readout(-1, samples(5))),  # before it
        (91, readout(90, samples(90))),  # the same again, at once
    ):
        sequence.insert(where, one)
        numbers.insert(where, 7)
    result, tally = run(path, sequence, numbers)
    check(result, ORDER, orthonormal_basis(T, K), first_block_matrix(None, C))
    assert tally == {
        "came twice": 2,
        "came again with other data; the first one counts": 1,
        "with a timepoint outside the train were dropped": 2,
    }


def test_distinct_timepoints_are_counted() -> None:
    tally = Tally()
    buffer = SliceBuffer(readout(0, samples(0)), None, C, CPU)
    buffer.number_timepoints(place, T, tally)
    for t in (4, 9, 4, 2, 9, T + 3):
        buffer.add(readout(t, samples(t)), 0, tally)
    assert buffer.n_seen == 3


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
