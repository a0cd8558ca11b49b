"""``PlainLinear``: an ``nn.Linear`` with a canonical weight that no kernel takes: decompressed at each call, for torch's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from pycompress import ops
from pycompress.nn.factors import FactorsLayer
from pycompress.nn.layer import setting
from pycompress.nn.linear import CompressedLinear

_ALIGNMENT = 16  # bytes; tensors begin at multiples of it, so that any dtype can be viewed there


class PlainLayer(FactorsLayer):
    """A layer of which ``packed`` is the tensors of any canonical weight as they are, one behind another."""

    def _derive(self) -> None:
        names = self.weight_type.names(self.settings)
        expected = self._expected()
        self._forms = {name: (torch.Size(expected[stored][0]), expected[stored][1]) for name, stored in names.items()}

    def _pack(self, parts: Mapping[str, Tensor], device: torch.device | str = "cpu") -> tuple[Tensor, str]:
        pieces = []
        for part in parts.values():
            piece = part.contiguous().flatten().view(torch.uint8)
            pieces += [piece, piece.new_zeros(-len(piece) % _ALIGNMENT)]
        return torch.cat(pieces).to(device), ""

    def _unpack(self) -> dict[str, Tensor]:
        parts, start = {}, 0
        for name, (size, dtype) in self._forms.items():
            end = start + size.numel() * dtype.itemsize
            parts[name] = (
                self.packed[start:end].view(dtype).view(size).clone()
            )  # torch.save takes no views of several dtypes
            start = end + -end % _ALIGNMENT
        return parts

    bits: int | None = setting("bits", "Of a stored weight, where its settings say so.")


class PlainLinear(PlainLayer, CompressedLinear):
    """``act(x W^T + b)``, computed in float32 and rounded once. A subclass says what its ``weight_type`` is.

    State: the tensors of the canonical weight.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        self.check(input)
        y = linear(input.float(), self.weight, self.bias)
        return ops.DIFFERENTIABLE[self.activation](y).to(input.dtype)
