"""The readable twin of every kernel, in numba: the oracle of the tests, and what runs where no extension was built.

The formulas are those of ``csrc/int8/gemm.h``, float32 step by float32 step, so the results have the same bits as the kernels
(but for the activations ``gelu``, ``gelu_tanh`` and ``silu``, which here are the exact functions, rounded once).
"""

from __future__ import annotations

import ctypes
import math
import struct
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]


def _jit(function: Any) -> Any:
    """Compiled once and cached beside the package or in the user's home; where neither can be written, compiled anew."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:
        return njit(function)


_HALF = np.float32(0.5)
_TINY = np.float32(2.0**-100)


@_jit
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


@_jit
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


@_jit
def activate(code: int, v: float) -> float:
    """The activation of :data:`pycompress.ops.ACTIVATIONS` with this code, in float64."""
    if code == 1:
        return v if not v < 0 else 0.0
    if code == 2:
        return 0.5 * v * math.erfc(-v / math.sqrt(2.0))
    if code == 3:
        return 0.5 * v * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (v + 0.044715 * v * v * v)))
    if code == 4:
        return v / (1.0 + math.exp(-v)) if v > -700 else 0.0
    return v


@_jit
def finish(acc: Array, row_scale: Array, weight_scale: Array, bias: Array, code: int) -> Array:
    """y = act(acc * row_scale * weight_scale + bias) in float32; ``bias`` is empty where there is none."""
    m, n = acc.shape
    y = np.empty((m, n), np.float32)
    for i in range(m):
        for j in range(n):
            v = np.float32(np.float32(np.float32(acc[i, j]) * row_scale[i]) * weight_scale[j])
            if bias.size:
                v = np.float32(v + bias[j])
            y[i, j] = v if code == 0 else np.float32(activate(code, float(v)))
    return y


def linear(
    x: Array, w: Array, weight_scale: Array, bias: Array | None = None, *, activation_bits: int = 8, code: int = 0
) -> Array:
    """The whole op: x float32 [m, k], w int8 [n, k], weight_scale float32 [n], bias float32 [n] or None -> float32 [m, n]."""
    q, row_scale, zero_point = quantize(x, 2**activation_bits - 1)
    y: Array = finish(
        accumulate(q, zero_point, w), row_scale, weight_scale, np.empty(0, np.float32) if bias is None else bias, code
    )
    return y


def _view(address: int, dtype: Any, *shape: int) -> Array:
    count = math.prod(shape)
    if count == 0:
        empty: Array = np.empty(shape, dtype)
        return empty
    raw = (ctypes.c_uint8 * (count * np.dtype(dtype).itemsize)).from_address(address)
    view: Array = np.frombuffer(raw, dtype=dtype).reshape(shape)
    return view


def _load(address: int, kind: int, m: int, k: int, ldx: int) -> Array:
    """Rows of float32 (kind 0), bfloat16 (1) or float16 (2) at an address, as float32 [m, k]."""
    if m == 0:
        return np.empty((0, k), np.float32)
    dtype = (np.float32, np.uint16, np.float16)[kind]
    flat = _view(address, dtype, (m - 1) * ldx + k)
    rows = np.lib.stride_tricks.as_strided(flat, (m, k), (ldx * flat.itemsize, flat.itemsize))
    if kind == 1:
        return np.ascontiguousarray((rows.astype(np.uint32) << 16).view(np.float32))
    return np.ascontiguousarray(rows, dtype=np.float32)


def _store(address: int, kind: int, y: Array) -> None:
    if kind == 1:
        bits = y.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        _view(address, np.uint16, *y.shape)[:] = np.where(np.isnan(y), (bits >> 16) | 0x40, rounded)
    else:
        _view(address, (np.float32, None, np.float16, np.int32)[kind], *y.shape)[:] = y


class Native:
    """The functions of the native module ``_C``, with the same signatures, where that was not built."""

    _HEADER = struct.Struct("<8sqqq")
    _MAGIC = b"pyc.ref1"

    def kernels(self) -> list[dict[str, Any]]:
        return [{"op": "int8", "name": "numba", "isa": "scalar", "mr": 1, "nr": 1, "kr": 1, "available": True}]

    def instruction_sets(self) -> dict[str, bool]:
        return {"scalar": True}

    def use_exchange(self, _capsule: object) -> bool:
        return False

    def int8_header(self, packed: int, n_bytes: int) -> dict[str, Any]:
        size = self._HEADER.size
        magic, n, k, bits = (
            self._HEADER.unpack(bytes(_view(packed, np.uint8, size))) if n_bytes >= size else (b"", 0, 0, 0)
        )
        if magic != self._MAGIC or n_bytes != size + n * k:
            raise ValueError("packed int8 weight: unknown format, expected what int8_pack of this version returns")
        return {"n": n, "k": k, "activation_bits": bits, "groups": n * k // 4, "items": (0, 0, 0)}

    def int8_pack(self, values: int, n: int, k: int, activation_bits: int, kernel: str, _threads: int) -> bytes:
        weights = _view(values, np.int8, n, k)
        if n < 1 or not 1 <= k <= 65536:
            raise ValueError(f"int8_pack: the weight is [{n}, {k}], expected at least one row and 1 to 65536 columns")
        if activation_bits not in (7, 8):
            raise ValueError(f"int8_pack: activation_bits is {activation_bits}, expected 7 or 8")
        if kernel not in ("", "numba"):
            raise ValueError(f"no int8 kernel is named '{kernel}'")
        if (weights == -128).any():
            raise ValueError("int8_pack: a weight is -128, expected -127 to 127 (the scale is symmetric)")
        return self._HEADER.pack(self._MAGIC, n, k, activation_bits) + weights.tobytes()

    def _weights(self, packed: int, n_bytes: int) -> tuple[Array, int]:
        header = self.int8_header(packed, n_bytes)
        return _view(packed + self._HEADER.size, np.int8, header["n"], header["k"]), header["activation_bits"]

    def int8_unpack(self, packed: int, n_bytes: int, values: int) -> None:
        weights, _ = self._weights(packed, n_bytes)
        _view(values, np.int8, *weights.shape)[:] = weights

    def int8_quantize(
        self, x: int, kind: int, m: int, k: int, ldx: int, bits: int, q: int, scale: int, zero_point: int
    ) -> None:
        if bits not in (7, 8):
            raise ValueError(f"int8_quantize: activation_bits is {bits}, expected 7 or 8")
        result = quantize(_load(x, kind, m, k, ldx), 2**bits - 1)
        _view(q, np.uint8, m, k)[:], _view(scale, np.float32, m)[:], _view(zero_point, np.int32, m)[:] = result

    def int8_linear(
        self, x: int, x_kind: int, m: int, k: int, ldx: int, packed: int, n_bytes: int, n: int, weight_scale: int,
        bias: int, activation: int, y: int, y_kind: int, row_scale: int, zero_point: int, _threads: int,
    ) -> None:  # fmt: skip
        weights, bits = self._weights(packed, n_bytes)
        if k != weights.shape[1]:
            raise ValueError(f"int8_linear: x is [{m}, {k}], the packed weight expects k = {weights.shape[1]}")
        if n != weights.shape[0]:
            raise ValueError(f"int8_linear: the scale has {n} channels, the packed weight {weights.shape[0]}")
        q, rows, zeros = quantize(_load(x, x_kind, m, k, ldx), 2**bits - 1)
        acc = accumulate(q, zeros, np.ascontiguousarray(weights))
        if row_scale:
            _view(row_scale, np.float32, m)[:] = rows
        if zero_point:
            _view(zero_point, np.int32, m)[:] = zeros
        if y_kind == 3:
            return _store(y, y_kind, acc)
        columns = _view(weight_scale, np.float32, n)
        shift = _view(bias, np.float32, n) if bias else np.empty(0, np.float32)
        return _store(y, y_kind, finish(acc, rows, columns, shift, activation))

    def peak(self, loop: str, _seconds: float, _threads: int) -> float:
        raise ValueError(f"peak: the loop {loop} needs the native extension, which was not built")

    def bandwidth(self, n_bytes: int, _seconds: float, _threads: int) -> float:
        raise ValueError(f"bandwidth: reading {n_bytes} bytes needs the native extension, which was not built")
