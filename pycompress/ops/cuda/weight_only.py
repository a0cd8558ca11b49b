"""The weight-only kernels (``csrc/weight_only/cuda.h``), which int8 and int4 weights share: activations in bfloat16 or float16.

Made for 1 to 64 rows; more run too, 64 at a time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pycompress.ops.checks import FLOATS, MAX_IN_FEATURES, check
from pycompress.ops.cuda.native import address, check_halves, check_vector, native, operands, room, stream_of
from pycompress.ops.form import parse

LAYOUT = "weight_only"


class Layout(NamedTuple):
    """Of a packed weight [n, k]; ``group`` is 0 for int8, which has a scale for each channel behind the buffer."""

    bits: int
    n: int
    k: int
    group: int
    symmetric: bool
    bytes: int

    @property
    def size(self) -> int:
        """Bytes of the packed weight."""
        return self.bytes + (4 * self.n if self.bits == 8 else 0)


@lru_cache(maxsize=4096)
def layout(form: str, bits: int) -> Layout:
    """Of a form of int8 or int4 weights."""
    of = parse(form)
    group, symmetric = (of.group, bool(of.symmetric)) if bits == 4 else (0, True)
    return Layout(bits, of.n, of.k, group, symmetric, of.bytes)


@lru_cache(maxsize=4096)
def _workspace(device: int, of: Layout, kind: int, m: int) -> int:
    size: int = native(LAYOUT).weight_only_workspace(device, of[:5], kind, m, "", 0)
    return size


def linear(op: str, x: Tensor, packed: Tensor, of: Layout, bias: Tensor | None, activation: str) -> Tensor:
    """``ops.<op>`` for tensors on a CUDA device."""
    x, ldx, m, y, code = operands(op, x, packed, of[1:3], of.size, bias, activation)
    check_halves(op, x, " for activations of 16 bits")
    if m == 0:
        return y
    kind, device, begin = FLOATS[x.dtype], x.device.index, packed.data_ptr()
    workspace = room(_workspace(device, of, kind, m), x.device)
    native(op, x.device).weight_only_linear(
        device, stream_of(device), of[:5], x.data_ptr(), kind, m, ldx, begin, of.bytes,
        begin + of.bytes if of.bits == 8 else 0, address(bias), code, y.data_ptr(), address(workspace), "", 0,
    )  # fmt: skip
    return y


def pack(
    op: str, values: Tensor, scale: Tensor | None, zero_point: Tensor | None, bits: int, shape: tuple[int, int], group: int
) -> Tensor:  # fmt: skip
    """The kernel's buffer of canonical tensors on a CUDA device. Waits for it."""
    module, (n, k), device = native(op, values.device), shape, values.device.index
    check(n > 0 and 1 <= k <= MAX_IN_FEATURES, f"{op}: the weight is {n}x{k}, expected [n > 0, 1 to {MAX_IN_FEATURES}]")
    of = (bits, n, k, group, zero_point is None)
    values = values.contiguous()
    scale, zero_point = (None if tensor is None else tensor.contiguous() for tensor in (scale, zero_point))
    size = module.weight_only_packed_bytes(of)
    packed = torch.zeros(size, dtype=torch.uint8, device=values.device)
    refused = torch.zeros(1, dtype=torch.int32, device=values.device)
    module.weight_only_pack(
        device, stream_of(device), of, values.data_ptr(), address(scale), address(zero_point),
        packed.data_ptr(), refused.data_ptr(),
    )  # fmt: skip
    check(not refused.item(), f"{op}: a weight is -128, expected -127 to 127 (the scale is symmetric)")
    return packed


def unpack(op: str, packed: Tensor, of: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`pack` was given; no scales for int8, no zero points where there are none."""
    module, device = native(op, packed.device), packed.device.index
    check_vector(op, "packed", packed, torch.uint8, of.size)
    groups = -(-of.k // of.group) if of.group else 0
    values = (
        packed.new_empty((of.n, of.k), dtype=torch.int8) if of.bits == 8 else packed.new_empty((of.n, -(-of.k // 2)))
    )
    scale = packed.new_empty((of.n, groups), dtype=torch.bfloat16)
    zero_point = packed.new_empty((of.n, 0 if of.symmetric else -(-groups // 2)))
    module.weight_only_unpack(
        device, stream_of(device), of[:5], packed.data_ptr(), of.bytes, values.data_ptr(), scale.data_ptr(),
        zero_point.data_ptr(),
    )  # fmt: skip
    return values, scale, zero_point
