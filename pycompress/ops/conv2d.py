"""What the ops of all convolutions have in common: the dense product behind their derivatives, and batches under ``vmap``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from pycompress.ops.checks import Ints, check
from pycompress.ops.derivative import Product


def _along(
    dx: Tensor, weight: Tensor, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int = 1
) -> Tensor:
    top, bottom, left, right = padding
    wide = torch.nn.functional.pad(dx, (left, right, top, bottom))
    weight = weight.view(len(weight), -1, *kernel_size)
    return torch.nn.functional.conv2d(wide, weight, None, list(stride), 0, list(dilation), groups)


def _back(
    dy: Tensor, weight: Tensor, shape: Ints, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int = 1
) -> Tensor:  # fmt: skip
    """Of x with its zeros around it: torch's convolution has the same number of them on opposite sides."""
    top, bottom, left, right = padding
    *_, channels, height, width = shape
    images = dy.reshape(-1, *dy.shape[-3:])  # [C, H, W] is one
    padded = (len(images), channels, height + top + bottom, width + left + right)
    weight = weight.view(len(weight), -1, *kernel_size)
    wide: Tensor = conv2d_input(padded, weight, images, list(stride), 0, list(dilation), groups)
    return wide[..., top : top + height, left : left + width].reshape(shape)


CONV2D = Product(_along, _back, channels=-3)


def vmapped(name: str, op: Callable[[], Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """The op, asked for when it is there, for x with the dimension of ``torch.vmap`` in front."""

    def run(x: Tensor, *operands: Any) -> Tensor:
        check(x.dim() in (4, 5), f"{name}: x is {list(x.shape[1:])}, expected [N, C, H, W] or [C, H, W]")
        y = op()(x.reshape(-1, *x.shape[-3:]), *operands)
        return y.reshape(*x.shape[:-3], *y.shape[-3:])

    return run
