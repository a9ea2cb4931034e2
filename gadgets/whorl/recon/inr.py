"""One joint implicit neural representation (INR) of all subspace images.

An encoder and a small MLP map each place to a joint feature vector φ(r); every subspace image
is a linear combination of it, ``x_k(r) = w_kᵀ φ(r) + b_k``. It is fitted to the images x0 in the
image domain, without training data and without k-space.

Letters: K coefficients, Y X pixels, P pixels of the box around the object, F size of φ, J real images.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from whorl.pipeline.deadlines import Deadline
from whorl.recon.encoders import make_encoder
from whorl.recon.mask import box_around

_logger = logging.getLogger("whorl")

# A line of pixels is much like its neighbour: the iterations look at every other one, in turn. The maps
# are as good, in little more than half the time.
_HALVES = (slice(0, None, 2), slice(1, None, 2))
_ALL = slice(None)

#: Learning rates by encoder. Those of `fourier` and `siren` are a compromise between a smooth object and one
#: with edges (one seed each); 0.03 was the largest that was tried for `fourier`.
_LEARNING_RATES = {"grid": 0.03, "hash": 0.03, "fourier": 0.03, "siren": 0.001}

#: Iterations on a GPU before they are captured: of each half two, so that all buffers exist.
_BEFORE_CAPTURE = 4


@dataclass(frozen=True, slots=True)
class InrFit:
    """Fitted subspace images `(K, Y, X)`, zero outside the mask, the data term of each iteration, and the
    joint features φ with a last one of ones `(F+1, Y, X)`, zero outside the mask as well."""

    coefficients: Tensor
    losses: tuple[float, ...]
    features: Tensor


#: Takes the number of an iteration, from 1 on, and what gives the fit as it is then (which takes time).
Watch = Callable[[int, Callable[[], InrFit]], None]


class _Mlp(torch.nn.Module):
    """ReLU layers on `(features, pixels)`: the pixels lie next to each other in memory."""

    def __init__(self, sizes: list[int], generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        self.weights, self.biases = torch.nn.ParameterList(), torch.nn.ParameterList()
        for n_in, n_out in pairwise(sizes):
            bound = math.sqrt(6 / n_in)  # He initialisation for ReLU
            weight = (torch.rand((n_out, n_in), generator=generator) * 2 - 1) * bound
            self.weights.append(torch.nn.Parameter(weight.to(device)))
            self.biases.append(torch.nn.Parameter(torch.zeros((n_out, 1), device=device)))

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = torch.relu(weight @ x + bias)
        return x


class _Taken(torch.autograd.Function):
    """Some columns of a matrix. The gradient of indexing would add them up one by one; these differ, so that
    they are only put back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(columns)
        ctx.shape = values.shape
        return values.index_select(1, columns)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (columns,) = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.shape)
        return whole.scatter_(1, columns.expand(len(gradient), -1), gradient), None


