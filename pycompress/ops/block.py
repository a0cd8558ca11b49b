"""A transformer block in one call: attention and MLP with their norms and residuals, of weights in any form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycompress.ops import cpu
from pycompress.ops.block_form import NORMS, PRODUCTS, BlockForm, parse_block
from pycompress.ops.checks import check_tensor, nobody_looks
from pycompress.ops.cpu.block import Tensors, check_block
from pycompress.ops.flops import Shape, counted, multiply_adds
from pycompress.ops.registry import Doors, implement

__all__ = ["NORMS", "PRODUCTS", "BlockForm", "block", "parse_block"]


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _uncast(_dtype: torch.dtype, *operands: Any) -> Tensor:
    return _op(*operands)  # type: ignore[no-any-return]


def _no_derivative(*_: Any) -> Tensor:
    raise RuntimeError(
        "block: a gradient is wanted, and there is none: expected the modules inside of the block to be called"
    )


def _no_vmap(*_: Any) -> Tensor:
    raise NotImplementedError("block: there is no vmap over it, expected the modules inside of the block to be called")


_op: Any = implement(
    "block",
    "(Tensor x, Tensor? mask, Tensor? bias, Tensor?[] tensors, str form) -> Tensor",
    Doors("block", cpu.block),
    "block",
    _fake,
    _no_derivative,
    vmapped=_no_vmap,
    check=check_block,
    cast=_uncast,
)


def _multiply_adds(x: Shape, _mask: Any, _bias: Any, _tensors: Any, form: str, out_shape: Shape) -> int:  # noqa: ARG001
    """Its products, and two for each pair of positions, seen or not, as torch counts attention."""
    batch, length, _ = x
    own = parse_block(form)
    pairs = 2 * batch * length * length * own.heads * own.head_size
    return batch * length * sum(multiply_adds(one) for *_, one in own.parsed()) + pairs


counted("block", _multiply_adds)
_threads, _run_of = torch.get_num_threads, cpu.block.run_of


def block(x: Tensor, mask: Tensor | None, bias: Tensor | None, tensors: Tensors, form: str) -> Tensor:
    """A whole block, in float32 inside; only x and the result are in x's dtype.

    ``attention(h) = output(softmax(scale q k^T + bias + mask) v)`` with q, k, v = ``query(h)``, ``key(h)``, ``value(h)``, cut into
    heads; ``mlp(h) = down(act(up(h)))`` or, where there is a gate, ``down(act(gate(h)) up(h))``. Norms stand behind the sums, or in
    front of both parts (``pre_norm``)::

        h = attention_norm(x + attention(x));       y = mlp_norm(h + mlp(h))
        h = x + attention(attention_norm(x));       y = h + mlp(mlp_norm(h))

    The integers of a product are those of its layer on the same input, and bits do not depend on the number of threads.

    Args:
        x: float32, bfloat16 or float16, [batch, length, d].
        mask: bool (True: the key is seen) or of a float dtype (added to the scores), broadcastable to [batch, heads, length,
            length], or None. A query that sees no key gets zeros from attention.
        bias: what is added to the scores besides, never bool, or None.
        tensors: weight and bias of each of :data:`PRODUCTS`, then weight and shift of each of :data:`NORMS`: 18, None where there
            is none. A weight is packed, or float32 [n, k] with dense rows; all else is a dense float32 vector.
        form: ``str`` of a :class:`BlockForm`.
    Returns:
        [batch, length, d], dense, of x's dtype.
    Raises:
        TypeError: x has another dtype. ValueError: what came does not fit the form. RuntimeError: a gradient is wanted, or the
        tensors are not on the CPU.
    """
    if nobody_looks(x) and x.is_cpu:
        return block_directly(x, mask, bias, tensors, form)
    check_tensor("block", x)
    return _op(x, mask, bias, list(tensors), form)  # type: ignore[no-any-return]


def block_directly(x: Tensor, mask: Tensor | None, bias: Tensor | None, tensors: Tensors, form: str) -> Tensor:
    """:func:`block` without torch's dispatcher, of an x on the CPU at which nobody looks."""
    run = _run_of(form)
    if run is not None and x.dim() == 3 and (bias is None or bias.dtype is not torch.bool):
        x = x.contiguous()
        y = torch.empty_like(x)
        if run(x, mask, bias, tensors, y, _threads()):
            return y
    check_block(x, mask, bias, tensors, form)
    return cpu.block.twin(x, mask, bias, tensors, form)
