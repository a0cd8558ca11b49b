"""The weight-only CUDA kernels (``csrc/weight_only/cuda.h``): int8 and int4 weights, activations in bfloat16 or float16.

Made for 1 to 64 rows; more run too, 64 at a time. What :func:`int8_linear` and its relatives here are given decides between these
kernels and those of :mod:`pycompress.ops.cuda`, by how the weight was packed.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pycompress.ops import cuda
from pycompress.ops.native import FLOATS, MAX_IN_FEATURES, activation_code, check, rows_of

_TYPES = (torch.bfloat16, torch.float16)


@lru_cache(maxsize=4096)
def _workspace(device: int, bits: int, packed_bytes: int, n: int, k: int, kind: int, m: int) -> int:
    size: int = cuda.native("weight_only", None).weight_only_workspace(device, bits, packed_bytes, n, k, kind, m, "", 0)
    return size


def _linear(
    op: str, bits: int, x: Tensor, packed: Tensor, n: int, scale: Tensor | None, bias: Tensor | None, activation: str
) -> Tensor:
    cuda.check_devices(op, x, packed, scale, bias)
    module = cuda.native(op, x.device)
    if x.dtype not in _TYPES:
        raise TypeError(
            f"{op}: x is {x.dtype}, expected bfloat16 or float16 on a CUDA device for activations of 16 bits"
        )
    x, ldx = rows_of(op, x)
    code = activation_code(op, activation)
    cuda.check_vector(op, "packed", packed, torch.uint8)
    if bias is not None:
        cuda.check_vector(op, "bias", bias, torch.float32, n)
    k = x.shape[-1]
    m = x.numel() // k if k else 0
    y = x.new_empty((*x.shape[:-1], n))
    kind, device = FLOATS[x.dtype], x.device.index
    size = _workspace(device, bits, packed.shape[0], n, k, kind, m) if m else 0
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device) if size else None
    module.weight_only_linear(
        device, cuda.stream_of(device), bits, x.data_ptr(), kind, m, k, ldx, packed.data_ptr(), packed.shape[0], n,
        0 if scale is None else scale.data_ptr(), 0 if bias is None else bias.data_ptr(), code, y.data_ptr(),
        0 if workspace is None else workspace.data_ptr(), "", 0,
    )  # fmt: skip
    return y


# --- int8 -------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _int8_bytes(n: int, k: int) -> int:
    size: int = cuda.native("int8_linear").weight_only_packed_bytes(8, n, k, 0, True)
    return size


def _is_weight_only(packed: Tensor, n: int, k: int) -> bool:
    """Whether an int8 weight [n, k] was packed for activations of 16 bits: no other has this length."""
    return packed.numel() == _int8_bytes(n, k)


def int8_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``ops.int8_linear`` for tensors on a CUDA device."""
    cuda.check_devices("int8_linear", x, packed, scale, bias)
    n, k = (tensor.shape[-1] if tensor.dim() else 0 for tensor in (scale, x))
    if not _is_weight_only(packed, n, k):
        return cuda.int8_linear(x, packed, scale, bias, activation)
    cuda.check_vector("int8_linear", "scale", scale, torch.float32)
    return _linear("int8_linear", 8, x, packed, n, scale, bias, activation)


def int8_pack(values: Tensor, activation_bits: int, kernel: str = "") -> Tensor:
    """``ops.int8_pack`` on a CUDA device: one layout for each of 7 or 8 and 16 bits, so no kernel can be named. Waits for it."""
    if activation_bits != 16:
        return cuda.int8_pack(values, activation_bits, kernel)
    op = "int8_pack"
    module = cuda.native(op, values.device)
    check(kernel == "", f"{op}: kernel is {kernel!r}, expected none: all CUDA kernels read one layout")
    check(
        values.dtype == torch.int8
        and values.dim() == 2
        and values.shape[0] > 0
        and 1 <= values.shape[1] <= MAX_IN_FEATURES,
        f"{op}: values is {values.dtype} {list(values.shape)}, expected int8 [n > 0, 1 to {MAX_IN_FEATURES}]",
    )
    values = values.contiguous()
    (n, k), device = values.shape, values.device.index
    packed = values.new_zeros(module.weight_only_packed_bytes(8, n, k, 0, True), dtype=torch.uint8)
    refused = torch.zeros(1, dtype=torch.int32, device=values.device)
    module.weight_only_pack(
        device, cuda.stream_of(device), 8, values.data_ptr(), 0, 0, n, k, 0, packed.data_ptr(), refused.data_ptr()
    )
    check(not refused.item(), f"{op}: a weight is -128, expected -127 to 127 (the scale is symmetric)")
    return packed


