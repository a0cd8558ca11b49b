"""Low-rank weights on the CPU (``csrc/low_rank``): two factors, and beside them a residual.

The residual is packed by its own op. The kinds in FUSED run in the same kernel as the factors; any other weight lies behind them,
at a multiple of 64 bytes, and runs as a second call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycompress.ops.activation import DIFFERENTIABLE
from pycompress.ops.checks import FLOATS, activation_code, check, check_float, matrix_of, vector
from pycompress.ops.cpu import native
from pycompress.ops.cpu.native import channels, check_operand
from pycompress.ops.form import Form, Sizes, parse, written
from pycompress.ops.registry import OPS

FUSED = ("", "dense", "int8", "sparse", "int4")  # the native module counts them in this order
_DTYPES = {32: torch.float32, 8: torch.int8}
_CHECKED = ("n", "k", "rank", "bits", "activation_bits")
_PREFIX = "residual_"


def sizes(form: Form) -> Sizes:
    """Shape and dtype of what :func:`unpack` gives, on any device."""
    n, k, rank, dtype = form.n, form.k, form.rank, _DTYPES[form.bits]
    parts: Sizes = {"down": ((rank, k), dtype), "up": ((n, rank), dtype)}
    if form.bits == 8:
        parts |= {"down_scale": ((rank,), torch.float32), "up_scale": ((n,), torch.float32)}
    if form.residual is None:
        return parts
    residual = OPS[form.residual_name].sizes(form.residual)
    return {**parts, **{_PREFIX + name: size for name, size in residual.items()}}


# --- packing ----------------------------------------------------------------------------------------------------------


def pack(
    parts: Mapping[str, Tensor], shape: tuple[int, int], settings: Mapping[str, Any], layout: str = ""
) -> tuple[Tensor, str]:
    """Canonical weight up @ down + R -> the layout of the kernels here: a uint8 vector, for this process only.

    Args:
        parts: down float32 or int8 [r, k], 1 <= r <= min(n, k), finite, integers in [-127, 127]; up [n, r] of the same dtype; for
            int8 down_scale float32 [r] and up_scale [n]; those of R behind ``residual_``.
        shape: (n, k), k up to 65536.
        settings: activation_bits 7 or 8 for int8: how x and what lies between the factors are quantized; residual: R's settings,
            and as its ``method`` the name of its weight.
        layout: of R, to force one.
    Raises:
        ValueError: wrong dtypes or shapes, a residual of another size or name, NaN, Inf or -128.
    """
    rest = dict(settings.get("residual") or {})
    own = {name: tensor for name, tensor in parts.items() if not name.startswith(_PREFIX)}
    if not rest:
        check(
            len(own) == len(parts),
            f"low_rank_pack: parts are {', '.join(parts)}, expected no residual's in these settings",
        )
        return _pack_factors(own, shape, settings)
    kind, _ = rest.pop("method"), rest.pop("version", 1)
    if kind not in OPS:
        raise ValueError(f"low_rank_pack: the residual is {kind!r}, expected one of {', '.join(OPS)}")
    theirs = {name.removeprefix(_PREFIX): tensor for name, tensor in parts.items() if name.startswith(_PREFIX)}
    residual, form = OPS[kind].pack(theirs, shape, rest, layout=layout)
    if kind in FUSED:
        return _pack_factors(own, shape, settings, kind, residual, form)
    factors, factors_form = _pack_factors(own, shape, settings)
    there = parse(factors_form)
    at = -(-factors.shape[0] // 64) * 64
    packed = factors.new_zeros(at + residual.shape[0])
    for to, part in ((0, factors), (at, residual)):
        ctypes.memmove(packed.data_ptr() + to, part.data_ptr(), part.shape[0])
    keys = {**there.keys, "residual": kind, "factors_bytes": factors.shape[0], "residual_at": at}
    return packed, written("beside", *shape, beside=form, **keys)


def _pack_factors(
    parts: Mapping[str, Tensor], shape: tuple[int, int], settings: Mapping[str, Any], kind: str = "",
    residual: Tensor | None = None, residual_form: str = "",
) -> tuple[Tensor, str]:  # fmt: skip
    """The factors, and a residual of a kind in FUSED from its own op."""
    (n, k), activation_bits = shape, settings.get("activation_bits") or 0
    down, up = (_factor(name, parts[name]) for name in ("down", "up"))
    rank, bits = down.shape[0], 8 * down.element_size()
    check(down.shape[1] == k, f"low_rank_pack: down is {_brief(down)}, expected [r, {k}]")
    check(
        up.dtype == down.dtype and tuple(up.shape) == (n, rank),
        f"low_rank_pack: up is {_brief(up)}, expected {down.dtype} [{n}, {rank}] as down is {list(down.shape)}",
    )
    wanted = {"down_scale": rank, "up_scale": n} if bits == 8 else {"down_scale": 0, "up_scale": 0}
    scales = {name: _scale(name, parts.get(name), size) for name, size in wanted.items()}
    residual_bytes, residual_scale = _checked_residual(kind, residual, residual_form)
    data = native._C.low_rank_pack(
        down.data_ptr(), up.data_ptr(), n, k, rank, bits, activation_bits,
        *(0 if scale is None else scale.data_ptr() for scale in scales.values()), FUSED.index(kind),
        0 if residual is None else residual.data_ptr(), residual_bytes, residual_scale, torch.get_num_threads(),
    )  # fmt: skip
    keys: dict[str, int | str] = {"rank": rank, "bits": bits, "activation_bits": activation_bits}
    if kind:
        keys["residual"] = kind
    return vector(data), written("factors", n, k, beside=residual_form, **keys)


def _brief(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _factor(name: str, factor: Tensor) -> Tensor:
    """As the kernels read it. In NumPy, which has no threads that a forked process would miss."""
    check(
        factor.dtype in _DTYPES.values() and factor.dim() == 2,
        f"low_rank_pack: {name} is {_brief(factor)}, expected a float32 or int8 matrix",
    )
    factor = factor.detach().resolve_neg().contiguous()
    values = factor.numpy()
    if factor.dtype == torch.float32:
        check(bool(np.isfinite(values).all()), f"low_rank_pack: {name} holds NaN or Inf, expected finite values")
    else:
        check(not (values == -128).any(), f"low_rank_pack: {name} holds -128, expected integers from -127 to 127")
    return factor


def _scale(name: str, scale: Tensor | None, size: int) -> Tensor | None:
    """The scale of int8 factors; None where none is expected (size 0)."""
    if not size:
        check(scale is None, f"low_rank_pack: {name} is {_brief(scale)}, expected None without int8 factors")
        return None
    if scale is None:
        raise ValueError(f"low_rank_pack: {name} is None, expected float32 [{size}] for int8 factors")
    scale = scale.detach().contiguous()
    channels("low_rank_pack", name, scale, size)
    return scale


def _checked_residual(kind: str, residual: Tensor | None, form: str) -> tuple[int, int]:
    """How many bytes of a packed residual are its kernel's, and the address of the scale behind them; 0 where there is none."""
    if residual is None:
        return 0, 0
    own = parse(form)
    bits, expected = own.keys.get("activation_bits", 0), "8" if kind == "int4" else "7 or 8"
    check(
        bits != 16,
        f"low_rank_pack: the residual's activation_bits is {bits}, expected {expected}: it shares quantized rows",
    )
    check(
        "static" not in own.keys,
        "low_rank_pack: the residual is static, expected a dynamic one: it shares quantized rows",
    )
    n_bytes = residual.shape[0] - _scale_bytes(kind, own)
    return n_bytes, residual.data_ptr() + n_bytes if n_bytes < residual.shape[0] else 0


