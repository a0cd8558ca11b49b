"""CLIP's encoders, of text and of images: pre-norm; text is causal where there is no mask."""

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
    query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj", output="self_attn.out_proj", up="mlp.fc1",
    down="mlp.fc2", attention_norm="layer_norm1", mlp_norm="layer_norm2", activation="mlp.activation_fn",
)  # fmt: skip
_NUMBERS = Numbers(("self_attn", "num_heads"), ("self_attn", "head_dim"), ("self_attn", "scale"))


def read(module: nn.Module) -> Description:
    return described("clip", module, _PLACES, _NUMBERS, arguments, pre_norm=True, attention="self_attn")


def calls(_module: nn.Module, _description: Description, x: Tensor, padding: Tensor, _bias: Tensor) -> list[Call]:
    return [((x, None), {}), ((x, None), {"is_causal": True}), ((x, added(padding)), {"is_causal": True})]


CLIP = Family("clip", transformers_classes(clip="CLIPEncoderLayer"), read, calls)
