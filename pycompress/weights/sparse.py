"""``SparseWeight``: the non-zero weights, and a bitmask that says where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pycompress.weights.rules import between, numbers, one_of, positive
from pycompress.weights.weight import Field, Setting, Weight, described, register

_POPCOUNT: NDArray[np.uint8] = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(
    axis=1, dtype=np.uint8
)


def magnitude_bits(values: NDArray[Any]) -> NDArray[np.int32]:
    """int32, in the order of |values|: IEEE floats without their sign order as their bits do."""
    return np.asarray(values.view(np.int32) & 0x7FFFFFFF)


def nonzero(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Where float32 or int8 is not zero. By its bits: -0 is zero, a subnormal is not, whatever torch.set_flush_denormal says."""
    return np.asarray((magnitude_bits(values) if values.dtype == np.float32 else values) != 0)


def _mask(name: str, mask: Tensor, weight: SparseWeight) -> str:
    padding = mask.numpy()[:, -1] >> ((weight.k - 1) % 8 + 1)
    if padding.any():
        return f"row {int(padding.nonzero()[0][0])} of the {name} has bits set behind k = {weight.k}"
    return ""


def _values(name: str, values: Tensor, weight: SparseWeight) -> str:
    count = int(_POPCOUNT[weight.mask.numpy()].sum(dtype=np.int64))
    if len(values) != count:
        return f"there are {len(values)} {name}, the mask has {count} bits set"
    zeros = count - int(np.count_nonzero(nonzero(values.numpy())))
    return (
        f"{zeros} of the {name} are zero, expected them to be left out of the mask" if zeros else numbers(name, values)
    )


@register
@dataclass(frozen=True, eq=False, repr=False)
class SparseWeight(Weight):
    """The canonical sparse weight.

    A bitmask instead of indices: none can be out of range, doubled or out of order, and from a density of 1/32 up it is no
    larger than 32-bit column indices would be.

    Attributes:
        mask: uint8 [n, ceil(k / 8)]: bit i % 8 (least significant first) of byte i // 8 of row r says whether weight[r, i] is
            non-zero; the padding bits behind k are 0.
        values: float32 or int8 [nnz]: the non-zero weights, row after row, ascending k. Never zero, finite, never -128.
        k: in_features, 1 to 65536.
        scale: float32 [n], positive and finite, for int8: weight = integer * scale[row]. None for float32.
        activation_bits: 7 or 8 for int8, the range in which the layer quantizes its input. None for float32.
    """

    name: ClassVar[str] = "sparse"
    version: ClassVar[int] = 2
    older: ClassVar[Mapping[int, Mapping[str, str]]] = {
        1: {"mask": "weight_mask", "values": "weight_values", "scale": "weight_scale"}
    }
    fields: ClassVar[tuple[Field, ...]] = (
        Field("mask", torch.uint8, "n, ceil(k / 8)", _mask),
        Field("values", {32: torch.float32, 8: torch.int8}, "nnz", _values),
        Field("scale", torch.float32, "n", positive, when=lambda s: s["bits"] == 8),
    )
    options: ClassVar[tuple[Setting, ...]] = (
        Setting("bits", one_of(8, 32)),
        Setting("nnz", between(0, lambda n, k: n * k), measured=lambda tensors: tensors["values"].numel()),
        Setting("activation_bits", one_of(7, 8), when=lambda s: s["bits"] == 8),
    )

    mask: Tensor
    values: Tensor
    k: int
    scale: Tensor | None = None
    activation_bits: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape[0], self.k

    @property
    def bits(self) -> int:
        """32 or 8."""
        return 32 if self.values.dtype == torch.float32 else 8

    @property
    def nnz(self) -> int:
        return len(self.values)

    @property
    def density(self) -> float:
        """Share of the weights that are non-zero."""
        return self.nnz / (self.shape[0] * self.k)

    @classmethod
    def from_dense(
        cls, values: Tensor, scale: Tensor | None = None, activation_bits: int | None = None
    ) -> SparseWeight:
        """Leaves out the zeros of values: float32 [n, k], or int8 [n, k] with a scale and activation_bits.

        Raises:
            ValueError: not such a matrix, or what breaks the rules of the class.
        """
        if values.dim() != 2 or values.dtype not in (torch.float32, torch.int8):
            raise ValueError(f"SparseWeight: the dense weight is {described(values)}, expected float32 or int8 [n, k]")
        dense = values.detach().cpu().numpy()
        there = nonzero(dense)
        mask = np.packbits(there, axis=1, bitorder="little")
        return cls(torch.from_numpy(mask), torch.from_numpy(dense[there]), dense.shape[1], scale, activation_bits)

    def decompress(self) -> Tensor:
        """float32 [n, k]."""
        there = np.unpackbits(self.mask.numpy(), axis=1, count=self.k, bitorder="little").view(np.bool_)
        values = self.values.numpy()
        dense = np.zeros(self.shape, values.dtype)
        dense[there] = values
        weight = torch.from_numpy(dense).to(torch.float32)
        return weight if self.scale is None else weight * self.scale[:, None]
