"""The ops of the sparse kernels (``csrc/sparse``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pycompress import reference
from pycompress.ops import cuda, cuda_sparse
from pycompress.ops.native import (
    _C,
    ACTIVATIONS,
    EXACT_STRIDES,
    FLOATS,
    INT32,
    activation_code,
    channels,
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

# How a packed weight lies in memory. float32: rows (unstructured) and panels (16x1 blocks). int8: quads (unstructured), quads4
# (1x4), windows (N of M) and chains (16x4: the int8 op's own layout).
SPARSE_FORMATS = ("rows", "panels", "quads", "quads4", "windows", "chains")
# On a CUDA device: single weights (float32 alone), 2:4, square blocks.
CUDA_SPARSE_FORMATS = cuda_sparse.FORMATS
_VALUES = {32: torch.float32, 8: torch.int8}
MAX_STEP = 65536  # of a convolution: its kernel's sides, strides and dilations
Ints = Sequence[int]

# --- sparse_linear ----------------------------------------------------------------------------------------------------

library.define(
    "sparse_linear(Tensor x, Tensor packed, int n, Tensor? scale, Tensor? bias, str activation) -> Tensor",
    tags=EXACT_STRIDES,
)


def _sparse_linear_cpu(
    x: Tensor, packed: Tensor, n: int, scale: Tensor | None, bias: Tensor | None, activation: str
) -> Tensor:
    x, ldx = rows_of("sparse_linear", x)
    code = activation_code("sparse_linear", activation)
    check_operand("sparse_linear", "packed", packed, torch.uint8)
    scale_address = 0 if scale is None else channels("sparse_linear", "scale", scale, n)
    bias_address = 0 if bias is None else channels("sparse_linear", "bias", bias, n)
    shape = x.shape
    k = shape[-1]
    y = x.new_empty((*shape[:-1], n))
    kind = FLOATS[x.dtype]
    _C.sparse_linear(
        x.data_ptr(), kind, x.numel() // k if k else 0, k, ldx, packed.data_ptr(), packed.shape[0], n, scale_address,
        bias_address, code, y.data_ptr(), kind, 0, 0, torch.get_num_threads(),
    )  # fmt: skip
    return y


def _sparse_linear_fake(
    x: Tensor, packed: Tensor, n: int, scale: Tensor | None, bias: Tensor | None, activation: str  # noqa: ARG001
) -> Tensor:  # fmt: skip
    check_float("sparse_linear", x)
    return x.new_empty((*x.shape[:-1], n))


def _sparse_linear_vmapped(*operands: Any) -> Tensor:
    y: Tensor = _sparse_linear_op(*operands)
    return y


_sparse_linear_op = implement(
    "sparse_linear", _sparse_linear_cpu, _sparse_linear_fake, _sparse_linear_vmapped, cuda_sparse.linear
)


def sparse_linear(
    x: Tensor, packed: Tensor, n: int, scale: Tensor | None = None, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """``act(x W^T + bias)`` with a weight of which only the non-zero values are stored and multiplied.

    int8: as :func:`int8_linear`, exact integers with the same bits for every format, thread count and kernel. float32: a chain
    of fused multiply-adds over the stored weights of a row in ascending k, or another order of the same products, which stays
    within ``eps * (nnz_row + 2) * sum_k |x_k w_k| + eps * |y|``; a NaN or Inf in x shows where the row has a weight for it.
    On a CUDA device the products of float32 weights and their bounds are those of ``csrc/sparse/cuda.h``, ``structured.h`` and
    ``blocks.h``: zeros that stand beside weights are multiplied too, so that a NaN or Inf may show in more of its row, and x must
    be of the type, bfloat16 or float16, whose numbers the weights are.

    Args:
        x: float32, bfloat16 or float16, [..., k], any strides; converted to float32 exactly, the result is rounded once.
        packed: from :func:`sparse_pack`.
        n: out_features.
        scale: float32 [n] for int8 weights, None for float32.
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
            if code >= 0 and _C.sparse_linear_tensors(x, packed, scale, bias, code, y, torch.get_num_threads()):
                return y
        return _sparse_linear_cpu(x, packed, n, scale, bias, activation)
    if x.is_cuda and nobody_looks(x):
        return cuda_sparse.linear(x, packed, n, scale, bias, activation)
    result: Tensor = _sparse_linear_op(x, packed, n, scale, bias, activation)
    return result


