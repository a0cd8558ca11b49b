"""2:4 sparse weights on CUDA (``csrc/sparse/structured.h``): the tensor cores skip two of each four products.

The packed weight is uint8 [1, k, row], made on the device. NaN or Inf in x may show in channels that have no weight for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress.ops import cuda, cuda_tiles
from pycompress.ops.native import check


def linear(
    x: Tensor, packed: Tensor, n: int, scale: Tensor | None, bias: Tensor | None, activation: str, kernel: str = ""
) -> Tensor:
    """``ops.sparse_linear`` for tensors on one CUDA device, packed uint8 [1, k, row]; kernel: a name, to force it."""
    return cuda_tiles.linear("structured_linear", x, packed, n, scale, bias, activation, kernel)


def accumulate(x: Tensor, ldx: int, packed: Tensor, kernel: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """``ops.sparse_accumulate`` for tensors on one CUDA device. Waits for it."""
    return cuda_tiles.accumulate("structured_linear", x, ldx, packed, kernel)


def _scattered(mask: Tensor, values: Tensor, k: int) -> Tensor:
    """[n, k] of the values' dtype, with zeros where the mask, uint8 [n, ceil(k / 8)], has none."""
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    kept = (mask[:, :, None] >> bits & 1).flatten(1)[:, :k].bool()
    return values.new_zeros(kept.shape).masked_scatter_(kept, values)


def pack(mask: Tensor, values: Tensor, k: int, activation_bits: int, device: torch.device) -> Tensor:
    """uint8 [1, k, row] on a CUDA device. Waits for it.

    Args:
        mask, values: checked, bfloat16, float16 or int8 values, as many as the mask has bits; on any device.
        activation_bits: 7 or 8 for int8 values, 0 else.
    Raises:
        ValueError: a group of four has more than two weights.
    """
    op, n, element = "sparse_pack", mask.shape[0], cuda_tiles.ELEMENTS[values.dtype]
    module = cuda.native(op, device)
    wide = values.to(device, torch.int8 if values.dtype is torch.int8 else torch.float32)
    dense = _scattered(mask.to(device), wide, k)
    packed = torch.empty(module.structured_packed_bytes(n, k, element), dtype=torch.uint8, device=device)
    refused = torch.zeros(1, dtype=torch.int32, device=device)
    module.structured_pack(
        packed.device.index, cuda.stream_of(packed.device.index), dense.data_ptr(), n, k, element, activation_bits,
        packed.data_ptr(), refused.data_ptr(),
    )  # fmt: skip
    check(  # that all values are numbers of their type has been seen to
        not refused.item(),
        f"{op}: four consecutive input features have more than two non-zeros, expected at most two for the format structured",
    )
    return packed.view(1, k, -1)


def dense(packed: Tensor, n: int, k: int) -> Tensor:
    """float32 or int8 [n, k]."""
    return cuda_tiles.dense("structured_unpack", packed, n, k)
