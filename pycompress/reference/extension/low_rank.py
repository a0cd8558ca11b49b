"""low rank: a header, then the factors, their scales, the residual and its scale."""

from __future__ import annotations

from typing import Any

import numpy as np

from pycompress.reference import int4, int8, low_rank, sparse
from pycompress.reference.activation import finish
from pycompress.reference.chain import product
from pycompress.reference.extension import memory
from pycompress.reference.extension.int4 import int4_header, int4_parts
from pycompress.reference.extension.int8 import int8_header, unpacked
from pycompress.reference.extension.memory import Array, Header
from pycompress.reference.extension.sparse import ACTIVATION_BITS, DTYPES, parts_of, sparse_header

RESIDUALS = ("", "dense", "int8", "sparse", "int4")  # by the number that the op gives them


def _parts(of: Header) -> dict[str, tuple[Any, tuple[int, ...]]]:
    factors, scaled = DTYPES[of["bits"]], of["bits"] == 8
    return {
        "down": (factors, (of["rank"], of["k"])),
        "up": (factors, (of["n"], of["rank"])),
        "down_scale": (np.float32, (of["rank"] if scaled else 0,)),
        "up_scale": (np.float32, (of["n"] if scaled else 0,)),
        "residual": (np.float32, (of["n"], of["k"])) if of["residual"] == 1 else (np.uint8, (of["residual_bytes"],)),
        "residual_scale": (np.float32, (of["n"] if of["residual_scaled"] else 0,)),
    }


def _is_valid(of: Header) -> bool:
    kind = of["residual"]
    return (
        memory.has_shape(of)
        and 1 <= of["rank"] <= min(of["n"], of["k"])
        and of["activation_bits"] in ACTIVATION_BITS.get(of["bits"], ())
        and 0 <= kind < len(RESIDUALS)
        and of["residual_scaled"] in {2: (1,), 3: (0, 1)}.get(kind, (0,))
        and of["residual_bytes"] == {0: 0, 1: 4 * of["n"] * of["k"]}.get(kind, of["residual_bytes"]) >= 0
    )


LAYOUT = memory.Layout(
    "low_rank",
    b"pyc.low1",
    ("n", "k", "rank", "bits", "activation_bits", "residual", "residual_bytes", "residual_scaled"),
    _parts,
    _is_valid,
)


def low_rank_pack(
    down: int, up: int, n: int, k: int, rank: int, bits: int, activation_bits: int, down_scale: int,
    up_scale: int, residual_kind: int, residual: int, residual_bytes: int, residual_scale: int, _threads: int,
) -> bytes:  # fmt: skip
    if not 1 <= k <= memory.MAX_IN_FEATURES:
        raise ValueError(f"low_rank_pack: in_features is {k}, expected 1 to {memory.MAX_IN_FEATURES}")
    if not 1 <= rank <= min(n, k):
        raise ValueError(f"low_rank_pack: the rank is {rank}, expected 1 to {min(n, k)} for a weight [{n}, {k}]")
    if activation_bits not in ACTIVATION_BITS[bits]:
        raise ValueError(
            f"low_rank_pack: activation_bits is {activation_bits}, expected 7 or 8 for int8 factors, 0 for float32"
        )
    numbers = (n, k, rank, bits, activation_bits, residual_kind, residual_bytes, int(residual_scale != 0))
    header = dict(zip(LAYOUT.fields, numbers, strict=True))
    _check_residual("low_rank_pack", header, residual)
    return LAYOUT.pack(header, down, up, down_scale, up_scale, residual, residual_scale)


def _check_residual(op: str, of: Header, residual: int) -> None:
    """The packed residual at an address has the size of the factors' product, and a scale where it is int8."""
    if of["residual"] < 2:
        return
    describe = {2: int8_header, 3: sparse_header, 4: int4_header}[of["residual"]]
    own = describe(residual, of["residual_bytes"])
    if (own["n"], own["k"]) != (of["n"], of["k"]):
        raise ValueError(f"{op}: the residual is {own['n']}x{own['k']}, expected {of['n']}x{of['k']} as the factors")
    if own["activation_bits"] == 16:
        raise ValueError(f"{op}: the residual's activation_bits is 16, expected 7 or 8")
    if of["residual_scaled"] != (of["residual"] == 2 or own.get("bits") == 8):
        given = "a scale" if of["residual_scaled"] else "no scale"
        raise ValueError(f"{op}: the residual has {given}, expected one for int8 values and none for others")


def low_rank_header(packed: int, packed_bytes: int) -> dict[str, Any]:
    header, _ = _read(packed, packed_bytes)
    named = {"residual": RESIDUALS[header["residual"]], "residual_scaled": bool(header["residual_scaled"])}
    return {**header, **named}


def _read(packed: int, packed_bytes: int) -> tuple[dict[str, int], dict[str, Array]]:
    header, parts = LAYOUT.read(packed, packed_bytes)
    _check_residual("packed low-rank weight", header, parts["residual"].ctypes.data)
    return header, parts


def low_rank_unpack(packed: int, packed_bytes: int, *addresses: int) -> None:
    """To down, up, down_scale, up_scale, residual and residual_scale."""
    _read(packed, packed_bytes)
    LAYOUT.unpack(packed, packed_bytes, *addresses)


def low_rank_linear(
    x: int, x_type: int, m: int, k: int, ldx: int, packed: int, packed_bytes: int, n: int, bias: int,
    activation: int, y: int, y_type: int, intermediate: int, _threads: int,
) -> None:  # fmt: skip
    header, parts = _read(packed, packed_bytes)
    memory.check_fit("low_rank_linear", (m, k), n, header)
    rows, bits = memory.load(x, x_type, m, k, ldx), header["activation_bits"]
    t = low_rank.intermediate(rows, parts["down"], parts["down_scale"], activation_bits=bits)
    if intermediate:
        memory.view(intermediate, np.float32, m, header["rank"])[:] = t
    v = low_rank.expand(
        t, parts["up"], parts["up_scale"], memory.vector(bias, n) if bias else None, activation_bits=bits
    )
    v = _with_residual(rows, header["residual"], parts, v)
    return memory.store(y, y_type, finish(v, np.empty(0, np.float32), activation))


def _with_residual(x: Array, kind: int, parts: dict[str, Array], addend: Array) -> Array:
    """What the residual makes of x float32 [m, k], and the addend float32 [m, n]."""
    residual, scale = parts["residual"], parts["residual_scale"]
    if kind == 0:
        return addend
    if kind == 1:
        return product(x, residual, addend)
    total: Array = low_rank.add(_residual_sums(x, kind, residual, scale), addend)
    return total


def _residual_sums(x: Array, kind: int, packed: Array, scale: Array) -> Array:
    """x float32 [m, k] times the weight that int8_pack (kind 2), sparse_pack (3) or int4_pack (4) packed."""
    address, packed_bytes = packed.ctypes.data, len(packed)
    if kind == 4:
        return int4.linear(x, *int4_parts(address, packed_bytes))
    if kind == 2:
        weights, bits, static = unpacked(address, packed_bytes)
        return int8.linear(x, weights, scale, activation_bits=bits, input_range=static)
    header, mask, values = parts_of(address, packed_bytes)
    if header["bits"] == 32:
        return sparse.accumulate(x, mask, values)
    weights, bits = sparse.decompress(mask, values, header["k"]), header["activation_bits"]
    return int8.linear(x, weights, scale, activation_bits=bits)
