"""The rounding of activations that the int8 and int4 kernels do, row by row or with one range for all, in torch: for training.
Integers, scales and zero points equal those of ``csrc/int8`` (and of :mod:`pycompress.reference.int8`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from pycompress import ops
from pycompress.methods.held import through

_TINY = 2.0**-100
_BEYOND = 1024.0  # in units of a scale: far outside of every range
Range = tuple[float, int]  # scale and zero point
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantized_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """x float32 [..., k] -> integers 0 to 2^bits - 1 as float32 [..., k], scale and zero point float32 [..., 1]."""
    top = float(2**bits - 1)
    half_top = x.new_tensor(0.5 * top)  # a number over a tensor would be a product with a reciprocal
    low, high = x.amin(-1, keepdim=True).clamp_(max=0), x.amax(-1, keepdim=True).clamp_(min=0)
    half = 0.5 * high - 0.5 * low
    tiny = half < _TINY
    inverse = half_top / half.masked_fill(tiny, 1.0)
    scale = (half / half_top).masked_fill_(tiny, 0.0)
    zero_point = (-low * inverse).round_().clamp_(0, top)
    return (x * inverse).round_().add_(zero_point).clamp_(0, top), scale, zero_point


def quantized_statically(x: Tensor, bits: int, input_range: Range) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`quantized_rows`, with one range for all rows. Rows with NaN or Inf have a scale of NaN."""
    scale, zero_point = (x.new_full((*x.shape[:-1], 1), value) for value in input_range)
    steps = (x * (1 / x.new_tensor(input_range[0]))).clamp_(-_BEYOND, _BEYOND).round_()
    scale.masked_fill_(~x.isfinite().all(-1, keepdim=True), torch.nan)
    return steps.add_(zero_point).clamp_(0, float(2**bits - 1)), scale, zero_point


def rounded_rows(x: Tensor, bits: int, input_range: Range | None = None) -> Tensor:
    """What a kernel that quantizes its input makes of x [..., k] in any floating-point dtype; the gradient goes through.

    Args:
        bits: 7 or 8; 16 where it does not quantize.
        input_range: scale and zero point where all rows have one range.
    """
    if bits == 16 or x.numel() == 0:
        return x
    with torch.no_grad():
        if _has_kernel(x):
            image = ops.int8_round(x.detach().reshape(-1, x.shape[-1]), bits, input_range).view(x.shape)
        else:
            wide = x.float()
            q, scale, zero_point = (
                quantized_rows(wide, bits) if input_range is None else quantized_statically(wide, bits, input_range)
            )
            image = q.sub_(zero_point).mul_(scale)
        image = image.to(x.dtype)
    return through(x, image)


def _has_kernel(x: Tensor) -> bool:
    """Whether the kernels' own quantizer takes it, in a tenth of the time."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"
    return plain and x.dtype in _DTYPES and not is_compiling()
