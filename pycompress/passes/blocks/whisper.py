"""Whisper's encoder: pre-norm, and a key without a bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.nn.block import Description, Operands
from pycompress.passes.blocks.reading import Call, Family, Numbers, Places, added, described, transformers_classes
from pycompress.passes.blocks.reading import arguments as any_arguments

_PLACES = Places(
    query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj", output="self_attn.out_proj", up="fc1", down="fc2",
    attention_norm="self_attn_layer_norm", mlp_norm="final_layer_norm", activation="activation_fn",
)  # fmt: skip
_NUMBERS = Numbers(("self_attn", "num_heads"), ("self_attn", "head_dim"), ("self_attn", "scaling"))


def read(module: nn.Module) -> Description:
    return described("whisper", module, _PLACES, _NUMBERS, arguments, pre_norm=True, attention="self_attn")


def arguments(
    module: nn.Module, description: Description, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Operands | None:  # fmt: skip
    """None in float16, where the original clamps what overflows."""
    found = any_arguments(module, description, args, kwargs)
    return None if found is None or found[0].dtype is torch.float16 else found


def calls(_module: nn.Module, _description: Description, x: Tensor, padding: Tensor, _bias: Tensor) -> list[Call]:
    return [((x, None), {}), ((x, added(padding)), {})]


WHISPER = Family("whisper", transformers_classes(whisper="WhisperEncoderLayer"), read, calls)
