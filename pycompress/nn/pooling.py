"""The mean of a sentence's tokens, and its direction: sentence-transformers' ``Pooling`` and ``Normalize`` in one op each,
:func:`pycompress.ops.pool`. Any other pooling, and what wants a gradient, their original forward computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from torch import Tensor
from torch.compiler import is_compiling

from pycompress import ops
from pycompress.ops.checks import FLOATS, nobody_looks


def _features(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of a call; None where it says more."""
    if len(args) == 1 and not kwargs:
        return args[0] if type(args[0]) is dict else None
    return kwargs["features"] if not args and [*kwargs] == ["features"] and type(kwargs["features"]) is dict else None


def _is_read(x: Any) -> TypeGuard[Tensor]:
    return (
        isinstance(x, Tensor)
        and x.is_cpu
        and x.dtype in FLOATS
        and not x.requires_grad
        and (is_compiling() or nobody_looks(x))
    )


def pooled(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any] | None:
    """(The features with the mean of the tokens,); None where the original forward has to run."""
    features = _features(args, kwargs)
    if (
        features is None
        or module.pooling_mode != "mean"
        or "cu_seq_lens_q" in features
        or "token_weights_sum" in features
    ):
        return None
    if "prompt_length" in features and not module.include_prompt:
        return None
    x, mask = features.get("token_embeddings"), features.get("attention_mask")
    if not _is_read(x) or x.dim() != 3 or not isinstance(mask, Tensor) or mask.shape != x.shape[:2]:
        return None
    if mask.is_floating_point() and mask.dtype != x.dtype:  # the original rounds them
        return None
    features["sentence_embedding"] = ops.pool(x, mask)
    return (features,)


def normalized(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any] | None:
    """(The features with an embedding of length 1,); None where the original forward has to run."""
    features = _features(args, kwargs)
    x = None if features is None else features.get(module.module_input_name)
    if features is None or not _is_read(x) or x.dim() != 2:
        return None
    features[module.module_output_name] = ops.pool(x[:, None], None, True)
    return (features,)
