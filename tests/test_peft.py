"""Adapters (PEFT) around compressed layers: they work and train; what would merge them into a compressed weight is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import pycompress as pc
from pycompress.methods import Method
from pycompress.nn import CompressedLayer

peft = pytest.importorskip("peft", reason="the package peft is not installed")

METHODS: dict[str, Method] = {
    "int8": pc.Int8(),
    "int4": pc.Int4(),
    "sparse": pc.Sparse(0.9),
    "low rank + int8": pc.LowRank(4, residual=pc.Int8(), rank_guard=False),
}
BASE = ("up", "down")


def adapted(dora: bool) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential()
    for name, module in (("up", nn.Linear(64, 128)), ("act", nn.GELU()), ("down", nn.Linear(128, 64))):
        net.add_module(name, module)
    config = peft.LoraConfig(target_modules=list(BASE), r=4, init_lora_weights=False, use_dora=dora)
    model: nn.Module = peft.get_peft_model(net, config).eval()
    return model


def close(a: Tensor, b: Tensor) -> bool:
    return bool((cosine_similarity(a, b, dim=-1) > 0.98).all())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_adapters_around_compressed_layers(method: Method, dora: bool) -> None:
    model: Any = adapted(dora)
    made: Any = pc.compress(model, {"*.base_layer": method, "*": None})
    layers = [made.get_submodule(f"base_model.model.{name}.base_layer") for name in BASE]
    assert all(isinstance(layer, CompressedLayer) for layer in layers)
    x = torch.randn(8, 64)
    assert close(made(x), model(x)) and not close(model(x), model.get_base_model()(x) * 0 + 1)
    with made.disable_adapter(), model.disable_adapter():
        without, plain = made(x), model(x)
    assert close(without, plain) and not torch.equal(without, made(x))

    before = made(x)
    merges: list[Callable[[Any], Any]] = [
        lambda m: m.merge_and_unload(),
        lambda m: m.merge_and_unload(safe_merge=True),
        lambda m: m.merge_adapter(),
    ]
    for merge in merges:
        other = copy.deepcopy(made)
        with pytest.raises(
            RuntimeError, match=f"this is the dense weight of a {type(layers[0]).__name__}, .*would be lost"
        ):
            merge(other)
        assert torch.equal(other(x), before), "and it goes on with its adapters"

    made.train()
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("lora_" in name)
    made(x).square().sum().backward()
    adapters = [p for name, p in made.named_parameters() if "lora_" in name]
    assert adapters and all(p.grad is not None for p in adapters)
    fresh: Any = pc.compress(adapted(dora), {"*.base_layer": method, "*": None})
    peft.set_peft_model_state_dict(fresh, peft.get_peft_model_state_dict(made))
    assert torch.equal(fresh(x), before)
    bare = copy.deepcopy(made).unload()
    assert isinstance(bare.up, CompressedLayer) and torch.equal(bare(x), without)


def test_adapters_may_be_compressed_themselves() -> None:
    model, x = adapted(False), torch.randn(8, 64)
    made: Any = pc.compress(model, pc.Int8())
    assert close(made(x), model(x))
    with pytest.raises(RuntimeError, match="would be lost"):
        made.merge_and_unload()


def test_what_stays_dense_is_merged() -> None:
    model: Any = adapted(False)
    x = torch.randn(8, 64)
    made: Any = pc.compress(model, {"*.lora_A.*": pc.Int8(), "*.lora_B.*": pc.Int8(), "*": None})
    expected = made(x)
    torch.testing.assert_close(made.merge_and_unload()(x), expected, rtol=0.02, atol=0.02)
