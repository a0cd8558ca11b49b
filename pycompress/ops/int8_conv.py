"""The op of int8 convolutions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pycompress.ops import cpu
from pycompress.ops.checks import Ints, check_float, check_tensor, nobody_looks
from pycompress.ops.conv2d import CONV2D, vmapped
from pycompress.ops.flops import counted, of_positions
from pycompress.ops.int8 import OP
from pycompress.ops.registry import Doors, implement

_DOORS = Doors("int8_conv2d", cpu.int8_conv)


def _fake(
    x: Tensor, packed: Tensor, form: str, bias: Tensor | None, kernel_size: Ints, stride: Ints, padding: Ints,  # noqa: ARG001
    dilation: Ints, groups: int, activation: str,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    check_float("int8_conv2d", x)
    return cpu.int8_conv.result(x, form, kernel_size, stride, padding, dilation, groups)


_op: Any = implement(
    "int8_conv2d",
    "(Tensor x, Tensor packed, str form, Tensor? bias, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "int groups, str activation) -> Tensor",
    _DOORS,
    "conv2d",
    _fake,
    CONV2D.differentiable(OP.dense),
    vmapped("int8_conv2d", lambda: _op),
)
counted("int8_conv2d", of_positions)


def int8_conv2d(
    x: Tensor, packed: Tensor, form: str, bias: Tensor | None, kernel_size: Ints, stride: Ints = (1, 1),
    padding: Ints = (0, 0, 0, 0), dilation: Ints = (1, 1), groups: int = 1, activation: str = "none",
) -> Tensor:  # fmt: skip
    """``act(conv2d(x, W) + bias)`` with int8 weights, activations quantized per image inside the op.

    The formula and its rounding are in ``csrc/conv/conv.h``: exact integers, float32 steps in a fixed order, so the result has
    the same bits for every thread count, memory format and kernel. Around x lie zeros, which are quantized exactly.

    Args:
        x: float32, bfloat16 or float16, [N, C, H, W] or [C, H, W], any strides. An image with NaN or Inf gives an image of NaN.
        packed, form: from :func:`pycompress.ops.pack` of the weight [n, C / groups * kernel height * kernel width], packed for a
            convolution.
        bias: float32 [n] or None.
        kernel_size, stride, dilation: (height, width), from 1 to MAX_STEP.
        padding: rows and columns of zeros at the (top, bottom, left, right) of x.
        groups: of channels.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh``, ``silu``, ``quick_gelu``, ``relu6`` or ``hardswish``.
    Returns:
        [N, n, out height, out width] or without N, of x's dtype; channels last where x is.
    Raises:
        TypeError: x has another dtype. ValueError: sizes or dtypes do not fit. RuntimeError: a tensor is not on the CPU.
    """
    check_tensor("int8_conv2d", x)
    direct = nobody_looks(x) and x.is_cpu and (bias is None or not (bias.requires_grad or bias.is_neg()))
    call = cpu.int8_conv.conv2d if direct else _op
    y: Tensor = call(x, packed, form, bias, kernel_size, stride, padding, dilation, groups, activation)
    return y


def int8_conv2d_accumulate(
    x: Tensor, packed: Tensor, form: str, kernel_size: Ints, stride: Ints = (1, 1), padding: Ints = (0, 0, 0, 0),
    dilation: Ints = (1, 1), groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The integers of :func:`int8_conv2d`, before any float: sums of (q - zero point of the image) * w.

    Returns:
        acc int32 [N, n, out height, out width], scale float32 [N], zero point int32 [N].
    """
    door = _DOORS.of("int8_conv2d_accumulate", x.device, x, packed, function="accumulate")
    acc, scale, zero_point = door.accumulate(x, packed, form, kernel_size, stride, padding, dilation, groups)
    return acc, scale, zero_point
