"""The embeddings of a text encoder (BERT's and its relatives' in transformers) that run as one op, :func:`pycompress.ops.embed`.

Each call looks at the module as it is. Where it is not what was read, or somebody wants to see what happens inside (hooks,
gradients, training), or the call says more than tokens, their types and positions, the original forward runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from pycompress import ops
from pycompress.nn.assigned import is_plain, watched_everywhere
from pycompress.nn.int8_embedding import Int8Embedding
from pycompress.ops.embed import dtype_of, embed_unseen, positions

_SAID = ("input_ids", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class Embeddings:
    """How a module computes that was read as such embeddings.

    Attributes:
        names: of the arguments of the original forward, in their order.
        counts: positions are counted from ``padding_idx``; else they are those of the buffer ``position_ids``.
    """

    names: tuple[str, ...]
    counts: bool

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor] | None:
        """(The result,); None where the original forward has to run."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tokens, types, places = map(given.get, _SAID)
        if not isinstance(tokens, Tensor) or not (type(tokens) is Tensor or is_compiling()) or tokens.dim() != 2:
            return None
        if any(_says(given.get(name)) for name in self.names if name not in _SAID):
            return None
        found = _operands(module, self.counts, tokens, types, places)
        if found is None:
            return None
        tables, scales, ids, padding, norm = found
        weight, shift = norm._parameters["weight"], norm._parameters["bias"]
        if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (*tables, weight, shift)):
            return None
        if is_compiling():
            return (ops.embed(tables, ids, scales=scales, padding=padding, weight=weight, shift=shift, eps=norm.eps),)
        y = None if watched_everywhere() else embed_unseen(tables, scales, ids, padding, weight, shift, norm.eps)
        return None if y is None else (y,)


def _says(value: Any) -> bool:
    """Whether an argument is more than a default."""
    return not (value is None or (type(value) is int and value == 0))


def _operands(
    module: nn.Module, counts: bool, tokens: Tensor, types: Tensor | None, places: Tensor | None
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None], int, nn.LayerNorm] | None:
    """Tables, their scales and ids, the padding and the norm; None where the module is not what was read."""
    children = module._modules
    norm, dropout = children.get("LayerNorm"), children.get("dropout")
    if module.training or not is_plain(norm, nn.LayerNorm) or not is_plain(dropout, nn.Dropout):
        return None
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(dropout, nn.Dropout)
    if dropout.training and dropout.p:
        return None
    padding = 0
    if places is None and counts:
        padding = module.padding_idx  # type: ignore[assignment]
    elif places is None:
        places = module._buffers["position_ids"][:, : tokens.shape[1]]  # type: ignore[index]
    names, ids = ["word_embeddings"], [tokens]
    if "token_type_embeddings" in children:
        names.append("token_type_embeddings")
        ids.append(_types_at(module, tokens, places, padding) if types is None else types)
    tables: list[Tensor] = []
    scales: list[Tensor | None] = []
    dtypes = set()
    for name in (*names, "position_embeddings"):
        found = _table(children.get(name))
        if found is None:
            return None
        tables.append(found[0])
        scales.append(found[1])
        dtypes.add(found[2])
    if len(norm.normalized_shape) != 1 or type(padding) is not int or dtypes != {dtype_of(tables)}:
        return None
    return tables, scales, [*ids, places], padding, norm


def _table(layer: nn.Module | None) -> tuple[Tensor, Tensor | None, torch.dtype] | None:
    """The rows, the scale of int8 ones, and the dtype of the layer's results."""
    if is_plain(layer, Int8Embedding):
        assert isinstance(layer, Int8Embedding)
        return *layer.rows(), layer.dtype
    if not is_plain(layer, nn.Embedding):
        return None
    assert isinstance(layer, nn.Embedding)
    weight = layer._parameters.get("weight")
    plain = type(weight) is nn.Parameter or is_compiling()
    return (weight, None, weight.dtype) if plain and weight is not None and layer.max_norm is None else None


# Buffers that were seen to be zeros: (buffer, its version then, one column of it).
_ZEROS: WeakKeyDictionary[nn.Module, tuple[Tensor, int, Tensor]] = WeakKeyDictionary()


def _types_at(module: nn.Module, tokens: Tensor, places: Tensor | None, padding: int) -> Tensor:
    """What the original takes where none are given: the buffer ``token_type_ids`` at the positions; of zeros, one that stands for
    all."""
    buffer = module._buffers.get("token_type_ids")
    if buffer is None:
        return tokens.new_zeros((1, 1))
    if not is_compiling() and not buffer.is_inference():
        seen = _ZEROS.get(module)
        if seen is None or seen[0] is not buffer or seen[1] != buffer._version:
            if bool(buffer.any()):
                seen = None
            else:
                seen = _ZEROS[module] = (buffer, buffer._version, buffer[:1, :1])
        if seen is not None:
            return seen[2]
    at = positions(tokens, padding) if places is None else places
    return torch.gather(buffer.expand(at.shape[0], -1), 1, at)


def reads(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether a module has what these embeddings are made of."""
    tables = [module._modules.get(name) for name in ("word_embeddings", "position_embeddings")]
    norm, dropout = module._modules.get("LayerNorm"), module._modules.get("dropout")
    found = all(isinstance(table, nn.Embedding | Int8Embedding) for table in tables)
    return _SAID[0] in names and found and isinstance(norm, nn.LayerNorm) and isinstance(dropout, nn.Dropout)
