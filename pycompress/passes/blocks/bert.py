"""BERT and those that are built like it: post-norm, a layer norm behind each part."""

from __future__ import annotations

from torch import nn

from pycompress.nn.block import Description
from pycompress.passes.blocks.reading import (
    Family,
    Numbers,
    Places,
    arguments,
    calls,
    described,
    transformers_classes,
)

_PLACES = Places(
    query="attention.self.query", key="attention.self.key", value="attention.self.value", output="attention.output.dense",
    up="intermediate.dense", down="output.dense", attention_norm="attention.output.LayerNorm", mlp_norm="output.LayerNorm",
    activation="intermediate.intermediate_act_fn",
)  # fmt: skip
_NUMBERS = Numbers(
    ("attention.self", "num_attention_heads"), ("attention.self", "attention_head_size"), ("attention.self", "scaling")
)


def read(module: nn.Module) -> Description:
    return described("bert", module, _PLACES, _NUMBERS, arguments, pre_norm=False, attention="attention.self")


BERT = Family(
    "bert",
    transformers_classes(
        bert="BertLayer", roberta="RobertaLayer", xlm_roberta="XLMRobertaLayer", electra="ElectraLayer",
        camembert="CamembertLayer", ernie="ErnieLayer", layoutlm="LayoutLMLayer", markuplm="MarkupLMLayer",
        roc_bert="RoCBertLayer", splinter="SplinterLayer",
    ),
    read,
    calls,
)  # fmt: skip
