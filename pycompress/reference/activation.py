"""What follows the sums in every op: bias and activation. The activations are the exact functions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pycompress.reference.compiled import jit

Array = NDArray[Any]


@jit
def activate(code: int, v: float) -> float:
    """The activation of :data:`pycompress.ops.ACTIVATIONS` with this code, in float64, but what all round alike."""
    if code == 1:
        return v if not v < 0 else 0.0
    if code == 2:
        return 0.5 * v * math.erfc(-v / math.sqrt(2.0))
    if code == 3:
        return 0.5 * v * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (v + 0.044715 * v * v * v)))
    if code == 4:
        return v * (1.0 / (1.0 + math.exp(-v)) if v > -700 else 0.0)  # NaN of NaN and of -Inf, as the kernels have it
    if code == 5:
        return v * (1.0 / (1.0 + math.exp(-1.702 * v)) if v > -400 else 0.0)
    if code == 6:
        return 0.0 if v < 0 else 6.0 if v > 6 else v
    if code == 7:  # step by step, as the kernels have it
        shifted = min(max(float(np.float32(v + 3.0)), 0.0), 6.0)
        return float(np.float32(np.float32(v * shifted) / np.float32(6.0)))
    return v


@jit
def finish(v: Array, bias: Array, code: int) -> Array:
    """y = act(v + bias) in float32: v [m, n], bias [n], empty where there is none."""
    m, n = v.shape
    y = np.empty((m, n), np.float32)
    for i in range(m):
        for j in range(n):
            u = np.float32(v[i, j] + bias[j]) if bias.size else v[i, j]
            y[i, j] = u if code == 0 else np.float32(activate(code, float(u)))
    return y
