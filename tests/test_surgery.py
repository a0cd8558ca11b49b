"""swap(): one module in the place of another wherever the model holds it, whole or not at all; what holds it otherwise is named."""

from __future__ import annotations

import functools
import gc
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycompress.surgery import Swap, held_elsewhere, swap

Snapshot = Callable[[nn.Module], Callable[[], bool]]
Pair = namedtuple("Pair", ["layer", "scale"])  # noqa: PYI024 - made by a call, as many are


class Holder(nn.Module):
    """``fc``, and beside it whatever a test makes of it."""

    def __init__(self, hold: Callable[[nn.Linear], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.held = hold(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y


@dataclass(frozen=True)
class Frozen:
    layer: nn.Module


class Slotted:
    __slots__ = ("layer", "unset")

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class Listed(list):  # type: ignore[type-arg]
    pass


def around(value: Any) -> Any:
    """A list that holds itself, and a tuple of both."""
    cyclic = [value]
    cyclic.append((cyclic, value))
    return cyclic


def marked(value: Any) -> Any:
    listed = Listed()
    listed.layer = value
    return listed


# {what holds the layer: (how it is made, how the layer is got at again)}
REWRITTEN: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "attribute": (lambda m: m, lambda h: h),
    "list": (lambda m: [0, m], lambda h: h[1]),
    "subclass of list": (lambda m: Listed([m]), lambda h: h[0]),
    "attribute of a subclass of list": (marked, lambda h: h.layer),
    "list in a list": (lambda m: [[1, [m]]], lambda h: h[0][1][0]),
    "tuple": (lambda m: (0, m), lambda h: h[1]),
    "tuple in a tuple": (lambda m: (0, (m, "a")), lambda h: h[1][0]),
    "named tuple": (lambda m: Pair(m, 2.0), lambda h: h.layer),
    "dict": (lambda m: {"a": 1, "b": m}, lambda h: h["b"]),
    "key of a dict": (lambda m: {0: 0, m: "layer", 1: 1}, lambda h: list(h)[1]),
    "part of a key": (lambda m: {("up", m): 1}, lambda h: next(iter(h))[1]),
    "ordered dict": (lambda m: OrderedDict(a=m), lambda h: h["a"]),
    "key of an ordered dict": (lambda m: OrderedDict([(0, 0), (m, 1), (2, 2)]), lambda h: list(h)[1]),
    "default dict": (lambda m: defaultdict(list, a=[m]), lambda h: h["a"][0]),
    "key and value": (lambda m: {m: m}, lambda h: next(k for k, v in h.items() if k is v)),
    "set": (lambda m: {m}, lambda h: next(iter(h))),
    "frozen set": (lambda m: frozenset([m]), lambda h: next(iter(h))),
    "deque": (lambda m: deque([0, m], maxlen=2), lambda h: h[1]),
    "namespace": (lambda m: SimpleNamespace(layer=m), lambda h: h.layer),
    "frozen dataclass": (Frozen, lambda h: h.layer),
    "slots": (Slotted, lambda h: h.layer),
    "partial": (lambda m: functools.partial(m, 1), lambda h: h.func),
    "argument of a partial": (lambda m: functools.partial(print, 1, m), lambda h: h.args[1]),
    "keyword of a partial": (lambda m: functools.partial(print, end=m), lambda h: h.keywords["end"]),
    "partial of a bound method": (lambda m: functools.partial(m.forward), lambda h: h.func.__self__),
    "forward": (lambda m: m.forward, lambda h: h.__self__),
    "__call__": (lambda m: m.__call__, lambda h: h.__self__),
    "method of every module": (lambda m: {"a": m.state_dict}, lambda h: h["a"].__self__),
    "bound method of a list": (lambda m: [m].append, lambda h: h.__self__[0]),
    "weak reference": (weakref.ref, lambda h: h()),
    "list in a closure": (lambda m: closing([m]), lambda h: h()[0]),
    "attribute of a function": (lambda m: setattr(f := lambda: 0, "layer", m) or f, lambda h: h.layer),
    "view of a dict": (lambda m: MappingProxyType({"a": m}), lambda h: h["a"]),
    "module that is no child": (lambda m: [nn.Sequential(m)], lambda h: h[0][0]),
    "cycle": (around, lambda h: h[0]),
    "tuple in a cycle": (around, lambda h: h[1][1]),
}


@pytest.mark.parametrize("how", REWRITTEN)
def test_swapped_wherever_it_is_held(how: str, snapshot: Snapshot) -> None:
    make, get = REWRITTEN[how]
    model = Holder(make)
    unchanged = snapshot(model)
    old, held, new = model.fc, model.held, nn.Linear(4, 4)
    assert held_elsewhere(model, [old]) == {}
    undo = swap(model, {old: new})
    assert model.fc is new
    assert get(model.held) is new
    undo()
    assert unchanged()
    assert model.fc is old
    assert get(model.held) is old
    assert type(model.held) is type(held)


@pytest.mark.parametrize("how", ["key of a dict", "key of an ordered dict"])
def test_a_dictionary_keeps_its_order(how: str) -> None:
    model = Holder(REWRITTEN[how][0])
    values = list(model.held.values())
    undo = swap(model, {model.fc: nn.Identity()})
    assert list(model.held.values()) == values
    undo()
    assert list(model.held.values()) == values


def closing(value: Any) -> Callable[[], Any]:
    return lambda: value


def closing_over_a_tuple(layer: nn.Module) -> Callable[[], nn.Module]:
    layers = (layer, layer)
    return lambda: layers[0]


def closing_twice(layer: nn.Module) -> Callable[[], nn.Module]:
    return closing(closing(layer))


def defaulting(layer: nn.Module) -> Callable[[], nn.Module]:
    def run(layer: nn.Module = layer) -> nn.Module:
        return layer

    return run


def keyword_defaulting(layer: nn.Module) -> Callable[[], nn.Module]:
    def run(*, layer: nn.Module = layer) -> nn.Module:
        return layer

    return run


def walking(layer: nn.Module) -> Any:
    yield layer


def started(layer: nn.Module) -> Any:
    generator = walking(layer)
    next(generator)
    return generator


@functools.lru_cache
def remembered(layer: nn.Module) -> nn.Module:
    return layer


ELSEWHERE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "closure": (closing, "the closure of inner.held"),
    "tuple in a closure": (closing_over_a_tuple, "the closure of inner.held"),
    "closure in a closure": (closing_twice, "the closure of the closure of inner.held"),
    "closure in a list": (lambda m: [0, closing(m)], "the closure of inner.held[1]"),
    "closure in a dictionary": (lambda m: {"run": closing(m)}, "the closure of inner.held['run']"),
    "closure in a partial": (lambda m: functools.partial(closing(m)), "the closure of inner.held.func"),
    "default": (defaulting, "a default argument of inner.held"),
    "keyword default": (keyword_defaulting, "a default argument of inner.held"),
    "method of its class": (lambda m: m.reset_parameters, "the bound method inner.held"),
    "foreign method": (closing.__get__, "the bound method inner.held"),
    "generator": (started, "the generator inner.held"),
    "iterator over a tuple": (lambda m: iter((m, 1)), "the tuple_iterator inner.held"),
    "weak proxy": (weakref.proxy, "the weak reference inner._modules['held']"),
    "weak reference with a callback": (lambda m: weakref.ref(m, print), "the weak reference inner.held"),
}


@pytest.mark.parametrize("how", ELSEWHERE)
def test_what_holds_it_elsewhere_is_named(how: str, snapshot: Snapshot) -> None:
    make, text = ELSEWHERE[how]
    model = nn.ModuleDict({"inner": Holder(make), "other": nn.Linear(4, 4)})
    inner: Any = model["inner"]
    unchanged = snapshot(model)
    found = held_elsewhere(model, [inner.fc, model["other"]])
    assert list(found) == [inner.fc]
    assert text in found[inner.fc]
    with pytest.raises(ValueError, match="swap: a Linear cannot be replaced in "):
        swap(model, {inner.fc: nn.Identity()})
    assert unchanged()


def test_hooks_are_looked_through() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    layer = model[0]
    model[1].register_forward_hook(lambda *_: layer.weight.sum())
    (number,) = model[1]._forward_hooks
    assert held_elsewhere(model, [layer]) == {layer: [f"the closure of 1._forward_hooks[{number}]"]}


def test_all_names_of_a_shared_module() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Sequential(shared), nn.ModuleList([shared]))
    new = nn.Linear(4, 4)
    swap(model, {shared: new})
    assert all(m is new for m in (model[0], model[1][0], model[2][0]))


