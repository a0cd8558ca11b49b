"""``nn.Conv1d``: a matrix [out_channels, in_channels / groups * size] that meets the windows of sequences.

(``conv1d.py`` has transformers' ``Conv1D``, which is a linear layer.)
"""

# ruff: noqa: ARG002 - a kind that is asked what all are asked may not need all of it

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from pycompress.kinds.conv2d import Conv2d
from pycompress.kinds.padded import Sides, around
from pycompress.kinds.walk import Walk
from pycompress.methods.method import ConvolutionMethod, Method


@dataclass(frozen=True)
class Conv1dGeometry(Walk):
    """The arguments of an ``nn.Conv1d``: what :class:`~pycompress.kinds.walk.Walk` says, each a tuple of one number; ``around``
    before and behind.

    Raises:
        ValueError: anything that a ``Walk`` is not.
    """

    dims = 1
    in_channels: int
    kernel_size: tuple[int]
    stride: tuple[int] = (1,)
    padding: tuple[int] | str = (0,)
    dilation: tuple[int] = (1,)
    groups: int = 1
    around: Sides = (0, 0)
    padding_mode: str = "zeros"


class Conv1d(Conv2d):
    """Sequences [N, c, length] or [c, length]. A row is what one position of the result is made of."""

    name, dense = "conv1d", nn.Conv1d  # type: ignore[assignment]
    phrase, plural = "a Conv1d", "1-D convolutions"
    geometry_type = Conv1dGeometry  # type: ignore[assignment]
    dims = 2

    def geometry(self, module: nn.Module) -> Conv1dGeometry:
        assert isinstance(module, nn.Conv1d)
        _, channels, size = self.dense_shape(module)
        stride, padding, dilation = (
            value if isinstance(value, str) else tuple(map(int, value))
            for value in (module.stride, module.padding, module.dilation)
        )
        groups, besides, mode = module.groups, around(module) or (0, 0), module.padding_mode
        return Conv1dGeometry(channels * groups, (size,), stride, padding, dilation, groups, besides, mode)  # type: ignore[arg-type]

    def fitted(self, method: Method, module: nn.Module) -> Method:
        if not isinstance(method, ConvolutionMethod):
            return method
        n, c, size = self.dense_shape(module)
        return method.for_convolution((n, c, 1, size), (1, *self.geometry(module).stride))

    def accepts(self, module: nn.Module, x: Tensor) -> bool:
        assert isinstance(module, nn.Conv1d)
        return x.dim() in (2, 3) and x.shape[-2] == self.dense_shape(module)[1] * module.groups

    def sizes(self, n: int, k: int, geometry: Walk) -> tuple[tuple[int | str, ...], tuple[int | str, ...]]:
        return ("sequences", geometry.in_channels, "length"), ("sequences", n, "out_length")
