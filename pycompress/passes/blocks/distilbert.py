"""DistilBERT: post-norm."""

from __future__ import annotations

from torch import nn

from pycompress.nn.block import Description
from pycompress.passes.blocks.reading import Family, Numbers, Places, arguments, calls, described, transformers_classes

_PLACES = Places(
    query="attention.q_lin", key="attention.k_lin", value="attention.v_lin", output="attention.out_lin", up="ffn.lin1",
    down="ffn.lin2", attention_norm="sa_layer_norm", mlp_norm="output_layer_norm", activation="ffn.activation",
)  # fmt: skip
_NUMBERS = Numbers(("attention", "n_heads"), ("attention", "attention_head_size"), ("attention", "scaling"))


def read(module: nn.Module) -> Description:
    return described("distilbert", module, _PLACES, _NUMBERS, arguments, pre_norm=False, attention="attention")


DISTILBERT = Family("distilbert", transformers_classes(distilbert="TransformerBlock"), read, calls)
