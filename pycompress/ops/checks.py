"""What the ops of every device ask of their operands, and whether somebody is looking at a call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

ACTIVATIONS = {
    "none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "quick_gelu": 5, "relu6": 6, "hardswish": 7,
}  # fmt: skip
FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT32, UINT8 = 3, 4
MAX_IN_FEATURES = 65536  # int32 sums cannot overflow up to here
MAX_STEP = 65536  # of a convolution: its kernel's sides, strides and dilations
Ints = Sequence[int]


def check(condition: bool, message: str) -> None:
    """Raises ValueError with the message where the condition does not hold."""
    if not condition:
        raise ValueError(message)


def check_tensor(op: str, x: Any) -> None:
    """Raises TypeError where x is no tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x is {type(x).__name__}, expected a tensor")


def check_float(op: str, x: Any) -> None:
    """Raises TypeError where x is no dense tensor, or of a dtype that no kernel reads."""
    check_tensor(op, x)
    if x.is_nested or x.layout is not torch.strided:
        layout = "nested" if x.is_nested else f"of the layout {x.layout}"
        raise TypeError(f"{op}: x is {layout}, expected a dense tensor")
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x is {x.dtype}, expected float32, bfloat16 or float16")


def rows_of(op: str, x: Tensor) -> tuple[Tensor, int]:
    """``x`` as it can be walked by rows: [..., k] with dense rows one stride apart; and that stride in elements."""
    check_float(op, x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x is a scalar, expected [..., k]")
    if x.is_neg() or x._is_zerotensor():  # views without memory of their own kind
        x = x.resolve_neg() if x.is_neg() else torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]:
        return x, x.stride(0)
    return x.contiguous(), x.shape[-1]


def matrix_of(op: str, x: Tensor) -> tuple[Tensor, int]:
    """As :func:`rows_of`, for an x that must be [m, k] and of what has no derivative."""
    tangent = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
    if tangent or (x.requires_grad and torch.is_grad_enabled()):
        raise ValueError(
            f"{op}: x {'has a tangent' if tangent else 'requires a gradient'}, expected x.detach(): y has none"
        )
    x, ldx = rows_of(op, x)
    check(x.dim() == 2, f"{op}: x is {list(x.shape)}, expected [m, k]")
    return x, ldx


def conv2d_shape(
    op: str, x: Ints, n: int, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints
) -> tuple[int, ...]:  # fmt: skip
    """Of the result: [..., n, out_h, out_w] for x of the shape [..., channels, height, width]."""
    if len(x) not in (3, 4):
        raise ValueError(f"{op}: x is {list(x)}, expected [N, C, H, W] or [C, H, W]")
    pairs = (*kernel_size, *stride, *dilation)
    counts = len(kernel_size), len(stride), len(dilation), len(padding)
    if counts != (2, 2, 2, 4) or min(pairs) < 1 or min(padding) < 0 or max(pairs) > MAX_STEP:
        raise ValueError(
            f"{op}: kernel_size is {tuple(kernel_size)}, stride {tuple(stride)}, padding {tuple(padding)}, dilation "
            f"{tuple(dilation)}, expected two numbers from 1 to {MAX_STEP} of each, of padding four from 0"
        )
    *images, _, height, width = x
    height += padding[0] + padding[1]
    width += padding[2] + padding[3]
    reach_h, reach_w = dilation[0] * (kernel_size[0] - 1) + 1, dilation[1] * (kernel_size[1] - 1) + 1
    if height < reach_h or width < reach_w:
        raise ValueError(
            f"{op}: x with its padding is {height}x{width}, expected at least {reach_h}x{reach_w}, as far as the "
            "kernel reaches"
        )
    return (*images, n, (height - reach_h) // stride[0] + 1, (width - reach_w) // stride[1] + 1)


def activation_code(op: str, activation: str) -> int:
    """What the kernels call an activation. Raises ValueError where they know none of this name."""
    code = ACTIVATIONS.get(activation)
    if code is None:
        raise ValueError(f"{op}: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    return code


def vector(data: bytes, scale: Tensor | None = None) -> Tensor:
    """The bytes as a uint8 vector, behind them a scale per output channel where there is one.

    Aligned by torch, and filled without its thread pool (fork). What the kernels pack takes whole floats.
    """
    behind = 0 if scale is None else scale.nbytes
    packed = torch.empty(len(data) + behind, dtype=torch.uint8, device="cpu")
    ctypes.memmove(packed.data_ptr(), data, len(data))
    if scale is not None:
        ctypes.memmove(packed.data_ptr() + len(data), scale.data_ptr(), behind)
    return packed


# --- the short way in -------------------------------------------------------------------------------------------------

_tracing = getattr(torch._C, "_is_tracing", None)
_transforms = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_autocast = getattr(torch._C, "_is_any_autocast_enabled", None)


def nobody_looks(x: Tensor) -> bool:
    """No compiler, tracer, derivative, tensor subclass, autocast or dispatch mode must see an op of x: its kernel may be called
    directly."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not x.requires_grad
        and not x.is_neg()
        and forward_ad._current_level < 0
        and _autocast is not None
        and not _autocast()
        and _transforms is not None
        and _transforms() is None
        and _tracing is not None
        and not _tracing()
        and _dispatch_modes is not None
        and not _dispatch_modes()
    )
