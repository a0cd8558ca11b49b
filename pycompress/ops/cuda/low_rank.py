"""Low-rank weights on CUDA: float32 factors, rounded to bfloat16 for the product alone (``csrc/low_rank/cuda.h``).

Beside an int8 residual they are a side branch of its GEMM (``csrc/low_rank/branch.h``); any other residual runs as a second call.

A packed value is in two halves: the bfloat16 nearest to it, ties away from zero, which the kernels read, and the low 16 bits of the
float32, with which it is restored exactly. Both halves are matrices of whole blocks, zero filled: down, then up. Behind them stands
the residual, as its own op packs it, at a multiple of 128 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycompress.ops.activation import DIFFERENTIABLE
from pycompress.ops.checks import FLOATS, check
from pycompress.ops.cuda import int8
from pycompress.ops.cuda.native import (
    address,
    aligned_rows,
    check_halves,
    check_vector,
    native,
    operands,
    room,
    stream_of,
)
from pycompress.ops.form import parse, written
from pycompress.ops.registry import OPS

MAX_RANK = 128  # beside a residual: kMaxRank of branch.h
_STEP, _PAD_N, _FEW = 64, 128, 32  # kStep, kPadN, kMaxRows


class Layout(NamedTuple):
    """Of a packed weight [n, k]: the factors have ``bytes``, behind which the residual stands.

    Attributes:
        branch: the residual's, where the factors are a side branch of its GEMM.
        residual, residual_form: the name of its weight and its form; '' without one.
    """

    n: int
    k: int
    rank: int
    bytes: int
    branch: int8.Layout | None
    residual: str
    residual_form: str


@lru_cache(maxsize=4096)
def _layout(form: str) -> Layout:
    of, beside = parse(form), form.partition(" + ")[2]
    branch = int8.gemm_layout("low_rank_linear", beside) if beside and of.layout == "factors" else None
    return Layout(of.n, of.k, of.rank, of.bytes, branch, of.residual_name, beside)


@lru_cache(maxsize=4096)
def _workspace(device: int, n: int, k: int, rank: int, kind: int, m: int) -> int:
    size: int = native("low_rank_linear").low_rank_workspace(device, n, k, rank, kind, m, "", 0)
    return size


def linear(x: Tensor, packed: Tensor, form: str, bias: Tensor | None, activation: str, kernel: str = "") -> Tensor:
    """``ops.low_rank_linear`` for tensors on a CUDA device; kernel: of the int8 GEMM beside a residual, to force it."""
    op, of = "low_rank_linear", _layout(form)
    if of.residual and of.branch is None:
        y = _factors_linear(x, packed[: of.bytes], of, bias, "none").float()
        y += OPS[of.residual].linear(x, packed[of.bytes :], of.residual_form, None, "none")
        return DIFFERENTIABLE[activation](y).to(x.dtype)
    if of.branch is None:
        return _factors_linear(x, packed, of, bias, activation)
    x, ldx, m, y, code = operands(op, x, packed, of[:2], of.bytes + of.branch.size, bias, activation)
    check_halves(op, x)
    module, device, begin = native(op, x.device), x.device.index, packed.data_ptr()
    workspace, residual = room(module.side_branch_workspace(*of[:3], m), x.device), begin + of.bytes
    module.side_branch_linear(
        device, stream_of(device), x.data_ptr(), FLOATS[x.dtype], m, ldx, *of[:3], of.branch.activation_bits, begin, residual,
        residual + of.branch.bytes, address(bias), code, y.data_ptr(), address(workspace), kernel,
    )  # fmt: skip
    return y


def _factors_linear(x: Tensor, packed: Tensor, of: Layout, bias: Tensor | None, activation: str) -> Tensor:
    op = "low_rank_linear"
    x, ldx, m, y, code = operands(op, x, packed, of[:2], of.bytes, bias, activation)
    check_halves(op, x)
    if m == 0:
        return y
    if m > _FEW:
        x, ldx = aligned_rows(x, ldx)
    kind, device = FLOATS[x.dtype], x.device.index
    workspace = room(_workspace(device, *of[:3], kind, m), x.device)
    native(op, x.device).low_rank_linear(
        device, stream_of(device), x.data_ptr(), kind, m, ldx, *of[:3], packed.data_ptr(), address(bias), code,
        y.data_ptr(), address(workspace), "", 0,
    )  # fmt: skip
    return y


# --- packing: torch's own operators, on any device ------------------------------------------------------------------------


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _shapes(n: int, k: int, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of the packed down and up."""
    across = _up(rank, _STEP)
    return (across, _up(k, _STEP)), (_up(n, _PAD_N), across)


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    n, k = matrix.shape
    return torch.nn.functional.pad(matrix, (0, columns - k, 0, rows - n)).flatten()


