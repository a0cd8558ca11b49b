"""The weight-only op: compressed weights, activations that stay floating point (``csrc/weight_only``).

The kernels may sum in another order; here it is the ascending one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pycompress.reference.activation import finish
from pycompress.reference.chain import product

Array = NDArray[Any]


def linear(x: Array, weight: Array, bias: Array | None = None, *, scale: Array | None = None, code: int = 0) -> Array:
    """The whole op: act(scale * (x weight^T) + bias), float32 [m, n].

    Args:
        x: float32 [m, k].
        weight: float32 [n, k]: of int4 as decompressed, of int8 the integers.
        bias: float32 [n] or None.
        scale: float32 [n], one per output channel, or None where it is in the weight.
        code: of the activation.
    """
    v = product(x, weight, np.zeros((len(x), len(weight)), np.float32))
    if scale is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            v = v * scale
    y: Array = finish(v, np.empty(0, np.float32) if bias is None else bias, code)
    return y
