"""Embeddings with their sum and norm, on the CPU (``csrc/embed``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pycompress.ops.cpu import native
from pycompress.reference import embed as twin


def size_of(ids: Sequence[Tensor | None]) -> torch.Size:
    """[batch, length] of ids that are broadcast."""
    size: torch.Size = torch.broadcast_shapes(*(one.shape for one in ids if one is not None))
    return size


def embed_into(
    tables: list[Tensor], scales: list[Tensor | None], ids: list[Tensor | None], padding: int, weight: Tensor | None,
    shift: Tensor | None, eps: float | None, y: Tensor,
) -> bool:  # fmt: skip
    """Writes to y; False where the kernels do not read such tensors. Raises IndexError where an id chooses no row."""
    threads, norm = torch.get_num_threads(), eps is not None
    return native.reads_tensors and bool(
        native._C.embed_tensors(tables, scales, ids, padding, weight, shift, eps or 0.0, norm, y, threads)
    )


def embed(
    dtype: torch.dtype, tables: Sequence[Tensor], scales: Sequence[Tensor | None], ids: Sequence[Tensor | None], padding: int,
    weight: Tensor | None, shift: Tensor | None, eps: float | None,
) -> Tensor:  # fmt: skip
    first, *_ = tables
    y = first.new_empty((*size_of(ids), first.shape[1]), dtype=dtype)
    if embed_into(list(tables), list(scales), list(ids), padding, weight, shift, eps, y):
        return y
    factor, offset = (one if one is None else one.contiguous() for one in (weight, shift))
    dense = [one if one is None else one.contiguous() for one in scales]
    if embed_into([one.contiguous() for one in tables], dense, list(ids), padding, factor, offset, eps, y):
        return y
    every = twin.all_ids(ids, padding)
    for number, (one, table) in enumerate(zip(every, tables, strict=True)):
        _check_ids(number, one, len(table))
    return y.copy_(twin.embed(dtype, tables, scales, every, padding, weight, shift, eps))


def _check_ids(table: int, ids: Tensor, rows: int) -> None:
    wrong = ids[(ids < 0) | (ids >= rows)]
    if wrong.numel():
        raise IndexError(
            f"embed: index out of range: {int(wrong[0])} among the ids of table {table}, expected 0 to {rows - 1}"
        )
