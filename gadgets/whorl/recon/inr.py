"""One joint implicit neural representation (INR) of all subspace images.

An encoder and a small MLP map each place to a joint feature vector φ(r); every subspace image
is a linear combination of it, ``x_k(r) = w_kᵀ φ(r) + b_k``. It is fitted to the images in the
image domain, without training data and without k-space.

With a guide (`whorl.recon.guide`) the encoder's grids are not random at the start: they hold the principal
components of the guide, which are features of φ themselves as well.

Letters: K coefficients, Y X pixels, P pixels that count, F size of φ, D features of a level, J real images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from whorl.recon.encoders import GridEncoder, make_encoder

# A line of pixels is much like its neighbour: the iterations look at every other one, in turn. The maps
# are as good, in little more than half the time.
_HALVES = (slice(0, None, 2), slice(1, None, 2))
_ALL = slice(None)

#: Learning rates by encoder. Those of `fourier` and `siren` are a compromise between a smooth object and one
#: with edges (one seed each); 0.03 was the largest that was tried for `fourier`.
_LEARNING_RATES = {"grid": 0.03, "hash": 0.03, "fourier": 0.03, "siren": 0.001}

#: Learning rate with a guide, where iterations are asked for. By default there are none: five gain texture
#: 0.04 points of T1 and cost where there is more noise or an uneven order (docs/validation.md).
_GUIDED_RATE = 0.003


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


def principal_components(images: Tensor, mask: Tensor) -> Tensor:
    """Principal components of the pixels of a mask, `(J, Y, X)`, the strongest first, each of unit variance
    and mean 0 there, and 0 outside. One that does not vary stays small.

    Parameters
    ----------
    images
        Real `(J, Y, X)`.
    mask
        Boolean `(Y, X)`.
    """
    weight = mask.double()
    centred = images.double() - (images * weight).sum((1, 2), keepdim=True) / weight.sum()
    flat = (centred * weight).flatten(1)
    variances, vectors = torch.linalg.eigh(flat @ flat.T / weight.sum())
    variances = variances.flip(0).clamp_min(0)
    scale = torch.maximum(variances, 1e-14 * variances[0]).clamp_min(1e-300).rsqrt()
    components: Tensor = (vectors.flip(1) * scale).T @ flat
    return components.reshape(images.shape).to(images.dtype)


def fit_inr(
    coefficients: Tensor,
    mask: Tensor,
    *,
    guide: Tensor | None = None,
    share: float = 1.0,
    fit: str = "varpro",
    encoder: str = "grid",
    iterations: int = -1,
    levels: int = 0,
    features: int = 4,
    base_resolution: int = 16,
    finest_resolution: int = 0,
    log2_table: int = 15,
    frequencies: int = 64,
    sigma: float = 5.0,
    layers: int = 4,
    omega: float = 30.0,
    hidden: int = 0,
    learning_rate: float = 0.0,
    lambda_enc: float = 3e-6,
    lambda_mlp: float = 1e-6,
    ridge: float = 1e-4,
    seed: int = 0,
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
    guide
        Real images `(D, Y, X)`, or complex ones, with less noise. The encoder is then a `grid` whose levels,
        the last with a point for each pixel, begin as a pyramid of the principal components of the guide;
        their sum belongs to φ, beside what the MLP makes of them. ``None``: small random values at the start.
    share
        Longest side of the raster in fields of view, to which resolutions refer.
    encoder
        `grid`, `hash`, `fourier` or `siren`, see `whorl.recon.encoders`; `siren` has no further MLP.
    iterations
        -1: none with a guide, 100 without; 300 for ``adam``.
    levels, hidden, finest_resolution, learning_rate
        0: 4, 16, one point per pixel and 0.003 with a guide; without 8, 64, 96 and 0.03 (`siren`: 0.001).
    base_resolution, finest_resolution, log2_table
        Grid points along the field of view of the first and last level (`grid`, `hash`), and the entries
        of a level's table as a power of two (`hash`).
    frequencies, sigma
        Of `fourier`: their number, and their spread in cycles per field of view.
    layers, omega
        Of `siren`: sine layers of the width `hidden`, and the factor of their angles.
    progress
        Called with (iteration, iterations); what it raises ends the fit. It does not wait for a GPU: what it
        is told is that an iteration is queued.
    watch
        Called after each iteration, see `Watch`; changes nothing in the fit.

    Other parameters: see `whorl.config.Settings`.

    Raises
    ------
    FloatingPointError
        If the images or the guide are not finite, or the fit diverges.
    ValueError
        If the mask is empty, or there is no such encoder.

    References
    ----------
    Golub & Pereyra, SIAM J Numer Anal 10:413 (1973), doi:10.1137/0710036 (variable projection).
    """
    K, *shape = coefficients.shape
    device = coefficients.device
    places = [torch.nonzero(mask[lines].flatten())[:, 0] for lines in (*_HALVES, _ALL)]
    if not len(places[-1]):
        raise ValueError("the mask is empty: there is nothing to fit")
    guided = guide is not None
    if guide is not None and not bool(torch.isfinite(guide).all()):
        raise FloatingPointError("the guide of the INR is not finite")
    if iterations < 0:
        iterations = 300 if fit == "adam" else (0 if guided else 100)
    hidden = hidden or (16 if guided else 64)
    rate = learning_rate or (_GUIDED_RATE if guided else _LEARNING_RATES[encoder])

    x0 = torch.where(mask, coefficients, 0)
    scale = (0.5 * x0[0].abs().max()).clamp_min(1e-30)
    # J rows: K if the images are real, else real and imaginary parts one after the other.
    target = _real(x0) / scale  # (J, Y, X)
    J = len(target)
    wanted = [
        target[:, lines].flatten(1)[:, some] for lines, some in zip((*_HALVES, _ALL), places, strict=True)
    ]
    ones = [torch.ones((1, len(some)), device=device) for some in places]

    generator = torch.Generator().manual_seed(seed)
    if guide is not None:
        encoder, features, levels = "grid", len(_real(guide)), levels or 4
        finest_resolution = finest_resolution or round(max(shape) / share)
    encode = make_encoder(
        encoder,
        (shape[0], shape[1]),
        share=share,
        levels=levels or 8,
        features=features,
        base=min(base_resolution, finest_resolution or base_resolution),
        finest=finest_resolution or 96,
        log2_table=log2_table,
        frequencies=frequencies,
        sigma=sigma,
        layers=layers,
        hidden=hidden,
        omega=omega,
        generator=generator,
        device=device,
    )
    if guide is not None:
        assert isinstance(encode, GridEncoder)
        encode.fill(principal_components(_real(guide), mask), mask)
    # The features of sine layers are already what an MLP would make of them.
    sizes = [encode.n_features] if encoder == "siren" else [encode.n_features, hidden, hidden]
    mlp = _Mlp(sizes, generator, device)
    groups = [(list(encode.parameters()), lambda_enc), (list(mlp.parameters()), lambda_mlp)]
    F = sizes[-1] + (features if guided else 0)
    head = torch.zeros((J, F + 1), device=device)
    if fit == "adam":
        head[:, :-1] = ((torch.rand((J, F), generator=generator) * 2 - 1) / math.sqrt(F)).to(device)
        head = torch.nn.Parameter(head)
        groups.append(([head], lambda_mlp))

    def features_of(part: int) -> Tensor:
        """φ `(F, P)` of the pixels in one half of the lines, or in all."""
        values: Tensor = _Taken.apply(encode((*_HALVES, _ALL)[part]), places[part])  # type: ignore[no-untyped-call]
        joint: Tensor = mlp(values)
        if not guided:
            return joint
        levels = values.reshape(len(values) // features, features, values.shape[1])
        return torch.cat([joint, levels.sum(0)])

    def best_head(phi: Tensor, part: int) -> Tensor:
        return solve_head(torch.cat([phi, ones[part]]), wanted[part], ridge) if fit == "varpro" else head

    losses: list[Tensor] = []

    def current() -> InrFit:
        """The fit as it is now."""
        with torch.no_grad():
            phi = torch.cat([features_of(-1), ones[-1]])  # (F+1, P)
            fitted = best_head(phi[:-1], -1) @ phi  # (J, P)
            error = (fitted - wanted[-1]).square().sum() / fitted.shape[1]
            fitted = fitted * scale
        if not bool(torch.isfinite(fitted).all()):
            raise FloatingPointError("the INR diverged: its images are not finite")
        values = torch.complex(fitted[:K], fitted[K:]) if x0.is_complex() else fitted
        images, joint = torch.zeros_like(coefficients), phi.new_zeros((len(phi), *shape))
        images.flatten(1)[:, places[-1]], joint.flatten(1)[:, places[-1]] = values, phi
        return InrFit(images, tuple(torch.stack([*losses, error]).tolist()), joint)

    if iterations:
        optimiser = torch.optim.Adam(
            [p for group, _ in groups for p in group], lr=rate, betas=(0.9, 0.99), foreach=True
        )
    with torch.enable_grad():  # whatever the caller's mode is
        for iteration in range(iterations):
            # One half of the lines; nothing here waits for the device.
            part = iteration % len(_HALVES)
            phi = features_of(part)
            # The head of varpro is at its optimum, so no gradient needs to pass through its solution.
            weights = best_head(phi.detach(), part)
            fitted = torch.addmm(weights[:, -1:], weights[:, :-1], phi)
            error = (fitted - wanted[part]).square().sum() / max(len(places[part]), 1)
            penalty = sum(factor * p.square().sum() for group, factor in groups for p in group)
            optimiser.zero_grad(set_to_none=True)
            (error + penalty).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            optimiser.param_groups[0]["lr"] *= 0.1 ** (1 / iterations)
            losses.append(error.detach())
            if progress is not None:
                progress(iteration + 1, iterations)
            if watch is not None:
                watch(iteration + 1, current)
    return current()


def _real(images: Tensor) -> Tensor:
    """Real `(J, Y, X)` of images; of complex ones real and imaginary parts one after the other."""
    return torch.cat([images.real, images.imag]) if images.is_complex() else images
