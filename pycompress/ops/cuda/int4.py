"""int4 weights on CUDA: the weight-only kernels, for activations of 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pycompress.ops.checks import check
from pycompress.ops.cuda import weight_only
from pycompress.ops.cuda.native import check_devices
from pycompress.ops.form import written


def linear(x: Tensor, packed: Tensor, form: str, bias: Tensor | None, activation: str) -> Tensor:
    """``ops.int4_linear`` for tensors on a CUDA device."""
    return weight_only.linear("int4_linear", x, packed, weight_only.layout(form, 4), bias, activation)


def pack(
    parts: Mapping[str, Tensor], shape: tuple[int, int], settings: Mapping[str, Any], layout: str = ""
) -> tuple[Tensor, str]:
    """``ops.pack`` of tensors on a CUDA device, those of a checked canonical weight."""
    op, bits, group, (n, k) = "int4_pack", settings["activation_bits"], settings["group"], shape
    check(
        layout in ("", weight_only.LAYOUT),
        f"{op}: layout is {layout!r}, expected none or {weight_only.LAYOUT!r} on CUDA",
    )
    check(
        bits == 16,
        f"{op}: activation_bits is {bits}, expected 16 on a CUDA device: its kernels keep activations in floating point",
    )
    values, scale, zero_point = parts["values"], parts["scale"], parts.get("zero_point")
    check_devices(op, values, scale, zero_point)
    groups = -(-k // group)
    for name, tensor, dtype, size in (
        ("values", values, torch.uint8, (n, -(-k // 2))),
        ("scale", scale, torch.bfloat16, (n, groups)),
        ("zero_point", zero_point, torch.uint8, (n, -(-groups // 2))),
    ):
        check(
            tensor is None or (tensor.dtype == dtype and tensor.shape == size),
            f"{op}: {name} is {None if tensor is None else (tensor.dtype, list(tensor.shape))}, expected {dtype} {list(size)}",
        )
    packed = weight_only.pack(op, values, scale, zero_point, 4, shape, group)
    sizes = {"group": group, "symmetric": zero_point is None, "activation_bits": 16, "bytes": packed.numel()}
    return packed, written(weight_only.LAYOUT, n, k, **sizes)


def unpack(packed: Tensor, form: str) -> dict[str, Tensor]:
    """What :func:`pack` was given."""
    of = weight_only.layout(form, 4)
    values, scale, zero_point = weight_only.unpack("int4_unpack", packed, of)
    return {"values": values, "scale": scale, **({} if of.symmetric else {"zero_point": zero_point})}


def dense(packed: Tensor, form: str) -> Tensor:
    """float32 [n, k]."""
    of, parts = weight_only.layout(form, 4), unpack(packed, form)

    def spread(of_groups: Tensor) -> Tensor:
        return of_groups.float().repeat_interleave(of.group, dim=1)[:, : of.k]

    zero_point = 8 if of.symmetric else spread(_nibbles(parts["zero_point"], parts["scale"].shape[1]))
    return (_nibbles(parts["values"], of.k) - zero_point) * spread(parts["scale"])


def _nibbles(packed: Tensor, count: int) -> Tensor:
    """float32 [n, count] from integers of 4 bits, two a byte, the first in the low half."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, :count].float()
