"""Operators that put the numbers of a tensor elsewhere, or make tensors of sizes."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pycompress.onnx.operators.operator import Row, Sizes, number, numbers


def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(list(x.shape[start:end]), dtype=torch.int64, device="cpu")


def size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64, device="cpu")


def reshape(x: Tensor, shape: Sizes, *, allowzero: int = 0) -> Tensor:
    """0 stands for the size that x has there, unless allowzero is set; -1 for what is left."""
    sizes = numbers(shape)
    if not allowzero:
        sizes = [x.shape[axis] if type(size) is int and size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """[the dimensions before the axis as one, those from it on as one]."""
    before, behind = x.shape[:axis], x.shape[axis:] if axis else x.shape
    return x.reshape(math.prod(before if axis else ()), math.prod(behind))


def transpose(x: Tensor, *, perm: list[int] | None = None) -> Tensor:
    return x.permute(perm if perm is not None else [*reversed(range(x.dim()))])


def squeeze(x: Tensor, axes: Sizes | None = None) -> Tensor:
    """Without the dimensions of these axes, of size 1; without axes, of all that are. Raises ValueError where one is larger."""
    if axes is None:
        return x.squeeze()
    for axis in numbers(axes):
        if x.shape[axis] != 1:
            raise ValueError(f"Squeeze: x is {list(x.shape)}, expected size 1 in dimension {axis}")
    return x.squeeze(tuple(numbers(axes)))


def unsqueeze(x: Tensor, axes: Sizes) -> Tensor:
    """The axes count dimensions of the result."""
    rank = x.dim() + len(numbers(axes))
    for axis in sorted(axis % rank for axis in numbers(axes)):
        x = x.unsqueeze(axis)
    return x


def expand(x: Tensor, shape: Sizes) -> Tensor:
    """To a shape with which x is broadcast; a 1 in it leaves the size of x."""
    sizes = numbers(shape)
    sizes = [1] * (x.dim() - len(sizes)) + sizes
    own = [1] * (len(sizes) - x.dim()) + [*x.shape]
    wanted = [mine if type(size) is int and size == 1 else size for size, mine in zip(sizes, own, strict=True)]
    return x.expand(wanted)


def by_directions(y: Tensor, directions: int) -> Tensor:
    """What an ``nn.LSTM`` and its like give, [length, batch, directions * n], as ONNX has it: [length, directions, batch, n]."""
    return y.reshape(*y.shape[:2], directions, -1).transpose(1, 2)


def concat(*xs: Tensor, axis: int) -> Tensor:
    return torch.cat(xs, axis)


def split(
    x: Tensor, split: Sizes | None = None, *, axis: int = 0, num_outputs: int
) -> tuple[Tensor, ...]:  # fmt: skip
    """Into pieces of these sizes; without them into equal ones, the last one smaller where they do not fit."""
    if split is not None:
        return torch.split(x, numbers(split), axis)
    step = -(-x.shape[axis] // num_outputs)
    sizes = [step] * (num_outputs - 1)
    return torch.split(x, [*sizes, x.shape[axis] - sum(sizes)], axis)


def slices(x: Tensor, starts: Sizes, ends: Sizes, axes: Sizes | None = None, steps: Sizes | None = None) -> Tensor:
    """Along each of these axes from a start to an end, which may count from behind and lie outside."""
    first = numbers(starts)
    along = [*range(len(first))] if axes is None else numbers(axes)
    by = [1] * len(first) if steps is None else numbers(steps)
    for axis, start, end, step in zip(along, first, numbers(ends), by, strict=True):
        if step > 0:
            x = x[(slice(None),) * (axis % x.dim()) + (slice(start, end, step),)]
        else:  # torch has no negative steps
            chosen = range(x.shape[axis])[slice(start, end if end >= -x.shape[axis] else None, step)]
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64, device=x.device))
    return x


def tile(x: Tensor, repeats: Sizes) -> Tensor:
    return x.repeat(numbers(repeats))


def pad(
    x: Tensor, pads: Sizes, value: Tensor | float | None = None, axes: Sizes | None = None, *,
    mode: Literal["constant", "reflect", "edge", "wrap"] = "constant",
) -> Tensor:  # fmt: skip
    """pads: how many are put before each axis, then how many behind each; negative ones are taken off."""
    sides = numbers(pads)
    along = [*range(x.dim())] if axes is None else [axis % x.dim() for axis in numbers(axes)]
    before = dict(zip(along, sides[: len(along)], strict=True))
    behind = dict(zip(along, sides[len(along) :], strict=True))
    if mode == "constant":
        widths = [width for axis in reversed(range(x.dim())) for width in (before.get(axis, 0), behind.get(axis, 0))]
        return functional.pad(x, widths, value=0 if value is None else number(value))
    for axis in along:  # torch's own pads only the last dimensions so
        chosen = _outside(
            torch.arange(-before[axis], x.shape[axis] + behind[axis], dtype=torch.int64, device=x.device),
            x.shape[axis],
            mode,
        )
        x = x.index_select(axis, chosen)
    return x


def _outside(i: Tensor, size: int, mode: str) -> Tensor:
    """Which number inside stands at a place that may lie outside."""
    if mode == "edge":
        return i.clamp(0, size - 1)
    if mode == "wrap":
        return i.remainder(size)
    period = max(2 * (size - 1), 1)
    turned = i.remainder(period)
    return torch.where(turned < size, turned, period - turned)


def constant_of_shape(shape: Sizes, *, value: Tensor | None = None) -> Tensor:
    """This value, float32 zero by default, everywhere."""
    fill = torch.zeros(1, dtype=torch.float32, device="cpu") if value is None else value
    return torch.full(numbers(shape), fill.item(), dtype=fill.dtype, device="cpu")


def arange(start: Sizes, limit: Sizes, delta: Sizes) -> Tensor:
    like = next((one.dtype for one in (start, limit, delta) if isinstance(one, Tensor)), None)
    numbers_ = (number(start), number(limit), number(delta))
    usual = torch.float32 if any(isinstance(one, float) for one in numbers_) else torch.int64
    return torch.arange(*numbers_, dtype=like or usual, device="cpu")


def eye_like(x: Tensor, *, k: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """Ones on the diagonal that lies k above the main one, zeros elsewhere."""
    rows, columns = (torch.arange(size, dtype=torch.int64, device=x.device) for size in x.shape)
    return (columns[None, :] - rows[:, None] == k).to(dtype or x.dtype)


def triangle(x: Tensor, k: Sizes = 0, *, upper: int = 1) -> Tensor:
    return torch.triu(x, number(k)) if upper else torch.tril(x, number(k))


def depth_to_space(x: Tensor, *, blocksize: int, mode: Literal["DCR", "CRD"] = "DCR") -> Tensor:
    """Channels become places: [n, c, h, w] -> [n, c / blocksize^2, h * blocksize, w * blocksize]."""
    n, c, h, w = x.shape
    b = blocksize
    if mode == "DCR":
        return x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)
    return x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // b**2, h * b, w * b)


def space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b**2, h // b, w // b)


SHAPES: dict[str, Row] = {
    "Concat": concat, "ConstantOfShape": constant_of_shape, "DepthToSpace": depth_to_space, "Expand": expand,
    "EyeLike": eye_like, "Flatten": flatten, "Pad": pad, "Range": arange, "Reshape": reshape, "Shape": shape,
    "Size": size, "Slice": slices, "SpaceToDepth": space_to_depth, "Split": split, "Squeeze": squeeze, "Tile": tile,
    "Transpose": transpose, "Trilu": triangle, "Unsqueeze": unsqueeze,
}  # fmt: skip
