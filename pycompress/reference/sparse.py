"""The sparse op: a bitmask and the values that it says are there. Zeros are not multiplied.

float32 weights are summed as a chain of fused multiply-adds in ascending k. int8 weights are those of the int8 op, with zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pycompress.reference.activation import finish
from pycompress.reference.chain import extend
from pycompress.reference.compiled import jit

Array = NDArray[Any]


@jit
def count(mask: Array) -> int:
    """Bits set in mask uint8 [n, bytes]."""
    total = 0
    for byte in mask.flat:
        for bit in range(8):
            total += byte >> bit & 1
    return total


def accumulate(x: Array, mask: Array, values: Array) -> Array:
    """The sums alone, float32 [m, n]: chains of ``fma``, starting at 0."""
    acc: Array = np.zeros((len(x), len(mask)), np.float32)
    extend(acc, x, mask, values)
    return acc


def linear(x: Array, mask: Array, values: Array, bias: Array | None = None, *, code: int = 0) -> Array:
    """The whole op for float32 weights: x float32 [m, k], bias float32 [n] or None -> float32 [m, n]."""
    y: Array = finish(accumulate(x, mask, values), np.empty(0, np.float32) if bias is None else bias, code)
    return y


@jit
def patches(
    x: Array, kernel: tuple[int, int], stride: tuple[int, int], before: tuple[int, int], dilation: tuple[int, int],
    out: tuple[int, int],
) -> Array:  # fmt: skip
    """What each output of a convolution is made of, in the order of the weight: its k inputs, zeros outside of the image.

    Args:
        x: float32 [channels, height, width].
        before: rows and columns of zeros at the top and at the left; those behind follow from ``out``.
        out: height and width of the output.
    Returns:
        float32 [out height * out width, channels * kernel height * kernel width].
    """
    channels, height, width = x.shape
    rows = np.zeros((out[0] * out[1], channels * kernel[0] * kernel[1]), np.float32)
    for row in range(out[0] * out[1]):
        top = row // out[1] * stride[0] - before[0]
        left = row % out[1] * stride[1] - before[1]
        for column in range(rows.shape[1]):
            h = top + column // kernel[1] % kernel[0] * dilation[0]
            w = left + column % kernel[1] * dilation[1]
            if 0 <= h < height and 0 <= w < width:
                rows[row, column] = x[column // (kernel[0] * kernel[1]), h, w]
    return rows


def decompress(mask: Array, values: Array, k: int) -> Array:
    """The weight [n, k] with its zeros, of the dtype of values; mask has as many bits set as there are values."""
    weight = np.zeros((mask.shape[0], k), values.dtype)
    weight[np.unpackbits(mask, axis=1, count=k, bitorder="little").view(np.bool_)] = values
    return weight
