"""Readouts with spikes: found wherever they are, and never where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kspace.spirals import complex_normal
from scan_edit import Scan
from whorl.kspace.coils import compression_matrix
from whorl.kspace.outliers import find_spikes, has_noise_spikes, roughness
from whorl.kspace.slicebuffer import BLOCK, Damage, SliceBuffer, digest
from whorl.scan.readout import HEAD_DTYPE, Readout
from whorl.simulation.scan import simulate
from whorl.simulation.signals import Train


def readouts(scan: Scan) -> Tensor:
    """All imaging readouts `(R, C, S)`."""
    return torch.from_numpy(np.stack([scan.data[n] for n in scan.imaging]))


def found(kspace: Tensor) -> list[int]:
    """Readouts with spikes of a slice that arrives in blocks."""
    places, before = [], None
    for n, block in enumerate(torch.split(kspace, BLOCK)):
        spiked, before = find_spikes(block, before)
        places += (BLOCK * n + torch.nonzero(spiked)[:, 0]).tolist()
    return places


@pytest.fixture(scope="module")
def kspace(loaded_scan: Scan) -> Tensor:
    """120 readouts of 4 coils and 884 samples: two blocks, the second of 56."""
    return readouts(loaded_scan)


S = 884
#: Samples that are spoilt. The last one has one neighbour: it is half as rough.
PLACES: dict[str, slice] = {
    "first": slice(0, 1),
    "second": slice(1, 2),
    "sixth": slice(5, 6),
    "burst at the centre": slice(0, 3),
    "a tenth": slice(90, 91),
    "middle": slice(S // 2, S // 2 + 1),
    "burst in the middle": slice(S // 2, S // 2 + 3),
    "near the end": slice(S - 9, S - 8),
    "last": slice(S - 1, S),
    "first half": slice(0, S // 2),
    "whole": slice(0, S),
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("coils", [slice(1, 2), slice(None)], ids=["one coil", "all coils"])
@pytest.mark.parametrize("r", [0, 1, 63, 64, 119])
def test_a_spike_is_found(kspace: Tensor, where: str, coils: slice, r: int) -> None:
    """From ten times the value on; outside the centre, where a value may be next to nothing, from 60
    times what noise is."""
    samples = PLACES[where]
    noise = kspace[:, coils, -200:].abs().square().mean().sqrt()
    for factor in (10, 30, 100, 1000):
        spoilt = kspace.clone()
        if samples.start > 5:
            spoilt[r, coils, samples] = 6 * factor * noise
        else:
            spoilt[r, coils, samples] *= factor
        assert found(spoilt) == [r]


def test_several_spikes_at_the_same_place_do_not_hide_each_other(kspace: Tensor) -> None:
    """Up to a tenth of the readouts around."""
    spoilt = kspace.clone()
    spoilt[[3, 17, 18, 40, 41, 55], :, 2] *= 100
    spoilt[[64, 119], :, 400:403] += 1000 * kspace.abs().max()
    spoilt[[80, 81]] *= 1000
    assert found(spoilt) == [3, 17, 18, 40, 41, 55, 64, 80, 81, 119]


#: Readouts of a burst in 120 that arrive in blocks of 64.
BURSTS: dict[str, range] = {
    "ten": range(30, 40),
    "the first twenty": range(20),
    "across two blocks": range(50, 80),
    "every second": range(0, 120, 2),
}


@pytest.mark.parametrize("burst", BURSTS)
@pytest.mark.parametrize("s", [0, 200, 500, S - 3])
@pytest.mark.parametrize("factor", [100, 1000])
def test_a_burst_of_spikes_is_not_what_is_usual(kspace: Tensor, burst: str, s: int, factor: float) -> None:
    """The windows beside tell; `factor` times what the samples there are in other readouts."""
    spoilt = kspace.clone()
    spoilt[BURSTS[burst], :, s] += factor * kspace[:, :, s].abs().square().mean().sqrt()
    assert found(spoilt) == list(BURSTS[burst])


@pytest.mark.parametrize("s", [200, 500])
def test_a_sample_that_is_broken_in_every_readout(kspace: Tensor, s: int) -> None:
    spoilt = kspace.clone()
    spoilt[:, :, s] += 1e4 * kspace[:, :, s].abs().square().mean().sqrt()
    assert found(spoilt) == list(range(120))


@pytest.mark.parametrize("burst", BURSTS)
@pytest.mark.parametrize("factor", [5, 10, 1000])
def test_a_burst_of_readouts_that_are_damaged_as_a_whole(kspace: Tensor, burst: str, factor: float) -> None:
    """Their noise is as much stronger: no signal does that."""
    every = BURSTS[burst] if burst != "every second" else range(0, 120, 3)  # most are as they should be
    spoilt = kspace.clone()
    spoilt[every] *= factor
    assert found(spoilt) == list(every)


def test_a_coil_that_is_dead_in_some_readouts_spoils_no_others(kspace: Tensor) -> None:
    spoilt = kspace.clone()
    spoilt[10:60, 2] = 0
    assert found(spoilt) == []


@pytest.mark.parametrize("n_left", [1, 2, 10])
def test_the_last_readouts_are_judged_by_those_before(kspace: Tensor, n_left: int) -> None:
    spoilt = kspace[: BLOCK + n_left].clone()
    assert found(spoilt) == []
    spoilt[-1, 2, 3] *= 30
    assert found(spoilt) == [BLOCK + n_left - 1]


def test_what_was_spoilt_judges_nothing(kspace: Tensor) -> None:
    spoilt = kspace[:BLOCK].clone()
    clean = find_spikes(spoilt)[1]
    spoilt[-1, 0, 4] *= 1e6
    _, before = find_spikes(spoilt)
    assert len(before) == len(clean)
    assert float(before.max()) <= float(roughness(kspace).max())


@pytest.mark.parametrize("unit", [1e-18, 1e-3, 1e12])
def test_the_unit_of_the_data_changes_nothing(kspace: Tensor, unit: float) -> None:
    spoilt = kspace * unit
    assert found(spoilt) == []
    spoilt[70, 1, 500] = spoilt.abs().max()
    assert found(spoilt) == [70]


#: What differs from scan to scan, and must not look like a spike.
CLEAN: dict[str, dict[str, Any]] = {
    "letters, hardly any noise": {"phantom": "letters", "noise": 1e-4},
    "one coil, one interleaf of many": {"phantom": "nist", "coils": 1, "order": "golden-angle"},
    "two interleaves": {"phantom": "letters", "interleaves": 2, "matrix": 16},
    "noisy": {"phantom": "nist", "noise": 1e-2, "coils": 16},
    "fat and off-resonance": {"phantom": "nist", "fat": True, "b0_hz": 100.0},
    "motion": {"phantom": "letters", "motion_pixels": 4.0},
    "phase jump": {"phantom": "letters", "phase_jump_rad": 3.1},
    "pulses of 0 degrees": {"phantom": "nist", "timepoints": 250},
}


@pytest.mark.parametrize("case", CLEAN)
def test_clean_scans_have_no_spikes(tmp_path: Path, case: str) -> None:
    options: dict[str, Any] = {"timepoints": 90, "interleaves": 16, "coils": 4, "matrix": 64, **CLEAN[case]}
    simulate(tmp_path / "scan.h5", **options)
    assert found(readouts(Scan.load(tmp_path / "scan.h5"))) == []


#: Phantom, noise and flip angles of trains with readouts that are much stronger than others.
STRONG: dict[str, tuple[str, float, Any]] = {
    "first": ("nist", 1e-3, np.full(100, 90.0)),
    "first, hardly any noise": ("letters", 1e-4, np.full(100, 60.0)),
    "random": ("nist", 1e-3, np.random.default_rng(0).uniform(0, 70, 100)),
    "four of fifty": ("nist", 1e-3, np.where(np.arange(100) % 50 < 46, 2.0, 70.0)),
}


@pytest.mark.parametrize("case", STRONG)
def test_strong_readouts_are_no_spikes(tmp_path: Path, case: str) -> None:
    phantom, noise, flip_deg = STRONG[case]
    ti_ms = 30_000.0 if case.startswith("first") else 20.0  # so long after an inversion there is none
    train = Train(flip_deg, np.zeros(100), np.full(100, 9.0), np.full(100, 2.0), ti_ms)
    options: dict[str, Any] = {"timepoints": 100, "interleaves": 16, "coils": 8, "matrix": 64}
    simulate(tmp_path / "scan.h5", phantom=phantom, noise=noise, train=train, **options)
    assert found(readouts(Scan.load(tmp_path / "scan.h5"))) == []


def test_coils_and_readouts_without_signal_judge_nothing(kspace: Tensor) -> None:
    """Zeros are neither spikes nor a reason to take others for some."""
    silent = kspace.clone()
    silent[:, 2] = 0
    silent[10:14] = 0
    silent[:, :, 700:] = 0
    assert found(silent) == []
    assert found(torch.zeros_like(kspace)) == []
    silent[20, 2, 5] = silent.abs().max()
    assert found(silent) == [20]


@pytest.mark.parametrize("shape", [(1, 2, 50), (3, 2, 50), (10, 2, 3), (10, 2, 2), (10, 1, 4), (0, 2, 50)])
def test_too_few_readouts_or_samples_are_not_judged(shape: tuple[int, ...]) -> None:
    kspace = complex_normal(*shape)
    spiked, before = find_spikes(kspace)
    assert spiked.shape == (shape[0],)
    assert not spiked.any()
    find_spikes(kspace, before)  # whatever was returned is taken


def test_roughness_is_the_largest_second_difference() -> None:
    """Of a straight line none; all samples belong to a window, the last ones too."""
    line = torch.arange(53) * (2 - 1j) + 4j
    assert float(roughness(line.repeat(2, 3, 1)).max()) < 1e-4  # rounding of values around 100
    for s in range(53):
        bent = line.clone()
        bent[s] += 7j
        rough = roughness(bent.expand(1, 1, 53))
        assert rough.shape == (1, 1, 3)
        assert float(rough.max()) == pytest.approx(7 if s in (0, 52) else 14)


# --- Noise readouts ---------------------------------------------------------------------------------------


def test_noise_with_a_spike() -> None:
    noise = complex_normal(8, 20_000).numpy()
    assert not has_noise_spikes(noise)
    noise[3] = 0  # a dead coil
    assert not has_noise_spikes(noise)
    noise[5] *= 1000
    assert not has_noise_spikes(noise)
    noise[2, 777] *= 100
    assert has_noise_spikes(noise)
    assert not has_noise_spikes(noise[:0])


# --- In the buffer ----------------------------------------------------------------------------------------


def buffered(kspace: Tensor, *, numbered: bool = True, basis: Tensor | None = None) -> SliceBuffer:
    """A buffer that has taken readouts, each its own timepoint, and folded them as soon as it could."""
    head = np.zeros((), dtype=HEAD_DTYPE)[()]
    nowhere = np.zeros((kspace.shape[2], 2), dtype=np.float32)
    every = [Readout(head, nowhere, data.numpy()) for data in kspace]
    buffer = SliceBuffer(
        every[0], None, lambda block, _: (compression_matrix(block, 2), ""), torch.device("cpu")
    )
    for t, readout in enumerate(every):
        buffer.add(readout, 0, t if numbered else None, digest(readout))
        if numbered and basis is not None:
            buffer.fold(basis)
    return buffer


@pytest.mark.parametrize("numbered", [True, False], ids=["timepoints known", "timepoints unknown"])
def test_spikes_leave_the_slice_as_if_they_had_not_come(kspace: Tensor, numbered: bool) -> None:
    """Neither sums nor virtual coils hang on them; they are told once."""
    basis = torch.linalg.qr(complex_normal(120, 3)).Q
    lost = [0, 40, 64, 118]
    spoilt = kspace.clone()
    spoilt[lost, 1, 3] *= 1000
    buffer = buffered(spoilt, numbered=numbered)
    if numbered:
        assert sorted(buffer.judge()) == [(t, Damage.SPIKES) for t in lost]
        assert buffer.judge() == []
    else:
        assert buffer.judge() == []
        assert sorted(buffer.damaged_waiting) == lost
        timepoints = np.arange(120)
        timepoints[lost] = -1
        buffer.number_timepoints(timepoints)

    result = buffer.finish(basis)
    left = [t for t in range(120) if t not in lost]
    matrix = compression_matrix(kspace[[t for t in left if t < BLOCK]], 2)
    # Eigenvectors of one sum, and sums of a hundred products, in float32.
    torch.testing.assert_close(result.matrix, matrix, rtol=0, atol=1e-5)
    expected = torch.einsum("tk,tcs->kcs", basis[left].conj(), matrix @ kspace[left])
    torch.testing.assert_close(result.bins[0], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(result.gram[0], basis[left].conj().T @ basis[left], rtol=0, atol=1e-5)


@pytest.mark.parametrize("numbered", [True, False], ids=["timepoints known", "timepoints unknown"])
@pytest.mark.parametrize("lost", [[0, 1, 70, 119], list(range(70))], ids=["few", "first block"])
def test_zeros_leave_the_slice_as_if_they_had_not_come(
    kspace: Tensor, numbered: bool, lost: list[int]
) -> None:
    """Even if the first block is nothing else, and the basis is there when it is full."""
    basis = torch.linalg.qr(complex_normal(120, 3)).Q
    spoilt = kspace.clone()
    spoilt[lost] = 0
    buffer = buffered(spoilt, numbered=numbered, basis=basis)
    damaged = buffer.judge()
    if numbered:
        assert sorted(damaged) == [(t, Damage.ZEROS) for t in lost]
    else:
        assert buffer.damaged_waiting == dict.fromkeys(lost, Damage.ZEROS)
        timepoints = np.arange(120)
        timepoints[lost] = -1
        buffer.number_timepoints(timepoints)
    left = [t for t in range(120) if t not in lost]
    gram = basis[left].conj().T @ basis[left]
    # Sums of a hundred products in float32.
    torch.testing.assert_close(buffer.finish(basis).gram[0], gram, rtol=0, atol=1e-5)


def test_a_slice_of_zeros_lacks_nothing(kspace: Tensor) -> None:
    """It has no signal, which is said elsewhere."""
    buffer = buffered(torch.zeros_like(kspace))
    assert buffer.judge() == []
    assert not buffer.finish(torch.linalg.qr(complex_normal(120, 3)).Q).bins.any()


def test_the_digest_tells_data_apart(kspace: Tensor) -> None:
    head, nowhere = np.zeros((), dtype=HEAD_DTYPE)[()], np.zeros((S, 2), dtype=np.float32)
    digests = {digest(Readout(head, nowhere, data.numpy())) for data in kspace}
    assert len(digests) == 120
    assert 0 not in digests
    assert digest(Readout(head, nowhere, kspace[3].clone().numpy())) in digests
    assert digest(Readout(head, nowhere, torch.zeros_like(kspace[0]).numpy())) == 0


def test_a_block_in_which_each_readout_has_a_spike_still_has_coils(kspace: Tensor) -> None:
    """Each at another place: none of them hides another."""
    spoilt = kspace.clone()
    spoilt[range(120), :, range(10, 850, 7)] += 100 * kspace.abs().max()
    buffer = buffered(spoilt)
    assert len(buffer.judge()) == 120
    result = buffer.finish(torch.linalg.qr(complex_normal(120, 3)).Q)
    assert torch.isfinite(result.matrix.abs()).all()
    assert len(result.bins) == 0
