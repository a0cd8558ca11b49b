"""Blocks that run as one op: the op's form, checks and twin; and modules that stay what they were."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import CASES, blocks, blocks_alone, build, pair
from torch import Tensor, nn
from torch.nn.functional import linear

import pycompress as pc
from pycompress import ops
from pycompress.model import compressed_layers
from pycompress.nn import Int8Linear
from pycompress.nn import block as nn_block
from pycompress.ops.block_form import NORMS, PRODUCTS
from pycompress.passes.blocks import find, install, remove
from pycompress.reference import block as twin

D, WIDE, HEADS, HEAD_SIZE = 24, 40, 3, 8

Operands = tuple[list[Tensor | None], ops.BlockForm]


def dense_block(**changes: Any) -> Operands:
    """The op's tensors, all of them dense, and its form."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    gated = changes.pop("gated", False)
    inner = HEADS * HEAD_SIZE
    sizes = {
        "query": (inner, D),
        "key": (inner, D),
        "value": (inner, D),
        "output": (D, inner),
        "up": (WIDE, D),
        "down": (D, WIDE),
    }
    if gated:
        sizes["gate"] = (WIDE, D)
    settings = {
        "heads": HEADS, "head_size": HEAD_SIZE, "scale": HEAD_SIZE**-0.5, "pre_norm": False, "norm": "layer_norm",
        "eps": (1e-5, 1e-3), "activation": "gelu", "causal": False, **changes,
    }  # fmt: skip
    tensors: list[Tensor | None] = []
    for product in PRODUCTS:
        n, k = sizes.get(product, (0, 0))
        tensors += [draw(n, k), draw(n)] if n else [None, None]
    for _ in NORMS:
        tensors += [1 + draw(D), draw(D) if settings["norm"] == "layer_norm" else None]
    forms = tuple(f"dense n={sizes[one][0]} k={sizes[one][1]}" if one in sizes else "" for one in PRODUCTS)
    return tensors, ops.BlockForm(**settings, products=forms)


def in_float64(x: Tensor, mask: Tensor | None, bias: Tensor | None, tensors: list[Tensor | None], form: Any) -> Tensor:
    """What the op computes, in torch's float64, head by head and query by query, straight from its definition."""
    t = [None if one is None else one.double() for one in tensors]
    named = {name: (t[2 * i], t[2 * i + 1]) for i, name in enumerate((*PRODUCTS, *NORMS))}
    act = ops.DIFFERENTIABLE[form.activation]

    def product(name: str, h: Tensor) -> Tensor:
        return linear(h, *named[name])

    def norm(i: int, h: Tensor) -> Tensor:
        weight, shift = named[NORMS[i]]
        assert weight is not None
        if form.norm == "layer_norm":
            h = h - h.mean(-1, keepdim=True)
        h = h / (h.square().mean(-1, keepdim=True) + form.eps[i]).sqrt() * weight
        return h if shift is None else h + shift

    def attention(h: Tensor) -> Tensor:
        q, k, v = (product(name, h) for name in PRODUCTS[:3])
        batch, length, _ = h.shape
        found = torch.zeros_like(q)
        scores_shape = (batch, form.heads, length, length)
        added = torch.zeros(scores_shape, dtype=torch.float64)
        for one in (mask, bias):
            if one is not None and one.dtype == torch.bool:
                added = torch.where(one.expand(scores_shape), added, -torch.inf)
            elif one is not None:
                added = added + one.double()
        for b in range(batch):
            for head in range(form.heads):
                part = slice(head * form.head_size, (head + 1) * form.head_size)
                for i in range(length):
                    seen = i + 1 if form.causal else length
                    scores = form.scale * k[b, :seen, part] @ q[b, i, part] + added[b, head, i, :seen]
                    if scores.max() > -torch.inf:
                        weights = (scores - scores.max()).exp()
                        found[b, i, part] = weights / weights.sum() @ v[b, :seen, part]
        return product("output", found)

    def mlp(h: Tensor) -> Tensor:
        return product(
            "down",
            act(product("gate", h)) * product("up", h) if named["gate"][0] is not None else act(product("up", h)),
        )

    h = x.double()
    if form.pre_norm:
        h = h + attention(norm(0, h))
        return h + mlp(norm(1, h))
    h = norm(0, h + attention(h))
    return norm(1, h + mlp(h))