def _scale_bytes(kind: str, residual: Form) -> int:
    """Of the scale per output channel behind a residual of a kind in FUSED."""
    return 4 * residual.n if kind == "int8" or residual.keys.get("bits") == 8 else 0


# --- unpacking --------------------------------------------------------------------------------------------------------


def _factors_of(packed: Tensor, form: str) -> tuple[Tensor, str]:
    """What the native module reads of a packed weight, and its form: all of it, but for a residual that lies behind it."""
    own = parse(form)
    check_operand("low_rank", "packed", packed, torch.uint8)
    if own.layout != "beside":
        return packed, form
    keys: dict[str, Any] = {name: own.keys[name] for name in ("rank", "bits", "activation_bits")}
    return packed[: own.factors_bytes], written("factors", own.n, own.k, **keys)


def residual_of(packed: Tensor, form: str) -> tuple[Tensor, str]:
    """The residual as its own op packed it, and its form. Raises ValueError where there is none."""
    own = parse(form)
    if own.residual is None:
        raise ValueError(f"low_rank: the form is {form!r}, expected one with a residual")
    if own.layout == "beside":
        return packed[own.residual_at :], str(own.residual)
    return _unpacked(packed, form)[1], str(own.residual)


def _unpacked(packed: Tensor, form: str) -> tuple[dict[str, Tensor], Tensor]:
    """The factors with their scales, and a residual that lies in the native module's buffer, packed; else empty."""
    own = parse(form)
    check_operand("low_rank_unpack", "packed", packed, torch.uint8)
    header = native.header_of("low_rank_unpack", "low_rank", packed, packed.shape[0], own, _CHECKED)
    kind = own.residual_name
    check(
        header["residual"] == kind,
        f"low_rank_unpack: the packed weight has {header['residual']!r} beside it, not {kind!r}",
    )
    names = ("down", "up", "down_scale", "up_scale")
    parts = {name: packed.new_empty(shape, dtype=dtype) for name, (shape, dtype) in sizes(own).items() if name in names}
    behind = 0 if own.residual is None else _scale_bytes(kind, own.residual)
    residual = packed.new_empty(header["residual_bytes"] + behind)
    at = residual.data_ptr()
    native._C.low_rank_unpack(
        packed.data_ptr(), packed.shape[0], *(parts[name].data_ptr() if name in parts else 0 for name in names),
        at if header["residual_bytes"] else 0, at + header["residual_bytes"] if behind else 0,
    )  # fmt: skip
    return parts, residual


