"""Whether a module still computes what its class says: somebody may have hooked it, or given it a forward of its own."""

from __future__ import annotations

import sys
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from pycompress.kinds.pruned import has_foreign_hooks, pruned_names

_TENSORS = ("weight", "bias")


def alteration(module: nn.Module) -> str:
    """Why a module may do something else than its class says, or ''.

    Other attributes that somebody gave it do not count: they are carried over to what takes its place (:func:`surgery.swap`).
    """
    if has_foreign_hooks(module):
        return "it has hooks, which would be lost"
    if code := replaced_code(module):
        return code
    tensors: set[str] = {*_TENSORS, *getattr(module, "_flat_weights_names", ())}  # (of a recurrent layer)
    for name in tensors - {"bias"} - pruned_names(module):
        if name in vars(module):
            return f"its {name} is neither a parameter nor a buffer: who sets it may set it anew"
    pruning = {f"{name}_{part}" for name in pruned_names(module) for part in ("orig", "mask")}
    for name in (*module._parameters, *module._buffers, *module._modules) if _is_known(type(module)) else ():
        if name not in tensors | pruning:
            return f"it has a {name} besides, which would be lost"
    return ""


def replaced_code(module: nn.Module) -> str:
    """What of a module's code is not its class's, or of its class's not what torch or transformers wrote, or ''."""
    kind = type(module)
    for name, value in vars(module).items():
        if callable(getattr(kind, name, None)) and not _is_bound(value, name, module):
            return f"its {name} is its own, not that of its class"
    if not _is_known(kind):
        return ""
    for name in ("forward", "_conv_forward"):
        owner = next((base for base in kind.__mro__ if name in vars(base)), None)
        function: Any = vars(owner)[name] if owner else None
        if owner and not (
            type(function) is FunctionType and function.__globals__ is vars(sys.modules[owner.__module__])
        ):
            return f"the {name} of {kind.__name__} was replaced by another"
    if any(getattr(kind, name) is not getattr(nn.Module, name) for name in ("__call__", "_call_impl")):
        return f"the way in which {kind.__name__} is called was replaced by another"
    return ""


def _is_known(kind: type) -> bool:
    """Of the classes of torch and transformers, it is known what they define and what their modules hold."""
    return kind.__module__.partition(".")[0] in ("torch", "transformers")


def _is_bound(value: object, name: str, module: nn.Module) -> bool:
    """Whether an attribute is the class's own method, as some leave it there when they take theirs away."""
    if not isinstance(value, MethodType):
        return False
    return value.__self__ is module and value.__func__ is getattr(type(module), name, None)
