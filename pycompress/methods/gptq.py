"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): 4-bit weights whose rounding errors cancel in the outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress.methods.groups import Grid, Rounded, searched
from pycompress.methods.inputs import damped_root


def rounded(w: Tensor, moment: Tensor, group: int, *, symmetric: bool) -> Rounded | None:
    """Rounds column after column, and takes each one's error back in the columns behind it, as well as they can.

    For inputs x with the second moment M, an error e in column i costs least if the columns j behind it change by
    ``-e U[i, j] / U[i, i]``, U the upper Cholesky factor of the inverse of M (damped). Each group's grid is chosen when the columns
    before it are done, for the weights as they are then.

    Args:
        w: float32 [n, k], finite.
        moment: float64 [k, k], the second moment of the inputs.
    Returns:
        None where the inputs say nothing: they are all zero.
    Raises:
        ValueError: the second moment is that of no inputs: it has negative eigenvalues.
    """
    spread = _spread(moment)
    if spread is None:
        return None
    k = w.shape[1]
    rest = w.T.double().contiguous()  # [k, n]: what is left to round, a column of the weight in each row
    grids, integers = [], []
    for start in range(0, k, group):
        stop = min(start + group, k)
        part = rest[start:stop]
        grid = searched(part.T.float().contiguous(), symmetric=symmetric)
        steps, errors = _round_columns(part, grid, spread[start:stop, start:stop])
        rest[stop:] -= spread[start:stop, stop:].T @ errors
        grids.append(grid)
        integers.append(steps.T + grid.zero_point)
    scale, zero_point = (torch.cat(tensors, dim=1) for tensors in zip(*grids, strict=True))
    return Rounded(torch.cat(integers, dim=1).to(torch.uint8), scale.bfloat16(), zero_point.to(torch.uint8))


def _spread(moment: Tensor) -> Tensor | None:
    """float64 [k, k], upper triangular with ones on the diagonal: U, each row over its diagonal."""
    root = damped_root(moment, "Int4")
    if root is None:
        return None
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)
    return upper / upper.diagonal()[:, None]


def _round_columns(columns: Tensor, grid: Grid, spread: Tensor) -> tuple[Tensor, Tensor]:
    """The steps float32 [group, n] of the columns float64 [group, n] of one group, and the errors that they leave; changes the
    columns.
    """
    steps, errors = torch.empty(columns.shape, dtype=torch.float32, device="cpu"), torch.empty_like(columns)
    for i, column in enumerate(columns):
        steps[i] = grid.steps(column[:, None].float())[:, 0]
        errors[i] = column - steps[i] * grid.scale[:, 0]
        columns[i + 1 :] -= spread[i, i + 1 :, None] * errors[i]
    return steps, errors
