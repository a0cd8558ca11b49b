"""T5's encoder: pre-norm with root mean squares, scores that are not scaled, a position bias that the first block makes for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pycompress.nn.block import Description, Operands, Unfit, child_at
from pycompress.passes.blocks.reading import Call, Family, Numbers, Places, added, described, transformers_classes
from pycompress.passes.blocks.whisper import arguments as not_in_float16

_ATTENTION, _MLP = "layer.0.SelfAttention", "layer.1.DenseReluDense"
_PLAIN = Places(
    query=f"{_ATTENTION}.q", key=f"{_ATTENTION}.k", value=f"{_ATTENTION}.v", output=f"{_ATTENTION}.o", up=f"{_MLP}.wi",
    down=f"{_MLP}.wo", attention_norm="layer.0.layer_norm", mlp_norm="layer.1.layer_norm", activation=f"{_MLP}.act",
)  # fmt: skip
_GATED = _PLAIN._replace(gate=f"{_MLP}.wi_0", up=f"{_MLP}.wi_1")
_NUMBERS = Numbers((_ATTENTION, "n_heads"), (_ATTENTION, "key_value_proj_dim"), (_ATTENTION, "scaling"))


def read(module: nn.Module) -> Description:
    if getattr(module, "is_decoder", True):
        raise Unfit("it is a decoder's")
    gated = hasattr(child_at(module, _MLP), "wi_0")
    has_bias = bool(getattr(child_at(module, _ATTENTION), "has_relative_attention_bias", False))
    return described(
        "t5", module, _GATED if gated else _PLAIN, _NUMBERS, arguments, pre_norm=True, attention=_ATTENTION, norm="rms_norm",
        eps="variance_epsilon", aside=(f"{_ATTENTION}.relative_attention_bias",) if has_bias else (),
    )  # fmt: skip


def arguments(
    module: nn.Module, description: Description, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Operands | None:  # fmt: skip
    """The bias is made here where none is given, as the original makes it."""
    found = not_in_float16(module, description, args, kwargs)
    if found is None or found[2] is not None:
        return found
    x, mask, _, causal = found
    attention: Any = child_at(module, _ATTENTION)
    if not attention.has_relative_attention_bias:
        return None
    return x, mask, attention.compute_bias(x.shape[1], x.shape[1], device=x.device), causal


def calls(module: nn.Module, _description: Description, x: Tensor, padding: Tensor, bias: Tensor) -> list[Call]:
    made: list[Call] = [((x, None, bias), {}), ((x, added(padding), bias), {})]
    if getattr(child_at(module, _ATTENTION), "has_relative_attention_bias", False):
        made.append(((x, added(padding), None), {}))
    return made


T5 = Family("t5", transformers_classes(t5="T5Block", mt5="MT5Block"), read, calls)
