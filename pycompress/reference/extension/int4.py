"""int4: a header, then values, scales and zero points as they were given."""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import numpy as np

from pycompress.reference import int4
from pycompress.reference.extension.memory import MAX_IN_FEATURES, Array, check_fit, load, store, vector, view, widen

_HEADER = struct.Struct("<8s5q")
_MAGIC = b"pyc.ref4"
GROUPS = (32, 64, 128)
ACTIVATION_BITS = (8, 16)


class _Header(NamedTuple):
    n: int
    k: int
    group: int
    symmetric: int
    activation_bits: int

    @property
    def groups(self) -> int:
        return -(-self.k // self.group)

    def parts(self) -> list[tuple[Any, tuple[int, int]]]:
        """dtype and shape of values, scales (bfloat16 bits) and zero points, which lie behind the header in this order."""
        zero_points = 0 if self.symmetric else -(-self.groups // 2)
        return [
            (np.uint8, (self.n, -(-self.k // 2))), (np.uint16, (self.n, self.groups)), (np.uint8, (self.n, zero_points)),
        ]  # fmt: skip

    def sizes(self) -> list[int]:
        return [math.prod(shape) * np.dtype(kind).itemsize for kind, shape in self.parts()]

    def is_valid(self) -> bool:
        return (
            self.n >= 1
            and 1 <= self.k <= MAX_IN_FEATURES
            and self.group in GROUPS
            and self.symmetric in (0, 1)
            and self.activation_bits in ACTIVATION_BITS
        )


def int4_pack(
    values: int, scale: int, zero_point: int, n: int, k: int, group: int, activation_bits: int, _threads: int
) -> bytes:
    if n < 1 or not 1 <= k <= MAX_IN_FEATURES:
        raise ValueError(f"int4_pack: the weight is [{n}, {k}], expected at least one row and 1 to 65536 columns")
    if group not in GROUPS:
        raise ValueError(f"int4_pack: group is {group}, expected 32, 64 or 128")
    if activation_bits not in ACTIVATION_BITS:
        raise ValueError(f"int4_pack: activation_bits is {activation_bits}, expected 8 or 16")
    header = _Header(n, k, group, int(zero_point == 0), activation_bits)
    parts = zip((values, scale, zero_point), header.parts(), strict=True)
    return _HEADER.pack(_MAGIC, *header) + b"".join(view(at, kind, *shape).tobytes() for at, (kind, shape) in parts)


def _header(packed: int, packed_bytes: int) -> _Header:
    size = _HEADER.size
    data = bytes(view(packed, np.uint8, size)) if packed_bytes >= size else bytes(size)
    magic, *fields = _HEADER.unpack(data)
    header = _Header(*fields)
    if magic != _MAGIC or not header.is_valid() or packed_bytes != size + sum(header.sizes()):
        raise ValueError("packed int4 weight: unknown format, expected what int4_pack of this version returns")
    return header


def int4_header(packed: int, packed_bytes: int) -> dict[str, Any]:
    header = _header(packed, packed_bytes)
    return {**header._asdict(), "symmetric": bool(header.symmetric)}


def _parts(packed: int, header: _Header) -> list[Array]:
    """Values, scales and zero points as they were given, as views."""
    starts = np.cumsum([packed + _HEADER.size, *header.sizes()[:-1]])
    return [view(int(at), kind, *shape) for at, (kind, shape) in zip(starts, header.parts(), strict=True)]


def int4_unpack(packed: int, packed_bytes: int, values: int, scale: int, zero_point: int) -> None:
    parts = _parts(packed, _header(packed, packed_bytes))
    for address, part in zip((values, scale, zero_point), parts, strict=True):
        if address:
            view(address, part.dtype, *part.shape)[:] = part


def int4_parts(packed: int, packed_bytes: int) -> tuple[Array, Array, Array, int]:
    """A weight as the int4 op has it: values, scales and zero points one by one, and how many positions share a scale."""
    header = _header(packed, packed_bytes)
    values, scale, zeros = _parts(packed, header)
    zero_point = int4.zero_points(None if header.symmetric else zeros, header.n, header.groups)
    return int4.unpack_nibbles(values, header.k), widen(scale), zero_point, header.group


def int4_linear(
    x: int, x_type: int, m: int, k: int, ldx: int, packed: int, packed_bytes: int, n: int, bias: int, activation: int,
    y: int, y_type: int, _threads: int,
) -> None:  # fmt: skip
    header = _header(packed, packed_bytes)
    check_fit("int4_linear", (m, k), n, header._asdict())
    result = int4.linear(
        load(x, x_type, m, k, ldx), *int4_parts(packed, packed_bytes), vector(bias, n),
        activation_bits=header.activation_bits, code=activation,
    )  # fmt: skip
    return store(y, y_type, result)
