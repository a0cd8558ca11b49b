"""The ops of the low-rank kernels (``csrc/low_rank``)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pycompress.ops import cuda, cuda_low_rank, cuda_side_branch
from pycompress.ops.int4 import int4_dense
from pycompress.ops.int8 import int8_unpack
from pycompress.ops.native import (
    _C,
    ACTIVATIONS,
    EXACT_STRIDES,
    FLOATS,
    channels,
    check,
    check_float,
    check_operand,
    implement,
    is_plain,
    library,
    linear_cpu,
    matrix_of,
    nobody_looks,
    reads_tensors,
    vector,
)
from pycompress.ops.sparse import sparse_dense, sparse_header

# What stands beside the factors; the native module counts them in this order.
RESIDUALS = ("", "dense", "int8", "sparse", "int4")
_FACTORS = {32: torch.float32, 8: torch.int8}

# --- low_rank_linear --------------------------------------------------------------------------------------------------

library.define(
    "low_rank_linear(Tensor x, Tensor packed, int n, Tensor? bias, str activation) -> Tensor", tags=EXACT_STRIDES
)


def _low_rank_linear_cpu(x: Tensor, packed: Tensor, n: int, bias: Tensor | None, activation: str) -> Tensor:
    return linear_cpu("low_rank_linear", x, packed, n, bias, activation, 0)


def _low_rank_linear_cuda(x: Tensor, packed: Tensor, n: int, bias: Tensor | None, activation: str) -> Tensor:
    if _is_side_branch(packed):
        return cuda_side_branch.linear(x, packed, n, bias, activation)
    return cuda_low_rank.linear(x, packed, n, bias, activation)


def _is_side_branch(packed: Tensor) -> bool:
    """Whether a packed weight on a CUDA device holds a residual beside the factors; its shape says so without asking the device."""
    return packed.dim() == 3


def _low_rank_linear_fake(x: Tensor, packed: Tensor, n: int, bias: Tensor | None, activation: str) -> Tensor:  # noqa: ARG001
    check_float("low_rank_linear", x)
    return x.new_empty((*x.shape[:-1], n))


def _low_rank_linear_vmapped(*operands: Any) -> Tensor:
    y: Tensor = _low_rank_linear_op(*operands)
    return y


_low_rank_linear_op = implement(
    "low_rank_linear", _low_rank_linear_cpu, _low_rank_linear_fake, _low_rank_linear_vmapped, _low_rank_linear_cuda
)


def low_rank_linear(x: Tensor, packed: Tensor, n: int, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """``act(x down^T up^T + x R^T + bias)``: two thin products, and beside them what they leave, R, where there is one.

    int8 factors are two :func:`int8_linear` one after the other, to the bit, for every thread count and kernel. float32 factors
    are sums of fused multiply-adds, each within ``gamma(k + r + 4) * (sum_j (sum_i |x_i down_ji|) |up_nj| + |bias|)`` of the exact
    one, gamma(q) = q u / (1 - q u) with u = 2^-24. R adds the sums of :func:`int8_linear`, of :func:`int4_linear` or of
    :func:`sparse_linear`; a float32 R goes on with k more multiply-adds, which makes it gamma(2 k + r + 4), and
    ``sum_i |x_i R_ni|`` one of what it multiplies.
    On a CUDA device float32 factors run, rounded to bfloat16, on x in bfloat16 or float16, to which what lies between the factors
    is rounded too: without R or, up to rank 128, beside the sums of :func:`int8_linear` for an int8 R. Formulas and bounds are in
    ``csrc/low_rank/cuda.h`` and ``csrc/low_rank/branch.h``.

    Args:
        x: float32, bfloat16 or float16, [..., k], any strides; converted to float32 exactly, the result is rounded once. A row
            with NaN or Inf: int8 factors, an int8 or an int4 residual give a row of NaN, float32 ones NaN or Inf where a weight
            meets it, zeros included (but for those that a sparse residual leaves out).
        packed: uint8 vector from :func:`low_rank_pack`.
        n: out_features.
        bias: float32 [n] or None.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``.
    Returns:
        [..., n], dense, of x's dtype.
    Raises:
        TypeError: x has another dtype. ValueError: sizes or dtypes do not fit. RuntimeError: the tensors are not all on the CPU
        or on one CUDA device, or there are no CUDA kernels.
    """
    if is_plain(x):
        if reads_tensors and x.dim() != 0:
            y = x.new_empty((*x.shape[:-1], n))
            code = ACTIVATIONS.get(activation, -1)
            if code >= 0 and _C.low_rank_linear_tensors(x, packed, bias, code, y, torch.get_num_threads()):
                return y
        return _low_rank_linear_cpu(x, packed, n, bias, activation)
    if x.is_cuda and nobody_looks(x):
        return _low_rank_linear_cuda(x, packed, n, bias, activation)
    result: Tensor = _low_rank_linear_op(x, packed, n, bias, activation)
    return result


# --- packing ----------------------------------------------------------------------------------------------------------

library.define(
    "low_rank_pack(Tensor down, Tensor up, Tensor? down_scale=None, Tensor? up_scale=None, int activation_bits=0, "
    "str residual_kind='', Tensor? residual=None, Tensor? residual_scale=None) -> Tensor"
)


def _low_rank_pack_cpu(
    down: Tensor, up: Tensor, down_scale: Tensor | None = None, up_scale: Tensor | None = None, activation_bits: int = 0,
    residual_kind: str = "", residual: Tensor | None = None, residual_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    down, up = _factor("down", down), _factor("up", up)
    (rank, k), n = down.shape, up.shape[0]
    check(
        up.dtype == down.dtype and up.shape[1] == rank,
        f"low_rank_pack: up is {_brief(up)}, expected {down.dtype} [n, {rank}] as down is {list(down.shape)}",
    )
    bits = 8 * down.element_size()
    sizes = {"down_scale": rank, "up_scale": n} if bits == 8 else {"down_scale": 0, "up_scale": 0}
    scales = {"down_scale": down_scale, "up_scale": up_scale}
    addresses = [_scale(name, scales[name], size, "factors") for name, size in sizes.items()]
    residual = _residual(residual_kind, residual, (n, k))
    scaled = n if _is_int8(residual_kind, residual) else 0
    residual_scale_address = _scale("residual_scale", residual_scale, scaled, "values of a residual")
    data = _C.low_rank_pack(
        down.data_ptr(), up.data_ptr(), n, k, rank, bits, activation_bits, *addresses, RESIDUALS.index(residual_kind),
        0 if residual is None else residual.data_ptr(), 0 if residual is None else residual.nbytes,
        residual_scale_address, torch.get_num_threads(),
    )  # fmt: skip
    return vector(data)


def _brief(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _values(name: str, tensor: Tensor) -> Tensor:
    """Float32 or int8 values as the kernels read them. In NumPy, which has no threads that a forked process would miss."""
    tensor = tensor.detach().resolve_neg().contiguous()
    values = tensor.numpy()
    if tensor.dtype == torch.float32:
        check(bool(np.isfinite(values).all()), f"low_rank_pack: {name} holds NaN or Inf, expected finite values")
    else:
        check(not (values == -128).any(), f"low_rank_pack: {name} holds -128, expected integers from -127 to 127")
    return tensor


def _factor(name: str, factor: Tensor) -> Tensor:
    check(
        factor.dtype in _FACTORS.values() and factor.dim() == 2,
        f"low_rank_pack: {name} is {_brief(factor)}, expected a float32 or int8 matrix",
    )
    return _values(name, factor)


def _scale(name: str, scale: Tensor | None, size: int, whose: str) -> int:
    """The address of a scale of int8 values, 0 where there is none and none is expected (size 0)."""
    if not size:
        check(scale is None, f"low_rank_pack: {name} is {_brief(scale)}, expected None without int8 {whose}")
        return 0
    if scale is None:
        raise ValueError(f"low_rank_pack: {name} is None, expected float32 [{size}] for int8 {whose}")
    return channels("low_rank_pack", name, scale, size)


def _residual(kind: str, residual: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """The residual, checked as far as its own op does not."""
    if kind not in RESIDUALS:
        expected = ", ".join(map(repr, RESIDUALS))
        raise ValueError(f"low_rank_pack: residual_kind is {kind!r}, expected one of {expected}")
    if not kind or residual is None:
        given = f"residual_kind is {kind!r} and the residual {_brief(residual)}"
        check(not kind and residual is None, f"low_rank_pack: {given}, expected both or neither")
        return None
    if kind == "dense":
        check(
            residual.dtype == torch.float32 and tuple(residual.shape) == shape,
            f"low_rank_pack: the residual is {_brief(residual)}, expected torch.float32 {list(shape)}",
        )
        return _values("the residual", residual)
    check(
        residual.dtype == torch.uint8 and residual.is_cpu and residual.dim() == 1 and residual.is_contiguous(),
        f"low_rank_pack: the residual is {_brief(residual)}, expected a dense uint8 vector from {kind}_pack",
    )
    describe = {"int8": _C.int8_header, "int4": _C.int4_header, "sparse": _C.sparse_header}[kind]
    header = describe(residual.data_ptr(), residual.numel())
    check(
        (header["n"], header["k"]) == shape,
        f"low_rank_pack: the residual is {header['n']}x{header['k']}, expected {shape[0]}x{shape[1]} as the factors make it",
    )
    bits = header["activation_bits"]
    expected = "8" if kind == "int4" else "7 or 8"
    check(
        bits != 16,
        f"low_rank_pack: the residual's activation_bits is {bits}, expected {expected}: it shares quantized rows",
    )
    return residual


def _is_int8(kind: str, residual: Tensor | None) -> bool:
    """Whether a residual's values are integers, which need a scale."""
    if kind != "sparse":
        return kind == "int8"
    assert residual is not None
    return bool(sparse_header(residual)["bits"] == 8)


