"""The pretend device has the manners of a GPU: what is tested on it means something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kspace.spirals import complex_normal
from pretend_device import NAME, PRETEND, on_host, transfers

OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda z: z.sum(0) + z.abs().square().sum(),
    "in place": lambda z: z.clone().mul_(2).add_(z, alpha=-1j),
    "number": lambda z: (z.real % 0.7, 2 / z, z**2, z.real.clamp(-1, 1)),
    "integers": lambda z: torch.arange(5, device=z.device) // 2 * 1.5,
    "conjugate": lambda z: (z.conj() * z, z.mH @ z, z.conj().clone(), z.conj().imag + 1),
    "einsum": lambda z: torch.einsum("kyx,cyx->kcx", z, z.conj()),
    "bmm": lambda z: torch.bmm(z, z.mT),
    "out": lambda z: torch.mm(z[0], z[1].T, out=torch.empty(5, 5, dtype=z.dtype, device=z.device)),
    "out, resized": lambda z: torch.max(z.abs(), 1, out=(z.real.new_empty(0), torch.arange(0).to(z.device))),
    "FFT": lambda z: torch.fft.ifft2(torch.fft.fftshift(torch.fft.fft2(z, s=(9, 12)))),
    "solve": lambda z: torch.linalg.solve_ex(z @ z.mH + 2 * torch.eye(5, device=z.device), z).result,
    "inverse": lambda z: torch.linalg.inv(z @ z.mH + 2 * torch.eye(5, device=z.device)),
    "Cholesky": lambda z: torch.linalg.cholesky(z @ z.mH + 2 * torch.eye(5, device=z.device)),
    "QR": lambda z: torch.linalg.qr(z.mT),
    "eigenvectors": lambda z: torch.linalg.eigh(z @ z.mH),
    "index": lambda z: (z[:, torch.tensor([3, 0], device=z.device)], z[z.real > 0], z[..., 1:3][:, ::2]),
    "index_add_": lambda z: z.clone().index_add_(1, torch.tensor([1, 1], device=z.device), z[:, :2]),
    "padded, rolled": lambda z: torch.roll(torch.nn.functional.pad(z, (1, 2)), (1, 2), (1, 2)),
    "quantiles": lambda z: (torch.quantile(z.real.flatten(), 0.3), z.real.nanmedian(), z.real.median()),
    "sorted": lambda z: (z.real.argsort(stable=True), torch.cumsum(z, 1), z.real.flatten().unique()),
    "where": lambda z: torch.where(z.real > 0, z, 0),
    "list": lambda z: z[0, 0].tolist(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_give_what_they_give_on_the_cpu(name: str) -> None:
    z = complex_normal(3, 5, 7)
    here, there = OPERATIONS[name](z), OPERATIONS[name](z.to(PRETEND))
    pairs = list(zip(here, there, strict=True)) if isinstance(here, tuple) else [(here, there)]
    for a, b in pairs:
        if isinstance(a, Tensor):
            assert b.device == PRETEND
            assert b.dtype == a.dtype
            # The same kernel on the same numbers.
            assert torch.equal(b.cpu(), a)
        else:
            assert b == a


def test_it_is_not_the_cpu() -> None:
    x = torch.zeros(2, 3, device=PRETEND)
    assert type(x) is Tensor
    assert x.device.type == NAME
    assert not x.is_cpu
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\)"):
        x.numpy()
    assert x.to(PRETEND) is x
    assert x.cpu().device.type == "cpu"
    assert torch.zeros(2, device=torch.device(NAME)).device == PRETEND
    assert x.new_zeros(3).device == torch.zeros_like(x).device == torch.tensor(1.0, device=PRETEND).device


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: y + x,
        lambda x, y: x.add_(y),
        lambda x, y: x @ y.T,
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.einsum("ab,cb->ac", x, y),
        lambda x, y: torch.mul(y, y, out=x),
        lambda x, y: x.index_add_(0, torch.tensor([0, 1]), x),
    ],
)
def test_mixed_devices_are_refused(mix: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        mix(torch.ones(2, 3).to(PRETEND), torch.ones(2, 3))


def test_what_may_be_mixed() -> None:
    x, number = torch.ones(2, 3).to(PRETEND), torch.tensor(2.0)
    for result in (x * number, number * x, torch.where(x > 0, x, number), x[torch.tensor([1])]):
        assert result.device == PRETEND
    x[0] = torch.ones(3)  # a copy
    assert x.device == PRETEND


def test_numbers_drawn_on_the_device_are_refused() -> None:
    with pytest.raises(RuntimeError, match="random"):
        torch.rand(3, device=PRETEND)


def test_views_are_views() -> None:
    x = torch.zeros(4, 6, dtype=torch.complex64).to(PRETEND)
    expected = torch.zeros(4, 6, dtype=torch.complex64)
    for t in (x, expected):
        t[..., 1:3] = 7
        t[1:].T[2] += 1
        t.reshape(2, 2, 6)[1, 0].real.mul_(3)
        t.diagonal().add_(1j)
        torch.view_as_real(t)[3, :, 1] = 5
        t[:, ::2].unfold(1, 2, 1)[0].sub_(2)
    assert torch.equal(x.cpu(), expected)


def parameter_after_some_steps(device: torch.device) -> tuple[Tensor, Tensor]:
    """A parameter and its gradient, through a custom function, views that are written to, and Adam."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return 2 * x

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            assert x.device == gradient.device == device
            return 2 * gradient + 0 * x

    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(4, 3, generator=generator).to(device))
    x = torch.randn(5, 4, generator=generator).to(device)
    optimiser = torch.optim.Adam([weight], lr=0.1, foreach=True)
    for _ in range(3):
        optimiser.zero_grad(set_to_none=True)
        y = Twice.apply(x @ weight)  # type: ignore[no-untyped-call]
        y[:, 1:].mul_(3)
        y[0, ::2] = 0
        torch.relu(y).square().sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert weight.grad is not None
    return weight.detach(), weight.grad


