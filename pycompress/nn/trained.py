"""Dense layers that train as their compressed ones compute.

A twin is the module itself, by another class: the same parameters under the same names, so optimizers, hooks, ties and checkpoints
go on. In training mode it computes with the image of its weight and rounds its input as the kernel does; in evaluation mode the
compressed layer runs. A low-rank weight is trained as two factors, which are parameters beside the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pycompress.kinds import Kind, kind_of
from pycompress.methods.held import Held, HeldFactors
from pycompress.nn.assigned import assign, original_class, restore
from pycompress.nn.layer import CompressedLayer
from pycompress.nn.layers import layer_for
from pycompress.nn.rounded import rounded_rows
from pycompress.weights import LowRankWeight, Weight

_STATE = "_pycompress_trained"
_FACTORS = ("low_rank_down", "low_rank_up")


class _State:
    """What a twin has besides the module's own: its kind, what holds its weight, and the compressed layer that ran last."""

    def __init__(self, kind: Kind, held: Held | HeldFactors) -> None:
        self.kind, self.held = kind, held
        self.native: tuple[list[Tensor], CompressedLayer] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "native": None}


def can_train(module: nn.Module, held: Held | HeldFactors) -> bool:
    """Whether there is a compressed layer for it that is not recurrent; of factors, a linear one."""
    kind = kind_of(module)
    if kind is None or kind.recurrent or layer_for(kind, held.name) is None:
        return False
    return not isinstance(held, HeldFactors) or (kind.dims == 1 and not kind.tokens)


def train_as(module: nn.Module, held: Held | HeldFactors, start: Weight | None = None) -> None:
    """Makes a twin of a dense module.

    Args:
        held: what makes the compressed weight, and its image: ``Projected(method)``, or what ``held(weight)`` gives; factors
            need a ``start``.
        start: the compressed weight to begin with, which is written into the module's; None: the module's own.
    Raises:
        ValueError: the module cannot be trained as such a layer.
    """
    kind = kind_of(module)
    if kind is None or not can_train(module, held):
        raise ValueError(f"train_as: a {type(module).__name__} cannot be trained with a weight {held.name}")
    if isinstance(held, HeldFactors):
        if not isinstance(start, LowRankWeight):
            raise ValueError(f"train_as: the start is {start!r}, expected a LowRankWeight for factors")
        for name, factor in zip(_FACTORS, start.factors(), strict=True):
            module.register_parameter(name, nn.Parameter(factor.clone()))
        kind.stored(module).requires_grad_(False)  # it only stands there
    elif start is not None:
        with torch.no_grad():
            weight = kind.stored(module)
            weight.copy_(kind.as_weight(start.decompress(), kind.geometry(module)))
    vars(module)[_STATE] = _State(kind, held)
    assign(module, _call)


def is_trained(module: nn.Module) -> bool:
    """Whether it is a twin."""
    return _STATE in vars(module)


def canonical(module: nn.Module) -> Weight:
    """The compressed weight of a twin, as its parameters are now."""
    state: _State = vars(module)[_STATE]
    if isinstance(state.held, HeldFactors):
        return state.held.compress(*factors(module))
    return state.held.compress(state.kind.matrix(module).detach())


def holder(module: nn.Module) -> Held | HeldFactors:
    """What holds the weight of a twin."""
    state: _State = vars(module)[_STATE]
    return state.held


def hold(module: nn.Module, held: Held | HeldFactors) -> None:
    """Gives a twin what holds its weight from now on, or says that it has changed."""
    state: _State = vars(module)[_STATE]
    state.held, state.native = held, None


@contextmanager
def as_dense(model: nn.Module) -> Iterator[dict[str, Weight]]:
    """Within, the twins of a model are what they were made of, with nothing that tells them apart; what they compute with is given:
    the compressed weight of each, by name. Those that are still in the model go on afterwards."""
    twins = {name: module for name, module in model.named_modules() if is_trained(module)}
    weights: dict[int, Weight] = {}  # what several share is shared
    given = {name: weights.setdefault(_same(module), canonical(module)) for name, module in twins.items()}
    before = [(module, vars(module).pop(_STATE), _pop(module)) for module in twins.values()]
    for module in twins.values():
        restore(module)
    try:
        yield given
    finally:
        for module, state, factors in before:
            vars(module)[_STATE] = state
            module._parameters.update(factors)
            assign(module, _call)


def _same(module: nn.Module) -> int:
    """Alike for twins that have one weight, held alike."""
    state: _State = vars(module)[_STATE]
    return hash((id(state.kind.stored(module)), id(state.held)))


def _pop(module: nn.Module) -> dict[str, nn.Parameter | None]:
    return {name: module._parameters.pop(name) for name in _FACTORS if name in module._parameters}


def factors(module: nn.Module) -> tuple[Tensor, Tensor]:
    """The parameters of a twin that is trained as factors: down [r, k] and up [n, r]."""
    down, up = (module._parameters[name] for name in _FACTORS)
    assert down is not None
    assert up is not None
    return down, up


def _call(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any]:
    state: _State = vars(module)[_STATE]
    if not module.training:
        return (_native(module, state)(*args, **keywords),)
    state.native = None  # it would be a second copy of the weights
    (x,) = (*args, *keywords.values())
    if isinstance(state.held, HeldFactors):
        return (_with_factors(module, state, state.held, x),)
    if state.held.activation_bits != 16:
        together = state.kind.quantized_together(x)
        x = rounded_rows(together, state.held.activation_bits, state.held.input_range).view(x.shape)
    image = state.held.image(state.kind.matrix(module))
    vars(module)["weight"] = state.kind.as_weight(image, state.kind.geometry(module))  # found before the parameter is
    try:
        return (original_class(module).forward(module, x),)
    finally:
        del vars(module)["weight"]


def _with_factors(module: nn.Module, state: _State, held: HeldFactors, x: Tensor) -> Tensor:
    down, up = held.images(*factors(module))
    inner = linear(rounded_rows(x, held.activation_bits), down)
    y = linear(rounded_rows(inner, held.activation_bits), up, state.kind.bias(module))
    return y if held.residual is None else y + linear(rounded_rows(x, held.residual_bits), held.residual)


def _native(module: nn.Module, state: _State) -> CompressedLayer:
    """The compressed layer of the parameters as they are now; the last one, where they hold the same numbers.

    Compared are the numbers: the version counter of a tensor does not move with a fused optimizer, nor with what is done to
    ``.data``.
    """
    sources = [parameter.detach() for parameter in module._parameters.values() if parameter is not None]
    sources += [tensor.detach() for tensor in state.held.learned()]
    if state.native is not None:
        before, layer = state.native
        if len(before) == len(sources) and all(map(torch.equal, before, sources)):
            return layer
    weight = canonical(module)
    kind = layer_for(state.kind, weight.name)
    assert kind is not None
    layer = kind.replacing(module, weight)
    state.native = [source.clone() for source in sources], layer
    return layer
