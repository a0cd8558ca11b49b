"""Which static int8 convolutions hand on bytes, since others take them, and which add in their epilogue what the model adds behind
them (:mod:`pycompress.nn.handing`)."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from pycompress.nn.assigned import assign, assigned
from pycompress.nn.handing import Gift, HandOn, is_depthwise, kinds_of, target_of
from pycompress.nn.int8_conv import Int8Conv2d
from pycompress.passes.graph import Calls, Graph

_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELUS = (functional.relu, torch.relu, torch.relu_, "relu", "relu_")


def install(model: nn.Module) -> None:
    """Has static int8 convolutions hand on inside the largest modules whose way can be traced."""
    if not any(_is_static(module) for module in model.modules()):
        return
    if assigned(model) is None:
        calls = Graph(model).calls
        if calls is not None:
            if gifts := _gifts(calls):
                assign(model, HandOn(gifts, kinds_of(model)))
            return
    for child in model.children():
        install(child)


def _is_static(module: Any) -> bool:
    return type(module) is Int8Conv2d and bool(module.static)


@dataclass(frozen=True)
class _Sum:
    """Of a layer's result and something that was there before.

    Attributes:
        add: the call.
        last: that of the ReLU behind it, or the same.
    """

    add: fx.Node
    last: fx.Node


def _gifts(calls: Calls) -> tuple[Gift, ...]:
    sums = {
        layer: found
        for layer, nodes in calls.nodes.items()
        if _may_give(layer, calls) and (found := [*filter(None, (_sum(node, calls) for node in nodes))])
        and len(found) == len(nodes) and len({one.add is one.last for one in found}) == 1
    }  # fmt: skip
    adding = {one.add: layer for layer, found in sums.items() for one in found}
    gifts: list[Gift] = []
    for layer, nodes in calls.nodes.items():
        if _may_give(layer, calls):
            found = sums.get(layer, [])
            relu = any(one.add is not one.last for one in found)
            ends = [one.last for one in found] or nodes
            each = {_gift(layer, node, calls, adding, adds=bool(found), relu=relu) for node in ends}
            gifts.append(each.pop() if len(each) == 1 else Gift(calls.names[layer][0], adds=bool(found), relu=relu))
    return tuple(one for one in gifts if one.adds or one.inside)


def _may_give(layer: nn.Module, calls: Calls) -> bool:
    return _is_static(layer) and layer not in calls.read


def _gift(
    layer: Any, end: fx.Node, calls: Calls, adding: dict[fx.Node, nn.Module], *, adds: bool, relu: bool
) -> Gift:  # fmt: skip
    """What becomes of the results that the call gives."""
    name, readers = calls.names[layer][0], [*_readers(end, calls)]
    takers, adders = set[str](), list[fx.Node]()
    for reader in readers:
        module = calls.module(reader) if reader is not None and reader.op == "call_module" else None
        if module is not None and _takes(module, reader, calls) and target_of(layer, module) is not None:
            takers.add(calls.names[module][0])
        elif reader in adding and adding[reader] is not layer:
            adders.append(reader)
        else:
            return Gift(name, adds=adds, relu=relu)
    last = next((node for node in reversed(end.graph.nodes) if node in readers), None)
    into = len(adders) == 1 and adders[0] is last
    return Gift(name, tuple(sorted(takers)), len(adders), bool(readers), into, adds, relu)


def _takes(module: nn.Module, node: fx.Node | None, calls: Calls) -> bool:
    """Whether a call gives a static convolution one tensor and nothing else."""
    return node is not None and _may_give(module, calls) and len(node.args) == 1 and not node.kwargs


def _readers(node: fx.Node, calls: Calls) -> Iterator[fx.Node | None]:
    """The calls that take what another one gives, through modules that do nothing; and None where the model keeps it."""
    if node in calls.kept:
        yield None
    for user in node.users:
        if _does_nothing(user, calls):
            yield from _readers(user, calls)
        else:
            yield user


def _does_nothing(node: fx.Node, calls: Calls) -> bool:
    return node.op == "call_module" and type(calls.module(node)) is nn.Identity


def _is(node: fx.Node, functions: tuple[Any, ...]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in functions


def _next(node: fx.Node, calls: Calls) -> fx.Node | None:
    """The only call that takes what another one gives, where nothing is done between the two."""
    readers = [*_readers(node, calls)]
    behind = node.next
    while _does_nothing(behind, calls):
        behind = behind.next
    return behind if readers == [behind] else None


def _sum(node: fx.Node, calls: Calls) -> _Sum | None:
    """What adds to the result of a layer; None where that is not what happens next."""
    layer: Any = calls.module(node)
    add = _next(node, calls)
    if add is None or not _is(add, _ADDS) or is_depthwise(layer) or layer.activation != "none":
        return None
    if len(add.args) != 2 or add.kwargs or len(add.all_input_nodes) != 2:
        return None
    relu = _next(add, calls)
    if relu is not None and (_is(relu, _RELUS) or (relu.op == "call_module" and type(calls.module(relu)) is nn.ReLU)):
        return _Sum(add, relu)
    return _Sum(add, add)
