"""Arrays at addresses, and what the packed weights of all ops have in common."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
MAX_IN_FEATURES = 65536
INT32, UINT8 = 3, 4  # of the kinds of y, beside those that `load` reads


def view(address: int, dtype: Any, *shape: int) -> Array:
    """The array at an address; a new one where it has no elements."""
    count = math.prod(shape)
    if count == 0:
        empty: Array = np.empty(shape, dtype)
        return empty
    raw = (ctypes.c_uint8 * (count * np.dtype(dtype).itemsize)).from_address(address)
    there: Array = np.frombuffer(raw, dtype=dtype).reshape(shape)
    return there


Header = Mapping[str, int]


@dataclass(frozen=True)
class Layout:
    """How the packed weights of an op lie: a header, then arrays, each of which starts at a multiple of eight bytes.

    Attributes:
        op: what the names of its functions begin with.
        magic, fields: the header is these eight bytes, then whole numbers of these names.
        parts: of a valid header: dtype and shape of the arrays by name.
        is_valid: whether a header may be that of a weight.
    """

    op: str
    magic: bytes
    fields: tuple[str, ...]
    parts: Callable[[Header], dict[str, tuple[Any, tuple[int, ...]]]]
    is_valid: Callable[[Header], bool]

    @property
    def header(self) -> struct.Struct:
        return struct.Struct(f"<8s{len(self.fields)}q")

    def pack(self, header: Header, *addresses: int) -> bytes:
        """The header and the arrays at the addresses, in the order of the parts."""
        parts = zip(addresses, self.parts(header).values(), strict=True)
        pieces = [view(address, dtype, *shape).tobytes() for address, (dtype, shape) in parts]
        numbers = self.header.pack(self.magic, *(header[name] for name in self.fields))
        return b"".join(piece.ljust(-(-len(piece) // 8) * 8, b"\0") for piece in (numbers, *pieces))

    def read(self, packed: int, packed_bytes: int) -> tuple[dict[str, int], dict[str, Array]]:
        """The header, and the arrays as views. Raises ValueError where these are no bytes that ``pack`` gave."""
        size = self.header.size
        raw = bytes(view(packed, np.uint8, size)) if packed_bytes >= size else bytes(size)
        magic, *numbers = self.header.unpack(raw)
        header, end, starts = dict(zip(self.fields, numbers, strict=True)), size, dict[str, int]()
        if valid := magic == self.magic and self.is_valid(header):
            for name, (dtype, shape) in self.parts(header).items():
                starts[name] = packed + end
                end += -(-math.prod(shape) * np.dtype(dtype).itemsize // 8) * 8
        if not valid or packed_bytes != end:
            name = self.op.replace("_", "-")
            raise ValueError(
                f"packed {name} weight: unknown format, expected what {self.op}_pack of this version returns"
            )
        parts = self.parts(header).items()
        return header, {name: view(starts[name], dtype, *shape) for name, (dtype, shape) in parts}

    def unpack(self, packed: int, packed_bytes: int, *addresses: int) -> None:
        """The arrays, each to its address where that is not 0."""
        for address, part in zip(addresses, self.read(packed, packed_bytes)[1].values(), strict=True):
            if address:
                view(address, part.dtype, *part.shape)[:] = part


def has_shape(header: Header) -> bool:
    return header["n"] >= 1 and 1 <= header["k"] <= MAX_IN_FEATURES


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
            view(address, (np.float32, None, np.float16, np.int32, np.uint8)[kind], *y.shape)[:] = y


def vector(address: int, n: int) -> Array:
    """float32 [n] at an address, empty where there is none."""
    return view(address, np.float32, n) if address else np.empty(0, np.float32)


def check_fit(op: str, x: tuple[int, int], n: int, header: Header) -> None:
    """Raises ValueError where rows x [m, k], or n channels, are not those of the packed weight with this header."""
    if x[1] != header["k"]:
        raise ValueError(f"{op}: x is {list(x)}, the packed weight expects k = {header['k']}")
    if n != header["n"]:
        raise ValueError(f"{op}: n is {n}, the packed weight has {header['n']} channels")
