"""What 2:4 and block sparse weights on CUDA have in common: tiles for the tensor cores, of bfloat16, float16 or int8 values.

What the values are is a code in the last dimension of the packed weight (``csrc/sparse/element.h``). int8: the rows of x are
quantized first, in a launch of their own, to the range that stands in the packed weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress.ops import cuda
from pycompress.ops.native import FLOATS, INT32, activation_code, check, rows_of

ELEMENTS = {torch.bfloat16: 0, torch.float16: 1, torch.int8: 2}
_DTYPES = {code: dtype for dtype, code in ELEMENTS.items()}


def element_of(op: str, packed: Tensor, k: int) -> torch.dtype:
    """Of the values of a packed weight [..., k, row]. Raises ValueError where it is none."""
    dtype = _DTYPES.get(packed.shape[-1] % 4)
    if dtype is None or packed.shape[-2] != k or not packed.is_contiguous():
        size = ", ".join(map(str, (*packed.shape[:-2], k, "...")))
        raise ValueError(
            f"{op}: packed is {packed.dtype} {list(packed.shape)}, expected for k = {k} what sparse_pack returns on a CUDA device: "
            f"uint8 [{size}]"
        )
    return dtype


def _multiply(
    function: str, x: Tensor, ldx: int, packed: Tensor, element: torch.dtype, n: int, y: Tensor,
    scale: Tensor | None, bias: Tensor | None, activation: int, kernel: str,
) -> None:  # fmt: skip
    """Calls the native function on x [..., k] with row stride ldx; y int32 takes the sums of int8, and no scale."""
    module, k, device = cuda.native("sparse_linear", x.device), x.shape[-1], x.device.index
    m, kind, workspace = x.numel() // k, FLOATS[x.dtype], None
    if element is torch.int8:
        workspace = torch.empty(module.int8_workspace(m, k), dtype=torch.uint8, device=x.device)
    else:
        x, ldx = cuda.aligned_rows(x, ldx)
    getattr(module, function)(
        device, cuda.stream_of(device), x.data_ptr(), kind, m, k, ldx, packed.data_ptr(), packed.numel(), n,
        0 if scale is None else scale.data_ptr(), 0 if bias is None else bias.data_ptr(), activation, y.data_ptr(),
        INT32 if y.dtype is torch.int32 else kind, 0 if workspace is None else workspace.data_ptr(), kernel,
    )  # fmt: skip


def linear(
    function: str, x: Tensor, packed: Tensor, n: int, scale: Tensor | None, bias: Tensor | None, activation: str, kernel: str,
) -> Tensor:  # fmt: skip
    """``ops.sparse_linear`` by the native function of this name; the tensors are on one CUDA device."""
    op = "sparse_linear"
    x, ldx = rows_of(op, x)
    k = x.shape[-1]
    element = element_of(op, packed, k)
    if element is torch.int8:
        check(scale is not None, f"{op}: scale is None, expected float32 [{n}]: the packed weight is int8")
    else:
        check(scale is None, f"{op}: there is a scale, expected None: the packed weight is float32")
        if x.dtype is not element:
            raise TypeError(f"{op}: x is {x.dtype}, expected {element} as the values of the packed weight")
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is not None:
            cuda.check_vector(op, name, vector, torch.float32, n)
    code = activation_code(op, activation)
    y = x.new_empty((*x.shape[:-1], n))
    if y.numel():
        _multiply(function, x, ldx, packed, element, n, y, scale, bias, code, kernel)
    return y


def accumulate(function: str, x: Tensor, ldx: int, packed: Tensor, kernel: str) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.sparse_accumulate`` on a CUDA device. Waits for it: n and the bits stand in the packed weight."""
    op = "sparse_accumulate"
    check(
        element_of(op, packed, x.shape[1]) is torch.int8,
        f"{op}: the packed weight is float32, expected int8",
    )
    _, n, _, bits = packed.flatten()[:16].cpu().view(torch.int32).tolist()
    _, scale, zero_point = cuda.int8_rows(x, ldx, bits)
    acc = torch.empty((x.shape[0], n), dtype=torch.int32, device=x.device)
    _multiply(function, x, ldx, packed, torch.int8, n, acc, None, None, 0, kernel)
    return acc, scale.clone(), zero_point.clone()


def dense(function: str, packed: Tensor, n: int, k: int) -> Tensor:
    """float32 or int8 [n, k], by the native function of this name."""
    op = "sparse_dense"
    dtype = torch.int8 if element_of(op, packed, k) is torch.int8 else torch.float32
    weight, device = torch.empty((n, k), dtype=dtype, device=packed.device), packed.device.index
    unpack = getattr(cuda.native(op, packed.device), function)
    unpack(device, cuda.stream_of(device), packed.data_ptr(), packed.numel(), n, k, weight.data_ptr())
    return weight
