"""A pretend accelerator: it computes on the CPU and has the manners of a GPU.

Its tensors are genuine tensors of PyTorch's device type for private back ends, here called ``pretend``, over
ordinary memory. What PyTorch hands to a kernel of the device comes to `_compute`, which runs the CPU's kernel
over the same memory. Autograd, composite operations, most checks for mixed devices, and what needs a copy
between devices are PyTorch's own, as on a GPU.

Refused, as by CUDA: operations that mix devices (a CPU tensor without dimensions may join in), `.numpy()`.
Refused besides: random numbers drawn on the device, where each kind of device draws others.
Counted, within `transfers`: copies to the device and to the host, and hidden waits for the device.

Not seen: what only CUDA knows (streams, graphs, its memory, its own limits and order of summation).

An operation takes some 20 to 50 µs longer than on the CPU. To be imported before the first backward pass of a
process, with which PyTorch settles its devices: that is, at the head of a test module.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration

import whorl

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this PyTorch has no back ends written in Python", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("PyTorch knows one kind of accelerator, and here is a genuine one", allow_module_level=True)

NAME = "pretend"
_PACKAGE = str(Path(whorl.__file__).parent)
_TORCH = str(Path(torch.__file__).parent)

# --- What is counted -------------------------------------------------------------------------------------

#: Operations whose CUDA kernels make the host wait: the size of the result depends on the data, or the host
#: looks at what a solver reports. What waits because it calls `.item()` is counted by that.
_WAITING = {
    "aten::_linalg_eigh",
    "aten::_linalg_svd",
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::linalg_eig",
    "aten::masked_select",
    "aten::nanmedian",  # counts what is not NaN to know where the middle is
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::unique_dim",
}


@dataclass(frozen=True, slots=True)
class Event:
    """One transfer: its kind (``to device``, ``to host`` or ``wait``), the operation, and the line of whorl
    that caused it (of the caller, where none of whorl's did)."""

    kind: str
    operation: str
    line: str


@dataclass(slots=True, eq=False)
class Transfers:
    """What was counted: events in their order, and how many kernels were started."""

    events: list[Event] = field(default_factory=list)
    kernels: int = 0

    @property
    def waits(self) -> list[Event]:
        """Where the host waited for the device: hidden waits, and copies to the host."""
        return [event for event in self.events if event.kind != "to device"]

    @property
    def to_device(self) -> list[Event]:
        return [event for event in self.events if event.kind == "to device"]

    def report(self) -> str:
        """A line for each kind and place, with its number, in the order of their first."""
        counted = Counter(self.events)
        return "\n".join(
            f"{number:5d}  {event.kind:9s}  {event.line}  {event.operation}"
            for event, number in counted.items()
        )


_counting: list[Transfers] = []
_lock = threading.Lock()


@contextmanager
def transfers() -> Iterator[Transfers]:
    """Count what is done within, by all threads."""
    counted = Transfers()
    with _lock:
        _counting.append(counted)
    try:
        yield counted
    finally:
        with _lock:
            _counting.remove(counted)


def _line() -> str:
    """Innermost line of whorl on the stack, else the innermost one of neither PyTorch nor this module."""
    frame, outside = sys._getframe(2), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE):
            return f"{Path(name).relative_to(_PACKAGE).as_posix()}:{frame.f_lineno}"
        if not outside and name != __file__ and not name.startswith((_TORCH, "<")):
            outside = f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return outside or "backward"


def _count(kind: str, operation: str) -> None:
    if _counting:
        event = Event(kind, operation, _line())
        with _lock:
            for counted in _counting:
                counted.events.append(event)


# --- The same memory on either device --------------------------------------------------------------------

_CPU, _PRIVATE = 1, 12  # kDLCPU and kDLExtDev of DLPack


