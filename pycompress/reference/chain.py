"""float32 sums as chains of fused multiply-adds, in ascending order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pycompress.reference.compiled import jit

Array = NDArray[Any]


@jit
def fma(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """a * b + c of float32 numbers, rounded once to float32 (Boldo and Melquiond 2008, "Emulation of FMA").

    The product is exact in float64: 48 of 53 bits. The sum is rounded to odd, that is, of the two float64 numbers around it
    to the one whose last bit is set; rounding that to float32 then is as good as rounding the exact sum, because float64 has
    more than two bits to spare.
    """
    product, addend = np.float64(a) * np.float64(b), np.float64(c)
    total = product + addend
    part = total - product
    rest = (product - (total - part)) + (addend - part)  # total + rest is the exact sum (Knuth's two-sum)
    if (rest < 0 or rest > 0) and np.float64(total).view(np.int64) & 1 == 0:  # not for Inf and NaN
        total = np.nextafter(total, np.inf if rest > 0 else -np.inf)
    return np.float32(total)


@jit
def extend(acc: Array, x: Array, mask: Array, values: Array) -> None:
    """Lets the chain in acc[m, n] go on: ``fma(x[m, i], weight[n, i], acc)`` over the weights that are there, ascending i.

    Args:
        acc: float32 [m, n], changed in place.
        x: float32 [m, k].
        mask: uint8 [n, ceil(k / 8)], the bit of weight i is bit i % 8 of byte i // 8.
        values: float32 [nnz], row after row.
    """
    (m, k), n = x.shape, mask.shape[0]
    at = 0
    for j in range(n):
        for i in range(k):
            if mask[j, i // 8] >> (i % 8) & 1:
                for row in range(m):
                    acc[row, j] = fma(x[row, i], values[at], acc[row, j])
                at += 1


def product(x: Array, weight: Array, start: Array) -> Array:
    """start + x weight^T as chains of ``fma`` in ascending k: x float32 [m, k], weight float32 [n, k], start [m, n] -> [m, n]."""
    acc: Array = start.copy()
    every = np.full((weight.shape[0], -(-weight.shape[1] // 8)), 0xFF, np.uint8)  # a bitmask without zeros
    extend(acc, x, every, weight.reshape(-1))
    return acc
