"""Static int8 convolutions that hand on bytes: what the next one would make of their results; and that add in their epilogue what
the model adds behind them.

The numbers are those that come without, so nothing changes but what is written and read: a byte where else four are, and no sum by
itself. Only inside a call of the module that :func:`install <pycompress.passes.handing.install>` found them in: whoever calls a
layer by itself gets floats, and so does everybody where something is watched, trained, traced, or no longer as it was found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from pycompress.nn.assigned import HOOKS, assigned, original_class, watched_everywhere
from pycompress.nn.given import Awaited, Convolution, Plan, Walked, claim_of
from pycompress.ops.checks import nobody_looks
from pycompress.ops.cpu import int8_conv

_FEW = 1 << 16  # numbers that torch adds in less time than it takes to hand them over, where their channels lie last
_LARGEST = 1e12  # of a result before its activation: no float overflows then, so that bytes lose no Inf

Kinds = tuple[tuple[str, str], ...]  # the name of each module, and that of its class
_active: ContextVar[_Links | None] = ContextVar("pycompress_handing", default=None)
_found: WeakKeyDictionary[nn.Module, _Links] = WeakKeyDictionary()


@dataclass(frozen=True)
class Gift:
    """What becomes of the results of a layer.

    Attributes:
        layer: its name.
        takers: the names of the static convolutions that take them.
        adders: how many layers add them to their own results.
        inside: whether nobody else reads them.
        into: whether the last reader adds, and may do so in place.
        adds: whether the layer first adds what the model adds behind it.
        relu: whether a ReLU follows the sum, which the layer computes too.
    """

    layer: str
    takers: tuple[str, ...] = ()
    adders: int = 0
    inside: bool = False
    into: bool = False
    adds: bool = False
    relu: bool = False


@dataclass(frozen=True)
class HandOn:
    """How a module computes inside which layers hand on bytes: see :mod:`pycompress.nn.assigned`.

    Attributes:
        kinds: of all modules inside, as they were when the gifts were found.
    """

    gifts: tuple[Gift, ...]
    kinds: Kinds

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any] | None:
        if is_compiling() or watched_everywhere():
            return None
        links = _found.get(module)
        if links is None or not links.holds():
            links = _found[module] = _Links.of(module, self)
        if not links.plans or links.watched():
            return None
        before = _active.set(links)
        try:
            return (original_class(module).forward(module, *args, **kwargs),)
        finally:
            _active.reset(before)


@dataclass(frozen=True)
class _Links:
    """What the gifts of a module are, and what that rests on.

    Attributes:
        plans: of each layer that gives.
        ranges: of each layer that takes.
        walks: what the op is told of the geometry of all of them.
        held: the places of the modules, of forwards of their own, which none has, and of the packed weights: a dictionary, a key,
            what stands there.
        hooks: all dictionaries of hooks.
    """

    plans: Mapping[nn.Module, Plan]
    ranges: Mapping[nn.Module, int8_conv.Target | None]
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
        plans: dict[nn.Module, Plan] = {}
        ranges: dict[nn.Module, int8_conv.Target | None] = {}
        walks: dict[nn.Module, Walked] = {}
        if kinds_of(module) == call.kinds and not any(place.get(key) is not what for place, key, what in held):
            for gift in call.gifts:
                layer: Any = module.get_submodule(gift.layer)
                takers: list[Any] = [module.get_submodule(name) for name in gift.takers]
                plan = _plan(gift, layer, takers)
                if plan is not None:
                    plans[layer] = plan
                    ranges |= {taker: target_of(layer, taker) for taker in takers}
                    walks |= {one: (*one.geometry.plane, one.geometry.groups) for one in (layer, *takers)}
                held += [(one._buffers, "packed", one._buffers["packed"]) for one in (layer, *takers)]
        return cls(plans, ranges, walks, held, [getattr(one, name) for one in inside for name in HOOKS])

    def holds(self) -> bool:
        return all(place.get(key) is what for place, key, what in self.held)

    def watched(self) -> bool:
        return any(self.hooks)


def _plan(gift: Gift, layer: Any, takers: list[Any]) -> Plan | None:
    """None where the layer does nothing but what it does anyhow."""
    ranges = [target_of(layer, taker) for taker in takers]
    target = next(filter(None, ranges), None)
    alone = target is not None and not gift.adders and all(one == target for one in ranges)
    if gift.adds or alone or (gift.inside and not is_depthwise(layer)):
        return Plan(target, alone, gift.inside, gift.into, gift.adds, gift.relu)
    return None


def handed(layer: Any, x: Tensor) -> Tensor | None:
    """The result of an ``Int8Conv2d`` that takes bytes, hands them on or has something added; None where it does none of it."""
    links = _active.get()
    if links is None or layer not in links.walks:
        return None
    plan, claim = links.plans.get(layer), claim_of(x)
    if claim is None:
        if plan is None or layer.training or x.dtype is not torch.float32 or x.dim() != 4:
            return None
        if not x.is_cpu or not nobody_looks(x):
            return None
        last, image = int8_conv.is_channels_last(x), layer._image(x)
    else:
        last, image = claim.channels_last, x
        if claim.beside is not None and claim.range == links.ranges.get(layer):
            image = claim.beside
        elif x.dtype is not torch.uint8:
            image = layer._image(x)
    call = Convolution(layer, links.walks[layer], image, last)
    if plan is not None and plan.adds:
        few = last and math.prod(call.shape) < _FEW
        return call.floats() if few else Awaited.of(call, plan)
    y = None if plan is None else call.give(plan)
    return call.floats() if y is None else y


def sums_in(model: nn.Module) -> dict[nn.Module, str]:
    """What a table says of the layers that add what the model adds behind them."""
    return {
        module.get_submodule(gift.layer): f"adds what is added behind it{', then relu' if gift.relu else ''}"
        for module in model.modules()
        if isinstance(call := assigned(module), HandOn)
        for gift in call.gifts
        if gift.adds
    }


def kinds_of(module: nn.Module) -> Kinds:
    """The classes of all modules inside."""
    return tuple(
        (name, f"{original_class(one).__module__}.{original_class(one).__qualname__}")
        for name, one in module.named_modules(remove_duplicate=False)
    )


def is_depthwise(layer: Any) -> bool:
    """Whether an ``Int8Conv2d`` convolves each channel alone."""
    return bool(layer.geometry.groups == layer.n and layer.k == math.prod(layer.geometry.plane[0]))


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
