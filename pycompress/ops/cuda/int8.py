"""int8 weights on CUDA: the GEMM (``csrc/int8/cuda.h``) and, for activations of 16 bits, the weight-only kernels.

The GEMM's layout, ``tiles``, is the same for all its kernels: sums of the channels, then the weights row-major, in whole tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycompress.ops.checks import FLOATS, INT32, activation_code, check, matrix_of, rows_of
from pycompress.ops.cuda import weight_only
from pycompress.ops.cuda.native import (
    address,
    check_devices,
    check_vector,
    native,
    operands,
    scale_in,
    stream_of,
    with_scale,
)
from pycompress.ops.form import parse, written

LAYOUT = "tiles"
# What the quantizer computes in front of the layer: the codes of `Before` in csrc/int8/cuda.h.
BEFORE = {"rms_norm": 1, "layer_norm": 2, "silu_gate": 3, "gelu_gate": 4, "gelu_tanh_gate": 5}
_NOTHING_BEFORE = (0, 0, 0, 0.0, 0, 0)  # code, weight, shift, eps, gate and its row stride


class Layout(NamedTuple):
    """Of a packed weight [n, k] of the GEMM."""

    n: int
    k: int
    activation_bits: int
    bytes: int

    @property
    def size(self) -> int:
        """Bytes of the packed weight."""
        return self.bytes + 4 * self.n


@lru_cache(maxsize=4096)
def _layout(form: str) -> Layout | None:
    """None for the weight-only kernels."""
    of = parse(form)
    return Layout(of.n, of.k, of.activation_bits, of.bytes) if of.layout == LAYOUT else None


def gemm_layout(op: str, form: str) -> Layout:
    """Of a packed weight of the GEMM. Raises ValueError for one of the weight-only kernels."""
    of = _layout(form)
    if of is None:
        raise ValueError(f"{op}: the packed weight's activation_bits is 16, expected 7 or 8: there are no integers")
    return of


def linear(x: Tensor, packed: Tensor, form: str, bias: Tensor | None, activation: str, kernel: str = "") -> Tensor:
    """``ops.int8_linear`` for tensors on a CUDA device; ``kernel``: of the GEMM, one of ``ops.cuda_kernels()``, to force it."""
    if _layout(form) is None:
        return weight_only.linear("int8_linear", x, packed, weight_only.layout(form, 8), bias, activation)
    return _linear("int8_linear", x, _NOTHING_BEFORE, packed, form, bias, activation, kernel)


def fused_linear(
    x: Tensor, before: str, weight: Tensor | None, shift: Tensor | None, eps: float, gate: Tensor | None, packed: Tensor,
    form: str, bias: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    """``ops.int8_fused_linear`` for checked tensors: ``before`` is computed in the quantizer, x is read once."""
    op = "int8_fused_linear"
    check_devices(op, x, weight, shift, gate)
    weight, shift = (None if tensor is None else tensor.contiguous() for tensor in (weight, shift))
    gate, ldg = (None, 0) if gate is None else rows_of(op, gate)
    front = (BEFORE[before], address(weight), address(shift), eps, address(gate), ldg)
    return _linear(op, x, front, packed, form, bias, activation)


def _linear(
    op: str, x: Tensor, front: tuple[float, ...], packed: Tensor, form: str, bias: Tensor | None, activation: str,
    kernel: str = "",
) -> Tensor:  # fmt: skip
    of = gemm_layout(op, form)
    x, ldx, m, y, code = operands(op, x, packed, of[:2], of.size, bias, activation)
    module = native(op, x.device)
    workspace = torch.empty(module.int8_workspace(m, of.k), dtype=torch.uint8, device=x.device)
    kind, device, begin = FLOATS[x.dtype], x.device.index, packed.data_ptr()
    module.int8_linear(
        device, stream_of(device), x.data_ptr(), kind, m, ldx, front, of.n, of.k, of.activation_bits, begin, of.bytes,
        begin + of.bytes, address(bias), code, y.data_ptr(), kind, workspace.data_ptr(), kernel,
    )  # fmt: skip
    return y


# --- packing ----------------------------------------------------------------------------------------------------------


def pack(
    parts: Mapping[str, Tensor], shape: tuple[int, int], settings: Mapping[str, Any], layout: str = ""
) -> tuple[Tensor, str]:
    """``ops.pack`` of tensors on a CUDA device: one layout for each of 7 or 8 and 16 bits. Waits for the device."""
    op, values, (n, k), bits = "int8_pack", parts["values"], shape, settings["activation_bits"]
    check(
        not settings.get("static"),
        f"{op}: the weight is static, expected a dynamic one on CUDA: the kernels there know no range before they look for it",
    )
    module, device = native(op, values.device), values.device.index
    wanted = weight_only.LAYOUT if bits == 16 else LAYOUT
    check(
        layout in ("", wanted),
        f"{op}: layout is {layout!r}, expected none or {wanted!r}: all CUDA kernels read one layout",
    )
    check(bits in (7, 8, 16), f"{op}: activation_bits is {bits}, expected 7, 8 or 16")
    check(
        values.dtype == torch.int8 and values.shape == shape,
        f"{op}: values is {values.dtype} {list(values.shape)}, expected int8 [{n}, {k}]",
    )
    if bits == 16:
        packed = weight_only.pack(op, values, None, None, 8, shape, 0)
    else:
        values = values.contiguous()
        packed = torch.empty(module.int8_packed_bytes(n, k), dtype=torch.uint8, device=values.device)
        refused = torch.zeros(1, dtype=torch.int32, device=values.device)
        module.int8_pack(device, stream_of(device), values.data_ptr(), n, k, packed.data_ptr(), refused.data_ptr())
        check(not refused.item(), f"{op}: a weight is -128, expected -127 to 127 (the scale is symmetric)")
    return with_scale(op, packed, parts["scale"], n), written(wanted, n, k, activation_bits=bits, bytes=packed.numel())


def unpack(packed: Tensor, form: str) -> dict[str, Tensor]:
    """What :func:`pack` was given."""
    op, of = "int8_unpack", _layout(form)
    if of is None:
        few = weight_only.layout(form, 8)
        return {"values": weight_only.unpack(op, packed, few)[0], "scale": scale_in(packed, few.bytes)}
    module, device = native(op, packed.device), packed.device.index
    check_vector(op, "packed", packed, torch.uint8, of.size)
    values = torch.empty((of.n, of.k), dtype=torch.int8, device=packed.device)
    module.int8_unpack(device, stream_of(device), packed.data_ptr(), of.bytes, of.n, of.k, values.data_ptr())
    return {"values": values, "scale": scale_in(packed, of.bytes)}


def dense(packed: Tensor, form: str) -> Tensor:
    """float32 [n, k]."""
    parts = unpack(packed, form)
    return parts["values"].to(torch.float32) * parts["scale"][:, None]


# --- the halves of the GEMM alone, for validation, tests and benchmarks -----------------------------------------------


class Rows(NamedTuple):
    """Quantized rows of x [m, k]: what the kernels hand over, and in it scale float32 [m] and zero point int32 [m]."""

    workspace: Tensor
    scale: Tensor
    zero_point: Tensor


def rows(x: Tensor, ldx: int, activation_bits: int) -> Rows:
    """The quantizer alone, for x [m, k] with row stride ldx."""
    module = native("int8_quantize", x.device)
    (m, k), device = x.shape, x.device.index
    workspace = torch.empty(module.int8_workspace(m, k), dtype=torch.uint8, device=x.device)
    module.int8_quantize(
        device, stream_of(device), x.data_ptr(), FLOATS[x.dtype], m, k, ldx, _NOTHING_BEFORE, activation_bits,
        workspace.data_ptr(),
    )  # fmt: skip
    tail = workspace[workspace.shape[0] - 8 * m :]
    return Rows(workspace, tail[: 4 * m].view(torch.float32), tail[4 * m :].view(torch.int32))


def quantize(x: Tensor, activation_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.int8_quantize`` on a CUDA device."""
    x, ldx = matrix_of("int8_quantize", x)
    workspace, scale, zero_point = rows(x, ldx, activation_bits)
    (m, k), device = x.shape, x.device.index
    q = torch.empty((m, k), dtype=torch.uint8, device=x.device)
    native("int8_quantize", x.device).int8_unsigned_rows(
        device, stream_of(device), workspace.data_ptr(), m, k, q.data_ptr()
    )
    return q, scale.clone(), zero_point.clone()


