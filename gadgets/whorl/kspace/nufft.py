"""Non-uniform Fourier transform between images and spiral samples.

Signal model, whatever the back end: ``y(k) = Σ_r x(r) exp(-i 2π k·r)`` with k in cycles per pixel
and pixel j at ``j - n // 2``. The adjoint is the exact transpose of that sum, without any scale.

Letters: B batch, M samples, Y X pixels.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from whorl.runtime.cores import spread

#: Makes a NUFFT for a trajectory `(M, 2)`, images (Y, X) and a relative error.
_Make = Callable[[Tensor, tuple[int, int], float], "Nufft"]


class Nufft(Protocol):
    """Both directions for one set of M samples. May be used by several threads at once."""

    def forward(self, images: Tensor) -> Tensor:
        """Samples `(B, M)` of images `(B, Y, X)`."""

    def adjoint(self, kspace: Tensor) -> Tensor:
        """Images `(B, Y, X)` of samples `(B, M)`."""


def _in_radians(trajectory: Tensor) -> list[Tensor]:
    """`(M,)` along each axis of an image, the first of which is y."""
    radians = (2 * np.pi * trajectory).to(torch.float32)
    return [radians[:, axis].contiguous() for axis in (1, 0)]


class FinufftNufft:
    """FINUFFT on the CPU; plans are made once and used for each batch.

    References
    ----------
    Barnett et al., SIAM J Sci Comput 41:C479 (2019), doi:10.1137/18M120885X.
    """

    def __init__(self, trajectory: Tensor, shape: tuple[int, int], tolerance: float) -> None:
        import finufft

        self._finufft, self._shape, self._tolerance = finufft, shape, tolerance
        self._points = [points.numpy() for points in _in_radians(trajectory)]
        self._n_samples = (len(trajectory),)
        self._idle: dict[int, list[Any]] = {1: [], 2: []}  # plans by kind that no thread uses now

    def _plan(self, kind: int) -> Any:
        # The smaller oversampling costs a wider kernel and saves more in the FFT: three times as fast
        # on two cores for 36 images of 256², at the same tolerance.
        plan = self._finufft.Plan(
            kind,
            self._shape,
            1,
            self._tolerance,
            1 if kind == 1 else -1,
            dtype="complex64",
            upsampfac=1.25,
            nthreads=1,
        )
        plan.setpts(*self._points)
        return plan

    def _execute(self, kind: int, batch: Tensor) -> Tensor:
        # One core, one transform at a time: threads that share a transform add up in another order each time.
        result = torch.empty(
            (len(batch), *(self._shape if kind == 1 else self._n_samples)), dtype=batch.dtype
        )
        data, out = batch.resolve_conj().contiguous().numpy(), result.numpy()

        def work(row: int) -> None:
            try:
                plan = self._idle[kind].pop()
            except IndexError:
                plan = self._plan(kind)
            plan.execute(data[row], out[row])
            self._idle[kind].append(plan)

        spread(work, range(len(data)))
        return result

    def forward(self, images: Tensor) -> Tensor:
        return self._execute(2, images)

    def adjoint(self, kspace: Tensor) -> Tensor:
        return self._execute(1, kspace)


class CufinufftNufft:
    """cuFINUFFT on a GPU; plans are made once for each size of a batch.

    It reads and writes the memory of PyTorch's tensors, on the default stream as PyTorch does. Its sums have
    no fixed order: results repeat to rounding only. It has never run on a GPU.

    References
    ----------
    Shih et al., arXiv:2102.08463 (2021).
    """

    def __init__(self, trajectory: Tensor, shape: tuple[int, int], tolerance: float) -> None:
        import cufinufft

        self._cufinufft, self._shape, self._tolerance = cufinufft, shape, tolerance
        self._points = _in_radians(trajectory)
        self._plans: dict[tuple[int, int], Any] = {}  # by kind and size of the batch
        # A plan has one place to work in. What is queued later on the same stream may use it again.
        self._lock = threading.Lock()

    def _plan(self, kind: int, n_transforms: int) -> Any:
        # Its own oversampling: on a GPU the FFT is cheap, and the wider kernel of a smaller one is not.
        plan = self._cufinufft.Plan(
            kind, self._shape, n_transforms, self._tolerance, 1 if kind == 1 else -1, dtype="complex64"
        )
        plan.setpts(*self._points)
        return plan

    def _execute(self, kind: int, batch: Tensor) -> Tensor:
        batch, key = batch.resolve_conj().contiguous(), (kind, len(batch))
        with self._lock:
            if key not in self._plans:
                self._plans[key] = self._plan(*key)
            result: Tensor = self._plans[key].execute(batch)
        return result

    def forward(self, images: Tensor) -> Tensor:
        return self._execute(2, images)

    def adjoint(self, kspace: Tensor) -> Tensor:
        return self._execute(1, kspace)


class SigpyNufft:
    """SigPy's gridding NUFFT: NumPy on the CPU, CuPy on a GPU.

    The GPU path has never run on a GPU. Oversampling 2 and kernel width 6 give a relative error of about
    1e-4.
    """

    def __init__(self, trajectory: Tensor, shape: tuple[int, int], tolerance: float) -> None:
        import sigpy

        self._sigpy, self._shape = sigpy, shape
        self._fine = {"oversamp": 2.0, "width": 6} if tolerance < 1e-2 else {"oversamp": 1.25, "width": 4}
        scale = trajectory.new_tensor([shape[1], shape[0]])
        # SigPy counts in cycles per field of view and takes y first.
        self._coord = self._array((trajectory * scale).flip(1))
        # SigPy divides by the root of the number of pixels in both directions.
        self._gain = float(np.sqrt(shape[0] * shape[1]))

    @staticmethod
    def _array(tensor: Tensor) -> Any:
        """The memory of a tensor as an array of NumPy or CuPy."""
        # A conjugation that PyTorch still owes does not travel.
        tensor = tensor.resolve_conj().contiguous()
        if tensor.device.type == "cpu":
            return tensor.numpy()
        import cupy

        return cupy.from_dlpack(tensor)

    def forward(self, images: Tensor) -> Tensor:
        result = self._sigpy.nufft(self._array(images), self._coord, **self._fine)
        return torch.utils.dlpack.from_dlpack(result) * self._gain

    def adjoint(self, kspace: Tensor) -> Tensor:
        oshape = (len(kspace), *self._shape)
        result = self._sigpy.nufft_adjoint(self._array(kspace), self._coord, oshape=oshape, **self._fine)
        return torch.utils.dlpack.from_dlpack(result) * self._gain


def gpu_backend(backend: str) -> str:
    """Which back end serves on a GPU: ``finufft`` where cuFINUFFT can be used, else ``sigpy`` where CuPy can.

    Parameters
    ----------
    backend
        What is asked for, as for `make_nufft`.

    Raises
    ------
    ImportError
        If what it needs is not there.
    """
    why = []
    for name, package in (("finufft", "cufinufft"), ("sigpy", "cupy")):
        if backend in ("auto", name):
            try:
                importlib.import_module(package)
            except ImportError as error:  # not installed, or without the CUDA libraries that it was built for
                why.append(f"{package}: {error}")
            else:
                return name
    raise ImportError(
        f"there is no NUFFT for the GPU ({'; '.join(why)}): expected cuFINUFFT or CuPy (whorl-mrf[gpu])"
    )


def make_nufft(
    trajectory: Tensor, shape: tuple[int, int], *, backend: str = "auto", tolerance: float = 1e-4
) -> Nufft:
    """A NUFFT for samples at `trajectory`, on its device.

    Parameters
    ----------
    trajectory
        `(M, 2)` float32, (kx, ky) in cycles per pixel, [-0.5, 0.5].
    shape
        (Y, X) of the images.
    backend
        ``finufft`` (on a GPU cuFINUFFT), ``sigpy`` (on a GPU with CuPy), or ``auto``: FINUFFT on a CPU, what
        `gpu_backend` finds on a GPU.
    tolerance
        Relative error that is asked for.

    Raises
    ------
    ValueError
        If the trajectory does not have shape `(M, 2)`.
    ImportError
        If there is no such back end for a GPU.
    """
    if trajectory.ndim != 2 or trajectory.shape[1] != 2:
        raise ValueError(f"the trajectory has shape {tuple(trajectory.shape)}: expected (samples, 2)")
    on_cpu = trajectory.device.type == "cpu"
    make: _Make = FinufftNufft if on_cpu else CufinufftNufft
    if (backend if on_cpu else gpu_backend(backend)) == "sigpy":
        make = SigpyNufft
    return make(trajectory, shape, tolerance)
