"""Which activations go into the layer before them: those of which the source says so on every path, and no other code objects."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.model import compressed_layers

WIDTH = 16


class Base(nn.Module):
    """Two layers and two activations; the classes below call them in their ways."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(WIDTH, WIDTH), nn.SiLU()
        self.out, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)


# --- fused ------------------------------------------------------------------------------------------------------------


class Nested(Base):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.act(self.fc(x)))
        return y


class Line(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        x = self.act(x)
        x = self.drop(x)
        return self.out(x)  # type: ignore[no-any-return]


class Variable(Base):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x)
        return self.out(self.act(hidden)) + x  # type: ignore[no-any-return]


class Gated(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x)) * self.out(x)  # type: ignore[no-any-return]


class AfterABranch(Base):
    """All that comes as far as the layer goes through the activation."""

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        if skip:
            return x
        if self.training:
            x = x * 1.0
        x = self.act(self.fc(x))
        return self.out(x)  # type: ignore[no-any-return]


class ReadsTheNextWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc(x))
        return self.out(x.to(self.out.weight.dtype))  # type: ignore[no-any-return]


class InitialisesWeights(Base):
    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.fc.bias)
        for module in self.modules():
            module.train()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.fc(x))
        return y


class Walked(nn.Module):
    """A list of blocks, each called; the attributes that are asked of them are others."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Line() for _ in range(2))
        self.heads = nn.ModuleDict({"a": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())})
        self.last = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x) * i if block.training else block(x)
        for block, scale in zip(self.blocks, (1.0, 2.0), strict=True):
            x = block(x) * scale
        x = self.blocks[0](x) + sum(head(x) for head in self.heads.values())
        return self.last(x)  # type: ignore[no-any-return]


FUSED: dict[type[nn.Module], int] = {
    Nested: 1, Line: 1, Variable: 1, Gated: 1, AfterABranch: 1, ReadsTheNextWeight: 1, InitialisesWeights: 1, Walked: 4,
}  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", FUSED, ids=lambda kind: kind.__name__)
def test_what_is_fused(kind: type[nn.Module], inplace: bool) -> None:
    check(kind().eval(), fused=FUSED[kind], inplace=inplace)


def check(model: Any, fused: int = 0, *, inplace: bool = False, **arguments: Any) -> Any:
    """Compresses a model, which afterwards computes what it did."""
    x = torch.randn(5, WIDTH)
    expected = model(x, **arguments)
    result = pc.compress(model, pc.Int8(activation_bits=16), inplace=inplace)
    layers = compressed_layers(result).values()
    assert sum(layer.activation != "none" for layer in layers) == fused
    torch.testing.assert_close(
        result(x, **arguments), expected, rtol=0.05, atol=0.05 * float(expected.abs().max().detach())
    )
    return result


# --- not fused --------------------------------------------------------------------------------------------------------


class Flagged(Base):
    def forward(self, x: Tensor, *, activated: bool = True) -> Tensor:
        x = self.fc(x)
        if activated:
            x = self.act(x)
        return self.out(x)  # type: ignore[no-any-return]


class InALoop(Base):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.act(self.fc(x))
        return x


class OnlyWithGradients(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        x = self.act(x) if torch.is_grad_enabled() else x
        return self.out(x)  # type: ignore[no-any-return]


class ReturnsFeatures(Base):
    def forward(self, x: Tensor, return_features: bool = False) -> Any:
        x = self.fc(x)
        features = x
        x = self.act(x)
        return (self.out(x), features) if return_features else self.out(x)


class KeepsTheLayersResult(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        y = self.act(h)
        return self.out(y) + h  # type: ignore[no-any-return]


class Caught(Base):
    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.act(self.fc(x))
        except RuntimeError:
            x = self.fc(x)
        return x


class ShortCircuited(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return (len(x) > 100 and self.act(h)) or self.out(h)  # type: ignore[no-any-return]


class InAnotherMethod(Base):
    def features(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x)) + self.features(x)  # type: ignore[no-any-return]


class ByAName(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x)) + getattr(self, "f" + "c")(x)  # type: ignore[no-any-return]


class ByAConstantName(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x)) + getattr(self, "fc", None)(x)  # type: ignore[no-any-return, misc]


class ByTheTable(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self._modules["fc"](x)  # type: ignore[misc]
        return self.act(self.fc(x)) + y  # type: ignore[no-any-return]


class OverChildren(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.fc(x))
        for child in self.children():
            x = child(x)
        return x + y  # type: ignore[no-any-return]


class Functional(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.fc.weight)
        return self.act(self.fc(x)) + y  # type: ignore[no-any-return]


class HandedOver(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x)) + first_of(self, x)  # type: ignore[no-any-return]


def first_of(module: Any, x: Tensor) -> Tensor:
    y: Tensor = module.fc(x)
    return y


class DefinedEarlier(Base):
    def __init__(self) -> None:
        super().__init__()
        self.run = lambda x: self.fc(x) + 0

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x)) + self.run(x)  # type: ignore[no-any-return]


class Inherited(Nested):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.fc(x)  # type: ignore[no-any-return]


class Property(Base):
    @property
    def first(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x)) + self.first(x)  # type: ignore[no-any-return]


class TwoArguments(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act = Shifted()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x), x)  # type: ignore[no-any-return]


class Shifted(nn.ReLU):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + shift


def doubled(forward: Any) -> Any:
    @functools.wraps(forward)
    def run(self: Any, x: Tensor) -> Tensor:
        return forward(self, x) + self.fc(x)  # type: ignore[no-any-return]

    return run


class Decorated(Base):
    @doubled
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.fc(x))
        return y


class InALocalFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        y = self.act(h)
        return y + sum(h for _ in range(1))  # type: ignore[no-any-return]


class Listed(Base):
    """A list that forward walks, whose items are replaced with those of the tree."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [self.fc, self.act, self.out]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class ListedAndCalled(Listed):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x)) + self.steps[0](x)  # type: ignore[no-any-return]


