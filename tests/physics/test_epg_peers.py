"""EPG against two independent programs, MRpro and blochsim, where they are installed.

Letters: T timepoints, N atoms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from epg_peers import Peer, blochsim_peer, mrpro_peer, without_torchvision
from whorl.physics.epg import SignalModel, fisp_signal
from whorl.scan.train import Train

T = 150
STATES = T // 2 + 1  # what rises above does not return within the train
# Short T2, tissue, fluid, and T2 = T1.
T1_MS = torch.tensor([260.0, 900.0, 4000.0, 60.0], dtype=torch.float64)
T2_MS = torch.tensor([12.0, 80.0, 2500.0, 60.0], dtype=torch.float64)
B1 = torch.tensor([0.7, 1.0, 1.25, 0.9], dtype=torch.float64)

# MRpro computes in float64, but the angle of its inversion is a float32: sin(π + 8.7e-8) of Mz stays
# transverse, and can come back in any echo.
MRPRO_ERROR = 2e-7
# blochsim computes in float32: rounding of T pulses (6e-8) that adds up at worst in proportion.
BLOCHSIM_ERROR = T * 6e-8


def train_of(phase: str = "none") -> Train:
    rng, count = np.random.default_rng(7), np.arange(T)
    phases = {
        "none": 0.0 * count,
        "alternating": 180.0 * count,
        "quadratic": 117 / 2 * count * (count + 1),
        "random": rng.uniform(-180, 540, T),
    }
    flip_deg = 45 + 40 * np.sin(count / 15) + rng.uniform(-5, 5, T)
    return Train(flip_deg, rng.uniform(8, 14, T), rng.uniform(1, 4, T), phases[phase], 20.0, "test")


def exact(
    train: Train,
    t1_ms: Tensor = T1_MS,
    t2_ms: Tensor = T2_MS,
    b1: Tensor | None = None,
    model: SignalModel | None = None,
) -> Tensor:
    return fisp_signal(train, t1_ms, t2_ms, b1, model=model, tolerance=0, dtype=torch.float64)


def distance(result: Tensor, expected: Tensor) -> Tensor:
    """Largest difference of each atom `(N,)`: the peers' phase is known, so none is fitted."""
    assert result.shape == expected.shape == (len(T1_MS), T)
    return (result - expected).abs().amax(1)


@pytest.fixture(params=["mrpro", "blochsim"])
def peer(request: pytest.FixtureRequest) -> tuple[Callable[..., Peer], float]:
    """A program and how far from it whorl may be."""
    if request.param == "mrpro":
        with without_torchvision():
            pytest.importorskip("mrpro", reason="the peer MRpro cannot be imported (pip install mrpro)")
        return mrpro_peer, MRPRO_ERROR
    pytest.importorskip("blochsim", reason="the peer blochsim cannot be imported (pip install blochsim)")
    return blochsim_peer, BLOCHSIM_ERROR


@pytest.mark.parametrize("phase", ["none", "alternating", "quadratic", "random"])
def test_equals_peer(peer: tuple[Callable[..., Peer], float], phase: str) -> None:
    program, error = peer
    train = train_of(phase)
    assert float(distance(exact(train), program(train, STATES)(T1_MS, T2_MS)).max()) < error


@pytest.mark.parametrize("phase", ["none", "quadratic"])
def test_equals_peer_with_b1(peer: tuple[Callable[..., Peer], float], phase: str) -> None:
    program, error = peer
    train = train_of(phase)
    assert float(distance(exact(train, b1=B1), program(train, STATES)(T1_MS, T2_MS, B1)).max()) < error


@pytest.mark.parametrize("efficiency", [0.0, 0.9])
def test_equals_peer_with_an_incomplete_inversion(
    peer: tuple[Callable[..., Peer], float], efficiency: float
) -> None:
    program, error = peer
    train = train_of()
    signal = exact(train, model=SignalModel(inversion_efficiency=efficiency))
    expected = program(train, STATES, inversion_efficiency=efficiency)(T1_MS, T2_MS)
    assert float(distance(signal, expected).max()) < error


def test_equals_peer_across_a_slice(peer: tuple[Callable[..., Peer], float]) -> None:
    # The peers play each place across the slice as a train of its own.
    program, error = peer
    train = train_of()
    profile = np.random.default_rng(9).uniform(0.1, 1.1, (3, T))
    places = [
        program(replace(train, flip_deg=train.flip_deg * place), STATES)(T1_MS, T2_MS) for place in profile
    ]
    signal = exact(train, model=SignalModel(profile=profile))
    assert float(distance(signal, torch.stack(places).mean(0)).max()) < error


def test_mistakes_are_seen(peer: tuple[Callable[..., Peer], float]) -> None:
    # Each of them, in each tissue, is well above what the tests before let pass.
    program, error = peer
    train = train_of("quadratic")
    expected = program(train, STATES)(T1_MS, T2_MS)
    mistakes = {
        "T1 +2 %": exact(train, t1_ms=T1_MS * 1.02),
        "T2 +2 %": exact(train, t2_ms=T2_MS * 1.02),
        "TI +1 ms": exact(replace(train, inversion_time_ms=21.0)),
        "flip angle +1 %": exact(replace(train, flip_deg=train.flip_deg * 1.01)),
        "TR +1 %": exact(replace(train, tr_ms=train.tr_ms * 1.01)),
        "TE +0.1 ms": exact(replace(train, te_ms=train.te_ms + 0.1)),
        "no RF phase": exact(train_of("none")).to(torch.complex128),
        "conjugate": exact(train).conj(),
        "sign": -exact(train),
    }
    for mistake, signal in mistakes.items():
        assert float(distance(signal, expected).min()) > 2 * error, mistake
