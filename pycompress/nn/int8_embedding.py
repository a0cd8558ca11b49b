"""``Int8Embedding``: an ``nn.Embedding`` whose rows are int8, with a scale each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import embedding

from pycompress.kinds import EMBEDDING, EmbeddingGeometry
from pycompress.methods.int8 import Int8
from pycompress.nn.layer import setting
from pycompress.nn.plain import PlainLayer
from pycompress.ops.checks import check_tensor
from pycompress.weights import Int8Weight, Weight

if TYPE_CHECKING:
    from typing_extensions import Self


class Int8Embedding(PlainLayer):
    """``values[tokens] * scale[tokens]``, made by :meth:`from_dense` or :meth:`from_weight`.

    State: ``int8_values`` [num_embeddings, embedding_dim], ``int8_scale`` float32 [num_embeddings]. There is no gradient for them.

    Attributes:
        geometry: ``padding_idx``, the dense layer's.
        dtype: of the results too.

    Shapes:
        tokens int64 or int32 [...], from 0 to num_embeddings - 1 -> [..., embedding_dim].
    """

    weight_type = Int8Weight
    default_method = Int8(activation_bits=16, embeddings=True)
    kind = EMBEDDING
    geometry: EmbeddingGeometry
    __slots__ = ("_rows",)  # outside of the state: packed, and what `rows` gave of it last
    _rows: tuple[Tensor, tuple[Tensor, Tensor]] | None

    def __new__(cls, *arguments: Any, **keywords: Any) -> Self:
        layer = super().__new__(cls, *arguments, **keywords)
        layer._rows = None
        return layer

    def __init__(self, weight: Int8Weight, padding_idx: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(weight, geometry=EmbeddingGeometry(padding_idx))
        self.dtype = dtype
        if padding_idx is not None and not (type(padding_idx) is int and 0 <= padding_idx < self.n):
            raise ValueError(f"Int8Embedding: padding_idx is {padding_idx!r}, expected None or 0 to {self.n - 1}")

    @classmethod
    def from_weight(
        cls, weight: Int8Weight, padding_idx: int | None = None, dtype: torch.dtype = torch.float32
    ) -> Self:
        """From a canonical weight [num_embeddings, embedding_dim]."""
        return cls(weight, padding_idx, dtype)

    @classmethod
    def build(cls, weight: Weight, geometry: Any, bias: Tensor | None = None, activation: str = "none") -> Self:
        if bias is not None or activation != "none":
            raise ValueError(f"{cls.__name__}: activation is {activation!r}, expected 'none', and no bias")
        return cls(weight, geometry.padding_idx)  # type: ignore[arg-type]

    weight_bits: int = setting("weight_bits", "8 or 7.")

    bits: int | None = setting("weight_bits", "Of a stored weight.")

    @property
    def label(self) -> str:
        """What a table calls the method: ``int8``."""
        return "int8"

    def rows(self) -> tuple[Tensor, Tensor]:
        """values int8 [n, k] and scale float32 [n], views of ``packed``."""
        packed = self.packed
        if not is_compiling() and self._rows is not None and self._rows[0] is packed:
            return self._rows[1]
        size = self.n * self.k
        values = packed[:size].view(torch.int8).view(self.n, self.k)
        scale = packed[size + -size % 16 :][: 4 * self.n].view(torch.float32)
        if not is_compiling():
            self._rows = packed, (values, scale)
        return values, scale

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Embedding gives it
        check_tensor(type(self).__name__, input)
        values, scale = self.rows()
        return (embedding(input, values).to(torch.float32) * embedding(input, scale[:, None])).to(self.dtype)
