"""``LowRankWeight``: a product of two thin factors, with or without another weight beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pycompress.weights.rules import between, numbers, one_of, positive
from pycompress.weights.weight import Field, Nested, Setting, Settings, Weight, register

RESIDUAL = Nested("residual")
_DTYPE = {32: torch.float32, 8: torch.int8}


def _is_int8(settings: Settings) -> bool:
    return bool(settings["bits"] == 8)


def unshared_bits(residual: object) -> str:
    """The activation_bits that an int8 or int4 residual (weight or method) may have, where its own are others; or ''.

    The rows that it is multiplied with are quantized, once for all that meets them.
    """
    shared = {"int8": "7 or 8", "int4": "8"}.get(getattr(residual, "name", ""), "")
    return shared if getattr(residual, "activation_bits", None) == 16 else ""


@register
@dataclass(frozen=True, eq=False, repr=False)
class LowRankWeight(Weight):
    """The canonical low-rank weight, up @ down (+ residual).

    Attributes:
        down: float32 or int8 [r, k], 1 <= r <= min(n, k); finite; integers in [-127, 127].
        up: [n, r] of the same dtype.
        down_scale, up_scale: float32 [r] and [n], positive and finite, for int8: a row is its integers times its scale. None
            for float32.
        activation_bits: 7 or 8 for int8, the range in which the layer quantizes what each factor meets. None for float32.
        residual: the canonical weight [n, k] of what the factors leave, or None: any registered one without one of its own.
    """

    name: ClassVar[str] = "low_rank"
    version: ClassVar[int] = 2
    older: ClassVar[Mapping[int, Mapping[str, str]]] = {
        1: {name: name for name in ("down", "up", "down_scale", "up_scale", "residual")}
    }
    fields: ClassVar[tuple[Field, ...]] = (
        Field("down", _DTYPE, "rank, k", numbers),
        Field("up", _DTYPE, "n, rank", numbers),
        Field("down_scale", torch.float32, "rank", positive, when=_is_int8),
        Field("up_scale", torch.float32, "n", positive, when=_is_int8),
    )
    options: ClassVar[tuple[Setting, ...]] = (
        Setting("rank", between(1, min), measured=lambda tensors: len(tensors["down"])),
        Setting("bits", one_of(8, 32)),
        Setting("activation_bits", one_of(7, 8), when=_is_int8),
        RESIDUAL,
    )

    down: Tensor
    up: Tensor
    down_scale: Tensor | None = None
    up_scale: Tensor | None = None
    activation_bits: int | None = None
    residual: Weight | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = unshared_bits(self.residual)
        if expected:
            raise ValueError(f"LowRankWeight: the residual's activation_bits is 16, expected {expected}")
        if getattr(self.residual, "static", None):
            raise ValueError("LowRankWeight: the residual is static, expected a dynamic one: it shares quantized rows")

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def bits(self) -> int:
        """Of a factor's weight: 32 or 8."""
        return 32 if self.down.dtype == torch.float32 else 8

    def factors(self) -> tuple[Tensor, Tensor]:
        """down float32 [r, k], up float32 [n, r], with their scales."""
        down, up = self.down.to(torch.float32), self.up.to(torch.float32)
        if self.down_scale is None or self.up_scale is None:
            return down, up
        return down * self.down_scale[:, None], up * self.up_scale[:, None]

    def decompress(self) -> Tensor:
        """float32 [n, k]."""
        down, up = self.factors()
        with torch.autocast("cpu", enabled=False):
            product = up @ down
        return product if self.residual is None else product + self.residual.decompress()
