"""Operators that read an image [n, c, ...] between its places."""

# ruff: noqa: ARG001 - attributes that the standard has, and that mean nothing where they are as they must be here

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pycompress.onnx.operators.operator import Row, Sizes, numbers

Coordinates = Literal[
    "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_half_pixel_for_nn"
]  # fmt: skip


def resize(
    x: Tensor, roi: Tensor | None = None, scales: Sizes | None = None, sizes: Sizes | None = None, *,
    antialias: Literal[0] = 0, axes: list[int] | None = None, coordinate_transformation_mode: Coordinates = "half_pixel",
    cubic_coeff_a: float = -0.75, exclude_outside: int = 0, extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: Literal["stretch"] = "stretch", mode: Literal["nearest", "linear", "cubic"] = "nearest",
    nearest_mode: Literal["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"] = "round_prefer_floor",
) -> Tensor:  # fmt: skip
    """To these sizes, or by these scales, along these axes; each axis on its own."""
    along = [*range(x.dim())] if axes is None else [axis % x.dim() for axis in axes]
    by = [] if scales is None else numbers(scales)
    to = [math.floor(x.shape[axis] * scale) for axis, scale in zip(along, by, strict=True)] if by else numbers(sizes)  # type: ignore[arg-type]
    for i, axis in enumerate(along):
        size, result = x.shape[axis], to[i]
        scale = by[i] if by else result / size
        if result == size and scale == 1:
            continue
        places = _places(result, size, scale, coordinate_transformation_mode, x.device)
        x = _read(x, axis, places, mode, nearest_mode, cubic_coeff_a, bool(exclude_outside))
    return x


def _places(result: int, size: int, scale: float, mode: str, device: torch.device) -> Tensor:
    """Where in x each number of the result lies, float64."""
    i = torch.arange(result, dtype=torch.float64, device=device)
    if mode == "asymmetric":
        return i / scale
    if mode == "align_corners":
        return i * (size - 1) / (scale * size - 1) if result > 1 else i * 0
    if mode == "pytorch_half_pixel" and result == 1:
        return i * 0 - 0.5
    if mode in ("half_pixel", "pytorch_half_pixel"):
        return (i + 0.5) / scale - 0.5
    if mode == "half_pixel_symmetric":
        centre = size / 2 * (1 - result / (scale * size))
        return centre + (i + 0.5) / scale - 0.5
    return (i + 0.5) / scale  # tf_half_pixel_for_nn


_ROUNDED = {
    "round_prefer_floor": lambda at: torch.ceil(at - 0.5),
    "round_prefer_ceil": lambda at: torch.floor(at + 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def _read(x: Tensor, axis: int, places: Tensor, mode: str, nearest: str, a: float, exclude: bool) -> Tensor:
    size = x.shape[axis]
    if mode == "nearest":
        return x.index_select(axis, _ROUNDED[nearest](places).long().clamp(0, size - 1))
    low = torch.floor(places)
    reach = (0, 1) if mode == "linear" else (-1, 0, 1, 2)
    weights = torch.stack([_weight((places - low - step).abs(), mode, a) for step in reach])
    taps = torch.stack([low.long() + step for step in reach])
    if exclude:
        weights = weights * ((taps >= 0) & (taps < size))
        weights = weights / weights.sum(0)
    shape = [-1 if axis == i else 1 for i in range(x.dim())]
    parts = [
        x.index_select(axis, tap.clamp(0, size - 1)) * weight.to(x.dtype).reshape(shape)
        for tap, weight in zip(taps, weights, strict=True)
    ]
    return torch.stack(parts).sum(0)


def _weight(distance: Tensor, mode: str, a: float) -> Tensor:
    """Of a number at this distance; cubic: Keys 1981, doi:10.1109/TASSP.1981.1163711."""
    d = distance
    if mode == "linear":
        return 1 - d
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    return torch.where(d <= 1, near, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a)


def resize_10(x: Tensor, scales: Sizes, *, mode: Literal["nearest", "linear"] = "nearest") -> Tensor:
    """Resize in opset 10 and Upsample before: what lies left counts."""
    return resize(x, None, scales, coordinate_transformation_mode="asymmetric", nearest_mode="floor", mode=mode)


def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0,
    mode: Literal["linear", "bilinear", "cubic", "bicubic", "nearest"] = "linear",
    padding_mode: Literal["zeros", "border", "reflection"] = "zeros",
) -> Tensor:  # fmt: skip
    named = {
        "linear": "bilinear",
        "bilinear": "bilinear",
        "cubic": "bicubic",
        "bicubic": "bicubic",
        "nearest": "nearest",
    }[mode]
    return functional.grid_sample(x, grid.to(x.dtype), named, padding_mode, bool(align_corners))


IMAGES: dict[str, Row] = {
    "GridSample": grid_sample, "Resize": {10: resize_10, 11: resize}, "Upsample": {7: resize_10},
}  # fmt: skip
