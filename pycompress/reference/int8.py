"""The int8 op: the formulas of ``csrc/int8/gemm.h``, float32 step by float32 step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pycompress.reference.activation import finish
from pycompress.reference.compiled import jit

Array = NDArray[Any]

_HALF = np.float32(0.5)
_ONE = np.float32(1)
_TINY = np.float32(2.0**-100)
_BEYOND = np.float32(1024)  # in units of the scale: far outside of every range


@jit
def quantize(x: Array, amax: int) -> tuple[Array, Array, Array]:
    """Per-row asymmetric quantization to unsigned integers.

    Args:
        x: float32 [m, k].
        amax: 127 or 255, the largest integer.
    Returns:
        q uint8 [m, k], scale float32 [m], zero point int32 [m]; q = 0 and scale NaN for a row with NaN or Inf.
    """
    m, k = x.shape
    q = np.zeros((m, k), np.uint8)
    scale = np.zeros(m, np.float32)
    zero_point = np.zeros(m, np.int32)
    half_max = _HALF * np.float32(amax)
    for i in range(m):
        low, high, finite = np.float32(0), np.float32(0), True
        for j in range(k):
            finite = finite and math.isfinite(x[i, j])
            low = min(low, x[i, j])
            high = max(high, x[i, j])
        if not finite:
            scale[i] = np.float32(np.nan)
            continue
        half = _HALF * high - _HALF * low
        if half < _TINY:
            continue
        scale[i] = half / half_max
        inverse = half_max / half
        zero = min(max(int(np.rint(-low * inverse)), 0), amax)
        zero_point[i] = zero
        for j in range(k):
            q[i, j] = min(max(int(np.rint(x[i, j] * inverse)) + zero, 0), amax)
    return q, scale, zero_point


@jit
def quantize_static(x: Array, amax: int, input_scale: Any, input_zero_point: int) -> tuple[Array, Array, Array]:
    """As :func:`quantize`, with a range that is given, the same for all rows: what lies outside of it gives its ends."""
    m, k = x.shape
    q = np.full((m, k), input_zero_point, np.uint8)
    scale = np.full(m, input_scale, np.float32)
    zero_point = np.full(m, input_zero_point, np.int32)
    inverse = _ONE / input_scale
    for i in range(m):
        if not np.isfinite(x[i]).all():
            scale[i] = np.float32(np.nan)
            continue
        for j in range(k):
            steps = min(max(x[i, j] * inverse, -_BEYOND), _BEYOND)
            q[i, j] = min(max(int(np.rint(steps)) + input_zero_point, 0), amax)
    return q, scale, zero_point


@jit
def accumulate(q: Array, zero_point: Array, w: Array) -> Array:
    """acc[m, n] = sum_k (q[m, k] - zero_point[m]) w[n, k]: q uint8 [m, k], zero_point int32 [m], w int8 [n, k] -> int32 [m, n]."""
    (m, k), n = q.shape, w.shape[0]
    acc = np.zeros((m, n), np.int32)
    for i in range(m):
        for j in range(n):
            total = np.int64(0)
            for p in range(k):
                total += (np.int64(q[i, p]) - np.int64(zero_point[i])) * np.int64(w[j, p])
            acc[i, j] = total
    return acc


@jit
def rescale(acc: Array, row_scale: Array, weight_scale: Array) -> Array:
    """acc * row_scale * weight_scale in float32, in this order: int32 [m, n], float32 [m] and [n] -> float32 [m, n]."""
    m, n = acc.shape
    v = np.empty((m, n), np.float32)
    for i in range(m):
        for j in range(n):
            v[i, j] = np.float32(np.float32(acc[i, j]) * row_scale[i]) * weight_scale[j]
    return v


def quantized(x: Array, activation_bits: int, input_range: tuple[float, int] | None) -> tuple[Array, Array, Array]:
    """By each row's own range, or the one that is given: scale and zero point."""
    amax = 2**activation_bits - 1
    if input_range is None:
        return quantize(x, amax)  # type: ignore[no-any-return]
    return quantize_static(x, amax, np.float32(input_range[0]), input_range[1])  # type: ignore[no-any-return]


def linear(
    x: Array, w: Array, weight_scale: Array, bias: Array | None = None, *, activation_bits: int = 8, code: int = 0,
    input_range: tuple[float, int] | None = None,
) -> Array:  # fmt: skip
    """The whole op: x float32 [m, k], w int8 [n, k], weight_scale float32 [n], bias float32 [n] or None -> float32 [m, n];
    ``input_range``: scale and zero point of a static weight's input."""
    q, row_scale, zero_point = quantized(x, activation_bits, input_range)
    v = rescale(accumulate(q, zero_point, w), row_scale, weight_scale)
    y: Array = finish(v, np.empty(0, np.float32) if bias is None else bias, code)
    return y
