"""The activations as torch has them: for what no kernel of ours computes, and for autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

DIFFERENTIABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda y: nn.functional.gelu(y, approximate="tanh"),
    "silu": nn.functional.silu,
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    "relu6": nn.functional.relu6,
    "hardswish": nn.functional.hardswish,
}
