"""low rank: a header, then the factors, their scales, the residual and its scale."""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import numpy as np

from pycompress.reference import int4, int8, low_rank, sparse
from pycompress.reference.activation import finish
from pycompress.reference.chain import product
from pycompress.reference.extension.int4 import int4_header, int4_parts
from pycompress.reference.extension.int8 import int8_header, unpacked
from pycompress.reference.extension.memory import MAX_IN_FEATURES, Array, check_fit, load, store, vector, view
from pycompress.reference.extension.sparse import ACTIVATION_BITS, DTYPES, parts_of, sparse_header

_HEADER = struct.Struct("<8s8q")
_MAGIC = b"pyc.low1"
RESIDUALS = ("", "dense", "int8", "sparse", "int4")  # by the number that the op gives them


class _Header(NamedTuple):
    n: int
    k: int
    rank: int
    bits: int
    activation_bits: int
    residual: int  # an index of RESIDUALS
    residual_bytes: int
    residual_scaled: int

    def parts(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """dtype and shape of the arrays behind the header, each of which starts at a multiple of eight bytes."""
        factors, scaled = DTYPES[self.bits], self.bits == 8
        dense = self.residual == 1
        return {
            "down": (factors, (self.rank, self.k)),
            "up": (factors, (self.n, self.rank)),
            "down_scale": (np.float32, (self.rank if scaled else 0,)),
            "up_scale": (np.float32, (self.n if scaled else 0,)),
            "residual": (np.float32, (self.n, self.k)) if dense else (np.uint8, (self.residual_bytes,)),
            "residual_scale": (np.float32, (self.n if self.residual_scaled else 0,)),
        }

    def sizes(self) -> list[int]:
        """Bytes of the parts, with what fills them up."""
        return [-(-math.prod(shape) * np.dtype(kind).itemsize // 8) * 8 for kind, shape in self.parts().values()]

    def is_valid(self) -> bool:
        residual_bytes = {0: 0, 1: 4 * self.n * self.k}.get(self.residual, self.residual_bytes)
        return (
            self.n >= 1
            and 1 <= self.k <= MAX_IN_FEATURES
            and 1 <= self.rank <= min(self.n, self.k)
            and self.activation_bits in ACTIVATION_BITS.get(self.bits, ())
            and 0 <= self.residual < len(RESIDUALS)
            and self.residual_scaled in {2: (1,), 3: (0, 1)}.get(self.residual, (0,))
            and self.residual_bytes == residual_bytes >= 0
        )


def low_rank_pack(
    down: int, up: int, n: int, k: int, rank: int, bits: int, activation_bits: int, down_scale: int,
    up_scale: int, residual_kind: int, residual: int, residual_bytes: int, residual_scale: int, _threads: int,
) -> bytes:  # fmt: skip
    if not 1 <= k <= MAX_IN_FEATURES:
        raise ValueError(f"low_rank_pack: in_features is {k}, expected 1 to {MAX_IN_FEATURES}")
    if not 1 <= rank <= min(n, k):
        raise ValueError(f"low_rank_pack: the rank is {rank}, expected 1 to {min(n, k)} for a weight [{n}, {k}]")
    if activation_bits not in ACTIVATION_BITS[bits]:
        raise ValueError(
            f"low_rank_pack: activation_bits is {activation_bits}, expected 7 or 8 for int8 factors, 0 for float32"
        )
    header = _Header(n, k, rank, bits, activation_bits, residual_kind, residual_bytes, int(residual_scale != 0))
    addresses = (down, up, down_scale, up_scale, residual, residual_scale)
    _check_residual("low_rank_pack", header, residual)
    pieces = [_HEADER.pack(_MAGIC, *header)]
    for address, (kind, shape), size in zip(addresses, header.parts().values(), header.sizes(), strict=True):
        pieces.append(view(address, kind, *shape).tobytes().ljust(size, b"\0"))
    return b"".join(pieces)


def _check_residual(op: str, header: _Header, residual: int) -> None:
    """The packed residual at an address has the size of the factors' product, and a scale where it is int8."""
    if header.residual < 2:
        return
    describe = {2: int8_header, 3: sparse_header, 4: int4_header}[header.residual]
    own = describe(residual, header.residual_bytes)
    if (own["n"], own["k"]) != (header.n, header.k):
        raise ValueError(f"{op}: the residual is {own['n']}x{own['k']}, expected {header.n}x{header.k} as the factors")
    if own["activation_bits"] == 16:
        raise ValueError(f"{op}: the residual's activation_bits is 16, expected 7 or 8")
    scaled = header.residual == 2 or own.get("bits") == 8
    if header.residual_scaled != scaled:
        given = "a scale" if header.residual_scaled else "no scale"
        raise ValueError(f"{op}: the residual has {given}, expected one for int8 values and none for others")


def low_rank_header(packed: int, packed_bytes: int) -> dict[str, Any]:
    header = _header(packed, packed_bytes)
    named = {"residual": RESIDUALS[header.residual], "residual_scaled": bool(header.residual_scaled)}
    return {**header._asdict(), **named}


def _header(packed: int, packed_bytes: int) -> _Header:
    size = _HEADER.size
    data = bytes(view(packed, np.uint8, size)) if packed_bytes >= size else bytes(size)
    magic, *fields = _HEADER.unpack(data)
    header = _Header(*fields)
    if magic != _MAGIC or not header.is_valid() or packed_bytes != size + sum(header.sizes()):
        raise ValueError("packed low-rank weight: unknown format, expected what low_rank_pack of this version returns")
    _check_residual("packed low-rank weight", header, _addresses(packed, header)["residual"])
    return header


def _addresses(packed: int, header: _Header) -> dict[str, int]:
    """Where the parts lie."""
    starts = np.cumsum([packed + _HEADER.size, *header.sizes()])
    return dict(zip(header.parts(), map(int, starts), strict=False))


def _parts(packed: int, header: _Header) -> dict[str, Array]:
    """The arrays themselves, as views."""
    addresses = _addresses(packed, header)
    return {name: view(addresses[name], kind, *shape) for name, (kind, shape) in header.parts().items()}


def low_rank_unpack(
    packed: int, packed_bytes: int, down: int, up: int, down_scale: int, up_scale: int, residual: int,
    residual_scale: int,
) -> None:  # fmt: skip
    parts = _parts(packed, _header(packed, packed_bytes))
    addresses = (down, up, down_scale, up_scale, residual, residual_scale)
    for address, part in zip(addresses, parts.values(), strict=True):
        if address:
            view(address, part.dtype, *part.shape)[:] = part


def low_rank_linear(
    x: int, x_type: int, m: int, k: int, ldx: int, packed: int, packed_bytes: int, n: int, bias: int,
    activation: int, y: int, y_type: int, intermediate: int, _threads: int,
) -> None:  # fmt: skip
    header = _header(packed, packed_bytes)
    check_fit("low_rank_linear", (m, k), n, header._asdict())
    rows, parts, bits = load(x, x_type, m, k, ldx), _parts(packed, header), header.activation_bits
    t = low_rank.intermediate(rows, parts["down"], parts["down_scale"], activation_bits=bits)
    if intermediate:
        view(intermediate, np.float32, m, header.rank)[:] = t
    v = low_rank.expand(t, parts["up"], parts["up_scale"], vector(bias, n) if bias else None, activation_bits=bits)
    v = _with_residual(rows, header, parts, v)
    return store(y, y_type, finish(v, np.empty(0, np.float32), activation))


def _with_residual(x: Array, header: _Header, parts: dict[str, Array], addend: Array) -> Array:
    """What the residual makes of x float32 [m, k], and the addend float32 [m, n]."""
    residual, scale = parts["residual"], parts["residual_scale"]
    if header.residual == 0:
        return addend
    if header.residual == 1:
        return product(x, residual, addend)
    total: Array = low_rank.add(_residual_sums(x, header.residual, residual, scale), addend)
    return total


def _residual_sums(x: Array, kind: int, packed: Array, scale: Array) -> Array:
    """x float32 [m, k] times the weight that int8_pack (kind 2), sparse_pack (3) or int4_pack (4) packed."""
    address, packed_bytes = packed.ctypes.data, len(packed)
    if kind == 4:
        return int4.linear(x, *int4_parts(address, packed_bytes))
    if kind == 2:
        weights, bits = unpacked(address, packed_bytes)
        return int8.linear(x, weights, scale, activation_bits=bits)
    header, mask, values = parts_of(address, packed_bytes)
    if header["bits"] == 32:
        return sparse.accumulate(x, mask, values)
    weights, bits = sparse.decompress(mask, values, header["k"]), header["activation_bits"]
    return int8.linear(x, weights, scale, activation_bits=bits)
