"""Text encoders that call their embeddings and blocks themselves: the bits of the original forward, which runs for all else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.nn.assigned import assigned, original_class
from pycompress.nn.encoder import Encoder
from pycompress.passes import whole

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 40, "pad_token_id": 1,
}  # fmt: skip
KINDS = {
    "Bert": {}, "Roberta": {}, "XLMRoberta": {}, "Camembert": {}, "Electra": {"embedding_size": 32},
}  # fmt: skip


def made(kind: str, method: Any = None) -> Any:
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **KINDS[kind])
    return pc.compress(getattr(transformers, f"{kind}Model")(config).eval(), method or pc.Int8(7))


def tokens(batch: int = 3, length: int = 9) -> Tensor:
    return torch.randint(2, 90, (batch, length), generator=torch.Generator().manual_seed(2))


def padded() -> Tensor:
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, 5:] = mask[2, :2] = 0
    return mask


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of an encoder, whether it called its parts itself."""
    calls: list[bool] = []
    own = Encoder.__call__

    def watched(self: Encoder, module: nn.Module, args: Any, kwargs: Any) -> Any:
        found = own(self, module, args, kwargs)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(Encoder, "__call__", watched)
    return calls


CALLS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "mask": {"attention_mask": padded()},
    "all seen": {"attention_mask": torch.ones(3, 9, dtype=torch.int64)},
    "bool mask": {"attention_mask": padded().bool()},
    "types": {"token_type_ids": torch.zeros(3, 9, dtype=torch.int64)},
    "none of the rest": {"inputs_embeds": None, "output_attentions": None},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_the_bits_of_the_original(kind: str, call: str, ran: list[bool]) -> None:
    model = made(kind)
    ran.clear()
    with torch.inference_mode():
        found = model(tokens(), **CALLS[call])
        expected = original_class(model).forward(model, tokens(), **CALLS[call])
    assert ran == [True]
    assert (type(found), [*found]) == (type(expected), [*expected])
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def _asks(**call: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda _model: call


def _config(name: str, value: Any) -> Callable[[Any], dict[str, Any]]:
    def change(model: Any) -> dict[str, Any]:
        setattr(model.config, name, value)
        return {}

    return change


def _hooked(path: str) -> Callable[[Any], dict[str, Any]]:
    def change(model: Any) -> dict[str, Any]:
        model.get_submodule(path).register_forward_hook(lambda _m, _a, y: y[0] * 2 if isinstance(y, tuple) else y)
        return {}

    return change


def _replaced(model: Any) -> dict[str, Any]:
    model.encoder.layer[1] = copy.deepcopy(model.encoder.layer[0])
    model.encoder.layer[1].forward = lambda x, *_args, **_kwargs: x + 1
    return {}


def _trained(model: Any) -> dict[str, Any]:
    model.encoder.layer[0].attention.self.train()
    return {}


ELSE: dict[str, Callable[[Any], dict[str, Any]]] = {
    "attentions": _asks(output_attentions=True),
    "hidden states": _asks(output_hidden_states=True),
    "a tuple": _asks(return_dict=False),
    "a tuple, said by the config": _config("return_dict", False),
    "attentions, said by the config": _config("output_hidden_states", True),
    "positions": _asks(position_ids=torch.arange(9)[None] + 2),
    "a mask of pairs": _asks(attention_mask=torch.ones(3, 1, 9, 9, dtype=torch.bool).tril()),
    "a sequence of padding alone": _asks(attention_mask=padded() * torch.tensor([[1], [0], [1]])),
    "hooks in the encoder": _hooked("encoder"),
    "hooks on a block": _hooked("encoder.layer.1"),
    "hooks in a block": _hooked("encoder.layer.1.output"),
    "another layer": _replaced,
    "a layer in training": _trained,
}


@pytest.mark.parametrize("what", ELSE)
def test_all_else_goes_the_original_way(what: str, ran: list[bool]) -> None:
    model = made("Bert")
    ran.clear()
    with torch.inference_mode():
        model(tokens())
        call = ELSE[what](model)
        torch.manual_seed(3)
        found = model(tokens(), **call)
        assert ran == [True, False]
        torch.manual_seed(3)
        expected = original_class(model).forward(model, tokens(), **call)
    for a, b in zip(_tensors(found), _tensors(expected), strict=True):
        assert torch.equal(a, b)


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    values = found.values() if hasattr(found, "values") else found
    return [tensor for value in values if value is not None for tensor in _tensors(value)]


def test_hooks_on_embeddings_and_pooler_are_called(ran: list[bool]) -> None:
    model = made("Bert")
    ran.clear()
    seen: list[str] = []
    for name in ("embeddings", "pooler"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.inference_mode():
        model(tokens())
    assert (seen, ran) == (["embeddings", "pooler"], [True])


def test_gradients_and_training_are_the_originals(ran: list[bool]) -> None:
    model = made("Bert")
    ran.clear()
    model(tokens()).last_hidden_state.sum().backward()
    assert model.embeddings.LayerNorm.weight.grad is not None
    model.train()
    with torch.inference_mode():
        model(tokens())
    assert not any(ran)


def test_copies_pickles_and_files(ran: list[bool], tmp_path: Any) -> None:
    model = made("Bert")
    ran.clear()
    with torch.inference_mode():
        y = model(tokens(), padded()).last_hidden_state
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(tokens(), padded()).last_hidden_state, y)
        assert ran == [True] * 3
        pc.save(model, tmp_path / "m.safetensors")
        dense = transformers.BertModel(model.config).eval()
        loaded = pc.load(dense, tmp_path / "m.safetensors")
        ran.clear()
        assert torch.equal(loaded(tokens(), padded()).last_hidden_state, y)
    assert ran == [True]


def test_compiled_whole() -> None:
    model = made("Bert")
    with torch.inference_mode():
        y = model(tokens(), padded()).last_hidden_state
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(tokens(), attention_mask=padded()).last_hidden_state, y)


def test_an_encoder_that_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = transformers.BertModel
    own = kind.forward

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = own(self, *args, **kwargs)
        found.last_hidden_state = found.last_hidden_state * 2
        return found

    monkeypatch.setattr(kind, "forward", other)
    assert assigned(made("Bert")) is None


def test_an_encoder_without_all_its_blocks_is_left_alone() -> None:
    model = pc.compress(
        transformers.BertModel(transformers.BertConfig(**SIZES)).eval(), {"encoder.layer.0.*": pc.Int8()}
    )
    assert assigned(model) is None
    model = made("Bert")
    whole.remove(model)
    assert assigned(model) is None
    assert type(model) is transformers.BertModel