def _low_rank_pack_fake(
    down: Tensor, up: Tensor, down_scale: Tensor | None = None, up_scale: Tensor | None = None, activation_bits: int = 0,  # noqa: ARG001
    residual_kind: str = "", residual: Tensor | None = None, residual_scale: Tensor | None = None,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    size = torch.library.get_ctx().new_dynamic_size()
    if not down.is_cuda:
        return down.new_empty((size,), dtype=torch.uint8)
    rank, k = down.shape
    return down.new_empty((rank, k, size) if residual_kind else (k, size), dtype=torch.uint8)


def _low_rank_pack_cuda(
    down: Tensor, up: Tensor, down_scale: Tensor | None = None, up_scale: Tensor | None = None, activation_bits: int = 0,  # noqa: ARG001
    residual_kind: str = "", residual: Tensor | None = None, residual_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    cuda.check_devices("low_rank_pack", down, up, residual, residual_scale)
    check(
        residual_kind in {"", "int8"},
        f"low_rank_pack: residual_kind is {residual_kind!r}, expected '' or 'int8' on a CUDA device: it has no kernels for others",
    )
    return cuda_side_branch.pack(down, up, residual, residual_scale) if residual_kind else cuda_low_rank.pack(down, up)


library.impl("low_rank_pack", _low_rank_pack_cpu, "CPU")
library.impl("low_rank_pack", _low_rank_pack_cuda, "CUDA")
torch.library.register_fake("pycompress::low_rank_pack", _low_rank_pack_fake, lib=library)


def low_rank_pack(
    down: Tensor, up: Tensor, down_scale: Tensor | None = None, up_scale: Tensor | None = None, activation_bits: int = 0,
    residual_kind: str = "", residual: Tensor | None = None, residual_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Canonical weight up @ down + R -> the layout of the kernels here: a uint8 vector, for this process only.

    On a CUDA device uint8 [k, ...], of float32 factors without R or, up to rank 128, [r, k, ...] beside an int8 R from
    :func:`int8_pack` there; they come back exactly from there, too.

    Args:
        down: float32 or int8 [r, k], 1 <= r <= min(n, k), k up to 65536; finite, integers in [-127, 127].
        up: [n, r] of the same dtype.
        down_scale, up_scale: float32 [r] and [n] for int8, None for float32.
        activation_bits: 7 or 8 for int8, 0 for float32: how x and what lies between the factors are quantized.
        residual_kind: ``""``, ``dense``, ``int8``, ``sparse`` or ``int4``.
        residual: for these None, float32 [n, k], from :func:`int8_pack`, from :func:`sparse_pack`, from :func:`int4_pack` (with
            8-bit activations).
        residual_scale: float32 [n] for an int8 residual and a sparse one of int8 values, else None.
    Raises:
        ValueError: wrong dtypes or shapes, a residual of another size, NaN, Inf or -128.
    """
    packed: Tensor = torch.ops.pycompress.low_rank_pack.default(
        down, up, down_scale, up_scale, activation_bits, residual_kind, residual, residual_scale
    )
    return packed


def low_rank_header(packed: Tensor) -> dict[str, Any]:
    """What a packed weight holds: n, k, rank, bits (32 or 8), activation_bits (0 for float32), residual (one of RESIDUALS),
    residual_bytes and residual_scaled (whether it has a scale)."""
    check_operand("low_rank_header", "packed", packed, torch.uint8)
    header: dict[str, Any] = _C.low_rank_header(packed.data_ptr(), packed.numel())
    return header


# --- unpacking --------------------------------------------------------------------------------------------------------

library.define(
    "low_rank_unpack(Tensor packed, int n, int k, int rank, int bits, str residual, int residual_bytes, "
    "bool residual_scaled) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class LowRankSizes(NamedTuple):
    """How large what :func:`low_rank_unpack` returns is, which a compiler cannot read from the packed weight."""

    n: int
    k: int
    rank: int
    bits: int
    residual: str
    residual_bytes: int
    residual_scaled: bool


class LowRankTensors(NamedTuple):
    """What :func:`low_rank_pack` was given; empty tensors for what was None."""

    down: Tensor
    up: Tensor
    down_scale: Tensor
    up_scale: Tensor
    residual: Tensor
    residual_scale: Tensor


def _empty(like: Tensor, sizes: LowRankSizes) -> LowRankTensors:
    n, k, rank, bits, residual, residual_bytes, residual_scaled = sizes
    scaled, dense = bits == 8, residual == "dense"
    return LowRankTensors(
        like.new_empty((rank, k), dtype=_FACTORS[bits]),
        like.new_empty((n, rank), dtype=_FACTORS[bits]),
        like.new_empty((rank if scaled else 0,), dtype=torch.float32),
        like.new_empty((n if scaled else 0,), dtype=torch.float32),
        like.new_empty((n, k), dtype=torch.float32) if dense else like.new_empty((residual_bytes,), dtype=torch.uint8),
        like.new_empty((n if residual_scaled else 0,), dtype=torch.float32),
    )


def _low_rank_unpack_cpu(packed: Tensor, *sizes: Any) -> tuple[Tensor, ...]:
    expected, found = LowRankSizes(*sizes), _sizes(packed)
    check(found == expected, f"low_rank_unpack: the packed weight is {tuple(found)}, not {tuple(expected)}")
    tensors = _empty(packed, expected)
    addresses = [tensor.data_ptr() if tensor.numel() else 0 for tensor in tensors]
    _C.low_rank_unpack(packed.data_ptr(), packed.numel(), *addresses)
    return tuple(tensors)


def _low_rank_unpack_fake(packed: Tensor, *sizes: Any) -> tuple[Tensor, ...]:
    return tuple(_empty(packed, LowRankSizes(*sizes)))


def _low_rank_unpack_cuda(packed: Tensor, *sizes: Any) -> tuple[Tensor, ...]:
    expected, side = LowRankSizes(*sizes), _is_side_branch(packed)
    n, k, rank = expected[:3]
    found = cuda_low_rank_sizes(n, k, packed.shape[0] if side else rank, "int8" if side else "")
    check(expected == found, f"low_rank_unpack: the packed weight is {tuple(found)}, not {tuple(expected)}")
    if not side:
        return (*cuda_low_rank.unpack(packed, n, k, rank), *_empty(packed, expected)[2:])
    down, up, residual, residual_scale = cuda_side_branch.unpack(packed, n, k)
    return LowRankTensors(down, up, *_empty(packed, expected)[2:4], residual, residual_scale)


library.impl("low_rank_unpack", _low_rank_unpack_cpu, "CPU")
library.impl("low_rank_unpack", _low_rank_unpack_cuda, "CUDA")
torch.library.register_fake("pycompress::low_rank_unpack", _low_rank_unpack_fake, lib=library)


def cuda_low_rank_sizes(n: int, k: int, rank: int, residual: str) -> LowRankSizes:
    """Those of a packed weight on a CUDA device, whose header cannot be asked without waiting; residual: ``""`` or ``int8``."""
    held = cuda_side_branch.residual_bytes(n, k) if residual else 0
    return LowRankSizes(n, k, rank, 32, residual, held, bool(residual))


def _sizes(packed: Tensor) -> LowRankSizes:
    header = low_rank_header(packed)
    return LowRankSizes(*(header[name] for name in LowRankSizes._fields))


def low_rank_unpack(packed: Tensor, sizes: LowRankSizes | None = None) -> LowRankTensors:
    """What :func:`low_rank_pack` was given, exactly. Costs a pass over the weight.

    Args:
        sizes: read from the packed weight where they are not given, on the CPU, which a compiler cannot see through; on a CUDA
            device from :func:`cuda_low_rank_sizes`.
    """
    found = _sizes(packed) if sizes is None else sizes
    return LowRankTensors(*torch.ops.pycompress.low_rank_unpack.default(packed, *found))


library.define("low_rank_dense(Tensor packed, int n, int k) -> Tensor")


def _low_rank_dense_cpu(packed: Tensor, n: int, k: int) -> Tensor:
    sizes = _sizes(packed)
    check(
        (sizes.n, sizes.k) == (n, k),
        f"low_rank_dense: the packed weight is {sizes.n}x{sizes.k}, not {n}x{k}",
    )
    down, up, down_scale, up_scale, residual, residual_scale = low_rank_unpack(packed, sizes)
    if sizes.bits == 8:
        down, up = down.to(torch.float32) * down_scale[:, None], up.to(torch.float32) * up_scale[:, None]
    weight = up @ down
    if not sizes.residual:
        return weight
    if sizes.residual == "int8":
        residual = int8_unpack(residual).to(torch.float32)
    elif sizes.residual == "sparse":
        residual = sparse_dense(residual).to(torch.float32)
    elif sizes.residual == "int4":
        residual = int4_dense(residual, n, k)
    return weight + (residual * residual_scale[:, None] if sizes.residual_scaled else residual)


def _low_rank_dense_cuda(packed: Tensor, n: int, k: int) -> Tensor:
    return cuda_side_branch.dense(packed, n, k) if _is_side_branch(packed) else cuda_low_rank.dense(packed, n, k)


def _low_rank_dense_fake(packed: Tensor, n: int, k: int) -> Tensor:
    return packed.new_empty((n, k), dtype=torch.float32)


library.impl("low_rank_dense", _low_rank_dense_cpu, "CPU")
library.impl("low_rank_dense", _low_rank_dense_cuda, "CUDA")
torch.library.register_fake("pycompress::low_rank_dense", _low_rank_dense_fake, lib=library)


def low_rank_dense(packed: Tensor, n: int, k: int) -> Tensor:
    """The weight: up @ down, and the residual: float32 [n, k]. Costs about as much as the layer with k rows."""
    weight: Tensor = torch.ops.pycompress.low_rank_dense.default(packed, n, k)
    return weight


# --- what lies between the factors, for validation and tests ----------------------------------------------------------


def low_rank_intermediate(x: Tensor, packed: Tensor) -> Tensor:
    """``x down^T``: what the second factor meets, in int8 before it is quantized.

    Args:
        x: float32, bfloat16 or float16, [m, k].
        packed: from :func:`low_rank_pack`.
    Returns:
        float32 [m, r].
    """
    x, ldx = matrix_of("low_rank_intermediate", x)
    header = low_rank_header(packed)
    m, k = x.shape
    t, y = torch.empty(m, header["rank"]), torch.empty(m, header["n"])
    _C.low_rank_linear(
        x.data_ptr(), FLOATS[x.dtype], m, k, ldx, packed.data_ptr(), packed.numel(), header["n"], 0, 0, y.data_ptr(),
        FLOATS[torch.float32], t.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return t
