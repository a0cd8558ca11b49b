"""``nn.Conv2d``: a matrix [out_channels, in_channels / groups * height * width] that meets the patches of images.

``Convolution`` stands for the other convolutions of torch, which have no compressed layer.
"""

# ruff: noqa: ARG002 - a kind that is asked what all are asked may not need all of it

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pycompress.kinds.kind import Kind
from pycompress.kinds.padded import Sides, around
from pycompress.methods.method import ConvolutionMethod, Method
from pycompress.ops import MAX_STEP


@dataclass(frozen=True)
class Conv2dGeometry:
    """The arguments of an ``nn.Conv2d`` with zeros around its input.

    Attributes:
        in_channels: from 1.
        kernel_size, stride, dilation: (height, width), from 1 to ``ops.MAX_STEP``.
        padding: (height, width), from 0, on either side; ``valid``: none; ``same``: so much that the output is as large as the
            input, an odd rest at the bottom and at the right (needs stride 1).
        groups: from 1, a divisor of in_channels.
        around: (top, bottom, left, right), from 0: zeros besides, of a padding module whose place the layer has, too.
    Raises:
        ValueError: anything else.
    """

    in_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    around: Sides = (0, 0, 0, 0)

    def __post_init__(self) -> None:
        for name in ("groups", "in_channels"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"Conv2dGeometry: {name} is {value!r}, expected a number from 1")
        if self.in_channels % self.groups:
            raise ValueError(
                f"Conv2dGeometry: groups is {self.groups}, expected a divisor of in_channels = {self.in_channels}"
            )
        for name in ("kernel_size", "stride", "dilation"):
            if not _are_sizes(value := getattr(self, name), 2, 1):
                raise ValueError(f"Conv2dGeometry: {name} is {value!r}, expected two numbers from 1 to {MAX_STEP}")
        if self.padding not in ("same", "valid") and not _are_sizes(self.padding, 2, 0):
            raise ValueError(
                f"Conv2dGeometry: padding is {self.padding!r}, expected two numbers from 0 to {MAX_STEP}, 'same' or 'valid'"
            )
        if not _are_sizes(self.around, 4, 0):
            raise ValueError(f"Conv2dGeometry: around is {self.around!r}, expected four numbers from 0 to {MAX_STEP}")
        if self.padding == "same" and self.stride != (1, 1):
            raise ValueError(f"Conv2dGeometry: stride is {self.stride}, expected (1, 1) for padding 'same'")

    @property
    def in_features(self) -> int:
        """k: how many inputs an output is made of."""
        return self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]

    @property
    def sides(self) -> tuple[int, ...]:
        """Rows and columns of zeros at the top, bottom, left and right of the input."""
        return tuple(own + other for own, other in zip(self._own_sides(), self.around, strict=True))

    def _own_sides(self) -> tuple[int, int, int, int]:
        if not isinstance(self.padding, str):
            (height, width) = self.padding
            return height, height, width, width
        if self.padding == "valid":
            return 0, 0, 0, 0
        height, width = (step * (size - 1) for step, size in zip(self.dilation, self.kernel_size, strict=True))
        return height // 2, height - height // 2, width // 2, width - width // 2

    def _shown(self) -> dict[str, Any]:
        """The values by name; of those that files and texts did not know in the beginning, what is not as it always was then."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value != _LATER.get(name)}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._shown().items())

    # --- stored form ----------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """For JSON: everything but in_channels, which the weight [n, k] knows."""
        values = {name: value for name, value in self._shown().items() if name != "in_channels"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_settings(cls, k: int, settings: Mapping[str, Any]) -> Conv2dGeometry:
        """The inverse of :meth:`settings` for a weight [n, k]. Raises ValueError where anything does not fit."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
        }
        later = {name for name, usual in _LATER.items() if values.get(name, usual) != usual}
        names = [field.name for field in fields(cls)[1:] if field.name not in _LATER or field.name in later]
        if set(settings) != set(names):
            raise ValueError(f"Conv2dGeometry: the settings are {list(settings)}, expected {names}")
        geometry = cls(values.get("groups", 1), **values)
        height, width = geometry.kernel_size
        if k % (height * width):
            raise ValueError(f"Conv2dGeometry: kernel_size is {geometry.kernel_size}, expected a divisor of k = {k}")
        return replace(geometry, in_channels=k // (height * width) * geometry.groups)


_LATER = {"groups": 1, "around": (0, 0, 0, 0)}


def _are_sizes(value: object, count: int, smallest: int) -> bool:
    """So many whole numbers from ``smallest`` to MAX_STEP."""
    if not isinstance(value, tuple) or len(value) != count:
        return False
    return all(type(size) is int and smallest <= size <= MAX_STEP for size in value)


class Conv2d(Kind):
    """Images [N, c, height, width] or [c, height, width]. A row is what one position of the result is made of."""

    name, dense = "conv2d", nn.Conv2d
    phrase, plural = "a Conv2d", "convolutions"
    geometry_type = Conv2dGeometry
    dims = 3
    pads = True

    def geometry(self, module: nn.Module) -> Conv2dGeometry:
        assert isinstance(module, nn.Conv2d)
        if module.padding_mode != "zeros":
            raise ValueError(f"padding_mode is {module.padding_mode!r}, expected 'zeros'")
        _, channels, height, width = self.dense_shape(module)
        stride, padding, dilation = (
            value if isinstance(value, str) else tuple(map(int, value))
            for value in (module.stride, module.padding, module.dilation)
        )
        groups, sides = module.groups, around(module) or (0, 0, 0, 0)
        return Conv2dGeometry(channels * groups, (height, width), stride, padding, dilation, groups, sides)  # type: ignore[arg-type]

    def fitted(self, method: Method, module: nn.Module) -> Method:
        if not isinstance(method, ConvolutionMethod):
            return method
        n, c, height, width = self.dense_shape(module)
        return method.for_convolution((n, c, height, width), self.geometry(module).stride)

    def weight_shape(self, n: int, k: int, geometry: Conv2dGeometry) -> tuple[int, ...]:
        return n, geometry.in_channels // geometry.groups, *geometry.kernel_size

    def describe(self, n: int, k: int, geometry: Conv2dGeometry) -> str:
        return f"out_channels={n}, {geometry}"

    def has_rows(self, module: nn.Module) -> bool:
        """Not in groups, where each group meets a row of its own."""
        try:
            return self.geometry(module).groups == 1
        except ValueError:
            return False

    def attributes(self, n: int, k: int, geometry: Conv2dGeometry) -> dict[str, Any]:
        own = {field.name: getattr(geometry, field.name) for field in fields(geometry) if field.name != "around"}
        return {**own, "out_channels": n, "padding_mode": "zeros", "transposed": False, "output_padding": (0, 0)}

    def note(self, geometry: Conv2dGeometry) -> str:
        return f"pads its input itself: {'x'.join(map(str, geometry.around))} zeros" if any(geometry.around) else ""

    def accepts(self, module: nn.Module, x: Tensor) -> bool:
        assert isinstance(module, nn.Conv2d)
        return x.dim() in (3, 4) and x.shape[-3] == self.dense_shape(module)[1] * module.groups

    def quantized_together(self, x: Tensor) -> Tensor:
        return x.flatten(-3)

    def spread(self, geometry: Conv2dGeometry) -> int:
        return geometry.kernel_size[0] * geometry.kernel_size[1]

    def rows(self, x: Tensor, geometry: Conv2dGeometry, chosen: Tensor | None = None) -> Tensor:
        """The patches, in the order in which a row of the weight has their numbers."""
        top, bottom, left, right = geometry.sides
        windows = pad(x, (left, right, top, bottom))
        for axis, size, step, stride in zip(
            (2, 3), geometry.kernel_size, geometry.dilation, geometry.stride, strict=True
        ):
            windows = windows.unfold(axis, step * (size - 1) + 1, stride)
        windows = windows[..., :: geometry.dilation[0], :: geometry.dilation[1]].permute(0, 2, 3, 1, 4, 5)
        if chosen is not None:
            windows = windows[torch.unravel_index(chosen, windows.shape[:3])]
        return windows.reshape(-1, geometry.in_features)

    def results(self, y: Tensor) -> Tensor:
        return y.movedim(-3, -1).reshape(-1, y.shape[-3])

    def sizes(
        self, n: int, k: int, geometry: Conv2dGeometry
    ) -> tuple[tuple[int | str, ...], tuple[int | str, ...]]:  # fmt: skip
        return ("images", geometry.in_channels, "height", "width"), ("images", n, "out_height", "out_width")


class Convolution(Kind):
    """The convolutions that are no nn.Conv2d."""

    name, dense = "convolution", nn.Module
    phrase, plural = "a convolution", "convolutions"
    classes = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, self.classes)

    def misfit(self, module: nn.Module) -> str:
        return f"{type(module).__name__} has no compressed layer"

    def has_rows(self, module: nn.Module) -> bool:
        return False
