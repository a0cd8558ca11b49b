"""The ops of sparse weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pycompress.ops import cpu
from pycompress.ops.checks import Ints, check_float, check_tensor, conv2d_shape, nobody_looks
from pycompress.ops.conv2d import CONV2D, vmapped
from pycompress.ops.flops import counted, of_positions
from pycompress.ops.form import parse
from pycompress.ops.registry import define, implement

SPARSE_FORMATS = cpu.sparse.FORMATS
OP = define("sparse", cpu.sparse, "pycompress.ops.cuda.sparse")


def sparse_linear(x: Tensor, packed: Tensor, form: str, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """``act(x W^T + bias)`` with a weight of which only the non-zero values are stored and multiplied.

    int8: as :func:`int8_linear`, exact integers with the same bits for every format, thread count and kernel. float32: a chain
    of fused multiply-adds over the stored weights of a row in ascending k, or another order of the same products, which stays
    within ``eps * (nnz_row + 2) * sum_k |x_k w_k| + eps * |y|``; a NaN or Inf in x shows where the row has a weight for it.
    On a CUDA device the products of float32 weights and their bounds are those of ``csrc/sparse/bitmap``, ``structured`` and
    ``blocks`` (``cuda.h`` there): zeros that stand beside weights are multiplied too, so that a NaN or Inf may show in more of
    its row, and x must be of the type, bfloat16 or float16, whose numbers the weights are.

    Args:
        x: float32, bfloat16 or float16, [..., k], any strides; converted to float32 exactly, the result is rounded once.
        packed, form: from :func:`pycompress.ops.pack`.
        bias: float32 [n] or None.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh``, ``silu``, ``quick_gelu``, ``relu6`` or ``hardswish``.
    Returns:
        [..., n], dense, of x's dtype.
    Raises:
        TypeError: x has another dtype. ValueError: sizes or dtypes do not fit. RuntimeError: the tensors are not all on the CPU
        or on one CUDA device, or there are no CUDA kernels.
    """
    return OP.linear(x, packed, form, bias, activation)


def sparse_accumulate(x: Tensor, packed: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """The integers of :func:`sparse_linear`, before any float: acc[m, n] = sum_k (q[m, k] - zero_point[m]) w[n, k].

    Args:
        x: float32, bfloat16 or float16, [m, k].
        packed, form: of int8 weights, from :func:`pycompress.ops.pack`.
    Returns:
        acc int32 [m, n], scale float32 [m], zero point int32 [m].
    Raises:
        ValueError: sizes do not fit, or the weights are float32.
    """
    acc, scale, zero_point = OP.doors.of("sparse_accumulate", x.device, x, packed).accumulate(x, packed, form)
    return acc, scale, zero_point


# --- sparse_conv2d ----------------------------------------------------------------------------------------------------


def _conv2d_fake(
    x: Tensor, packed: Tensor, form: str, bias: Tensor | None, kernel_size: Ints, stride: Ints, padding: Ints,  # noqa: ARG001
    dilation: Ints, activation: str,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    check_float("sparse_conv2d", x)
    return x.new_empty(conv2d_shape("sparse_conv2d", x.shape, parse(form).n, kernel_size, stride, padding, dilation))


_conv2d_op: Any = implement(
    "sparse_conv2d",
    "(Tensor x, Tensor packed, str form, Tensor? bias, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "str activation) -> Tensor",
    OP.doors,
    "conv2d",
    _conv2d_fake,
    CONV2D.differentiable(OP.dense),
    vmapped("sparse_conv2d", lambda: _conv2d_op),
)
counted("sparse_conv2d", of_positions)


def sparse_conv2d(
    x: Tensor, packed: Tensor, form: str, bias: Tensor | None, kernel_size: Ints, stride: Ints = (1, 1),
    padding: Ints = (0, 0, 0, 0), dilation: Ints = (1, 1), activation: str = "none",
) -> Tensor:  # fmt: skip
    """``act(conv2d(x, W) + bias)`` with a float32 weight of which only the non-zero values are stored and multiplied.

    An output is a chain of fused multiply-adds over the stored weights of its channel in ascending k, k counting the weights
    [C, kernel height, kernel width] in this order; around x lie zeros. A NaN or Inf in x shows where a weight meets it.

    Args:
        x: float32, bfloat16 or float16, [N, C, H, W] or [C, H, W], any strides; converted to float32 exactly, the result is
            rounded once.
        packed, form: from :func:`pycompress.ops.pack` of the weight [n, C * kernel height * kernel width].
        bias: float32 [n] or None.
        kernel_size, stride, dilation: (height, width), from 1 to MAX_STEP.
        padding: rows and columns of zeros at the (top, bottom, left, right) of x.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh``, ``silu``, ``quick_gelu``, ``relu6`` or ``hardswish``.
    Returns:
        [N, n, out height, out width] or without N, contiguous, of x's dtype.
    Raises:
        TypeError: x has another dtype. ValueError: sizes or dtypes do not fit, or the weight is int8. RuntimeError: a tensor is
        not on the CPU.
    """
    check_tensor("sparse_conv2d", x)
    direct = nobody_looks(x) and x.is_cpu and (bias is None or not (bias.requires_grad or bias.is_neg()))
    call = cpu.sparse.conv2d if direct else _conv2d_op
    result: Tensor = call(x, packed, form, bias, kernel_size, stride, padding, dilation, activation)
    return result
