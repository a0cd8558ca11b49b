"""Each family of blocks: models with blocks compute what they compute without, and whatever asks for more gets the original."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest
import torch
from block_models import CASES, Inputs, blocks, build, pair
from torch import Tensor, nn

import pycompress as pc
from pycompress.nn import Int8Linear
from pycompress.nn import block as nn_block
from pycompress.nn.assigned import original_class
from pycompress.nn.block import block_of

EACH_FAMILY = pytest.mark.parametrize("name", CASES)
METHODS = [pc.Int8(7), pc.Int8(8)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The x of each block that ran as one op."""
    seen: list[Tensor] = []

    def watched(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *operands: Any) -> Tensor:
            seen.append(x)
            return run(x, *operands)

        return call

    monkeypatch.setattr(nn_block, "block_directly", watched(nn_block.block_directly))
    monkeypatch.setattr(nn_block.ops, "block", watched(nn_block.ops.block))
    return seen


def run(model: Any, inputs: Inputs, **more: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **more)


def assert_close(y: Tensor, expected: Tensor, bound: float = 2e-3) -> None:
    """Floats that differ in the last bit are rounded to other integers here and there: see ``passes/blocks/trial.py``."""
    assert y.shape == expected.shape and y.dtype == expected.dtype
    error = (y.double() - expected.double()).norm()
    assert error <= bound * expected.double().norm()


def both_inputs(name: str, batch: int, length: int) -> list[Inputs]:
    case = CASES[name]
    return [make(batch, length) for make in (case.inputs, case.masked) if make is not None]


@EACH_FAMILY
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_outputs_are_those_without_blocks(name: str, method: Any, calls: list[Tensor]) -> None:
    without, model = pair(name, method)
    calls.clear()
    count = len(blocks(model))
    assert count == (1 if name == "ALBERT" else 2) and {one.description.family for one in blocks(model).values()} == {
        CASES[name].family
    }
    assert not blocks(without)
    for batch, length in ((2, 7), (3, 16), (1, 1), (5, 3)):
        for inputs in both_inputs(name, batch, length):
            calls.clear()
            assert_close(run(model, inputs)[0], run(without, inputs)[0])
            assert len(calls) == 2, "it ran layer by layer"


@EACH_FAMILY
def test_a_mixed_plan(name: str, calls: list[Tensor]) -> None:
    layers = [at for at, one in build(name).named_modules() if type(one) is nn.Linear]
    inside = [at for at in layers if "layer" in at or "block" in at]
    kinds = [pc.Int4(), pc.Sparse(0.5), pc.LowRank(8, rank_guard=False), None, pc.Int8()]
    plan = {at: kinds[i % len(kinds)] for i, at in enumerate(inside)}
    without, model = pair(name, {**plan, "*": None})
    calls.clear()
    assert blocks(model)
    for inputs in both_inputs(name, 2, 7):
        calls.clear()
        assert_close(run(model, inputs)[0], run(without, inputs)[0])
        assert calls


@EACH_FAMILY
def test_no_sequences_at_all(name: str) -> None:
    """Of transformers' models, the originals cannot view what is empty."""
    without, model = pair(name, pc.Int8())
    block = model.get_submodule(next(iter(blocks(model))))
    shape = (7, 0, 32) if block_of(block).description.turned else (0, 7, 32)
    of_x = "src" if name.startswith("encoder layer") else "hidden_states"
    found = run(block, {of_x: torch.zeros(shape), **NO_MASK.get(name, {})})
    y = found if isinstance(found, Tensor) else found[0]
    assert y.shape == shape and y.dtype == torch.float32
    if name.startswith("encoder layer"):
        inputs = CASES[name].inputs(0, 7)
        assert torch.equal(run(model, inputs)[0], run(without, inputs)[0])


NO_MASK: dict[str, Inputs] = {name: {"attention_mask": None} for name in ("CLIP vision", "CLIP text", "Whisper")}


@EACH_FAMILY
def test_bfloat16(name: str, calls: list[Tensor]) -> None:
    without, model = (one.to(torch.bfloat16) for one in pair(name, pc.Int8()))
    calls.clear()
    exact, _ = pair(name, pc.Int8())
    for inputs in both_inputs(name, 2, 7):
        low = {
            key: one.to(torch.bfloat16) if isinstance(one, Tensor) and one.is_floating_point() else one
            for key, one in inputs.items()
        }
        calls.clear()
        y, expected, wanted = run(model, low)[0], run(without, low)[0], run(exact, inputs)[0]
        assert y.dtype == torch.bfloat16
        if not name.startswith("encoder layer"):  # whose dense weights are bfloat16 now
            assert len(calls) == 2
        assert (y.double() - wanted).norm() <= 1.5 * (expected.double() - wanted).norm() + 2**-7 * wanted.norm()


