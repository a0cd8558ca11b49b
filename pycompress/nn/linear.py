"""``CompressedLinear``: what all compressed linear layers have in common, which is everything but the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pycompress.methods.weight import Weight
from pycompress.nn.dense import dense_bias, is_linear
from pycompress.nn.layer import DIFFERENTIABLE, CompressedLayer

if TYPE_CHECKING:
    from typing_extensions import Self


class _InputGradient(torch.autograd.Function):
    """Straight-through gradient for the input; the weight is fixed (Bengio et al. 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None, kind: type[CompressedLinear], n: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(packed, scale)
        ctx.kind, ctx.shape = kind, (n, x.shape[-1])
        return kind._product(x.detach(), packed, n, scale, bias, "none")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (packed, scale) = grads, ctx.saved_tensors
        weight = ctx.kind._dense(packed, ctx.shape, scale)
        return grad @ weight.to(grad.dtype), None, None, None, None, None


class CompressedLinear(CompressedLayer):
    """``act(x W^T + b)`` with a compressed weight, made by :meth:`from_dense` or :meth:`from_weight`.

    Shapes:
        x [..., in_features] in float32, bfloat16 or float16 -> [..., out_features] in the same dtype.
    """

    dense_kind = "Linear"

    @classmethod
    def from_weight(cls, weight: Weight, bias: Tensor | None = None, activation: str = "none") -> Self:
        """From a canonical weight; bias float [n] or None."""
        return cls(weight, bias, activation)

    @classmethod
    def replacing(cls, dense: nn.Module, weight: Weight, activation: str = "none") -> Self:
        if not is_linear(dense):
            raise TypeError(f"{cls.__name__}: the dense layer is {type(dense).__name__}, expected Linear")
        return cls(weight, dense_bias(dense), activation)

    @property
    def in_features(self) -> int:
        return self.k

    @property
    def out_features(self) -> int:
        return self.n

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return self.n, self.k

    # --- what a subclass has of its own ---------------------------------------------------------------------------

    @staticmethod
    def _product(
        x: Tensor, packed: Tensor, n: int, scale: Tensor | None, bias: Tensor | None, activation: str
    ) -> Tensor:
        """The op: x [..., k] -> [..., n]."""
        raise NotImplementedError

    # --- forward --------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        if input.requires_grad and torch.is_grad_enabled():
            return self._forward_with_gradient(input)
        own = self._buffers  # read directly: nn.Module.__getattr__ costs 0.4 us a name
        return self._product(
            input, own["packed"], self.n, own["weight_scale"], own["bias"], self.activation  # type: ignore[arg-type]
        )  # fmt: skip

    def _forward_with_gradient(self, x: Tensor) -> Tensor:
        y: Tensor = _InputGradient.apply(x, self.packed, self.weight_scale, self.bias, type(self), self.n)
        return DIFFERENTIABLE[self.activation](y)

    def _with_weight(self, weight: Weight, bias: Tensor | None) -> Self:
        return type(self).from_weight(weight, bias, self.activation)

    def _sizes(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
