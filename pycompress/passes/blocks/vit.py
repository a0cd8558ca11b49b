"""ViT: pre-norm."""

from __future__ import annotations

from torch import nn

from pycompress.nn.block import Description
from pycompress.passes.blocks.reading import Family, Numbers, Places, arguments, calls, described, transformers_classes

_PLACES = Places(
    query="attention.q_proj", key="attention.k_proj", value="attention.v_proj", output="attention.o_proj", up="mlp.fc1",
    down="mlp.fc2", attention_norm="layernorm_before", mlp_norm="layernorm_after", activation="mlp.activation_fn",
)  # fmt: skip
_NUMBERS = Numbers(("attention", "num_attention_heads"), ("attention", "head_dim"), ("attention", "scaling"))


def read(module: nn.Module) -> Description:
    return described("vit", module, _PLACES, _NUMBERS, arguments, pre_norm=True, attention="attention")


VIT = Family("vit", transformers_classes(vit="ViTLayer", deit="DeiTLayer"), read, calls)
