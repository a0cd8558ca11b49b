"""``nn.TransformerEncoderLayer``: pre-norm or post-norm; query, key and value lie in one dense matrix, and stay there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycompress.nn.block import Description, Operands, Product, Unfit
from pycompress.ops.block_form import BlockForm
from pycompress.passes.blocks.reading import (
    Call,
    Family,
    activation_of,
    check_norm,
    names_of_arguments,
    no_activation,
    nothing_besides,
)

_FUNCTIONS = {
    functional.relu: "relu", functional.gelu: "gelu", functional.silu: "silu", functional.relu6: "relu6",
    functional.hardswish: "hardswish",
}  # fmt: skip
_WATCHED = (
    ("", "norm_first"), ("", "activation"), ("self_attn", "batch_first"), ("self_attn", "num_heads"), ("self_attn", "head_dim"),
    ("norm1", "eps"), ("norm2", "eps"),
)  # fmt: skip


def read(module: nn.Module) -> Description:
    layer: Any = module
    try:
        attention = layer.self_attn
        if type(attention) is not nn.MultiheadAttention or attention.in_proj_weight is None:
            raise Unfit("its attention is no MultiheadAttention of one width")
        if attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn:
            raise Unfit("its attention sees keys besides those of its input")
        behind = layer.activation
        if isinstance(behind, nn.Module):
            activation = activation_of(layer.linear1, behind)
        elif behind in _FUNCTIONS:
            no_activation(module, ["linear1"])
            activation = _FUNCTIONS[behind]
        else:
            raise Unfit(f"its activation is {behind}, which no block applies")
        form = BlockForm(
            attention.num_heads, attention.head_dim, attention.head_dim**-0.5, bool(layer.norm_first), "layer_norm",
            (float(layer.norm1.eps), float(layer.norm2.eps)), activation, causal=False,
        )  # fmt: skip
        for norm in (layer.norm1, layer.norm2):
            check_norm(norm, "layer_norm")
        no_activation(module, ["self_attn.out_proj", "linear2"])
        own = ["activation"] if isinstance(behind, nn.Module) else []
        nothing_besides(module, ["self_attn", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2", *own])
    except (AttributeError, TypeError, ValueError) as error:
        raise Unfit(f"it is no TransformerEncoderLayer as it is known here: {error}") from error
    products = (
        *(Product("self_attn", third) for third in range(3)), Product("self_attn.out_proj"), Product("linear1"), None,
        Product("linear2"),
    )  # fmt: skip
    return Description(
        "encoder layer", form, products, ("norm1", "norm2"), names_of_arguments(module), arguments, watched=_WATCHED,
        turned=not attention.batch_first,
    )  # fmt: skip


def arguments(
    _module: nn.Module, description: Description, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Operands | None:  # fmt: skip
    """The mask of keys as the op's mask, that of scores as its bias. (``is_causal`` only says of the latter what it is.)"""
    given = dict(zip(description.names, args))  # noqa: B905 - as many as there are
    given.update(kwargs)
    x, scores, keys = given.pop("src", None), given.pop("src_mask", None), given.pop("src_key_padding_mask", None)
    hint = given.pop("is_causal", False)
    if given or not isinstance(x, Tensor) or x.is_nested or x.dim() != 3 or (hint and scores is None):
        return None
    if description.turned:
        x = x.transpose(0, 1)
    batch, length = x.shape[:2]
    if keys is not None:
        if not _is_mask(keys, (batch, length)):
            return None
        keys = (~keys if keys.dtype is torch.bool else keys)[:, None, None]
    if scores is not None:
        heads = description.form.heads
        if not _is_mask(scores, (length, length)) and not _is_mask(scores, (batch * heads, length, length)):
            return None
        if scores.dtype is torch.bool:
            scores = torch.zeros_like(scores, dtype=x.dtype).masked_fill(scores, -torch.inf)
        if scores.dim() == 3:
            scores = scores.view(batch, heads, length, length)
    return x, keys, scores, False


def _is_mask(mask: Any, shape: tuple[int, ...]) -> bool:
    plain = isinstance(mask, Tensor) and (mask.dtype is torch.bool or mask.is_floating_point())
    return plain and mask.shape == shape


def calls(_module: nn.Module, description: Description, x: Tensor, padding: Tensor, bias: Tensor) -> list[Call]:
    x = x.transpose(0, 1) if description.turned else x
    later = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)
    return [
        ((x,), {}), ((x,), {"src_key_padding_mask": padding}), ((x, later), {}),
        ((x, bias[0, 0]), {"src_key_padding_mask": torch.zeros_like(padding, dtype=x.dtype).masked_fill(padding, -torch.inf)}),
    ]  # fmt: skip


ENCODER_LAYER = Family(
    "encoder layer", frozenset({"torch.nn.modules.transformer.TransformerEncoderLayer"}), read, calls
)
