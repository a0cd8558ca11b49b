"""Unstructured sparse weights on CUDA (``csrc/sparse/cuda.h``): bfloat16 or float16 values under a bitmap, for few rows.

Made for 1 to 32 rows; more run too, 32 at a time. The packed weight is uint8 [k, row].
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pycompress.ops import cuda
from pycompress.ops.native import FLOATS, activation_code, check, rows_of, vector

_HALVES = {FLOATS[dtype]: dtype for dtype in (torch.bfloat16, torch.float16)}


@lru_cache(maxsize=4096)
def _workspace(device: int, packed_bytes: int, n: int, k: int, m: int) -> int:
    size: int = cuda.native("sparse_linear").sparse_workspace(device, packed_bytes, n, k, m, "", 0)
    return size


def _dtype(op: str, packed: Tensor, k: int) -> torch.dtype:
    """Of the values of a packed weight with k input features. Raises ValueError where it is none."""
    check(
        packed.is_contiguous() and packed.shape[0] == k > 0,
        f"{op}: packed is {packed.dtype} {list(packed.shape)}, expected for k = {k} what sparse_pack returns on a CUDA device: "
        f"uint8 [{k}, ...]",
    )
    return _HALVES[cuda.native(op).sparse_type(packed.numel(), k)]


def linear(x: Tensor, packed: Tensor, n: int, scale: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    """``ops.sparse_linear`` for tensors on one CUDA device, packed uint8 [k, row]."""
    op = "sparse_linear"
    module = cuda.native(op, x.device)
    check(scale is None, f"{op}: there is a scale, expected None: the packed weight is float32")
    x, ldx = rows_of(op, x)
    k = x.shape[-1]
    dtype = _dtype(op, packed, k)
    if x.dtype is not dtype:
        raise TypeError(f"{op}: x is {x.dtype}, expected {dtype} as the values of the packed weight")
    code = activation_code(op, activation)
    if bias is not None:
        cuda.check_vector(op, "bias", bias, torch.float32, n)
    m = x.numel() // k
    y = x.new_empty((*x.shape[:-1], n))
    if m == 0:
        return y
    kind, device, packed_bytes = FLOATS[dtype], x.device.index, packed.numel()
    size = _workspace(device, packed_bytes, n, k, m)
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device) if size else None
    module.sparse_linear(
        device, cuda.stream_of(device), x.data_ptr(), kind, m, k, ldx, packed.data_ptr(), packed_bytes, n,
        0 if bias is None else bias.data_ptr(), code, y.data_ptr(), 0 if workspace is None else workspace.data_ptr(),
        "", 0,
    )  # fmt: skip
    return y


def pack(mask: Tensor, values: Tensor, k: int) -> Tensor:
    """uint8 [k, row] on the CPU, of a checked mask and its bfloat16 or float16 values, there too.

    Raises:
        ValueError: the number of values is not that of the mask's bits.
    """
    data = cuda.native("sparse_pack").sparse_pack(
        mask.data_ptr(), values.data_ptr(), values.numel(), FLOATS[values.dtype], mask.shape[0], k
    )
    return vector(data).view(k, -1)


def dense(packed: Tensor, n: int, k: int) -> Tensor:
    """float32 [n, k]."""
    op = "sparse_dense"
    _dtype(op, packed, k)
    weight = torch.empty((n, k), dtype=torch.float32, device=packed.device)
    device = packed.device.index
    cuda.native(op, packed.device).sparse_dense(
        device, cuda.stream_of(device), packed.data_ptr(), packed.numel(), n, k, weight.data_ptr()
    )
    return weight
