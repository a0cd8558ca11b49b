"""int4: a header, then values, scales and zero points as they were given."""

from __future__ import annotations

from typing import Any

import numpy as np

from pycompress.reference import int4
from pycompress.reference.extension import memory
from pycompress.reference.extension.memory import Array, Header

GROUPS = (32, 64, 128)
ACTIVATION_BITS = (8, 16)


def _parts(of: Header) -> dict[str, tuple[Any, tuple[int, ...]]]:
    n, groups = of["n"], -(-of["k"] // of["group"])
    return {
        "values": (np.uint8, (n, -(-of["k"] // 2))),
        "scale": (np.uint16, (n, groups)),  # the bits of bfloat16
        "zero_point": (np.uint8, (n, 0 if of["symmetric"] else -(-groups // 2))),
    }


def _is_valid(of: Header) -> bool:
    known = of["group"] in GROUPS and of["symmetric"] in (0, 1) and of["activation_bits"] in ACTIVATION_BITS
    return known and memory.has_shape(of)


LAYOUT = memory.Layout("int4", b"pyc.ref4", ("n", "k", "group", "symmetric", "activation_bits"), _parts, _is_valid)
int4_unpack = LAYOUT.unpack


def int4_pack(
    values: int, scale: int, zero_point: int, n: int, k: int, group: int, activation_bits: int, _threads: int
) -> bytes:
    if n < 1 or not 1 <= k <= memory.MAX_IN_FEATURES:
        raise ValueError(f"int4_pack: the weight is [{n}, {k}], expected at least one row and 1 to 65536 columns")
    if group not in GROUPS:
        raise ValueError(f"int4_pack: group is {group}, expected 32, 64 or 128")
    if activation_bits not in ACTIVATION_BITS:
        raise ValueError(f"int4_pack: activation_bits is {activation_bits}, expected 8 or 16")
    numbers = (n, k, group, int(zero_point == 0), activation_bits)
    return LAYOUT.pack(dict(zip(LAYOUT.fields, numbers, strict=True)), values, scale, zero_point)


def int4_header(packed: int, packed_bytes: int) -> dict[str, Any]:
    header, _ = LAYOUT.read(packed, packed_bytes)
    return {**header, "symmetric": bool(header["symmetric"])}


def int4_parts(packed: int, packed_bytes: int) -> tuple[Array, Array, Array, int]:
    """A weight as the int4 op has it: values, scales and zero points one by one, and how many positions share a scale."""
    header, parts = LAYOUT.read(packed, packed_bytes)
    zeros = None if header["symmetric"] else parts["zero_point"]
    zero_point = int4.zero_points(zeros, *parts["scale"].shape)
    return int4.unpack_nibbles(parts["values"], header["k"]), memory.widen(parts["scale"]), zero_point, header["group"]


def int4_linear(
    x: int, x_type: int, m: int, k: int, ldx: int, packed: int, packed_bytes: int, n: int, bias: int, activation: int,
    y: int, y_type: int, _threads: int,
) -> None:  # fmt: skip
    header, _ = LAYOUT.read(packed, packed_bytes)
    memory.check_fit("int4_linear", (m, k), n, header)
    result = int4.linear(
        memory.load(x, x_type, m, k, ldx), *int4_parts(packed, packed_bytes), memory.vector(bias, n),
        activation_bits=header["activation_bits"], code=activation,
    )  # fmt: skip
    return memory.store(y, y_type, result)
