"""The ops of the int4 kernels (``csrc/int4``, and ``csrc/weight_only`` where activations stay floating point)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycompress import reference
from pycompress.ops import cuda_weight_only
from pycompress.ops.native import (
    _C,
    ACTIVATIONS,
    EXACT_STRIDES,
    MAX_IN_FEATURES,
    check,
    check_float,
    check_operand,
    implement,
    is_plain,
    library,
    linear_cpu,
    nobody_looks,
    reads_tensors,
    vector,
)

GROUPS = (32, 64, 128)
# Of a scale, as the bits of a bfloat16: 2^-126, the smallest normal one, and 2^124, of which 15 steps are finite.
_SMALLEST_SCALE, _LARGEST_SCALE = 0x0080, 0x7D80

# --- int4_linear ------------------------------------------------------------------------------------------------------

library.define(
    "int4_linear(Tensor x, Tensor packed, int n, Tensor? bias, str activation) -> Tensor", tags=EXACT_STRIDES
)


def _int4_linear_cpu(x: Tensor, packed: Tensor, n: int, bias: Tensor | None, activation: str) -> Tensor:
    return linear_cpu("int4_linear", x, packed, n, bias, activation)


def _int4_linear_fake(x: Tensor, packed: Tensor, n: int, bias: Tensor | None, activation: str) -> Tensor:  # noqa: ARG001
    check_float("int4_linear", x)
    return x.new_empty((*x.shape[:-1], n))


def _int4_linear_vmapped(*operands: Any) -> Tensor:
    y: Tensor = _int4_linear_op(*operands)
    return y


_int4_linear_op = implement(
    "int4_linear", _int4_linear_cpu, _int4_linear_fake, _int4_linear_vmapped, cuda_weight_only.int4_linear
)


def int4_linear(x: Tensor, packed: Tensor, n: int, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """``act(x W^T + bias)`` with 4-bit weights, a scale and a zero point for each channel and group of k.

    Packed for 8 bits, activations are quantized per row inside the op, exactly as :func:`int8_linear` quantizes them; the
    formula and its rounding are in ``csrc/int4/gemm.h``: exact integers inside a group, float32 steps in a fixed order, so the
    result has the same bits for every thread count and every kernel.
    Packed for 16 bits, activations stay floating point, and each result is within ``gamma(k + 4) sum_k |x w| + eps (|y| + |bias|)``
    of the exact one before the activation, gamma(q) = q u / (1 - q u) with u = 2^-24, the same bits for every thread count.

    Args:
        x: float32, bfloat16 or float16, [..., k], any strides; converted to float32 exactly, the result is rounded once. A row
            with NaN or Inf: 8 bits give a row of NaN, 16 bits NaN or Inf where a weight meets it, zeros included.
        packed: uint8 vector from :func:`int4_pack`.
        n: out_features.
        bias: float32 [n] or None.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``.
    Returns:
        [..., n], dense, of x's dtype.
    Raises:
        TypeError: x has another dtype. ValueError: sizes or dtypes do not fit. RuntimeError: a tensor is not on the CPU.
    """
    if is_plain(x):
        if reads_tensors and x.dim() != 0:
            y = x.new_empty((*x.shape[:-1], n))
            code = ACTIVATIONS.get(activation, -1)
            if code >= 0 and _C.int4_linear_tensors(x, packed, bias, code, y, torch.get_num_threads()):
                return y
        return _int4_linear_cpu(x, packed, n, bias, activation)
    if x.is_cuda and nobody_looks(x):
        return cuda_weight_only.int4_linear(x, packed, n, bias, activation)
    result: Tensor = _int4_linear_op(x, packed, n, bias, activation)
    return result


# --- packing ----------------------------------------------------------------------------------------------------------

library.define(
    "int4_pack(Tensor values, Tensor scale, Tensor? zero_point, int k, int group, int activation_bits) -> Tensor"
)


def _int4_pack_cpu(
    values: Tensor, scale: Tensor, zero_point: Tensor | None, k: int, group: int, activation_bits: int
) -> Tensor:
    check(1 <= k <= MAX_IN_FEATURES, f"int4_pack: in_features is {k}, expected 1 to {MAX_IN_FEATURES}")
    check(group in GROUPS, f"int4_pack: group is {group}, expected 32, 64 or 128")
    n, groups = values.shape[0] if values.dim() == 2 else 1, -(-k // group)
    values = _nibbles("values", values, n, k)
    scale = _scales(scale, (n, groups))
    zero_point = None if zero_point is None else _nibbles("zero_point", zero_point, n, groups)
    data = _C.int4_pack(
        values.data_ptr(), scale.data_ptr(), 0 if zero_point is None else zero_point.data_ptr(), n, k, group,
        activation_bits, torch.get_num_threads(),
    )  # fmt: skip
    return vector(data)


def _nibbles(name: str, tensor: Tensor, n: int, count: int) -> Tensor:
    """So many integers of 4 bits in each row, as the kernels read them. In NumPy, which has no threads (fork)."""
    expected = (n, -(-count // 2))
    check(
        tensor.dtype == torch.uint8 and tensor.shape == expected,
        f"int4_pack: {name} is {tensor.dtype} {list(tensor.shape)}, expected uint8 {list(expected)}",
    )
    tensor = tensor.contiguous()
    check(
        count % 2 == 0 or not (tensor.numpy()[:, -1] > 15).any(),
        f"int4_pack: {name} has bits set behind the last of {count} integers, expected zeros",
    )
    return tensor


def _scales(scale: Tensor, shape: tuple[int, int]) -> Tensor:
    check(
        scale.dtype == torch.bfloat16 and scale.shape == shape,
        f"int4_pack: scale is {scale.dtype} {list(scale.shape)}, expected bfloat16 {list(shape)}",
    )
    scale = scale.detach().resolve_neg().contiguous()
    bits = scale.view(torch.int16).numpy().view(np.uint16)
    check(
        bool(((bits >= _SMALLEST_SCALE) & (bits <= _LARGEST_SCALE)).all()),
        "int4_pack: a scale is not between 2^-126 and 2^124, as expected",
    )
    return scale


def _int4_pack_fake(
    values: Tensor, scale: Tensor, zero_point: Tensor | None, k: int, group: int, activation_bits: int  # noqa: ARG001
) -> Tensor:  # fmt: skip
    return values.new_empty((torch.library.get_ctx().new_dynamic_size(),))


library.impl("int4_pack", _int4_pack_cpu, "CPU")
library.impl("int4_pack", cuda_weight_only.int4_pack, "CUDA")
torch.library.register_fake("pycompress::int4_pack", _int4_pack_fake, lib=library)


def int4_pack(
    values: Tensor, scale: Tensor, zero_point: Tensor | None, k: int, group: int, activation_bits: int
) -> Tensor:
    """Canonical weight -> the layout of the kernels here: a uint8 vector, for this process only.

    weight[n, k] = (value[n, k] - zero_point[n, g]) * scale[n, g] with g = k // group.

    Args:
        values: uint8 [n, ceil(k / 2)]: integers 0 to 15, two a byte, the one at the even position in the low half; the half behind
            an odd k is 0.
        scale: bfloat16 [n, groups], groups = ceil(k / group), from 2^-126 to 2^124.
        zero_point: uint8 [n, ceil(groups / 2)], integers 0 to 15, packed as the values are; None: all are 8.
        k: in_features, 1 to 65536.
        group: 32, 64 or 128.
        activation_bits: 8, where x is to be quantized per row, or 16, where it is to stay floating point.
    Raises:
        ValueError: wrong dtypes or shapes, another number of bits, or anything else that breaks these rules.
    """
    packed: Tensor = torch.ops.pycompress.int4_pack.default(values, scale, zero_point, k, group, activation_bits)
    return packed


def int4_header(packed: Tensor) -> dict[str, Any]:
    """What a packed weight holds: n, k, group, symmetric (whether it has no zero points) and activation_bits."""
    check_operand("int4_header", "packed", packed, torch.uint8)
    header: dict[str, Any] = _C.int4_header(packed.data_ptr(), packed.numel())
    return header


# --- unpacking --------------------------------------------------------------------------------------------------------

library.define("int4_unpack(Tensor packed, int n, int k, int group, bool symmetric) -> (Tensor, Tensor, Tensor)")

Parts = tuple[Tensor, Tensor, Tensor]


def _empty(like: Tensor, n: int, k: int, group: int, symmetric: bool) -> Parts:
    """Room for what a packed weight holds; none for the zero points of a symmetric one."""
    groups = (k + group - 1) // group
    return (
        like.new_empty((n, (k + 1) // 2)),
        like.new_empty((n, groups), dtype=torch.bfloat16),
        like.new_empty((n, 0 if symmetric else (groups + 1) // 2)),
    )


def _int4_unpack_cpu(packed: Tensor, n: int, k: int, group: int, symmetric: bool) -> Parts:
    header = int4_header(packed)
    found = header["n"], header["k"], header["group"], header["symmetric"]
    check(
        found == (n, k, group, symmetric),
        f"int4_unpack: n, k, group and symmetric of the packed weight are {found}, not {(n, k, group, symmetric)}",
    )
    parts = _empty(packed, n, k, group, symmetric)
    addresses = (part.data_ptr() if part.numel() else 0 for part in parts)
    _C.int4_unpack(packed.data_ptr(), packed.numel(), *addresses)
    return parts


library.impl("int4_unpack", _int4_unpack_cpu, "CPU")
library.impl("int4_unpack", cuda_weight_only.int4_unpack, "CUDA")
torch.library.register_fake("pycompress::int4_unpack", _empty, lib=library)


def int4_unpack(packed: Tensor, n: int, k: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The values, scales and zero points that :func:`int4_pack` was given, exactly. Costs a pass over the weight.

    Args:
        n, k, group, symmetric: of the packed weight (:func:`int4_header`), which a compiler cannot look into.
    """
    values, scale, zero_point = torch.ops.pycompress.int4_unpack.default(packed, n, k, group, symmetric)
    return values, scale, None if symmetric else zero_point


