"""Dense: the weight as it is, in float32, for an adapter beside it that is not merged (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pycompress.methods.method import finite_matrix
from pycompress.weights.dense import DenseWeight


@dataclass(frozen=True)
class Dense:
    """Keeps the weight in float32. Only meant as the residual of another method: on its own it compresses nothing."""

    name: ClassVar[str] = "dense"

    def compress(self, weight: Tensor) -> DenseWeight:
        """A float32 copy on the CPU.

        Args:
            weight: floating point [n, k], on any device.
        Raises:
            TypeError: not a floating-point matrix. ValueError: it holds NaN or Inf, is empty or on the meta device.
        """
        return DenseWeight(finite_matrix("Dense", weight).clone(memory_format=torch.contiguous_format))
