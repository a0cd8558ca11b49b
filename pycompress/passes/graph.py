"""Which module takes what another one gives: from the traced graph of a model or, where it cannot be traced, from its source.

A graph knows one way through ``forward``. So it is traced with and without gradients, and with and without each argument that may
be left out; a model that has many of these, or whose way depends on numbers, is read instead.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, combinations
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from pycompress.calls import evaluating
from pycompress.kinds import has_foreign_hooks, replaced_code
from pycompress.nn import CompressedLayer
from pycompress.passes.activations import read_pairs
from pycompress.passes.code import graph_of
from pycompress.surgery import Swap, names_of

_OPTIONAL = 2  # arguments: with each more there are twice as many ways

Between = Callable[[Any], bool]
Sources = dict[nn.Module, "nn.Module | str"]


class Graph:
    """What is known of the way through a model."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._calls = model, _traced(model)

    @property
    def traced(self) -> bool:
        """Whether the model could be traced; else it was read."""
        return self._calls is not None

    @property
    def calls(self) -> Calls | None:
        """All calls of modules, where it was traced."""
        return self._calls

    def sources(self, between: Between) -> Sources:
        """{module: the one whose results it takes, each of them, and nothing else does; or a text that says why there is none}.

        Args:
            between: which modules, and which functions and names of methods of one tensor, may stand between the two.
        """
        calls = self._calls
        if calls is None:
            return _read(self._model, between)
        walks = {module: [_source(node, calls, between) for node in nodes] for module, nodes in calls.nodes.items()}
        taken = {module: {node for node in walk if not isinstance(node, str)} for module, walk in walks.items()}
        found: Sources = {}
        for module, walk in walks.items():
            if text := next((one for one in walk if isinstance(one, str)), ""):
                found[module] = text
                continue
            first, *others = {calls.module(node) for node in taken[module]}
            if others:
                found[module] = "it is used in several places, behind different modules"
            elif taken[module] != {*calls.nodes[first]}:
                found[module] = f"{calls.names[first][0]} is used elsewhere, too"
            elif name := calls.hooked_between(first, module):
                found[module] = f"{name} has hooks, which would see something else"
            else:
                found[module] = first
        return found

    def same_without(self, modules: Iterable[nn.Module]) -> bool:
        """Whether it is the same where these are ``nn.Identity``: the code asks for no more of them than what they give. Of what
        was read that is known."""
        if self._calls is None:
            return True
        change = Swap(self._model, {module: nn.Identity() for module in modules})
        change.do()
        try:
            calls = _traced(self._model)
        finally:
            change.undo()
        return calls is not None and calls.steps == self._calls.steps


# --- traced ---------------------------------------------------------------------------------------------------------------


class Calls:
    """The calls of modules in all graphs of a model.

    Attributes:
        nodes: the calls of each module.
        names: of the model's modules.
        steps: what is called, one behind the other.
        kept: what the model keeps of a run, so that others may read it.
        read: modules whose parameters or buffers other code reads, or that are inside one that is not looked into.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = names_of(model)
        self._modules = {name: module for module, names in self.names.items() for name in names}
        self.nodes: dict[nn.Module, list[fx.Node]] = {}
        self.kept: set[fx.Node] = set()
        self.read: set[nn.Module] = set()
        self.steps: list[tuple[str, str]] = []

    def add(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            constant = node.op == "get_attr" and node.target.startswith(
                "_tensor_constant"
            )  # numbered by fx, anew at times
            self.steps.append((node.op, "" if constant else _called(node)))
            if node.op == "call_module":
                module = self.module(node)
                self.nodes.setdefault(module, []).append(node)
                self.read.update(inner for inner in module.modules() if inner is not module)
            elif node.op == "get_attr":
                self.read.add(self._modules[node.target.rpartition(".")[0]])

    def module(self, node: fx.Node) -> nn.Module:
        return self._modules[str(node.target)]

    def hooked_between(self, first: nn.Module, second: nn.Module) -> str:
        """The name of a module that holds one of two and not the other, and has hooks, or ''."""
        around = [
            {name for own in self.names[module] for name in accumulate(own.split(".")[:-1], "{}.{}".format)}
            for module in (first, second)
        ]
        return next((name for name in sorted(around[0] ^ around[1]) if has_foreign_hooks(self._modules[name])), "")


class _Proxy(fx.Proxy):
    """One that the code of a model, though not torch's own, takes for what it stands for: ``isinstance(x, Tensor)``."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asking = str(sys._getframe(1).f_globals.get("__name__"))
        return fx.Proxy if asking.partition(".")[0] == "torch" else Tensor


