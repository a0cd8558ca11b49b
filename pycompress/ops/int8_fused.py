"""``int8_linear`` with what stands in front of it: a norm or a gated activation.

On a CUDA device they are computed in the quantizer, on the way from memory: x is read once, and what the layer multiplies is never
written in between. Elsewhere torch computes them first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pycompress.ops import cuda, int8
from pycompress.ops.native import EXACT_STRIDES, check, check_float, implement, library

NORMS = ("rms_norm", "layer_norm")
# The codes are those of `Before` in csrc/int8/cuda.h.
BEFORE = {"rms_norm": 1, "layer_norm": 2, "silu_gate": 3, "gelu_gate": 4, "gelu_tanh_gate": 5}

library.define(
    "int8_fused_linear(Tensor x, str before, Tensor? weight, Tensor? shift, float eps, Tensor? gate, Tensor packed, "
    "Tensor scale, Tensor? bias, str activation) -> Tensor",
    tags=EXACT_STRIDES,
)


def _check(x: Tensor, before: str, weight: Tensor | None, shift: Tensor | None, gate: Tensor | None) -> None:
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


def _applied(
    x: Tensor, before: str, weight: Tensor | None, shift: Tensor | None, eps: float, gate: Tensor | None
) -> Tensor:
    """What the layer is given, computed in float32 and rounded to x's dtype."""
    if gate is not None:
        act = nn.functional.silu(gate.float()) if before == "silu_gate" else nn.functional.gelu(
            gate.float(), approximate="tanh" if before == "gelu_tanh_gate" else "none"
        )  # fmt: skip
        return (act.to(x.dtype).float() * x.float()).to(x.dtype)
    scale = None if weight is None else weight.float()
    if before == "rms_norm":
        return nn.functional.rms_norm(x.float(), x.shape[-1:], scale, eps).to(x.dtype)
    offset = None if shift is None else shift.float()
    return nn.functional.layer_norm(x.float(), x.shape[-1:], scale, offset, eps).to(x.dtype)


def _cpu(
    x: Tensor, before: str, weight: Tensor | None, shift: Tensor | None, eps: float, gate: Tensor | None, packed: Tensor,
    scale: Tensor, bias: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    _check(x, before, weight, shift, gate)
    return int8._int8_linear_cpu(_applied(x, before, weight, shift, eps, gate), packed, scale, bias, activation)


def _cuda(
    x: Tensor, before: str, weight: Tensor | None, shift: Tensor | None, eps: float, gate: Tensor | None, packed: Tensor,
    scale: Tensor, bias: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    _check(x, before, weight, shift, gate)
    cuda.check_devices("int8_fused_linear", x, weight, shift, gate)
    front = cuda.Before(BEFORE[before], weight, shift, eps, gate)
    return cuda.int8_linear(x, packed, scale, bias, activation, before=front)


def _fake(
    x: Tensor, before: str, weight: Tensor | None, shift: Tensor | None, eps: float, gate: Tensor | None, packed: Tensor,  # noqa: ARG001
    scale: Tensor, bias: Tensor | None, activation: str,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    _check(x, before, weight, shift, gate)
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def _vmapped(*operands: Any) -> Tensor:
    y: Tensor = _op(*operands)
    return y


_op = implement("int8_fused_linear", _cpu, _fake, _vmapped, _cuda)


def int8_fused_linear(
    x: Tensor, before: str, packed: Tensor, scale: Tensor, bias: Tensor | None = None, activation: str = "none", *,
    weight: Tensor | None = None, shift: Tensor | None = None, eps: float = 1e-5, gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`pycompress.ops.int8_linear` of ``before(x)``, which is computed in float32 and rounded to x's dtype.

    Args:
        x: float32, bfloat16 or float16, [..., k].
        before: ``rms_norm`` (x / sqrt(mean(x^2) + eps) * weight), ``layer_norm`` (the same of x - mean(x), plus shift),
            ``silu_gate``, ``gelu_gate`` or ``gelu_tanh_gate`` (act(gate) x).
        packed, scale, bias, activation: as for ``int8_linear``.
        weight, shift: of the norm, of x's dtype, [k] or None.
        gate: of x's dtype and shape.
    Returns:
        [..., n], dense, of x's dtype.
    Raises:
        TypeError, ValueError, RuntimeError: as ``int8_linear``, and where what stands in front does not fit together.
    """
    y: Tensor = torch.ops.pycompress.int8_fused_linear.default(
        x, before, weight, shift, eps, gate, packed, scale, bias, activation
    )
    return y
