"""What 2:4 and block sparse weights on CUDA have in common: tiles for the tensor cores, of bfloat16, float16 or int8 values.

int8: the rows of x are quantized first, in a launch of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress.ops.checks import FLOATS, INT32, check, matrix_of
from pycompress.ops.cuda import int8
from pycompress.ops.cuda.native import address, aligned_rows, native, operands, room, stream_of
from pycompress.ops.cuda.sparse_layout import Layout


def _multiply(
    x: Tensor, ldx: int, packed: Tensor, of: Layout, y: Tensor, bias: Tensor | None, activation: int, kernel: str
) -> None:  # fmt: skip
    """Calls the native function on x [..., k] with row stride ldx; y int32 takes the sums of int8, without a scale."""
    module, device = native("sparse_linear", x.device), x.device.index
    m, kind, begin, sums = x.numel() // of.k, FLOATS[x.dtype], packed.data_ptr(), y.dtype is torch.int32
    workspace = room(module.int8_workspace(m, of.k) if of.is_int8 else 0, x.device)
    if not of.is_int8:
        x, ldx = aligned_rows(x, ldx)
    getattr(module, f"{of.kernels}_linear")(
        device, stream_of(device), of.shape, of.activation_bits, x.data_ptr(), kind, m, ldx, begin, of.bytes,
        begin + of.bytes if of.is_int8 and not sums else 0, address(bias), activation, y.data_ptr(),
        INT32 if sums else kind, address(workspace), kernel,
    )  # fmt: skip


def linear(x: Tensor, packed: Tensor, of: Layout, bias: Tensor | None, activation: str, kernel: str = "") -> Tensor:
    """``ops.sparse_linear`` for tensors on a CUDA device; kernel: a name, to force it."""
    dtype = None if of.is_int8 else of.element
    x, ldx, m, y, code = operands("sparse_linear", x, packed, (of.n, of.k), of.size, bias, activation, dtype)
    if m:
        _multiply(x, ldx, packed, of, y, bias, code, kernel)
    return y


def accumulate(x: Tensor, packed: Tensor, of: Layout, kernel: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """``ops.sparse_accumulate`` on a CUDA device."""
    op = "sparse_accumulate"
    check(of.is_int8, f"{op}: the packed weight is float32, expected int8")
    x, ldx = matrix_of(op, x)
    operands(op, x, packed, (of.n, of.k), of.size, None, "none")
    rows = int8.rows(x, ldx, of.activation_bits)
    acc = torch.empty((x.shape[0], of.n), dtype=torch.int32, device=x.device)
    _multiply(x, ldx, packed, of, acc, None, 0, kernel)
    return acc, rows.scale.clone(), rows.zero_point.clone()


def matrix(packed: Tensor, of: Layout) -> Tensor:
    """The stored values and their zeros, float32 or int8 [n, k]."""
    dtype = torch.int8 if of.is_int8 else torch.float32
    weight, device = torch.empty((of.n, of.k), dtype=dtype, device=packed.device), packed.device.index
    unpack = getattr(native("sparse_dense", packed.device), f"{of.kernels}_unpack")
    unpack(device, stream_of(device), of.shape, packed.data_ptr(), of.bytes, weight.data_ptr())
    return weight