def pack(
    parts: Mapping[str, Tensor], shape: tuple[int, int], settings: Mapping[str, Any], layout: str = ""
) -> tuple[Tensor, str]:
    """``ops.pack`` of float32 down [r, k] and up [n, r], and the parts of a residual behind ``residual_``; layout: of that.

    Raises:
        ValueError: wrong dtypes or shapes, a rank above 128 beside an int8 residual; NaN, Inf or a value beyond bfloat16's
        largest; what the residual's own op refuses.
    """
    op, (n, k), rest = "low_rank_pack", shape, dict(settings.get("residual") or {})
    down, up = parts["down"], parts["up"]
    buffer, rank = factors(down, up), len(down)
    check(
        (up.shape[0], down.shape[1]) == shape, f"{op}: the factors are {up.shape[0]}x{down.shape[1]}, expected {n}x{k}"
    )
    keys: dict[str, Any] = {"rank": rank, "bits": 32, "activation_bits": 0, "bytes": buffer.numel()}
    if not rest:
        check(layout == "", f"{op}: layout is {layout!r}, expected none without a residual")
        return buffer, written("factors", n, k, **keys)
    kind, _ = rest.pop("method"), rest.pop("version", 1)
    check(kind in OPS, f"{op}: the residual is {kind!r}, expected one of {', '.join(OPS)}")
    check(
        kind != "int8" or rank <= MAX_RANK,
        f"{op}: the rank is {rank}, expected 1 to {MAX_RANK} beside an int8 residual on a CUDA device",
    )
    own = {name.removeprefix("residual_"): part for name, part in parts.items() if name.startswith("residual_")}
    residual, beside = OPS[kind].pack(own, shape, rest, down.device, layout)
    form = written("factors" if kind == "int8" else "beside", n, k, **keys, residual=kind, beside=beside)
    return torch.cat((buffer, residual)), form


def factors(down: Tensor, up: Tensor) -> Tensor:
    """float32 down [r, k] and up [n, r] -> uint8: the upper halves of both, then the lower ones.

    Row-major, as ``Factors`` of ``csrc/low_rank/cuda.h`` says it; a multiple of 128 bytes.

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
    return torch.cat((upper.to(torch.int16), (bits << 16 >> 16).to(torch.int16))).view(torch.uint8)


def _factors_in(packed: Tensor, of: Layout) -> tuple[Tensor, Tensor]:
    """down and up of a packed weight."""
    own = packed[: of.bytes] if of.residual else packed  # the rest is checked by its own op
    check_vector("low_rank_unpack", "packed", own, torch.uint8, of.bytes)
    of_down, of_up = _shapes(of.n, of.k, of.rank)
    sizes = of_down[0] * of_down[1], of_up[0] * of_up[1]
    upper, lower = own.view(torch.int16).to(torch.int32).split(sum(sizes))
    lower = lower & 0xFFFF
    values = ((upper << 16) + lower - 2 * (lower & 0x8000)).view(torch.float32)
    down, up = (part.view(shape) for part, shape in zip(values.split(sizes), (of_down, of_up), strict=True))
    return down[: of.rank, : of.k].contiguous(), up[: of.n, : of.rank].contiguous()


def unpack(packed: Tensor, form: str) -> dict[str, Tensor]:
    """What :func:`pack` was given."""
    of = _layout(form)
    parts = dict(zip(("down", "up"), _factors_in(packed, of), strict=True))
    if not of.residual:
        return parts
    rest = OPS[of.residual].unpack(packed[of.bytes :], of.residual_form)
    return {**parts, **{f"residual_{name}": part for name, part in rest.items()}}


def dense(packed: Tensor, form: str) -> Tensor:
    """float32 [n, k]."""
    of = _layout(form)
    down, up = _factors_in(packed, of)
    return up @ down + OPS[of.residual].dense(packed[of.bytes :], of.residual_form) if of.residual else up @ down
