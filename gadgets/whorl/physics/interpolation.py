"""The surface that the atoms of a dictionary lie on, and the way up to its point that fits a voxel best.

The subspace coefficients of an atom are smooth functions of log T1, log T2 and B1. Between the points of the
grid they are interpolated by parabolas through three points of each axis; with steps of 5 % that is exact
to some 1e-5. The correlation is then maximised on that surface.

Letters: V voxels, N atoms, K coefficients, A B D lengths of the T1, T2 and B1 axes, J axes that are free.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whorl.physics.dictionary import Dictionary, Grid

# Steps on one set of parabolas; then they are laid anew around those voxels that are not done, so often at
# most. Of 22 000 noisy voxels one in a hundred takes more than two rounds.
_STEPS = 4
_ROUNDS = 10
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
    """Interpolated dictionary. Places are `(V, 3)`: positions on the axes of T1, T2 and B1 in grid steps."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        grid, device = dictionary.grid, dictionary.coefficients.device
        corner, whole = _corners(grid)
        self._corner, self._whole = corner.to(device), whole.to(device)
        self._starts = torch.from_numpy(grid.starts).to(device)
        self._i, self._j = (torch.from_numpy(index).to(device) for index in grid.places())
        self._counts = torch.from_numpy(grid.counts).to(device)
        #: Last position on each axis.
        self.ends = torch.tensor([len(axis) - 1 for axis in grid.axes], dtype=torch.float32, device=device)
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
        return torch.stack([self._i[pair], self._j[pair], plane], 1).float()

    def values(self, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """T1 (ms), T2 (ms) and B1 at places."""
        result = []
        for n, (axis, logarithmic) in enumerate(
            zip(self.dictionary.grid.axes, (True, True, False), strict=True)
        ):
            known = torch.as_tensor(np.log(axis) if logarithmic else axis, device=place.device)
            left = place[:, n].floor().long().clamp(0, max(len(axis) - 2, 0))
            right = (left + 1).clamp_max(len(axis) - 1)
            part = place[:, n].double() - left
            value = known[left] * (1 - part) + known[right] * part
            result.append((value.exp() if logarithmic else value).float())
        return result[0], result[1], result[2]

    def t2_equal_t1(self, t1_place: Tensor) -> Tensor:
        """Position of T2 = T1 on the T2 axis, for positions on the T1 axis."""
        return self._equal + self.t2_steps_per_t1_step * t1_place

    def nearest_pair(self, place: Tensor) -> Tensor:
        """Number of the atom (of the first B1) next to a place."""
        i = place[:, 0].round().long().clamp(0, len(self._starts) - 1)
        # Shortest T1 may have no T2 at all.
        i = torch.where(self._counts[i] > 0, i, self._i[0])
        j = place[:, 1].round().long().clamp_min(0)
        return self._starts[i] + torch.minimum(j, self._counts[i] - 1)

    def neighbours(self, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Middle of the parabolas around places, `(V, 3)`, their atoms `(V, 3·3·(3 or 1), K)`, and whether
        there are 3 x 3 of T1 and T2, `(V,)`.

        Where there are not, all of them are the nearest one: a surface that is flat.
        """
        n_pairs = self.dictionary.grid.n_pairs
        pair = self.nearest_pair(place)
        corner, whole = self._corner[pair], self._whole[pair]
        three = torch.arange(3, device=place.device)
        rows = self._starts[(corner[:, :1] + three).clamp_max(len(self._starts) - 1)]  # (V, 3)
        atoms = rows[:, :, None] + corner[:, 1, None, None] + three  # (V, 3, 3)
        atoms = torch.where(whole[:, None, None], atoms, pair[:, None, None])
        middle = [corner[:, 0] + 1, corner[:, 1] + 1]
        if self.has_b1:
            first = (place[:, 2].round().long() - 1).clamp(0, len(self.dictionary.grid.b1_axis) - 3)
            atoms = atoms[..., None] + (first[:, None] + three)[:, None, None, :] * n_pairs  # (V, 3, 3, 3)
            middle.append(first + 1)
        else:
            middle.append(torch.zeros_like(pair))
        centre = torch.stack(middle, 1).float()
        own = torch.stack([self._i[pair], self._j[pair]], 1).float()
        centre[:, :2] = torch.where(whole[:, None], centre[:, :2], own)
        return centre, self.dictionary.coefficients[atoms.flatten(1)], whole

    def at(self, place: Tensor) -> Tensor:
        """Coefficients `(V, K)` of the surface at places."""
        centre, atoms, _ = self.neighbours(place)
        weights = _products(_parabolas(place - centre, self.has_b1)[0])
        return torch.bmm(weights[:, None].to(atoms.dtype), atoms)[:, 0]

    def place_of(self, t1_ms: Tensor, t2_ms: Tensor, b1: Tensor | None) -> Tensor:
        """Places of relaxation times in ms and transmit fields (``None``: as planned), each `(V,)`."""
        columns = []
        for axis, values in zip(self.dictionary.grid.axes[:2], (t1_ms, t2_ms), strict=True):
            position = (values.double() / float(axis[0])).log() / _log_step(axis)
            columns.append(position.clamp(0, len(axis) - 1).float())
        columns.append(self.b1_place(torch.ones_like(t1_ms) if b1 is None else b1))
        return torch.stack(columns, 1)

    def tangents(self, place: Tensor, free: int) -> Tensor:
        """The surface at places and its derivatives by log T1, log T2 and, if `free` is 3, B1:
        `(V, 1 + free, K)`."""
        centre, atoms, _ = self.neighbours(place)
        values, slopes = _parabolas(place - centre, self.has_b1)
        weights = [_products(values)]
        weights.extend(_products([*values[:n], slopes[n], *values[n + 1 :]]) for n in range(free))
        points = torch.bmm(torch.stack(weights, 1).to(atoms.dtype), atoms)
        t1_axis, t2_axis, b1_axis = self.dictionary.grid.axes
        b1_step = float(b1_axis[1] - b1_axis[0]) if len(b1_axis) > 1 else 1.0
        steps = [1.0, _log_step(t1_axis), _log_step(t2_axis), b1_step][: 1 + free]
        return points / points.new_tensor(steps)[:, None]


def _parabolas(offset: Tensor, has_b1: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Weights `(V, 3)` of three neighbours on each axis and their derivatives, at offsets from the middle."""
    values, slopes = [], []
    for n in range(3 if has_b1 else 2):
        u = offset[:, n]
        values.append(torch.stack([u * (u - 1) / 2, 1 - u * u, u * (u + 1) / 2], 1))
        slopes.append(torch.stack([u - 0.5, -2 * u, u + 0.5], 1))
    return values, slopes


def _products(weights: list[Tensor]) -> Tensor:
    """Weights `(V, 3^J)` of all neighbours from those `(V, 3)` along each axis."""
    result = weights[0]
    for weight in weights[1:]:
        result = (result[:, :, None] * weight[:, None, :]).flatten(1)
    return result


def climb(coefficients: Tensor, surface: Surface, start: Tensor, b1_place: Tensor | None) -> Tensor:
    """Places `(V, 3)` of the largest correlation on the surface, from places near by.

    Damped Gauss-Newton steps (Levenberg and Marquardt) on the angle between voxel and surface; a step that
    leads down is not taken. A voxel that reaches the rim of its parabolas goes on with those around the next
    atom.

    Parameters
    ----------
    coefficients
        `(V, K)`.
    start
        `(V, 3)` places.
    b1_place
        `(V,)` known positions on the B1 axis, which are kept, or ``None``.
    """
    place = start.clone()
    if b1_place is not None:
        place[:, 2] = b1_place
    free = 3 if surface.has_b1 and b1_place is None else 2
    voxels = torch.arange(len(place), device=place.device)
    for _ in range(_ROUNDS):
        place[voxels], goes_on = _climb_once(coefficients[voxels], surface, place[voxels], free)
        voxels = voxels[goes_on]  # for which a GPU waits, some hundred operations after the last time
        if not len(voxels):
            break
    return place


def _climb_once(coefficients: Tensor, surface: Surface, place: Tensor, free: int) -> tuple[Tensor, Tensor]:
    """Better places on the parabolas around some places, and which voxels are not done yet."""
    centre, atoms, whole = surface.neighbours(place)
    offset = place - centre
    # Neighbours that had to be moved (near T2 = T1) lie farther away.
    low = torch.maximum(-centre, (offset - 1).clamp_max(-_REACH))[:, :free]
    # A T1 below the shortest T2 has none.
    low[:, 0] = torch.maximum(low[:, 0], surface.shortest_t1 - centre[:, 0])
    high = torch.minimum(surface.ends - centre, (offset + 1).clamp_min(_REACH))[:, :free]

    def look(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared product with the unit atom `(V,)`, its gradient `(V, J)`, its matrix `(V, J, J)`."""
        values, slopes = _parabolas(at, surface.has_b1)
        weights = [_products(values)]
        weights.extend(_products([*values[:n], slopes[n], *values[n + 1 :]]) for n in range(free))
        points = torch.bmm(
            torch.stack(weights, 1).to(atoms.dtype), atoms
        )  # d and its J derivatives, (V, 1+J, K)
        seen = (points.conj() * coefficients[:, None]).sum(2)  # (V, 1+J)
        gram = torch.bmm(points.conj(), points.mT)  # (V, 1+J, 1+J)
        norm = gram[:, 0, 0].real.clamp_min(1e-30)
        scale = seen[:, 0] / norm  # the voxel's M0
        # Derivatives without their share along d: that changes M0 and no angle.
        along = gram[:, 0, 1:] / norm[:, None]
        slope = (scale.conj()[:, None] * (seen[:, 1:] - along.conj() * seen[:, :1])).real
        metric = (gram[:, 1:, 1:] - gram[:, 1:, :1] * along[:, None]).real
        power = scale.abs().square()
        return power * norm, slope, metric * power[:, None, None]

    def longest_t2(at: Tensor) -> Tensor:
        """Offset of T2 = T1 on the T2 axis."""
        return surface.t2_equal_t1(at[:, 0] + centre[:, 0]) - centre[:, 1]

    height, slope, metric = look(offset)
    damping = torch.full_like(height, 1e-3)
    moved = torch.zeros_like(height)
    for _ in range(_STEPS):
        # On the edge T2 = T1, and driven beyond it, a step of T1 takes T2 along; T2 takes none of its own.
        edge = (slope[:, 1] > 0) & (offset[:, 1] >= longest_t2(offset) - 1e-4)
        along = torch.eye(free, device=edge.device).repeat(
            len(edge), 1, 1
        )  # columns: directions of the steps
        along[:, 1, 0] = torch.where(edge, surface.t2_steps_per_t1_step, 0)
        uphill = (along.mT @ slope[:, :, None])[:, :, 0]
        # So do axes at their end.
        held = ((offset[:, :free] <= low) & (uphill < 0)) | ((offset[:, :free] >= high) & (uphill > 0))
        held[:, 1] |= edge
        held[:, :2] |= ~whole[:, None]
        moves = (~held).to(slope.dtype)
        curved = (along.mT @ metric @ along) * moves[:, :, None] * moves[:, None, :]
        diagonal = curved.diagonal(dim1=1, dim2=2)
        ridge = damping[:, None] * diagonal + 1e-6 * diagonal.amax(1, keepdim=True)
        ridge = ridge + _FLAT * height[:, None] + 1e-30
        step = torch.linalg.solve_ex(curved + torch.diag_embed(ridge), uphill * moves)[0]
        step = (along @ step[:, :, None])[:, :, 0]
        trial = offset.clone()
        trial[:, :free] = torch.maximum(torch.minimum(offset[:, :free] + step.clamp(-1, 1), high), low)
        trial[:, 1] = torch.minimum(trial[:, 1], longest_t2(trial))
        trial_height, trial_slope, trial_metric = look(trial)
        # Near the top heights differ by less than float32 tells; the slope still knows the way.
        up = trial_height > height * (1 - _ROUNDING)
        moved = (trial - offset).abs().amax(1)
        offset = torch.where(up[:, None], trial, offset)
        height = torch.where(up, trial_height, height)
        slope = torch.where(up[:, None], trial_slope, slope)
        metric = torch.where(up[:, None, None], trial_metric, metric)
        damping = torch.where(up, damping * 0.2, damping * 10)
    found = centre + offset
    # Other parabolas may lead on where these end.
    leaves = (surface.nearest_pair(found) != surface.nearest_pair(place)) & (offset.abs() > 0.75).any(1)
    axis = centre[:, :free] + offset[:, :free]
    rim = (offset[:, :free] >= high) & (axis < surface.ends[:free])
    leaves |= (rim | ((offset[:, :free] <= low) & (axis > 0))).any(1)
    return found, leaves | (moved > _STILL)
