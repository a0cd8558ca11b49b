"""The mean of a sentence's tokens, and its direction."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pycompress.ops import cpu
from pycompress.ops.checks import check_float, nobody_looks
from pycompress.ops.registry import Doors, implement
from pycompress.reference import pool as twin


def _check(x: Tensor, mask: Tensor | None, normalize: bool) -> None:  # noqa: ARG001
    check_float("pool", x)
    if x.dim() != 3:
        raise ValueError(f"pool: x is {list(x.shape)}, expected [batch, length, d]")
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(f"pool: mask is {list(mask.shape)}, expected {list(x.shape[:2])} as x is {list(x.shape)}")


def _differentiable(_op: Any, _keys: Any, x: Tensor, mask: Tensor | None, normalize: bool) -> Tensor:
    _check(x, mask, normalize)
    return twin.pool(x, mask, normalize)


_op: Any = implement(
    "pool",
    "(Tensor x, Tensor? mask, bool normalize) -> Tensor",
    Doors("pool", cpu.pool, twin),
    "pool",
    lambda x, _mask, _normalize: x.new_empty((x.shape[0], x.shape[2])),
    _differentiable,
    vmapped=lambda *_: _no_vmap(),
    check=_check,
    cast=lambda _dtype, *operands: _op(*operands),
)


def _no_vmap() -> Tensor:
    raise NotImplementedError("pool: vmap, expected a batch in x")


def pool(x: Tensor, mask: Tensor | None = None, normalize: bool = False) -> Tensor:
    """``(sum_l x mask) / max(sum_l mask, 1e-9)`` and, to ``normalize``, that divided by its length or by 1e-12, the larger.

    Everything is summed in float32, over l in ascending order, and rounded once; the bits are the same for every number of
    threads. What the mask leaves out is multiplied by 0: NaN and Inf there come out.

    Args:
        x: float32, bfloat16 or float16, [batch, length, d], any strides.
        mask: [batch, length], of any dtype and strides; None: all ones.
    Returns:
        [batch, d], dense, of x's dtype.
    Raises:
        TypeError: x has another dtype. ValueError: the shapes do not fit.
    """
    if (
        nobody_looks(x)
        and x.is_cpu
        and (mask is None or (type(mask) is Tensor and not (mask.requires_grad or mask.is_neg())))
    ):
        _check(x, mask, normalize)
        return cpu.pool.pool(x, mask, normalize)
    y: Tensor = _op(x, mask, normalize)
    return y