# --- sparse_conv2d ----------------------------------------------------------------------------------------------------

library.define(
    "sparse_conv2d(Tensor x, Tensor packed, int n, Tensor? bias, int[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation, str activation) -> Tensor",
    tags=EXACT_STRIDES,
)


def _conv2d_shape(x: Tensor, n: int, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints) -> tuple[int, ...]:
    """Of the result: [..., n, out_h, out_w] for x [..., channels, height, width]."""
    if x.dtype not in FLOATS:
        check_float("sparse_conv2d", x)
    if x.dim() not in (3, 4):
        raise ValueError(f"sparse_conv2d: x is {list(x.shape)}, expected [N, C, H, W] or [C, H, W]")
    pairs = (*kernel_size, *stride, *dilation)
    counts = len(kernel_size), len(stride), len(dilation), len(padding)
    if counts != (2, 2, 2, 4) or min(pairs) < 1 or min(padding) < 0 or max(pairs) > MAX_STEP:
        raise ValueError(
            f"sparse_conv2d: kernel_size is {tuple(kernel_size)}, stride {tuple(stride)}, padding {tuple(padding)}, dilation "
            f"{tuple(dilation)}, expected two numbers from 1 to {MAX_STEP} of each, of padding four from 0"
        )
    *images, _, height, width = x.shape
    height += padding[0] + padding[1]
    width += padding[2] + padding[3]
    reach_h, reach_w = dilation[0] * (kernel_size[0] - 1) + 1, dilation[1] * (kernel_size[1] - 1) + 1
    if height < reach_h or width < reach_w:
        raise ValueError(
            f"sparse_conv2d: x with its padding is {height}x{width}, expected at least {reach_h}x{reach_w}, as far as the "
            "kernel reaches"
        )
    return (*images, n, (height - reach_h) // stride[0] + 1, (width - reach_w) // stride[1] + 1)


def _sparse_conv2d_cpu(
    x: Tensor, packed: Tensor, n: int, bias: Tensor | None, kernel_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, activation: str,
) -> Tensor:  # fmt: skip
    shape = _conv2d_shape(x, n, kernel_size, stride, padding, dilation)
    x, _ = rows_of("sparse_conv2d", x)  # of more than two dimensions: contiguous
    code = activation_code("sparse_conv2d", activation)
    check_operand("sparse_conv2d", "packed", packed, torch.uint8)
    bias_address = 0 if bias is None else channels("sparse_conv2d", "bias", bias, n)
    y = x.new_empty(shape)
    _C.sparse_conv2d(
        x.data_ptr(), FLOATS[x.dtype], x.shape[0] if x.dim() == 4 else 1, *x.shape[-3:], packed.data_ptr(),
        packed.shape[0], n, bias_address, code, *kernel_size, *stride, padding[0], padding[2], *dilation, *shape[-2:],
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _sparse_conv2d_fake(
    x: Tensor, packed: Tensor, n: int, bias: Tensor | None, kernel_size: Ints, stride: Ints, padding: Ints,  # noqa: ARG001
    dilation: Ints, activation: str,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    return x.new_empty(_conv2d_shape(x, n, kernel_size, stride, padding, dilation))


def _sparse_conv2d_vmapped(x: Tensor, *operands: Any) -> Tensor:
    check(x.dim() in (4, 5), f"sparse_conv2d: x is {list(x.shape[1:])}, expected [N, C, H, W] or [C, H, W]")
    y: Tensor = _sparse_conv2d_op(x.reshape(-1, *x.shape[-3:]), *operands)
    return y.reshape(*x.shape[:-3], *y.shape[-3:])


_sparse_conv2d_op = implement("sparse_conv2d", _sparse_conv2d_cpu, _sparse_conv2d_fake, _sparse_conv2d_vmapped)


def sparse_conv2d(
    x: Tensor, packed: Tensor, n: int, bias: Tensor | None, kernel_size: Ints, stride: Ints = (1, 1),
    padding: Ints = (0, 0, 0, 0), dilation: Ints = (1, 1), activation: str = "none",
) -> Tensor:  # fmt: skip
    """``act(conv2d(x, W) + bias)`` with a float32 weight of which only the non-zero values are stored and multiplied.

    An output is a chain of fused multiply-adds over the stored weights of its channel in ascending k, k counting the weights
    [C, kernel height, kernel width] in this order; around x lie zeros. A NaN or Inf in x shows where a weight meets it.

    Args:
        x: float32, bfloat16 or float16, [N, C, H, W] or [C, H, W], any strides; converted to float32 exactly, the result is
            rounded once.
        packed: uint8 vector from :func:`sparse_pack` of the weight [n, C * kernel height * kernel width].
        n: output channels.
        bias: float32 [n] or None.
        kernel_size, stride, dilation: (height, width), from 1 to MAX_STEP.
        padding: rows and columns of zeros at the (top, bottom, left, right) of x.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``.
    Returns:
        [N, n, out height, out width] or without N, contiguous, of x's dtype.
    Raises:
        TypeError: x has another dtype. ValueError: sizes or dtypes do not fit, or the weight is int8. RuntimeError: a tensor is
        not on the CPU.
    """
    call = _sparse_conv2d_cpu if is_plain(x) else _sparse_conv2d_op
    result: Tensor = call(x, packed, n, bias, kernel_size, stride, padding, dilation, activation)
    return result


# --- packing ----------------------------------------------------------------------------------------------------------

library.define("sparse_pack(Tensor mask, Tensor values, int k, int activation_bits=0, str format='') -> Tensor")


def _sparse_pack_cpu(mask: Tensor, values: Tensor, k: int, activation_bits: int = 0, format: str = "") -> Tensor:  # noqa: A002
    mask, values = _checked(mask, values, k)
    data = _C.sparse_pack(
        mask.data_ptr(), values.data_ptr(), mask.shape[0], k, values.shape[0], 8 * values.element_size(),
        activation_bits, format, torch.get_num_threads(),
    )  # fmt: skip
    return vector(data)


def _sparse_pack_cuda(mask: Tensor, values: Tensor, k: int, activation_bits: int = 0, format: str = "") -> Tensor:  # noqa: A002
    """By way of the CPU: once for a weight."""
    cuda.check_devices("sparse_pack", mask, values)
    return cuda_sparse.pack(*_checked(mask.cpu(), values.cpu(), k), k, activation_bits, format, mask.device)


def _checked(mask: Tensor, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both as the native module reads them."""
    row_bytes = -(-k // 8)
    check(
        mask.dtype == torch.uint8 and mask.dim() == 2 and mask.shape[1] == row_bytes,
        f"sparse_pack: mask is {mask.dtype} {list(mask.shape)}, expected uint8 [n, {row_bytes}] for k = {k}",
    )
    check(
        values.dtype in _VALUES.values() and values.dim() == 1,
        f"sparse_pack: values is {values.dtype} {list(values.shape)}, expected float32 or int8 [nnz]",
    )
    mask, values = mask.contiguous(), values.detach().resolve_neg().contiguous()
    _check_sparse_values(mask.numpy(), values.numpy(), k)
    return mask, values


def _check_sparse_values(mask: NDArray[np.uint8], values: NDArray[Any], k: int) -> None:
    """In NumPy, which has no threads that a forked process would miss."""
    if k % 8 and mask.size:
        check(not (mask[:, -1] >> k % 8).any(), f"sparse_pack: the mask has bits set behind k = {k}")
    # By its bits: a subnormal number is no zero, whatever torch.set_flush_denormal says.
    zero = values.view(np.int32) << 1 == 0 if values.dtype == np.float32 else values == 0
    check(not zero.any(), f"sparse_pack: {zero.sum()} values are zero, expected them to be left out of the mask")
    if values.dtype == np.float32:
        check(bool(np.isfinite(values).all()), "sparse_pack: a value is NaN or Inf, expected finite values")
    else:
        check(not (values == -128).any(), "sparse_pack: a value is -128, expected -127 to 127 (the scale is symmetric)")


def _sparse_pack_fake(mask: Tensor, values: Tensor, k: int, activation_bits: int = 0, format: str = "") -> Tensor:  # noqa: A002, ARG001
    if mask.is_cuda and not format:
        raise NotImplementedError(
            "sparse_pack: format is '' on a CUDA device, where it depends on the mask, which a compiler does not see; expected "
            f"one of {', '.join(cuda_sparse.FORMATS)}"
        )
    size = torch.library.get_ctx().new_dynamic_size()
    return mask.new_empty((*(cuda_sparse.leading(format, k) if mask.is_cuda else ()), size), dtype=torch.uint8)


library.impl("sparse_pack", _sparse_pack_cpu, "CPU")
library.impl("sparse_pack", _sparse_pack_cuda, "CUDA")
torch.library.register_fake("pycompress::sparse_pack", _sparse_pack_fake, lib=library)


def sparse_pack(mask: Tensor, values: Tensor, k: int, activation_bits: int = 0, format: str = "") -> Tensor:  # noqa: A002
    """Canonical weight -> a layout of the kernels here: a uint8 vector, for this process only.

    On a CUDA device: uint8 [k, ...], [1, k, ...] or [1, 1, k, ...], as the mask's pattern suggests. Square blocks, where at most
    50 % of those of 64x64, 40 % of 32x32 or 35 % of 16x16 have a weight; else 2:4, where each four consecutive input features
    have at most two; else, for float32 alone, single weights, for few rows.

    Args:
        mask: uint8 [n, ceil(k / 8)]: bit i % 8 (least significant first) of byte i // 8 of row r says whether weight[r, i] is
            stored.
        values: float32 or int8 [nnz], the weights that are stored, row after row in ascending k; none is zero.
        k: in_features, 1 to 65536.
        activation_bits: 7 or 8 for int8, 0 for float32.
        format: one of SPARSE_FORMATS, or of CUDA_SPARSE_FORMATS on a CUDA device, to force it; the one that is expected to be
            the fastest where it is not given.
    Raises:
        ValueError: wrong dtypes or shapes; mask and values that do not fit each other; a value that is 0, -128, NaN or Inf;
            a format that does not exist or cannot hold this weight; on a CUDA device float32 values that are neither all
            bfloat16 nor all float16 numbers, and int8 in none of the patterns there.
    """
    packed: Tensor = torch.ops.pycompress.sparse_pack.default(mask, values, k, activation_bits, format)
    return packed


def sparse_format(packed: Tensor) -> str:
    """One of SPARSE_FORMATS, or of CUDA_SPARSE_FORMATS on a CUDA device: the one that packing chose."""
    return cuda_sparse.format_of(packed) if packed.is_cuda else str(sparse_header(packed)["format"])


def sparse_header(packed: Tensor) -> dict[str, Any]:
    """What a packed weight holds: n, k, nnz, bits (32 or 8), activation_bits (0 for float32) and format."""
    check_operand("sparse_header", "packed", packed, torch.uint8)
    header: dict[str, Any] = _C.sparse_header(packed.data_ptr(), packed.numel())
    return header


library.define("sparse_unpack(Tensor packed, int n, int k, int nnz, int bits) -> (Tensor, Tensor)")


def _sparse_unpack_cpu(packed: Tensor, n: int, k: int, nnz: int, bits: int) -> tuple[Tensor, Tensor]:
    header = sparse_header(packed)
    found = header["n"], header["k"], header["nnz"], header["bits"]
    check(
        found == (n, k, nnz, bits),
        f"sparse_unpack: n, k, nnz and bits of the packed weight are {found}, not {(n, k, nnz, bits)}",
    )
    mask, values = torch.empty((n, -(-k // 8)), dtype=torch.uint8), torch.empty(nnz, dtype=_VALUES[bits])
    _C.sparse_unpack(packed.data_ptr(), packed.numel(), mask.data_ptr(), values.data_ptr())
    return mask, values


def _sparse_unpack_fake(packed: Tensor, n: int, k: int, nnz: int, bits: int) -> tuple[Tensor, Tensor]:
    return packed.new_empty((n, (k + 7) // 8)), packed.new_empty((nnz,), dtype=_VALUES[bits])


library.impl("sparse_unpack", _sparse_unpack_cpu, "CPU")
library.impl("sparse_unpack", cuda_sparse.unpack, "CUDA")
torch.library.register_fake("pycompress::sparse_unpack", _sparse_unpack_fake, lib=library)


def sparse_unpack(packed: Tensor, sizes: tuple[int, int, int, int] | None = None) -> tuple[Tensor, Tensor]:
    """The mask and the values that :func:`sparse_pack` was given, exactly. Costs a pass over the weight.

    Args:
        sizes: (n, k, nnz, bits); read from the packed weight where they are not given, on the CPU, which a compiler cannot see
            through.
    """
    if sizes is None:
        header = sparse_header(packed)
        sizes = header["n"], header["k"], header["nnz"], header["bits"]
    mask, values = torch.ops.pycompress.sparse_unpack.default(packed, *sizes)
    return mask, values


library.define("sparse_dense(Tensor packed, int n, int k, int bits) -> Tensor")


def _sparse_dense_cpu(packed: Tensor, n: int, k: int, bits: int) -> Tensor:
    header = sparse_header(packed)
    found = header["n"], header["k"], header["bits"]
    check(found == (n, k, bits), f"sparse_dense: n, k and bits of the packed weight are {found}, not {(n, k, bits)}")
    mask, values = sparse_unpack(packed)
    return torch.from_numpy(reference.sparse.decompress(mask.numpy(), values.numpy(), k))


def _sparse_dense_fake(packed: Tensor, n: int, k: int, bits: int) -> Tensor:
    return packed.new_empty((n, k), dtype=_VALUES[bits])


library.impl("sparse_dense", _sparse_dense_cpu, "CPU")
library.impl("sparse_dense", cuda_sparse.dense, "CUDA")
torch.library.register_fake("pycompress::sparse_dense", _sparse_dense_fake, lib=library)


def sparse_dense(packed: Tensor, sizes: tuple[int, int, int] | None = None) -> Tensor:
    """The weight with its zeros: float32 or int8 [n, k], without the scale. Costs a pass over the weight.

    Args:
        sizes: (n, k, bits); read from the packed weight where they are not given, on the CPU, which a compiler cannot see through.
    """
    if sizes is None:
        header = sparse_header(packed)
        sizes = header["n"], header["k"], header["bits"]
    weight: Tensor = torch.ops.pycompress.sparse_dense.default(packed, *sizes)
    return weight


# --- the integers alone, for validation and tests ---------------------------------------------------------------------


def sparse_accumulate(x: Tensor, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The integers of :func:`sparse_linear`, before any float: acc[m, n] = sum_k (q[m, k] - zero_point[m]) w[n, k].

    Args:
        x: float32, bfloat16 or float16, [m, k].
        packed: int8 weights from :func:`sparse_pack`.
    Returns:
        acc int32 [m, n], scale float32 [m], zero point int32 [m].
    Raises:
        ValueError: sizes do not fit, or the weights are float32.
    """
    x, ldx = matrix_of("sparse_accumulate", x)
    if x.is_cuda:
        return cuda_sparse.accumulate(x, ldx, packed)
    header = sparse_header(packed)
    check(header["bits"] == 8, "sparse_accumulate: the packed weight is float32, expected int8")
    (m, k), n = x.shape, header["n"]
    acc = torch.empty((m, n), dtype=torch.int32)
    scale, zero_point = torch.empty(m), torch.empty(m, dtype=torch.int32)
    _C.sparse_linear(
        x.data_ptr(), FLOATS[x.dtype], m, k, ldx, packed.data_ptr(), packed.numel(), n, 0, 0, 0,
        acc.data_ptr(), INT32, scale.data_ptr(), zero_point.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return acc, scale, zero_point
