"""Operators that normalize."""

# ruff: noqa: ARG001 - attributes that the standard has, and that mean nothing where they are as they must be here

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pycompress.onnx.operators.operator import Row


def batch_norm(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *, epsilon: float = 1e-5, momentum: float = 0.9,
    training_mode: Literal[0] = 0, spatial: Literal[1] = 1,
) -> Tensor:  # fmt: skip
    """By the running statistics of the channels."""
    return functional.batch_norm(x, mean.to(x.dtype), var.to(x.dtype), scale.to(x.dtype), bias.to(x.dtype), eps=epsilon)


def layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:  # fmt: skip
    """Over the dimensions from the axis on."""
    sizes = x.shape[axis:]
    normal = functional.layer_norm(x, sizes, eps=epsilon) * scale
    return normal if bias is None else normal + bias


def rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    """Over the dimensions from the axis on."""
    return (functional.rms_norm(x, x.shape[axis:], eps=epsilon) * scale).to(x.dtype)


def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return functional.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:  # fmt: skip
    return functional.group_norm(x, num_groups, scale, bias, epsilon)


def lp_norm(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """Zeros where the norm is zero."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def local_response_norm(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:  # fmt: skip
    """By the mean square of neighbouring channels, the odd one of an even size behind."""
    before = (size - 1) // 2
    squares = functional.pad((x * x).flatten(2), (0, 0, before, size - 1 - before))
    mean = squares.unfold(1, size, 1).sum(-1).reshape(x.shape) / size
    return x / (bias + alpha * mean) ** beta


def mean_variance_norm(x: Tensor, *, axes: list[int] | None = None) -> Tensor:
    along = [0, 2, 3] if axes is None else axes
    centred = x - x.mean(along, keepdim=True)
    return centred / (centred.square().mean(along, keepdim=True).sqrt() + 1e-9)


NORMS: dict[str, Row] = {
    "BatchNormalization": batch_norm, "GroupNormalization": {21: group_norm}, "InstanceNormalization": instance_norm,
    "LRN": local_response_norm, "LayerNormalization": layer_norm, "LpNormalization": lp_norm,
    "MeanVarianceNormalization": mean_variance_norm, "RMSNormalization": rms_norm,
}  # fmt: skip
