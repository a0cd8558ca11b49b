"""ALBERT: post-norm; one layer stands for all that share its weights."""

from __future__ import annotations

from torch import nn

from pycompress.nn.block import Description
from pycompress.passes.blocks.reading import Family, Numbers, Places, arguments, calls, described, transformers_classes

_PLACES = Places(
    query="attention.query", key="attention.key", value="attention.value", output="attention.dense", up="ffn", down="ffn_output",
    attention_norm="attention.LayerNorm", mlp_norm="full_layer_layer_norm", activation="activation",
)  # fmt: skip
_NUMBERS = Numbers(("attention", "num_attention_heads"), ("attention", "attention_head_size"), ("attention", "scaling"))


def read(module: nn.Module) -> Description:
    return described("albert", module, _PLACES, _NUMBERS, arguments, pre_norm=False, attention="attention")


ALBERT = Family("albert", transformers_classes(albert="AlbertLayer"), read, calls)
