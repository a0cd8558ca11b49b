"""``SparseConv2d``: an ``nn.Conv2d`` of whose weight only the non-zero part is kept and multiplied, in the sparse kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from pycompress import ops
from pycompress.methods.weight import Weight
from pycompress.nn.conv import CompressedConv2d
from pycompress.nn.geometry import Conv2dGeometry
from pycompress.nn.layer import DIFFERENTIABLE
from pycompress.nn.sparse import SparseLayer


def _conv2d(
    x: Tensor, packed: Tensor, n: int, bias: Tensor | None, geometry: Conv2dGeometry, activation: str
) -> Tensor:
    return ops.sparse_conv2d(
        x, packed, n, bias, geometry.kernel_size, geometry.stride, geometry.sides, geometry.dilation, activation
    )


class _InputGradient(torch.autograd.Function):
    """Straight-through gradient for the input; the weight is fixed (Bengio et al. 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, n: int, geometry: Conv2dGeometry,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(packed)
        ctx.n, ctx.geometry, ctx.x_shape = n, geometry, x.shape
        return _conv2d(x.detach(), packed, n, bias, geometry, "none")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (packed,), geometry = grads, ctx.saved_tensors, ctx.geometry
        weight = ops.sparse_dense(packed, (ctx.n, geometry.in_features, 32)).to(grad.dtype)
        weight = weight.view(ctx.n, geometry.in_channels, *geometry.kernel_size)
        # Of the input with its zeros around it: torch's convolution has the same number of them on opposite sides.
        top, bottom, left, right = geometry.sides
        height, width = ctx.x_shape[-2:]
        grad = grad.reshape(-1, *grad.shape[-3:])  # [C, H, W] is one image
        padded = (len(grad), geometry.in_channels, height + top + bottom, width + left + right)
        wide = conv2d_input(padded, weight, grad, geometry.stride, 0, geometry.dilation)
        return wide[..., top : top + height, left : left + width].reshape(ctx.x_shape), None, None, None, None


class SparseConv2d(SparseLayer, CompressedConv2d):
    """``act(conv2d(x, W) + b)`` with a sparse float32 weight. The result is contiguous.

    Zeros are not multiplied: NaN or Inf in x shows in those outputs that have a weight for it.
    """

    def __init__(
        self, weight: Weight, geometry: Conv2dGeometry, bias: Tensor | None = None, activation: str = "none"
    ) -> None:
        super().__init__(weight, geometry, bias, activation)
        if self.bits != 32:
            raise ValueError("SparseConv2d: the weight is int8, expected float32: int8 has no sparse convolution yet")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Conv2d gives it
        if input.requires_grad and torch.is_grad_enabled():
            y: Tensor = _InputGradient.apply(input, self.packed, self.bias, self.n, self.geometry)
            return DIFFERENTIABLE[self.activation](y)
        own = self._buffers
        return _conv2d(input, own["packed"], self.n, own["bias"], self.geometry, self.activation)  # type: ignore[arg-type]
