"""Unstructured sparse weights on CUDA (``csrc/sparse/bitmap/cuda.h``): bfloat16 or float16 values under a bitmap, for few rows.

Made for 1 to 32 rows; more run too, 32 at a time. The packed weight is made on the host.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pycompress.ops.checks import FLOATS, vector
from pycompress.ops.cuda.native import address, native, operands, room, stream_of
from pycompress.ops.cuda.sparse_layout import ELEMENTS, Layout


@lru_cache(maxsize=4096)
def _workspace(device: int, shape: tuple[int, ...], m: int) -> int:
    size: int = native("sparse_linear").bitmap_workspace(device, shape, m, "", 0)
    return size


def linear(x: Tensor, packed: Tensor, of: Layout, bias: Tensor | None, activation: str) -> Tensor:
    """``ops.sparse_linear`` for tensors on a CUDA device."""
    op = "sparse_linear"
    x, ldx, m, y, code = operands(op, x, packed, (of.n, of.k), of.size, bias, activation, of.element)
    if m == 0:
        return y
    device = x.device.index
    workspace = room(_workspace(device, of.shape, m), x.device)
    native(op, x.device).bitmap_linear(
        device, stream_of(device), of.shape, x.data_ptr(), FLOATS[x.dtype], m, ldx, packed.data_ptr(), address(bias), code,
        y.data_ptr(), address(workspace), "", 0,
    )  # fmt: skip
    return y


def pack(mask: Tensor, values: Tensor, k: int) -> tuple[Tensor, dict[str, int]]:
    """The buffer on the CPU, of a checked mask and its bfloat16 or float16 values, there too; and what its form says of it.

    Raises:
        ValueError: the number of values is not that of the mask's bits.
    """
    data, unit_bytes = native("sparse_pack").bitmap_pack(
        mask.data_ptr(), values.data_ptr(), values.numel(), ELEMENTS[values.dtype], mask.shape[0], k
    )
    return vector(data), {"unit_bytes": unit_bytes}


def matrix(packed: Tensor, of: Layout) -> Tensor:
    """The weight with its zeros, float32 [n, k]."""
    weight = torch.empty((of.n, of.k), dtype=torch.float32, device=packed.device)
    device = packed.device.index
    native("sparse_dense", packed.device).bitmap_unpack(
        device, stream_of(device), of.shape, packed.data_ptr(), weight.data_ptr()
    )
    return weight
