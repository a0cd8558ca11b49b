"""Sparse weights on the CPU (``csrc/sparse``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pycompress import reference
from pycompress.ops.checks import FLOATS, Ints, activation_code, check, check_float, conv2d_shape, rows_of, vector
from pycompress.ops.cpu import native
from pycompress.ops.cpu.native import channels, check_operand, split
from pycompress.ops.form import Form, Sizes, parse, written

# How a packed weight lies in memory. float32: rows (unstructured) and panels (16x1 blocks). int8: quads (unstructured), quads4
# (1x4), windows (N of M) and chains (16x4: the int8 op's own layout).
FORMATS = ("rows", "panels", "quads", "quads4", "windows", "chains")
_VALUES = {32: torch.float32, 8: torch.int8}
_CHECKED = ("n", "k", "nnz", "bits")


def sizes(form: Form) -> Sizes:
    """Shape and dtype of what :func:`unpack` gives, on any device."""
    parts: Sizes = {"mask": ((form.n, -(-form.k // 8)), torch.uint8), "values": ((form.nnz,), _VALUES[form.bits])}
    return parts if form.bits == 32 else {**parts, "scale": ((form.n,), torch.float32)}


# --- packing ----------------------------------------------------------------------------------------------------------


def pack(
    parts: Mapping[str, Tensor], shape: tuple[int, int], settings: Mapping[str, Any], layout: str = ""
) -> tuple[Tensor, str]:
    """Canonical weight -> a layout of the kernels here: a uint8 vector, for this process only.

    Args:
        parts: mask uint8 [n, ceil(k / 8)]: bit i % 8 (least significant first) of byte i // 8 of row r says whether weight[r, i]
            is stored. values float32 or int8 [nnz], the weights that are stored, row after row in ascending k; none is zero.
            scale float32 [n] for int8.
        shape: (n, k), k from 1 to 65536.
        settings: activation_bits 7 or 8 for int8.
        layout: one of FORMATS, to force it; the one that is expected to be the fastest where it is not given.
    Raises:
        ValueError: wrong dtypes or shapes; mask and values that do not fit each other; a value that is 0, -128, NaN or Inf;
            a format that does not exist or cannot hold this weight.
    """
    (n, k), bits = shape, settings.get("activation_bits") or 0
    mask, values = checked(parts["mask"], parts["values"], n, k)
    scale = _scale(parts.get("scale"), n, values.dtype == torch.int8)
    data = native._C.sparse_pack(
        mask.data_ptr(), values.data_ptr(), n, k, values.shape[0], 8 * values.element_size(), bits, layout,
        torch.get_num_threads(),
    )  # fmt: skip
    packed = vector(data, scale)
    own = native._C.sparse_header(packed.data_ptr(), len(data))
    return packed, written(own["format"], n, k, nnz=own["nnz"], bits=own["bits"], activation_bits=bits)


def checked(mask: Tensor, values: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Both, on the CPU, as the native module reads them."""
    row_bytes = -(-k // 8)
    check(
        mask.dtype == torch.uint8 and mask.shape == (n, row_bytes),
        f"sparse_pack: mask is {mask.dtype} {list(mask.shape)}, expected uint8 [{n}, {row_bytes}] for k = {k}",
    )
    check(
        values.dtype in _VALUES.values() and values.dim() == 1,
        f"sparse_pack: values is {values.dtype} {list(values.shape)}, expected float32 or int8 [nnz]",
    )
    mask, values = mask.contiguous(), values.detach().resolve_neg().contiguous()
    _check_values(mask.numpy(), values.numpy(), k)
    return mask, values


def _scale(scale: Tensor | None, n: int, is_int8: bool) -> Tensor | None:
    if scale is None or not is_int8:
        given = "None" if scale is None else f"{scale.dtype} {list(scale.shape)}"
        expected = f"float32 [{n}] for int8 values" if is_int8 else "None for float32 values"
        check(scale is None and not is_int8, f"sparse_pack: scale is {given}, expected {expected}")
        return None
    scale = scale.detach().contiguous()
    channels("sparse_pack", "scale", scale, n)
    return scale


def _check_values(mask: NDArray[np.uint8], values: NDArray[Any], k: int) -> None:
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


def _split(op: str, packed: Tensor, form: Form) -> tuple[int, int]:
    """How many bytes the kernels read, and the address of the scale behind them; 0 where there is none."""
    if form.bits == 8:
        return split(op, packed, form.n)
    check_operand(op, "packed", packed, torch.uint8)
    return packed.shape[0], 0


def unpack(packed: Tensor, form: str) -> dict[str, Tensor]:
    own = parse(form)
    n_bytes, scale = _split("sparse_unpack", packed, own)
    native.header_of("sparse_unpack", "sparse", packed, n_bytes, own, _CHECKED)
    mask, values = (packed.new_empty(shape, dtype=dtype) for shape, dtype in list(sizes(own).values())[:2])
    native._C.sparse_unpack(packed.data_ptr(), n_bytes, mask.data_ptr(), values.data_ptr())
    parts = {"mask": mask, "values": values}
    return {**parts, "scale": native.scale_of(packed, own.n)} if scale else parts


def dense(packed: Tensor, form: str) -> Tensor:
    parts = unpack(packed, form)
    weight = torch.from_numpy(
        reference.sparse.decompress(parts["mask"].numpy(), parts["values"].numpy(), parse(form).k)
    )
    return weight.to(torch.float32) * parts["scale"][:, None] if "scale" in parts else weight


# --- products ---------------------------------------------------------------------------------------------------------


def linear(x: Tensor, packed: Tensor, form: str, bias: Tensor | None, activation: str) -> Tensor:
    n_bytes, scale = _split("sparse_linear", packed, parse(form))
    return native.linear("sparse_linear", x, packed, form, bias, activation, n_bytes, scale, further=(0, 0))


def accumulate(x: Tensor, packed: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    own = parse(form)
    check(own.bits == 8, "sparse_accumulate: the packed weight is float32, expected int8")
    return native.accumulate("sparse", x, packed, form, _split("sparse_accumulate", packed, own)[0])


def conv2d(
    x: Tensor, packed: Tensor, form: str, bias: Tensor | None, kernel_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, activation: str,
) -> Tensor:  # fmt: skip
    own, op = parse(form), "sparse_conv2d"
    check_float(op, x)
    shape = conv2d_shape(op, x.shape, own.n, kernel_size, stride, padding, dilation)
    x, _ = rows_of(op, x)  # of more than two dimensions: contiguous
    code = activation_code(op, activation)
    n_bytes, _ = _split(op, packed, own)
    bias_address = 0 if bias is None else channels(op, "bias", bias, own.n)
    y = x.new_empty(shape)
    native._C.sparse_conv2d(
        x.data_ptr(), FLOATS[x.dtype], x.shape[0] if x.dim() == 4 else 1, *x.shape[-3:], packed.data_ptr(), n_bytes, own.n,
        bias_address, code, *kernel_size, *stride, padding[0], padding[2], *dilation, *shape[-2:], y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y
