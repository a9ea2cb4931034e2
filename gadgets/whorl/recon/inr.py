"""One joint implicit neural representation (INR) of all subspace images.

A grid encoder and a small MLP map each place to a joint feature vector φ(r); every subspace image
is a linear combination of it, ``x_k(r) = w_kᵀ φ(r) + b_k``. It is fitted to the images x0 in the
image domain, without training data and without k-space.

Letters: K coefficients, Y X pixels, P pixels of the box around the object, L levels, D features of a
level, F size of φ, J real images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# A line of pixels is much like its neighbour: the iterations look at every other one, in turn. The maps
# are as good, in little more than half the time.
_HALVES = (slice(0, None, 2), slice(1, None, 2))
_ALL = slice(None)


class DeadlinePassed(TimeoutError):  # noqa: N818 - as TimeoutError
    """The fit did not end in time."""


@dataclass(frozen=True, slots=True)
class InrFit:
    """Fitted subspace images `(K, Y, X)`, zero outside the mask, and the data term of each iteration."""

    coefficients: Tensor
    losses: tuple[float, ...]


def interpolation_matrix(points: int, pixels: int, device: torch.device | None = None) -> Tensor:
    """Linear interpolation from `points` equidistant grid points to a raster: `(pixels, points)`.

    The first and last grid point lie on the first and last pixel.
    """
    place = torch.linspace(0, points - 1, pixels, dtype=torch.float64)
    left = place.floor().clamp(max=max(points - 2, 0)).long()
    part = place - left
    matrix = torch.zeros((pixels, points), dtype=torch.float64)
    matrix[torch.arange(pixels), left] = 1 - part
    if points > 1:
        matrix[torch.arange(pixels), left + 1] += part
    return matrix.to(torch.float32).to(device)


class GridEncoder(torch.nn.Module):
    """Multi-resolution feature grids, each dense, read out on the fixed pixel raster.

    Because the places are always the pixels, a level is ``W_y · G · W_xᵀ`` with two small constant
    matrices: exact bilinear interpolation, with a backward pass that is two matrix products.

    References
    ----------
    Müller et al., ACM Trans Graph 41:102 (2022), doi:10.1145/3528223.3530127.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        levels: int,
        features: int,
        base: int,
        finest: int,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        super().__init__()
        growth = (finest / base) ** (1 / max(levels - 1, 1))
        self.grids = torch.nn.ParameterList()
        self._read: list[tuple[Tensor, Tensor]] = []
        for level in range(levels):
            points = base * growth**level
            sizes = [max(2, min(n, round(points * n / max(shape)))) for n in shape]
            # Small values let the first iterations shape the features rather than remember them.
            grid = (torch.rand((features, *sizes), generator=generator) * 2 - 1) * 1e-4
            self.grids.append(torch.nn.Parameter(grid.to(device)))
            rows, columns = (
                interpolation_matrix(size, n, device) for size, n in zip(sizes, shape, strict=True)
            )
            self._read.append((rows, columns.T.contiguous()))

    def forward(self, lines: slice) -> Tensor:
        """Features `(L·D, P)` of the pixels in some lines of the raster."""
        return torch.cat(
            [
                (rows[lines] @ grid @ columns).flatten(1)
                for grid, (rows, columns) in zip(self.grids, self._read, strict=True)
            ]
        )


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
    head: Tensor = torch.linalg.solve(gram, right).T
    return head.to(features.dtype)


def warm_up() -> None:
    """Make PyTorch ready: its first optimiser imports its compiler, which takes longer than a second and is
    better done while a scan still arrives."""
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])


