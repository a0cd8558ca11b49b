"""An activation that follows a layer directly goes into its kernel, which applies it while the result is in registers."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch.fx
from torch import nn

from pycompress.passes.edit import Edit
from pycompress.plan import Target
from pycompress.surgery import split

# Transformers has classes of its own for the same functions; by name, because the package need not be installed.
_BY_NAME = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "SiLUActivation": "silu",
}


def activation_name(module: nn.Module) -> str | None:
    """The kernels' name of this activation module, None for any other module."""
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is nn.SiLU:
        return "silu"
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if type(module).__module__ == "transformers.activations":
        return _BY_NAME.get(type(module).__name__)
    return None


class _ChildrenAreLeaves(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return True


def _calls(parent: nn.Module, training: bool) -> list[torch.fx.Node]:
    """The calls of children in ``parent.forward``, traced on a stand-in so that what forward assigns stays off the parent."""
    stand_in = copy(parent)
    stand_in.__dict__.update({name: dict(value) for name, value in vars(parent).items() if isinstance(value, dict)})
    stand_in.training = training
    graph = _ChildrenAreLeaves().trace(stand_in)
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        return []  # a branch on another argument would be traced one way only
    return [node for node in graph.nodes if node.op == "call_module"]


def _pairs(calls: list[torch.fx.Node], activations: dict[str, str]) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for node in calls:
        target = str(node.target)
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if target not in activations or not isinstance(source, torch.fx.Node) or source.op != "call_module":
            continue
        once = all(sum(other.target == name for other in calls) == 1 for name in (node.target, source.target))
        if once and len(source.users) == 1:
            found[str(source.target)] = (target, activations[target])
    return found


def has_hooks(module: nn.Module) -> bool:
    """Somebody watches the calls or the gradients of this module."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def followers(parent: nn.Module) -> dict[str, tuple[str, str]]:
    """Children of ``parent`` whose result goes into one activation child and nowhere else.

    Found by tracing the parent's ``forward`` symbolically (torch.fx) with its children as leaves, in training and in evaluation;
    a forward that cannot be traced has no followers. Left out are children that are called more than once, and activations that
    have hooks or two names. What other code does with the children, past this forward, cannot be seen from here.

    Returns:
        {name of the child: (name of the activation child, the kernels' name of the activation)}
    """
    children = {name: child for name, child in parent._modules.items() if child is not None}
    activations = {
        name: kind
        for name, child in children.items()
        if (kind := activation_name(child)) and not has_hooks(child) and sum(c is child for c in children.values()) == 1
    }
    if not activations or len(children) < 2:
        return {}
    try:
        trained, evaluated = (_pairs(_calls(parent, training), activations) for training in (True, False))
    except Exception:
        return {}
    return {name: pair for name, pair in trained.items() if evaluated.get(name) == pair}


def take_over(model: nn.Module, targets: Sequence[Target]) -> list[Edit]:
    """An activation that follows a layer wherever it is used becomes the layer's; the module leaves its place."""
    known: dict[str, dict[str, tuple[str, str]]] = {}
    edits = []
    for target in targets:
        if not target.kind.epilogue:
            continue
        hits = []
        for name in filter(None, target.names):
            parent, attribute = split(name)
            if parent not in known:
                known[parent] = followers(model.get_submodule(parent))
            if attribute in known[parent]:
                activation, kind = known[parent][attribute]
                hits.append((f"{parent}.{activation}".lstrip("."), kind))
        alike = len(hits) == len(target.names) and len({kind for _, kind in hits}) == 1
        if hits and alike:
            edits.append(Edit(target, activation=hits[0][1], emptied=[name for name, _ in hits]))
    return edits
