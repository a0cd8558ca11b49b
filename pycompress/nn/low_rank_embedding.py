"""``LowRankEmbedding``: an ``nn.Embedding`` as a narrow table and a basis (ALBERT, Lan et al. 2019, arXiv:1909.11942)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from pycompress.methods.low_rank import LowRank, LowRankWeight
from pycompress.methods.weight import Weight
from pycompress.nn.dense import padding_idx_of, stored_weight
from pycompress.nn.factors import FactorsLayer

if TYPE_CHECKING:
    from typing_extensions import Self


class LowRankEmbedding(FactorsLayer):
    """``table[tokens] @ basis``, made by :meth:`from_dense` or :meth:`from_weight`.

    State, as of every low-rank weight: ``up`` float32 [num_embeddings, r], the table, and ``down`` float32 [r, embedding_dim], the
    basis. There is no gradient for them, so what an nn.Embedding says about that of its weight (``padding_idx``, ``sparse``,
    ``scale_grad_by_freq``) has no effect; the row of ``padding_idx`` is zeros where the dense one was.

    Attributes:
        padding_idx: the dense layer's.
        dtype: of the results, as the dense layer's weight had; ``.to(dtype)`` changes it. The factors stay float32.

    Shapes:
        tokens int64 or int32 [...], from 0 to num_embeddings - 1 -> [..., embedding_dim].
    """

    weight_type = LowRankWeight
    default_method = LowRank(energy=0.95, rank_guard=False, embeddings=True)
    dense_kind = "Embedding"

    def __init__(
        self, weight: LowRankWeight, padding_idx: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(weight)
        if self.settings["bits"] != 32 or "residual" in self.settings:
            beside = "a residual" if "residual" in self.settings else "int8 factors"
            raise ValueError(f"LowRankEmbedding: the weight has {beside}, expected float32 factors alone")
        if padding_idx is not None and not (type(padding_idx) is int and 0 <= padding_idx < self.n):
            raise ValueError(f"LowRankEmbedding: padding_idx is {padding_idx!r}, expected None or 0 to {self.n - 1}")
        self.padding_idx = padding_idx
        self.dtype = dtype

    @classmethod
    def from_weight(
        cls, weight: LowRankWeight, padding_idx: int | None = None, dtype: torch.dtype = torch.float32
    ) -> Self:
        """From a canonical weight [num_embeddings, embedding_dim] with float32 factors and no residual."""
        return cls(weight, padding_idx, dtype)

    @classmethod
    def replacing(cls, dense: nn.Module, weight: Weight, activation: str = "none") -> Self:
        if not isinstance(dense, nn.Embedding) or not isinstance(weight, LowRankWeight):
            raise TypeError(
                f"{cls.__name__}: the dense layer is {type(dense).__name__}, the weight {type(weight).__name__}, expected "
                "Embedding and LowRankWeight"
            )
        if activation != "none":
            raise ValueError(f"{cls.__name__}: activation is {activation!r}, expected 'none'")
        padding_idx, stored = padding_idx_of(dense), stored_weight(dense)
        if padding_idx is not None and not bool(stored[padding_idx].any()):
            up = weight.up.clone()
            up[padding_idx] = 0
            weight = replace(weight, up=up)
        return cls(weight, padding_idx, stored.dtype)

    def canonical(self) -> LowRankWeight:
        """The canonical weight, whose tensors are views of ``packed``."""
        return LowRankWeight.from_tensors((self.n, self.k), self._tensors(), self.settings)

    @property
    def num_embeddings(self) -> int:
        return self.n

    @property
    def embedding_dim(self) -> int:
        return self.k

    @property
    def rank(self) -> int:
        return int(self.settings["rank"])

    @property
    def label(self) -> str:
        """What a table calls the method, e.g. ``low rank 64``."""
        return f"low rank {self.rank}"

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return self.n, self.k

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Embedding gives it
        factors = self._unpack()
        return torch.matmul(embedding(input, factors["up"]), factors["down"]).to(self.dtype)

    def _settings_with(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**self.settings, "rank": len(tensors["down"])}

    def _with_weight(self, weight: Weight, bias: Tensor | None) -> Self:  # noqa: ARG002
        assert isinstance(weight, LowRankWeight)
        return type(self)(weight, self.padding_idx, self.dtype)

    def _sizes(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(self.packed.new_empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)