def masks(batch: int, length: int) -> dict[str, Tensor | None]:
    seen = torch.rand(batch, 1, 1, length, generator=torch.Generator().manual_seed(2)) > 0.4
    seen[0] = False  # a sequence of padding alone
    return {
        "none": None, "bool": seen, "added": torch.zeros(batch, 1, 1, length).masked_fill(~seen, -torch.inf),
        "of each head": torch.randn(batch, HEADS, length, length, generator=torch.Generator().manual_seed(3)),
    }  # fmt: skip


FORMS: dict[str, dict[str, Any]] = {
    "post-norm": {},
    "pre-norm, causal": {"pre_norm": True, "causal": True, "activation": "silu"},
    "root mean squares, gated": {
        "pre_norm": True,
        "norm": "rms_norm",
        "scale": 1.0,
        "gated": True,
        "activation": "gelu_tanh",
    },
    "relu": {"activation": "relu"},
    "quick gelu": {"activation": "quick_gelu", "pre_norm": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", masks(2, 5))
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_twin_is_what_the_definition_says(form: str, mask: str, with_bias: bool) -> None:
    tensors, own = dense_block(**FORMS[form])
    x = torch.randn(2, 5, D)
    bias = torch.randn(1, HEADS, 5, 5) if with_bias else None
    expected = in_float64(x, masks(2, 5)[mask], bias, tensors, own)
    t = [None if one is None else one.double() for one in tensors]
    products = {
        name: lambda h, i=i: linear(h, t[2 * i], t[2 * i + 1]) for i, name in enumerate(PRODUCTS) if t[2 * i] is not None
    }  # fmt: skip
    norms = [(t[-4], t[-3]), (t[-2], t[-1])]
    y = twin.block(x.double(), masks(2, 5)[mask], bias, products, norms, own)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", masks(2, 5))
def test_the_op_in_float32(form: str, mask: str) -> None:
    """Sums of at most 40 products of numbers of magnitude one, through two norms: far below 1e-5."""
    tensors, own = dense_block(**FORMS[form])
    x, bias = torch.randn(2, 5, D), torch.randn(1, HEADS, 5, 5)
    y = ops.block(x, masks(2, 5)[mask], bias, tensors, str(own))
    torch.testing.assert_close(y.double(), in_float64(x, masks(2, 5)[mask], bias, tensors, own), rtol=1e-5, atol=1e-5)
    assert torch.equal(y, torch.ops.pycompress.block(x, masks(2, 5)[mask], bias, tensors, str(own)))


def test_a_form_is_its_string() -> None:
    _, form = dense_block(eps=(1e-12, 0.1 + 0.2), scale=1 / 3)
    assert ops.parse_block(str(form)) == form
    for broken in (
        str(form)[:-1],
        str(form).replace("heads=3", "heads=x"),
        "int8 n=3 k=4",
        str(form).replace(" | ", " ", 1),
    ):
        with pytest.raises(ValueError, match="block"):
            ops.parse_block(broken)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "x of two dimensions": (lambda o: o.update(x=o["x"][0]), r"x is \[5, 24\], expected \[batch, length, 24\]"),
    "x of another width": (lambda o: o.update(x=o["x"][..., 1:]), "x is"),
    "x float64": (lambda o: o.update(x=o["x"].double()), "float64, expected float32"),
    "an integer mask": (lambda o: o.update(mask=torch.ones(2, 1, 1, 5, dtype=torch.int64)), "mask is torch.int64, expected bool"),
    "a mask of another length": (lambda o: o.update(mask=torch.zeros(2, 1, 1, 4)), r"mask is \[2, 1, 1, 4\]"),
    "a bool bias": (lambda o: o.update(bias=torch.ones(1, 1, 5, 5, dtype=torch.bool)), "bias is torch.bool"),
    "too few tensors": (lambda o: o.update(tensors=o["tensors"][:-1]), "17 tensors, expected 18"),
    "no key": (lambda o: o["tensors"].__setitem__(2, None), "the weight of key is None"),
    "a gate that is not in the form": (lambda o: o["tensors"].__setitem__(10, torch.zeros(WIDE, D)), "there is a gate"),
    "a bias of another size": (lambda o: o["tensors"].__setitem__(1, torch.zeros(3)), r"the bias of query is torch.float32 \[3\]"),
    "a norm in float64": (lambda o: o["tensors"].__setitem__(14, torch.ones(D).double()), "the weight of attention_norm"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_operands_are_named(what: str) -> None:
    tensors, form = dense_block()
    operands = {"x": torch.randn(2, 5, D), "mask": None, "bias": None, "tensors": [*tensors], "form": str(form)}
    change, message = WRONG[what]
    change(operands)
    with pytest.raises((TypeError, ValueError), match=message):
        ops.block(**operands)


def test_the_op_has_no_derivative_and_no_vmap() -> None:
    tensors, form = dense_block()
    x = torch.randn(2, 5, D)
    with pytest.raises(RuntimeError, match="gradient"):
        ops.block(x.requires_grad_(), None, None, tensors, str(form))
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda one: ops.block(one, None, None, tensors, str(form)))(torch.randn(3, 2, 5, D))
    with torch.no_grad():
        expected = ops.block(x, None, None, tensors, str(form))
        with torch.autocast("cpu"):
            assert torch.equal(ops.block(x, None, None, tensors, str(form)), expected)


# --- modules ----------------------------------------------------------------------------------------------------------

NAMES = pytest.mark.parametrize("name", ["encoder layer", "BERT", "T5 gated"])


def result(model: Any, name: str, batch: int = 2, length: int = 7) -> Tensor:
    with torch.no_grad():
        return model(**(CASES[name].masked or CASES[name].inputs)(batch, length))[0]  # type: ignore[no-any-return]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], tuple[Tensor, int]]:
    """``ran(model, name)``: what a model gives, and how many of its blocks ran as one op."""
    count = 0
    run = nn_block.block_directly

    def counted(*operands: Any) -> Tensor:
        nonlocal count
        count += 1
        return run(*operands)

    monkeypatch.setattr(nn_block, "block_directly", counted)

    def call(model: Any, name: str) -> tuple[Tensor, int]:
        nonlocal count
        count = 0
        return result(model, name), count

    return call


@NAMES
def test_a_block_is_the_module_that_it_was(name: str) -> None:
    without, model = pair(name, pc.Int8())
    assert [*model.state_dict()] == [*without.state_dict()]
    assert repr(model) == repr(without)
    for (at, one), (other_at, other) in zip(model.named_modules(), without.named_modules(), strict=True):
        assert at == other_at and isinstance(one, type(other))
    assert type(next(iter(find(model)))).__name__ == type(next(iter(find(without)))).__name__


@NAMES
def test_copies_and_pickles_are_blocks(name: str, ran: Any) -> None:
    _, model = pair(name, pc.Int8())
    expected, count = ran(model, name)
    assert count == 2
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [*blocks(other)] == [*blocks(model)]
        y, count = ran(other, name)
        assert count == 2 and torch.equal(y, expected)
        inside = next(iter(compressed_layers(other).values()))
        inside.register_forward_hook(lambda *_: None)
        assert ran(other, name)[1] == 1 and ran(model, name)[1] == 2


def _result_there(model: nn.Module, name: str, pipe: Any) -> None:
    pipe.send(result(model, name).tolist())


@pytest.mark.slow
def test_a_spawned_process_gets_blocks() -> None:
    _, model = pair("encoder layer", pc.Int8())
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_result_there, args=(model, "encoder layer", there))
    child.start()
    assert here.poll(120)
    torch.testing.assert_close(torch.tensor(here.recv()), result(model, "encoder layer"))
    child.join()


@NAMES
def test_saved_and_loaded(name: str, ran: Any, tmp_path: Path) -> None:
    without, model = pair(name, pc.Int8())
    pc.save(model, tmp_path / "m.safetensors")
    expected = result(model, name)
    loaded = pc.load(build(name, seed=1), tmp_path / "m.safetensors")
    blocks_alone(loaded)
    y, count = ran(loaded, name)
    assert count == 2 and torch.equal(y, expected)
    y, count = ran(pc.load(build(name, seed=1), tmp_path / "m.safetensors", blocks=False), name)
    assert count == 0 and torch.equal(y, result(without, name))
    loaded = pc.load(model, tmp_path / "m.safetensors")
    blocks_alone(loaded)
    y, count = ran(loaded, name)
    assert count == 2 and torch.equal(y, expected)


_GLOBAL_HOOKS: Any = torch.nn.modules.module._global_forward_hooks


def change_child(block: Any) -> None:
    block.linear2 = nn.Linear(48, 32)


def change_weight(block: Any) -> None:
    block.norm1.weight = nn.Parameter(torch.rand(32))


def change_data(block: Any) -> None:
    block.self_attn.in_proj_weight.data = torch.randn(96, 32)


def change_in_place(block: Any) -> None:
    with torch.no_grad():
        block.norm2.bias.add_(1)


def change_layer(block: Any) -> None:
    block.linear1 = pc.compress(nn.Sequential(nn.Linear(32, 48)), pc.Int4())[0]


def change_attribute(block: Any) -> None:
    block.norm1.eps = 0.5


def change_order(block: Any) -> None:
    block.norm_first = True


def change_activation(block: Any) -> None:
    block.activation = nn.functional.silu


def change_forward(block: Any) -> None:
    plain = block.linear2.forward
    block.linear2.forward = lambda x: 2 * plain(x)


def change_class(block: Any) -> None:
    class Doubled(type(block.norm1)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)  # type: ignore[no-any-return]

    block.norm1.__class__ = Doubled


def change_by_hook(block: Any) -> None:
    block.dropout1.register_forward_hook(lambda _, __, y: 2 * y)


def change_by_global_hook(_block: Any) -> None:
    _GLOBAL_HOOKS[0] = lambda module, _, y: 2 * y if isinstance(module, nn.Dropout) else None


def change_state(block: Any) -> None:
    other = pc.compress(nn.Sequential(nn.Linear(48, 32)), pc.Int8())
    block.linear2.load_state_dict(other[0].state_dict())


CHANGES = [
    change_child, change_weight, change_data, change_in_place, change_layer, change_attribute, change_order, change_activation,
    change_forward, change_class, change_by_hook, change_by_global_hook, change_state,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_was_changed_is_seen(change: Callable[[Any], None], ran: Any) -> None:
    name = "encoder layer"
    without, model = pair(name, pc.Int8())
    before, count = ran(model, name)
    assert count == 2
    try:
        for one in (without, model):
            torch.manual_seed(5)
            change(one.layers.layers[1])
        expected = result(without, name)
        y, _ = ran(model, name)
    finally:
        _GLOBAL_HOOKS.clear()
    assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


def test_a_plan_goes_on_where_a_model_has_blocks(ran: Any) -> None:
    name = "BERT"
    first = pc.compress(build(name), {"*.query": pc.Int8(), "*": None})
    assert len(blocks(first)) == 2
    second = pc.compress(first, {"*output.dense": pc.Int8(), "*": None})
    assert len(blocks(first)) == len(blocks(second)) == 2 and ran(second, name)[1] == 2
    before = result(first, name)
    third = pc.compress(first, {"*output.dense": pc.Int8(), "*": None}, inplace=True)
    assert third is first and torch.equal(result(first, name), result(second, name))
    assert not torch.equal(before, result(first, name))
    pc.compress(first, {"*.key": pc.Int8(), "*": None}, inplace=True, blocks=False)
    assert not blocks(first)


def test_a_failure_leaves_the_blocks_of_the_model(ran: Any) -> None:
    _, model = pair("BERT", pc.Int8())
    with pytest.raises(ValueError, match="matches no layer"):
        pc.compress(model, {"nothing": pc.Int8()}, inplace=True)
    assert len(blocks(model)) == 2 and ran(model, "BERT")[1] == 2


def test_the_summary_lists_blocks() -> None:
    without, model = pair("BERT", pc.Int8())
    assert [(one.name, one.family, one.reason) for one in pc.summary(model).blocks] == [
        ("encoder.layer.0", "bert", ""),
        ("encoder.layer.1", "bert", ""),
    ]
    assert "encoder.layer.0: BertLayer runs as one op (bert)" in str(pc.summary(model))
    assert not pc.summary(without).blocks
    model.encoder.layer[1].attention.self.query.register_forward_hook(lambda *_: None)
    assert [one.reason for one in pc.summary(model).blocks] == ["", "there are hooks inside"]
    model.train()
    assert [one.reason for one in pc.summary(model).blocks] == ["it is in training"] * 2
    remove(model)
    assert not pc.summary(model).blocks


def test_a_block_of_dense_layers_is_none() -> None:
    model = pc.compress(build("BERT"), {"encoder.layer.0.*": pc.Int8(), "*": None})
    assert [*blocks(model)] == ["encoder.layer.0"]


def test_a_module_besides_leaves_the_block_as_it_is() -> None:
    model = build("BERT")
    model.encoder.layer[0].output.adapter = nn.Linear(32, 32)
    compressed = pc.compress(model, pc.Int8())
    assert [*blocks(compressed)] == ["encoder.layer.1"]
    assert "it has a output.adapter besides" in str(pc.summary(compressed))


def test_nothing_is_left_behind() -> None:
    """The random state and the model are as they were; what was tried has no hooks and no gradients."""
    model = pc.compress(build("T5"), pc.Int8(), blocks=False)
    state, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    install(model)
    assert torch.equal(torch.random.get_rng_state(), random) and len(blocks(model)) == 2
    for key, one in model.state_dict().items():
        assert torch.equal(one, state[key])
    assert not any(one._forward_hooks for one in model.modules())
    assert all(one.grad is None for one in model.parameters())


def test_only_what_is_not_slower_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from pycompress import race

    model, inputs = build("BERT"), CASES["BERT"].inputs(2, 7)

    def us(one: nn.Module, _: Any) -> float:
        """The first block makes the model slower, the second faster."""
        if any(not isinstance(layer, Int8Linear) for layer in compressed_layers(one).values()):
            return 1.0
        slower, faster = (f"encoder.layer.{i}" in blocks(one) for i in range(2))
        return 10.0 + 2 * slower - faster if compressed_layers(one) else 20.0

    monkeypatch.setattr(race, "_call_us", us)
    monkeypatch.setattr(race, "layer_us", lambda *_: (2.0, 1.0))
    compressed = pc.compress(model, pc.Int8(), example_inputs=inputs, only_if_faster=True)
    assert [*blocks(compressed)] == ["encoder.layer.1"]
    assert "the model is slower with it: 12 us against 10 us" in str(pc.summary(compressed))


@NAMES
def test_validated_layer_by_layer(name: str) -> None:
    pytest.importorskip("onnxruntime")
    _, model = pair(name, pc.Int8())
    report = pc.validate(model, (CASES[name].masked or CASES[name].inputs)(2, 7))
    assert report.ok and len(blocks(model)) == 2
