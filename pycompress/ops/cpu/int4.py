"""int4 on the CPU (``csrc/int4``, and ``csrc/weight_only`` where activations stay floating point)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycompress import reference
from pycompress.ops.checks import MAX_IN_FEATURES, check, vector
from pycompress.ops.cpu import native
from pycompress.ops.cpu.native import check_operand
from pycompress.ops.form import Form, Sizes, parse, written

GROUPS = (32, 64, 128)
_CHECKED = ("n", "k", "group", "symmetric", "activation_bits")
# Of a scale, as the bits of a bfloat16: 2^-126, the smallest normal one, and 2^124, of which 15 steps are finite.
_SMALLEST_SCALE, _LARGEST_SCALE = 0x0080, 0x7D80


def sizes(form: Form) -> Sizes:
    """Shape and dtype of what :func:`unpack` gives, on any device."""
    n, groups = form.n, -(-form.k // form.group)
    parts: Sizes = {"values": ((n, -(-form.k // 2)), torch.uint8), "scale": ((n, groups), torch.bfloat16)}
    return parts if form.symmetric else {**parts, "zero_point": ((n, -(-groups // 2)), torch.uint8)}


def pack(
    parts: Mapping[str, Tensor], shape: tuple[int, int], settings: Mapping[str, Any], layout: str = ""  # noqa: ARG001
) -> tuple[Tensor, str]:  # fmt: skip
    """Canonical weight -> the layout of the kernels here: a uint8 vector, for this process only.

    weight[n, k] = (value[n, k] - zero_point[n, g]) * scale[n, g] with g = k // group.

    Args:
        parts: values uint8 [n, ceil(k / 2)]: integers 0 to 15, two a byte, the one at the even position in the low half; the half
            behind an odd k is 0. scale bfloat16 [n, groups], groups = ceil(k / group), from 2^-126 to 2^124. zero_point uint8
            [n, ceil(groups / 2)], integers 0 to 15, packed as the values are; without it all are 8.
        shape: (n, k), k from 1 to 65536.
        settings: group 32, 64 or 128; activation_bits 8, where x is to be quantized per row, or 16, where it is to stay floating
            point.
    Raises:
        ValueError: wrong dtypes or shapes, another number of bits, or anything else that breaks these rules.
    """
    (n, k), group, bits = shape, settings["group"], settings["activation_bits"]
    check(1 <= k <= MAX_IN_FEATURES, f"int4_pack: in_features is {k}, expected 1 to {MAX_IN_FEATURES}")
    check(group in GROUPS, f"int4_pack: group is {group}, expected 32, 64 or 128")
    groups, zero_point = -(-k // group), parts.get("zero_point")
    values, scale = _nibbles("values", parts["values"], n, k), _scales(parts["scale"], (n, groups))
    zero_point = None if zero_point is None else _nibbles("zero_point", zero_point, n, groups)
    data = native._C.int4_pack(
        values.data_ptr(), scale.data_ptr(), 0 if zero_point is None else zero_point.data_ptr(), n, k, group, bits,
        torch.get_num_threads(),
    )  # fmt: skip
    form = written("groups", n, k, group=group, symmetric=zero_point is None, activation_bits=bits)
    return vector(data), form


def _nibbles(name: str, tensor: Tensor, n: int, count: int) -> Tensor:
    """So many integers of 4 bits in each row, as the kernels read them. In NumPy, which has no threads (fork)."""
    expected = (n, -(-count // 2))
    check(
        tensor.dtype == torch.uint8 and tensor.shape == expected,
        f"int4_pack: {name} is {tensor.dtype} {list(tensor.shape)}, expected uint8 {list(expected)}",
    )
    tensor = tensor.contiguous()
    check(
        count % 2 == 0 or not (tensor.numpy()[:, -1] > 15).any(),
        f"int4_pack: {name} has bits set behind the last of {count} integers, expected zeros",
    )
    return tensor


def _scales(scale: Tensor, shape: tuple[int, int]) -> Tensor:
    check(
        scale.dtype == torch.bfloat16 and scale.shape == shape,
        f"int4_pack: scale is {scale.dtype} {list(scale.shape)}, expected bfloat16 {list(shape)}",
    )
    scale = scale.detach().resolve_neg().contiguous()
    bits = scale.view(torch.int16).numpy().view(np.uint16)
    check(
        bool(((bits >= _SMALLEST_SCALE) & (bits <= _LARGEST_SCALE)).all()),
        "int4_pack: a scale is not between 2^-126 and 2^124, as expected",
    )
    return scale


def unpack(packed: Tensor, form: str) -> dict[str, Tensor]:
    own = parse(form)
    check_operand("int4_unpack", "packed", packed, torch.uint8)
    native.header_of("int4_unpack", "int4", packed, packed.shape[0], own, _CHECKED)
    parts = {name: packed.new_empty(shape, dtype=dtype) for name, (shape, dtype) in sizes(own).items()}
    addresses = [parts[name].data_ptr() if name in parts else 0 for name in ("values", "scale", "zero_point")]
    native._C.int4_unpack(packed.data_ptr(), packed.shape[0], *addresses)
    return parts


def dense(packed: Tensor, form: str) -> Tensor:
    own, parts = parse(form), unpack(packed, form)
    zero_point = parts["zero_point"].numpy() if "zero_point" in parts else None
    zero_points = reference.int4.zero_points(zero_point, *parts["scale"].shape)
    integers, steps = reference.int4.unpack_nibbles(parts["values"].numpy(), own.k), parts["scale"].float().numpy()
    return torch.from_numpy(reference.int4.decompress(integers, steps, zero_points, own.group))


def linear(x: Tensor, packed: Tensor, form: str, bias: Tensor | None, activation: str) -> Tensor:
    check_operand("int4_linear", "packed", packed, torch.uint8)
    return native.linear("int4_linear", x, packed, form, bias, activation, packed.shape[0])
