"""MPNet: post-norm, with a position bias that its encoder makes once, and an attention of its own."""

from __future__ import annotations

from torch import Tensor, nn

from pycompress.nn.block import Description
from pycompress.passes.blocks.reading import (
    Call,
    Family,
    Numbers,
    Places,
    added,
    arguments,
    described,
    transformers_classes,
)

_PLACES = Places(
    query="attention.attn.q", key="attention.attn.k", value="attention.attn.v", output="attention.attn.o", up="intermediate.dense",
    down="output.dense", attention_norm="attention.LayerNorm", mlp_norm="output.LayerNorm",
    activation="intermediate.intermediate_act_fn",
)  # fmt: skip
_NUMBERS = Numbers(("attention.attn", "num_attention_heads"), ("attention.attn", "attention_head_size"))


def read(module: nn.Module) -> Description:
    return described("mpnet", module, _PLACES, _NUMBERS, arguments, pre_norm=False)


def calls(_module: nn.Module, _description: Description, x: Tensor, padding: Tensor, bias: Tensor) -> list[Call]:
    return [
        ((x,), {"attention_mask": None, "position_bias": None}),
        ((x, added(padding), bias.expand(x.shape[0], -1, -1, -1)), {"output_attentions": False}),
    ]


MPNET = Family("mpnet", transformers_classes(mpnet="MPNetLayer"), read, calls)
