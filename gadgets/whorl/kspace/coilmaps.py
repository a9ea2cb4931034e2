"""Coil sensitivity maps: from the centre of k-space, or from a file.

Letters: K coefficients, C coils, V virtual coils, Z slices, Y X pixels, H W pixels at low resolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.kspace.coils import coil_maps, smooth
from whorl.scan.array_file import read_arrays
from whorl.scan.failure import ScanError

#: Edge of the low-resolution images: of 256 pixels, k-space up to an eighth of its edge.
_LOW = 0.25
#: Smallest such image, below which nothing is gained.
_SMALLEST = 24
#: Neighbourhood of Walsh's covariance in pixels of the full matrix, and of the smoothing by a body coil.
_SIGMA = 4.0
#: Polynomial maps: highest degree, steps of the alternating fit, and the number of pixels above which it
#: looks at every other line and column only. What a degree is expected to hold, relative to the one below:
#: inside the object a sensitivity obeys Laplace's equation, whose solutions from sources outside fall with
#: each degree by the ratio of the radii.
_DEGREE, _FITS, _ENOUGH, _FALL = 12, 4, 8000, 0.2
#: Steps to the strongest combination of coils, from there to one that is nowhere dark, and the share of the
#: energy that counts as dark.
_POWER, _ASCENT, _DARK = 10, 30, 1e-3
#: Mean square of what a smooth phase may leave of the differences between neighbours, rad²; more is no phase.
_SMOOTH_RAD2 = 0.5
#: ESPIRiT: width of the calibration region and of the kernel in k-space, threshold of the singular values,
#: power iterations.
_CALIBRATION, _KERNEL, _THRESHOLD, _ITERATIONS = 20, 5, 0.02, 12


def low_resolution(images: Tensor, shape: tuple[int, int]) -> Tensor:
    """Images of the centre of k-space, apodised so that little rings.

    Parameters
    ----------
    images
        Complex `(..., Y, X)`; pixel j lies at ``j - n // 2``.
    shape
        (H, W), at most (Y, X).

    Returns
    -------
    Tensor
        `(..., H, W)` of the same field of view and the same values.
    """
    Y, X = images.shape[-2:]
    H, W = shape
    spectrum = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(images, dim=(-2, -1))), dim=(-2, -1))
    top, left = Y // 2 - H // 2, X // 2 - W // 2
    centre = spectrum[..., top : top + H, left : left + W]
    window = _hann(H, images).reshape(-1, 1) * _hann(W, images)
    low = torch.fft.ifft2(torch.fft.ifftshift(centre * window, dim=(-2, -1)))
    scaled: Tensor = torch.fft.fftshift(low, dim=(-2, -1)) * (H * W / (Y * X))
    return scaled


def _hann(n: int, like: Tensor) -> Tensor:
    k = torch.arange(n, device=like.device) - n // 2
    window: Tensor = torch.cos(torch.pi * k / (n + 2)).square().to(like.real.dtype)
    return window


def enlarge(images: Tensor, shape: tuple[int, int]) -> Tensor:
    """The same field of view with more pixels, linear between them: `(..., H, W)` to `(..., Y, X)`."""
    rows, columns = (_linear(n, m, images) for n, m in zip(shape, images.shape[-2:], strict=True))
    return rows @ images @ columns.T


def _linear(n: int, m: int, like: Tensor) -> Tensor:
    """`(n, m)` matrix that interpolates m pixels at n; beyond the outermost ones their value counts."""
    place = (torch.arange(n, device=like.device) - n // 2) * (m / n) + m // 2
    place = place.clamp(0, m - 1)
    below = place.floor().long().clamp_max(m - 2)
    part = place - below
    matrix = torch.zeros((n, m), device=like.device)
    matrix.scatter_(1, below[:, None], (1 - part)[:, None])
    matrix.scatter_(1, below[:, None] + 1, part[:, None])
    return matrix.to(like.dtype)


def _unit(maps: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(maps, dim=0)
    unit: Tensor = maps / norm.clamp_min(1e-30)
    return unit


def maps_from_centre(coil_images: Tensor, method: str = "walsh") -> Tensor:
    """Coil maps `(C, Y, X)` from the centre of k-space of subspace images `(K, C, Y, X)`.

    Parameters
    ----------
    coil_images
        Of all coils; weak coefficients add noise only.
    method
        ``walsh``: adaptive combination (`whorl.kspace.coils.coil_maps`). ``espirit``: the eigenvectors of the
        calibration matrix of the first coefficient (SigPy), and Walsh's where those find no signal.

    Returns
    -------
    Tensor
        Unit norm over the coils; the phase is that of `whorl.kspace.coils.coil_maps`.

    References
    ----------
    Uecker et al., Magn Reson Med 71:990 (2014), doi:10.1002/mrm.24751 (ESPIRiT).
    """
    shape = coil_images.shape[-2], coil_images.shape[-1]
    size = max(_SMALLEST, round(_LOW * shape[0])), max(_SMALLEST, round(_LOW * shape[1]))
    size = min(size[0], shape[0]), min(size[1], shape[1])
    low = low_resolution(coil_images, size)
    sigma = _SIGMA * min(size[0] / shape[0], size[1] / shape[1])
    maps = coil_maps(low, sigma=sigma)
    if method == "espirit":
        maps = _espirit(low[0], maps)
    return _unit(enlarge(maps, shape))


@dataclass(frozen=True, slots=True, eq=False)
class Polynomials:
    """Of the place, within an object: what does not depend on the images. Without an object there are none.

    Letters: N polynomials, P pixels that are looked at.

    Parameters
    ----------
    mask
        Boolean `(H, W)`: the object.
    y, x
        `(P,)`: lines and columns of the pixels.
    neighbours
        `(2, n)`: which of them lie side by side.
    degrees
        `(2, N)` along y and x.
    along
        `(_DEGREE + 1, H)` and `(_DEGREE + 1, W)`.
    functions
        `(N, P)`, with a root mean square of 1.
    sizes
        `(N,)` that they had before.
    """

    mask: Tensor
    y: Tensor
    x: Tensor
    neighbours: Tensor
    degrees: Tensor
    along: tuple[Tensor, Tensor]
    functions: Tensor
    sizes: Tensor

    @property
    def expected(self) -> Tensor:
        """Prior variance `(N,)` of the coefficients."""
        return _FALL ** self.degrees.sum(0).double()


def polynomials(mask: Tensor) -> Polynomials:
    """Polynomials within an object, a boolean `(H, W)`."""
    rows, columns = torch.nonzero(mask.any(1))[:, 0], torch.nonzero(mask.any(0))[:, 0]
    along_y, along_x = (
        _legendre(n, *((int(inside[0]), int(inside[-1])) if len(inside) else (0, 0)), mask.device)
        for n, inside in zip(mask.shape, (rows, columns), strict=True)
    )
    places = torch.arange(_DEGREE + 1, device=mask.device)
    degrees = torch.nonzero(places[:, None] + places <= _DEGREE).T
    step = 2 if int(mask.sum()) > _ENOUGH else 1
    looked_at = mask[::step, ::step]
    y, x = torch.nonzero(looked_at).T * step
    functions = along_y[degrees[0]][:, y] * along_x[degrees[1]][:, x]
    sizes = functions.square().mean(1).sqrt().clamp_min(1e-30)
    numbers = torch.where(looked_at, looked_at.flatten().cumsum(0).reshape(looked_at.shape) - 1, -1)
    sides = [
        torch.stack([numbers[:, :-1].flatten(), numbers[:, 1:].flatten()]),
        torch.stack([numbers[:-1].flatten(), numbers[1:].flatten()]),
    ]
    pairs = torch.cat(sides, 1)
    neighbours = pairs[:, (pairs >= 0).all(0)]
    return Polynomials(
        mask, y, x, neighbours, degrees, (along_y, along_x), functions / sizes[:, None], sizes
    )  # fmt: skip


def polynomial_maps(coil_images: Tensor, basis: Polynomials, start: Tensor) -> Tensor:
    """Coil maps `(C, H, W)` that are polynomials of the place, fitted to images of the coils.

    ``min Σ_r w |d_jc(r) - m_c(r) x_j(r)|²`` over images x and maps m by turns: what the coils have in common,
    the object and its phase however sharp, is x; what is left, the ratios of the coils, is as smooth as their
    fields. A quarter-resolution map blurs across the border of the object and errs where a neighbourhood has
    little signal; with few readouts for each interleaf the reconstruction multiplies such errors. Bright
    places count by their magnitude, not its square, since what disturbs the images is aliasing, not noise
    alone. Coefficients have a prior whose variance falls with the degree (`_FALL`).

    Parameters
    ----------
    coil_images
        Complex `(J, C, H, W)`.
    basis
        Of the object; maps are 0 outside.
    start
        `(C, H, W)` maps to begin with.

    Returns
    -------
    Tensor
        Unit norm over the coils in the mask. Their free phase is that of the images up to a sign, as far as
        it is smooth: that of the combined images is flat.

    References
    ----------
    Ying & Sheng, Magn Reson Med 57:1196 (2007), doi:10.1002/mrm.21245 (polynomial maps, alternating fit).
    """
    if len(start) < 2 or not len(basis.y):
        return start * basis.mask
    y, x, functions, expected = basis.y, basis.x, basis.functions, basis.expected
    data, maps = coil_images[:, :, y, x].to(torch.complex128), start[:, y, x].to(torch.complex128)
    maps = maps * _without_the_objects_phase(data, maps).conj()
    coefficients = _fit_by_turns(data, maps, functions, expected)
    sampled = coefficients.T @ functions.to(data.dtype)
    images = (data * sampled.conj()).sum(1) / sampled.abs().square().sum(0).clamp_min(1e-30)
    phase, constant = _shared_phase(images, basis.neighbours, functions, expected)
    table = coefficients.new_zeros((len(start) + 1, _DEGREE + 1, _DEGREE + 1))
    both = torch.cat([coefficients, phase[:, None].to(table.dtype)], 1) / basis.sizes[:, None]
    table[:, basis.degrees[0], basis.degrees[1]] = both.T
    along_y, along_x = basis.along
    whole = along_y.T.to(table.dtype) @ table @ along_x.to(table.dtype)
    turn = torch.polar(torch.ones_like(whole[-1].real), whole[-1].real + constant)
    return (_unit(whole[:-1]) * turn * basis.mask).to(coil_images.dtype)


def _fit_by_turns(data: Tensor, maps: Tensor, functions: Tensor, expected: Tensor) -> Tensor:
    """Coefficients `(N, C)` of maps.

    Parameters
    ----------
    data
        Images of the coils `(J, C, P)`, complex128.
    maps
        `(C, P)` to begin with.
    functions
        `(N, P)`, of which the maps are sums.
    expected
        Prior variance `(N,)` of their coefficients.
    """
    complex_functions = functions.to(data.dtype)
    coefficients = complex_functions.new_zeros((len(functions), len(maps)))
    for _ in range(_FITS):
        images = (data * maps.conj()).sum(1) / maps.abs().square().sum(0).clamp_min(1e-30)  # (J, P)
        power = images.abs().square().sum(0)
        usual = power.median().clamp_min(1e-300)
        weight = (power / usual).clamp_min(1e-6).rsqrt() / usual
        left = ((data - images[:, None] * maps).abs().square().sum((0, 1)) * weight).mean() / (len(maps) - 1)
        # Of a few pixels, or of none with signal, nothing may be left.
        left = torch.maximum(left, 1e-12 * (power * weight).mean()).clamp_min(1e-300)
        matrix = (functions * (power * weight)) @ functions.T + torch.diag(left / expected)
        right = complex_functions @ ((data * images.conj()[:, None]).sum(0) * weight).T  # (N, C)
        coefficients = torch.linalg.solve_ex(matrix.to(right.dtype), right).result
        maps = coefficients.T @ complex_functions
    return coefficients


def _shared_phase(
    images: Tensor, neighbours: Tensor, functions: Tensor, expected: Tensor
) -> tuple[Tensor, Tensor]:
    """Polynomial of the phase that images `(J, P)` share: real coefficients `(N,)`, and a constant.

    Half the phase of the sum of their squares, which do not know the sign of an image. By the differences
    between neighbours, which are small where the phase itself has turned more than once.

    Parameters
    ----------
    neighbours
        Places `(2, n)` that lie side by side.
    functions, expected
        As for `_fit_by_turns`.
    """
    squares = images.square().sum(0)
    one, other = neighbours
    product = squares[other] * squares[one].conj()
    weight = product.abs().sqrt().sqrt()
    weight = weight / weight.mean().clamp_min(1e-300)
    differences = functions[:, other] - functions[:, one]  # (N, pairs)
    gram, right = (differences * weight) @ differences.T, differences @ (weight * product.angle())
    left, found = weight.new_ones(()), right
    for _ in range(2):
        found = torch.linalg.solve_ex(gram + torch.diag(left / expected), right).result
        left = (
            (weight * (product.angle() - found @ differences).square()).mean().nan_to_num(1.0).clamp_min(1e-9)
        )
    found = found.where(left < _SMOOTH_RAD2, 0)
    phase = found @ functions
    flat = squares * torch.polar(squares.abs().clamp_min(1e-300).rsqrt(), -phase)
    return found / 2, flat.sum().angle() / 2


def _without_the_objects_phase(data: Tensor, maps: Tensor) -> Tensor:
    """Phase factor `(P,)` of maps `(C, P)` that is not the coils': as a combination of coils has it. Maps
    that follow the sign of the object's images are no polynomials.

    Where the combination is dark its phase turns around a point, which no polynomial does either. It begins
    as that which is strongest in images `(J, C, P)`, and ascends to the largest mean logarithm of what it
    sees of the maps, relative to all that they see.
    """
    rows = data.transpose(0, 1).flatten(1)
    energy = rows @ rows.mH
    brightest = energy.diagonal().real.argmax().reshape(1)
    combination = energy.index_select(1, brightest)[:, 0]
    for _ in range(_POWER):  # to the strongest
        combination = energy @ (combination / torch.linalg.vector_norm(combination).clamp_min(1e-30))
    unit = _unit(maps)
    seen = combination.conj() @ unit
    for _ in range(_ASCENT):
        combination = (unit / (seen.abs().square() + _DARK)) @ seen.conj()
        combination = combination / torch.linalg.vector_norm(combination).clamp_min(1e-30)
        seen = combination.conj() @ unit
    return torch.where(seen == 0, torch.ones_like(seen), seen.sgn())


def _legendre(n: int, first: int, last: int, device: torch.device) -> Tensor:
    """Legendre polynomials `(_DEGREE + 1, n)` of pixels, -1 at the first and 1 at the last of some."""
    t = (torch.arange(n, dtype=torch.float64, device=device) - (first + last) / 2) / max(
        (last - first) / 2, 1
    )
    rows = [torch.ones_like(t), t]
    for k in range(1, _DEGREE):
        rows.append(((2 * k + 1) * t * rows[k] - k * rows[k - 1]) / (k + 1))
    return torch.stack(rows)


def _espirit(images: Tensor, otherwise: Tensor) -> Tensor:
    """ESPIRiT maps `(C, H, W)` of coil images, with the phase of others, which count where it finds none."""
    from sigpy.mri.app import EspiritCalib

    axes = (-2, -1)
    kspace = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(images, dim=axes)), dim=axes)
    width = min(_CALIBRATION, *images.shape[-2:])
    found = EspiritCalib(
        kspace.cpu().numpy() / float(kspace.abs().max().clamp_min(1e-30)),
        calib_width=width,
        thresh=_THRESHOLD,
        kernel_width=_KERNEL,
        crop=0.8,
        max_iter=_ITERATIONS,
        show_pbar=False,
    ).run()
    maps = torch.from_numpy(np.asarray(found)).to(otherwise)
    # SigPy's phase is that of the first coil, which may be dark somewhere.
    overlap = (maps.conj() * otherwise).sum(0)
    maps = maps * (overlap / overlap.abs().clamp_min(1e-30))
    there = torch.linalg.vector_norm(maps, dim=0) > 0.5
    return torch.where(there, maps, otherwise)


@dataclass(frozen=True, slots=True, eq=False)
class ExternalMaps:
    """Maps of another scan, or an image of the body coil that they are made with.

    Parameters
    ----------
    csm
        Complex `(Z, C, Y, X)`, or ``None``.
    body
        Complex `(Z, Y, X)`, or ``None``. Either is in a unit of its own, in which the largest value is 1.
    source
        The file.
    """

    csm: NDArray[np.complex64] | None
    body: NDArray[np.complex64] | None
    source: str

    def on_slice(self, number: int, matrix: Tensor, coil_images: Tensor) -> Tensor:
        """Maps `(V, Y, X)` of a slice's virtual coils.

        Parameters
        ----------
        number
            Of the slice; one slice in the file stands for all.
        matrix
            `(V, C)`: whitening and compression of the coils.
        coil_images
            `(K, V, Y, X)` of the slice, for maps by the body coil: smoothed first coefficient of each coil
            over that of the body coil.

        Returns
        -------
        Tensor
            Unit norm over the coils where they see something, 0 elsewhere.

        Raises
        ------
        ScanError
            If the file lacks the slice, is 0 throughout it, or has other coils.
        """
        shape = coil_images.shape[-2], coil_images.shape[-1]
        values = self.csm if self.csm is not None else self.body
        assert values is not None
        if not (len(values) == 1 or number < len(values)):
            raise ScanError(
                f"the coil maps {self.source} have {len(values)} slices, and none for slice {number}: "
                f"expected one for each, or one for all"
            )
        one = torch.from_numpy(values[0 if len(values) == 1 else number]).to(matrix.device)
        if not bool(one.any()):
            raise ScanError(
                f"the coil maps {self.source} are 0 throughout slice {number}: expected what the coils see"
            )
        if self.csm is not None:
            if one.shape[0] != matrix.shape[1]:
                raise ScanError(
                    f"the coil maps {self.source} have {one.shape[0]} coils, the scan has {matrix.shape[1]}: "
                    f"expected the same"
                )
            maps = torch.einsum("vc,cyx->vyx", matrix, _resized(one, shape))
        else:
            body = _resized(one[None], shape)[0]
            power = smooth(body.abs().square()[None].to(coil_images.dtype), _SIGMA)[0].real
            relative = smooth(coil_images[0] * body.conj(), _SIGMA)
            maps = relative / power.clamp_min(1e-6 * power.max())
        norm = torch.linalg.vector_norm(maps, dim=0)
        seen: Tensor = maps / norm.clamp_min(1e-30) * (norm > 1e-6 * norm.max())
        return seen


def _resized(images: Tensor, shape: tuple[int, int]) -> Tensor:
    """Images `(C, H, W)` over the same field of view on another matrix."""
    return images if tuple(images.shape[-2:]) == shape else enlarge(images, shape)


def read_external_maps(path: str) -> ExternalMaps:
    """Read the file of property ``coil_maps_file``.

    `.npz` or `.h5` with an array `csm` `(C, Y, X)` or `(Z, C, Y, X)`, or `body` `(Y, X)` or `(Z, Y, X)`;
    `.npy` with the former. Any matrix over the reconstructed field of view.

    Raises
    ------
    ScanError
        If the file cannot be read or has no such array.
    """
    found, there = read_arrays(path, "the coil maps", ["csm", "body"])
    if len(found) != 1:
        raise ScanError(
            f"the coil maps {path} have {', '.join(there) or 'nothing'}: expected an array csm "
            f"(slices, coils, y, x), or body (slices, y, x)"
        )
    ((name, values),) = found.items()
    wanted = 4 if name == "csm" else 3
    if values.ndim == wanted - 1:
        values = values[None]
    if values.ndim != wanted or min(values.shape) < 1 or min(values.shape[-2:]) < 2:
        raise ScanError(
            f"{name} of the coil maps {path} has shape {values.shape}: expected "
            f"{'(slices, coils, y, x)' if name == 'csm' else '(slices, y, x)'}"
        )
    if values.dtype.kind not in "fciu" or not np.isfinite(values).all():
        raise ScanError(f"{name} of the coil maps {path} is not of finite numbers: expected complex ones")
    if not values.any():
        raise ScanError(f"{name} of the coil maps {path} is 0 throughout: expected what the coils see")
    # Of any unit: squares of single precision shall neither overflow nor vanish.
    own = (values / np.abs(values).max()).astype(np.complex64)
    return ExternalMaps(own if name == "csm" else None, own if name == "body" else None, path)
