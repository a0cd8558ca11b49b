"""``LowRankEmbedding``: an ``nn.Embedding`` as a narrow table and a basis (ALBERT, Lan et al. 2019, arXiv:1909.11942)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from pycompress.kinds import EMBEDDING, EmbeddingGeometry
from pycompress.methods.low_rank import LowRank
from pycompress.nn.factors import FactorsLayer, uncast
from pycompress.nn.layer import setting
from pycompress.ops.checks import check_tensor
from pycompress.weights import LowRankWeight, Weight

if TYPE_CHECKING:
    from typing_extensions import Self


class LowRankEmbedding(FactorsLayer):
    """``table[tokens] @ basis``, made by :meth:`from_dense` or :meth:`from_weight`.

    State, as of every low-rank weight: ``low_rank_up`` float32 [num_embeddings, r], the table, and ``low_rank_down`` float32
    [r, embedding_dim], the basis. There is no gradient for them, so what an nn.Embedding says about that of its weight
    (``padding_idx``, ``sparse``, ``scale_grad_by_freq``) has no effect; the row of ``padding_idx`` is zeros where the dense one
    was.

    Attributes:
        geometry: ``padding_idx``, the dense layer's.
        dtype: of the results too. The factors stay float32.

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
        super().__init__(weight, geometry=EmbeddingGeometry(padding_idx))
        self.dtype = dtype
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
        return cls(weight, geometry.padding_idx)  # type: ignore[arg-type]

    @classmethod
    def misfit(cls, geometry: EmbeddingGeometry, settings: Mapping[str, Any] | None = None) -> str:  # noqa: ARG003
        if settings is None or (settings["bits"] == 32 and "residual" not in settings):
            return ""
        beside = "a residual" if "residual" in settings else "int8 factors"
        return f"the weight has {beside}, expected float32 factors alone"

    rank: int = setting("rank", "How thin the table is: 1 to min(num_embeddings, embedding_dim).")

    @property
    def label(self) -> str:
        """What a table calls the method, e.g. ``low rank 64``."""
        return f"low rank {self.rank}"

    def dense(self) -> Tensor:
        factors = self._unpack()
        return factors["up"] @ factors["down"]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Embedding gives it
        check_tensor(type(self).__name__, input)
        return uncast(self.product, input).to(self.dtype)

    def product(self, x: Tensor) -> Tensor:
        factors = self._unpack()
        return torch.matmul(embedding(x, factors["up"]), factors["down"])
