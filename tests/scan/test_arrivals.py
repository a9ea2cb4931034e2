"""Readouts on their way in: which are a prescan, and what scan_counter tells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from scan_edit import Scan
from whorl.scan.arrivals import ScanCounter, mark_prescan
from whorl.scan.readout import HEAD_DTYPE, Flag


def noise(scan: Scan, n: int, coils: int = 4) -> Scan:
    """The scan with n readouts of noise before it, of the size of the others and not flagged."""
    rng = np.random.default_rng(5)
    first = scan.imaging[0]
    shape = (2, n, coils, scan.data[first].shape[1])
    samples = (rng.standard_normal(shape) * 1e-3 * np.abs(scan.data[first]).max()).astype(np.float32)
    scan.take(np.r_[scan.imaging[:n], scan.imaging])
    for k in range(n):
        scan.data[k] = (samples[0, k] + 1j * samples[1, k]).astype(np.complex64)
    return scan


def flagged(scan: Scan, n_noise: int) -> list[int]:
    """Places of the readouts that are taken for noise."""
    found = list(mark_prescan(scan.readouts(), n_noise))
    assert len(found) == len(scan.heads)
    return [n for n, readout in enumerate(found) if readout.flags & Flag.IS_NOISE_MEASUREMENT]


def test_a_prescan_is_told_by_its_samples(scan: Scan) -> None:
    assert flagged(noise(scan.copy().without_noise(), 10), 10) == list(range(10))
    # One coil, whose noise stands out most.
    one = noise(scan.copy().without_noise(), 10)
    one.data = [data[:1] for data in one.data]
    assert flagged(one, 10) == list(range(10))


def test_readouts_with_a_weak_signal_are_no_prescan(scan: Scan) -> None:
    # The first pulses of a train are small, and follow an inversion.
    weak = scan.copy().without_noise()
    for n in range(20):
        weak.data[n] *= np.float32(0.05)
    assert flagged(weak, 20) == []
    # A prescan that is flagged already, or none at all.
    assert flagged(scan.copy(), 4) == [0, 1, 2, 3]
    assert flagged(scan.copy().without_noise(), 4) == []


def test_noise_of_the_scanner_before_that_of_the_sequence(scan: Scan) -> None:
    both = noise(scan.copy().without_noise(), 10)
    both.heads["flags"][:4] |= np.uint64(Flag.IS_NOISE_MEASUREMENT)
    assert flagged(both, 6) == list(range(10))


def test_scans_that_are_too_short_or_silent_keep_what_they_have(scan: Scan) -> None:
    assert flagged(noise(scan.copy().without_noise(), 10).take(np.arange(7)), 10) == []
    silent = scan.copy().without_noise()
    silent.data = [0 * data for data in silent.data]
    assert flagged(silent, 10) == []


def counted(numbers: Sequence[int]) -> tuple[int, int, bool]:
    """Numbers left out, readouts that came late, and whether it counts at all."""
    counter, head = ScanCounter(), np.zeros((), dtype=HEAD_DTYPE)
    for number in numbers:
        head["scan_counter"] = number
        counter.see(head[()])
    return counter.n_skipped, counter.n_late, counter.counts


WHOLE = list(range(20))


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (WHOLE, (0, 0, True)),
        ([*WHOLE[:5], *WHOLE[7:]], (2, 0, True)),
        ([0, 1, 2, 4, 3, *WHOLE[5:]], (0, 1, True)),
        ([*WHOLE[:10], 4, *WHOLE[10:]], (0, 1, True)),
        ([*WHOLE[:10], 9, *WHOLE[10:]], (0, 0, True)),
        ([*WHOLE, *WHOLE], (0, 0, True)),
        ([0] * 20, (0, 0, False)),
        (WHOLE[::-1], (0, 0, False)),
        (list(range(0, 60, 3)), (0, 0, False)),
    ],
    ids=["whole", "two lost", "swapped", "late", "parts of one", "anew", "not counted", "backwards", "steps"],
)
def test_what_the_scan_counter_tells(numbers: list[int], expected: tuple[int, int, bool]) -> None:
    skipped, late, counts = counted(numbers)
    assert counts == expected[2]
    assert skipped == expected[0]
    if counts:
        assert late == expected[1]