library.define("int4_dense(Tensor packed, int n, int k) -> Tensor")


def _int4_dense_cpu(packed: Tensor, n: int, k: int) -> Tensor:
    header = int4_header(packed)
    check(
        (header["n"], header["k"]) == (n, k),
        f"int4_dense: the packed weight is {header['n']}x{header['k']}, not {n}x{k}",
    )
    values, scale, zero_point = int4_unpack(packed, n, k, header["group"], header["symmetric"])
    zero_points = reference.int4.zero_points(None if zero_point is None else zero_point.numpy(), *scale.shape)
    integers, steps = reference.int4.unpack_nibbles(values.numpy(), k), scale.to(torch.float32).numpy()
    return torch.from_numpy(reference.int4.decompress(integers, steps, zero_points, header["group"]))


def _int4_dense_fake(packed: Tensor, n: int, k: int) -> Tensor:
    return packed.new_empty((n, k), dtype=torch.float32)


library.impl("int4_dense", _int4_dense_cpu, "CPU")
library.impl("int4_dense", cuda_weight_only.int4_dense, "CUDA")
torch.library.register_fake("pycompress::int4_dense", _int4_dense_fake, lib=library)


def int4_dense(packed: Tensor, n: int, k: int) -> Tensor:
    """The weight, exactly: float32 [n, k]. Costs some passes over it."""
    weight: Tensor = torch.ops.pycompress.int4_dense.default(packed, n, k)
    return weight
