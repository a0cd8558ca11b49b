"""2:4 sparse weights on CUDA (``csrc/sparse/structured/cuda.h``): the tensor cores skip two of each four products.

The packed weight is made on the device. NaN or Inf in x may show in channels that have no weight for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress.ops.checks import check
from pycompress.ops.cuda.native import native, stream_of
from pycompress.ops.cuda.sparse_layout import ELEMENTS


def _scattered(mask: Tensor, values: Tensor, k: int) -> Tensor:
    """[n, k] of the values' dtype, with zeros where the mask, uint8 [n, ceil(k / 8)], has none."""
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    kept = (mask[:, :, None] >> bits & 1).flatten(1)[:, :k].bool()
    return values.new_zeros(kept.shape).masked_scatter_(kept, values)


def pack(mask: Tensor, values: Tensor, k: int) -> Tensor:
    """The buffer on the tensors' CUDA device. Waits for it.

    Args:
        mask, values: checked, bfloat16, float16 or int8 values, as many as the mask has bits.
    Raises:
        ValueError: a group of four has more than two weights.
    """
    op, n, element, device = "sparse_pack", mask.shape[0], ELEMENTS[values.dtype], mask.device
    module = native(op, device)
    dense = _scattered(mask, values if values.dtype is torch.int8 else values.float(), k)
    packed = torch.empty(module.structured_packed_bytes((n, k, element)), dtype=torch.uint8, device=device)
    refused = torch.zeros(1, dtype=torch.int32, device=device)
    module.structured_pack(
        device.index, stream_of(device.index), (n, k, element), dense.data_ptr(), packed.data_ptr(), refused.data_ptr()
    )
    check(  # that all values are numbers of their type has been seen to
        not refused.item(),
        f"{op}: four consecutive input features have more than two non-zeros, expected at most two for the layout structured",
    )
    return packed
