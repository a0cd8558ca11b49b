"""Operators on quantized numbers: with constant operands they are computed once, so that a quantized weight is a float one here."""

# ruff: noqa: ARG001 - attributes that the standard has, and that mean nothing where they are as they must be here

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pycompress.onnx.operators.operator import Row
from pycompress.onnx.operators.products import AutoPad, conv


def _shaped(one: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point as it lies beside x: one for all, one a slice of an axis, or one a block of it."""
    if one.numel() == 1 and one.dim() <= 1:
        return one.reshape(())
    if block_size:
        return one.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    return one.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())]) if one.dim() == 1 else one


def dequantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: Literal[0] = 0
) -> Tensor:  # fmt: skip
    """(x - zero point) * scale, in the type of the scale."""
    values = x.to(torch.int32) if not torch.is_floating_point(x) else x.float()
    if zero_point is not None:
        values = values - _shaped(zero_point, x, axis, block_size).to(values.dtype)
    return (values.to(scale.dtype) * _shaped(scale, x, axis, block_size)).to(scale.dtype)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int = 1, block_size: int = 0,
    output_dtype: torch.dtype | None = None, precision: int = 0, saturate: int = 1,
) -> Tensor:  # fmt: skip
    """x / scale rounded to the nearest even, plus the zero point, as near as its type has it; uint8 where there is none."""
    dtype = (zero_point.dtype if zero_point is not None else None) or output_dtype or torch.uint8
    span = torch.iinfo(dtype)
    q = torch.round(x / _shaped(scale, x, axis, block_size).to(x.dtype))
    if zero_point is not None:
        q = q + _shaped(zero_point, x, axis, block_size).to(q.dtype)
    return q.clamp(span.min, span.max).to(dtype)


def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(uint8, scale, zero point) by the range of x, which holds zero."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    zero_point = torch.round(-low / scale).clamp(0, 255)
    q = (torch.round(x / scale) + zero_point).clamp(0, 255)
    return q.to(torch.uint8), scale, zero_point.to(torch.uint8)


def _centred(x: Tensor, zero_point: Tensor | None, along: int) -> Tensor:
    """x minus its zero point, float64: sums of up to 2^37 products of 8 bits are exact, and fast."""
    wide = x.to(torch.float64)
    if zero_point is None:
        return wide
    zero = zero_point.to(torch.float64)
    if zero.dim() == 1 and zero.numel() > 1:
        zero = zero.reshape([-1 if i == along % x.dim() else 1 for i in range(x.dim())])
    return wide - zero


def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    """int32; zero points: one, one a row of a, one a column of b."""
    return (_centred(a, a_zero, -2) @ _centred(b, b_zero, -1)).to(torch.int32)


def conv_integer(
    x: Tensor, weight: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None, *, auto_pad: AutoPad = "NOTSET",
    dilations: list[int] | None = None, group: int = 1, kernel_shape: list[int] | None = None, pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """int32; what lies around an image is its zero point."""
    y = conv(
        _centred(x, x_zero, 1), _centred(weight, w_zero, 0), auto_pad=auto_pad, dilations=dilations, group=group, pads=pads,
        strides=strides,
    )  # fmt: skip
    return y.to(torch.int32)


QUANTIZED: dict[str, Row] = {
    "ConvInteger": conv_integer, "DequantizeLinear": dequantize, "DynamicQuantizeLinear": dynamic_quantize,
    "MatMulInteger": matmul_integer, "QuantizeLinear": quantize,
}  # fmt: skip
