"""What torch.nn.utils.prune leaves of a layer.

It keeps ``weight_orig`` and ``weight_mask``, and a hook sets ``weight`` to their product before each call; what ``weight`` holds
between two calls may be out of date.
"""

from __future__ import annotations

from collections import OrderedDict
from copy import copy

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod


def pruned_names(module: nn.Module) -> set[str]:
    """The names of the tensors that torch.nn.utils.prune masks before each call of this module."""
    return {hook._tensor_name for hook in module._forward_pre_hooks.values() if isinstance(hook, BasePruningMethod)}


def has_foreign_hooks(module: nn.Module) -> bool:
    """Somebody else than torch.nn.utils.prune, pruning weight or bias, has hooks here, of whatever sort."""
    return any(
        not (name == "_forward_pre_hooks" and _only_prunes(module))
        for name, hooks in vars(module).items()
        if "hooks" in name and isinstance(hooks, dict) and hooks
    )


def _only_prunes(module: nn.Module) -> bool:
    pruning = all(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())
    return pruning and pruned_names(module) <= {"weight", "bias"}


def current(module: nn.Module, name: str) -> Tensor | None:
    """The tensor with which a module computes, masked where it is pruned."""
    if name not in pruned_names(module):
        tensor = getattr(module, name)
        assert tensor is None or isinstance(tensor, Tensor)
        return tensor
    stored, mask = getattr(module, f"{name}_orig"), getattr(module, f"{name}_mask")
    product: Tensor = stored.detach() * mask.to(stored.dtype)
    return product


def without_pruning(module: nn.Module) -> nn.Module:
    """A pruned module as ``torch.nn.utils.prune.remove`` would leave it, masked once and for all; others as they are."""
    names = pruned_names(module)
    if not names:
        return module
    plain = copy(module)
    plain._forward_pre_hooks = OrderedDict()
    plain._parameters, plain._buffers = dict(module._parameters), dict(module._buffers)
    for name in names:
        plain.__dict__.pop(name, None)
        del plain._parameters[f"{name}_orig"], plain._buffers[f"{name}_mask"]
        tensor = current(module, name)
        assert tensor is not None
        plain._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return plain