def test_gradients_and_adam() -> None:
    for here, there in zip(
        parameter_after_some_steps(torch.device("cpu")), parameter_after_some_steps(PRETEND), strict=True
    ):
        assert there.device == PRETEND
        assert torch.equal(there.cpu(), here)


#: What is done, and how often it counts as a copy to the device, one to the host, and a wait.
COUNTED: dict[str, tuple[Callable[[Tensor], Any], tuple[int, int, int]]] = {
    "computing": (lambda x: (x @ x.T).relu_()[1:].sum(), (0, 0, 0)),
    "numbers of the host": (lambda x: (2 * x).clamp_min_(0.5).fill_(3), (0, 0, 0)),
    "to(device)": (lambda x: torch.ones(2).to(x.device), (1, 0, 0)),
    "tensor(list)": (lambda x: torch.tensor([1, 2], device=x.device), (1, 0, 0)),
    "indices of the host": (lambda x: x[torch.tensor([1, 0])], (1, 0, 0)),
    "cpu": (lambda x: x.cpu(), (0, 1, 0)),
    "tolist": (lambda x: x.tolist(), (0, 1, 0)),
    "item": (lambda x: x[0, 0].item(), (0, 0, 1)),
    "float": (lambda x: float(x.sum()), (0, 0, 1)),
    "bool": (lambda x: bool((x > 0).any()), (0, 0, 1)),
    "nonzero": (lambda x: torch.nonzero(x), (0, 0, 1)),
    "where": (lambda x: torch.where(x > 0), (0, 0, 1)),
    "mask": (lambda x: x[x > 0], (0, 0, 1)),
    "values by mask": (lambda x: torch.zeros_like(x).index_put_((x > 0,), x[0, :0]), (0, 0, 1)),
    "one value by mask": (lambda x: x.__setitem__(x > 9, 0.0), (0, 0, 0)),
    "eigenvalues": (lambda x: torch.linalg.eigh(x @ x.T), (0, 0, 1)),
    "inverse": (lambda x: torch.linalg.inv(x @ x.T + torch.eye(2, device=x.device)), (0, 0, 1)),
    "inverse, unchecked": (lambda x: torch.linalg.inv_ex(x @ x.T), (0, 0, 0)),
    "solution, unchecked": (lambda x: torch.linalg.solve_ex(x @ x.T, x), (0, 0, 0)),
    "bincount": (lambda x: torch.bincount(x[0].long()), (0, 0, 1)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_transfers_are_counted(name: str) -> None:
    work, expected = COUNTED[name]
    x = torch.zeros(2, 3).to(PRETEND)
    with transfers() as counted:
        work(x)
    kinds = [event.kind for event in counted.events]
    assert (kinds.count("to device"), kinds.count("to host"), kinds.count("wait")) == expected
    assert all(event.line.startswith("test_pretend_device.py:") for event in counted.events)
    with transfers() as other:
        pass
    assert other.events == []


def test_what_stays_on_the_device_counts_as_nothing() -> None:
    x = torch.arange(6.0).reshape(2, 3).to(PRETEND)
    with transfers() as counted:
        x.clone().copy_(x.flip(0))
        x.contiguous()
    assert counted.events == []
    assert counted.kernels >= 1


def test_the_memory_is_shared() -> None:
    x = complex_normal(2, 3).to(PRETEND)
    on_host(x)[1, 2] = 5
    assert x[1, 2].item() == 5
    assert torch.equal(on_host(x.conj().imag), x.cpu().conj().imag)
