"""The twin of the native block, in torch's own operators, of products that are given as functions.

float32 where it runs for want of the native one; float64 where tests ask what is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Product = Callable[[Tensor], Tensor]

_UNSEEN = -1e30  # what is added to a score to hide a key

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "silu": functional.silu,
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    "relu6": functional.relu6,
    "hardswish": functional.hardswish,
}


def block(
    x: Tensor, mask: Tensor | None, bias: Tensor | None, products: Mapping[str, Product],
    norms: Sequence[tuple[Tensor | None, Tensor | None]], form: Any,
) -> Tensor:  # fmt: skip
    """What ``pycompress::block`` computes, in x's dtype.

    Args:
        x: [batch, length, d].
        mask, bias: broadcastable to [batch, heads, length, length]; a bool mask is True where a key is seen, all else is added.
        products: by their names in :data:`pycompress.ops.block.PRODUCTS`, each [..., k] -> [..., n] in the dtype of what it gets.
        norms: weight and shift of the one at the attention, and of the one at the MLP.
        form: a :class:`pycompress.ops.block.BlockForm`.
    """
    eps = form.eps

    def norm(i: int, h: Tensor) -> Tensor:
        weight, shift = (None if part is None else part.to(x.dtype) for part in norms[i])
        if form.norm == "layer_norm":
            return functional.layer_norm(h, h.shape[-1:], weight, shift, eps[i])
        return functional.rms_norm(h, h.shape[-1:], weight, eps[i])

    def attend(h: Tensor) -> Tensor:
        query, key, value = (products[name](h) for name in ("query", "key", "value"))
        return products["output"](attention(query, key, value, mask, bias, form))

    def mlp(h: Tensor) -> Tensor:
        activate = ACTIVATIONS[form.activation]
        if "gate" in products:
            return products["down"](activate(products["gate"](h)) * products["up"](h))
        return products["down"](activate(products["up"](h)))

    if not x.numel():
        return x.clone()
    if form.pre_norm:
        h = x + attend(norm(0, x))
        y = h + mlp(norm(1, h))
    else:
        h = norm(0, x + attend(x))
        y = norm(1, h + mlp(h))
    if form.skip_padding and mask is not None:
        y = y.masked_fill(padding(mask, (*x.shape[:2], form.heads))[..., None], 0.0)
    return y


def padding(mask: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """bool [batch, length], the rows that a mask hides as keys: of sequences whose mask is the same for all queries and heads, and
    either shows a key or hides it. ``sizes``: batch, length and heads."""
    batch, length, heads = sizes
    of_all = mask.expand(batch, heads, length, length)
    of_keys = of_all[:, 0, 0]
    hidden = ~of_keys if mask.dtype == torch.bool else of_keys < _UNSEEN
    either = hidden | (of_keys if mask.dtype == torch.bool else of_keys == 0)
    alike = (of_all == of_keys[:, None, None]).flatten(1).all(1) & either.all(1)
    return hidden & alike[:, None]


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, form: Any) -> Tensor:
    """softmax(scale q k^T + bias + mask) v, head by head, of [batch, length, heads * head_size]; zeros where no key is seen."""
    q, k, v = (one.unflatten(-1, (form.heads, form.head_size)).transpose(1, 2) for one in (query, key, value))
    scores = form.scale * q @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if form.causal:
        length = scores.shape[-1]
        scores = scores.masked_fill(scores.new_ones((length, length), dtype=torch.bool).triu(1), -torch.inf)
    blind = scores.amax(dim=-1, keepdim=True) == -torch.inf
    weights = torch.softmax(scores, dim=-1).masked_fill(blind, 0.0)
    attended: Tensor = weights @ v
    return attended.transpose(1, 2).flatten(2)
