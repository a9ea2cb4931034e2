"""Signal of a FISP fingerprint train by extended phase graphs (EPG).

Letters: T timepoints, N atoms (tissues), K coefficients, P positions across the slice, n EPG orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.runtime.cores import spread
from whorl.scan.train import Train

# Elements of one state array that are worked on at a time. Smaller ones would fit the cache of a core,
# but the cost of starting ten operations for each pulse outweighs that.
_CHUNK_ELEMENTS = 250_000
# A GPU takes nearly all at once, in some hundred MB; it has never been tried on one.
_GPU_CHUNK_ELEMENTS = 16_000_000


def _whole_slice() -> NDArray[np.float64]:
    return np.ones((1, 1))


@dataclass(frozen=True, slots=True, eq=False)
class SignalModel:
    """What a real scanner adds to an ideal train.

    Parameters
    ----------
    inversion_efficiency
        e: the inversion leaves Mz = -e. 1: ideal; 0: a saturation.
    profile
        `(P, T)` or `(P, 1)` float64: flip angle over nominal flip angle at P places across the slice, all of
        the same width. The signal is their mean.
    diffusion_per_ms
        D k², with the diffusion coefficient D and the dephasing k that the spoiler makes in each TR
        (see `diffusion_rate`); 0: none.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    inversion_efficiency: float = 1.0
    profile: NDArray[np.float64] = field(default_factory=_whole_slice)
    diffusion_per_ms: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.inversion_efficiency <= 1:
            raise ValueError(f"the inversion efficiency is {self.inversion_efficiency:g}: expected 0 to 1")
        if self.profile.ndim != 2 or not self.profile.size or not np.isfinite(self.profile).all():
            raise ValueError(
                f"the slice profile has shape {self.profile.shape}: expected finite (P, T) or (P, 1)"
            )
        if not self.profile.any():
            raise ValueError("the slice profile is 0 throughout: there would be no signal")
        if not 0 <= self.diffusion_per_ms < math.inf:
            raise ValueError(f"the diffusion rate is {self.diffusion_per_ms:g} per ms: expected 0 or more")

    def key(self) -> bytes:
        """Bytes that are equal for models with the same signal."""
        numbers = [self.inversion_efficiency, self.diffusion_per_ms, *self.profile.shape]
        return np.array(numbers).tobytes() + self.profile.tobytes()


def diffusion_rate(diffusion_um2_per_ms: float, spoiler_cycles_per_mm: float) -> float:
    """D k² in 1/ms, of a diffusion coefficient in µm²/ms (water of 20 °C: 2.0) and the dephasing of one TR.

    Weigel, J Magn Reson Imaging 41:266 (2015), doi:10.1002/jmri.24619.
    """
    return diffusion_um2_per_ms * (2 * math.pi * spoiler_cycles_per_mm * 1e-3) ** 2


