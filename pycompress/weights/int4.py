"""``Int4Weight``: 4-bit integers, two a byte, with a scale and a zero point per group of input features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from pycompress.weights.rules import one_of
from pycompress.weights.weight import Field, Setting, Settings, Weight, register

TOP = 15  # the largest integer; the smallest is 0
SYMMETRIC_ZERO_POINT = 8
# Of a scale: normal in float32, and so small that 15 steps, the largest weight, are finite.
SMALLEST_SCALE, LARGEST_SCALE = torch.finfo(torch.float32).tiny, 2.0**124


def pack_nibbles(values: Tensor) -> Tensor:
    """uint8 [n, k] of integers 0 to 15 -> uint8 [n, ceil(k / 2)], two a byte: the earlier one in the low half."""
    pairs = pad(values, (0, values.shape[1] % 2)).view(len(values), -1, 2)
    return pairs[:, :, 0] | (pairs[:, :, 1] << 4)


def unpack_nibbles(packed: Tensor, k: int) -> Tensor:
    """The inverse of :func:`pack_nibbles`: uint8 [n, ceil(k / 2)] -> uint8 [n, k]."""
    return torch.stack([packed & 15, packed >> 4], dim=2).view(len(packed), -1)[:, :k]


def _padded(name: str, packed: Tensor, count: int) -> str:
    if count % 2 and bool((packed[:, -1] > TOP).any()):
        return f"{name} has bits set behind the last of {count} integers, expected zeros"
    return ""


def _in_range(name: str, scale: Tensor, _weight: object) -> str:
    wide = scale.to(torch.float32)
    good = bool(((wide >= SMALLEST_SCALE) & (wide <= LARGEST_SCALE)).all())
    return "" if good else f"a {name} is not between {SMALLEST_SCALE:g} and {LARGEST_SCALE:g}, as expected"


@register
@dataclass(frozen=True, eq=False, repr=False)
class Int4Weight(Weight):
    """The canonical int4 weight.

    weight[n, k] = (value[n, k] - zero_point[n, g]) * scale[n, g] with g = k // group: exact in float32.

    Attributes:
        values: uint8 [n, ceil(k / 2)]: integers 0 to 15, two a byte, the one at the even position in the low half; the half behind
            an odd k is 0.
        scale: bfloat16 [n, groups], groups = ceil(k / group), the last one may be short; normal, at most 2^124.
        zero_point: uint8 [n, ceil(groups / 2)]: integers 0 to 15, packed as the values are; None where symmetric: all are 8.
        k: in_features, 1 to 65536.
        group: 32, 64 or 128.
        activation_bits: 8 where the layer quantizes its input, per row; 16 where it leaves it in floating point.
    """

    name: ClassVar[str] = "int4"
    version: ClassVar[int] = 2
    older: ClassVar[Mapping[int, Mapping[str, str]]] = {
        1: {"values": "weight", "scale": "group_scale", "zero_point": "group_zero_point"}
    }
    fields: ClassVar[tuple[Field, ...]] = (
        Field("values", torch.uint8, "n, ceil(k / 2)", lambda name, t, w: _padded(name, t, w.k)),
        Field("scale", torch.bfloat16, "n, ceil(k / group)", _in_range),
        Field(
            "zero_point", torch.uint8, "n, ceil(groups / 2)",
            lambda name, t, w: _padded(name, t, w.groups), when=lambda s: not s["symmetric"],
        ),
    )  # fmt: skip
    options: ClassVar[tuple[Setting, ...]] = (
        Setting("group", one_of(32, 64, 128)),
        Setting("symmetric", one_of(True, False)),
        Setting("activation_bits", one_of(8, 16)),
    )

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    k: int
    group: int
    activation_bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.k

    @classmethod
    def sizes(cls, n: int, k: int, settings: Settings) -> dict[str, int]:
        return {**super().sizes(n, k, settings), "groups": -(-k // settings["group"])}

    @property
    def symmetric(self) -> bool:
        return self.zero_point is None

    @property
    def groups(self) -> int:
        """How many a row has."""
        return -(-self.k // self.group)

    def integers(self) -> Tensor:
        """The values one by one: uint8 [n, k]."""
        return unpack_nibbles(self.values, self.k)

    def zero_points(self) -> Tensor:
        """uint8 [n, groups], of symmetric weights too."""
        if self.zero_point is None:
            return torch.full_like(self.scale, SYMMETRIC_ZERO_POINT, dtype=torch.uint8)
        return unpack_nibbles(self.zero_point, self.groups)

    def decompress(self) -> Tensor:
        """float32 [n, k]."""
        steps = self.integers().to(torch.float32) - self._spread(self.zero_points())
        return steps.mul_(self._spread(self.scale))

    def _spread(self, of_groups: Tensor) -> Tensor:
        """[n, groups] -> float32 [n, k]."""
        return of_groups.to(torch.float32).repeat_interleave(self.group, dim=1)[:, : self.k]