def solve_head(features: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Best linear head by ridge regression, in float64.

    Parameters
    ----------
    features
        `(F+1, P)`: φ and a row of ones; pixels that do not count are 0.
    target
        `(J, P)` real.
    ridge
        Relative to the mean diagonal of ``φφᵀ``.

    Returns
    -------
    Tensor
        `(J, F+1)` float32.
    """
    gram = (features @ features.T).double()
    right = (features @ target.T).double()
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-12)
    # The checks of `solve` would wait for a GPU; a head that is not finite shows in the images.
    head: Tensor = torch.linalg.solve_ex(gram, right).result.T
    return head.to(features.dtype)


def warm_up() -> None:
    """Make PyTorch ready: its first optimiser imports its compiler, which takes longer than a second and is
    better done while a scan still arrives."""
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])


@contextmanager
def _stream_for(device: torch.device) -> Iterator[None]:
    """On a GPU, a stream of its own: what is captured as a graph may not touch the default stream."""
    if device.type != "cuda":
        yield
        return
    outer, own = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    own.wait_stream(outer)
    with torch.cuda.stream(own):
        yield
    outer.wait_stream(own)


def _captured(steps: list[Callable[[], Tensor]]) -> list[Callable[[], Tensor]]:
    """Steps as CUDA graphs, which launch their many small kernels at once; as they are if that fails.

    Must be called on the stream and after the warm-up that graphs need. Other threads may use the GPU
    meanwhile. Never run on a GPU so far.
    """

    def replay(graph: torch.cuda.CUDAGraph, result: Tensor) -> Tensor:
        graph.replay()
        return result.clone()  # the next replay writes to the same place

    graphs = []
    try:
        for step in steps:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
            ):
                result = step()
            graphs.append(partial(replay, graph, result))
    except RuntimeError as error:
        _logger.warning("the INR runs without a CUDA graph: %s", error)
        return steps
    return [*graphs]


def fit_inr(
    coefficients: Tensor,
    mask: Tensor,
    *,
    fit: str = "varpro",
    encoder: str = "grid",
    iterations: int = 0,
    levels: int = 8,
    features: int = 4,
    base_resolution: int = 16,
    finest_resolution: int = 128,
    log2_table: int = 15,
    frequencies: int = 64,
    sigma: float = 5.0,
    layers: int = 4,
    omega: float = 30.0,
    hidden: int = 64,
    learning_rate: float = 0.0,
    lambda_enc: float = 3e-6,
    lambda_mlp: float = 1e-6,
    ridge: float = 1e-4,
    seed: int = 0,
    deadline: Deadline | None = None,
    progress: Callable[[int, int], None] | None = None,
    watch: Watch | None = None,
) -> InrFit:
    """Fit the joint INR to subspace images: ``min ‖x0 - f(r)‖² + λ_enc‖θ_enc‖² + λ_mlp‖θ_mlp‖²``.

    ``varpro`` (variable projection) solves the linear head for its optimum in each iteration and
    lets Adam change only encoder and MLP; weak components are then as converged as strong ones at
    any time. ``adam`` changes all weights by Adam, as the method was published.

    Parameters
    ----------
    coefficients
        `(K, Y, X)`: x0, complex, or real where a common phase has been taken out.
    mask
        Boolean `(Y, X)`: pixels that are fitted.
    encoder
        `grid`, `hash`, `fourier` or `siren`, see `whorl.recon.encoders`; `siren` has no further MLP.
    base_resolution, finest_resolution, log2_table
        Grid points along the field of view of the first and last level (`grid`, `hash`), and the entries
        of a level's table as a power of two (`hash`).
    frequencies, sigma
        Of `fourier`: their number, and their spread in cycles per field of view.
    layers, omega
        Of `siren`: sine layers of the width `hidden`, and the factor of their angles.
    learning_rate
        0: by encoder, 0.03, and 0.001 for `siren`.
    iterations
        0: 100 for ``varpro``, 300 for ``adam``.
    deadline
        At which the fit gives up. The loop does not wait for a GPU: what counts is when an iteration is
        queued.
    progress
        Called with (iteration, iterations).
    watch
        Called after each iteration, see `Watch`; changes nothing in the fit.

    Other parameters: see `whorl.config.Settings`.

    Raises
    ------
    DeadlinePassed
        If `deadline` comes before the last iteration.
    FloatingPointError
        If the fit diverges.
    ValueError
        If the mask is empty, or there is no such encoder.

    Notes
    -----
    On a GPU one iteration of each half of the raster is captured as a CUDA graph. This part has never run
    on a GPU.

    References
    ----------
    Golub & Pereyra, SIAM J Numer Anal 10:413 (1973), doi:10.1137/0710036 (variable projection).
    """
    K, *shape = coefficients.shape
    device = coefficients.device
    if not bool(mask.any()):
        raise ValueError("the mask is empty: there is nothing to fit")
    iterations = iterations or (100 if fit == "varpro" else 300)

    # The encoder works on the box around the object, everything after it on the pixels of the mask.
    box = box_around(mask)
    inside = mask[box]
    box_shape = (inside.shape[0], inside.shape[1])
    places = [torch.nonzero(inside[lines].flatten())[:, 0] for lines in (*_HALVES, _ALL)]

    x0 = torch.where(inside, coefficients[:, box[0], box[1]], 0)  # (K, Y', X')
    scale = 0.5 * float(x0[0].abs().max()) or 1.0
    # J rows: K if the images are real, else real and imaginary parts one after the other.
    target = (torch.cat([x0.real, x0.imag]) if x0.is_complex() else x0) / scale  # (J, Y', X')
    J = len(target)
    wanted = [
        target[:, lines].flatten(1)[:, some] for lines, some in zip((*_HALVES, _ALL), places, strict=True)
    ]
    ones = [torch.ones((1, len(some)), device=device) for some in places]

    generator = torch.Generator().manual_seed(seed)
    encode = make_encoder(
        encoder,
        box_shape,
        share=max(box_shape) / max(shape),
        levels=levels,
        features=features,
        base=base_resolution,
        finest=finest_resolution,
        log2_table=log2_table,
        frequencies=frequencies,
        sigma=sigma,
        layers=layers,
        hidden=hidden,
        omega=omega,
        generator=generator,
        device=device,
    )
    # The features of sine layers are already what an MLP would make of them.
    sizes = [encode.n_features] if encoder == "siren" else [encode.n_features, hidden, hidden]
    mlp = _Mlp(sizes, generator, device)
    groups = [(list(encode.parameters()), lambda_enc), (list(mlp.parameters()), lambda_mlp)]
    head = torch.zeros((J, sizes[-1] + 1), device=device)
    if fit == "adam":
        head[:, :-1] = ((torch.rand((J, hidden), generator=generator) * 2 - 1) / math.sqrt(hidden)).to(device)
        head = torch.nn.Parameter(head)
        groups.append(([head], lambda_mlp))
    on_gpu = device.type == "cuda"
    rate = learning_rate or _LEARNING_RATES[encoder]
    optimiser = torch.optim.Adam(
        [p for group, _ in groups for p in group],
        # A graph reads the learning rate from where it lies on the GPU.
        lr=torch.tensor(rate, device=device) if on_gpu else rate,
        betas=(0.9, 0.99),
        foreach=True,
        capturable=on_gpu,
    )
    decay = 0.1 ** (1 / iterations)

    def features_of(part: int) -> Tensor:
        """φ `(F, P)` of the pixels in one half of the lines, or in all."""
        values: Tensor = _Taken.apply(encode((*_HALVES, _ALL)[part]), places[part])  # type: ignore[no-untyped-call]
        features: Tensor = mlp(values)
        return features

    def best_head(phi: Tensor, part: int) -> Tensor:
        return solve_head(torch.cat([phi, ones[part]]), wanted[part], ridge) if fit == "varpro" else head

    def step(part: int) -> Tensor:
        """One iteration on one half of the lines; gives the data term. Never waits for the device."""
        optimiser.zero_grad(set_to_none=True)
        phi = features_of(part)
        # The head of varpro is at its optimum, so no gradient needs to pass through its solution.
        weights = best_head(phi.detach(), part)
        fitted = torch.addmm(weights[:, -1:], weights[:, :-1], phi)
        error = (fitted - wanted[part]).square().sum() / max(len(places[part]), 1)
        penalty = sum(factor * p.square().sum() for group, factor in groups for p in group)
        (error + penalty).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        return error.detach()

    losses: list[Tensor] = []

    def current() -> InrFit:
        """The fit as it is now."""
        with torch.no_grad():
            phi = torch.cat([features_of(-1), ones[-1]])  # (F+1, P)
            weights = best_head(phi[:-1], -1)
            fitted = (weights @ phi) * scale  # (J, P)
        if not bool(torch.isfinite(fitted).all()):
            raise FloatingPointError("the INR diverged: its images are not finite")
        values = torch.complex(fitted[:K], fitted[K:]) if x0.is_complex() else fitted
        images, joint = torch.zeros_like(coefficients), phi.new_zeros((len(phi), *shape))
        images[:, mask], joint[:, mask] = values, phi
        return InrFit(images, tuple(torch.stack(losses).tolist()), joint)

    steps: list[Callable[[], Tensor]] = [partial(step, part) for part in range(len(_HALVES))]
    with _stream_for(device), torch.enable_grad():  # whatever the caller's mode is
        for iteration in range(iterations):
            if deadline is not None:
                deadline.check(f"the INR was at iteration {iteration} of {iterations}")
            if on_gpu and iteration == _BEFORE_CAPTURE:
                steps = _captured(steps)
            losses.append(steps[iteration % len(steps)]())
            optimiser.param_groups[0]["lr"] *= decay
            if progress is not None:
                progress(iteration + 1, iterations)
            if watch is not None:
                watch(iteration + 1, current)
    return current()
