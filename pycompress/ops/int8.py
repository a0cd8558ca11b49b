"""The ops of the int8 kernels (``csrc/int8``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycompress.ops import cuda, cuda_weight_only
from pycompress.ops.native import (
    _C,
    ACTIVATIONS,
    EXACT_STRIDES,
    FLOATS,
    INT32,
    activation_code,
    check,
    check_float,
    check_operand,
    implement,
    is_plain,
    library,
    matrix_of,
    nobody_looks,
    reads_tensors,
    rows_of,
    vector,
)

# --- int8_linear ------------------------------------------------------------------------------------------------------

library.define(
    "int8_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, str activation) -> Tensor", tags=EXACT_STRIDES
)


def _int8_linear_cpu(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    x, ldx = rows_of("int8_linear", x)
    code = activation_code("int8_linear", activation)
    check_operand("int8_linear", "packed", packed, torch.uint8)
    check_operand("int8_linear", "scale", scale, torch.float32)
    shape, n = x.shape, scale.shape[0]
    k = shape[-1]
    bias_address = 0
    if bias is not None:
        check_operand("int8_linear", "bias", bias, torch.float32)
        if bias.shape[0] != n:
            raise ValueError(f"int8_linear: bias is {list(bias.shape)}, expected [{n}]")
        bias_address = bias.data_ptr()
    y = x.new_empty((*shape[:-1], n))
    kind = FLOATS[x.dtype]
    _C.int8_linear(
        x.data_ptr(), kind, x.numel() // k if k else 0, k, ldx, packed.data_ptr(), packed.shape[0], n, scale.data_ptr(),
        bias_address, code, y.data_ptr(), kind, 0, 0, torch.get_num_threads(),
    )  # fmt: skip
    return y


def _int8_linear_fake(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:  # noqa: ARG001
    check_float("int8_linear", x)
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def _int8_linear_vmapped(*operands: Any) -> Tensor:
    y: Tensor = _int8_linear_op(*operands)
    return y


_int8_linear_op = implement(
    "int8_linear", _int8_linear_cpu, _int8_linear_fake, _int8_linear_vmapped, cuda_weight_only.int8_linear
)


def int8_linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """``act(x W^T + bias)`` with int8 weights, activations quantized per row inside the op.

    The formula and its rounding are in ``csrc/int8/gemm.h``: exact integers, float32 steps in a fixed order, so the result
    has the same bits for every thread count and every kernel.
    Packed for 16 bits, activations stay floating point: the bound is that of :func:`pycompress.ops.int4_linear`.

    Args:
        x: float32, bfloat16 or float16, [..., k], any strides. A row with NaN or Inf gives a row of NaN; packed for 16 bits, NaN
            or Inf where a weight meets it, zeros included.
        packed: uint8 vector from :func:`int8_pack`.
        scale: float32 [n], one per output channel.
        bias: float32 [n] or None.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``.
    Returns:
        [..., n], dense, of x's dtype.
    Raises:
        TypeError: x has another dtype. ValueError: sizes or dtypes do not fit. RuntimeError: the tensors are not all on the CPU
        or on one CUDA device, or the kernels cannot run there.
    """
    if is_plain(x):
        if reads_tensors and scale.dim() == 1 and x.dim() != 0:
            y = x.new_empty((*x.shape[:-1], scale.shape[0]))
            code = ACTIVATIONS.get(activation, -1)
            if code >= 0 and _C.int8_linear_tensors(x, packed, scale, bias, code, y, torch.get_num_threads()):
                return y
        return _int8_linear_cpu(x, packed, scale, bias, activation)
    if x.is_cuda and nobody_looks(x):
        return cuda_weight_only.int8_linear(x, packed, scale, bias, activation)
    result: Tensor = _int8_linear_op(x, packed, scale, bias, activation)
    return result


# --- packing ----------------------------------------------------------------------------------------------------------

library.define("int8_pack(Tensor values, int activation_bits, str kernel='') -> Tensor")


def _int8_pack_cpu(values: Tensor, activation_bits: int, kernel: str = "") -> Tensor:
    if values.dtype != torch.int8 or values.dim() != 2:
        raise ValueError(f"int8_pack: values is {values.dtype} {list(values.shape)}, expected int8 [n, k]")
    check(activation_bits in {7, 8, 16}, f"int8_pack: activation_bits is {activation_bits}, expected 7, 8 or 16")
    values = values.contiguous()
    n, k = values.shape
    return vector(_C.int8_pack(values.data_ptr(), n, k, activation_bits, kernel, torch.get_num_threads()))


def _int8_pack_fake(values: Tensor, activation_bits: int, kernel: str = "") -> Tensor:  # noqa: ARG001
    return values.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.uint8)


library.impl("int8_pack", _int8_pack_cpu, "CPU")
library.impl("int8_pack", cuda_weight_only.int8_pack, "CUDA")
torch.library.register_fake("pycompress::int8_pack", _int8_pack_fake, lib=library)


def int8_pack(values: Tensor, activation_bits: int, kernel: str = "") -> Tensor:
    """Canonical weight -> the layout of the best kernel here (or of the one named): a uint8 vector, for this process only.

    On a CUDA device the weight is packed there, for all kernels alike; the packed weights of CPU and GPU differ.

    Args:
        values: int8 [n, k], in [-127, 127].
        activation_bits: 7 or 8, the range of the activations that the packed weight will meet; 16: they stay floating point.
        kernel: a name from :func:`pycompress.ops.kernels`, to force it.
    Raises:
        ValueError: wrong dtype or shape, a -128, k > 65536, or a kernel that cannot run here.
    """
    packed: Tensor = torch.ops.pycompress.int8_pack.default(values, activation_bits, kernel)
    return packed


library.define("int8_unpack(Tensor packed, int n, int k) -> Tensor")


def _int8_unpack_cpu(packed: Tensor, n: int, k: int) -> Tensor:
    check_operand("int8_unpack", "packed", packed, torch.uint8)
    header = _C.int8_header(packed.data_ptr(), packed.numel())
    check(
        (header["n"], header["k"]) == (n, k),
        f"int8_unpack: the packed weight is {header['n']}x{header['k']}, not {n}x{k}",
    )
    values = torch.empty((n, k), dtype=torch.int8)
    _C.int8_unpack(packed.data_ptr(), packed.numel(), values.data_ptr())
    return values


def _int8_unpack_fake(packed: Tensor, n: int, k: int) -> Tensor:
    return packed.new_empty((n, k), dtype=torch.int8)


library.impl("int8_unpack", _int8_unpack_cpu, "CPU")
library.impl("int8_unpack", cuda_weight_only.int8_unpack, "CUDA")
torch.library.register_fake("pycompress::int8_unpack", _int8_unpack_fake, lib=library)


def int8_unpack(packed: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
    """The int8 [n, k] that :func:`int8_pack` was given, exactly. Costs a pass over the weight.

    Args:
        shape: (n, k); read from the packed weight where it is not given.
    """
    if shape is None:
        header = int8_depths(packed)
        shape = header["n"], header["k"]
    values: Tensor = torch.ops.pycompress.int8_unpack.default(packed, *shape)
    return values


def int8_depths(packed: Tensor) -> dict[str, Any]:
    """What a packed weight holds, n, k and activation_bits, and how it spends its lane budget: ``groups`` of four positions, and
    ``items`` run at depth 4, 2 and 1. (It has none for activations of 16 bits, nor on a CUDA device.)"""
    if packed.is_cuda:
        return cuda.int8_header(packed)
    check_operand("int8_depths", "packed", packed, torch.uint8)
    header: dict[str, Any] = _C.int8_header(packed.data_ptr(), packed.numel())
    return header


# --- the integers alone, for validation and tests ---------------------------------------------------------------------


def int8_quantize(x: Tensor, activation_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The quantizer of :func:`int8_linear` alone.

    Args:
        x: float32, bfloat16 or float16, [m, k].
        activation_bits: 7 or 8.
    Returns:
        q uint8 [m, k], scale float32 [m], zero point int32 [m]; q = 0 and scale NaN for a row with NaN or Inf.
    """
    x, ldx = matrix_of("int8_quantize", x)
    if x.is_cuda:
        return cuda.int8_quantize(x, ldx, activation_bits)
    m, k = x.shape
    q = torch.empty((m, k), dtype=torch.uint8)
    scale, zero_point = torch.empty(m), torch.empty(m, dtype=torch.int32)
    _C.int8_quantize(
        x.data_ptr(), FLOATS[x.dtype], m, k, ldx, activation_bits, q.data_ptr(), scale.data_ptr(), zero_point.data_ptr(),
    )  # fmt: skip
    return q, scale, zero_point


