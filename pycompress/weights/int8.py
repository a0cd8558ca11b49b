"""``Int8Weight``: 8- or 7-bit integers with a scale per output channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pycompress.weights.rules import invertible, one_of, positive, symmetric
from pycompress.weights.weight import OPTIONAL, Field, Setting, Settings, Weight, register


def _is_static(settings: Settings) -> bool:
    return bool(settings.get("static"))


def _static(value: object, _shape: tuple[int, int], settings: Mapping[str, Any]) -> str:
    if settings.get("activation_bits") == 16:
        return "none of a weight whose activations stay in floating point"
    return "" if value is True else "True, or none of a dynamic weight"


def _zero_point(name: str, zero_point: Tensor, weight: Int8Weight) -> str:
    top = 2**weight.activation_bits - 1
    return f"{name} is {int(zero_point)}, expected 0 to {top}" if int(zero_point) > top else ""


def range_tensors(input_range: tuple[float, int] | None) -> tuple[Tensor, Tensor] | tuple[()]:
    """A static weight's ``input_scale`` and ``input_zero_point``, from scale and zero point; nothing of None."""
    if input_range is None:
        return ()
    scale, zero_point = input_range
    return (
        torch.tensor([scale], dtype=torch.float32, device="cpu"),
        torch.tensor([zero_point], dtype=torch.uint8, device="cpu"),
    )


@register
@dataclass(frozen=True, eq=False, repr=False)
class Int8Weight(Weight):
    """The canonical int8 weight: weight[n, k] = values[n, k] * scale[n].

    Attributes:
        values: int8 [n, k], in [-wmax, wmax] with wmax = 127 (8 bits) or 63 (7 bits). n or k may be 0.
        scale: float32 [n], positive and finite.
        activation_bits: 7 or 8, the range in which the layer quantizes its input; 16 where it leaves it in floating point.
        weight_bits: 7 or 8.
        input_scale, input_zero_point: float32 [1], 2^-126 to 2^126, and uint8 [1]: with these the layer quantizes all of its
            input, x = (q - zero_point) * scale; None of a dynamic weight, where each row of the input has its own.
    """

    name: ClassVar[str] = "int8"
    version: ClassVar[int] = 2
    older: ClassVar[Mapping[int, Mapping[str, str]]] = {1: {"values": "weight", "scale": "weight_scale"}}
    fields: ClassVar[tuple[Field, ...]] = (
        Field("values", torch.int8, "n, k", lambda name, t, w: symmetric(name, t, 2 ** (w.weight_bits - 1) - 1)),
        Field("scale", torch.float32, "n", positive),
        Field("input_scale", torch.float32, "1", invertible, when=_is_static),
        Field("input_zero_point", torch.uint8, "1", _zero_point, when=_is_static),
    )
    options: ClassVar[tuple[Setting, ...]] = (
        Setting("activation_bits", one_of(7, 8, 16)),
        Setting("weight_bits", one_of(7, 8)),
        Setting("static", _static, OPTIONAL),
    )
    smallest: ClassVar[int] = 0

    values: Tensor
    scale: Tensor
    activation_bits: int
    weight_bits: int
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None

    @property
    def static(self) -> bool | None:
        """True where the range of the input is known before the input is; None of a dynamic weight, whose files are without it."""
        return None if self.input_scale is None else True

    @property
    def input_range(self) -> tuple[float, int] | None:
        """Scale and zero point of a static weight's input."""
        if self.input_scale is None or self.input_zero_point is None:
            return None
        return float(self.input_scale), int(self.input_zero_point)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def decompress(self) -> Tensor:
        """float32 [n, k]."""
        return self.values.to(torch.float32) * self.scale[:, None]
