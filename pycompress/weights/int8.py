"""``Int8Weight``: 8- or 7-bit integers with a scale per output channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pycompress.weights.rules import one_of, positive, symmetric
from pycompress.weights.weight import Field, Setting, Weight, register


@register
@dataclass(frozen=True, eq=False, repr=False)
class Int8Weight(Weight):
    """The canonical int8 weight: weight[n, k] = values[n, k] * scale[n].

    Attributes:
        values: int8 [n, k], in [-wmax, wmax] with wmax = 127 (8 bits) or 63 (7 bits). n or k may be 0.
        scale: float32 [n], positive and finite.
        activation_bits: 7 or 8, the range in which the layer quantizes its input; 16 where it leaves it in floating point.
        weight_bits: 7 or 8.
    """

    name: ClassVar[str] = "int8"
    version: ClassVar[int] = 2
    older: ClassVar[Mapping[int, Mapping[str, str]]] = {1: {"values": "weight", "scale": "weight_scale"}}
    fields: ClassVar[tuple[Field, ...]] = (
        Field("values", torch.int8, "n, k", lambda name, t, w: symmetric(name, t, 2 ** (w.weight_bits - 1) - 1)),
        Field("scale", torch.float32, "n", positive),
    )
    options: ClassVar[tuple[Setting, ...]] = (
        Setting("activation_bits", one_of(7, 8, 16)),
        Setting("weight_bits", one_of(7, 8)),
    )
    smallest: ClassVar[int] = 0

    values: Tensor
    scale: Tensor
    activation_bits: int
    weight_bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def decompress(self) -> Tensor:
        """float32 [n, k]."""
        return self.values.to(torch.float32) * self.scale[:, None]
