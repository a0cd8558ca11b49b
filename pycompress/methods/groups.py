"""Groups of weights on 4-bit grids of least squared error (Choukroun et al. 2019, arXiv:1902.06822)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pycompress.weights.int4 import LARGEST_SCALE, SMALLEST_SCALE, SYMMETRIC_ZERO_POINT, TOP

# The search tries these shares of each group's range, and then, for the best of them, the scale that fits its integers best.
# Denser shares, more rounds and other zero points would win 1 % of the error (all-MiniLM-L6-v2, groups of 32: the whole range
# alone 0.0831 of the weights' norm, this 0.0800, all of that together 0.0792).
_SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_REFITS = 2
_CHUNK = 1 << 18  # weights that are rounded at a time: they stay in the cache


class Grid(NamedTuple):
    """What the integers of some groups mean: (integer - zero_point) * scale.

    Attributes:
        scale: float32 [groups, 1], each a bfloat16 number between SMALLEST_SCALE and LARGEST_SCALE.
        zero_point: float32 [groups, 1], each an integer from 0 to 15.
    """

    scale: Tensor
    zero_point: Tensor

    def steps(self, x: Tensor) -> Tensor:
        """The nearest (integer - zero_point) to x [groups, any]; ties go to the even number of steps."""
        return (x / self.scale).round_().add_(self.zero_point).clamp_(0, TOP).sub_(self.zero_point)

    def error(self, x: Tensor) -> Tensor:
        """The squared error of each group: float32 [groups, 1]."""
        return self.steps(x).mul_(self.scale).sub_(x).square_().sum(dim=1, keepdim=True)


class Rounded(NamedTuple):
    """A weight on its grids.

    Attributes:
        integers: uint8 [n, k], 0 to 15.
        scale: bfloat16 [n, ceil(k / group)].
        zero_point: uint8 [n, ceil(k / group)], 0 to 15.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor

    @classmethod
    def joined(cls, grid: Grid, steps: Tensor, shape: tuple[int, int]) -> Rounded:
        """From the steps [n * groups, group] of a weight [n, k], row after row, with zeros behind a short last group."""
        n, k = shape
        integers = (steps + grid.zero_point).to(torch.uint8).view(n, -1)[:, :k].contiguous()
        return cls(integers, grid.scale.view(n, -1).bfloat16(), grid.zero_point.view(n, -1).to(torch.uint8))


def valid_scale(scale: Tensor) -> Tensor:
    """Rounded to bfloat16, as float32. Where it is not a normal number (a group of zeros), any scale gives zeros: 1."""
    rounded = scale.clamp(max=LARGEST_SCALE).bfloat16().to(torch.float32)
    return torch.where(rounded < SMALLEST_SCALE, 1.0, rounded)


def plain(x: Tensor, *, symmetric: bool) -> Grid:
    """The grid that spans each group's range and zero; where symmetric, the largest magnitude is 7 steps.

    Args:
        x: float32 [groups, size], finite.
    """
    low, high = x.amin(dim=1, keepdim=True).clamp_(max=0), x.amax(dim=1, keepdim=True).clamp_(min=0)
    if symmetric:
        scale = valid_scale(torch.maximum(-low, high) / (SYMMETRIC_ZERO_POINT - 1))
        return Grid(scale, torch.full_like(scale, SYMMETRIC_ZERO_POINT))
    scale = valid_scale(high / TOP - low / TOP)  # their difference may overflow
    return Grid(scale, (-low / scale).round_().clamp_(0, TOP))


def searched(x: Tensor, *, symmetric: bool) -> Grid:
    """Of clipped ranges, the one with the least squared error for each group, never more than that of :func:`plain`.

    Args:
        x: float32 [groups, size], finite.
    """
    best = whole = plain(x, symmetric=symmetric)
    least = best.error(x)
    for share in _SHARES:
        best, least = _better(x, Grid(valid_scale(whole.scale * share), whole.zero_point), best, least)
    for _ in range(_REFITS):
        best, least = _better(x, _refitted(x, best), best, least)
    return best


def _better(x: Tensor, grid: Grid, best: Grid, least: Tensor) -> tuple[Grid, Tensor]:
    """For each group, of two grids the one with the smaller error, and that error; ``least`` is that of ``best``."""
    error = grid.error(x)
    better = error < least
    chosen = (torch.where(better, own, other) for own, other in zip(grid, best, strict=True))
    return Grid(*chosen), torch.where(better, error, least)


def _refitted(x: Tensor, grid: Grid) -> Grid:
    """The scale of least squared error for the integers that the grid gives."""
    steps = grid.steps(x)
    norm = steps.square().sum(dim=1, keepdim=True).clamp_(min=1)
    return Grid(valid_scale((steps * x).sum(dim=1, keepdim=True) / norm), grid.zero_point)


def rounded(w: Tensor, group: int, *, symmetric: bool, search: bool) -> Rounded:
    """Each group by itself.

    Args:
        w: float32 [n, k], finite.
        search: clip ranges where that lowers the squared error.
    """
    n, k = w.shape
    x = pad(w, (0, -k % group)).view(-1, group)
    choose = searched if search else plain
    parts = x.split(max(1, _CHUNK // group))
    grids = [choose(part, symmetric=symmetric) for part in parts]
    steps = torch.cat([grid.steps(part) for grid, part in zip(grids, parts, strict=True)])
    grid = Grid(*(torch.cat(tensors) for tensors in zip(*grids, strict=True)))
    return Rounded.joined(grid, steps, (n, k))
