"""The low-rank op: two products with a thin matrix between them, and what the residual adds (``csrc/low_rank/gemm.h``).

float32 factors are summed as chains of fused multiply-adds, int8 factors are two linears of the int8 op.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pycompress.reference import int8
from pycompress.reference.chain import product
from pycompress.reference.compiled import jit

Array = NDArray[Any]


@jit
def add(a: Array, b: Array) -> Array:
    """a + b in float32, without NumPy's warnings where infinities meet."""
    return a + b


def intermediate(x: Array, down: Array, scale: Array, *, activation_bits: int = 0) -> Array:
    """t = x down^T, float32 [m, r]: what ``up`` meets.

    Args:
        x: float32 [m, k].
        down: float32 [r, k], or int8 with scale float32 [r] and activation_bits 7 or 8.
    """
    if down.dtype == np.int8:
        return int8.linear(x, down, scale, activation_bits=activation_bits)
    return product(x, down, np.zeros((len(x), len(down)), np.float32))


def expand(t: Array, up: Array, scale: Array, bias: Array | None = None, *, activation_bits: int = 0) -> Array:
    """bias + t up^T, float32 [m, n]; int8 factors quantize each row of t again, and add the bias at the end.

    Args:
        t: float32 [m, r].
        up: float32 [n, r], or int8 with scale float32 [n] and activation_bits 7 or 8.
        bias: float32 [n] or None.
    """
    if up.dtype == np.int8:
        return int8.linear(t, up, scale, bias, activation_bits=activation_bits)
    start = np.zeros(len(up), np.float32) if bias is None else bias
    return product(t, up, np.broadcast_to(start, (len(t), len(up))))
