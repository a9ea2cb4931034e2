"""Memory grows with the slices that are open, never with those that are done: the sender has to wait."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ismrmrd
import pytest

import whorl.pipeline.scan
from scan_edit import Scan
from whorl.config import Settings
from whorl.kspace.slicebuffer import SliceBuffer
from whorl.pipeline.scan import Outcome, reconstruct_scan
from whorl.pipeline.slices import SliceResult
from whorl.scan.failure import ScanError
from whorl.scan.readout import Readout

#: Slices in all, and what a reader may have taken while none can be sent: two that are handed over, one
#: that is complete and waits, and what the vote over the first readouts holds back of the next.
N_SLICES, AHEAD = 8, 3


@pytest.fixture
def long(scan: Scan) -> Scan:
    """The tiny slice eight times."""
    return scan.slices(N_SLICES)


def in_time(work: Callable[[], Any]) -> Any:
    """What a function returns or raises; a failed test, not one that hangs, if it never does."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert found, "it waits for ever"
    return found[0]


def until(reached: Callable[[], bool]) -> bool:
    end = time.monotonic() + 30
    while not reached() and time.monotonic() < end:
        time.sleep(0.01)
    return reached()


def reconstruct(
    scan: Scan, send: Callable[[ismrmrd.Image], None], readouts: Iterator[Readout] | None = None, **more: Any
) -> Outcome:
    settings = Settings.from_properties({**scan.settings, "n_coefficients": 3})
    return reconstruct_scan(scan.header, readouts or scan.readouts(), settings, send, **more)


@pytest.mark.parametrize("lost", [[], [50]], ids=["complete", "one lost in each"])
def test_no_readouts_are_taken_while_slices_cannot_be_sent(long: Scan, lost: list[int]) -> None:
    long.without([n for n in range(4, len(long.heads)) if (n - 4) % 120 in lost])
    T = 120 - len(lost)
    taken: list[int] = []
    let_go, images = threading.Event(), []

    def readouts() -> Iterator[Readout]:
        for readout in long.readouts():
            taken.append(int(readout.head["idx"]["slice"]))
            yield readout

    def send(image: ismrmrd.Image) -> None:
        let_go.wait(60)
        images.append(image)

    outcomes: list[Outcome] = []
    thread = threading.Thread(
        target=lambda: outcomes.append(reconstruct(long, send, readouts())), daemon=True
    )
    thread.start()
    try:
        assert until(lambda: len(taken) >= 4 + AHEAD * T)
        # It would go on at once if it did: all readouts lie in memory.
        time.sleep(0.5)
        assert len(taken) <= 4 + AHEAD * T + 2
        assert not images
    finally:
        let_go.set()
        thread.join(60)
    assert outcomes[0].delivered == len(images) == 4 * N_SLICES
    assert [int(image.slice) for image in images[::4]] == list(range(N_SLICES))


def alive(kind: type) -> int:
    return sum(type(thing) is kind for thing in gc.get_objects())


def test_nothing_of_a_slice_is_kept_when_it_is_sent(long: Scan) -> None:
    images: list[ismrmrd.Image] = []
    counts: list[tuple[int, int]] = []

    def readouts() -> Iterator[Readout]:
        for n, readout in enumerate(long.readouts()):
            if n > 4 and (n - 4) % 120 == 60:
                sent = 4 * ((n - 4) // 120)
                assert until(lambda sent=sent: len(images) == sent)
                # The thread may still be on its way out.
                until(lambda: (alive(SliceBuffer), alive(SliceResult)) == (1, 0))
                counts.append((alive(SliceBuffer), alive(SliceResult)))
            yield readout

    gc.collect()
    gc.disable()  # what a cycle keeps would count
    try:
        outcome = in_time(lambda: reconstruct(long, images.append, readouts()))
    finally:
        gc.enable()
    assert outcome.delivered == 4 * N_SLICES
    assert counts == [(1, 0)] * N_SLICES


# --- No slice is waited for in vain -------------------------------------------------------------------------


def test_a_receiver_that_is_gone(long: Scan) -> None:
    def send(_: ismrmrd.Image) -> None:
        raise BrokenPipeError("the client is gone")

    outcome = in_time(lambda: reconstruct(long, send))
    assert outcome.failures == tuple(f"slice {n} failed: the client is gone" for n in range(N_SLICES))


def test_a_dictionary_that_is_never_there(long: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        time.sleep(0.2)  # the first slices are handed over by then
        raise ValueError("no such physics")

    monkeypatch.setattr(whorl.pipeline.scan, "get_dictionary", fail)
    result = in_time(lambda: reconstruct(long, lambda image: None))
    failures = (str(result),) if isinstance(result, ScanError) else result.failures
    assert all("no such physics" in text for text in failures)
    assert failures


def test_a_scan_that_is_stopped_on_the_way(long: Scan) -> None:
    images: list[ismrmrd.Image] = []

    def readouts() -> Iterator[Readout]:
        for n, readout in enumerate(long.readouts()):
            if n > 4 + 4 * 120:
                readout.head["user_int"][5] += 1000  # another train
            yield readout

    outcome = in_time(lambda: reconstruct(long, images.append, readouts()))
    assert outcome.delivered == len(images) == 16
    assert any("disagree on flip_deg" in text for text in outcome.failures)


def test_a_source_that_fails(long: Scan) -> None:
    images: list[ismrmrd.Image] = []

    def readouts() -> Iterator[Readout]:
        for n, readout in enumerate(long.readouts()):
            if n == 4 + 5 * 120 + 7:
                raise ZeroDivisionError("a fault of the program")
            yield readout

    error = in_time(lambda: reconstruct(long, images.append, readouts()))
    assert isinstance(error, ZeroDivisionError)


# --- Memory -------------------------------------------------------------------------------------------------

_MEASURE = """
import re, sys, time
from pathlib import Path
import numpy as np
from whorl.config import Settings
from whorl.doors.files import read_header, read_readouts
from whorl.pipeline.scan import reconstruct_scan
from whorl.scan.readout import Readout

path, n_slices = sys.argv[1], int(sys.argv[2])
one = [Readout(r.head.copy(), r.trajectory.copy(), r.data.copy()) for r in read_readouts(path)][4:]
weights = np.random.default_rng(0).standard_normal((16, 4)).astype(np.complex64)

def readouts():
    for number in range(n_slices):
        for r in one:
            head = r.head.copy()
            head["idx"]["slice"] = number
            yield Readout(head, r.trajectory, weights @ r.data)

settings = Settings.from_properties({"method": "lowrank", "virtual_coils": 16, "n_coefficients": 6})

def send(image):
    time.sleep(0.05)  # so slow that slices have to wait, few or many

outcome = reconstruct_scan(read_header(path), readouts(), settings, send)
assert outcome.delivered == 4 * n_slices, outcome
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_slices(tiny_scan: Path) -> None:
    """A slice holds 20 MB here; twelve more would be 240 MB."""

    # What is freed goes back to the system at once, or the heap's gaps would be measured: some per cent.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}

    def peak_kb(n_slices: int) -> int:
        command = [sys.executable, "-c", _MEASURE, str(tiny_scan), str(n_slices)]
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return int(run.stdout)

    few, many = peak_kb(4), peak_kb(16)
    assert many < 1.1 * few
