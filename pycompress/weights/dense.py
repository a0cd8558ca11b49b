"""``DenseWeight``: float32 as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pycompress.weights.rules import finite
from pycompress.weights.weight import Field, Weight, register


@register
@dataclass(frozen=True, eq=False, repr=False)
class DenseWeight(Weight):
    """The canonical dense weight.

    Attributes:
        weight: float32 [n, k], finite.
    """

    name: ClassVar[str] = "dense"
    version: ClassVar[int] = 2
    older: ClassVar[Mapping[int, Mapping[str, str]]] = {1: {"weight": "weight"}}
    fields: ClassVar[tuple[Field, ...]] = (Field("weight", torch.float32, "n, k", finite),)

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def decompress(self) -> Tensor:
        """float32 [n, k], a copy."""
        return self.weight.clone()
