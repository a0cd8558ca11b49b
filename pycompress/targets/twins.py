"""Twins: what a compressed layer computes, in plain torch operators. Of its weight each target says how it is encoded there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycompress.kinds.padded import last_first
from pycompress.kinds.walk import Walk
from pycompress.nn import CompressedLayer, LowRankConv2d
from pycompress.ops.activation import DIFFERENTIABLE
from pycompress.targets.target import Carried, Fate
from pycompress.weights import DenseWeight, Int4Weight, Int8Weight, LowRankWeight, SparseWeight, Weight


class Floats(nn.Module):
    """A weight as the floats that it stands for."""

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values.contiguous())

    def forward(self, tokens: Tensor | None = None) -> Tensor:
        return self.values if tokens is None else functional.embedding(tokens, self.values)


class Int8Rows(nn.Module):
    """An embedding's int8 weight: rows and their scales are looked up each by itself."""

    values: Tensor
    scale: Tensor

    def __init__(self, weight: Int8Weight) -> None:
        super().__init__()
        self.register_buffer("values", weight.values)
        self.register_buffer("scale", weight.scale[:, None])

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self.values).to(torch.float32) * functional.embedding(tokens, self.scale)


class ZeroPoints(nn.Module):
    """What zero points add to a product without them: (8 - zero_point) * scale, times the sum of the inputs of each group."""

    steps: Tensor

    def __init__(self, weight: Int4Weight) -> None:
        super().__init__()
        self._group = weight.group
        self.register_buffer("steps", (8 - weight.zero_points().float()) * weight.scale.float())

    def forward(self, x: Tensor) -> Tensor:
        sums = x.unflatten(-1, (-1, self._group)).sum(-1)
        y: Tensor = functional.linear(sums, self.steps)
        return y


class Encoded(NamedTuple):
    """How a target has a weight.

    Attributes:
        weight: called without arguments, gives float32 of the shape that was asked for; of an embedding, called with tokens, their
            rows.
        seen: what becomes of the input before the product.
        beside: what else is added to it, of the input as it came; of a linear layer only.
        behind: what becomes of the product, its bias added.
    """

    weight: nn.Module
    seen: nn.Module
    beside: nn.Module | None = None
    behind: nn.Module | None = None


Encode = Callable[[Weight, tuple[int, ...]], Encoded]  # of a canonical weight and the shape that torch's operator takes


def as_floats(weight: Weight, shape: tuple[int, ...]) -> Encoded:
    """Decompressed; the input stays as it is."""
    return Encoded(Floats(weight.decompress().view(shape)), nn.Identity())


class _Product(nn.Module):
    """x times one weight, plus a bias."""

    bias: Tensor | None

    def __init__(self, encoded: Encoded, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.seen, self.beside, behind = encoded
        self.behind = behind or nn.Identity()
        self.register_buffer("bias", None if bias is None else bias.detach().clone())


class _Linear(_Product):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.behind(functional.linear(self.seen(x), self.weight(), self.bias))
        return y if self.beside is None else y + self.beside(x)


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
        y = self.behind(y)
        return walk.from_image(y.squeeze(0) if one else y)


class _Rows(_Product):
    """The rows that tokens choose."""

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.weight(tokens)
        return y


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


def matrices_of(layer: CompressedLayer) -> list[Weight]:
    """The weights that :func:`twin_of` has encoded."""
    weight = layer.canonical()
    if isinstance(layer, LowRankConv2d):
        return [DenseWeight(factor.flatten(1)) for factor in weight.factors()]
    if isinstance(weight, LowRankWeight):
        return [*factors_of(weight), *([] if weight.residual is None else [weight.residual])]
    return [weight]


def together(parts: Sequence[Carried]) -> Carried:
    """Of the matrices of one layer: the worst that becomes of one."""
    fates: tuple[Fate, ...] = ("refused", "widened", "kept")
    fate = next(fate for fate in fates if any(part.fate == fate for part in parts))
    encodings, reasons = (
        list(dict.fromkeys(getattr(part, name) for part in parts if getattr(part, name)))
        for name in ("encoding", "reason")
    )
    return Carried(fate, " + ".join(encodings), "; ".join(reasons))


def dense_int8(weight: Int8Weight | SparseWeight) -> Int8Weight:
    """The same integers and scales, those of a sparse weight with their zeros."""
    if isinstance(weight, Int8Weight):
        return weight
    assert weight.scale is not None
    assert weight.activation_bits is not None
    values = replace(weight, scale=torch.ones_like(weight.scale)).decompress().to(torch.int8)
    return Int8Weight(values, weight.scale, weight.activation_bits, 8)


def check_stored(title: str, claims: Iterable[tuple[str, bytes]], written: bytes) -> None:
    """Raises RuntimeError where a file lacks the integers of a layer that is said to be stored as such.

    Args:
        claims: of each matrix the name of its layer, and its integers as the file should have them.
    """
    if missing := list(dict.fromkeys(name or "the model" for name, integers in claims if integers not in written)):
        raise RuntimeError(f"deploy: {title} stored {', '.join(missing)} in another form than as integers, as expected")


def factors_of(weight: LowRankWeight) -> tuple[Weight, Weight]:
    """down [r, k] and up [n, r] as canonical weights of their own."""
    if weight.down_scale is None or weight.up_scale is None:
        return DenseWeight(weight.down), DenseWeight(weight.up)
    bits: Any = weight.activation_bits
    return Int8Weight(weight.down, weight.down_scale, bits, 8), Int8Weight(weight.up, weight.up_scale, bits, 8)


def _dense(factor: Tensor, encode: Encode) -> Encoded:
    return encode(DenseWeight(factor.flatten(1).contiguous()), tuple(factor.shape))


def integers_carried(weight: Weight, layer: CompressedLayer, who: str, seen: str = "") -> Carried:
    """What becomes of one matrix in a runtime that has integers for it, and rounds each row or image of the input to 8 bits.

    Args:
        who: the runtime, in reasons. seen: what it does with the weight instead; '' where it is that.
    """
    if layer.kind.tokens:
        return Carried("kept", "int8 rows with a scale each")
    item = "image" if isinstance(layer.geometry, Walk) else "row"
    seen = seen or f"{item}s quantized as they come"
    if isinstance(weight, Int4Weight):
        if weight.symmetric:
            return Carried("kept", f"int4 in groups of {weight.group}, {seen}")
        why = f"{who} has no zero points in groups: a product with the sums of groups stands for them"
        return Carried("widened", f"int4 in groups of {weight.group}, float32 for zero points, {seen}", why)
    zeros = ", zeros and all" if isinstance(weight, SparseWeight) else ""
    reasons = ["the input has 8 bits, not 7"] if getattr(weight, "activation_bits", None) == 7 else []
    if getattr(weight, "static", None):
        reasons.append(f"each {item} has a range of its own, not the fixed one")
    return Carried("widened" if zeros else "kept", f"int8 per channel{zeros}, {seen}", "; ".join(reasons))
