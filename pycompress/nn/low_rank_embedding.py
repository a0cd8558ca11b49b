"""``LowRankEmbedding``: an ``nn.Embedding`` as a narrow table and a basis (ALBERT, Lan et al. 2019, arXiv:1909.11942)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from pycompress.kinds import EMBEDDING, EmbeddingGeometry
from pycompress.methods.low_rank import LowRank
from pycompress.nn.factors import FactorsLayer
from pycompress.nn.layer import setting
from pycompress.weights import LowRankWeight, Weight

if TYPE_CHECKING:
    from typing_extensions import Self


class LowRankEmbedding(FactorsLayer):
    """``table[tokens] @ basis``, made by :meth:`from_dense` or :meth:`from_weight`.

    State, as of every low-rank weight: ``up`` float32 [num_embeddings, r], the table, and ``down`` float32 [r, embedding_dim], the
    basis. There is no gradient for them, so what an nn.Embedding says about that of its weight (``padding_idx``, ``sparse``,
    ``scale_grad_by_freq``) has no effect; the row of ``padding_idx`` is zeros where the dense one was.

    Attributes:
        geometry: ``padding_idx``, the dense layer's, and ``dtype``, of the results, as the dense layer's weight had;
            ``.to(dtype)`` changes it. The factors stay float32.

    Shapes:
        tokens int64 or int32 [...], from 0 to num_embeddings - 1 -> [..., embedding_dim].
    """

    weight_type = LowRankWeight
    default_method = LowRank(energy=0.95, rank_guard=False, embeddings=True)
    kind = EMBEDDING
    geometry: EmbeddingGeometry

    def __init__(
        self, weight: LowRankWeight, padding_idx: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(weight, geometry=EmbeddingGeometry(padding_idx, dtype))
        if padding_idx is not None and not (type(padding_idx) is int and 0 <= padding_idx < self.n):
            raise ValueError(f"LowRankEmbedding: padding_idx is {padding_idx!r}, expected None or 0 to {self.n - 1}")

    @classmethod
    def from_weight(
        cls, weight: LowRankWeight, padding_idx: int | None = None, dtype: torch.dtype = torch.float32
    ) -> Self:
        """From a canonical weight [num_embeddings, embedding_dim] with float32 factors and no residual."""
        return cls(weight, padding_idx, dtype)

    @classmethod
    def replacing(cls, dense: nn.Module, weight: Weight, activation: str = "none") -> Self:
        kind = cls._kind_of(dense)
        padding_idx, stored = kind.geometry(dense).padding_idx, kind.stored(dense)
        if padding_idx is not None and isinstance(weight, LowRankWeight) and not bool(stored[padding_idx].any()):
            up = weight.up.clone()
            up[padding_idx] = 0
            weight = replace(weight, up=up)
        return super().replacing(dense, weight, activation)

    @classmethod
    def build(cls, weight: Weight, geometry: Any, bias: Tensor | None = None, activation: str = "none") -> Self:
        if bias is not None or activation != "none":
            raise ValueError(f"{cls.__name__}: activation is {activation!r}, expected 'none', and no bias")
        return cls(weight, geometry.padding_idx, geometry.dtype)  # type: ignore[arg-type]

    @classmethod
    def misfit(cls, geometry: EmbeddingGeometry, settings: Mapping[str, Any] | None = None) -> str:  # noqa: ARG003
        if settings is None or (settings["bits"] == 32 and "residual" not in settings):
            return ""
        beside = "a residual" if "residual" in settings else "int8 factors"
        return f"the weight has {beside}, expected float32 factors alone"

    num_embeddings = property(lambda self: self.n)
    embedding_dim = property(lambda self: self.k)
    padding_idx = property(lambda self: self.geometry.padding_idx)
    dtype = property(lambda self: self.geometry.dtype)
    rank: int = setting("rank", "How thin the table is: 1 to min(num_embeddings, embedding_dim).")

    @property
    def label(self) -> str:
        """What a table calls the method, e.g. ``low rank 64``."""
        return f"low rank {self.rank}"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Embedding gives it
        factors = self._unpack()
        return torch.matmul(embedding(input, factors["up"]), factors["down"]).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.geometry = replace(self.geometry, dtype=fn(self.packed.new_empty(0, dtype=self.dtype)).dtype)
        return super()._apply(fn, recurse)
