"""The gates of an LSTM and a GRU: the formulas of ``csrc/recurrent/recurrent.h``, float32 step by float32 step."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pycompress.reference import int8

Array = NDArray[Any]
_ONE, _TWO = np.float32(1), np.float32(2)


def exp_negative(x: Array) -> Array:
    """exp of float32 numbers up to 0, as ``csrc/common/activation.h`` has it: 0 below -87."""
    magic, floor = np.float32(1.5 * 2**23), np.float32(-87)
    clamped = np.where(floor < x, x, floor)
    n = (clamped * np.float32(1.44269504) + magic) - magic
    r = (clamped - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)
    p = _ONE / np.float32(5040)
    for factorial in (720, 120, 24, 6, 2):
        p = p * r + _ONE / np.float32(factorial)
    p = (p * r) * r + r + _ONE
    return np.where(floor < x, np.ldexp(p, n.astype(np.int32)), np.float32(0))


def sigmoid(u: Array) -> Array:
    """float32 of any shape."""
    e = exp_negative(-np.abs(_bounded(u)))
    positive = _ONE / (_ONE + e)
    return np.where(np.isnan(u), u, np.where(u < 0, positive * e, positive))


def tanh(u: Array) -> Array:
    """float32 of any shape."""
    e = exp_negative(-np.abs(_bounded(u)) * _TWO)
    positive = (_ONE - e) / (_ONE + e)
    return np.where(np.isnan(u), u, np.where(u < 0, np.float32(0) - positive, positive))


def _bounded(u: Array) -> Array:
    """Without NaN, which the caller puts back, and Inf."""
    return np.clip(np.where(np.isnan(u), np.float32(0), u), np.float32(-128), np.float32(128))


def lstm(gx: Array, gh: Array, c: Array) -> tuple[Array, Array]:
    """gx, gh float32 [m, 4 * size], c float32 [m, size] -> h and c of the next step."""
    with np.errstate(all="ignore"):
        i, f, g, o = np.split(gx + gh, 4, axis=1)
        cell = sigmoid(f) * c + sigmoid(i) * tanh(g)
        return sigmoid(o) * tanh(cell), cell


def gru(gx: Array, gh: Array, h: Array) -> Array:
    """gx, gh float32 [m, 3 * size], h float32 [m, size] -> h of the next step."""
    (rx, zx, nx), (rh, zh, nh) = np.split(gx, 3, axis=1), np.split(gh, 3, axis=1)
    with np.errstate(all="ignore"):
        n = tanh(nx + sigmoid(rx + rh) * nh)
        return (h - n) * sigmoid(zx + zh) + n


def run(
    x: Array, weights: tuple[Any, Any], batch_sizes: Array, h: Array, c: Array | None, bits: int, reverse: bool = False
) -> Array:  # fmt: skip
    """One layer and direction: of an LSTM, or without c of a GRU.

    Args:
        x: float32 [rows, k], the rows of step 0, then those of step 1...
        weights: (values int8 [n, k], scale float32 [n], bias float32 [n] or None), of the input and of h.
        batch_sizes: int64 [steps].
        h, c: float32 [batch, size], of which the last states are made in place.
    Returns:
        y float32 [rows, size].
    """
    input_, hidden = weights
    gates = int8.linear(x, *input_, activation_bits=bits)
    y = np.empty((len(x), h.shape[1]), np.float32)
    starts = np.cumsum(batch_sizes) - batch_sizes
    for t in range(len(batch_sizes))[:: -1 if reverse else 1]:
        size, start = int(batch_sizes[t]), int(starts[t])
        gx, gh = gates[start : start + size], int8.linear(h[:size].copy(), *hidden, activation_bits=bits)
        if c is not None:
            h[:size], c[:size] = lstm(gx, gh, c[:size])
        else:
            h[:size] = gru(gx, gh, h[:size])
        y[start : start + size] = h[:size]
    return y
