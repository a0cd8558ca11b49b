"""The sparse CUDA kernels (``csrc/sparse/cuda.h``): float32 weights whose values are all bfloat16 or all float16 numbers.

The canonical weight is float32 everywhere; on a device its values stand in 16 bits, which loses nothing, because packing refuses
weights that would have to be rounded. So a layer runs there where it was made from a layer in bfloat16 or float16, and moves
back as it came. Made for 1 to 32 rows; more run too, 32 at a time.
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
    is_packed = packed.dtype is torch.uint8 and packed.dim() == 2 and packed.is_contiguous() and packed.shape[0] == k
    check(
        is_packed and k > 0,
        f"{op}: packed is {packed.dtype} {list(packed.shape)}, expected for k = {k} what sparse_pack returns on a CUDA device: "
        f"uint8 [{k}, ...]",
    )
    return _HALVES[cuda.native(op).sparse_type(packed.numel(), k)]


def linear(x: Tensor, packed: Tensor, n: int, scale: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    """``ops.sparse_linear`` for tensors on a CUDA device."""
    op = "sparse_linear"
    cuda.check_devices(op, x, packed, scale, bias)
    module = cuda.native(op, x.device)
    check(scale is None, f"{op}: there is a scale, expected None on a CUDA device: its sparse weights are float32")
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
    """The packed weight, uint8 [k, ...], on the CPU still, of a mask and float32 values that ``ops.sparse`` has checked.

    Raises:
        ValueError: a value that neither bfloat16 nor float16 has; the number of values is not that of the mask's bits.
    """
    op = "sparse_pack"
    halves = {dtype: values.to(dtype) for dtype in _HALVES.values()}
    bits = values.view(torch.int32)
    exact = [dtype for dtype, half in halves.items() if torch.equal(half.to(torch.float32).view(torch.int32), bits)]
    check(
        bool(exact),
        f"{op}: values are float32, expected bfloat16 or float16 numbers on a CUDA device, where nothing is rounded: "
        "compress the model in one of these types",
    )
    half = halves[exact[0]]
    data = cuda.native(op).sparse_pack(
        mask.data_ptr(), half.data_ptr(), half.numel(), FLOATS[half.dtype], mask.shape[0], k
    )
    return vector(data).view(k, -1)


def dense(packed: Tensor, n: int, k: int, bits: int) -> Tensor:
    """``ops.sparse_dense`` on a CUDA device."""
    op = "sparse_dense"
    check(bits == 32, f"{op}: bits is {bits}, expected 32 on a CUDA device")
    _dtype(op, packed, k)
    weight = torch.empty((n, k), dtype=torch.float32, device=packed.device)
    device = packed.device.index
    cuda.native(op, packed.device).sparse_dense(
        device, cuda.stream_of(device), packed.data_ptr(), packed.numel(), n, k, weight.data_ptr()
    )
    return weight


def unpack(packed: Tensor, n: int, k: int, nnz: int, bits: int) -> tuple[Tensor, Tensor]:
    """``ops.sparse_unpack`` on a CUDA device. Waits for it."""
    weight = dense(packed, n, k, bits)
    kept = weight != 0
    values, padded = weight[kept], torch.nn.functional.pad(kept, (0, -k % 8))
    check(values.numel() == nnz, f"sparse_unpack: nnz is {nnz}, the packed weight has {values.numel()}")
    digits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    return (padded.view(n, -1, 8) * digits).sum(2, dtype=torch.uint8), values
