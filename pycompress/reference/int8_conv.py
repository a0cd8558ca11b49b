"""The int8 convolution: the formulas of ``csrc/conv/conv.h``. An image is one long row to the quantizer of the int8 op."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pycompress.reference import int8, sparse
from pycompress.reference.activation import finish

Array = NDArray[Any]
Pair = tuple[int, int]


def quantize(x: Array, activation_bits: int, input_range: tuple[float, int] | None) -> tuple[Array, Array, Array]:
    """x float32 [images, channels, height, width] -> q uint8 of its shape, scale float32 [images], zero point int32 [images].
    ``input_range``: scale and zero point of a static weight's input."""
    rows = np.ascontiguousarray(x).reshape(len(x), math.prod(x.shape[1:]))
    q, scale, zero_point = int8.quantized(rows, activation_bits, input_range)
    return q.reshape(x.shape), scale, zero_point


def accumulate(
    q: Array, zero_point: Array, w: Array, kernel: Pair, stride: Pair, before: Pair, dilation: Pair, out: Pair, groups: int = 1
) -> Array:  # fmt: skip
    """The sums: (q - zero point) convolved with w, zeros around.

    Args:
        q, zero_point: of :func:`quantize`.
        w: int8 [n, channels / groups * kernel height * kernel width].
        before: rows and columns of zeros at the top and at the left; those behind follow from ``out``.
        out: height and width of the output.
    Returns:
        int32 [images, n, *out].
    """
    images, channels, *_ = q.shape
    acc = np.empty((images, len(w), *out), np.int32)
    centered = q.astype(np.float32) - zero_point.astype(np.float32)[:, None, None, None]
    own, made = channels // groups, len(w) // groups
    none = np.zeros(out[0] * out[1], np.int32)
    for i in range(images):
        for g in range(groups):
            part = np.ascontiguousarray(centered[i, g * own : (g + 1) * own])
            rows = sparse.patches(part, kernel, stride, before, dilation, out).astype(np.int32)
            weights = np.ascontiguousarray(w[g * made : (g + 1) * made])
            acc[i, g * made : (g + 1) * made] = int8.accumulate(rows, none, weights).T.reshape(made, *out)
    return acc


def rescale(
    acc: Array, scale: Array, weight_scale: Array, bias: Array | None = None, *, addend: Array | None = None, code: int = 0
) -> Array:  # fmt: skip
    """act((acc * scale) * weight_scale + bias + addend) in float32, in this order: int32 [images, n, ...] -> float32 of its shape.
    ``addend``: float32 of that shape."""
    images, n = acc.shape[:2]
    rows = np.moveaxis(acc, 1, -1).reshape(-1, n)
    per_row = np.repeat(scale, len(rows) // max(images, 1))
    v = int8.rescale(np.ascontiguousarray(rows), per_row, weight_scale)
    none = np.empty(0, np.float32)
    y = finish(v, none if bias is None else bias, code if addend is None else 0)
    if addend is not None:
        y = finish(y + np.moveaxis(addend, 1, -1).reshape(-1, n), none, code)
    result: Array = np.ascontiguousarray(np.moveaxis(y.reshape(images, *acc.shape[2:], n), -1, 1))
    return result


def requantize(y: Array, scale: float, zero_point: int, amax: int) -> Array:
    """What a static layer's range makes of y float32: uint8 of its shape; of NaN 0."""
    steps = np.rint(np.nan_to_num(y, nan=-np.inf) * (np.float32(1) / np.float32(scale)))
    result: Array = (np.clip(steps, -zero_point, amax - zero_point) + zero_point).astype(np.uint8)
    return result
