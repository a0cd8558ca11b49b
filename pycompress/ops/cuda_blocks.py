"""Block sparse weights on CUDA (``csrc/sparse/blocks.h``): of its square blocks of 64, 32 or 16, only those with weights are there.

The packed weight is uint8 [1, 1, k, row], made on the host; the size of its blocks is a code in ``row``. Zeros within a block are
multiplied: NaN or Inf in x shows in all channels of the blocks that meet it.
"""

from __future__ import annotations

from torch import Tensor

from pycompress.ops import cuda, cuda_tiles
from pycompress.ops.native import check, vector

SIZES = (64, 32, 16)  # row // 4 % 4 says which


def block_of(packed: Tensor) -> int:
    """64, 32 or 16. Raises ValueError where it is no such weight."""
    code = packed.shape[-1] // 4 % 4
    check(code < len(SIZES), f"packed sparse weight: {list(packed.shape)} is none that sparse_pack returns")
    return SIZES[code]


def linear(
    x: Tensor, packed: Tensor, n: int, scale: Tensor | None, bias: Tensor | None, activation: str, kernel: str = ""
) -> Tensor:
    """``ops.sparse_linear`` for tensors on one CUDA device, packed uint8 [1, 1, k, row]; kernel: a name, to force it."""
    return cuda_tiles.linear("blocks_linear", x, packed, n, scale, bias, activation, kernel)


def accumulate(x: Tensor, ldx: int, packed: Tensor, kernel: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """``ops.sparse_accumulate`` for tensors on one CUDA device. Waits for it."""
    return cuda_tiles.accumulate("blocks_linear", x, ldx, packed, kernel)


def pack(mask: Tensor, values: Tensor, k: int, activation_bits: int, block: int) -> Tensor:
    """uint8 [1, 1, k, row] on the CPU, of a checked mask and bfloat16, float16 or int8 values, there too.

    Args:
        activation_bits: 7 or 8 for int8 values, 0 else.
        block: one of SIZES.
    """
    data = cuda.native("sparse_pack").blocks_pack(
        mask.data_ptr(), values.data_ptr(), values.numel(), cuda_tiles.ELEMENTS[values.dtype], block, activation_bits,
        mask.shape[0], k,
    )  # fmt: skip
    return vector(data).view(1, 1, k, -1)


def dense(packed: Tensor, n: int, k: int) -> Tensor:
    """float32 or int8 [n, k]."""
    return cuda_tiles.dense("blocks_unpack", packed, n, k)
