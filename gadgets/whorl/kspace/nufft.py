"""Non-uniform Fourier transform between images and spiral samples.

Signal model, whatever the back end: ``y(k) = Σ_r x(r) exp(-i 2π k·r)`` with k in cycles per pixel
and pixel j at ``j - n // 2``. The adjoint is the exact transpose of that sum, without any scale.

Letters: B batch, M samples, Y X pixels.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor


class Nufft(Protocol):
    """Both directions for one set of M samples."""

    def forward(self, images: Tensor) -> Tensor:
        """Samples `(B, M)` of images `(B, Y, X)`."""

    def adjoint(self, kspace: Tensor) -> Tensor:
        """Images `(B, Y, X)` of samples `(B, M)`."""


class FinufftNufft:
    """FINUFFT on the CPU, cuFINUFFT on a GPU; plans are made once and used for each batch.

    The GPU path has not run on a GPU yet.

    References
    ----------
    Barnett et al., SIAM J Sci Comput 41:C479 (2019), doi:10.1137/18M120885X.
    """

    def __init__(self, trajectory: Tensor, shape: tuple[int, int], tolerance: float) -> None:
        if trajectory.is_cuda:
            import cufinufft as backend
        else:
            import finufft as backend
        self._backend = backend
        self._shape = shape
        self._tolerance = tolerance
        radians = (2 * np.pi * trajectory).to(torch.float32)  # (M, 2)
        # The first axis of an image is y.
        self._points = [self._own(radians[:, axis].contiguous()) for axis in (1, 0)]
        self._n_samples = (len(trajectory),)
        # By kind and size of the batch on a GPU, by kind and core on a CPU.
        self._plans: dict[tuple[int, int], Any] = {}
        self._pool = ThreadPoolExecutor(torch.get_num_threads(), "whorl-nufft")

    @staticmethod
    def _own(tensor: Tensor) -> object:
        """The same memory as the back end's array type, unless PyTorch still owes it a conjugation."""
        tensor = tensor.resolve_conj()
        if tensor.is_cuda:
            import cupy

            return cupy.from_dlpack(tensor)
        return tensor.numpy()

    def _plan(self, kind: int, n_transforms: int, **options: object) -> Any:
        # The smaller oversampling costs a wider kernel and saves more in the FFT: three times as fast
        # on two cores for 36 images of 256², at the same tolerance.
        plan = self._backend.Plan(
            kind,
            self._shape,
            n_transforms,
            self._tolerance,
            1 if kind == 1 else -1,
            dtype="complex64",
            upsampfac=1.25,
            **options,
        )
        plan.setpts(*self._points)
        return plan

    def _execute(self, kind: int, batch: Tensor) -> Tensor:
        batch = batch.contiguous()
        if batch.is_cuda:
            key = (kind, len(batch))
            if key not in self._plans:
                self._plans[key] = self._plan(kind, len(batch))
            return torch.utils.dlpack.from_dlpack(self._plans[key].execute(self._own(batch)))
        # One core, one transform at a time: threads that share a transform add up in another order each time.
        cores = min(torch.get_num_threads(), len(batch))
        for core in range(cores):
            if (kind, core) not in self._plans:
                self._plans[kind, core] = self._plan(kind, 1, nthreads=1)
        result = torch.empty(
            (len(batch), *(self._shape if kind == 1 else self._n_samples)), dtype=batch.dtype
        )
        data, out = batch.resolve_conj().numpy(), result.numpy()

        def work(core: int) -> None:
            for row in range(core, len(data), cores):
                self._plans[kind, core].execute(data[row], out[row])

        list(self._pool.map(work, range(cores)))
        return result

    def forward(self, images: Tensor) -> Tensor:
        return self._execute(2, images).reshape(len(images), -1)

    def adjoint(self, kspace: Tensor) -> Tensor:
        return self._execute(1, kspace).reshape(len(kspace), *self._shape)


class SigpyNufft:
    """SigPy's gridding NUFFT: NumPy on the CPU, CuPy on a GPU.

    The GPU path has not run on a GPU yet. Oversampling 2 and kernel width 6 give a relative
    error of about 1e-4.
    """

    def __init__(self, trajectory: Tensor, shape: tuple[int, int], tolerance: float) -> None:
        import sigpy

        self._sigpy = sigpy
        self._shape = shape
        self._fine = {"oversamp": 2.0, "width": 6} if tolerance < 1e-2 else {"oversamp": 1.25, "width": 4}
        scale = trajectory.new_tensor([shape[1], shape[0]])
        # SigPy counts in cycles per field of view and takes y first.
        self._coord = FinufftNufft._own((trajectory * scale).flip(1).contiguous())
        # SigPy divides by the root of the number of pixels in both directions.
        self._gain = float(np.sqrt(shape[0] * shape[1]))

    def forward(self, images: Tensor) -> Tensor:
        result = self._sigpy.nufft(FinufftNufft._own(images.contiguous()), self._coord, **self._fine)
        return torch.utils.dlpack.from_dlpack(result) * self._gain

    def adjoint(self, kspace: Tensor) -> Tensor:
        oshape = (len(kspace), *self._shape)
        result = self._sigpy.nufft_adjoint(
            FinufftNufft._own(kspace.contiguous()), self._coord, oshape=oshape, **self._fine
        )
        return torch.utils.dlpack.from_dlpack(result) * self._gain


def make_nufft(
    trajectory: Tensor, shape: tuple[int, int], *, backend: str = "auto", tolerance: float = 1e-4
) -> Nufft:
    """A NUFFT for samples at `trajectory`.

    Parameters
    ----------
    trajectory
        `(M, 2)` float32, (kx, ky) in cycles per pixel, [-0.5, 0.5].
    shape
        (Y, X) of the images.
    backend
        ``finufft``, ``sigpy``, or ``auto``: FINUFFT on a CPU; on a GPU cuFINUFFT where it is
        installed, else SigPy.
    tolerance
        Relative error that is asked for.

    Raises
    ------
    ValueError
        If the trajectory does not have shape `(M, 2)`.
    """
    if trajectory.ndim != 2 or trajectory.shape[1] != 2:
        raise ValueError(f"the trajectory has shape {tuple(trajectory.shape)}: expected (samples, 2)")
    if backend == "auto" and trajectory.is_cuda:
        import importlib.util

        backend = "finufft" if importlib.util.find_spec("cufinufft") else "sigpy"
    kind = SigpyNufft if backend == "sigpy" else FinufftNufft
    return kind(trajectory, shape, tolerance)