class BoundMethods(Base):
    def __init__(self) -> None:
        super().__init__()
        self.table = {"first": self.fc.forward, "second": self.act.__call__, "third": functools.partial(self.out)}

    def forward(self, x: Tensor) -> Tensor:
        for step in self.table.values():
            x = step(x)
        return x


class OnAnObject(Base):
    def __init__(self) -> None:
        super().__init__()
        self.runner = SimpleNamespace(block=[self.fc])

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x)) + self.runner.block[0](x)  # type: ignore[no-any-return]


class Opened(nn.Module):
    """Code of another module calls a layer past the forward of its parent."""

    def __init__(self, inner: Callable[[], nn.Module] = Nested) -> None:
        super().__init__()
        self.inner: Any = inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.inner.fc(x)  # type: ignore[no-any-return]


class OpenedInALoop(Opened):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Nested()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.inner:
            x = block(x) + block.fc(x)
        return x


class OpenedByAnArgument(Opened):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.first(self.inner, x)  # type: ignore[no-any-return]

    def first(self, block: Any, x: Tensor) -> Tensor:
        y: Tensor = block.fc(x)
        return y


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU())


class Indexed(Opened):
    def __init__(self) -> None:
        super().__init__(chain)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.inner[0](x)  # type: ignore[no-any-return]


class Sliced(Indexed):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner[1:](self.inner[:1](x) + 1)  # type: ignore[no-any-return]


class Iterated(Indexed):
    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for step in self.inner:
            features.append(step(features[-1]))
        return torch.stack(features).sum(dim=0)


class NestedChains(Indexed):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(chain(), chain())

    def forward(self, x: Tensor) -> Tensor:
        features = []
        for part in self.inner:
            for step in part:
                x = step(x)
                features.append(x)
        return torch.stack(features).sum(dim=0)


NOT_FUSED: list[type[nn.Module]] = [
    Flagged, InALoop, OnlyWithGradients, ReturnsFeatures, KeepsTheLayersResult, Caught, ShortCircuited, InAnotherMethod, ByAName,
    ByAConstantName, ByTheTable, OverChildren, Functional, HandedOver, DefinedEarlier, Inherited, Property, TwoArguments, Decorated,
    InALocalFunction, Listed, ListedAndCalled, BoundMethods, OnAnObject, Opened, OpenedInALoop, OpenedByAnArgument, Indexed, Sliced,
    Iterated, NestedChains,
]  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", NOT_FUSED, ids=lambda kind: kind.__name__)
def test_what_is_not_fused(kind: type[nn.Module], inplace: bool) -> None:
    check(kind().eval(), inplace=inplace)


@pytest.mark.parametrize("activated", [False, True])
def test_both_ways_of_a_flag(activated: bool) -> None:
    check(Flagged(), activated=activated)


