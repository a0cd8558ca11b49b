"""Arrays at addresses, and what the packed weights of all ops have in common."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
MAX_IN_FEATURES = 65536
INT32 = 3  # of the kinds of y, beside those that `load` reads


def view(address: int, dtype: Any, *shape: int) -> Array:
    """The array at an address; a new one where it has no elements."""
    count = math.prod(shape)
    if count == 0:
        empty: Array = np.empty(shape, dtype)
        return empty
    raw = (ctypes.c_uint8 * (count * np.dtype(dtype).itemsize)).from_address(address)
    there: Array = np.frombuffer(raw, dtype=dtype).reshape(shape)
    return there


def widen(bits: Array) -> Array:
    """bfloat16, as uint16, -> float32."""
    wide: Array = (bits.astype(np.uint32) << 16).view(np.float32)
    return wide


def load(address: int, kind: int, m: int, k: int, ldx: int) -> Array:
    """Rows of float32 (kind 0), bfloat16 (1) or float16 (2) at an address, as float32 [m, k]."""
    if m == 0:
        return np.empty((0, k), np.float32)
    dtype = (np.float32, np.uint16, np.float16)[kind]
    flat = view(address, dtype, (m - 1) * ldx + k)
    rows = np.lib.stride_tricks.as_strided(flat, (m, k), (ldx * flat.itemsize, flat.itemsize))
    return np.ascontiguousarray(widen(rows) if kind == 1 else rows, dtype=np.float32)


def store(address: int, kind: int, y: Array) -> None:
    """y at an address, rounded to the kind."""
    if kind == 1:
        bits = y.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        view(address, np.uint16, *y.shape)[:] = np.where(np.isnan(y), (bits >> 16) | 0x40, rounded)
    else:
        with np.errstate(over="ignore"):  # Inf in float16
            view(address, (np.float32, None, np.float16, np.int32)[kind], *y.shape)[:] = y


def vector(address: int, n: int) -> Array:
    """float32 [n] at an address, empty where there is none."""
    return view(address, np.float32, n) if address else np.empty(0, np.float32)


def check_fit(op: str, x: tuple[int, int], n: int, header: dict[str, Any]) -> None:
    """Raises ValueError where rows x [m, k], or n channels, are not those of the packed weight with this header."""
    if x[1] != header["k"]:
        raise ValueError(f"{op}: x is {list(x)}, the packed weight expects k = {header['k']}")
    if n != header["n"]:
        raise ValueError(f"{op}: n is {n}, the packed weight has {header['n']} channels")