def unpack(packed: Tensor, form: str) -> dict[str, Tensor]:
    own = parse(form)
    parts, residual = _unpacked(*_factors_of(packed, form))
    if own.residual is None:
        return parts
    if own.layout == "beside":
        residual = packed[own.residual_at :]
    rest = OPS[own.residual_name].unpack(residual, str(own.residual))
    return {**parts, **{_PREFIX + name: tensor for name, tensor in rest.items()}}


def dense(packed: Tensor, form: str) -> Tensor:
    own = parse(form)
    parts, _ = _unpacked(*_factors_of(packed, form))
    down, up = parts["down"], parts["up"]
    if own.bits == 8:
        down = down.to(torch.float32) * parts["down_scale"][:, None]
        up = up.to(torch.float32) * parts["up_scale"][:, None]
    weight = up @ down
    return weight if own.residual is None else weight + OPS[own.residual_name].dense(*residual_of(packed, form))


# --- products ---------------------------------------------------------------------------------------------------------


def linear(x: Tensor, packed: Tensor, form: str, bias: Tensor | None, activation: str) -> Tensor:
    op = "low_rank_linear"
    check_operand(op, "packed", packed, torch.uint8)
    own = parse(form)
    if own.layout != "beside" or own.residual is None:
        return native.linear(op, x, packed, form, bias, activation, packed.shape[0], further=(0,))
    check_float(op, x)
    activation_code(op, activation)
    wide = x.to(torch.float32)
    factors, factors_form = _factors_of(packed, form)
    y = native.linear(op, wide, factors, factors_form, bias, "none", factors.shape[0], further=(0,))
    y += OPS[own.residual_name].linear(wide, *residual_of(packed, form), None, "none")
    return DIFFERENTIABLE[activation](y).to(x.dtype)


def intermediate(x: Tensor, packed: Tensor, form: str) -> Tensor:
    x, ldx = matrix_of("low_rank_intermediate", x)
    factors, factors_form = _factors_of(packed, form)
    own = parse(factors_form)
    m, k = x.shape
    t, y = (x.new_empty((m, size), dtype=torch.float32) for size in (own.rank, own.n))
    native.header_of("low_rank_intermediate", "low_rank", factors, factors.shape[0], own, _CHECKED)
    native._C.low_rank_linear(
        x.data_ptr(), FLOATS[x.dtype], m, k, ldx, factors.data_ptr(), factors.shape[0], own.n, 0, 0, y.data_ptr(),
        FLOATS[torch.float32], t.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return t
