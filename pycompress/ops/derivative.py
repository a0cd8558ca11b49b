"""Derivatives of the ops: of what a packed weight says, straight through what is quantized (Bengio et al. 2013, arXiv:1308.3432).

They stand where torch keeps those of its own operators, at the dispatcher's Autograd keys, and are made of differentiable
operators: so reverse and forward mode, what ``torch.func`` makes of them, and compiled and exported graphs all find them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function as one_level
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from pycompress.ops.activation import DIFFERENTIABLE
from pycompress.ops.checks import activation_code


def wanted(*operands: Any) -> bool:
    """Whether a derivative with respect to one of the operands may be asked for."""
    return forward_ad._current_level >= 0 or (torch.is_grad_enabled() and any(map(_requires_grad, operands)))


def _requires_grad(operand: Any) -> bool:
    if isinstance(operand, (list, tuple)):
        return any(map(_requires_grad, operand))
    return isinstance(operand, Tensor) and operand.requires_grad


def below(op: Any, keys: Any, *operands: Any) -> Any:
    """The op as the next lower layer of the dispatcher has it, called from a function that stands at an Autograd key."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *operands)


@dataclass(frozen=True)
class Product:
    """A product with a dense weight W, linear in x, in torch's own operators.

    Attributes:
        along: ``(dx, W, *walk) -> dy``, without the bias; ``walk`` is what the op takes between bias and activation.
        back: ``(dy, W, shape of x, *walk) -> dx``, its transpose.
        channels: the dimension of y to which the bias is added.
    """

    along: Callable[..., Tensor]
    back: Callable[..., Tensor]
    channels: int = -1

    def differentiable(self, dense: Callable[[Tensor, str], Tensor]) -> Callable[..., Tensor]:
        """What :func:`implement` takes as such, for the op of a product with a packed weight that ``dense`` decompresses."""

        def run(op: Any, keys: Any, *operands: Any) -> Tensor:
            *sums, activation = operands
            activation_code(op.name().partition("::")[2], activation)
            with one_level():
                y: Tensor = _StraightThrough.apply(self, op, dense, keys, *sums)  # type: ignore[attr-defined]
            return DIFFERENTIABLE[activation](y)

        return run


ROWS = Product(lambda dx, weight: dx @ weight.T, lambda dy, weight, _shape: dy @ weight)


class _StraightThrough(_SingleLevelFunction):
    """One level of ``torch.func``'s: the dispatcher, which calls it, has taken care of the others."""

    @staticmethod
    def forward(_product: Product, op: Any, _dense: Any, keys: Any, *operands: Any) -> Any:
        # Lower levels want derivatives too; torch has turned them off here.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return below(op, keys, *operands, "none")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.product, _, ctx.dense, _, x, packed, ctx.form, bias, *ctx.walk = inputs
        ctx.save_for_backward(packed)
        ctx.save_for_forward(packed)
        ctx.shape, ctx.y_shape, ctx.dtype = x.shape, output.shape, output.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def weight(ctx: Any) -> Tensor:
        """Of the dtype in which torch would multiply with it."""
        (packed,) = ctx.saved_tensors
        return ctx.dense(packed, ctx.form).to(ctx.dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), product = grads, ctx.product
        dx = dbias = None
        if ctx.needs_input_grad[4]:
            dx = product.back(dy, _StraightThrough.weight(ctx), ctx.shape, *ctx.walk)
        if ctx.needs_input_grad[7]:
            rows = dy.movedim(product.channels, -1).reshape(-1, dy.shape[product.channels])
            dbias = rows.sum(0, dtype=ctx.bias_dtype)
        return (None, None, None, None, dx, None, None, dbias, *(None for _ in ctx.walk))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        dx, dbias, product = tangents[4], tangents[7], ctx.product
        dy = None if dx is None else product.along(dx, _StraightThrough.weight(ctx), *ctx.walk)
        if dbias is not None:
            dbias = dbias.to(ctx.dtype).reshape(-1, *(1,) * (-1 - product.channels))
            dy = dbias.expand(ctx.y_shape) if dy is None else dy + dbias
        return dy