class _Head(ctypes.Structure):
    """The first members of a DLTensor."""

    _fields_ = (("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def _relabelled(tensor: Tensor, device_type: int) -> Tensor:
    """A tensor of another device over the same memory."""
    capsule = torch._C._to_dlpack(tensor)  # type: ignore[attr-defined]
    head = _Head.from_address(_pointer(capsule, b"dltensor"))
    head.device_type, head.device_id = device_type, 0
    other: Tensor = torch._C._from_dlpack(capsule)  # type: ignore[attr-defined]
    # A conjugation or a sign that is still owed does not travel.
    if tensor.is_conj():
        other = torch._conj(other)
    return torch._neg_view(other) if tensor.is_neg() else other


def on_host(tensor: Tensor) -> Tensor:
    """The memory of a tensor of the pretend device as a tensor of the CPU; counts as nothing."""
    return _relabelled(tensor, _CPU)


def on_device(tensor: Tensor) -> Tensor:
    """The memory of a tensor of the CPU as a tensor of the pretend device; counts as nothing."""
    return _relabelled(tensor, _PRIVATE)


def _host(value: Any) -> Any:
    """Values as the CPU's kernel takes them: tensors and devices of the pretend device become the CPU's."""
    if isinstance(value, Tensor):
        if value.device.type != NAME:
            return value
        # What is empty may be there to be resized, which borrowed memory cannot be.
        return on_host(value) if value.numel() else torch.empty(value.shape, dtype=value.dtype)
    if isinstance(value, (list, tuple)):
        return [_host(one) for one in value]
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value


def _pretend(result: Any) -> Any:
    """Results of the CPU's kernel as those of the device."""
    if isinstance(result, Tensor):
        return on_device(result)
    return [_pretend(one) for one in result] if isinstance(result, (list, tuple)) else result


# --- Computing -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kind:
    """What there is to know of an operation: its name, the arguments that it writes to (place and name), for
    each result which of these it is (``None``: a new one), whether it draws random numbers, and the places of
    tensors for which it does not take numbers."""

    name: str
    written: tuple[tuple[int, str], ...]
    results: tuple[int | None, ...]
    draws: bool
    no_numbers: tuple[int, ...]


@cache
def _kind(operation: Any) -> _Kind:
    schema = operation._schema
    written, sets = [], []
    for n, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append((n, argument.name))
            sets.append(argument.alias_info.before_set)
    results = tuple(
        sets.index(to.alias_info.before_set) if to.alias_info is not None and to.alias_info.is_write else None
        for to in schema.returns
    )
    draws = any(argument.name == "generator" for argument in schema.arguments)
    tensors = (n for n, argument in enumerate(schema.arguments) if str(argument.type) == "Tensor")
    allowed = torch._C._should_allow_numbers_as_tensors(schema.name.removeprefix("aten::"))
    return _Kind(schema.name, tuple(written), results, draws, () if allowed else tuple(tensors))


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _check_devices(operation: Any, values: Sequence[Any]) -> None:
    """As CUDA does: all on one device, but for CPU tensors without dimensions."""
    found = {str(t.device) for t in _tensors(values) if t.device.type == NAME or t.dim()}
    if len(found) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(found, reverse=True))}! (when checking arguments of {operation})"
        )


def _index(name: str, args: Sequence[Any]) -> None:
    """Indices may lie on the CPU, from where they are copied; a mask makes the host wait, except where one
    value goes to all of its places (`masked_fill`). What is only read PyTorch has counted already."""
    if name == "aten::index":
        return
    indices = list(_tensors(args[1]))
    for one in indices:
        if one.device.type != NAME:
            _count("to device", name)
    if args[2].numel() != 1 and any(one.dtype == torch.bool for one in indices):
        _count("wait", name)


def _compute(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation of the device that PyTorch does not make of others."""
    kind = _kind(operation)
    if kind.draws:
        raise RuntimeError(
            f"{operation} draws random numbers on the device, others on each kind: expected some from the CPU"
        )
    for counted in _counting:
        counted.kernels += not kind.name.startswith("aten::empty")  # which only allocates
    if kind.name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_"):
        _index(kind.name, args)
        _check_devices(operation, [args[0], *args[2:], *kwargs.values()])
    else:
        _check_devices(operation, [*args, *kwargs.values()])
    if kind.name in _WAITING:
        _count("wait", kind.name)
    here, named = _host(args), {name: _host(value) for name, value in kwargs.items()}
    if any(isinstance(here[n], (int, float, complex)) for n in kind.no_numbers if n < len(here)):
        # A number that PyTorch had made a tensor of; there is a variant of the operation that takes numbers.
        operation = operation.overloadpacket
    result = operation(*here, **named)
    # What was written to is handed back as it came, and resized where the kernel has resized it.
    ours = []
    for place, name in kind.written:
        inside = place < len(args)
        theirs, its = (args[place], here[place]) if inside else (kwargs.get(name), named.get(name))
        if isinstance(theirs, Tensor) and theirs.shape != its.shape:
            theirs.data = on_device(its)
        ours.append(theirs)
    if len(kind.results) == 1:
        (place,) = kind.results
        return _pretend(result) if place is None else ours[place]
    if not kind.results:
        return None
    return tuple(
        _pretend(one) if place is None else ours[place]
        for place, one in zip(kind.results, result, strict=True)
    )


def _copied(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if source.device.type != NAME:
        _count("to device", "aten::copy_")
    elif target.device.type != NAME:
        _count("to host", "aten::copy_")
    (on_host(target) if target.device.type == NAME else target).copy_(_host(source))
    return target


def _register() -> list[torch.library.Library]:
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_compute, "PrivateUse1")
    some = torch.library.Library("aten", "IMPL")
    some.impl("_copy_from", _copied, "PrivateUse1")
    # A copy settles what is still owed; it is not asked to settle it before.
    for key in ("Conjugate", "Negative"):
        some.impl("_copy_from", torch.library.fallthrough_kernel, key)
    # A view is other numbers for the same memory: the CPU's kernel makes it without a look at the device.
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def view(operation: Any) -> Any:
        return lambda *args, **kwargs: operation.redispatch(cpu, *args, **kwargs)

    for name in ("as_strided", "view", "_reshape_alias", "unfold"):
        some.impl(name, view(getattr(torch.ops.aten, name).default), "PrivateUse1")
    return [everything, some]


_libraries = _register()
PRETEND = torch.device(NAME, 0)
