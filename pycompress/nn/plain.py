"""``PlainLinear``: an ``nn.Linear`` with a canonical weight that no kernel takes: decompressed at each call, for torch's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pycompress.nn.factors import FactorsLayer
from pycompress.nn.layer import setting
from pycompress.nn.linear import CompressedLinear
from pycompress.ops.registry import library, under_autocast
from pycompress.weights import Weight

_ALIGNMENT = 16  # bytes; tensors begin at multiples of it, so that any dtype can be viewed there
_TYPES: dict[str, type[Weight]] = {}  # of the weights of all plain layers, by their qualified names

library.define("plain_dense(Tensor packed, str weight, str settings, int n, int k) -> Tensor")


def _named(weight: type[Weight]) -> str:
    return f"{weight.__module__}.{weight.__qualname__}"


@lru_cache(maxsize=1 << 12)
def _parts_of(weight: str, settings: str, n: int, k: int) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Size and dtype of each part of a weight [n, k]; settings: as JSON."""
    kind, own = _TYPES[weight], json.loads(settings)
    expected = kind.expected((n, k), own)
    return {name: (torch.Size(expected[stored][0]), expected[stored][1]) for name, stored in kind.names(own).items()}


def _unpacked(packed: Tensor, weight: str, settings: str, n: int, k: int) -> dict[str, Tensor]:
    parts, start = {}, 0
    for name, (size, dtype) in _parts_of(weight, settings, n, k).items():
        end = start + size.numel() * dtype.itemsize
        parts[name] = packed[start:end].view(dtype).view(size).clone()  # torch.save takes no views of several dtypes
        start = end + -end % _ALIGNMENT
    return parts


def _dense(packed: Tensor, weight: str, settings: str, n: int, k: int) -> Tensor:
    """float32 [n, k], in one op: a compiler cannot look into what a weight checks, and need not."""
    parts = _unpacked(packed.cpu(), weight, settings, n, k)
    return _TYPES[weight].from_parts((n, k), parts, json.loads(settings)).decompress().to(packed.device)


library.impl("plain_dense", _dense, "CPU")
library.impl("plain_dense", _dense, "CUDA")
under_autocast("plain_dense")
torch.library.register_fake(
    "pycompress::plain_dense", lambda packed, _w, _s, n, k: packed.new_empty((n, k), dtype=torch.float32), lib=library
)


class PlainLayer(FactorsLayer):
    """A layer of which ``packed`` is the tensors of any canonical weight as they are, one behind another."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if hasattr(cls, "weight_type"):
            _TYPES[_named(cls.weight_type)] = cls.weight_type

    def _derive(self) -> None:
        self._said = (_named(self.weight_type), json.dumps(self.settings), self.n, self.k)

    def _pack(self, parts: Mapping[str, Tensor], device: torch.device | str = "cpu") -> tuple[Tensor, str]:
        pieces = []
        for part in parts.values():
            piece = part.contiguous().flatten().view(torch.uint8)
            pieces += [piece, piece.new_zeros(-len(piece) % _ALIGNMENT)]
        return torch.cat(pieces).to(device), ""

    def _unpack(self) -> dict[str, Tensor]:
        return _unpacked(self.packed, *self._said)

    def dense(self) -> Tensor:
        """float32 [n, k], of tensors alone: it runs inside compiled graphs."""
        weight: Tensor = torch.ops.pycompress.plain_dense.default(self.packed, *self._said)
        return weight

    bits: int | None = setting("bits", "Of a stored weight, where its settings say so.")


class PlainLinear(PlainLayer, CompressedLinear):
    """``act(x W^T + b)``, computed in float32 and rounded once. A subclass says what its ``weight_type`` is.

    State: the tensors of the canonical weight.
    """

    def product(self, x: Tensor) -> Tensor:
        return linear(x, self.dense(), self.bias32)
