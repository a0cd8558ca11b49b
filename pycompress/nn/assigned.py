"""Modules that compute in another way than their class does, and are the same in all else: their class is assigned.

Children, parameters, names and state stay, and so do the name of the class and the signature of its forward. Copies and pickles
begin as such modules.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

import torch
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(getattr(torch.nn.modules.module, f"_global{name}") for name in HOOKS)


def assign(module: nn.Module, call: Any) -> None:
    """Has a module compute by ``call(module, args, kwargs) -> (result,)``; where that gives None, by its forward as ever.

    Args:
        call: hashable; pickles of the module hold it.
    """
    module.__class__ = _assigned_class(original_class(module), call)


def assigned(module: nn.Module) -> Any:
    """The ``call`` by which a module computes; None where it has none."""
    return vars(type(module)).get("assigned_call")


def restore(module: nn.Module) -> None:
    """Has a module compute by its forward again."""
    if assigned(module) is not None:
        module.__class__ = original_class(module)


def original_class(module: nn.Module) -> Any:
    """The class of a module, or the one that it had before."""
    return getattr(type(module), "original_class", type(module))


@cache
def _assigned_class(kind: Any, call: Any) -> Any:
    @wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = call(self, args, kwargs)
        return kind.forward(self, *args, **kwargs) if found is None else found[0]

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = super(made, self).__reduce_ex__(max(protocol, 2))
        return (_blank, (kind, call), *reduced[2:])

    own = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    own |= {"forward": forward, "__reduce_ex__": reduce_ex, "original_class": kind, "assigned_call": call}
    made: Any = type(kind.__name__, (kind,), own)
    return made


def _blank(kind: Any, call: Any) -> Any:
    """A module without state: how copies and pickles begin."""
    made = _assigned_class(kind, call)
    return made.__new__(made)


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether it is of this very class, and computes what its class does, with nobody watching."""
    return type(module) is kind and "forward" not in module.__dict__ and not is_watched(module)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody watches its calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def watched_everywhere() -> bool:
    """Whether somebody watches every module."""
    return any(GLOBAL_HOOKS)
