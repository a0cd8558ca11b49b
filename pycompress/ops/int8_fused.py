"""``int8_linear`` with what stands in front of it: a norm or a gated activation.

On a CUDA device they are computed in the quantizer, on the way from memory: x is read once, and what the layer multiplies is never
written in between. Elsewhere torch computes them first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycompress.ops import cpu, int8
from pycompress.ops.checks import check, check_float
from pycompress.ops.flops import counted, of_rows
from pycompress.ops.form import parse
from pycompress.ops.registry import implement

NORMS = ("rms_norm", "layer_norm")
BEFORE = (*NORMS, "silu_gate", "gelu_gate", "gelu_tanh_gate")


def _check(
    x: Tensor, before: str, weight: Tensor | None, shift: Tensor | None, eps: float, gate: Tensor | None, *_: Any  # noqa: ARG001
) -> None:  # fmt: skip
    op = "int8_fused_linear"
    check(before in BEFORE, f"{op}: before is {before!r}, expected one of {', '.join(BEFORE)}")
    check_float(op, x)
    check(x.dim() > 0, f"{op}: x is a scalar, expected [..., k]")
    given = {
        "weight": (weight, x.shape[-1:], before in NORMS),
        "shift": (shift, x.shape[-1:], before == "layer_norm"),
        "gate": (gate, x.shape, before not in NORMS),
    }
    for name, (tensor, shape, wanted) in given.items():
        check(tensor is None or wanted, f"{op}: {before} takes no {name}")
        check(
            tensor is None or (tensor.dtype == x.dtype and tensor.shape == shape),
            f"{op}: {name} is {None if tensor is None else (tensor.dtype, list(tensor.shape))}, "
            f"expected {x.dtype} {list(shape)}",
        )
    check(before in NORMS or gate is not None, f"{op}: {before} needs a gate")


def _apart(x: Tensor, *operands: Any, dtype: torch.dtype | None = None) -> Tensor:
    """What stands in front in torch's own operators, and then the layer."""
    before = cpu.int8.before_layer(x, *operands[:5])
    y: Tensor = torch.ops.pycompress.int8_linear.default(before.to(dtype or x.dtype), *operands[5:])
    return y


def _fake(x: Tensor, *operands: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], parse(operands[6]).n))


_op = implement(
    "int8_fused_linear",
    "(Tensor x, str before, Tensor? weight, Tensor? shift, float eps, Tensor? gate, Tensor packed, str form, Tensor? bias, "
    "str activation) -> Tensor",
    int8.OP.doors,
    "fused_linear",
    _fake,
    lambda _op, _keys, *operands: _apart(*operands),
    check=_check,
    cast=lambda dtype, *operands: _apart(*operands, dtype=dtype),
)
counted("int8_fused_linear", lambda x, *operands, out_shape: of_rows(x, *operands[5:], out_shape=out_shape))


def int8_fused_linear(
    x: Tensor, before: str, packed: Tensor, form: str, bias: Tensor | None = None, activation: str = "none", *,
    weight: Tensor | None = None, shift: Tensor | None = None, eps: float = 1e-5, gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`pycompress.ops.int8_linear` of ``before(x)``, which is computed in float32 and rounded to x's dtype.

    Args:
        x: float32, bfloat16 or float16, [..., k].
        before: ``rms_norm`` (x / sqrt(mean(x^2) + eps) * weight), ``layer_norm`` (the same of x - mean(x), plus shift),
            ``silu_gate``, ``gelu_gate`` or ``gelu_tanh_gate`` (act(gate) x).
        packed, form, bias, activation: as for ``int8_linear``.
        weight, shift: of the norm, of x's dtype, [k] or None.
        gate: of x's dtype and shape.
    Returns:
        [..., n], dense, of x's dtype.
    Raises:
        TypeError, ValueError, RuntimeError: as ``int8_linear``, and where what stands in front does not fit together.
    """
    y: Tensor = _op(x, before, weight, shift, eps, gate, packed, form, bias, activation)
    return y
