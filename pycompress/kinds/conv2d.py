"""``nn.Conv2d``: a matrix [out_channels, in_channels / groups * height * width] that meets the patches of images.

``Convolution`` stands for the other convolutions of torch, which have no compressed layer.
"""

# ruff: noqa: ARG002 - a kind that is asked what all are asked may not need all of it

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pycompress.kinds.kind import Kind
from pycompress.kinds.padded import Sides, around, last_first
from pycompress.kinds.walk import Walk
from pycompress.methods.method import ConvolutionMethod, Method


@dataclass(frozen=True)
class Conv2dGeometry(Walk):
    """The arguments of an ``nn.Conv2d``: what :class:`~pycompress.kinds.walk.Walk` says, of (height, width); ``around`` of (top,
    bottom, left, right).

    Raises:
        ValueError: anything that a ``Walk`` is not.
    """

    dims = 2
    in_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    around: Sides = (0, 0, 0, 0)
    padding_mode: str = "zeros"


class Conv2d(Kind):
    """Images [N, c, height, width] or [c, height, width]. A row is what one position of the result is made of."""

    name, dense = "conv2d", nn.Conv2d
    phrase, plural = "a Conv2d", "convolutions"
    geometry_type = Conv2dGeometry
    dims = 3
    pads = True

    def geometry(self, module: nn.Module) -> Walk:
        assert isinstance(module, nn.Conv2d)
        _, channels, height, width = self.dense_shape(module)
        stride, padding, dilation = (
            value if isinstance(value, str) else tuple(map(int, value))
            for value in (module.stride, module.padding, module.dilation)
        )
        groups, besides, mode = module.groups, around(module) or (0, 0, 0, 0), module.padding_mode
        return Conv2dGeometry(channels * groups, (height, width), stride, padding, dilation, groups, besides, mode)  # type: ignore[arg-type]

    def fitted(self, method: Method, module: nn.Module) -> Method:
        if not isinstance(method, ConvolutionMethod):
            return method
        n, c, height, width = self.dense_shape(module)
        stride = self.geometry(module).stride
        return method.for_convolution((n, c, height, width), (stride[0], stride[1]))

    def weight_shape(self, n: int, k: int, geometry: Walk) -> tuple[int, ...]:
        return n, geometry.in_channels // geometry.groups, *geometry.kernel_size

    def describe(self, n: int, k: int, geometry: Walk) -> str:
        return f"out_channels={n}, {geometry}"

    def has_rows(self, module: nn.Module) -> bool:
        """Not in groups, where each group meets a row of its own."""
        try:
            return self.geometry(module).groups == 1
        except ValueError:
            return False

    def attributes(self, n: int, k: int, geometry: Walk) -> dict[str, Any]:
        own = geometry.arguments()
        return {**own, "out_channels": n, "transposed": False, "output_padding": (0,) * geometry.dims}

    def note(self, geometry: Walk) -> str:
        return f"pads its input itself: {'x'.join(map(str, geometry.around))} zeros" if any(geometry.around) else ""

    def accepts(self, module: nn.Module, x: Tensor) -> bool:
        assert isinstance(module, nn.Conv2d)
        return x.dim() in (3, 4) and x.shape[-3] == self.dense_shape(module)[1] * module.groups

    def quantized_together(self, x: Tensor) -> Tensor:
        return x.flatten(-self.dims)

    def spread(self, geometry: Walk) -> int:
        return math.prod(geometry.kernel_size)

    def rows(self, x: Tensor, geometry: Walk, chosen: Tensor | None = None) -> Tensor:
        """The patches, in the order in which a row of the weight has their numbers."""
        kernel, strides, sides, dilation = geometry.plane
        windows = pad(geometry.as_image(geometry.filled(x)), last_first(sides))
        for axis, size, step, stride in zip((2, 3), kernel, dilation, strides, strict=True):
            windows = windows.unfold(axis, step * (size - 1) + 1, stride)
        windows = windows[..., :: dilation[0], :: dilation[1]].permute(0, 2, 3, 1, 4, 5)
        if chosen is not None:
            windows = windows[torch.unravel_index(chosen, windows.shape[:3])]
        return windows.reshape(-1, geometry.in_features)

    def results(self, y: Tensor) -> Tensor:
        return y.movedim(-self.dims, -1).reshape(-1, y.shape[-self.dims])

    def result_shape(self, shape: Sequence[Any], n: int, k: int, geometry: Walk) -> tuple[Any, ...]:
        return *shape[: -self.dims], n, *geometry.positions(tuple(shape[1 - self.dims :]))

    def sizes(self, n: int, k: int, geometry: Walk) -> tuple[tuple[int | str, ...], tuple[int | str, ...]]:
        return ("images", geometry.in_channels, "height", "width"), ("images", n, "out_height", "out_width")


class Convolution(Kind):
    """The convolutions that are no nn.Conv1d and no nn.Conv2d."""

    name, dense = "convolution", nn.Module
    phrase, plural = "a convolution", "convolutions"
    classes = (nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, self.classes)

    def misfit(self, module: nn.Module) -> str:
        return f"{type(module).__name__} has no compressed layer"

    def has_rows(self, module: nn.Module) -> bool:
        return False
