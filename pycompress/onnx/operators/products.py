"""Products whose weight is computed in the graph; those with a constant one become layers (:mod:`..importing.layers`)."""

# ruff: noqa: ARG001 - attributes that the standard has, and that mean nothing where they are as they must be here

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pycompress.onnx.operators.operator import Row

AutoPad = Literal["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]
Pads = tuple[list[int], list[int]]  # before and behind, of each axis of an image


def gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0  # noqa: N803
) -> Tensor:  # fmt: skip
    """alpha a b + beta c."""
    y = (a.T if transA else a) @ (b.T if transB else b)
    y = y if alpha == 1 else y * alpha
    if c is None or beta == 0:
        return y
    return y + (c if beta == 1 else (c * beta).to(c.dtype))


def pads_of(
    size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int] | None,
    auto_pad: AutoPad,
) -> Pads:  # fmt: skip
    """How much is put around an image of this size."""
    n = len(kernel)
    if auto_pad == "VALID" or (auto_pad == "NOTSET" and pads is None):
        return [0] * n, [0] * n
    if auto_pad == "NOTSET":
        assert pads is not None
        return [*pads[:n]], [*pads[n:]]
    before, behind = [], []
    for here, k, stride, step in zip(size, kernel, strides, dilations, strict=True):
        whole = max(0, (-(-here // stride) - 1) * stride + step * (k - 1) + 1 - here)
        less, more = whole // 2, whole - whole // 2
        before.append(less if auto_pad == "SAME_UPPER" else more)
        behind.append(more if auto_pad == "SAME_UPPER" else less)
    return before, behind


def padded(x: Tensor, pads: Pads, value: float = 0.0) -> Tensor:
    """x [n, c, ...] with so much around its images."""
    if not any(map(any, pads)):
        return x
    widths = [width for one in zip(reversed(pads[0]), reversed(pads[1]), strict=True) for width in one]
    return functional.pad(x, widths, value=value)


def same_padded(
    x: Tensor, *, kernel_shape: Sequence[int], strides: Sequence[int], dilations: Sequence[int], auto_pad: AutoPad
) -> Tensor:  # fmt: skip
    """Zeros around images, so many that a convolution gives one number for each step inside them."""
    return padded(x, pads_of(x.shape[2:], kernel_shape, strides, dilations, None, auto_pad))


_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, auto_pad: AutoPad = "NOTSET", dilations: list[int] | None = None,
    group: int = 1, kernel_shape: list[int] | None = None, pads: list[int] | None = None, strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    n = x.dim() - 2
    steps, by = strides or [1] * n, dilations or [1] * n
    around = pads_of(x.shape[2:], weight.shape[2:], steps, by, pads, auto_pad)
    return _CONVOLUTIONS[n](padded(x, around), weight, bias, steps, 0, by, group)


def conv_transpose(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, auto_pad: AutoPad = "NOTSET", dilations: list[int] | None = None,
    group: int = 1, kernel_shape: list[int] | None = None, output_padding: list[int] | None = None,
    output_shape: list[int] | None = None, pads: list[int] | None = None, strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """The whole result without what the pads take off; a negative rest is put on as zeros."""
    n = x.dim() - 2
    steps, by, more = strides or [1] * n, dilations or [1] * n, output_padding or [0] * n
    whole = [
        stride * (size - 1) + rest + step * (k - 1) + 1
        for size, stride, rest, step, k in zip(x.shape[2:], steps, more, by, weight.shape[2:], strict=True)
    ]
    wanted = output_shape
    if wanted is None and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [size * stride for size, stride in zip(x.shape[2:], steps, strict=True)]
    if wanted is not None:
        over = [have - want for have, want in zip(whole, wanted, strict=True)]
        less, rest = [one // 2 for one in over], [one - one // 2 for one in over]
        before, behind = (less, rest) if auto_pad == "SAME_UPPER" else (rest, less)
    else:
        before, behind = (pads[:n], pads[n:]) if pads and auto_pad == "NOTSET" else ([0] * n, [0] * n)
    y = _TRANSPOSED[n](x, weight, None, steps, 0, 0, group, by)
    put_on = [rest - end for rest, end in zip(more, behind, strict=True)]
    y = padded(y, ([-one for one in before], put_on))
    return y if bias is None else y + bias.reshape(-1, *[1] * n)


PRODUCTS: dict[str, Row] = {"Conv": conv, "ConvTranspose": conv_transpose, "Gemm": gemm, "MatMul": torch.matmul}
