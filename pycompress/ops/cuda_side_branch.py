"""Factors of low rank beside an int8 residual on CUDA (``csrc/low_rank/branch.h``): a side branch of the int8 GEMM.

A packed weight holds what its parts' own packing made: the factors (``ops/cuda_low_rank.py``), then the residual
(``ops.int8_pack``) and the scale of its channels, each at a multiple of 128 bytes. It is uint8 [r, k, ...], so that its shape says
what the host has to know.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pycompress.ops import cuda, cuda_low_rank
from pycompress.ops.native import FLOATS, activation_code, check, rows_of

MAX_RANK = 128  # kMaxRank
_ALIGN = 128


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def residual_bytes(n: int, k: int) -> int:
    """Of the packed int8 weight: ``PackedShape::bytes`` of ``csrc/int8/cuda.h``."""
    n_pad, k_pad = _up(n, 128), _up(k, 64)
    return 128 + 4 * n_pad + n_pad * k_pad + (k_pad - k) * 128 + (n_pad - n)


class _Layout(NamedTuple):
    """Where the parts of a packed weight begin, in bytes, and the last dimension of its shape."""

    factors: int  # how long they are, from 0 on
    residual: int
    scale: int
    row: int


@lru_cache(maxsize=4096)
def _layout(n: int, k: int, rank: int) -> _Layout:
    factors = k * cuda_low_rank._row(n, k, rank)
    residual = _up(factors, _ALIGN)
    scale = residual + _up(residual_bytes(n, k), _ALIGN)
    return _Layout(factors, residual, scale, -(-(scale + 4 * n) // (rank * k)))


def _layout_of(op: str, packed: Tensor, n: int, k: int) -> _Layout:
    if packed.dtype is torch.uint8 and packed.dim() == 3 and packed.is_contiguous():
        rank, across, row = packed.shape
        if across == k > 0 and 1 <= rank <= MAX_RANK and (layout := _layout(n, k, rank)).row == row:
            return layout
    raise ValueError(
        f"{op}: packed is {packed.dtype} {list(packed.shape)}, expected for n = {n}, k = {k} what low_rank_pack returns on a CUDA "
        f"device beside an int8 residual: uint8 [r, {k}, ...]"
    )


def linear(x: Tensor, packed: Tensor, n: int, bias: Tensor | None, activation: str, kernel: str = "") -> Tensor:
    """``ops.low_rank_linear`` for tensors on a CUDA device; ``kernel``: of the int8 GEMM, to force it."""
    op = "low_rank_linear"
    cuda.check_devices(op, x, packed, bias)
    module = cuda.native(op, x.device)
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: x is {x.dtype}, expected bfloat16 or float16 on a CUDA device")
    x, ldx = rows_of(op, x)
    k = x.shape[-1]
    layout, code = _layout_of(op, packed, n, k), activation_code(op, activation)
    if bias is not None:
        cuda.check_vector(op, "bias", bias, torch.float32, n)
    m, rank = x.numel() // k, packed.shape[0]
    y = x.new_empty((*x.shape[:-1], n))
    kind, device, begin = FLOATS[x.dtype], x.device.index, packed.data_ptr()
    workspace = torch.empty(module.side_branch_workspace(n, k, rank, m), dtype=torch.uint8, device=x.device)
    module.side_branch_linear(
        device, cuda.stream_of(device), x.data_ptr(), kind, m, k, ldx, begin, begin + layout.residual,
        begin + layout.scale, n, rank, 0 if bias is None else bias.data_ptr(), code, y.data_ptr(), workspace.data_ptr(),
        kernel,
    )  # fmt: skip
    return y


# --- packing: torch's own operators, on any device ------------------------------------------------------------------------


def pack(down: Tensor, up: Tensor, residual: Tensor | None, residual_scale: Tensor | None) -> Tensor:
    """float32 down [r, k] and up [n, r], the residual from :func:`ops.int8_pack` and its scale float32 [n] -> uint8 [r, k, ...].

    Raises:
        ValueError: wrong dtypes or shapes, a rank above 128, NaN or Inf, a factor beyond bfloat16's largest.
    """
    op = "low_rank_pack"
    factors = cuda_low_rank.pack(down, up).flatten()
    (rank, k), n = down.shape, up.shape[0]
    check(
        rank <= MAX_RANK,
        f"{op}: the rank is {rank}, expected 1 to {MAX_RANK} beside an int8 residual on a CUDA device",
    )
    size = residual_bytes(n, k)
    for name, tensor, dtype, length in (
        ("residual", residual, torch.uint8, size),
        ("residual_scale", residual_scale, torch.float32, n),
    ):
        if tensor is None:
            raise ValueError(f"{op}: {name} is None, expected {dtype} [{length}] for {n}x{k}")
        cuda.check_vector(op, name, tensor, dtype, length)
    assert residual is not None and residual_scale is not None  # noqa: PT018
    layout = _layout(n, k, rank)
    packed = factors.new_zeros(rank * k * layout.row)
    packed[: layout.factors] = factors
    packed[layout.residual : layout.residual + size] = residual
    packed[layout.scale : layout.scale + 4 * n] = residual_scale.detach().view(torch.uint8)
    return packed.view(rank, k, layout.row)


def unpack(packed: Tensor, n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`pack` was given."""
    layout, flat = _layout_of("low_rank_unpack", packed, n, k), packed.flatten()
    factors = flat[: layout.factors].view(k, -1)
    residual = flat[layout.residual : layout.residual + residual_bytes(n, k)].clone()
    scale = flat[layout.scale : layout.scale + 4 * n].view(torch.float32).clone()
    return (*cuda_low_rank.unpack(factors, n, k, packed.shape[0]), residual, scale)


def dense(packed: Tensor, n: int, k: int) -> Tensor:
    """``ops.low_rank_dense`` on a CUDA device."""
    down, up, residual, scale = unpack(packed, n, k)
    return up @ down + cuda.int8_unpack(residual, n, k).to(torch.float32) * scale[:, None]
