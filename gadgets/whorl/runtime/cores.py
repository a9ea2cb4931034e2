"""Independent pieces of work, one core each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")


def _one_thread() -> None:
    torch.get_num_threads()  # settles the thread's own default, which would undo the limit later
    threadpool_limits(1, user_api="openmp")


def spread(work: Callable[[_Piece], _Result], pieces: Sequence[_Piece]) -> list[_Result]:
    """Results of `work` for each piece, in their order; as many pieces at a time as there are cores.

    Within a piece PyTorch uses one thread. Small operations that are each shared by all cores make the cores
    wait for each other thousands of times, and for long as soon as anything else runs on the machine: an
    eigendecomposition of 20 ms was seen to take 7 s. Gradients are not recorded.
    """

    def run(piece: _Piece) -> _Result:
        with torch.no_grad():  # the gradient mode belongs to a thread
            return work(piece)

    workers = max(1, min(torch.get_num_threads(), len(pieces)))
    with ThreadPoolExecutor(workers, "whorl-core", initializer=_one_thread) as pool:
        return list(pool.map(run, pieces))
