"""The low-rank CUDA kernels (``csrc/low_rank/cuda.h``): float32 factors, rounded to bfloat16 for the product alone.

A packed value is in two halves: the bfloat16 nearest to it, ties away from zero, which the kernels read, and the low 16 bits of the
float32, with which it is restored exactly. Both halves are matrices of whole blocks, zero filled: down, then up.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pycompress.ops import cuda
from pycompress.ops.native import FLOATS, activation_code, check, rows_of

_TYPES = (torch.bfloat16, torch.float16)
_TILE, _STEP, _PAD_N, _FEW = 16, 64, 128, 32  # kTile, kStep, kPadN, kMaxRows


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _shapes(n: int, k: int, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of the packed down and up."""
    across = _up(rank, _STEP)
    return (across, _up(k, _STEP)), (_up(n, _PAD_N), across)


def _row(n: int, k: int, rank: int) -> int:
    """Bytes of a row of the packed weight, of which there are k: others for each rank in whole tiles."""
    (across, k_pad), (n_pad, _) = _shapes(n, k, rank)
    return -(-4 * across * (k_pad + n_pad) // k) + _up(rank, _TILE) % _STEP // _TILE


@lru_cache(maxsize=4096)
def _rank_of(row: int, n: int, k: int) -> int:
    """The rank, up to a whole tile, of a packed weight with rows of so many bytes; 0 where there is none."""
    ranks = range(_TILE, _up(min(n, k), _TILE) + 1, _TILE)
    return next((rank for rank in ranks if _row(n, k, rank) == row), 0)


def _rank(op: str, packed: Tensor, n: int, k: int) -> int:
    is_packed = packed.dtype is torch.uint8 and packed.dim() == 2 and packed.is_contiguous() and packed.shape[0] == k
    rank = _rank_of(packed.shape[1], n, k) if is_packed and k > 0 else 0
    check(
        rank > 0,
        f"{op}: packed is {packed.dtype} {list(packed.shape)}, expected for n = {n}, k = {k} what low_rank_pack returns on a CUDA "
        f"device: uint8 [{k}, ...]",
    )
    return rank


@lru_cache(maxsize=4096)
def _workspace(device: int, n: int, k: int, rank: int, kind: int, m: int) -> int:
    size: int = cuda.native("low_rank_linear").low_rank_workspace(device, n, k, rank, kind, m, "", 0)
    return size


def linear(x: Tensor, packed: Tensor, n: int, bias: Tensor | None, activation: str) -> Tensor:
    """``ops.low_rank_linear`` for tensors on a CUDA device."""
    op = "low_rank_linear"
    cuda.check_devices(op, x, packed, bias)
    module = cuda.native(op, x.device)
    if x.dtype not in _TYPES:
        raise TypeError(f"{op}: x is {x.dtype}, expected bfloat16 or float16 on a CUDA device")
    x, ldx = rows_of(op, x)
    k = x.shape[-1]
    rank, code = _rank(op, packed, n, k), activation_code(op, activation)
    if bias is not None:
        cuda.check_vector(op, "bias", bias, torch.float32, n)
    m = x.numel() // k
    y = x.new_empty((*x.shape[:-1], n))
    if m == 0:
        return y
    if m > _FEW:
        x, ldx = cuda.aligned_rows(x, ldx)
    kind, device = FLOATS[x.dtype], x.device.index
    workspace = torch.empty(_workspace(device, n, k, rank, kind, m), dtype=torch.uint8, device=x.device)
    module.low_rank_linear(
        device, cuda.stream_of(device), x.data_ptr(), kind, m, k, ldx, packed.data_ptr(), n, rank,
        0 if bias is None else bias.data_ptr(), code, y.data_ptr(), workspace.data_ptr(), "", 0,
    )  # fmt: skip
    return y


# --- packing: torch's own operators, on any device ------------------------------------------------------------------------


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    n, k = matrix.shape
    return torch.nn.functional.pad(matrix, (0, columns - k, 0, rows - n)).flatten()


def pack(down: Tensor, up: Tensor) -> Tensor:
    """float32 down [r, k] and up [n, r] -> uint8 [k, ...]: the upper halves of both, then the lower ones.

    Row-major, as ``Factors`` of ``csrc/low_rank/cuda.h`` says it.

    Raises:
        ValueError: wrong dtypes or shapes, NaN or Inf, a value beyond bfloat16's largest.
    """
    op = "low_rank_pack"
    check(
        down.dtype == up.dtype == torch.float32 and down.dim() == up.dim() == 2 and down.shape[0] == up.shape[1] > 0,
        f"{op}: down is {down.dtype} {list(down.shape)}, up {up.dtype} {list(up.shape)}, expected float32 [r, k] and [n, r] on "
        "a CUDA device: it has no kernels for int8 factors",
    )
    (rank, k), n = down.shape, up.shape[0]
    of_down, of_up = _shapes(n, k, rank)
    values = torch.cat((_padded(down.detach(), *of_down), _padded(up.detach(), *of_up)))
    bits = values.view(torch.int32)
    upper = bits + 0x8000 >> 16
    check(
        bool((upper & 0x7F80 != 0x7F80).all()),
        f"{op}: a factor holds NaN, Inf or a value that rounds to it, expected numbers that bfloat16 has room for",
    )
    halves = torch.cat((upper.to(torch.int16), (bits << 16 >> 16).to(torch.int16)))
    packed = values.new_zeros(k * _row(n, k, rank), dtype=torch.uint8)
    packed[: 4 * values.numel()] = halves.view(torch.uint8)
    return packed.view(k, -1)


def unpack(packed: Tensor, n: int, k: int, rank: int) -> tuple[Tensor, Tensor]:
    """What :func:`pack` was given."""
    op = "low_rank_unpack"
    check(_rank(op, packed, n, k) == _up(rank, _TILE), f"{op}: the packed weight is not of rank {rank}")
    of_down, of_up = _shapes(n, k, rank)
    sizes = of_down[0] * of_down[1], of_up[0] * of_up[1]
    halves = packed.flatten()[: 4 * sum(sizes)].view(torch.int16)
    upper, lower = halves.to(torch.int32).split(sum(sizes))
    lower = lower & 0xFFFF
    values = ((upper << 16) + lower - 2 * (lower & 0x8000)).view(torch.float32)
    down, up = (part.view(shape) for part, shape in zip(values.split(sizes), (of_down, of_up), strict=True))
    return down[:rank, :k].contiguous(), up[:n, :rank].contiguous()


def dense(packed: Tensor, n: int, k: int) -> Tensor:
    """``ops.low_rank_dense`` on a CUDA device."""
    down, up = unpack(packed, n, k, _rank("low_rank_dense", packed, n, k))
    return up @ down
