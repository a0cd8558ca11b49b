"""``nn.Embedding``: a matrix [num_embeddings, embedding_dim] of which tokens choose rows."""

# ruff: noqa: ARG002, ARG003 - a kind that is asked what all are asked may not need all of it

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.kinds.kind import Kind
from pycompress.methods.method import EmbeddingMethod, Method


@dataclass(frozen=True)
class EmbeddingGeometry:
    """What an ``nn.Embedding`` is besides its weight.

    Attributes:
        padding_idx: the token that stands for none; its row is usually zeros.
    """

    padding_idx: int | None = None

    def __str__(self) -> str:
        return f"padding_idx={self.padding_idx}"

    def settings(self) -> dict[str, Any]:
        """For JSON."""
        return {"padding_idx": self.padding_idx}

    @classmethod
    def from_settings(cls, k: int, settings: Mapping[str, Any]) -> EmbeddingGeometry:
        """The inverse of :meth:`settings`. Raises ValueError where anything does not fit."""
        if settings.keys() != {"padding_idx"}:
            raise ValueError(f"EmbeddingGeometry: the settings are {list(settings)}, expected ['padding_idx']")
        padding_idx = settings["padding_idx"]
        if padding_idx is not None and not (type(padding_idx) is int and padding_idx >= 0):
            raise ValueError(f"EmbeddingGeometry: padding_idx is {padding_idx!r}, expected None or a number from 0")
        return cls(padding_idx)


class Embedding(Kind):
    """Tokens [...] -> rows [..., embedding_dim]."""

    name, dense = "embedding", nn.Embedding
    phrase, plural = "an Embedding", "embeddings"
    geometry_type = EmbeddingGeometry
    dims, tokens, biased, epilogue, shares, always = 0, True, False, False, False, False

    def geometry(self, module: nn.Module) -> EmbeddingGeometry:
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            raise ValueError(
                f"max_norm is {module.max_norm}, expected None: it rescales the rows of its weight as they are used"
            )
        return EmbeddingGeometry(module.padding_idx)

    def fitted(self, method: Method, module: nn.Module) -> Method:
        return method.for_embedding() if isinstance(method, EmbeddingMethod) else method

    def attributes(self, n: int, k: int, geometry: EmbeddingGeometry) -> dict[str, Any]:
        rows = {"num_embeddings": n, "embedding_dim": k, "padding_idx": geometry.padding_idx}
        return {**rows, "max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False}

    def describe(self, n: int, k: int, geometry: EmbeddingGeometry) -> str:
        padding = "" if geometry.padding_idx is None else f", padding_idx={geometry.padding_idx}"
        return f"{n}, {k}{padding}"

    def accepts(self, module: nn.Module, x: Tensor) -> bool:
        whole = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
        return whole and int(x.min()) >= 0 and int(x.max()) < self.shape(module)[0]

    def result_shape(self, shape: Sequence[Any], n: int, k: int, geometry: Any) -> tuple[Any, ...]:
        return *shape, k

    def sample(self, module: nn.Module, like: Tensor) -> Tensor:
        return torch.randint_like(like, self.shape(module)[0], device="cpu")

    def sizes(self, n: int, k: int, geometry: Any) -> tuple[tuple[int | str, ...], tuple[int | str, ...]]:
        return ("tokens",), ("tokens", k)