def test_several_at_once_also_in_each_others_places() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.both = (model[0], model[1])
    first, second = model
    undo = swap(model, {first: second, second: first})
    assert (model[0], model[1], model.both) == (second, first, (second, first))
    undo()
    assert (model[0], model[1], model.both) == (first, second, (first, second))


def test_what_is_put_in_may_hold_what_was_there() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    old = model[0]
    swap(model, {old: nn.Sequential(old)})
    assert model[0][0] is old


@pytest.mark.parametrize("training", [False, True])
def test_the_new_module_gets_the_mode_of_the_old(training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4)).train(training)
    old, new = model[0], nn.Dropout()
    undo = swap(model, {old: new})
    assert new.training is training
    model.train(not training)
    undo()
    assert old.training is not training


def test_what_cannot_be_swapped(snapshot: Snapshot) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    unchanged = snapshot(model)
    with pytest.raises(ValueError, match="one of the modules to replace is the model itself"):
        swap(model, {model[0]: nn.Identity(), model: nn.Identity()})
    with pytest.raises(ValueError, match="a Tanh to replace is no module of the model"):
        swap(model, {model[0]: nn.Identity(), nn.Tanh(): nn.Identity()})
    assert unchanged()


def test_a_failure_half_way_leaves_all_as_it_was(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model.steps = [list(model), tuple(model), dict.fromkeys(model, 1)]
    unchanged, before = snapshot(model), [list(model), *model.steps[1:]]
    change = Swap(model, {layer: nn.Identity() for layer in model})
    for point in range(len(change._edits)):
        edits = list(change._edits)
        edits[point] = edits[point]._replace(reference=edits[point].reference._replace(write=failing_once()))
        monkeypatch.setattr(change, "_edits", edits)
        with pytest.raises(ZeroDivisionError):
            change.do()
        monkeypatch.undo()
        assert unchanged()
        assert [model.steps[0], model.steps[1], model.steps[2]] == before
    change.do()
    assert all(type(module) is nn.Identity for module in (*model, *model.steps[0], *model.steps[1], *model.steps[2]))


def failing_once() -> Callable[..., None]:
    calls = iter(range(2))

    def write(*_: Any) -> None:
        if next(calls) == 0:
            raise ZeroDivisionError

    return write


def test_nothing_is_run_and_nothing_else_is_walked_into() -> None:
    class Shy:
        """Raises wherever it is looked at."""

        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(name)

        def __eq__(self, other: object) -> bool:
            raise AssertionError

        def __hash__(self) -> int:
            return 0

        def __repr__(self) -> str:
            raise AssertionError

    model = nn.Sequential(nn.Linear(4, 4))
    gone = nn.Linear(1, 1)
    model.things = [
        Shy(),
        {Shy(): 1},
        torch,
        nn.Linear,
        torch.ones(3),
        weakref.proxy(gone),
        test_hooks_are_looked_through,
    ]
    del gone
    gc.collect()
    swap(model, {model[0]: nn.Identity()})
    assert type(model[0]) is nn.Identity


def test_a_long_chain_and_many_layers() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(1000)))
    chain: Any = closing(model[7])
    for _ in range(100_000):
        chain = [chain]
    model.chain = chain
    (text,) = held_elsewhere(model, model.children())[model[7]]
    assert text.startswith("the closure of chain[0][0][0]")