def fisp_signal(
    train: Train,
    t1_ms: Tensor,
    t2_ms: Tensor,
    b1: Tensor | None = None,
    *,
    model: SignalModel | None = None,
    tolerance: float = 1e-3,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Transverse magnetisation at the echo of each pulse, for M0 = 1.

    Unbalanced gradients shift the configuration orders by one in each TR (FISP). In the frame
    that follows the RF phase each pulse turns about y, so the states stay real unless the phase
    increments are other than 0 and 180 degrees. With F = F(+n), G = conj F(-n) and X = (F + G)/2
    the pulse is the plane rotation ``X' = X cos a + Z sin a, Z' = Z cos a - X sin a`` and leaves
    F - G alone.

    Orders that cannot matter are left out: at timepoint t none above t can exist and none above
    T - 1 - t can return to the echo; what went up to order n and back has lost exp(-2 n TR/T2).

    Diffusion is that of a constant spoiler gradient: in a TR the order n, on its way to n + 1, loses
    ``exp(-D k² TR ((n + ½)² + 1/12))``, and the longitudinal order n loses ``exp(-D k² TR n²)``. The echo
    comes before the spoiler.

    Parameters
    ----------
    train
        T pulses.
    t1_ms, t2_ms
        `(N,)` relaxation times in ms.
    b1
        `(N,)` relative transmit field, which scales all flip angles but the inversion; 1 where absent.
    model
        What the scanner adds; nothing if absent.
    tolerance
        Bound on exp(-2 n TR/T2) where orders above n are dropped; 0 keeps all of them. The signal's error
        is far smaller: 2e-5 of the peak for 1e-3.
    dtype
        float32 or float64, of the real part.

    Returns
    -------
    Tensor
        `(N, T)`, real (or complex if the RF phase demands it), on the device of `t1_ms`.

    Raises
    ------
    ValueError
        If the shapes differ or a relaxation time is not positive.

    References
    ----------
    Weigel, J Magn Reson Imaging 41:266 (2015), doi:10.1002/jmri.24619 (EPG, diffusion);
    Jiang et al., Magn Reson Med 74:1621 (2015), doi:10.1002/mrm.25559 (FISP-MRF).
    """
    simulation = _Simulation(train, t1_ms, t2_ms, b1, model or SignalModel(), tolerance, dtype)
    signal = torch.empty((len(t1_ms), train.n_timepoints), dtype=simulation.state_dtype, device=t1_ms.device)

    def keep(atoms: Tensor, part: Tensor) -> None:
        signal[atoms] = part.T

    simulation.run(keep)
    return signal


def fisp_coefficients(
    train: Train,
    t1_ms: Tensor,
    t2_ms: Tensor,
    b1: Tensor | None,
    basis: Tensor,
    *,
    model: SignalModel | None = None,
    tolerance: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Signals of `fisp_signal` in a temporal subspace; the signals themselves are never kept.

    Parameters
    ----------
    basis
        `(T, K)` orthonormal columns, of the dtype of the signals.

    Returns
    -------
    Tensor, Tensor
        Coefficients `(N, K)` and energies Σ|signal|² `(N,)`.
    """
    simulation = _Simulation(train, t1_ms, t2_ms, b1, model or SignalModel(), tolerance, torch.float32)
    coefficients = torch.empty((len(t1_ms), basis.shape[1]), dtype=basis.dtype, device=t1_ms.device)
    energies = torch.empty(len(t1_ms), device=t1_ms.device)

    def compress(atoms: Tensor, part: Tensor) -> None:
        coefficients[atoms] = part.T @ basis.conj()
        energies[atoms] = torch.linalg.vector_norm(part, dim=0).square()

    simulation.run(compress)
    return coefficients, energies


class _Simulation:
    """The atoms of one train, chunk by chunk."""

    def __init__(
        self,
        train: Train,
        t1_ms: Tensor,
        t2_ms: Tensor,
        b1: Tensor | None,
        model: SignalModel,
        tolerance: float,
        dtype: torch.dtype,
    ) -> None:
        b1 = torch.ones_like(t1_ms) if b1 is None else b1
        if t1_ms.ndim != 1 or not t1_ms.shape == t2_ms.shape == b1.shape:
            raise ValueError(
                f"t1_ms {tuple(t1_ms.shape)}, t2_ms {tuple(t2_ms.shape)} and b1 {tuple(b1.shape)} "
                f"must be lists of one common length"
            )
        if not (bool((t1_ms > 0).all()) and bool((t2_ms > 0).all())):
            raise ValueError("T1 and T2 must be positive")
        T = train.n_timepoints
        if model.profile.shape[1] not in (1, T):
            raise ValueError(
                f"the slice profile has {model.profile.shape[1]} timepoints, the train has {T}: "
                f"expected as many"
            )
        self._train, self._model, self._dtype = train, model, dtype
        self._t1_ms, self._t2_ms, self._b1 = t1_ms, t2_ms, b1
        step = torch.diff(torch.as_tensor(train.phase_deg, dtype=torch.float64), append=torch.zeros(1))
        turn = torch.exp(-1j * torch.deg2rad(step))  # change of frame after each pulse
        turn[-1] = 1
        real = bool((turn.imag.abs() < 1e-9).all())
        self.state_dtype = (
            dtype if real else (torch.complex64 if dtype == torch.float32 else torch.complex128)
        )
        self._turns: list[complex] = [complex(z).real if real else complex(z) for z in turn.tolist()]
        # Flip angles in radians at each position, (P, T).
        self._flips: list[list[float]] = (model.profile * np.deg2rad(train.flip_deg)).tolist()
        self._orders = _needed_orders(train, t2_ms, tolerance).cpu()

    def _chunks(self) -> list[tuple[Tensor, int]]:
        """Atoms that are worked on together, and the orders that they need.

        They need about the same number of orders, the most demanding first, and on a CPU they share their
        B1 where many do: pulses are then multiplications by plain numbers.
        """
        device = self._t1_ms.device
        b1 = self._b1.cpu()
        fields, field_of = torch.unique(b1, return_inverse=True)
        on_cpu = device.type == "cpu"
        elements = _CHUNK_ELEMENTS if on_cpu else _GPU_CHUNK_ELEMENTS
        shared = on_cpu and len(fields) * 64 <= len(b1)
        groups = [torch.nonzero(field_of == n)[:, 0] for n in range(len(fields))] if shared else None
        chunks = []
        for group in groups or [torch.arange(len(b1))]:
            ordered = group[torch.argsort(self._orders[group], descending=True)]
            start = 0
            while start < len(ordered):
                most = int(self._orders[ordered[start]])  # of the chunk's most demanding atom
                rows = min(most, (self._train.n_timepoints + 1) // 2)
                size = max(16, elements // rows)
                chunks.append((ordered[start : start + size].to(device), most))
                start += size
        return chunks

    @torch.no_grad()
    def run(self, take: Callable[[Tensor, Tensor], None]) -> None:
        """Call `take` with the numbers `(n,)` of some atoms and their signals `(T, n)`, for all atoms.

        On a CPU from several threads at once.
        """

        def simulate(chunk: tuple[Tensor, int]) -> None:
            atoms, most = chunk
            total = self._at_position(atoms, self._flips[0], most)
            for flips in self._flips[1:]:
                total += self._at_position(atoms, flips, most)
            take(atoms, total.div_(len(self._flips)) if len(self._flips) > 1 else total)

        chunks = self._chunks()
        if self._t1_ms.device.type == "cpu":
            spread(simulate, chunks)  # 10 308 atoms: 0.4 s instead of 1.0
        else:
            for chunk in chunks:
                simulate(chunk)

    def _at_position(self, atoms: Tensor, flips: list[float], max_order: int) -> Tensor:
        """Signals `(T, n_atoms)` with some flip angles `(T,)` in radians; orders 0 … `max_order` are kept."""
        train, dtype, state_dtype, turns = self._train, self._dtype, self.state_dtype, self._turns
        t1_ms, t2_ms, b1 = self._t1_ms[atoms], self._t2_ms[atoms], self._b1[atoms]
        T, n_atoms, device = train.n_timepoints, len(t1_ms), t1_ms.device
        peak = min(max_order, (T - 1) // 2) + 1  # rows that are ever in use
        # Going up one order each TR moves no data: F is a window that slides down in memory (new orders
        # enter below it), G one that slides up (its lowest order leaves).
        f_rows = torch.zeros((T + peak + 1, n_atoms), dtype=state_dtype, device=device)
        g_rows = torch.zeros((T + peak + 1, n_atoms), dtype=state_dtype, device=device)
        z = torch.zeros((peak, n_atoms), dtype=state_dtype, device=device)
        x, gain = torch.empty_like(z), torch.empty_like(z)
        r1, r2 = 1 / t1_ms.double(), 1 / t2_ms.double()
        z[0] = 1
        if train.inversion_time_ms is not None:
            lost = 1 + self._model.inversion_efficiency
            z[0] -= (lost * torch.exp(-train.inversion_time_ms * r1)).to(dtype)
        one_b1 = float(b1[0]) if bool((b1 == b1[0]).all()) else None
        diffusion = self._model.diffusion_per_ms
        order = torch.arange(peak, dtype=torch.float64, device=device)[:, None]
        # F rises through orders n … n + 1, G falls from -n to 1 - n, Z stays.
        exponents = [(order + 0.5).square() + 1 / 12, (order - 0.5).square() + 1 / 12, order.square()]
        damp_f = damp_g = damp_z = torch.empty(0)
        signal = torch.empty((T, n_atoms), dtype=state_dtype, device=device)
        e1 = e2 = e_te = torch.empty(0)
        times: tuple[float, float] | None = None
        for t in range(T):
            if (train.tr_ms[t], train.te_ms[t]) != times:
                times = (train.tr_ms[t], train.te_ms[t])
                e1, e2 = torch.exp(-times[0] * r1).to(dtype), torch.exp(-times[0] * r2).to(dtype)
                e_te = torch.exp(-times[1] * r2).to(dtype)
                if diffusion:
                    damp_f, damp_g, damp_z = (
                        torch.exp(-diffusion * times[0] * exponent).to(dtype) for exponent in exponents
                    )
            n = min(t, T - 1 - t, peak - 1) + 1  # orders in use after this pulse
            f, g = f_rows[T - t : T - t + n], g_rows[t : t + n]
            if one_b1 is not None:
                cos, sin = math.cos(flips[t] * one_b1), math.sin(flips[t] * one_b1)
                torch.add(f, g, out=x[:n])
                change = torch.mul(x[:n], (cos - 1) / 2, out=gain[:n]).add_(z[:n], alpha=sin)
                z[:n].mul_(cos).add_(x[:n], alpha=-sin / 2)
            else:
                angle = flips[t] * b1.to(dtype)
                cos_b1, sin_b1 = torch.cos(angle), torch.sin(angle)
                torch.add(f, g, out=x[:n]).mul_(0.5)
                change = torch.mul(x[:n], cos_b1 - 1, out=gain[:n]).addcmul_(z[:n], sin_b1)
                z[:n].mul_(cos_b1).addcmul_(x[:n], sin_b1, value=-1)
            f.add_(change)
            torch.mul(f[0], e_te, out=signal[t])
            f.mul_(e2)
            g.add_(change).mul_(e2)
            z[:n].mul_(e1)
            if diffusion:
                f.mul_(damp_f[:n])
                g.mul_(damp_g[:n])
                z[:n].mul_(damp_z[:n])
            z[0] += 1 - e1
            if turns[t] != 1:
                f.mul_(turns[t])
                g.mul_(turns[t].conjugate())
            if t + 1 < T:
                f_rows[T - t - 1] = g_rows[t + 1].conj()
        return signal


def n_orders(train: Train, t2_ms: float, tolerance: float = 1e-3) -> int:
    """Orders that `fisp_signal` keeps for one T2, at most those that can return to an echo."""
    needed = _needed_orders(train, torch.tensor([t2_ms], dtype=torch.float64), tolerance)
    return min(int(needed), (train.n_timepoints - 1) // 2) + 1


def _needed_orders(train: Train, t2_ms: Tensor, tolerance: float) -> Tensor:
    """Orders `(N,)` above which ``exp(-2 n TR/T2)`` is below the tolerance, 1 to T."""
    T = train.n_timepoints
    if tolerance <= 0:
        return torch.full(t2_ms.shape, T, dtype=torch.long)
    per_ms = -math.log(tolerance) / (2 * float(train.tr_ms.min()))
    return (t2_ms.double() * per_ms).ceil().clamp(1, T).long()
