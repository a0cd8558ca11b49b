"""Operators that make one number of each window of an image [n, c, ...]."""

# ruff: noqa: ARG001 - attributes that the standard has, and that mean nothing where they are as they must be here

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pycompress.onnx.operators.operator import Row
from pycompress.onnx.operators.products import AutoPad, Pads, padded, pads_of

_MAX = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


def _around(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: list[int] | None, auto_pad: AutoPad,
    ceil_mode: int,
) -> tuple[Pads, list[int]]:  # fmt: skip
    """The pads; and how far windows of ``ceil_mode`` reach over them: one must begin inside of the image or its pads before."""
    before, behind = pads_of(x.shape[2:], kernel, strides, dilations, pads, auto_pad)
    over = [0] * len(kernel)
    for i, (size, k, stride, step) in enumerate(zip(x.shape[2:], kernel, strides, dilations, strict=True)):
        whole, window = size + before[i] + behind[i], step * (k - 1) + 1
        if ceil_mode and (rest := (whole - window) % stride):
            last = -(-(whole - window) // stride) * stride  # where the window that is added begins
            over[i] = stride - rest if last < size + before[i] else 0
    return (before, behind), over


def max_pool(
    x: Tensor, *, kernel_shape: list[int], auto_pad: AutoPad = "NOTSET", ceil_mode: int = 0, dilations: list[int] | None = None,
    pads: list[int] | None = None, storage_order: int = 0, strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    n = len(kernel_shape)
    steps, by = strides or [1] * n, dilations or [1] * n
    (before, behind), over = _around(x, kernel_shape, steps, by, pads, auto_pad, ceil_mode)
    behind = [one + more for one, more in zip(behind, over, strict=True)]
    lowest = -torch.inf if torch.is_floating_point(x) else torch.iinfo(x.dtype).min
    wide = padded(x, (before, behind), lowest)
    if wide.dtype in (torch.int8, torch.uint8):  # torch has no kernel of its own for these
        return _MAX[n](wide.float(), kernel_shape, steps, 0, by).to(x.dtype)
    return _MAX[n](wide, kernel_shape, steps, 0, by)


def _windows(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """[n, c, places ..., kernel ...]"""
    for i, (k, stride, step) in enumerate(zip(kernel, strides, dilations, strict=True)):
        x = x.unfold(2 + i, step * (k - 1) + 1, stride)[..., ::step]
    return x


def average_pool(
    x: Tensor, *, kernel_shape: list[int], auto_pad: AutoPad = "NOTSET", ceil_mode: int = 0, count_include_pad: int = 0,
    dilations: list[int] | None = None, pads: list[int] | None = None, strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """Pads count as zeros, or not at all; what lies behind them never counts."""
    n = len(kernel_shape)
    steps, by = strides or [1] * n, dilations or [1] * n
    around, over = _around(x, kernel_shape, steps, by, pads, auto_pad, ceil_mode)
    places = tuple(range(-n, 0))
    rest: Pads = ([0] * n, over)
    sums = _windows(padded(padded(x, around), rest), kernel_shape, steps, by).sum(places)
    counted = torch.ones_like(x[:1, :1])
    counts = padded(counted, around, 1.0 if count_include_pad else 0.0)
    return sums / _windows(padded(counts, rest), kernel_shape, steps, by).sum(places)


def lp_pool(
    x: Tensor, *, kernel_shape: list[int], auto_pad: AutoPad = "NOTSET", ceil_mode: int = 0, dilations: list[int] | None = None,
    p: int = 2, pads: list[int] | None = None, strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    n = len(kernel_shape)
    steps, by = strides or [1] * n, dilations or [1] * n
    around, over = _around(x, kernel_shape, steps, by, pads, auto_pad, ceil_mode)
    wide = padded(padded(x, around), ([0] * n, over))
    sums: Tensor = _windows(wide.abs() ** p, kernel_shape, steps, by).sum(tuple(range(-n, 0)))
    return torch.pow(sums, 1 / p)


def global_average_pool(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def global_max_pool(x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, p, tuple(range(2, x.dim())), keepdim=True)
    return norm


POOLING: dict[str, Row] = {
    "AveragePool": average_pool, "GlobalAveragePool": global_average_pool, "GlobalLpPool": global_lp_pool,
    "GlobalMaxPool": global_max_pool, "LpPool": lp_pool, "MaxPool": max_pool,
}  # fmt: skip
