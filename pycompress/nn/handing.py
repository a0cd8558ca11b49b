"""Static int8 convolutions that hand on bytes: what the next one would make of their results, and it alone takes.

The numbers are those that it would quantize them to, so nothing changes but what is written and read: a byte where else four are.
Only inside a call of the module that :func:`install <pycompress.passes.handing.install>` found the pairs in: whoever calls a layer
by itself gets floats, and so does everybody where something is watched, trained, traced, or no longer as it was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from pycompress.nn.assigned import HOOKS, original_class, watched_everywhere
from pycompress.ops.checks import Ints, nobody_looks
from pycompress.ops.cpu import int8_conv

_LARGEST = 1e12  # of a result before its activation: no float overflows then, so that bytes lose no Inf

Walked = tuple[Ints, Ints, Ints, Ints, int]  # kernel size, stride, sides, dilation, groups
Kinds = tuple[tuple[str, str], ...]  # the name of each module, and that of its class
_active: ContextVar[_Call | None] = ContextVar("pycompress_handing", default=None)
_found: WeakKeyDictionary[nn.Module, _Links] = WeakKeyDictionary()


@dataclass(frozen=True)
class HandOn:
    """How a module computes inside which layers hand on bytes: see :mod:`pycompress.nn.assigned`.

    Attributes:
        pairs: the names of each that gives, and of the one that takes.
        kinds: of all modules inside, as they were when the pairs were found.
    """

    pairs: tuple[tuple[str, str], ...]
    kinds: Kinds

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any] | None:
        if is_compiling() or watched_everywhere():
            return None
        links = _found.get(module)
        if links is None or not links.holds():
            links = _found[module] = _Links.of(module, self)
        if not links.targets or links.watched():
            return None
        before = _active.set(_Call(links))
        try:
            return (original_class(module).forward(module, *args, **kwargs),)
        finally:
            _active.reset(before)


@dataclass(frozen=True)
class _Target:
    layer: nn.Module
    range: int8_conv.Target


@dataclass(frozen=True)
class _Links:
    """What the pairs of a module are, and what that rests on.

    Attributes:
        targets: for each layer that hands on, the one that takes.
        walks: what the op is told of the geometry of all of them.
        held: the places of the modules, of forwards of their own, which none has, and of the packed weights: a dictionary, a key,
            what stands there.
        hooks: all dictionaries of hooks.
    """

    targets: Mapping[nn.Module, _Target]
    walks: Mapping[nn.Module, Walked]
    held: list[tuple[dict[str, Any], str, Any]]
    hooks: list[Any]

    @classmethod
    def of(cls, module: nn.Module, call: HandOn) -> _Links:
        inside = [*module.modules()]
        held: list[tuple[dict[str, Any], str, Any]] = [
            (one._modules, key, child) for one in inside for key, child in one._modules.items()
        ]
        held += [(vars(one), "forward", None) for one in inside]
        targets: dict[nn.Module, _Target] = {}
        walks: dict[nn.Module, Walked] = {}
        if kinds_of(module) == call.kinds and not any(place.get(key) is not what for place, key, what in held):
            for names in call.pairs:
                pair: list[Any] = [module.get_submodule(name) for name in names]
                layer, taker = pair
                target = target_of(layer, taker)
                if target is not None:
                    targets[layer] = _Target(taker, target)
                    walks |= {one: (*one.geometry.plane, one.geometry.groups) for one in pair}
                held += [(one._buffers, "packed", one._buffers["packed"]) for one in pair]
        return cls(targets, walks, held, [getattr(one, name) for one in inside for name in HOOKS])

    def holds(self) -> bool:
        return all(place.get(key) is what for place, key, what in self.held)

    def watched(self) -> bool:
        return any(self.hooks)


@dataclass
class _Call:
    """One call of the module.

    Attributes:
        taking: the layers that get bytes next, and whether the channels of their results are to lie last.
    """

    links: _Links
    taking: dict[nn.Module, bool] = field(default_factory=dict)


def handed(layer: Any, x: Tensor) -> Tensor | None:
    """The result of an ``Int8Conv2d`` that takes bytes or hands them on; None where it does neither."""
    call = _active.get()
    if call is None:
        return None
    last = call.taking.pop(layer, None) if x.dtype is torch.uint8 else None
    target = call.links.targets.get(layer)
    if last is None:
        if target is None or layer.training or x.dtype is not torch.float32 or x.dim() != 4:
            return None
        if not x.is_cpu or not nobody_looks(x):
            return None
        last, x = int8_conv.is_channels_last(x), layer._image(x)
    own = layer._buffers
    y = int8_conv.hand_on(
        x, own["packed"], layer.form, own["bias"], *call.links.walks[layer], layer.activation,
        None if target is None else target.range, last,
    )  # fmt: skip
    if y is not None and target is not None:
        call.taking[target.layer] = last
    return y


def kinds_of(module: nn.Module) -> Kinds:
    """The classes of all modules inside."""
    return tuple(
        (name, f"{original_class(one).__module__}.{original_class(one).__qualname__}")
        for name, one in module.named_modules(remove_duplicate=False)
    )


def target_of(layer: Any, taker: Any) -> int8_conv.Target | None:
    """By what an ``Int8Conv2d`` quantizes for the next one; None where one of them has no fixed range, the next one repeats values
    around its input, or the first one's results may be so large that their activation overflows."""
    if not (layer.packed.is_cpu and taker.packed.is_cpu) or any(taker.geometry.repeated):
        return None
    own, target = (int8_conv.input_target(one.packed, one.form) for one in (layer, taker))
    if own is None or target is None:
        return None
    parts = layer._unpack()
    largest = float((parts["values"].abs().sum(dim=1, dtype=torch.float32) * parts["scale"]).max()) * own[2] * own[0]
    if layer.bias32 is not None:
        largest += float(layer.bias32.abs().max())
    return target if largest < _LARGEST else None
