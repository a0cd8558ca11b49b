"""int8: a header, then the values [n, k]."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from pycompress.reference import int8, weight_only
from pycompress.reference.activation import finish
from pycompress.reference.extension.memory import INT32, MAX_IN_FEATURES, Array, load, store, vector, view

_HEADER = struct.Struct("<8sqqq")
_MAGIC = b"pyc.ref1"


def int8_header(packed: int, packed_bytes: int) -> dict[str, Any]:
    size = _HEADER.size
    data = bytes(view(packed, np.uint8, size)) if packed_bytes >= size else bytes(size)
    magic, n, k, bits = _HEADER.unpack(data)
    sizes = n >= 1 and 1 <= k <= MAX_IN_FEATURES and bits in (7, 8, 16)
    if magic != _MAGIC or not sizes or packed_bytes != size + n * k:
        raise ValueError("packed int8 weight: unknown format, expected what int8_pack of this version returns")
    return {"n": n, "k": k, "activation_bits": bits, "groups": 0 if bits == 16 else n * k // 4, "items": (0, 0, 0)}


def int8_pack(values: int, n: int, k: int, activation_bits: int, kernel: str, _threads: int) -> bytes:
    weights = view(values, np.int8, n, k)
    if n < 1 or not 1 <= k <= MAX_IN_FEATURES:
        raise ValueError(f"int8_pack: the weight is [{n}, {k}], expected at least one row and 1 to 65536 columns")
    if kernel not in ("", "numba"):
        raise ValueError(f"no int8 kernel is named '{kernel}'")
    if (weights == -128).any():
        raise ValueError("int8_pack: a weight is -128, expected -127 to 127 (the scale is symmetric)")
    return _HEADER.pack(_MAGIC, n, k, activation_bits) + weights.tobytes()


def unpacked(packed: int, packed_bytes: int) -> tuple[Array, int]:
    """The weights int8 [n, k] and the bits of their activations."""
    header = int8_header(packed, packed_bytes)
    return view(packed + _HEADER.size, np.int8, header["n"], header["k"]), header["activation_bits"]


def int8_unpack(packed: int, packed_bytes: int, values: int) -> None:
    weights, _ = unpacked(packed, packed_bytes)
    view(values, np.int8, *weights.shape)[:] = weights


def int8_quantize(
    x: int, x_type: int, m: int, k: int, ldx: int, bits: int, q: int, scale: int, zero_point: int
) -> None:
    if bits not in (7, 8):
        raise ValueError(f"int8_quantize: activation_bits is {bits}, expected 7 or 8")
    result = int8.quantize(load(x, x_type, m, k, ldx), 2**bits - 1)
    view(q, np.uint8, m, k)[:], view(scale, np.float32, m)[:], view(zero_point, np.int32, m)[:] = result


def int8_linear(
    x: int, x_type: int, m: int, k: int, ldx: int, packed: int, packed_bytes: int, n: int, weight_scale: int,
    bias: int, activation: int, y: int, y_type: int, row_scale: int, zero_point: int, _threads: int,
) -> None:  # fmt: skip
    weights, bits = unpacked(packed, packed_bytes)
    if k != weights.shape[1]:
        raise ValueError(f"int8_linear: x is [{m}, {k}], the packed weight expects k = {weights.shape[1]}")
    if n != weights.shape[0]:
        raise ValueError(f"int8_linear: the scale has {n} channels, the packed weight {weights.shape[0]}")
    rows = load(x, x_type, m, k, ldx)
    if bits != 16:
        return integers(rows, weights, bits, weight_scale, bias, activation, y, y_type, row_scale, zero_point)
    if y_type == INT32:
        raise ValueError("int8_linear: the packed weight leaves activations in floating point: there are no integers")
    scale, offset = vector(weight_scale, n), vector(bias, n)
    return store(y, y_type, weight_only.linear(rows, weights.astype(np.float32), offset, scale=scale, code=activation))


def integers(
    x: Array, weights: Array, bits: int, weight_scale: int, bias: int, activation: int, y: int, y_type: int,
    row_scale: int, zero_point: int,
) -> None:  # fmt: skip
    """x float32 [m, k] times int8 [n, k], into the addresses y, row_scale and zero_point (these two may be 0)."""
    m, n = len(x), len(weights)
    q, rows, zeros = int8.quantize(x, 2**bits - 1)
    acc = int8.accumulate(q, zeros, np.ascontiguousarray(weights))
    if row_scale:
        view(row_scale, np.float32, m)[:] = rows
    if zero_point:
        view(zero_point, np.int32, m)[:] = zeros
    if y_type == INT32:
        return store(y, y_type, acc)
    v = int8.rescale(acc, rows, vector(weight_scale, n))
    return store(y, y_type, finish(v, vector(bias, n), activation))
