"""transformers' models that read their layers' weights, keep them the other way round, or are called in ways of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.methods.method import Method
from pycompress.model import compressed_layers

pytest.importorskip("transformers")
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))  # type: ignore[no-any-return]


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=8))  # type: ignore[no-any-return]


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=32))  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {"T5": t5, "Mamba": mamba, "GPT-2": gpt2}
METHODS: list[Method] = [pc.Int8(), pc.Int8(16), pc.Int4(), pc.Sparse(1.0), pc.LowRank(energy=0.9, rank_guard=False)]
EACH_MODEL = pytest.mark.parametrize("name", MODELS)


def build(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    return model


def inputs(name: str) -> dict[str, Tensor]:
    tokens = torch.randint(1, 96, (2, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "decoder_input_ids": tokens[:, :4]} if name == "T5" else {"input_ids": tokens}


def logits(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        return model(**inputs(name)).logits  # type: ignore[no-any-return]


def decompressed(name: str, model: nn.Module) -> Any:
    """The dense model with the weights that a compressed one computes with."""
    dense = build(name)
    for at, layer in compressed_layers(model).items():
        with torch.no_grad():
            dense.get_submodule(at).weight.copy_(layer.weight + 0)
    return dense


@EACH_MODEL
@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("inplace", [False, True])
def test_close_to_the_dense_model_with_its_weights(name: str, method: Method, inplace: bool) -> None:
    model = build(name)
    compressed = pc.compress(model, {"*head*": None, "*": method} if name != "GPT-2" else method, inplace=inplace)
    assert len(compressed_layers(compressed)) >= 4
    y, expected = logits(compressed, name), logits(decompressed(name, compressed), name)
    # Quantized activations move it, the weights do not: they are the same.
    assert (y - expected).norm() <= 0.03 * expected.norm()
    if not inplace:
        assert torch.equal(logits(model, name), logits(build(name), name))


@EACH_MODEL
@pytest.mark.parametrize("meta", [False, True])
def test_a_file_gives_the_same_bits(name: str, meta: bool, tmp_path: Path) -> None:
    compressed = pc.compress(build(name), pc.Int8())
    pc.save(compressed, tmp_path / "m.safetensors")
    if meta:
        with torch.device("meta"):
            fresh = MODELS[name]().eval()
    else:
        fresh = build(name, seed=1)
    loaded = pc.load(fresh, tmp_path / "m.safetensors")
    assert torch.equal(logits(loaded, name), logits(compressed, name))


@EACH_MODEL
def test_a_dense_model_refuses_the_compressed_state(name: str, tmp_path: Path) -> None:
    compressed = pc.compress(build(name), pc.Int8())
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="size mismatch"):
            build(name).load_state_dict(compressed.state_dict(), strict=strict)
    compressed.save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, ValueError)):
        type(compressed).from_pretrained(tmp_path)


def test_bert_is_refused_likewise(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=96)
    pc.compress(BertModel(config), pc.Int8()).save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, ValueError)):
        BertModel.from_pretrained(tmp_path)


@EACH_MODEL
def test_generation_goes_on(name: str) -> None:
    compressed = pc.compress(build(name), pc.Sparse(1.0))
    prompt, length = inputs(name)["input_ids"], {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(compressed.generate(prompt, **length), build(name).generate(prompt, **length))


@EACH_MODEL
def test_a_forward_of_its_own_is_kept(name: str) -> None:
    model = build(name)
    at, layer = next(
        (at, m) for at, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and "head" not in at
    )
    plain = layer.forward
    layer.forward = lambda *args: 0.25 * plain(*args)
    expected = logits(model, name)
    compressed = pc.compress(model, pc.Sparse(1.0))
    assert at not in compressed_layers(compressed)
    assert at in [record.name for record in pc.summary(compressed).layers if "forward" in record.reason]
    torch.testing.assert_close(logits(compressed, name), expected, rtol=1e-3, atol=1e-4)


class Walks(nn.Module):
    """Calls a transformers model's blocks from a plain list."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = build(name)
        self.layers = [m for m in self.model.modules() if type(m).__name__ in ("Linear", "Conv1D")][:2]

    def forward(self, **inputs: Tensor) -> Any:
        found = self.model(**inputs)
        for layer in self.layers:
            k = layer.nx if hasattr(layer, "nx") else layer.in_features
            found.logits = found.logits + layer(found.logits[..., :k].contiguous()).sum(dim=-1, keepdim=True)
        return found


@EACH_MODEL
@pytest.mark.parametrize("inplace", [False, True])
def test_a_plain_list_of_its_layers(name: str, inplace: bool, tmp_path: Path) -> None:
    expected = logits(Walks(name).eval(), name)
    compressed = pc.compress(Walks(name).eval(), pc.Sparse(1.0), inplace=inplace)
    assert set(compressed.layers) <= set(compressed_layers(compressed).values())
    torch.testing.assert_close(logits(compressed, name), expected, rtol=1e-3, atol=1e-4)
    pc.save(compressed, tmp_path / "m.safetensors")
    loaded = pc.load(Walks(name).eval(), tmp_path / "m.safetensors")
    assert torch.equal(logits(loaded, name), logits(compressed, name))