def int8_accumulate(x: Tensor, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The integers of :func:`int8_linear`, before any float: acc[m, n] = sum_k (q[m, k] - zero_point[m]) w[n, k].

    Args:
        x: float32, bfloat16 or float16, [m, k].
        packed: from :func:`int8_pack`, for 7 or 8 bits.
    Returns:
        acc int32 [m, n], scale float32 [m], zero point int32 [m].
    """
    x, ldx = matrix_of("int8_accumulate", x)
    if x.is_cuda:
        return cuda.int8_accumulate(x, ldx, packed)
    check_operand("int8_accumulate", "packed", packed, torch.uint8)
    (m, k), header = x.shape, int8_depths(packed)
    n, bits = header["n"], header["activation_bits"]
    check(
        bits != 16,
        f"int8_accumulate: the packed weight's activation_bits is {bits}, expected 7 or 8: there are no integers",
    )
    acc = torch.empty((m, n), dtype=torch.int32)
    scale, zero_point = torch.empty(m), torch.empty(m, dtype=torch.int32)
    _C.int8_linear(
        x.data_ptr(), FLOATS[x.dtype], m, k, ldx, packed.data_ptr(), packed.numel(), n, 0, 0, 0,
        acc.data_ptr(), INT32, scale.data_ptr(), zero_point.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return acc, scale, zero_point
