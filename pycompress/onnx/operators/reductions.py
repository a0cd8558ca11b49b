"""Operators that make one number of many: over axes, which were an attribute in older opsets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pycompress.onnx.operators.operator import Row, Sizes, numbers

Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _reduced(x: Tensor, axes: Sizes | None, keepdims: int, noop: int, reduction: Reduction) -> Tensor:
    """Without axes, over all of them; or over none, if the operator says so."""
    along = [] if axes is None else numbers(axes)
    if along or not noop:
        along = along or [*range(x.dim())]
    return reduction(x, along, bool(keepdims))


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype) if axes else x


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if not axes:
        return x
    if torch.is_floating_point(x):
        return torch.mean(x, axes, keepdim=keep)
    count = torch.ones_like(x).sum(axes, keepdim=keep, dtype=x.dtype)
    return torch.div(torch.sum(x, axes, keepdim=keep, dtype=x.dtype), count, rounding_mode="trunc")


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):  # torch's takes one
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def _ends(dtype: torch.dtype) -> tuple[float, float]:
    """The lowest and the highest number of a type."""
    if dtype == torch.bool:
        return 0, 1
    return (-torch.inf, torch.inf) if dtype.is_floating_point else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)


def _largest(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if 0 in [x.shape[axis] for axis in axes]:  # of no numbers
        return _sum(x, axes, keep).fill_(_ends(x.dtype)[0])
    return torch.amax(x, axes, keepdim=keep) if axes else x


def _smallest(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if 0 in [x.shape[axis] for axis in axes]:
        return _sum(x, axes, keep).fill_(_ends(x.dtype)[1])
    return torch.amin(x, axes, keepdim=keep) if axes else x


def reduce_sum(x: Tensor, axes: Sizes | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return _reduced(x, axes, keepdims, noop_with_empty_axes, _sum)


def reduce_mean(x: Tensor, axes: Sizes | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return _reduced(x, axes, keepdims, noop_with_empty_axes, _mean)


def reduce_prod(x: Tensor, axes: Sizes | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return _reduced(x, axes, keepdims, noop_with_empty_axes, _product)


def reduce_max(x: Tensor, axes: Sizes | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return _reduced(x, axes, keepdims, noop_with_empty_axes, _largest)


def reduce_min(x: Tensor, axes: Sizes | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return _reduced(x, axes, keepdims, noop_with_empty_axes, _smallest)


def reduce_l1(x: Tensor, axes: Sizes | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return _reduced(x.abs(), axes, keepdims, noop_with_empty_axes, _sum)


def reduce_sum_square(
    x: Tensor, axes: Sizes | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    return _reduced(x * x, axes, keepdims, noop_with_empty_axes, _sum)


def reduce_l2(x: Tensor, axes: Sizes | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return torch.sqrt(_reduced(x * x, axes, keepdims, noop_with_empty_axes, _sum)).to(x.dtype)


def reduce_log_sum(x: Tensor, axes: Sizes | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return torch.log(_reduced(x, axes, keepdims, noop_with_empty_axes, _sum))


def reduce_log_sum_exp(
    x: Tensor, axes: Sizes | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    return _reduced(x, axes, keepdims, noop_with_empty_axes, torch.logsumexp)


REDUCTIONS: dict[str, Row] = {
    "ReduceL1": reduce_l1, "ReduceL2": reduce_l2, "ReduceLogSum": reduce_log_sum, "ReduceLogSumExp": reduce_log_sum_exp,
    "ReduceMax": reduce_max, "ReduceMean": reduce_mean, "ReduceMin": reduce_min, "ReduceProd": reduce_prod, "ReduceSum": reduce_sum,
    "ReduceSumSquare": reduce_sum_square,
}  # fmt: skip
