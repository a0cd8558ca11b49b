"""The embeddings of a text encoder: rows that ids choose from tables, their sum, and its LayerNorm."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pycompress.ops import cpu
from pycompress.ops.checks import FLOATS, nobody_looks
from pycompress.ops.derivative import below, wanted
from pycompress.ops.registry import EXACT_STRIDES, library, under_autocast
from pycompress.reference import embed as twin

positions = twin.positions
MAX_TABLES = 3
Tables = Sequence[Tensor]
Optional = Sequence["Tensor | None"]


def _check(
    tables: Tables, scales: Optional, ids: Optional, padding: int, weight: Tensor | None, shift: Tensor | None,  # noqa: ARG001
    eps: float | None,
) -> None:  # fmt: skip
    if not 0 < len(tables) <= MAX_TABLES:
        raise ValueError(f"embed: {len(tables)} tables, expected 1 to {MAX_TABLES}")
    if len(ids) != len(tables) or len(scales) != len(tables):
        raise ValueError(f"embed: {len(ids)} ids and {len(scales)} scales for {len(tables)} tables, expected as many")
    if ids[0] is None:
        raise ValueError("embed: the ids of table 0 are None, expected a tensor: others are counted in it")
    d = tables[0].shape[-1]
    for i, (table, scale, one) in enumerate(zip(tables, scales, ids, strict=True)):
        if table.dtype not in FLOATS and table.dtype != torch.int8:
            raise TypeError(f"embed: table {i} is {table.dtype}, expected float32, bfloat16, float16 or int8")
        if table.dim() != 2 or table.shape[1] != d:
            raise ValueError(f"embed: table {i} is {list(table.shape)}, expected [rows, {d}]")
        if (table.dtype == torch.int8) != (scale is not None):
            raise ValueError(f"embed: table {i} is {table.dtype}, expected a scale for int8 and none for others")
        if scale is not None and (scale.dtype != torch.float32 or scale.shape != table.shape[:1]):
            raise ValueError(
                f"embed: scale {i} is {scale.dtype} {list(scale.shape)}, expected torch.float32 [{len(table)}]"
            )
        if one is not None and one.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"embed: the ids of table {i} are {one.dtype}, expected int64 or int32")
        if one is not None and one.dim() != 2:
            raise ValueError(f"embed: the ids of table {i} are {list(one.shape)}, expected [batch, length]")
    for name, vector in (("weight", weight), ("shift", shift)):
        if vector is not None and (eps is None or vector.dtype not in FLOATS or vector.shape != (d,)):
            there = f"{vector.dtype} {list(vector.shape)}{'' if eps is not None else ' without eps'}"
            raise ValueError(f"embed: {name} is {there}, expected floats [{d}] and an eps")


def dtype_of(tables: Tables) -> torch.dtype:
    """Of the result: that of the first table of floats; float32 where there is none."""
    return next((table.dtype for table in tables if table.dtype != torch.int8), torch.float32)


def _fake(tables: Tables, scales: Optional, ids: Optional, *rest: Any) -> Tensor:
    _check(tables, scales, ids, *rest)
    return tables[0].new_empty((*cpu.embed.size_of(ids), tables[0].shape[1]), dtype=dtype_of(tables))


def _cpu(*operands: Any) -> Tensor:
    _check(*operands)
    return cpu.embed.embed(dtype_of(operands[0]), *operands)


def _anywhere(*operands: Any) -> Tensor:
    _check(*operands)
    return twin.embed(dtype_of(operands[0]), *operands)


def _autograd(keys: Any, *operands: Any) -> Tensor:
    tables, _, _, _, weight, shift, _ = operands
    run = _anywhere if wanted(*tables, weight, shift) else partial(below, _op, keys)
    y: Tensor = run(*operands)
    return y


library.define(
    "embed(Tensor[] tables, Tensor?[] scales, Tensor?[] ids, int padding, Tensor? weight, Tensor? shift, float? eps) -> Tensor",
    tags=EXACT_STRIDES,
)
for _key, _function in (("CPU", _cpu), ("CUDA", _anywhere)):
    library.impl("embed", _function, _key)
library.impl("embed", _autograd, "Autograd", with_keyset=True)
under_autocast("embed")
torch.library.register_fake("pycompress::embed", _fake, lib=library)
_op = torch.ops.pycompress.embed.default


def embed(
    tables: Tables, ids: Optional, *, scales: Optional = (), padding: int = 0, weight: Tensor | None = None,
    shift: Tensor | None = None, eps: float | None = None,
) -> Tensor:  # fmt: skip
    """``layer_norm(sum_i tables[i][ids[i]])``, or without ``eps`` the sum itself.

    Everything in float32: the tables are added in their order, mean and variance in two passes over the row (``csrc/embed/embed.h``
    has the order), the result rounded once. The bits are the same for every number of threads and every instruction set.

    Args:
        tables: one to three, float32, bfloat16, float16 or int8, [rows, d].
        ids: for each table int64 or int32 [batch, length] of any strides, broadcast against each other. None, but for the first:
            its ids are counted, as RoBERTa's positions are: those of the tokens (the first ids) other than ``padding``, from
            padding + 1 on in each sequence; padding where there is none.
        scales: of each table, float32 [rows] for one of int8, by which its rows are multiplied; None for others.
        padding: the token, and the position, of what is none.
        weight, shift: of the norm, [d] in any of these dtypes; None: ones, zeros.
        eps: of the norm; None: there is none.
    Returns:
        [batch, length, d], dense, of the dtype of the first table of floats; float32 where all are int8.
    Raises:
        IndexError: an id chooses no row (it is named). TypeError, ValueError: dtypes and shapes do not fit.
    """
    y: Tensor = _op(list(tables), list(scales) or [None] * len(tables), list(ids), padding, weight, shift, eps)
    return y


def embed_unseen(
    tables: list[Tensor], scales: list[Tensor | None], ids: list[Tensor | None], padding: int, weight: Tensor | None,
    shift: Tensor | None, eps: float,
) -> Tensor | None:  # fmt: skip
    """As :func:`embed` without torch's dispatcher, where nobody looks, no gradient is wanted and the kernels read such tensors;
    else None. The ids of the other tables are broadcast to those of the first."""
    tokens = ids[0]
    assert tokens is not None
    if not tokens.is_cpu or not nobody_looks(tokens):
        return None
    y = torch.empty((*tokens.shape, tables[0].shape[1]), dtype=dtype_of(tables), device="cpu")
    return y if cpu.embed.embed_into(tables, scales, ids, padding, weight, shift, eps, y) else None
