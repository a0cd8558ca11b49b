"""The embeddings of a text encoder (``csrc/embed``) in torch's own operators: the oracle of the tests, what is differentiated, and
what runs where there are no kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm


def positions(tokens: Tensor, padding: int) -> Tensor:
    """Of the tokens that are not ``padding``, from padding + 1 on; padding of the others."""
    there = tokens.ne(padding)
    return there.cumsum(1) * there + padding


def all_ids(ids: Sequence[Tensor | None], padding: int) -> list[Tensor]:
    """With those that are counted."""
    tokens = ids[0]
    assert tokens is not None
    return [positions(tokens, padding) if one is None else one for one in ids]


def embed(
    dtype: torch.dtype, tables: Sequence[Tensor], scales: Sequence[Tensor | None], ids: Sequence[Tensor | None], padding: int,
    weight: Tensor | None, shift: Tensor | None, eps: float | None,
) -> Tensor:  # fmt: skip
    total = None
    for table, scale, one in zip(tables, scales, all_ids(ids, padding), strict=True):
        rows = embedding(one, table).float()
        rows = rows if scale is None else rows * embedding(one, scale[:, None])
        total = rows if total is None else total + rows
    assert total is not None
    if eps is not None:
        factor, offset = (None if one is None else one.float() for one in (weight, shift))
        total = layer_norm(total, total.shape[-1:], factor, offset, eps)
    return total.to(dtype)