def multiply(
    of_x: Rows, packed: Tensor, form: str, y: Tensor, bias: Tensor | None = None, activation: str = "none", kernel: str = ""
) -> None:  # fmt: skip
    """The GEMM alone, into y [m, n]; int32 y takes the sums, without scale and bias."""
    op, device = "int8_linear", y.device.index
    of, begin, sums = gemm_layout(op, form), packed.data_ptr(), y.dtype == torch.int32
    check_vector(op, "packed", packed, torch.uint8, of.size)
    native(op, y.device).int8_multiply(
        device, stream_of(device), y.shape[0], of.n, of.k, begin, of.bytes, 0 if sums else begin + of.bytes, address(bias),
        activation_code(op, activation), y.data_ptr(), INT32 if sums else FLOATS[y.dtype], of_x.workspace.data_ptr(), kernel,
    )  # fmt: skip


def accumulate(x: Tensor, packed: Tensor, form: str, kernel: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """``ops.int8_accumulate`` on a CUDA device."""
    op = "int8_accumulate"
    check_devices(op, x, packed)
    x, ldx = matrix_of(op, x)
    of = gemm_layout(op, form)
    check(x.shape[1] == of.k, f"{op}: x is {list(x.shape)}, the packed weight expects k = {of.k}")
    quantized = rows(x, ldx, of.activation_bits)
    acc = torch.empty((x.shape[0], of.n), dtype=torch.int32, device=x.device)
    multiply(quantized, packed, form, acc, kernel=kernel)
    return acc, quantized.scale.clone(), quantized.zero_point.clone()