def test_features_that_come_before_the_activation() -> None:
    model, x = ReturnsFeatures().eval(), torch.randn(5, WIDTH)
    result = pc.compress(model, pc.Int8(activation_bits=16))
    for found, expected in zip(result(x, True), model(x, True), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_without_gradients_too() -> None:
    model, x = OnlyWithGradients(), torch.randn(5, WIDTH)
    result = pc.compress(model, pc.Int8(activation_bits=16))
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(result(x), model(x), rtol=0.05, atol=0.05)


# --- what somebody did to a model that was plain ----------------------------------------------------------------------


def its_own_forward(model: Any) -> None:
    model.forward = MethodType(lambda self, x: self.act(self.fc(x)) + self.fc(x), model)


def a_closure(model: Any) -> None:
    inner = model.forward
    model.forward = lambda x: inner(x) + model.fc(x)


def a_hook(model: Any) -> None:
    model.register_forward_hook(lambda module, args, y: y + module.fc(args[0]))


def a_hook_on_the_activation(model: Any) -> None:
    model.act.register_forward_hook(lambda module, args, y: y + args[0])


def a_forward_of_the_activation(model: Any) -> None:
    model.act.forward = lambda x: x * 2


def a_class_that_was_changed(model: Any) -> None:
    class Changed(Nested):
        forward = lambda self, x: self.act(self.fc(x)) + self.fc(x)  # noqa: E731

    model.__class__ = Changed


def a_name_more(model: Any) -> None:
    model.alias = model.act


def a_list_more(model: Any) -> None:
    model.all = [model.fc]


@pytest.mark.parametrize(
    "change",
    [
        its_own_forward, a_closure, a_hook, a_hook_on_the_activation, a_forward_of_the_activation, a_class_that_was_changed,
        a_name_more, a_list_more,
    ],
)  # fmt: skip
@pytest.mark.parametrize("inplace", [False, True])
def test_changed_by_somebody(change: Callable[[Any], None], inplace: bool) -> None:
    model = Nested().eval()
    change(model)
    check(model, inplace=inplace)


def test_source_that_is_missing_or_another(monkeypatch: pytest.MonkeyPatch) -> None:
    space: dict[str, Any] = {"Base": Base}
    exec("class Unwritten(Base):\n    def forward(self, x):\n        return self.act(self.fc(x))\n", space)
    check(space["Unwritten"]().eval())
    monkeypatch.setattr(
        "inspect.getsourcelines", lambda _: (["def forward(self, x):\n", "    return self.act(self.out(x))\n"], 0)
    )
    check(Nested().eval())


# --- tried out on example inputs --------------------------------------------------------------------------------------

OUTSIDE: dict[str, Any] = {}


class Reached(Nested):
    """A global list leads to the layer, which nothing in the model shows."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.fc(x))
        return self.out(y) + from_outside(x)  # type: ignore[no-any-return]


def from_outside(x: Tensor) -> Tensor:
    y: Tensor = OUTSIDE["layer"](x)
    return y


def test_a_pair_that_turns_out_to_be_none(snapshot: Callable[[nn.Module], Callable[[], bool]]) -> None:
    model, x = nn.Sequential(Nested(), Reached(), Nested()).eval(), torch.randn(5, WIDTH)
    OUTSIDE["layer"] = model[1].fc
    unchanged = snapshot(model)
    result = pc.compress(model, pc.Int8(activation_bits=16), example_inputs=x)
    assert unchanged()
    assert {name: layer.activation for name, layer in compressed_layers(result).items() if name.endswith("fc")} == {
        "0.fc": "silu", "1.fc": "none", "2.fc": "silu",
    }  # fmt: skip
    notes = {record.name: record.note for record in pc.summary(result).layers}
    assert notes["1.fc"] == "silu stays beside it: with it fused, the model computes something else on example_inputs"
    assert not notes["0.fc"]
    assert notes["1.fc"] in str(pc.summary(result))


class Restless(Nested):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.fc(x))
        return self.out(y) * next_number()  # type: ignore[no-any-return]


NUMBERS = iter(range(1, 10**6))


def next_number() -> int:
    return next(NUMBERS)


def test_a_model_whose_output_is_another_each_time_cannot_be_checked() -> None:
    result = pc.compress(Restless().eval(), pc.Int8(), example_inputs=torch.randn(5, WIDTH))
    assert {layer.activation for layer in compressed_layers(result).values()} == {"none"}
    assert "two equal calls of the model give different outputs" in pc.summary(result).layers[0].note


def test_trying_out_leaves_no_trace(snapshot: Callable[[nn.Module], Callable[[], bool]]) -> None:
    model = nn.Sequential(Line(), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)).train()
    x, state = torch.randn(5, WIDTH), torch.get_rng_state()
    unchanged, before = snapshot(model), x.clone()
    result = pc.compress(model, pc.Int8(), example_inputs=x)
    assert unchanged()
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for one in (model, result) for module in one.modules())
    assert all(module.training for one in (model, result) for module in one.modules())
    assert compressed_layers(result)["0.fc"].activation == "silu"


# --- models of transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes", "fused"),
    [
        ("Bert", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}, {"gelu": 2}),
        ("ViT", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}, {"gelu": 2}),
        (
            "CLIPVision",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32},
            {"quick_gelu": 2},
        ),
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2}, {"gelu_tanh": 2}),
        ("T5", {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16}, {"relu": 4}),
        (
            "Llama",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
            {"silu": 2},
        ),
    ],
)  # fmt: skip
def test_transformers(name: str, sizes: dict[str, int], fused: dict[str, int]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
    found = [layer.activation for layer in compressed_layers(pc.compress(model.eval(), pc.Int8())).values()]
    assert {activation: found.count(activation) for activation in set(found) - {"none"}} == fused