def int8_unpack(packed: Tensor, n: int, k: int) -> Tensor:
    """``ops.int8_unpack`` on a CUDA device."""
    if not _is_weight_only(packed, n, k):
        return cuda.int8_unpack(packed, n, k)
    module, device = cuda.native("int8_unpack", packed.device), packed.device.index
    cuda.check_vector("int8_unpack", "packed", packed, torch.uint8)
    values = packed.new_empty((n, k), dtype=torch.int8)
    module.weight_only_unpack(
        device, cuda.stream_of(device), 8, packed.data_ptr(), packed.shape[0], n, k, 0, values.data_ptr(), 0, 0
    )
    return values


# --- int4 -------------------------------------------------------------------------------------------------------------


def int4_linear(x: Tensor, packed: Tensor, n: int, bias: Tensor | None, activation: str) -> Tensor:
    """``ops.int4_linear`` for tensors on a CUDA device."""
    return _linear("int4_linear", 4, x, packed, n, None, bias, activation)


def int4_pack(
    values: Tensor, scale: Tensor, zero_point: Tensor | None, k: int, group: int, activation_bits: int
) -> Tensor:
    """``ops.int4_pack`` on a CUDA device, for activations of 16 bits. The tensors are those of a checked canonical weight."""
    op = "int4_pack"
    module = cuda.native(op, values.device)
    check(
        activation_bits == 16,
        f"{op}: activation_bits is {activation_bits}, expected 16 on a CUDA device: its kernels keep activations in floating point",
    )
    cuda.check_devices(op, values, scale, zero_point)
    n, groups = values.shape[0], -(-k // group)
    for name, tensor, dtype, size in (
        ("values", values, torch.uint8, (n, -(-k // 2))),
        ("scale", scale, torch.bfloat16, (n, groups)),
        ("zero_point", zero_point, torch.uint8, (n, -(-groups // 2))),
    ):
        check(
            tensor is None or (tensor.dtype == dtype and tensor.shape == size),
            f"{op}: {name} is {_brief(tensor)}, expected {dtype} {list(size)}",
        )
    values, scale = values.contiguous(), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    device = values.device.index
    packed = values.new_zeros(module.weight_only_packed_bytes(4, n, k, group, zero_point is None))
    module.weight_only_pack(
        device, cuda.stream_of(device), 4, values.data_ptr(), scale.data_ptr(),
        0 if zero_point is None else zero_point.data_ptr(), n, k, group, packed.data_ptr(), 0,
    )  # fmt: skip
    return packed


def _brief(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def int4_unpack(packed: Tensor, n: int, k: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.int4_unpack`` on a CUDA device."""
    module, device = cuda.native("int4_unpack", packed.device), packed.device.index
    cuda.check_vector("int4_unpack", "packed", packed, torch.uint8)
    groups = -(-k // group)
    values = packed.new_empty((n, -(-k // 2)))
    scale = packed.new_empty((n, groups), dtype=torch.bfloat16)
    zero_point = packed.new_empty((n, 0 if symmetric else -(-groups // 2)))
    module.weight_only_unpack(
        device, cuda.stream_of(device), 4, packed.data_ptr(), packed.shape[0], n, k, group, values.data_ptr(),
        scale.data_ptr(), 0 if symmetric else zero_point.data_ptr(),
    )  # fmt: skip
    return values, scale, zero_point


def int4_dense(packed: Tensor, n: int, k: int) -> Tensor:
    """``ops.int4_dense`` on a CUDA device."""
    group, symmetric = cuda.native("int4_dense", packed.device).weight_only_int4_of(packed.shape[0], n, k)
    values, scale, zero_point = int4_unpack(packed, n, k, group, symmetric)
    integers = _nibbles(values, k)
    if symmetric:
        return (integers - 8) * _of_positions(scale.float(), group, k)
    zero_points = _nibbles(zero_point, scale.shape[1])
    return (integers - _of_positions(zero_points, group, k)) * _of_positions(scale.float(), group, k)


def _nibbles(packed: Tensor, count: int) -> Tensor:
    """float32 [n, count] from integers of 4 bits, two a byte, the first in the low half."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, :count].float()


def _of_positions(of_groups: Tensor, group: int, k: int) -> Tensor:
    return of_groups.repeat_interleave(group, dim=1)[:, :k]
