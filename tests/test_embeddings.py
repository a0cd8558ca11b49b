"""Embeddings of text encoders that run as one op; wherever that is not what is asked for, the original forward runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.nn import embeddings as embeddings_module
from pycompress.nn.assigned import assigned, original_class
from pycompress.nn.int8_embedding import Int8Embedding
from pycompress.passes import embeddings

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 60}
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {"max_position_embeddings": 40},
    "XLMRoberta": {"max_position_embeddings": 40},
    "Camembert": {"max_position_embeddings": 40},
    "Electra": {"embedding_size": 24},
    "MPNet": {"max_position_embeddings": 40},
    "DistilBert": {"dim": 32, "n_heads": 2, "hidden_dim": 48},
    "Albert": {"embedding_size": 24},
}
EACH = pytest.mark.parametrize("name", FAMILIES)
Calls = Callable[[], int]


def made(name: str = "Bert") -> tuple[Any, Any]:
    """A model whose embeddings run as one op, and its original."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**SIZES, **FAMILIES[name])
    original = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for parameter in original.embeddings.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = copy.deepcopy(original)
    embeddings.install(model)
    return model, original


def tokens(model: Any, batch: int, length: int) -> Tensor:
    """With padding behind, and one in between."""
    ids = torch.randint(3, 60, (batch, length))
    padding = model.config.pad_token_id
    if batch and length > 3:
        ids[0, -2:] = padding
        ids[-1, 1] = padding
    return ids


@pytest.fixture
def natively(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """How often the op ran since it was asked last."""
    count, run = [0], embeddings_module.embed_unseen

    def counted(*operands: Any) -> Any:
        found = run(*operands)
        count[0] += found is not None
        return found

    monkeypatch.setattr(embeddings_module, "embed_unseen", counted)

    def calls() -> int:
        found, count[0] = count[0], 0
        return found

    return calls


@EACH
@pytest.mark.parametrize("size", [(1, 1), (1, 16), (3, 7), (0, 4)])
def test_they_give_what_the_original_gives(name: str, size: tuple[int, int], natively: Calls) -> None:
    model, original = made(name)
    natively()
    ids, call = tokens(model, *size), {}
    if "token_type_embeddings" in model.embeddings._modules:
        call["token_type_ids"] = torch.randint(0, model.config.type_vocab_size, size)
    for arguments in ({}, call, {"position_ids": torch.randperm(30)[None, : size[1]]}):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                natively()
                y = model.embeddings(input_ids=ids, **arguments)
                assert natively() == 1
                torch.testing.assert_close(y, original.embeddings(input_ids=ids, **arguments), rtol=0, atol=2e-5)
    if size[0]:
        with torch.no_grad():
            mask = ids.ne(model.config.pad_token_id).long()
            found, expected = (one(input_ids=ids, attention_mask=mask).last_hidden_state for one in (model, original))
            assert natively() == 1
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, natively: Calls) -> None:
    """Nearer to the float32 model than the original, which rounds each sum."""
    model, original = made()
    natively()
    exact, ids = copy.deepcopy(original), tokens(model, 3, 9)
    model, original = model.to(dtype), original.to(dtype)
    exact.load_state_dict({name: one.float() for name, one in original.state_dict().items()})
    with torch.no_grad():
        y, theirs, wide = (one.embeddings(input_ids=ids) for one in (model, original, exact))
    assert natively() == 1
    assert y.dtype == dtype
    assert (y.float() - wide).abs().amax() <= 1.01 * torch.finfo(dtype).eps * wide.abs().amax()
    assert (y.float() - wide).norm() <= (theirs.float() - wide).norm()


def test_what_is_seen_of_the_module_is_as_before() -> None:
    model, original = made()
    embedded = model.embeddings
    assert original_class(embedded) is type(original.embeddings)
    assert type(embedded).__qualname__ == "BertEmbeddings"
    assert isinstance(embedded, type(original.embeddings))
    assert repr(embedded) == repr(original.embeddings)
    assert [*model.state_dict()] == [*original.state_dict()]
    assert vars(embedded).keys() == vars(original.embeddings).keys()
    model.load_state_dict(original.state_dict())
    assert model.get_input_embeddings() is embedded.word_embeddings


def hooked(model: Any) -> None:
    model.embeddings.word_embeddings.register_forward_hook(lambda *_: None)


def trained(model: Any) -> None:
    model.train()


def altered(model: Any) -> None:
    model.embeddings.LayerNorm.forward = lambda x: x


def another_norm(model: Any) -> None:
    model.embeddings.LayerNorm = nn.Identity()


def limited(model: Any) -> None:
    model.embeddings.word_embeddings.max_norm = 0.5


