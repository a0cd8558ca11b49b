"""sentence-transformers' means and norms as one op each; anything else is the original's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycompress.nn import pooling as pooling_module
from pycompress.nn.assigned import assigned, original_class
from pycompress.passes import pooling, whole

modules = pytest.importorskip(
    "sentence_transformers.sentence_transformer.modules", reason="sentence-transformers is not installed"
)
Calls = Callable[[], int]


def encoder(**options: Any) -> tuple[nn.Module, nn.Module]:
    """What comes behind a transformer, with its means as ops; and as it was."""
    original = nn.Sequential(modules.Pooling(24, **options), modules.Normalize()).eval()
    model = copy.deepcopy(original)
    pooling.install(model)
    return model, original


def features(dtype: torch.dtype = torch.float32, batch: int = 4, **more: Any) -> dict[str, Any]:
    mask = (torch.arange(7) < torch.randint(1, 8, (batch, 1))).long()
    return {"token_embeddings": torch.randn(batch, 7, 24).to(dtype), "attention_mask": mask, **more}


@pytest.fixture
def natively(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """How often the op was called since it was asked last."""
    count, run = [0], pooling_module.ops.pool

    def counted(*operands: Any) -> Tensor:
        count[0] += 1
        return run(*operands)

    monkeypatch.setattr(pooling_module.ops, "pool", counted)

    def calls() -> int:
        found, count[0] = count[0], 0
        return found

    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_they_give_what_the_originals_give(dtype: torch.dtype, batch: int, natively: Calls) -> None:
    model, original = encoder()
    given = features(dtype, batch)
    natively()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found, expected = model(dict(given)), original(dict(given))
        assert natively() == 2
        assert found.keys() == expected.keys()
        y, theirs = found["sentence_embedding"], expected["sentence_embedding"]
        assert y.dtype == dtype
        torch.testing.assert_close(y, theirs, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("mode", ["cls", "max", "weightedmean", "lasttoken", ("mean", "max")])
def test_other_poolings_are_left_alone(mode: Any, natively: Calls) -> None:
    model, original = encoder(pooling_mode=mode)
    given = features()
    natively()
    with torch.no_grad():
        assert torch.equal(model[0](dict(given))["sentence_embedding"], original[0](dict(given))["sentence_embedding"])
    assert natively() == 0


@pytest.mark.parametrize(
    "more",
    [
        {"prompt_length": 2}, {"token_weights_sum": torch.tensor([3.0, 2.0, 1.0, 2.0])}, {"attention_mask": torch.ones(4, 3)},
        {"attention_mask": torch.rand(4, 7).double()},
    ],
    ids=["prompt", "weights", "another mask", "float64"],
)  # fmt: skip
def test_what_is_said_besides_the_original_reads(more: dict[str, Any], natively: Calls) -> None:
    model, original = encoder(include_prompt=False)
    given = features() | more
    natively()
    with torch.no_grad():
        assert torch.equal(model[0](dict(given))["sentence_embedding"], original[0](dict(given))["sentence_embedding"])
    assert natively() == 0


def test_gradients_are_the_originals(natively: Calls) -> None:
    model, original = encoder()
    given, grads = features(), []
    natively()
    for one in (model, original):
        x = given["token_embeddings"].clone().requires_grad_()
        one({**given, "token_embeddings": x})["sentence_embedding"].square()[:, :3].sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
    assert natively() == 0


def test_copies_and_what_is_seen() -> None:
    model, original = encoder()
    given = features()
    assert repr(model) == repr(original)
    assert [original_class(one) for one in model] == [type(one) for one in original]
    with torch.no_grad():
        expected = model(dict(given))["sentence_embedding"]
        for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert [assigned(inner) for inner in one] == [assigned(inner) for inner in model]
            assert torch.equal(one(dict(given))["sentence_embedding"], expected)
    with whole.without(model):
        assert [type(one) for one in model] == [type(one) for one in original]
    assert None not in map(assigned, model)
    whole.remove(model)
    assert [type(one) for one in model] == [type(one) for one in original]


def test_one_that_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = modules.Pooling.forward

    def twice(self: Any, given: dict[str, Any]) -> dict[str, Any]:
        found = forward(self, given)
        return {**found, "sentence_embedding": 2 * found["sentence_embedding"]}

    monkeypatch.setattr(modules.Pooling, "forward", twice)
    model, _ = encoder()
    assert type(model[0]) is modules.Pooling


def test_compiled() -> None:
    model, _ = encoder()
    given = features()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            compiled(dict(given))["sentence_embedding"], model(dict(given))["sentence_embedding"]
        )
