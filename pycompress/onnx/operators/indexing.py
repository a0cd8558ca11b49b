"""Operators that look numbers up by their places, or give places."""

# ruff: noqa: ARG001 - attributes that the standard has, and that mean nothing where they are as they must be here

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pycompress.onnx.operators.operator import Row, Sizes, number


def gather(data: Tensor, indices: Sizes, *, axis: int = 0) -> Tensor:
    """Slices of an axis; indices may count from behind."""
    if not isinstance(indices, Tensor):
        if not isinstance(indices, list | tuple):
            return data.select(axis, number(indices))
        indices = torch.tensor(indices, dtype=torch.int64, device=data.device)
    places = _inside(indices.long(), data.shape[axis])
    chosen = data.index_select(axis, places.flatten())
    axis %= data.dim()
    return chosen.reshape(*data.shape[:axis], *places.shape, *data.shape[axis + 1 :])


def gather_elements(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(data, axis, _inside(indices.long(), data.shape[axis]))


def gather_nd(data: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """The last dimension of the indices is a place in the dimensions of data behind the batch_dims."""
    places = [_inside(one, data.shape[batch_dims + i]) for i, one in enumerate(indices.long().unbind(-1))]
    rank = indices.dim() - 1
    batch = [
        torch.arange(size, dtype=torch.int64, device=data.device).reshape([-1 if i == j else 1 for j in range(rank)])
        for i, size in enumerate(indices.shape[:batch_dims])
    ]
    return data[(*batch, *places)]


Reduction = Literal["none", "add", "mul", "max", "min"]
_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def scatter_elements(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: Reduction = "none"
) -> Tensor:
    places = _inside(indices.long(), data.shape[axis])
    if reduction == "none":
        return data.scatter(axis, places, updates)
    return data.scatter_reduce(axis, places, updates, _REDUCTIONS[reduction])


def scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, *, reduction: Reduction = "none") -> Tensor:
    """The last dimension of the indices is a place in the first dimensions of data, where a slice of updates goes."""
    places = tuple(_inside(one, data.shape[i]) for i, one in enumerate(indices.long().unbind(-1)))
    if reduction in ("none", "add"):
        return data.index_put(places, updates, accumulate=reduction == "add")
    depth = len(places)
    flat = data.flatten(0, depth - 1)
    row = torch.zeros_like(places[0])
    for place, size in zip(places, data.shape[:depth], strict=True):
        row = row * size + place
    own = updates.reshape(-1, *flat.shape[1:])
    return flat.index_reduce(0, row.flatten(), own, _REDUCTIONS[reduction]).reshape(data.shape)


def one_hot(indices: Tensor, depth: Sizes, values: Tensor, *, axis: int = -1) -> Tensor:
    """values: [off, on]. Indices from -depth to depth - 1; of others there is no `on`."""
    size = int(number(depth))
    places = indices.long()
    inside = (places >= -size) & (places < size)
    on = functional.one_hot(places.remainder(size), size).bool() & inside[..., None]
    return torch.where(on, values[1], values[0]).movedim(-1, axis)


def nonzero(x: Tensor) -> Tensor:
    return x.nonzero().T


def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    x = x.flatten() if axis is None else x
    return x.index_select(axis or 0, condition.nonzero().flatten())


def top_k(
    x: Tensor, k: Sizes, *, axis: int = -1, largest: int = 1, sorted: int = 1  # noqa: A002
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(values, int64 places), of equal ones those of the lower place."""
    order = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    count = int(number(k))
    return order.values.narrow(axis, 0, count), order.indices.narrow(axis, 0, count)


def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Of equal ones the first, or the last."""
    if not select_last_index:
        return torch.argmax(x, axis, keepdim=bool(keepdims))
    return x.shape[axis] - 1 - torch.argmax(x.flip(axis), axis, keepdim=bool(keepdims))


def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    if not select_last_index:
        return torch.argmin(x, axis, keepdim=bool(keepdims))
    return x.shape[axis] - 1 - torch.argmin(x.flip(axis), axis, keepdim=bool(keepdims))


def _inside(indices: Tensor, size: int) -> Tensor:
    """Those that count from behind, from the front."""
    return torch.where(indices < 0, indices + size, indices)


INDEXING: dict[str, Row] = {
    "ArgMax": arg_max, "ArgMin": arg_min, "Compress": compress, "Gather": gather, "GatherElements": gather_elements,
    "GatherND": gather_nd, "NonZero": nonzero, "OneHot": one_hot, "Scatter": scatter_elements, "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd, "TopK": top_k,
}  # fmt: skip