def parametrized(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(model.embeddings.word_embeddings, "weight", nn.Tanh())


@pytest.mark.parametrize(
    "change", [hooked, trained, altered, another_norm, limited, parametrized], ids=lambda one: one.__name__
)
def test_where_something_else_is_wanted_the_original_runs(change: Callable[[Any], None], natively: Calls) -> None:
    model, original = made()
    natively()
    ids = tokens(model, 2, 7)
    change(model)
    change(original)
    with torch.no_grad():
        torch.manual_seed(0)
        y = model.embeddings(input_ids=ids)
        torch.manual_seed(0)
        assert torch.equal(y, original.embeddings(input_ids=ids))
    assert natively() == 0


def test_calls_that_say_more_and_gradients(natively: Calls) -> None:
    model, original = made()
    natively()
    ids = tokens(model, 2, 7)
    floats = torch.randn(2, 7, 32)
    with torch.no_grad():
        for call in ({"inputs_embeds": floats}, {"input_ids": ids, "cache_length": 3}):
            assert torch.equal(model.embeddings(**call), original.embeddings(**call))
    for one in (model, original):
        one.embeddings(input_ids=ids).square().sum().backward()
    for mine, theirs in zip(model.embeddings.parameters(), original.embeddings.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.embeddings(input_ids=ids), original.embeddings(input_ids=ids))
    assert natively() == 0
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    with torch.no_grad():
        model.embeddings(input_ids=ids)
    handle.remove()
    assert nn.LayerNorm in seen
    model.requires_grad_(False)
    model.embeddings(ids)
    assert natively() == 1, "where nothing wants a gradient"


def test_a_token_without_a_row() -> None:
    model, _ = made()
    with (
        torch.no_grad(),
        pytest.raises(IndexError, match="index out of range: 60 among the ids of table 0, expected 0 to 59"),
    ):
        model(input_ids=torch.tensor([[3, 60]]))


def test_types_are_those_of_the_buffer(natively: Calls) -> None:
    """Zeros, unless somebody has changed it."""
    model, original = made()
    natively()
    ids = tokens(model, 2, 7)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(model.embeddings(ids), original.embeddings(ids), rtol=0, atol=2e-5)
        for one in (model, original):
            one.embeddings.token_type_ids[0, 2] = 1
    assert natively() == 2


def test_another_class_and_what_differs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _, original = made()

    class Mine(type(original.embeddings)):  # type: ignore[misc]
        pass

    original.embeddings.__class__ = Mine
    embeddings.install(original)
    assert type(original.embeddings) is Mine
    _, other = made()
    kind, forward = type(other.embeddings), type(other.embeddings).forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs) + 0.01)
    embeddings.install(other)
    assert type(other.embeddings) is kind


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"]
)
def test_copies_run_as_one_op(through: Callable[[Any], Any], natively: Calls) -> None:
    model, _ = made("Roberta")
    natively()
    ids = tokens(model, 2, 7)
    with torch.no_grad():
        assert torch.equal(through(model).embeddings(ids), model.embeddings(ids))
    assert natively() == 2


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_compiled_and_exported(name: str) -> None:
    model, _ = made(name)
    ids = tokens(model, 2, 7)
    with torch.no_grad():
        expected = model.embeddings(ids)
        graphs: list[str] = []

        def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            graphs.append(graph.code)
            return graph

        compiled = torch.compile(model.embeddings, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(ids), expected)
        assert "pycompress.embed" in graphs[0]
        sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=30)}
        program = torch.export.export(model.embeddings, (ids,), dynamic_shapes={"input_ids": sizes})
        assert "pycompress.embed" in str(program.graph)
        other = tokens(model, 3, 9)
        torch.testing.assert_close(program.module()(other), model.embeddings(other))


def test_compress_save_and_load(tmp_path: Path, natively: Calls) -> None:
    _, original = made()
    natively()
    result, plain = pc.compress(original, pc.Int8()), pc.compress(original, pc.Int8(), blocks=False)
    assert assigned(original.embeddings) is None
    assert assigned(result.embeddings) is not None
    assert assigned(plain.embeddings) is None
    dense, result.pooler.dense = result.pooler.dense, nn.Linear(32, 32)
    assert assigned(pc.compress(result, pc.Int8()).embeddings) == assigned(result.embeddings)
    result.pooler.dense = dense
    ids = tokens(original, 2, 7)
    with torch.no_grad():
        natively()
        found = result(input_ids=ids).last_hidden_state
        assert natively() == 1
        torch.testing.assert_close(found, plain(input_ids=ids).last_hidden_state, rtol=0, atol=0.1)
    pc.save(result, tmp_path / "model.safetensors")
    loaded = pc.load(made()[1], tmp_path / "model.safetensors")
    assert assigned(loaded.embeddings) == assigned(result.embeddings)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).last_hidden_state, found, rtol=0, atol=0.1)
    assert assigned(pc.load(made()[1], tmp_path / "model.safetensors", blocks=False).embeddings) is None


def test_tables_of_int8(tmp_path: Path, natively: Calls) -> None:
    """A plan may name some of them, or all; they are read in the same call."""
    _, original = made("Roberta")
    ids = tokens(original, 3, 7)
    for plan in ({"*word_embeddings": pc.Int8(embeddings=True)}, {"*": pc.Int8(embeddings=True)}):
        result, plain = pc.compress(original, plan), pc.compress(original, plan, blocks=False)
        assert type(result.embeddings.word_embeddings) is Int8Embedding
        natively()
        with torch.inference_mode():
            y, expected, dense = (one.embeddings(input_ids=ids) for one in (result, plain, original))
            assert natively() == 1
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-5)
        assert torch.nn.functional.cosine_similarity(y, dense, dim=-1).min() > 0.999
        pc.save(result, tmp_path / "model.safetensors")
        loaded = pc.load(made("Roberta")[1], tmp_path / "model.safetensors")
        with torch.inference_mode():
            assert torch.equal(loaded.embeddings(input_ids=ids), y)
    assert type(pc.compress(original, pc.Int8()).embeddings.word_embeddings) is nn.Embedding
