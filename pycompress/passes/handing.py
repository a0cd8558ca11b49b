"""Which static int8 convolutions take what another one gives, all of it and only that: they are handed bytes
(:mod:`pycompress.nn.handing`)."""

from __future__ import annotations

from torch import nn

from pycompress.nn.assigned import assign, assigned
from pycompress.nn.handing import HandOn, kinds_of, target_of
from pycompress.nn.int8_conv import Int8Conv2d
from pycompress.passes.graph import Graph
from pycompress.surgery import names_of


def install(model: nn.Module) -> None:
    """Has static int8 convolutions hand on bytes inside the largest modules whose way can be traced."""
    if sum(_is_static(module) for module in model.modules()) < 2:
        return
    if assigned(model) is None:
        graph = Graph(model)
        if graph.traced:
            if pairs := _pairs(model, graph):
                assign(model, HandOn(pairs, kinds_of(model)))
            return
    for child in model.children():
        install(child)


def _is_static(module: nn.Module) -> bool:
    return type(module) is Int8Conv2d and bool(module.static)


def _pairs(model: nn.Module, graph: Graph) -> tuple[tuple[str, str], ...]:
    names = names_of(model)
    found = graph.sources(lambda what: type(what) is nn.Identity)
    return tuple(
        (names[layer][0], names[taker][0])
        for taker, layer in found.items()
        if isinstance(layer, nn.Module)
        and _is_static(taker)
        and _is_static(layer)
        and target_of(layer, taker) is not None
    )
