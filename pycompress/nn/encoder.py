"""A text encoder of transformers (BERT and its relatives) whose parts run as one op each, called without what stands between them.

What transformers does for every call besides (decorators that look up the config and gather outputs, a mask of all pairs of tokens)
costs as much as three blocks of a small model on one sentence. Where a call asks for no more than hidden states of tokens under a
mask, embeddings, blocks and pooler are called one behind the other. Anything else goes the original way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from pycompress.nn.assigned import assigned, is_watched, watched_everywhere
from pycompress.nn.block import block_of, called
from pycompress.nn.embeddings import Embeddings

_TOKENS = ("input_ids", "attention_mask", "token_type_ids")
_ASKS = ("_output_attentions", "output_attentions", "output_hidden_states", "is_decoder", "add_cross_attention")


@dataclass(frozen=True)
class Encoder:
    """How a module computes that was read as such an encoder.

    Attributes:
        names: of the arguments of the original forward, in their order.
        result: the class of what it returns, with ``last_hidden_state`` and, where there is a pooler, ``pooler_output``.
    """

    names: tuple[str, ...]
    result: type[Any]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any] | None:
        """(The result,); None where the original forward has to run."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tokens, mask, types = map(given.get, _TOKENS)
        if is_compiling() or type(tokens) is not Tensor or tokens.dim() != 2 or not tokens.is_cpu or not tokens.numel():
            return None
        if any(value is not None for name, value in given.items() if name not in _TOKENS) or not _is_plain(module):
            return None
        mask, known = (None, True) if mask is None else _of_keys(mask, tokens)
        if not known:
            return None
        x = module._modules["embeddings"](input_ids=tokens, token_type_ids=types)  # type: ignore[misc]
        for layer in module._modules["encoder"]._modules["layer"]._modules.values():  # type: ignore[union-attr]
            if layer is None or block_of(layer) is None or is_watched(layer):
                return None
            found = called(layer, (x, mask), {})
            if found is None:
                return None
            x = found[0]
        pooler = module._modules.get("pooler")
        pooled = {} if pooler is None else {"pooler_output": pooler(x)}
        return (self.result(last_hidden_state=x, **pooled),)


def _of_keys(mask: Any, tokens: Tensor) -> tuple[Tensor | None, bool]:
    """What blocks take for a mask of tokens, and whether that is known: of a sequence of padding alone it depends on the function
    that computes attention."""
    if type(mask) is not Tensor or mask.shape != tokens.shape or not mask.is_cpu:
        return None, False
    seen = mask != 0
    if bool(seen.all()):
        return None, True
    return seen[:, None, None], bool(seen.any(1).all())


# Configs that were seen to ask for nothing: a copy of what they held then.
_PLAIN: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def _is_plain(module: nn.Module) -> bool:
    """Whether its parts stand as they were read, nobody looks at what it holds them in, and its config asks for nothing but hidden
    states, in an object."""
    children = module._modules
    embeddings, encoder = children.get("embeddings"), children.get("encoder")
    if module.training or embeddings is None or encoder is None or not isinstance(assigned(embeddings), Embeddings):
        return False
    if watched_everywhere() or is_watched(encoder) or "forward" in vars(encoder):
        return False
    if torch.is_grad_enabled() and any(one.requires_grad for one in embeddings.parameters()):
        return False
    config: Any = module.config
    if _PLAIN.get(module) == vars(config):
        return True
    if any(getattr(config, name, False) for name in _ASKS) or not getattr(config, "return_dict", True):
        return False
    _PLAIN[module] = dict(vars(config))
    return True
