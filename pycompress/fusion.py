"""Which activation follows a linear layer directly, so that the layer's kernel can apply it while the result is in registers."""

from __future__ import annotations

import torch.fx
from torch import nn

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


def followers(parent: nn.Module) -> dict[str, tuple[str, str]]:
    """Linear children of ``parent`` whose result goes into one activation child and nowhere else.

    Found by tracing the parent's ``forward`` symbolically (torch.fx) with its children as leaves; a forward that cannot be traced
    has no followers. Children that are called more than once are left out.

    Returns:
        {name of the linear child: (name of the activation child, the kernels' name of the activation)}
    """
    activations = {
        name: kind for name, child in parent.named_children() if (kind := activation_name(child)) is not None
    }
    if not activations or len(list(parent.children())) < 2:
        return {}
    try:
        graph = _ChildrenAreLeaves().trace(parent)
    except Exception:
        return {}
    calls = [node for node in graph.nodes if node.op == "call_module"]
    found: dict[str, tuple[str, str]] = {}
    for node in calls:
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if node.target not in activations or not isinstance(source, torch.fx.Node) or source.op != "call_module":
            continue
        once = all(sum(other.target == target for other in calls) == 1 for target in (node.target, source.target))
        if once and len(source.users) == 1 and "." not in str(node.target):
            found[str(source.target)] = (str(node.target), activations[str(node.target)])
    return found
