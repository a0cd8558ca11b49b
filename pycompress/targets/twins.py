"""Twins: what a compressed layer computes, in plain torch operators. Of its weight each target says how it is encoded there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycompress.kinds.padded import last_first
from pycompress.kinds.walk import Walk
from pycompress.nn import CompressedLayer, LowRankConv2d
from pycompress.ops.activation import DIFFERENTIABLE
from pycompress.weights import DenseWeight, Int8Weight, LowRankWeight, Weight


class Floats(nn.Module):
    """A weight as the floats that it stands for."""

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values.contiguous())

    def forward(self) -> Tensor:
        return self.values


class Encoded(NamedTuple):
    """How a target has a weight.

    Attributes:
        weight: called without arguments, gives float32 of the shape that was asked for.
        seen: what becomes of the input before the product.
    """

    weight: nn.Module
    seen: nn.Module


Encode = Callable[[Weight, tuple[int, ...]], Encoded]  # of a canonical weight and the shape that torch's operator takes


def as_floats(weight: Weight, shape: tuple[int, ...]) -> Encoded:
    """Decompressed; the input stays as it is."""
    return Encoded(Floats(weight.decompress().view(shape)), nn.Identity())


class _Product(nn.Module):
    """x times one weight, plus a bias."""

    bias: Tensor | None

    def __init__(self, encoded: Encoded, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.seen = encoded
        self.register_buffer("bias", None if bias is None else bias.detach().clone())


class _Linear(_Product):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.seen(x), self.weight(), self.bias)


class _Convolution(_Product):
    """In two dimensions: a sequence is an image one high. What a side alone is padded with stands around x before it is seen."""

    def __init__(self, encoded: Encoded, geometry: Walk, bias: Tensor | None = None) -> None:
        super().__init__(encoded, bias)
        self._walk = geometry

    def forward(self, x: Tensor) -> Tensor:
        walk = self._walk
        _, stride, sides, dilation = walk.plane
        one = x.dim() == walk.dims + 1
        x = walk.as_image(walk.filled(x))
        x = x.unsqueeze(0) if one else x
        even = sides[::2] == sides[1::2]
        if not even:
            x = functional.pad(x, last_first(sides))
        padding = sides[::2] if even else (0, 0)
        y = functional.conv2d(self.seen(x), self.weight(), self.bias, stride, padding, dilation, walk.groups)
        return walk.from_image(y.squeeze(0) if one else y)


class _Rows(_Product):
    """The rows that tokens choose."""

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self.weight())


class _Sum(nn.Module):
    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.one(x) + self.other(x)
        return y


class Twin(nn.Module):
    """``act(product(x))`` in float32, in the dtype that the layer gives."""

    def __init__(self, layer: CompressedLayer, product: nn.Module) -> None:
        super().__init__()
        self.product = product
        self._activation = layer.activation
        self._dtype = (
            layer.dtype if layer.kind.tokens else None
        )  # rows are in that of the weight, all else in that of x

    def forward(self, x: Tensor) -> Tensor:
        wanted = self._dtype or x.dtype
        y = self.product(x.float() if x.is_floating_point() and x.dtype != torch.float32 else x)
        y = DIFFERENTIABLE[self._activation](y)
        return y if y.dtype == wanted else y.to(wanted)


def twin_of(layer: CompressedLayer, encode: Encode = as_floats) -> Twin:
    """A layer's twin; low-rank weights as a chain of products, each encoded by itself.

    Args:
        layer: of any kind but the recurrent ones.
        encode: what the target makes of a weight that is one matrix: that of the layer, or a factor, or what the factors leave.
    """
    if layer.kind.recurrent:
        raise TypeError(f"twin_of: the layer is {type(layer).__name__}, expected none that is recurrent")
    return Twin(layer, _product(layer, encode))


def _product(layer: CompressedLayer, encode: Encode) -> nn.Module:
    weight, bias = layer.canonical(), layer.bias32
    if isinstance(layer, LowRankConv2d):
        last = len(layer.stages) - 1
        return nn.Sequential(
            *(
                _Convolution(_dense(factor, encode), stage, bias if i == last else None)
                for i, (factor, stage) in enumerate(zip(weight.factors(), layer.stages, strict=True))
            )
        )
    if layer.kind.tokens:
        if isinstance(weight, LowRankWeight):
            return nn.Sequential(_Rows(_dense(weight.up, encode)), _Linear(_dense(weight.down.T, encode)))
        return _Rows(encode(weight, tuple(weight.shape)))
    if isinstance(layer.geometry, Walk):
        kernel = layer.geometry.plane[0]
        shape = (layer.n, layer.geometry.in_channels // layer.geometry.groups, *kernel)
        return _Convolution(encode(weight, shape), layer.geometry, bias)
    return _linear(weight, bias, encode)


def _linear(weight: Weight, bias: Tensor | None, encode: Encode) -> nn.Module:
    if not isinstance(weight, LowRankWeight):
        return _Linear(encode(weight, tuple(weight.shape)), bias)
    down, up = factors_of(weight)
    chain = nn.Sequential(
        _Linear(encode(down, tuple(down.shape))),
        _Linear(encode(up, tuple(up.shape)), bias),
    )
    return chain if weight.residual is None else _Sum(chain, _linear(weight.residual, None, encode))


def factors_of(weight: LowRankWeight) -> tuple[Weight, Weight]:
    """down [r, k] and up [n, r] as canonical weights of their own."""
    if weight.down_scale is None or weight.up_scale is None:
        return DenseWeight(weight.down), DenseWeight(weight.up)
    bits: Any = weight.activation_bits
    return Int8Weight(weight.down, weight.down_scale, bits, 8), Int8Weight(weight.up, weight.up_scale, bits, 8)


def _dense(factor: Tensor, encode: Encode) -> Encoded:
    return encode(DenseWeight(factor.flatten(1).contiguous()), tuple(factor.shape))
