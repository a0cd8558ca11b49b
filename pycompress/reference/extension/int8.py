"""int8: a header, in which the range of a static weight's input stands, then the values [n, k]."""

from __future__ import annotations

from typing import Any

import numpy as np

from pycompress.reference import int8, weight_only
from pycompress.reference.activation import finish
from pycompress.reference.extension import memory
from pycompress.reference.extension.memory import Array

Range = tuple[float, int]  # scale and zero point of an input


def bits_of(value: float) -> int:
    """Those of a float32: headers hold whole numbers."""
    return int(np.float32(value).view(np.uint32))


def value_of(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


def has_range(header: memory.Header) -> bool:
    """Whether what a header says of the range of the input is one, or that there is none."""
    bits, zero_point = header["input_scale"], header["input_zero_point"]
    if bits == 0 or header["activation_bits"] == 16:
        return bits == 0 and zero_point == 0
    amax = 2 ** header["activation_bits"] - 1
    return 0 < bits < 2**32 and 2.0**-126 <= value_of(bits) <= 2.0**126 and 0 <= zero_point <= amax


LAYOUT = memory.Layout(
    "int8",
    b"pyc.ref1",
    ("n", "k", "activation_bits", "input_scale", "input_zero_point"),
    lambda of: {"values": (np.int8, (of["n"], of["k"]))},
    lambda of: memory.has_shape(of) and of["activation_bits"] in (7, 8, 16) and has_range(of),
)
int8_unpack = LAYOUT.unpack


def int8_header(packed: int, packed_bytes: int) -> dict[str, Any]:
    header: dict[str, Any] = LAYOUT.read(packed, packed_bytes)[0]
    header["input_scale"] = value_of(header["input_scale"])
    weight_only = header["activation_bits"] == 16
    groups = 0 if weight_only else header["n"] * header["k"] // 4
    return {**header, "layout": "weight_only" if weight_only else "rows", "groups": groups, "items": (0, 0, 0)}


def int8_pack(
    values: int, n: int, k: int, activation_bits: int, kernel: str, _threads: int, input_scale: float, input_zero_point: int,
) -> bytes:  # fmt: skip
    if n < 1 or not 1 <= k <= memory.MAX_IN_FEATURES:
        raise ValueError(f"int8_pack: the weight is [{n}, {k}], expected at least one row and 1 to 65536 columns")
    if kernel not in ("", "numba"):
        raise ValueError(f"no int8 kernel is named '{kernel}'")
    if (memory.view(values, np.int8, n, k) == -128).any():
        raise ValueError("int8_pack: a weight is -128, expected -127 to 127 (the scale is symmetric)")
    if input_scale:
        check_range("int8_pack", (input_scale, input_zero_point), activation_bits)
    numbers = (n, k, activation_bits, bits_of(input_scale), input_zero_point)
    return LAYOUT.pack(dict(zip(LAYOUT.fields, numbers, strict=True)), values)


def check_range(op: str, input_range: Range, activation_bits: int) -> None:
    (scale, zero_point), amax = input_range, 2**activation_bits - 1
    if activation_bits == 16:
        raise ValueError(f"{op}: a range of the input was given, expected none where it stays in floating point")
    if not 2.0**-126 <= scale <= 2.0**126:
        raise ValueError(f"{op}: input_scale is {scale}, expected 2^-126 to 2^126")
    if not 0 <= zero_point <= amax:
        raise ValueError(f"{op}: input_zero_point is {zero_point}, expected 0 to {amax}")


def unpacked(packed: int, packed_bytes: int) -> tuple[Array, int, Range | None]:
    """The weights int8 [n, k], the bits of their activations, and the range of these where it is static."""
    header, parts = LAYOUT.read(packed, packed_bytes)
    static = (value_of(header["input_scale"]), header["input_zero_point"]) if header["input_scale"] else None
    return parts["values"], header["activation_bits"], static


def int8_quantize(
    x: int, x_type: int, m: int, k: int, ldx: int, bits: int, input_scale: float, input_zero_point: int, q: int, scale: int,
    zero_point: int,
) -> None:  # fmt: skip
    parts = _quantized("int8_quantize", memory.load(x, x_type, m, k, ldx), bits, (input_scale, input_zero_point))
    for address, part in zip((q, scale, zero_point), parts, strict=True):
        memory.view(address, part.dtype, *part.shape)[:] = part


def _quantized(op: str, x: Array, bits: int, input_range: Range) -> tuple[Array, Array, Array]:
    """A scale of 0 stands for each row's own range."""
    if bits not in (7, 8):
        raise ValueError(f"{op}: activation_bits is {bits}, expected 7 or 8")
    if input_range[0]:
        check_range(op, input_range, bits)
    return int8.quantized(x, bits, input_range if input_range[0] else None)


def int8_round(
    x: int, x_type: int, m: int, k: int, ldx: int, bits: int, input_scale: float, input_zero_point: int, y: int,
    _threads: int,
) -> None:  # fmt: skip
    rows, static = memory.load(x, x_type, m, k, ldx), (input_scale, input_zero_point)
    q, scale, zero_point = _quantized("int8_round", rows, bits, static)
    memory.view(y, np.float32, m, k)[:] = (q.astype(np.float32) - zero_point[:, None]) * scale[:, None]


def int8_linear(
    x: int, x_type: int, m: int, k: int, ldx: int, packed: int, packed_bytes: int, n: int, weight_scale: int,
    bias: int, activation: int, y: int, y_type: int, row_scale: int, zero_point: int, _threads: int,
) -> None:  # fmt: skip
    weights, bits, static = unpacked(packed, packed_bytes)
    if k != weights.shape[1]:
        raise ValueError(f"int8_linear: x is [{m}, {k}], the packed weight expects k = {weights.shape[1]}")
    if n != weights.shape[0]:
        raise ValueError(f"int8_linear: the scale has {n} channels, the packed weight {weights.shape[0]}")
    rows = memory.load(x, x_type, m, k, ldx)
    if bits != 16:
        return integers(rows, weights, bits, weight_scale, bias, activation, y, y_type, row_scale, zero_point, static)
    if y_type == memory.INT32:
        raise ValueError("int8_linear: the packed weight leaves activations in floating point: there are no integers")
    scale, offset = memory.vector(weight_scale, n), memory.vector(bias, n)
    return memory.store(
        y, y_type, weight_only.linear(rows, weights.astype(np.float32), offset, scale=scale, code=activation)
    )


def integers(
    x: Array, weights: Array, bits: int, weight_scale: int, bias: int, activation: int, y: int, y_type: int,
    row_scale: int, zero_point: int, input_range: Range | None = None,
) -> None:  # fmt: skip
    """x float32 [m, k] times int8 [n, k], into the addresses y, row_scale and zero_point (these two may be 0)."""
    m, n = len(x), len(weights)
    q, rows, zeros = int8.quantized(x, bits, input_range)
    acc = int8.accumulate(q, zeros, np.ascontiguousarray(weights))
    if row_scale:
        memory.view(row_scale, np.float32, m)[:] = rows
    if zero_point:
        memory.view(zero_point, np.int32, m)[:] = zeros
    if y_type == memory.INT32:
        return memory.store(y, y_type, acc)
    v = int8.rescale(acc, rows, memory.vector(weight_scale, n))
    return memory.store(y, y_type, finish(v, memory.vector(bias, n), activation))
