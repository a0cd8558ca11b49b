"""``CompressedLinear``: what all compressed linear layers have in common, which is everything but the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pycompress import ops
from pycompress.kinds import LINEAR
from pycompress.nn.layer import CompressedLayer
from pycompress.weights import Weight

if TYPE_CHECKING:
    from typing_extensions import Self


class _InputGradient(torch.autograd.Function):
    """Straight-through gradient for the input; the weight is fixed (Bengio et al. 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, form: str, bias: Tensor | None, op: ops.Op) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.form, ctx.op = form, op
        return op.linear(x.detach(), packed, form, bias, "none")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (packed,) = grads, ctx.saved_tensors
        return grad @ ctx.op.dense(packed, ctx.form).to(grad.dtype), None, None, None, None


class CompressedLinear(CompressedLayer):
    """``act(x W^T + b)`` with a compressed weight, made by :meth:`from_dense` or :meth:`from_weight`.

    Shapes:
        x [..., in_features] in float32, bfloat16 or float16 -> [..., out_features] in the same dtype.
    """

    kind = LINEAR
    op: ClassVar[ops.Op]

    @classmethod
    def from_weight(cls, weight: Weight, bias: Tensor | None = None, activation: str = "none") -> Self:
        """From a canonical weight; bias float [n] or None."""
        return cls(weight, bias, activation)

    in_features = property(lambda self: self.k)
    out_features = property(lambda self: self.n)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        if input.requires_grad and torch.is_grad_enabled():
            return self._forward_with_gradient(input)
        own = self._buffers  # read directly: nn.Module.__getattr__ costs 0.4 us a name
        return self.op.linear(input, own["packed"], self.form, own["bias"], self.activation)

    def _forward_with_gradient(self, x: Tensor) -> Tensor:
        y: Tensor = _InputGradient.apply(x, self.packed, self.form, self.bias, self.op)
        return ops.DIFFERENTIABLE[self.activation](y)
