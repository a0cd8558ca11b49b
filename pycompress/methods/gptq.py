"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): rounding whose errors cancel in the outputs, computed as LDLQ, which gives the same
integers without an inverse (Chee et al. 2023, arXiv:2307.13304).

For inputs x with the second moment M = V D V^T, V unit upper triangular, errors e cost e M e^T, the sum of D[i] (e V)[i]^2. So the
best that column i can do is to round w[i] plus what the errors before it leave, the sum of e[j] V[j, i] over j < i. V comes from
one Cholesky factorization, all in float64: its last bits may depend on the number of threads, and decide no rounding in practice.

The features with the largest inputs come first ("activation order"), and the others take their errors back; for that, all grids are
chosen beforehand ("static groups").
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pycompress.methods.inputs import Metric, damped
from pycompress.methods.notes import note

_BLOCK = 32  # columns that take errors back one by one; what is before them, all at once


def rounded(
    w: Tensor, moment: Tensor, scale: Tensor, group: int, nearest: Callable[[Tensor, int], Tensor]
) -> Tensor | None:  # fmt: skip
    """The step of each weight on its grid.

    Args:
        w: float32 [n, k], finite.
        moment: float64 [k, k], the second moment of the inputs.
        scale: float32 [n, ceil(k / group)], of ``group`` consecutive columns each.
        nearest: what is to be rounded, float32 [n], and the number of its group -> the nearest steps, float32 [n].
    Returns:
        float32 [n, k], which the scale makes the weight; None, with a note, where the inputs say nothing.
    """
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    v = feedback(moment[order][:, order])
    if v is None:
        return None
    k = len(order)
    scales, groups = scale.T.contiguous(), (order // group).tolist()
    columns = w.T[order].double()
    errors = torch.empty_like(columns)
    steps = torch.empty(columns.shape, dtype=torch.float32, device="cpu")
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        left = v[:start, start:stop].T @ errors[:start]  # by the errors before the block
        for i in range(start, stop):
            steps[i] = nearest((columns[i] + left[i - start]).float(), groups[i])
            torch.sub(columns[i], steps[i] * scales[groups[i]], out=errors[i])
            left[i - start + 1 :].addr_(v[i, i + 1 : stop], errors[i])
    result = torch.empty_like(steps)
    result[order] = steps
    return result.T.contiguous()


def feedback(moment: Tensor) -> Tensor | None:
    """V, float64 [k, k], unit upper triangular, of the damped second moment; None, with a note, where that says nothing: the inputs
    were all zero, or it is no moment (it is not positive definite).

    Args:
        moment: float64 [k, k].
    """
    whole = damped(moment)
    if whole is None:
        note("the inputs seen were all zero: rounded without them")
        return None
    lower, failed = torch.linalg.cholesky_ex(whole.flip(0, 1))
    if int(failed) or not bool(torch.isfinite(lower).all()):
        note("the second moment of the inputs is not positive definite: rounded without them")
        return None
    upper: Tensor = lower.flip(0, 1)
    return upper / upper.diagonal()


def closer(w: Tensor, found: Tensor, plain: Tensor, moment: Tensor) -> Tensor:
    """bool [n]: the rows that change the outputs no more in ``found`` than in ``plain``, float32 [n, k] like the weight w."""
    metric = Metric(moment)
    lost, otherwise = (metric.squares((dense - w).double()) for dense in (found, plain))
    return lost <= otherwise
