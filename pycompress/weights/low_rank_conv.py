"""``LowRankConv2dWeight``: a convolution as a chain of smaller ones, without anything between them.

channel   [r, c, kh, kw], then [n, r, 1, 1]
spatial   [r, c, kh, 1], then [n, r, 1, kw]
tucker    [r_in, c, 1, 1], then [r_out, r_in, kh, kw], then [n, r_out, 1, 1]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from pycompress.weights.rules import finite, one_of
from pycompress.weights.weight import Field, Setting, Settings, Shape, Weight

DECOMPOSITIONS = ("channel", "spatial", "tucker")
MAX_STEP = 65536  # of a convolution: its kernel's sides, strides and dilations

Shape4 = tuple[int, int, int, int]
Ranks = tuple[int, ...]  # (r,), or (r_in, r_out) of tucker


def factor_shapes(decomposition: str, shape: Shape4, ranks: Ranks) -> dict[str, Shape4]:
    """Of each factor of a weight (n, c, kh, kw), in the order in which they run."""
    n, c, height, width = shape
    if decomposition == "tucker":
        r_in, r_out = ranks
        return {"down": (r_in, c, 1, 1), "core": (r_out, r_in, height, width), "up": (n, r_out, 1, 1)}
    (r,) = ranks
    if decomposition == "spatial":
        return {"down": (r, c, height, 1), "up": (n, r, 1, width)}
    return {"down": (r, c, height, width), "up": (n, r, 1, 1)}


def largest_ranks(decomposition: str, shape: Shape4) -> Ranks:
    """Those with which any weight (n, c, kh, kw) is reproduced."""
    n, c, height, width = shape
    if decomposition == "tucker":
        return min(c, n * height * width), min(n, c * height * width)
    if decomposition == "spatial":
        return (min(c * height, n * width),)
    return (min(c * height * width, n),)


def composed(factors: tuple[Tensor, ...]) -> Tensor:
    """The dense weight [n, c, kh, kw] of a chain of convolutions."""
    down, *core, up = factors
    with torch.autocast("cpu", enabled=False):
        if core:
            return torch.einsum("no,oiyx,ic->ncyx", up.flatten(1), core[0], down.flatten(1))
        return torch.einsum("nrx,rcyz->ncyxz", up[:, :, 0], down).flatten(3)


def _shape4(shape: Shape, settings: Settings) -> Shape4:
    height, width = settings["kernel_size"]
    return shape[0], shape[1] // (height * width), height, width


def _sides(value: object, shape: Shape, _settings: Settings) -> str:
    if not _are_sizes(value, (MAX_STEP, MAX_STEP)):
        return f"two numbers from 1 to {MAX_STEP}"
    return f"a divisor of k = {shape[1]}" if shape[1] % prod(value) else ""  # type: ignore[call-overload]


def _ranks(value: object, shape: Shape, settings: Settings) -> str:
    shape4, most = _shape4(shape, settings), prod(shape)
    if settings["decomposition"] == "tucker" and not _are_sizes(value, (most, most)):
        return f"two numbers from 1 for a weight {list(shape4)}"
    limits = largest_ranks(settings["decomposition"], shape4)
    found = value if settings["decomposition"] == "tucker" else (value,)
    return "" if _are_sizes(found, limits) else f"1 to {' and '.join(map(str, limits))} for a weight {list(shape4)}"


def _are_sizes(values: object, limits: tuple[int, ...]) -> bool:
    if not isinstance(values, list | tuple) or len(values) != len(limits):
        return False
    return all(type(size) is int and 1 <= size <= most for size, most in zip(values, limits, strict=True))


def _is_tucker(settings: Settings) -> bool:
    return bool(settings["decomposition"] == "tucker")


@dataclass(frozen=True, eq=False, repr=False)
class LowRankConv2dWeight(Weight):
    """The canonical weight of a low-rank convolution.

    Attributes:
        decomposition: ``channel``, ``spatial`` or ``tucker``.
        down: float32, the first convolution: [r, c, kh, kw], [r, c, kh, 1] or [r_in, c, 1, 1].
        up: float32, the last one: [n, r, 1, 1], [n, r, 1, kw] or [n, r_out, 1, 1].
        core: float32 [r_out, r_in, kh, kw] between the two, of tucker only.
    """

    name: ClassVar[str] = "low_rank"  # which the weight of a linear layer has in the table
    version: ClassVar[int] = 2
    older: ClassVar[Mapping[int, Mapping[str, str]]] = {1: {name: name for name in ("down", "core", "up")}}
    fields: ClassVar[tuple[Field, ...]] = (
        Field("down", torch.float32, "r_in, c, down_height, down_width", finite),
        Field("core", torch.float32, "r_out, r_in, height, width", finite, when=_is_tucker),
        Field("up", torch.float32, "n, r_out, 1, up_width", finite),
    )
    options: ClassVar[tuple[Setting, ...]] = (
        Setting("decomposition", one_of(*DECOMPOSITIONS)),
        Setting("kernel_size", _sides),
        Setting("rank", _ranks, when=lambda s: not _is_tucker(s), measured=lambda tensors: len(tensors["down"])),
        Setting(
            "ranks", _ranks, when=_is_tucker, measured=lambda tensors: [len(tensors["down"]), len(tensors["core"])]
        ),
    )

    decomposition: str
    down: Tensor
    up: Tensor
    core: Tensor | None = None

    @classmethod
    def sizes(cls, n: int, k: int, settings: Settings) -> dict[str, int]:
        kind, (_, c, height, width) = settings["decomposition"], _shape4((n, k), settings)
        r_in, r_out = settings["ranks"] if kind == "tucker" else [settings["rank"]] * 2
        return {
            "n": n, "c": c, "r_in": r_in, "r_out": r_out, "height": height, "width": width,
            "down_height": 1 if kind == "tucker" else height, "down_width": width if kind == "channel" else 1,
            "up_width": width if kind == "spatial" else 1,
        }  # fmt: skip

    @property
    def kernel_size(self) -> tuple[int, int]:
        if self.core is not None:
            return self.core.shape[2], self.core.shape[3]
        return self.down.shape[2], max(self.down.shape[3], self.up.shape[3])

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def ranks(self) -> Ranks:
        """(r,), or (r_in, r_out) of tucker."""
        return (len(self.down),) if self.core is None else (len(self.down), len(self.core))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.up), self.down.shape[1] * prod(self.kernel_size)

    @property
    def shape4(self) -> Shape4:
        """(n, c, kh, kw) of the dense weight."""
        return len(self.up), self.down.shape[1], *self.kernel_size

    def settings(self) -> dict[str, Any]:
        rest = super().settings()
        del rest["rank" if self.decomposition == "tucker" else "ranks"]
        return rest

    def factors(self) -> tuple[Tensor, ...]:
        """The weights of the convolutions, in the order in which they run."""
        return (self.down, self.up) if self.core is None else (self.down, self.core, self.up)

    def decompress(self) -> Tensor:
        """float32 [n, k]."""
        return composed(self.factors()).flatten(1)
