"""One joint implicit neural representation (INR) of all subspace images.

A grid encoder and a small MLP map each place to a joint feature vector φ(r); every subspace image
is a linear combination of it, ``x_k(r) = w_kᵀ φ(r) + b_k``. It is fitted to the images x0 in the
image domain, without training data and without k-space.

Letters: K coefficients, Y X pixels, V pixels in the mask, L levels, D features of a level, F = size of φ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class DeadlinePassed(TimeoutError):
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

    def forward(self) -> Tensor:
        """Features `(L·D, Y, X)` of all pixels."""
        return torch.cat(
            [rows @ grid @ columns for grid, (rows, columns) in zip(self.grids, self._read, strict=True)]
        )


def _mlp(sizes: list[int], generator: torch.Generator, device: torch.device) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for n_in, n_out in zip(sizes, sizes[1:], strict=False):
        layer = torch.nn.Linear(n_in, n_out)
        with torch.no_grad():
            bound = math.sqrt(6 / n_in)  # He initialisation for ReLU
            layer.weight.copy_((torch.rand((n_out, n_in), generator=generator) * 2 - 1) * bound)
            layer.bias.zero_()
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers).to(device)


def solve_head(features: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Best linear head by ridge regression, in float64.

    Parameters
    ----------
    features
        `(V, F+1)`: φ and a column of ones.
    target
        `(V, 2K)` real.
    ridge
        Relative to the mean diagonal of ``φᵀφ``.

    Returns
    -------
    Tensor
        `(F+1, 2K)` float32.
    """
    gram = (features.T @ features).double()
    right = (features.T @ target).double()
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-12)
    return torch.linalg.solve(gram, right).to(features.dtype)


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
    learning_rate: float = 0.1,
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
        Complex `(K, Y, X)`: x0.
    mask
        Boolean `(Y, X)`: pixels that are fitted.
    iterations
        0: 60 for ``varpro``, 300 for ``adam``.
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
    iterations = iterations or (60 if fit == "varpro" else 300)

    # Encoder and MLP work on the box around the object only.
    rows, columns = torch.nonzero(mask.any(1))[:, 0], torch.nonzero(mask.any(0))[:, 0]
    box = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    inside = mask[box]
    box_shape = (inside.shape[0], inside.shape[1])
    # Resolutions are given for the whole field of view.
    share = max(box_shape) / max(shape)
    pixel = torch.nonzero(inside.flatten())[:, 0]  # (V,)
    V = len(pixel)

    x0 = coefficients[:, box[0], box[1]].reshape(K, -1)[:, pixel]  # (K, V)
    scale = 0.5 * float(x0[0].abs().max()) or 1.0
    target = torch.view_as_real((x0 / scale).T.contiguous()).reshape(V, 2 * K)

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
    mlp = _mlp([levels * features, hidden, hidden], generator, device)
    groups = [(list(encoder.parameters()), lambda_enc), (list(mlp.parameters()), lambda_mlp)]
    head = torch.zeros((hidden + 1, 2 * K), device=device)
    rate = learning_rate
    if fit == "adam":
        rate = learning_rate / 10
        head[:-1] = ((torch.rand((hidden, 2 * K), generator=generator) * 2 - 1) / math.sqrt(hidden)).to(
            device
        )
        head.requires_grad_()
        groups.append(([head], lambda_mlp))
    optimiser = torch.optim.Adam([p for group, _ in groups for p in group], lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.1 ** (1 / iterations))
    ones = torch.ones((V, 1), device=device)

    def joint_features() -> Tensor:
        return torch.cat([mlp(encoder().flatten(1).T[pixel]), ones], dim=1)  # (V, F+1)

    losses = []
    for iteration in range(iterations):
        if deadline is not None and time.monotonic() > deadline:
            raise DeadlinePassed(
                f"the INR was at iteration {iteration} of {iterations} when its time was over"
            )
        optimiser.zero_grad(set_to_none=True)
        phi = joint_features()
        if fit == "varpro":
            # The head is at its optimum, so no gradient needs to pass through its solution.
            head = solve_head(phi.detach(), target, ridge)
        error = (phi @ head - target).square().sum() / V
        penalty = sum(weight * p.square().sum() for group, weight in groups for p in group)
        (error + penalty).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        losses.append(error.detach())
        if progress is not None:
            progress(iteration + 1, iterations)

    with torch.no_grad():
        phi = joint_features()
        if fit == "varpro":
            head = solve_head(phi, target, ridge)
        fitted = phi @ head  # (V, 2K)
    if not bool(torch.isfinite(fitted).all()):
        raise FloatingPointError("the INR diverged: its images are not finite")
    values = torch.view_as_complex(fitted.reshape(V, K, 2)).T * scale  # (K, V)
    images = torch.zeros_like(coefficients)
    images[:, mask] = values
    return InrFit(images, tuple(torch.stack(losses).tolist()))
