"""How far a model's outputs are from those of the dense one, without labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, log_softmax

from pycompress.train.calls import tensor_of


def relative(y: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """||y - target||^2 / ||target||^2 over the positions that count.

    Args:
        y, target: [batch, length, ...].
        mask: bool [batch, length] or None.
    """
    if mask is not None:
        y, target = y[mask], target[mask]
    return (y - target).square().sum() / target.square().sum().clamp(min=torch.finfo(target.dtype).tiny)


def mean_cosine(y: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """1 - cosine of what stands for an item: of [batch, length, k] the mean over the positions that count, else the row itself."""
    return 1 - cosine_similarity(mean_of(y, mask), mean_of(target, mask), dim=-1).mean()


def mean_of(y: Tensor, mask: Tensor | None) -> Tensor:
    """Of [batch, length, k] the mean over the positions that count: [batch, k]; else the rows themselves."""
    if y.dim() != 3:
        return y.flatten(1) if y.dim() > 1 else y
    if mask is None:
        return y.mean(1)
    weights = mask.to(y.dtype).unsqueeze(-1)
    return (y * weights).sum(1) / weights.sum(1).clamp(min=1)


def divergence(y: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """KL(target || y) of logits [..., classes], the mean over the positions that count."""
    if mask is not None and mask.shape == y.shape[:2] and y.dim() > 2:
        y, target = y[mask], target[mask]
    y, target = (log_softmax(logits.flatten(0, -2), dim=-1) for logits in (y, target))
    return kl_div(y, target, reduction="batchmean", log_target=True)


def closeness(result: Any, dense: Any, mask: Tensor | None) -> Tensor:
    """Of what two models returned: KL where they return ``logits``, else the relative error and the cosine of the mean."""
    own, other = _logits(result), _logits(dense)
    if own is not None and other is not None:
        return divergence(own.to(other.dtype), other, mask)
    target = tensor_of(dense)
    y = tensor_of(result).to(target.dtype)
    mask = mask if mask is not None and mask.shape == y.shape[:2] else None
    return relative(y, target, mask) + 2 * mean_cosine(y, target, mask)


def _logits(result: Any) -> Tensor | None:
    found = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    return found if isinstance(found, Tensor) else None
