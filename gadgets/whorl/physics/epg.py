"""Signal of a FISP fingerprint train by extended phase graphs (EPG).

Letters: T timepoints, N atoms (tissues), n EPG orders.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from whorl.scan.train import Train

# Elements of one state array that are worked on at a time. Smaller ones would fit the cache of a core,
# but the cost of starting ten operations for each pulse outweighs that.
_CHUNK_ELEMENTS = 250_000


def _one_thread() -> None:
    """In a worker thread: its operations do not spread over the cores, whole chunks do. That saves
    thousands of short waits of the cores for each other (10 308 atoms: 0.65 s instead of 1.0)."""
    torch.get_num_threads()  # settles the thread's own default, which would undo the limit later
    threadpool_limits(1, user_api="openmp")


def fisp_signal(
    train: Train,
    t1_ms: Tensor,
    t2_ms: Tensor,
    b1: Tensor | None = None,
    *,
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

    Parameters
    ----------
    train
        T pulses; inversion is ideal (Mz = -1).
    t1_ms, t2_ms
        `(N,)` relaxation times in ms.
    b1
        `(N,)` relative transmit field, 1 where absent.
    tolerance
        Bound on exp(-2 n TR/T2) where orders above n are dropped; 0 keeps all of them.
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
    Weigel, J Magn Reson Imaging 41:266 (2015), doi:10.1002/jmri.24619 (EPG);
    Jiang et al., Magn Reson Med 74:1621 (2015), doi:10.1002/mrm.25559 (FISP-MRF).
    """
    b1 = torch.ones_like(t1_ms) if b1 is None else b1
    if t1_ms.ndim != 1 or not t1_ms.shape == t2_ms.shape == b1.shape:
        raise ValueError(
            f"t1_ms {tuple(t1_ms.shape)}, t2_ms {tuple(t2_ms.shape)} and b1 {tuple(b1.shape)} "
            f"must be lists of one common length"
        )
    if not (bool((t1_ms > 0).all()) and bool((t2_ms > 0).all())):
        raise ValueError("T1 and T2 must be positive")
    T, N = train.n_timepoints, len(t1_ms)
    step = torch.diff(torch.as_tensor(train.phase_deg, dtype=torch.float64), append=torch.zeros(1))
    turn = torch.exp(-1j * torch.deg2rad(step))  # change of frame after each pulse
    turn[-1] = 1
    real = bool((turn.imag.abs() < 1e-9).all())
    state_dtype = dtype if real else (torch.complex64 if dtype == torch.float32 else torch.complex128)
    turns: list[complex] = [complex(z).real if real else complex(z) for z in turn.tolist()]
    flips = torch.deg2rad(torch.as_tensor(train.flip_deg, dtype=torch.float64)).tolist()

    # Atoms that need about the same number of orders are worked on together, the longest first: a
    # chunk keeps as many as its first atom needs.
    orders = _needed_orders(train, t2_ms, tolerance).cpu()
    order_of = torch.argsort(orders, descending=True)
    signal = torch.empty((N, T), dtype=state_dtype, device=t1_ms.device)

    chunks = []
    start = 0
    while start < N:
        most = int(orders[order_of[start]])  # of the chunk's most demanding atom
        size = max(16, _CHUNK_ELEMENTS // min(most, (T + 1) // 2))
        chunks.append((order_of[start : start + size].to(t1_ms.device), most))
        start += size

    def simulate(chunk: tuple[Tensor, int]) -> None:
        atoms, most = chunk
        signal[atoms] = _simulate_chunk(
            train, flips, turns, t1_ms[atoms], t2_ms[atoms], b1[atoms], most, dtype, state_dtype
        )

    if len(chunks) > 1 and t1_ms.device.type == "cpu":
        with ThreadPoolExecutor(torch.get_num_threads(), initializer=_one_thread) as pool:
            list(pool.map(simulate, chunks))
    else:
        for chunk in chunks:
            simulate(chunk)
    return signal


@torch.no_grad()
def _simulate_chunk(
    train: Train,
    flips: list[float],
    turns: list[complex],
    t1_ms: Tensor,
    t2_ms: Tensor,
    b1: Tensor,
    max_order: int,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
) -> Tensor:
    """Signals `(n_atoms, T)` of some atoms; orders 0 … `max_order` are kept."""
    T, n_atoms, device = train.n_timepoints, len(t1_ms), t1_ms.device
    peak = min(max_order, (T - 1) // 2) + 1  # rows that are ever in use
    # Going up one order each TR moves no data: F is a window that slides down in memory (new orders
    # enter below it), G one that slides up (its lowest order leaves).
    f_rows = torch.zeros((T + peak + 1, n_atoms), dtype=state_dtype, device=device)
    g_rows = torch.zeros((T + peak + 1, n_atoms), dtype=state_dtype, device=device)
    z = torch.zeros((peak, n_atoms), dtype=state_dtype, device=device)
    x, gain = torch.empty_like(z), torch.empty_like(z)
    r1, r2 = 1 / t1_ms.double(), 1 / t2_ms.double()
    z[0] = (
        1 if train.inversion_time_ms is None else (1 - 2 * torch.exp(-train.inversion_time_ms * r1)).to(dtype)
    )
    uniform_b1 = bool((b1 == 1).all())
    signal = torch.empty((T, n_atoms), dtype=state_dtype, device=device)
    e1 = e2 = e_te = torch.empty(0)
    times: tuple[float, float] | None = None
    for t in range(T):
        if (train.tr_ms[t], train.te_ms[t]) != times:
            times = (train.tr_ms[t], train.te_ms[t])
            e1, e2 = torch.exp(-times[0] * r1).to(dtype), torch.exp(-times[0] * r2).to(dtype)
            e_te = torch.exp(-times[1] * r2).to(dtype)
        n = min(t, T - 1 - t, peak - 1) + 1  # orders in use after this pulse
        f, g = f_rows[T - t : T - t + n], g_rows[t : t + n]
        if uniform_b1:
            cos, sin = math.cos(flips[t]), math.sin(flips[t])
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
        z[0] += 1 - e1
        if turns[t] != 1:
            f.mul_(turns[t])
            g.mul_(turns[t].conjugate())
        if t + 1 < T:
            f_rows[T - t - 1] = g_rows[t + 1].conj()
    return signal.T


def n_orders(train: Train, t2_ms: float, tolerance: float = 1e-3) -> int:
    """Orders that `fisp_signal` keeps for one T2, at most those that can return to an echo."""
    needed = _needed_orders(train, torch.tensor([t2_ms], dtype=torch.float64), tolerance)
    return min(int(needed), (train.n_timepoints + 1) // 2)


def _needed_orders(train: Train, t2_ms: Tensor, tolerance: float) -> Tensor:
    """Orders `(N,)` above which ``exp(-2 n TR/T2)`` is below the tolerance, 1 to T."""
    T = train.n_timepoints
    if tolerance <= 0:
        return torch.full(t2_ms.shape, T, dtype=torch.long)
    per_ms = -math.log(tolerance) / (2 * float(train.tr_ms.min()))
    return (t2_ms.double() * per_ms).ceil().clamp(1, T).long()