class _Tracer(fx.Tracer):
    """Attributes: ``stuck``: the way depends on numbers, though code may have caught the error that says so."""

    proxy_buffer_attributes = True
    stuck = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, CompressedLayer) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.stuck = True
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        before, self.stuck = self.stuck, True
        found = super().iter(obj)  # which raises, but where it is only unpacked
        self.stuck = before
        return found


def _traced(model: nn.Module) -> Calls | None:
    """None where it cannot be traced."""
    calls = Calls(model)
    if (graph := graph_of(model)) is not None:
        calls.add(graph)
        return calls
    if replaced_code(model) or type(model).__call__ is not nn.Module.__call__:
        return None  # what is traced is the forward of its class
    try:
        for defaults in _given_defaults(model):
            for gradients in (False, True):
                with evaluating(model), torch.set_grad_enabled(gradients):
                    tracer = _Tracer()
                    calls.add(tracer.trace(model, concrete_args=defaults))
                    if tracer.stuck:
                        return None
                    kept = tree_leaves([vars(module) for module in model.modules()])
                    calls.kept.update(one.node for one in kept if issubclass(type(one), fx.Proxy))
    except Exception:  # whatever the model does with what is no tensor
        return None
    return calls


def _given_defaults(model: nn.Module) -> Iterator[dict[str, Any] | None]:
    """The arguments that are left out in each way to call the model, with their defaults."""
    arguments = inspect.signature(model.forward).parameters.values()
    optional = {one.name: one.default for one in arguments if one.default is not one.empty}
    if len(optional) > _OPTIONAL or any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in arguments):
        raise ValueError("too many ways to call it")
    for count in range(len(optional) + 1):
        for names in combinations(optional, count):
            yield {name: optional[name] for name in names} or None


def _source(node: fx.Node, calls: Calls, between: Between) -> fx.Node | str:
    """The call whose result a call takes, and nothing else does; or why there is none."""
    while True:
        if node.op == "call_module":
            if (module := calls.module(node)) in calls.read:
                return f"other code reads the tensors of {calls.names[module][0]}"
            if len(node.args) + len(node.kwargs) != 1:
                return f"{_called(node)} is called with more than a tensor"
        if len(node.all_input_nodes) != 1:
            return f"{_called(node)} takes more than one tensor"
        (node,) = node.all_input_nodes
        if node.op in ("placeholder", "get_attr"):
            return "no layer stands before it"
        if len(node.users) != 1 or node in calls.kept:
            return f"what {_called(node)} gives is used elsewhere, too"
        what = calls.module(node) if node.op == "call_module" else node.target
        if not between(what):
            read = what in calls.read if isinstance(what, nn.Module) else False
            return node if node.op == "call_module" and not read else f"{_called(node)} comes before it"
        if isinstance(what, nn.Module) and (has_foreign_hooks(what) or replaced_code(what)):
            return f"{_called(node)}, which comes before it, has hooks or a forward of its own"


def _called(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


# --- read -----------------------------------------------------------------------------------------------------------------


def _read(model: nn.Module, between: Between) -> Sources:
    pairs = read_pairs(model, [module for module in model.modules() if module._modules])
    before = {second: first for first, second in pairs}
    found: Sources = dict.fromkeys(model.modules(), "the source of the model does not say what comes before it")
    for module, nearest in before.items():
        first: nn.Module | None = nearest
        while first is not None and between(first) and not has_foreign_hooks(first) and not replaced_code(first):
            first = before.get(first)
        if first is not None:
            found[module] = first
    return found
