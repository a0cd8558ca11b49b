"""``nn.Embedding``: a matrix [num_embeddings, embedding_dim] of which tokens choose rows."""

# ruff: noqa: ARG002, ARG003 - a kind that is asked what all are asked may not need all of it

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.kinds.kind import Kind


@dataclass(frozen=True)
class EmbeddingGeometry:
    """What an ``nn.Embedding`` is besides its weight. A file leaves all of it to the model, so any two are equal.

    Attributes:
        padding_idx: the token that stands for none; its row is usually zeros.
        dtype: of the results.
    """

    padding_idx: int | None = field(default=None, compare=False)
    dtype: torch.dtype = field(default=torch.float32, compare=False)

    def settings(self) -> dict[str, Any]:
        """For JSON: nothing."""
        return {}

    @classmethod
    def from_settings(cls, k: int, settings: Mapping[str, Any]) -> EmbeddingGeometry:
        """Raises ValueError where there is any setting."""
        if settings:
            raise ValueError(f"EmbeddingGeometry: the settings are {list(settings)}, expected none")
        return cls()


class Embedding(Kind):
    """Tokens [...] -> rows [..., embedding_dim]."""

    name, dense = "embedding", nn.Embedding
    phrase, plural = "an Embedding", "embeddings"
    geometry_type = EmbeddingGeometry
    dims, tokens, epilogue, shares, always = 0, True, False, False, False

    def geometry(self, module: nn.Module) -> EmbeddingGeometry:
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            raise ValueError(
                f"max_norm is {module.max_norm}, expected None: it rescales the rows of its weight as they are used"
            )
        return EmbeddingGeometry(module.padding_idx, self.stored(module).dtype)

    def describe(self, n: int, k: int, geometry: EmbeddingGeometry) -> str:
        padding = "" if geometry.padding_idx is None else f", padding_idx={geometry.padding_idx}"
        return f"{n}, {k}{padding}"

    def accepts(self, module: nn.Module, x: Tensor) -> bool:
        whole = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
        return whole and int(x.min()) >= 0 and int(x.max()) < self.shape(module)[0]

    def sample(self, module: nn.Module, like: Tensor) -> Tensor:
        return torch.randint_like(like, self.shape(module)[0], device="cpu")

    def sizes(self, n: int, k: int, geometry: Any) -> tuple[tuple[int | str, ...], tuple[int | str, ...]]:
        return ("tokens",), ("tokens", k)
