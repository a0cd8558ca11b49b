"""The int4 op: the formulas of ``csrc/int4/gemm.h``, float32 step by float32 step.

Here a weight is values uint8 [n, k] of integers 0 to 15, and for each channel and group of k a scale float32 [n, groups] and a
zero point uint8 [n, groups].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pycompress.reference import int8, weight_only
from pycompress.reference.activation import finish
from pycompress.reference.chain import product
from pycompress.reference.compiled import jit

Array = NDArray[Any]

SYMMETRIC_ZERO_POINT = 8


def unpack_nibbles(packed: Array, k: int) -> Array:
    """uint8 [n, ceil(k / 2)], two integers a byte, the earlier one in the low half -> uint8 [n, k]."""
    halves = np.stack([packed & 15, packed >> 4], axis=2)
    return halves.reshape(len(packed), -1)[:, :k]


def zero_points(packed: Array | None, n: int, groups: int) -> Array:
    """uint8 [n, groups] of packed ones, or of None: those of a symmetric weight."""
    if packed is None:
        return np.full((n, groups), SYMMETRIC_ZERO_POINT, np.uint8)
    return unpack_nibbles(packed, groups)


def decompress(values: Array, scale: Array, zero_point: Array, group: int) -> Array:
    """(value - zero point) * scale, which float32 holds exactly: float32 [n, k]."""

    def spread(of_groups: Array) -> Array:
        return np.repeat(of_groups.astype(np.float32), group, axis=1)[:, : values.shape[1]]

    weight: Array = (values.astype(np.float32) - spread(zero_point)) * spread(scale)
    return weight


@jit
def dots(q: Array, values: Array, zero_point: Array, group: int) -> Array:
    """dot[m, g] = the sum of q[m, k] * (value[k] - zero_point[g]) over the positions k of group g: exact, in float32 too.

    Args:
        q: uint8 [m, k].
        values, zero_point: uint8 [k] and [groups], those of one channel.
    """
    m, k = q.shape
    dot = np.empty((m, len(zero_point)), np.float32)
    for i in range(m):
        for g in range(len(zero_point)):
            total = np.int64(0)
            for p in range(g * group, min(k, (g + 1) * group)):
                total += np.int64(q[i, p]) * (np.int64(values[p]) - np.int64(zero_point[g]))
            dot[i, g] = total
    return dot


def accumulate(q: Array, values: Array, scale: Array, zero_point: Array, group: int) -> Array:
    """v[m, n] = fma(dot[m, n, g], scale[n, g], v) over the groups in ascending order: q uint8 [m, k] -> float32 [m, n]."""
    m, n = len(q), len(values)
    v = np.empty((m, n), np.float32)
    for j in range(n):
        dot = dots(q, values[j], zero_point[j], group)
        v[:, j : j + 1] = product(dot, scale[j : j + 1], np.zeros((m, 1), np.float32))
    return v


def linear(
    x: Array, values: Array, scale: Array, zero_point: Array, group: int, bias: Array | None = None, *,
    activation_bits: int = 8, code: int = 0,
) -> Array:  # fmt: skip
    """The whole op: x float32 [m, k], a weight as above, bias float32 [n] or None -> float32 [m, n]."""
    if activation_bits == 16:
        return weight_only.linear(x, decompress(values, scale, zero_point, group), bias, code=code)
    q, row_scale, row_zero = int8.quantize(x, 255)
    v = accumulate(q, values, scale, zero_point, group)
    offset = accumulate(np.ones((1, values.shape[1]), np.uint8), values, scale, zero_point, group)[0]
    u = product(-row_zero[:, None].astype(np.float32), offset[:, None], v)  # fma(-zero point, offset, v)
    with np.errstate(over="ignore", invalid="ignore"):
        u = u * row_scale[:, None]
    y: Array = finish(u, np.empty(0, np.float32) if bias is None else bias, code)
    return y
