"""The ops of int8 weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pycompress.ops import cpu
from pycompress.ops.registry import define

OP = define("int8", cpu.int8, "pycompress.ops.cuda.int8")


def int8_linear(x: Tensor, packed: Tensor, form: str, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """``act(x W^T + bias)`` with int8 weights, activations quantized inside the op: per row, or by the range of a static weight.

    The formula and its rounding are in ``csrc/int8/gemm.h``: exact integers, float32 steps in a fixed order, so the result
    has the same bits for every thread count and every kernel.
    Packed for 16 bits, activations stay floating point: the bound is that of :func:`pycompress.ops.int4_linear`.

    Args:
        x: float32, bfloat16 or float16, [..., k], any strides. A row with NaN or Inf gives a row of NaN; packed for 16 bits, NaN
            or Inf where a weight meets it, zeros included.
        packed, form: from :func:`pycompress.ops.pack`.
        bias: float32 [n] or None.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh``, ``silu``, ``quick_gelu``, ``relu6`` or ``hardswish``.
    Returns:
        [..., n], dense, of x's dtype.
    Raises:
        TypeError: x has another dtype. ValueError: sizes or dtypes do not fit. RuntimeError: the tensors are not all on the CPU
        or on one CUDA device, or the kernels cannot run there.
    """
    return OP.linear(x, packed, form, bias, activation)


def int8_depths(packed: Tensor, form: str) -> dict[str, Any]:
    """What a packed weight on the CPU says: n, k and activation_bits, and how it spends its lane budget: ``groups`` of four
    positions, and ``items`` run at depth 4, 2 and 1. (It has none for activations of 16 bits.)"""
    return cpu.int8.depths(packed, form)


# --- the integers alone, for validation and tests ---------------------------------------------------------------------


def int8_quantize(
    x: Tensor, activation_bits: int, input_range: tuple[float, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The quantizer of :func:`int8_linear` alone.

    Args:
        x: float32, bfloat16 or float16, [m, k].
        activation_bits: 7 or 8.
        input_range: scale and zero point of a static weight's input, the same for all rows (on the CPU); None: each row's own.
    Returns:
        q uint8 [m, k], scale float32 [m], zero point int32 [m]; of a row with NaN or Inf scale NaN, and q as of zeros.
    """
    door = OP.doors.of("int8_quantize", x.device, x)
    q, scale, zero_point = door.quantize(x, activation_bits, *(() if input_range is None else (input_range,)))
    return q, scale, zero_point


def int8_round(x: Tensor, activation_bits: int, input_range: tuple[float, int] | None = None) -> Tensor:
    """What the integers of :func:`int8_quantize` mean, ``(q - zero_point) * scale``: what a layer multiplies.

    Args:
        x: float32, bfloat16 or float16, [m, k].
        activation_bits, input_range: as of :func:`int8_quantize`.
    Returns:
        float32 [m, k]; NaN in a row with NaN or Inf.
    """
    if x.device.type == "cpu":
        return cpu.int8.rounded(x, activation_bits, input_range)
    q, scale, zero_point = int8_quantize(x, activation_bits, input_range)
    return (q.float() - zero_point[:, None]) * scale[:, None]


def int8_accumulate(x: Tensor, packed: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """The integers of :func:`int8_linear`, before any float: acc[m, n] = sum_k (q[m, k] - zero_point[m]) w[n, k].

    Args:
        x: float32, bfloat16 or float16, [m, k].
        packed, form: from :func:`pycompress.ops.pack`, for 7 or 8 bits.
    Returns:
        acc int32 [m, n], scale float32 [m], zero point int32 [m].
    """
    acc, scale, zero_point = OP.doors.of("int8_accumulate", x.device, x, packed).accumulate(x, packed, form)
    return acc, scale, zero_point
