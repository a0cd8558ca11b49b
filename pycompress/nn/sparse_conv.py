"""``SparseConv2d``: an ``nn.Conv2d`` of whose weight only the non-zero part is kept and multiplied, in the sparse kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from pycompress import ops
from pycompress.kinds import Conv2dGeometry
from pycompress.nn.conv import CompressedConv2d
from pycompress.nn.sparse import SparseLayer


def _conv2d(
    x: Tensor, packed: Tensor, form: str, bias: Tensor | None, geometry: Conv2dGeometry, activation: str
) -> Tensor:
    return ops.sparse_conv2d(
        x, packed, form, bias, geometry.kernel_size, geometry.stride, geometry.sides, geometry.dilation, activation
    )


class _InputGradient(torch.autograd.Function):
    """Straight-through gradient for the input; the weight is fixed (Bengio et al. 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, form: str, bias: Tensor | None, geometry: Conv2dGeometry,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(packed)
        ctx.form, ctx.geometry, ctx.x_shape = form, geometry, x.shape
        return _conv2d(x.detach(), packed, form, bias, geometry, "none")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (packed,), geometry = grads, ctx.saved_tensors, ctx.geometry
        weight = ops.dense("sparse", packed, ctx.form).to(grad.dtype)
        weight = weight.view(-1, geometry.in_channels, *geometry.kernel_size)
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

    @classmethod
    def misfit(cls, geometry: Conv2dGeometry, settings: Mapping[str, Any] | None = None) -> str:
        if settings is not None and settings["bits"] != 32:
            return "the weight is int8, expected float32: int8 has no sparse convolution yet"
        return super().misfit(geometry)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Conv2d gives it
        if input.requires_grad and torch.is_grad_enabled():
            y: Tensor = _InputGradient.apply(input, self.packed, self.form, self.bias, self.geometry)
            return ops.DIFFERENTIABLE[self.activation](y)
        own = self._buffers
        return _conv2d(input, own["packed"], self.form, own["bias"], self.geometry, self.activation)  # type: ignore[arg-type]
