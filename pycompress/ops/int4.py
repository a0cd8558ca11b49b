"""The ops of int4 weights."""

from __future__ import annotations

from torch import Tensor

from pycompress.ops import cpu
from pycompress.ops.registry import define

OP = define("int4", cpu.int4, "pycompress.ops.cuda.int4")


def int4_linear(x: Tensor, packed: Tensor, form: str, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """``act(x W^T + bias)`` with 4-bit weights, a scale and a zero point for each channel and group of k.

    Packed for 8 bits, activations are quantized per row inside the op, exactly as :func:`int8_linear` quantizes them; the
    formula and its rounding are in ``csrc/int4/gemm.h``: exact integers inside a group, float32 steps in a fixed order, so the
    result has the same bits for every thread count and every kernel.
    Packed for 16 bits, activations stay floating point, and each result is within ``gamma(k + 4) sum_k |x w| + eps (|y| + |bias|)``
    of the exact one before the activation, gamma(q) = q u / (1 - q u) with u = 2^-24, the same bits for every thread count.

    Args:
        x: float32, bfloat16 or float16, [..., k], any strides; converted to float32 exactly, the result is rounded once. A row
            with NaN or Inf: 8 bits give a row of NaN, 16 bits NaN or Inf where a weight meets it, zeros included.
        packed, form: from :func:`pycompress.ops.pack`.
        bias: float32 [n] or None.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh``, ``silu``, ``quick_gelu``, ``relu6`` or ``hardswish``.
    Returns:
        [..., n], dense, of x's dtype.
    Raises:
        TypeError: x has another dtype. ValueError: sizes or dtypes do not fit. RuntimeError: the tensors are not all on the CPU
        or on one CUDA device, or the kernels cannot run there.
    """
    return OP.linear(x, packed, form, bias, activation)
