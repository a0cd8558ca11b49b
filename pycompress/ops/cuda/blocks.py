"""Block sparse weights on CUDA (``csrc/sparse/blocks/cuda.h``): only those of its square blocks are there that have weights.

The packed weight is made on the host. Zeros within a block are multiplied: NaN or Inf in x shows in all channels of the blocks that
meet it.
"""

from __future__ import annotations

from torch import Tensor

from pycompress.ops.checks import vector
from pycompress.ops.cuda.native import native
from pycompress.ops.cuda.sparse_layout import ELEMENTS

SIZES = (64, 32, 16)


def pack(mask: Tensor, values: Tensor, k: int, block: int) -> tuple[Tensor, dict[str, int]]:
    """The buffer on the CPU, of a checked mask and bfloat16, float16 or int8 values, there too; and what its form says of it.

    Args:
        block: one of SIZES.
    """
    data, stored = native("sparse_pack").blocks_pack(
        mask.data_ptr(), values.data_ptr(), values.numel(), ELEMENTS[values.dtype], block, mask.shape[0], k
    )
    return vector(data), {"block": block, "stored": stored}
