"""The rounding of activations that the int8 and int4 kernels do, row by row, in torch: for training. Integers, scales and zero
points equal those of ``csrc/int8`` (and of :mod:`pycompress.reference.int8`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from pycompress import ops
from pycompress.methods.held import through

_TINY = 2.0**-100
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


def rounded_rows(x: Tensor, bits: int) -> Tensor:
    """What a kernel that quantizes its input makes of x [..., k] in any floating-point dtype; the gradient goes through.

    Args:
        bits: 7 or 8; 16 where it does not quantize.
    """
    if bits == 16 or x.numel() == 0:
        return x
    with torch.no_grad():
        if _has_kernel(x):
            image = ops.int8_round(x.detach().reshape(-1, x.shape[-1]), bits).view(x.shape)
        else:
            q, scale, zero_point = quantized_rows(x.float(), bits)
            image = q.sub_(zero_point).mul_(scale)
        image = image.to(x.dtype)
    return through(x, image)


def _has_kernel(x: Tensor) -> bool:
    """Whether the kernels' own quantizer takes it, in a tenth of the time."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"
    return plain and x.dtype in _DTYPES and not is_compiling()
