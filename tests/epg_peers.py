"""FISP fingerprints of two independent programs, in the phase convention of whorl.

MRpro (Physikalisch-Technische Bundesanstalt, https://github.com/PTB-MR/mrpro) and blochsim
(https://github.com/pulserver/blochsim). Both are optional: nothing is imported before it is asked for.

Letters: T timepoints, N atoms.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from whorl.scan.train import Train

#: Signals `(N, T)` of atoms with T1 and T2 in ms and, where given, B1.
Peer = Callable[..., Tensor]


@contextmanager
def without_torchvision() -> Iterator[None]:
    """An empty torchvision while MRpro is imported, unless the real one is already there.

    MRpro needs it for the augmentation of its brain phantom alone, but imports it at once. The torchvision
    of PyPI is built for CUDA and cannot be imported beside a PyTorch for CPUs.
    """
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.functional"]
    added = {} if names[0] in sys.modules else {name: ModuleType(name) for name in names}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def mrpro_peer(train: Train, n_states: int, *, inversion_efficiency: float = 1.0) -> Peer:
    """A train with an inversion, as blocks of MRpro in the precision of the relaxation times.

    Its own fingerprint models keep 20 states whatever they are asked for; their blocks obey.
    """
    with without_torchvision():
        from mrpro.operators.models import EPG

    def signal(t1_ms: Tensor, t2_ms: Tensor, b1: Tensor | None = None) -> Tensor:
        def tensor(values: Any) -> Tensor:
            return torch.as_tensor(values, dtype=t1_ms.dtype)

        flip, phase = (torch.deg2rad(tensor(angle)) for angle in (train.flip_deg, train.phase_deg % 360))
        readouts = EPG.FispBlock(flip, phase, tensor(train.te_ms / 1e3), tensor(train.tr_ms / 1e3))
        tissues = EPG.Parameters(m0=tensor(1), t1=t1_ms / 1e3, t2=t2_ms / 1e3, relative_b1=b1)
        delay = tensor(train.inversion_time_ms) / 1e3
        if inversion_efficiency == 1:
            _, echoes = EPG.EPGSequence([EPG.InversionBlock(delay), readouts])(tissues, n_states)
        else:  # it only knows ideal inversions: start after it
            states = EPG.initial_state(tissues.shape, n_states, dtype=tissues.dtype.to_complex())
            states[..., 2, 0] = -inversion_efficiency
            _, echoes = EPG.EPGSequence([EPG.DelayBlock(delay), readouts])(tissues, states)
        # A pulse of phase 0 turns +z to -iy there, to x here; the receiver follows the pulse here.
        return 1j * torch.stack(echoes, -1) * torch.polar(torch.ones_like(phase), -phase)

    return signal


def blochsim_peer(train: Train, n_states: int, *, inversion_efficiency: float = 1.0) -> Peer:
    """A train with an inversion in the MRF simulator of blochsim, in float32 throughout."""
    from blochsim.simulators import MRFSimulator

    simulator = MRFSimulator(
        flip=train.flip_deg,
        TR=train.tr_ms,
        TI=train.inversion_time_ms,
        phases=train.phase_deg % 360,  # float32 keeps too little of a quadratic phase of 10^6 degrees
        states=n_states,
    )
    te_ms = torch.as_tensor(train.te_ms)

    def signal(t1_ms: Tensor, t2_ms: Tensor, b1: Tensor | None = None) -> Tensor:
        tissues = {"T1": t1_ms, "T2": t2_ms, "inv_efficiency": inversion_efficiency}
        with warnings.catch_warnings():
            # It reads durations that it also traces for derivatives; no derivative is asked for here.
            warnings.filterwarnings(
                "ignore", "Converting a tensor with requires_grad=True to a scalar", UserWarning
            )
            at_pulse = simulator.simulate(**tissues, **({} if b1 is None else {"B1": b1}))
        # Its echo is at the pulse. The sign is that of whorl.
        return at_pulse * torch.exp(-te_ms.to(t2_ms) / t2_ms[:, None])

    return signal