@EACH_FAMILY
def test_whoever_wants_gradients_gets_the_original(name: str, calls: list[Tensor]) -> None:
    without, model = pair(name, pc.Int8())
    calls.clear()
    for inputs in both_inputs(name, 2, 7):
        y, expected = model(**inputs)[0], without(**inputs)[0]
        assert torch.equal(y, expected) and y.requires_grad
        y.square().sum().backward()
        expected.square().sum().backward()
    for one, other in zip(model.parameters(), without.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)
    assert not calls


@EACH_FAMILY
def test_training_is_the_originals(name: str, calls: list[Tensor]) -> None:
    without, model = (one.train() for one in pair(name, pc.Int8()))
    calls.clear()
    inputs = CASES[name].inputs(2, 7)
    torch.manual_seed(1)
    expected = run(without, inputs)[0]
    torch.manual_seed(1)
    assert torch.equal(run(model, inputs)[0], expected)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()  # as for Monte Carlo dropout
    if any(isinstance(inner, nn.Dropout) for at in blocks(model) for inner in model.get_submodule(at).modules()):
        run(model, inputs)
        assert not calls


@EACH_FAMILY
def test_hooks_inside_are_called(name: str, calls: list[Tensor]) -> None:
    without, model = pair(name, pc.Int8())
    calls.clear()
    inputs = CASES[name].inputs(2, 7)
    seen = []
    at = next(iter(blocks(model)))
    inner = next(inner for inner in model.get_submodule(at).modules() if isinstance(inner, Int8Linear))
    with hooked(inner, lambda *_: seen.append(1)):
        y = run(model, inputs)[0]
        assert seen and len(calls) == (0 if name == "ALBERT" else 1)
    calls.clear()
    with hooked(model.get_submodule(at), lambda *_: seen.append(2)):  # those of the block itself are as ever
        run(model, inputs)
        assert 2 in seen and len(calls) == 2
    assert_close(y, run(without, inputs)[0])


@contextmanager
def hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


TRANSFORMERS = pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("encoder layer")])


@TRANSFORMERS
def test_attentions_are_the_originals(name: str, calls: list[Tensor]) -> None:
    without, model = pair(name, pc.Int8())
    calls.clear()
    inputs = both_inputs(name, 2, 7)[-1]
    for one in (without, model):
        one.set_attn_implementation("eager")
    found, expected = (run(one, inputs, output_attentions=True) for one in (model, without))
    assert not calls
    assert len(found.attentions) == len(expected.attentions) == 2
    assert all(map(torch.equal, found.attentions, expected.attentions)) and torch.equal(found[0], expected[0])
    run(model, inputs)
    assert len(calls) == 2, "what transformers left there to gather attentions stands in the way"


@TRANSFORMERS
def test_hidden_states(name: str, calls: list[Tensor]) -> None:
    without, model = pair(name, pc.Int8())
    calls.clear()
    for inputs in both_inputs(name, 2, 7):
        calls.clear()
        found, expected = (run(one, inputs, output_hidden_states=True) for one in (model, without))
        assert len(calls) == 2
        assert len(found.hidden_states) == len(expected.hidden_states) == 3
        for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert_close(one, other)


@TRANSFORMERS
def test_eager_attention(name: str, calls: list[Tensor]) -> None:
    without, model = pair(name, pc.Int8())
    calls.clear()
    for one in (without, model):
        one.set_attn_implementation("eager")
    for inputs in both_inputs(name, 2, 7):
        calls.clear()
        assert_close(run(model, inputs)[0], run(without, inputs)[0])
        assert len(calls) == 2


@EACH_FAMILY
def test_a_class_that_computes_something_else_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new version of another library may."""
    model = build(name)
    compressed = pc.compress(model, pc.Int8())
    kind = original_class(compressed.get_submodule(next(iter(blocks(compressed)))))
    plain = kind.forward

    @wraps(plain)
    def other(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        return 1.001 * found if isinstance(found, Tensor) else (1.001 * found[0], *found[1:])

    monkeypatch.setattr(kind, "forward", other)
    compressed = pc.compress(model, pc.Int8())
    assert not blocks(compressed)
    assert "computes something else" in str(pc.summary(compressed))


@EACH_FAMILY
def test_compiled(name: str) -> None:
    _, model = pair(name, pc.Int8())
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    for inputs in both_inputs(name, 2, 7)[0 if name == "BERT" else -1 :]:
        graphs.clear()
        torch.compiler.reset()
        y = run(torch.compile(model, fullgraph=True, backend=backend), inputs)[0]
        assert_close(y, run(model, inputs)[0], 1e-6)
        assert len(graphs) == 1 and graphs[0].count("pycompress.block.default") == 2


@EACH_FAMILY
def test_exported(name: str) -> None:
    _, model = pair(name, pc.Int8())
    inputs = both_inputs(name, 2, 7)[-1]
    with torch.no_grad():
        program = torch.export.export(model, (), kwargs=inputs)
        targets = [str(node.target) for node in program.graph.nodes]
        assert targets.count("pycompress.block.default") == 2
        assert_close(program.module()(**inputs)[0], model(**inputs)[0], 1e-6)
