"""The mean of a sentence's tokens, on the CPU (``csrc/pool``)."""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress.ops.cpu import native
from pycompress.reference import pool as twin


def pool(x: Tensor, mask: Tensor | None, normalize: bool) -> Tensor:
    y = x.new_empty((x.shape[0], x.shape[2]))
    if _pool_into(x, mask, normalize, y):
        return y
    plain = None if mask is None else mask.to(torch.float32)
    return y if _pool_into(x.contiguous(), plain, normalize, y) else y.copy_(twin.pool(x, mask, normalize))


def _pool_into(x: Tensor, mask: Tensor | None, normalize: bool, y: Tensor) -> bool:
    """Writes to y; False where the kernels do not read such tensors."""
    threads = torch.get_num_threads()
    return native.reads_tensors and bool(native._C.pool_tensors(x, mask, normalize, y, threads))
