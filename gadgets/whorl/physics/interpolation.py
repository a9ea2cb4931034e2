"""The surface that the atoms of a dictionary lie on, and the way up to its point that fits a voxel best.

The subspace coefficients of an atom are smooth functions of log T1, log T2 and B1. Between the points of the
grid they are interpolated by parabolas through three points of each axis; with steps of 5 % that is exact
to some 1e-5. The correlation is then maximised on that surface.

Everything is laid out with the voxels last, so that each operation works on long rows of them.

Letters: V voxels, K coefficients, P views and L real numbers of a voxel (`whorl.physics.real`), J axes that
are free.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.physics.dictionary import Dictionary, Grid
from whorl.physics.real import as_real

# Steps on one set of parabolas; then they are laid anew around those voxels that are not done.
_STEPS = 4
_ROUNDING = 1e-6
# Where a step of the grid turns the signal by less than the root of this, in rad, its slope is rounding.
_FLAT = 1e-8
# A voxel is done when it moves less, in steps of the grid.
_STILL = 2e-3
# Parabolas reach so far from their middle point, in steps of the grid.
_REACH = 1.5


def _corners(grid: Grid) -> tuple[Tensor, Tensor]:
    """For each pair of T1 and T2: where the 3 x 3 neighbours begin on the two axes, `(n_pairs, 2)`, and
    whether there are any, `(n_pairs,)`.

    They are centred on the pair, moved where they would leave the grid or include a T2 above T1.
    """
    i, j = grid.places()
    corner = np.zeros((len(i), 2), dtype=np.int64)
    nearest = np.full(len(i), np.iinfo(np.int64).max)
    for a in range(-3, 3):
        for b in range(-4, 1):
            first_i, first_j = i + a, j + b
            fits = (first_i >= 0) & (first_i + 2 < len(grid.t1_axis_ms)) & (first_j >= 0)
            # Of the three T1 the shortest allows the fewest T2.
            fits &= first_j + 2 < grid.counts[np.clip(first_i, 0, len(grid.counts) - 1)]
            distance = np.where(fits, (a + 1) ** 2 + (b + 1) ** 2, np.iinfo(np.int64).max)
            closer = distance < nearest
            nearest[closer] = distance[closer]
            corner[closer] = np.stack([first_i, first_j], 1)[closer]
    return torch.from_numpy(corner), torch.from_numpy(nearest < np.iinfo(np.int64).max)


def _log_step(axis: NDArray[np.float64]) -> float:
    return float(np.log(axis[-1] / axis[0])) / (len(axis) - 1) if len(axis) > 1 else 1.0


class Surface:
    """Interpolated dictionary. Places are `(3, V)`: positions on the axes of T1, T2 and B1 in grid steps."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        grid, device = dictionary.grid, dictionary.coefficients.device
        corner, whole = _corners(grid)
        self._corner, self._whole = corner.T.to(device), whole.to(device)
        self._starts = torch.from_numpy(grid.starts).to(device)
        self._i, self._j = (torch.from_numpy(index).to(device) for index in grid.places())
        self._counts = torch.from_numpy(grid.counts).to(device)
        # From values at -1, 0 and 1 to the coefficients of the parabola through them.
        parabola = [[0.0, 1.0, 0.0], [-0.5, 0.0, 0.5], [0.5, -1.0, 0.5]]
        self._parabola = torch.tensor(parabola, device=device)
        #: Last position on each axis.
        self.ends = torch.tensor([[len(axis) - 1.0] for axis in grid.axes], device=device)
        t1_step, t2_step = (_log_step(axis) for axis in grid.axes[:2])
        self.t2_steps_per_t1_step = t1_step / t2_step
        equal = self._equal = float(np.log(grid.t1_axis_ms[0] / grid.t2_axis_ms[0])) / t2_step
        #: Position on the T1 axis below which there is no T2.
        self.shortest_t1 = max(0.0, -equal / self.t2_steps_per_t1_step)

    @property
    def has_b1(self) -> bool:
        return len(self.dictionary.grid.b1_axis) > 1

    def b1_place(self, b1: Tensor) -> Tensor:
        """Positions `(V,)` of transmit fields on their axis; those beyond it are moved to its ends."""
        axis = self.dictionary.grid.b1_axis
        step = float(axis[1] - axis[0]) if len(axis) > 1 else 1.0
        return ((b1.float() - float(axis[0])) / step).clamp(0, len(axis) - 1)

    def place(self, atom: Tensor) -> Tensor:
        """Places of atoms by number."""
        pair, plane = atom % self.dictionary.grid.n_pairs, atom // self.dictionary.grid.n_pairs
        return torch.stack([self._i[pair], self._j[pair], plane]).float()

    def values(self, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """T1 (ms), T2 (ms) and B1 at places."""
        result = []
        for position, axis, logarithmic in zip(
            place, self.dictionary.grid.axes, (True, True, False), strict=True
        ):
            known = torch.as_tensor(np.log(axis) if logarithmic else axis, device=place.device)
            left = position.floor().long().clamp(0, max(len(axis) - 2, 0))
            right = (left + 1).clamp_max(len(axis) - 1)
            part = position.double() - left
            value = known[left] * (1 - part) + known[right] * part
            result.append((value.exp() if logarithmic else value).float())
        return result[0], result[1], result[2]

    def t2_equal_t1(self, t1_place: Tensor) -> Tensor:
        """Position of T2 = T1 on the T2 axis, for positions on the T1 axis."""
        return self._equal + self.t2_steps_per_t1_step * t1_place

    def nearest_pair(self, place: Tensor) -> Tensor:
        """Number of the atom (of the first B1) next to a place."""
        i = place[0].round().long().clamp(0, len(self._starts) - 1)
        # Shortest T1 may have no T2 at all.
        i = torch.where(self._counts[i] > 0, i, self._i[0])
        j = place[1].round().long().clamp_min(0)
        return self._starts[i] + torch.minimum(j, self._counts[i] - 1)

    def patches(self, place: Tensor, free: int) -> tuple[Tensor, Tensor, Tensor]:
        """The surface around places: middle of its parabolas, `(3, V)`, their coefficients
        `(3, 3, 3 or 1, L, V)`, in the order of the powers of the offset from the middle along T1, T2 and B1,
        and whether there are 3 x 3 atoms of T1 and T2, `(V,)`.

        Where there are not, all of them are the nearest one: a surface that is flat. If only 2 axes are
        `free`, the B1 stays at its place.
        """
        pair = self.nearest_pair(place)
        whole = self._whole[pair]
        first = self._corner[:, pair]  # (2, V)
        middle = [torch.where(whole, first + 1, torch.stack([self._i[pair], self._j[pair]]))]
        three = torch.arange(3, device=place.device)[:, None]
        rows = self._starts[(first[0] + three).clamp_max(len(self._starts) - 1)]  # (3, V)
        atoms = torch.where(whole, rows[:, None] + first[1] + three, pair).flatten(0, 1)  # (9, V)
        if self.has_b1:
            plane = (place[2].round().long() - 1).clamp(0, len(self.dictionary.grid.b1_axis) - 3)
            atoms = atoms[:, None] + (plane + three) * self.dictionary.grid.n_pairs  # (9, 3, V)
            middle.append(plane[None] + 1)
        else:
            middle.append(torch.zeros_like(first[:1]))
        centre = torch.cat(middle).float()
        numbers = as_real(self.dictionary.coefficients.index_select(0, atoms.flatten()), 1)
        numbers = numbers.view(*atoms.shape, numbers.shape[1])  # (9, V, L) or (9, 3, V, L)
        to_powers = torch.kron(self._parabola, self._parabola)
        if self.has_b1 and free == 2:
            u = (place[2] - centre[2])[:, None]
            a, b, c = numbers.unbind(1)
            numbers = a * (u * (u - 1) / 2) + b * (1 - u * u) + c * (u * (u + 1) / 2)
        elif self.has_b1:
            numbers = numbers.flatten(0, 1)
            to_powers = torch.kron(to_powers, self._parabola)
        powers = (to_powers @ numbers.flatten(1)).view_as(numbers).mT.contiguous()
        return centre, powers.view(3, 3, len(powers) // 9, *powers.shape[1:]), whole

    def at(self, place: Tensor) -> Tensor:
        """Real numbers `(L, V)` of the surface at places."""
        centre, powers, _ = self.patches(place, 2)
        return _points(powers, place - centre, 0)[0]

    def place_of(self, t1_ms: Tensor, t2_ms: Tensor, b1: Tensor | None) -> Tensor:
        """Places of relaxation times in ms and transmit fields (``None``: as planned), each `(V,)`."""
        rows = []
        for axis, values in zip(self.dictionary.grid.axes[:2], (t1_ms, t2_ms), strict=True):
            position = (values.double() / float(axis[0])).log() / _log_step(axis)
            rows.append(position.clamp(0, len(axis) - 1).float())
        rows.append(self.b1_place(torch.ones_like(t1_ms) if b1 is None else b1))
        return torch.stack(rows)

    def tangents(self, place: Tensor, free: int) -> Tensor:
        """The surface at places and its derivatives by log T1, log T2 and, if `free` is 3, B1:
        `(V, 1 + free, K)`."""
        centre, powers, _ = self.patches(place, free)
        points = torch.stack(_points(powers, place - centre, free)).permute(2, 0, 1)
        if self.dictionary.coefficients.is_complex():
            points = torch.complex(*points.chunk(2, 2))
        t1_axis, t2_axis, b1_axis = self.dictionary.grid.axes
        b1_step = float(b1_axis[1] - b1_axis[0]) if len(b1_axis) > 1 else 1.0
        steps = [1.0, _log_step(t1_axis), _log_step(t2_axis), b1_step][: 1 + free]
        return points / points.new_tensor(steps)[:, None]


def _points(powers: Tensor, offset: Tensor, free: int) -> list[Tensor]:
    """The surface and its derivatives along the first `free` axes, in grid steps, each `(L, V)`.

    Parameters
    ----------
    powers
        `(3, 3, 3 or 1, L, V)`, see `Surface.patches`.
    offset
        `(3, V)` from the middle, or `(2, V)` where B1 has one value.
    """
    points = [powers]
    for n in (2, 1, 0):
        if powers.shape[n] == 1:
            points = [point.squeeze(n) for point in points]
            continue
        u = offset[n]
        terms = [point.unbind(n) for point in points]
        values = [torch.addcmul(a, u, torch.addcmul(b, u, c)) for a, b, c in terms]
        _, b, c = terms[0]
        slope = [torch.addcmul(b, u, c, value=2)] if n < free else []
        points = [values[0], *slope, *values[1:]]
    return points


def climb(views: Tensor, surface: Surface, start: Tensor, free: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Places `(3, V)` of the largest correlation on the surface, and which of them are not final, `(V,)`.

    Damped Gauss-Newton steps (Levenberg and Marquardt) on the angle between voxel and surface; a step that
    leads down is not taken. A voxel that reaches the rim of its parabolas goes on with those around the next
    atom in the next round.

    Parameters
    ----------
    views
        `(P, L, V)`: real views of the coefficients.
    start
        `(3, V)` places near by.
    free
        3: all axes; 2: the B1 is kept.
    rounds
        Sets of parabolas at most.
    """
    place, goes_on = start.clone(), torch.ones_like(start[0], dtype=torch.bool)
    voxels = torch.arange(place.shape[1], device=place.device)
    for _ in range(rounds):
        if not len(voxels):
            break
        place[:, voxels], goes_on[voxels] = _climb_once(
            views.index_select(2, voxels), surface, place[:, voxels], free
        )
        if place.device.type == "cpu":  # a GPU would have to wait for the answer
            voxels = voxels[goes_on[voxels]]
    return place, goes_on


def _climb_once(views: Tensor, surface: Surface, place: Tensor, free: int) -> tuple[Tensor, Tensor]:
    """Better places on the parabolas around some places, and which voxels are not done yet."""
    J = free
    centre, powers, whole = surface.patches(place, free)
    is_complex = surface.dictionary.coefficients.is_complex()
    centre = centre[:J]
    offset = place[:J] - centre
    # Neighbours that had to be moved (near T2 = T1) lie farther away.
    low = torch.maximum(-centre, (offset - 1).clamp_max(-_REACH))
    # A T1 below the shortest T2 has none.
    low[0].clamp_(min=surface.shortest_t1 - centre[0])
    high = torch.minimum(surface.ends[:J] - centre, (offset + 1).clamp_min(_REACH))
    equal = surface.t2_equal_t1(centre[0]) - centre[1]

    def longest_t2(at: Tensor) -> Tensor:
        """Offset of T2 = T1 on the T2 axis."""
        return equal.add(at[0], alpha=surface.t2_steps_per_t1_step)

    def look(at: Tensor) -> Tensor:
        """Squared product with the unit atom, its J derivatives and their J x J matrix: `(1 + J + J², V)`."""
        points = _points(powers, at, J)  # d and its derivatives
        others = torch.stack([*points, *views])
        products = torch.stack([(others * point).sum(1) for point in points])  # (1+J, 1+J+P, V)
        norm, along, seen = products[0, 0].clamp_min(1e-30), products[0, 1 : 1 + J], products[:, 1 + J :]
        scale = seen[0] / norm  # the voxel's M0, (P, V)
        power = scale.square().sum(0)
        # Derivatives without their share along d: that changes M0 and no angle.
        slope = (scale * seen[1:]).sum(1) - power * along
        metric = products[1:, 1 : 1 + J] - along[:, None] * along / norm
        if is_complex:  # nor does their share along i d
            real, imaginary = points[0].chunk(2)
            turned = torch.cat([-imaginary, real])
            along = torch.stack([(turned * point).sum(0) for point in points[1:]])
            metric = metric - along[:, None] * along / norm
        return torch.cat([(power * norm)[None], slope, (power * metric).flatten(0, 1)])

    seen = look(offset)
    damping = torch.full_like(offset[0], 1e-3)
    moved = torch.zeros_like(damping)
    for _ in range(_STEPS):
        height, slope, metric = seen[0], seen[1 : 1 + J], seen[1 + J :].view(J, J, -1)
        # On the edge T2 = T1, and driven beyond it, a step of T1 takes T2 along; T2 takes none of its own.
        edge = (slope[1] > 0) & (offset[1] >= longest_t2(offset) - 1e-4)
        taken = edge * surface.t2_steps_per_t1_step
        uphill, curved = slope.clone(), metric.clone()
        uphill[0].addcmul_(taken, uphill[1])
        curved[0].addcmul_(taken, curved[1])
        curved[:, 0].addcmul_(taken, curved[:, 1])
        # So do axes at their end.
        held = torch.where(uphill > 0, offset >= high, offset <= low)
        held[1].logical_or_(edge)
        held[:2].logical_or_(~whole)
        uphill.masked_fill_(held, 0)
        curved.masked_fill_(held[:, None] | held, 0)
        diagonal = curved.diagonal().T  # a view
        ridge = (diagonal.amax(0) * 1e-6).add_(height, alpha=_FLAT).add_(1e-30)
        diagonal.addcmul_(damping, diagonal).add_(ridge)
        step = _solve(curved, uphill)
        step[1].addcmul_(taken, step[0])
        trial = (offset + step.clamp_(-1, 1)).clamp_(low, high)
        trial[1].clamp_(max=longest_t2(trial))
        there = look(trial)
        # Near the top heights differ by less than float32 tells; the slope still knows the way.
        up = there[0] > height * (1 - _ROUNDING)
        moved = (trial - offset).abs().amax(0)
        offset, seen = torch.where(up, trial, offset), torch.where(up, there, seen)
        damping = torch.where(up, damping * 0.2, damping * 10)
    found = torch.cat([centre + offset, place[J:]])
    # Other parabolas may lead on where these end.
    leaves = (surface.nearest_pair(found) != surface.nearest_pair(place)) & (offset.abs() > 0.75).any(0)
    axis = found[:J]
    leaves |= (((offset >= high) & (axis < surface.ends[:J])) | ((offset <= low) & (axis > 0))).any(0)
    return found, leaves | (moved > _STILL)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solutions `(J, V)` of symmetric positive definite systems `(J, J, V)`, by elimination."""
    rows, result = [list(row.unbind()) for row in matrix], list(right)
    J = len(rows)
    for n in range(J):
        for m in range(n + 1, J):
            factor = rows[n][m] / rows[n][n]
            for k in range(m, J):
                rows[m][k] = torch.addcmul(rows[m][k], factor, rows[n][k], value=-1)
            result[m] = torch.addcmul(result[m], factor, result[n], value=-1)
    for n in reversed(range(J)):
        for m in range(n + 1, J):
            result[n] = torch.addcmul(result[n], rows[n][m], result[m], value=-1)
        result[n] = result[n] / rows[n][n]
    return torch.stack(result)