def fit_inr(
    coefficients: Tensor,
    mask: Tensor,
    *,
    fit: str = "varpro",
    iterations: int = 0,
    levels: int = 8,
    features: int = 4,
    base_resolution: int = 16,
    finest_resolution: int = 128,
    hidden: int = 64,
    learning_rate: float = 0.03,
    lambda_enc: float = 3e-6,
    lambda_mlp: float = 1e-6,
    ridge: float = 1e-4,
    seed: int = 0,
    deadline: float | None = None,
    progress: Callable[[int, int], None] | None = None,
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
    iterations
        0: 100 for ``varpro``, 300 for ``adam``.
    deadline
        Time (`time.monotonic`) at which the fit gives up.
    progress
        Called with (iteration, iterations).

    Other parameters: see `whorl.config.Settings`.

    Raises
    ------
    DeadlinePassed
        If `deadline` comes before the last iteration.
    FloatingPointError
        If the fit diverges.
    ValueError
        If the mask is empty.

    References
    ----------
    Golub & Pereyra, SIAM J Numer Anal 10:413 (1973), doi:10.1137/0710036 (variable projection).
    """
    K, *shape = coefficients.shape
    device = coefficients.device
    if not bool(mask.any()):
        raise ValueError("the mask is empty: there is nothing to fit")
    iterations = iterations or (100 if fit == "varpro" else 300)

    # Encoder and MLP work on the box around the object; pixels of the box outside the mask weigh 0.
    rows, columns = torch.nonzero(mask.any(1))[:, 0], torch.nonzero(mask.any(0))[:, 0]
    box = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    inside = mask[box].to(torch.float32)[None]  # (1, Y', X')
    box_shape = (inside.shape[1], inside.shape[2])

    x0 = torch.where(mask[box], coefficients[:, box[0], box[1]], 0)  # (K, Y', X')
    scale = 0.5 * float(x0[0].abs().max()) or 1.0
    # J rows: K if the images are real, else real and imaginary parts one after the other.
    target = (torch.cat([x0.real, x0.imag]) if x0.is_complex() else x0) / scale  # (J, Y', X')
    J = len(target)

    share = max(box_shape) / max(shape)  # resolutions are given for the whole field of view
    generator = torch.Generator().manual_seed(seed)
    encoder = GridEncoder(
        box_shape,
        levels=levels,
        features=features,
        base=max(2, round(base_resolution * share)),
        finest=max(2, round(finest_resolution * share)),
        generator=generator,
        device=device,
    )
    mlp = _Mlp([levels * features, hidden, hidden], generator, device)
    groups = [(list(encoder.parameters()), lambda_enc), (list(mlp.parameters()), lambda_mlp)]
    head = torch.zeros((J, hidden + 1), device=device)
    if fit == "adam":
        head[:, :-1] = ((torch.rand((J, hidden), generator=generator) * 2 - 1) / math.sqrt(hidden)).to(device)
        head = torch.nn.Parameter(head)
        groups.append(([head], lambda_mlp))
    optimiser = torch.optim.Adam(
        [p for group, _ in groups for p in group], lr=learning_rate, betas=(0.9, 0.99), foreach=True
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.1 ** (1 / iterations))

    def joint_features(lines: slice) -> Tensor:
        weight = inside[:, lines].flatten(1)
        return torch.cat([mlp(encoder(lines)) * weight, weight])  # (F+1, P)

    losses = []
    for iteration in range(iterations):
        if deadline is not None and time.monotonic() > deadline:
            raise DeadlinePassed(
                f"the INR was at iteration {iteration} of {iterations} when its time was over"
            )
        optimiser.zero_grad(set_to_none=True)
        lines = _HALVES[iteration % 2]
        wanted = target[:, lines].flatten(1)
        phi = joint_features(lines)
        if fit == "varpro":
            # The head is at its optimum, so no gradient needs to pass through its solution.
            head = solve_head(phi.detach(), wanted, ridge)
        error = (head @ phi - wanted).square().sum() / inside[:, lines].sum().clamp_min(1)
        penalty = sum(factor * p.square().sum() for group, factor in groups for p in group)
        (error + penalty).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        losses.append(error.detach())
        if progress is not None:
            progress(iteration + 1, iterations)

    with torch.no_grad():
        phi = joint_features(_ALL)
        if fit == "varpro":
            head = solve_head(phi, target.flatten(1), ridge)
        fitted = (head @ phi) * scale  # (J, P)
    if not bool(torch.isfinite(fitted).all()):
        raise FloatingPointError("the INR diverged: its images are not finite")
    images = torch.zeros_like(coefficients)
    values = torch.complex(fitted[:K], fitted[K:]) if x0.is_complex() else fitted
    images[:, box[0], box[1]] = values.reshape(K, *box_shape)
    return InrFit(images, tuple(torch.stack(losses).tolist()))
