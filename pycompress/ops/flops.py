"""What ``torch.utils.flop_counter.FlopCounterMode`` counts of our ops: as of torch's own, two operations for each multiply-add of a
product, of whatever type its numbers are, and nothing for what goes from element to element. Unregistered ops count as 0.

Counted is what is multiplied: of a sparse weight its non-zeros, of a low-rank one its factors and what stands beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from pycompress.ops.form import Form, parse

Shape = Sequence[int]


def multiply_adds(form: Form) -> int:
    """Of one row of x with a packed weight of this form."""
    if "rank" in form.keys:
        beside = 0 if form.residual is None else multiply_adds(form.residual)
        return int(form.rank) * (form.n + form.k) + beside
    return int(form.keys.get("nnz", form.n * form.k))


def counted(op: str, count: Callable[..., int]) -> None:
    """Registers an op of ours: ``count(*operands, out_shape)``, multiply-adds, with the shapes of tensors in their places."""

    def flops(*operands: Any, out_shape: Any, **_: Any) -> int:
        return 2 * count(*operands, out_shape=out_shape)

    register_flop_formula(getattr(torch.ops.pycompress, op))(flops)


def of_rows(x: Shape, _packed: Shape, form: str, *_: Any, out_shape: Shape) -> int:  # noqa: ARG001
    """Of ``<weight>_linear``: x [..., k]."""
    return math.prod(x[:-1]) * multiply_adds(parse(form))


def of_positions(_x: Shape, _packed: Shape, form: str, *_: Any, out_shape: Shape) -> int:
    """Of a convolution, whose form has a row for each output channel: the result is [..., n, height, width]."""
    parsed = parse(form)
    return math.prod(out_shape) // parsed.n * multiply_adds(parsed)
