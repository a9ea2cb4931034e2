"""cuFINUFFT and CuPy for the pretend device: they take and refuse what the genuine ones do.

Written after the Python layers of cuFINUFFT 2.3.1 to 2.5.1 and CuPy 13 to 14. They compute with FINUFFT as
whorl does on the CPU, so that results are equal bit for bit.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import finufft
import numpy as np
import pytest
import sigpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretend_device import NAME, on_device, on_host

#: Fields of its `cufinufft_opts`.
_OPTIONS = {
    "debug", "gpu_binsizex", "gpu_binsizey", "gpu_binsizez", "gpu_device_id", "gpu_kerevalmeth",
    "gpu_maxbatchsize", "gpu_maxsubprobsize", "gpu_method", "gpu_obinsizex", "gpu_obinsizey", "gpu_obinsizez",
    "gpu_sort", "gpu_spreadinterponly", "gpu_stream", "modeord", "upsampfac",
}  # fmt: skip


def _memory(tensor: Tensor) -> NDArray[Any]:
    """What a program sees that is given an address: no conjugation that is still owed."""
    raw = tensor.detach()
    array: NDArray[Any] = on_host(torch._conj(raw) if raw.is_conj() else raw).numpy()
    return array


class Plan:
    """`cufinufft.Plan` for types 1 and 2."""

    def __init__(
        self,
        nufft_type: int,
        n_modes: tuple[int, ...] | int,
        n_trans: int = 1,
        eps: float = 1e-6,
        isign: int | None = None,
        dtype: Any = "complex64",
        **kwargs: Any,
    ) -> None:
        self._dtype = np.dtype(dtype)
        if self._dtype not in (np.complex64, np.complex128):
            raise TypeError("Expected complex64 or complex128.")
        self._real = np.dtype(np.float32 if self._dtype == np.complex64 else np.float64)
        self._type, self._n_trans = nufft_type, n_trans
        self._n_modes = (n_modes,) if isinstance(n_modes, int) else tuple(n_modes)
        if len(self._n_modes) not in (1, 2, 3):
            raise ValueError("Only dimensions 1, 2, and 3 supported")
        for name in kwargs:
            if name not in _OPTIONS:
                raise TypeError(f"Invalid option '{name}'")
        # By Horner's rule it has kernels for these only; 0 is its own choice.
        known = kwargs.get("upsampfac", 0) in (0, 1.25, 2) or kwargs.get("gpu_kerevalmeth", 1) == 0
        if nufft_type not in (1, 2) or n_trans < 1 or not known:
            raise RuntimeError("Error creating plan.")
        sign = isign if isign is not None else 1 if nufft_type == 1 else -1
        self._busy = threading.Lock()
        self._plan = finufft.Plan(
            nufft_type, self._n_modes, 1, float(eps), sign, dtype=self._dtype.name, upsampfac=1.25, nthreads=1
        )

    def setpts(self, x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> None:
        given = [_checked(p, name, self._real) for name, p in zip("xyz", (x, y, z), strict=True)]
        points = [point for point in given if point is not None]
        if points[0].ndim != 1:
            raise TypeError("Argument `x` must be a vector")
        if len(points) != len(self._n_modes) or any(p.shape != points[0].shape for p in points):
            raise TypeError("Argument `y` must be of shape of `x`")
        # Only the addresses are kept by the genuine one.
        self._references = points
        self._plan.setpts(*(_memory(point) for point in points))

    def execute(self, data: Tensor, out: Tensor | None = None) -> Tensor:
        data = self._require(_checked(data, "data", self._dtype))
        n_points = (len(self._references[0]),)
        modes, samples = self._n_modes, n_points
        wanted, made = (samples, modes) if self._type == 1 else (modes, samples)
        if data.numel() != self._n_trans * int(np.prod(wanted)):
            raise TypeError(f"Argument `data` must be of shape {(self._n_trans, *wanted)}")
        shape = (*data.shape[: data.ndim - len(wanted)], *made)
        dtype = torch.complex64 if self._dtype == np.complex64 else torch.complex128
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=data.device)
        else:
            out = self._require(_checked(out, "out", self._dtype, output=True))
            if out.shape != shape:
                raise TypeError(f"Argument `out` must be of shape {shape}")
        rows = _memory(data).reshape(self._n_trans, *wanted)
        results = _memory(out).reshape(self._n_trans, *made)
        # A genuine plan has one place to work in, whoever uses it.
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("two threads execute one plan")
        for row, result in zip(rows, results, strict=True):
            self._plan.execute(row, result)
        self._busy.release()
        return out

    @staticmethod
    def _require(tensor: Tensor | None) -> Tensor:
        assert tensor is not None
        return tensor


def _checked(tensor: Tensor | None, name: str, dtype: Any, *, output: bool = False) -> Tensor | None:
    if tensor is None:
        return None
    if np.dtype(str(tensor.dtype).removeprefix("torch.")) != dtype:
        raise TypeError(f"Argument `{name}` does not have the correct dtype: {tensor.dtype} was given, "
                        f"but {dtype} was expected.")  # fmt: skip
    if not tensor.is_contiguous():
        message = f"Argument `{name}` does not satisfy the following requirement: C"
        if output:
            raise TypeError(message)
        warnings.warn(f"{message}. Copying array (this may reduce performance)", stacklevel=2)
        tensor = tensor.contiguous()
    # It asks for `__cuda_array_interface__`.
    if tensor.device.type != NAME:
        raise TypeError("Invalid GPU array implementation. Implementation must implement the standard cuda "
                        "array interface.")  # fmt: skip
    return tensor


class Array:
    """`cupy.ndarray`: nothing of NumPy takes it for an array."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values
        self.shape, self.dtype = values.shape, values.dtype

    def __array__(self, *_: Any, **__: Any) -> NDArray[Any]:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 12, 0

    def __dlpack__(self, **_: Any) -> Any:
        return torch._C._to_dlpack(on_device(torch.from_numpy(self.values)))


def from_dlpack(array: Tensor, *, device: Any = None, copy: Any = None) -> Array:
    """`cupy.from_dlpack`, of PyTorch's tensors: what these do not hand over is refused."""
    if array.device.type != NAME:
        raise TypeError("CPU arrays cannot be directly imported to CuPy.")
    if array.requires_grad or array.is_conj():
        raise BufferError("Can't export tensors that require gradient, or with the conjugate bit set")
    return Array(on_host(array).numpy())


def install(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Let imports find cuFINUFFT or CuPy (with a SigPy that uses it), or both."""
    modules = {"cufinufft": ModuleType("cufinufft"), "cupy": ModuleType("cupy")}
    modules["cufinufft"].Plan = Plan  # type: ignore[attr-defined]
    modules["cupy"].from_dlpack = from_dlpack  # type: ignore[attr-defined]
    for name in names:
        patch.setitem(sys.modules, name, modules[name])
    if "cupy" in names:
        for transform in ("nufft", "nufft_adjoint"):
            patch.setattr(sigpy, transform, _on_arrays(getattr(sigpy, transform)))


def uninstall(patch: pytest.MonkeyPatch) -> None:
    """Let imports find neither."""
    for name in ("cufinufft", "cupy"):
        patch.setitem(sys.modules, name, None)


def _on_arrays(transform: Callable[..., Any]) -> Callable[..., Any]:
    """A transform of SigPy for CuPy's arrays, and not for a mixture."""

    def transformed(data: Any, coord: Any, **options: Any) -> Any:
        if not isinstance(data, Array):
            return transform(data, coord, **options)
        assert isinstance(coord, Array)
        return Array(transform(data.values, coord.values, **options))

    return transformed
