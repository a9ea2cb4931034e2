"""Independent pieces of work, one core each.

Within a piece PyTorch uses one thread. Small operations that are each shared by all cores make the cores wait
for each other thousands of times, and for long as soon as anything else runs on the machine: an
eigendecomposition of 20 ms was seen to take 7 s. And what one thread adds up does not depend on how many
there are: pieces that do not depend on the number of cores give the same bits on any number of them.

How many cores there are is told by ``OMP_NUM_THREADS``, not by ``torch.set_num_threads``: that would give MKL
a number of its own, which these limits do not reach.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController

_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")

#: Of each thread: how many cores it may hand pieces to, while it is limited to one itself.
_lent = threading.local()


@cache
def _libraries() -> ThreadpoolController:
    torch.get_num_threads()  # settles PyTorch's own default, which would undo a limit later
    return ThreadpoolController()


@cache
def _pool(cores: int) -> ThreadPoolExecutor:
    def alone() -> None:
        torch.get_num_threads()
        _libraries().limit(limits=1, user_api="openmp")
        _lent.cores = 1

    return ThreadPoolExecutor(cores, "shared-core", initializer=alone)


def cores() -> int:
    """Cores that this thread may use."""
    return int(getattr(_lent, "cores", 0)) or torch.get_num_threads()


def limit_this_thread() -> None:
    """PyTorch uses one thread in this thread from now on; `spread` still uses all cores."""
    _lent.cores = cores()
    _libraries().limit(limits=1, user_api="openmp")


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch uses one thread here; `spread` still uses all cores that there were."""
    before = getattr(_lent, "cores", 0)
    _lent.cores = cores()
    with _libraries().limit(limits=1, user_api="openmp"):
        try:
            yield
        finally:
            _lent.cores = before


def spread(work: Callable[[_Piece], _Result], pieces: Sequence[_Piece]) -> list[_Result]:
    """Results of `work` for each piece, in their order; as many pieces at a time as there are cores.

    Gradients are not recorded. Pieces of pieces run one after the other.
    """

    def run(piece: _Piece) -> _Result:
        with torch.no_grad():  # the gradient mode belongs to a thread
            return work(piece)

    n = min(cores(), len(pieces))
    if n > 1:
        return list(_pool(cores()).map(run, pieces))
    with one_thread():
        return [run(piece) for piece in pieces]


def pieces(n: int, size: int, device: torch.device) -> list[slice]:
    """Slices of at most `size` of n things for `spread`; all at once on anything but a CPU."""
    size = size if device.type == "cpu" else max(n, 1)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
