"""Equalization (Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", 1906.04721).

Between a layer and the one that takes its results each channel may have any scale: ``W2 S f(S^-1 (W1 x + b1))`` is
``W2 f(W1 x + b1)`` where ``f(s x) = s f(x)`` for all s above 0, as for a ReLU. With ``s = sqrt(r1 / r2)`` the largest weight of the
channel's row, r1, and that of its column, r2, become equal: one scale for the whole of a weight then fits all its channels, and the
numbers between the layers come closer to each other, too.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from pycompress.calls import Inputs, uncompiled
from pycompress.copying import copied
from pycompress.kinds.folded import LAYERS, as_weight, by_group, channels_of
from pycompress.nn.layer import REMARK
from pycompress.passes import whole
from pycompress.passes.graph import Graph, Sources
from pycompress.passes.layers import Obstacles, random_input, rounding
from pycompress.passes.trial import tried
from pycompress.surgery import names_of

ModelT = TypeVar("ModelT", bound=nn.Module)

_ONE_BY_ONE = {
    nn.Identity, nn.Dropout, nn.ReLU, nn.LeakyReLU, nn.PReLU, torch.relu, torch.relu_, functional.relu, functional.leaky_relu,
    functional.dropout, "relu", "relu_", "contiguous",
}  # fmt: skip
_IN_A_CHANNEL = {
    nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d,
    nn.ReflectionPad2d, nn.ReplicationPad2d, nn.Upsample, functional.max_pool2d, functional.avg_pool2d,
    functional.adaptive_avg_pool2d,
}  # fmt: skip
_MOST = 256.0  # a scale, and 1 / _MOST the least: of a channel without weights a bias may be left, and no weights are divided by 0
_CONVERGED, _ROUNDS = 1e-3, 100  # of the logarithm of a scale


@dataclass(frozen=True)
class _Pair:
    """A layer, and the one that takes its results."""

    done: ClassVar[str] = "equalized"
    emptied: ClassVar[None] = None
    first: Any
    second: Any
    name: str
    reason: str = ""

    def hooks(self) -> list[RemovableHandle]:
        """Scales the channels between the two by powers of 2, which round nothing."""
        channels = channels_of(self.first)[1]
        powers = 2.0 ** (torch.arange(channels, dtype=torch.float32, device="cpu") % 5 - 2)
        scale = powers.view(-1, *[1] * (self.first.weight.dim() - 2)).to(self.first.weight)
        return [
            self.first.register_forward_hook(lambda _, __, y: y / scale),
            self.second.register_forward_pre_hook(lambda _, x: x[0] * scale),
        ]


def equalize(model: ModelT, example_inputs: Inputs | None = None, *, inplace: bool = False) -> ModelT:
    """Makes the weights of layers that follow each other alike in range, channel by channel; the model computes what it did.

    This is for formats with one scale for a whole weight, or its inputs: depthwise convolutions lose most without it. Norms have to
    be folded before (:func:`fold_norms`). Pairs are layers of one kind (linear, convolutions in as many dimensions) with ReLU,
    LeakyReLU, PReLU, dropout or, of convolutions, pooling or padding in between; ReLU6 and others that do not scale with their
    input are left out. Channels are scaled by 1/256 to 256, those without weights not at all.

    Args:
        model: in evaluation mode.
        example_inputs: a tensor, a sequence of positional or a mapping of keyword arguments. What changes a result of the model is
            left out.
        inplace: change ``model`` itself, the numbers of its parameters; otherwise a copy is returned, which shares nothing with it,
            except functions.
    Returns:
        The model with other weights. :func:`summary` has a note for each layer: with which one before it is equalized, or why not.
    Raises:
        TypeError: no module; or it holds something that cannot be copied (it is named).
        ValueError: the model is in training mode.
        RuntimeError: two layers compute something else with the scales than without.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"equalize: model is {type(model).__name__}, expected a torch.nn.Module")
    given, plain = model, uncompiled(model)
    if plain.training:
        raise ValueError("equalize: the model is in training mode, expected model.eval() before")
    with whole.without(plain):
        result = plain if inplace else copied(plain, ())
        _equalize(result, example_inputs)
    whole.remove(result)
    return given if inplace else result  # type: ignore[return-value]


@torch.no_grad()
def _equalize(model: nn.Module, inputs: Inputs | None) -> None:
    found = tried(model, _pairs(model), inputs)
    pairs = [pair for pair in found if not pair.reason]
    scales = _scales(pairs)
    for pair, scale in zip(pairs, scales, strict=True):
        _check(pair, scale)
    for pair, scale in zip(pairs, scales, strict=True):
        weight, bias, after = _scaled(pair, scale)
        for tensor, numbers in ((pair.first.weight, weight), (pair.first.bias, bias), (pair.second.weight, after)):
            if tensor is not None and numbers is not None:
                tensor.data = numbers.to(tensor.dtype)  # the same parameter, whoever else may look at its memory
    names = names_of(model)
    for pair in found:
        done = f"equalized with {names[pair.first][0]}" if not pair.reason else f"not equalized: {pair.reason}"
        vars(pair.second)[REMARK] = done


# --- what is scaled -------------------------------------------------------------------------------------------------------


def _pairs(model: nn.Module) -> list[_Pair]:
    """Of each layer one; those that stay have a reason."""
    names = {module: names[0] for module, names in names_of(model).items() if type(module) in LAYERS}
    if not names:
        return []
    graph = Graph(model)
    in_rows = graph.sources(lambda what: _kind(what) in _ONE_BY_ONE)
    in_channels = graph.sources(lambda what: _kind(what) in _ONE_BY_ONE | _IN_A_CHANNEL)
    obstacles = Obstacles(model, names)
    found = []
    for layer, name in names.items():
        before: Sources = in_rows if type(layer) is nn.Linear else in_channels
        source = before.get(layer, "no call of it was seen")
        reason = source if isinstance(source, str) else _misfit(source, layer)
        for one in () if reason else (source, layer):
            assert isinstance(one, nn.Module)
            reason = reason or obstacles.of_layer(one)
        found.append(_Pair(source, layer, name, reason))
    return found


def _kind(what: Any) -> Any:
    return type(what) if isinstance(what, nn.Module) else what


def _misfit(first: nn.Module, second: nn.Module) -> str:
    """Why channels cannot be scaled between two modules, or ''."""
    if type(first) not in LAYERS:
        return f"the {type(first).__name__} before it does not scale with its input"
    if (type(first) is nn.Linear) != (type(second) is nn.Linear) or first.weight.dim() != second.weight.dim():  # type: ignore[operator]
        return f"the channels of the {type(first).__name__} before it are not its own"
    results, inputs = channels_of(first)[1], channels_of(second)[0]
    return "" if results == inputs else f"it has {inputs} channels, the {type(first).__name__} before it {results}"


# --- the scales -----------------------------------------------------------------------------------------------------------


def _scales(pairs: list[_Pair]) -> list[Tensor]:
    """Of each pair, float64 [channels]: one pair after the other, again and again, until none changes any more."""
    sizes = {
        layer: by_group(layer, layer.weight.double()).abs().amax(3)
        for pair in pairs
        for layer in (pair.first, pair.second)
    }  # [groups, outputs, inputs]: of each kernel the largest
    scales = [torch.ones_like(sizes[pair.first][:, :, 0]).flatten() for pair in pairs]
    for _ in range(_ROUNDS):
        largest = 0.0
        for i, pair in enumerate(pairs):
            first, second = sizes[pair.first], sizes[pair.second]
            rows, columns = first.amax(2).flatten(), second.amax(1).flatten()
            wanted = torch.where((rows > 0) & (columns > 0), scales[i] * (rows / columns).sqrt(), scales[i])
            wanted = wanted.clamp(1 / _MOST, _MOST)
            step = wanted / scales[i]
            scales[i] = wanted
            sizes[pair.first] = first / step.view(len(first), -1, 1)
            sizes[pair.second] = second * step.view(len(second), 1, -1)
            largest = max(largest, float(step.log().abs().amax()))
        if largest < _CONVERGED:
            break
    return scales


def _scaled(pair: _Pair, scale: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weight and bias of the first and weight of the second layer, float64, with their channels scaled."""
    first, second = (by_group(layer, layer.weight.double()) for layer in (pair.first, pair.second))
    bias = None if pair.first.bias is None else pair.first.bias.double() / scale
    return (
        as_weight(pair.first, first / scale.view(len(first), -1, 1, 1)),
        bias,
        as_weight(pair.second, second * scale.view(len(second), 1, -1, 1)),
    )


def _check(pair: _Pair, scale: Tensor) -> None:
    """Raises RuntimeError where one of the two layers, on random input in float64, gives something else than its results, scaled,
    or those of inputs that are: by more than its numbers were rounded."""
    weight, bias, after = _scaled(pair, scale)
    around = scale.view(-1, *[1] * (pair.first.weight.dim() - 2))
    x, z = random_input(pair.first), random_input(pair.second)
    for layer, own, own_bias, given, taken, gain in (
        (pair.first, weight, bias, x, x, around),
        (pair.second, after, None, z, z / around, torch.ones_like(scale[0])),
    ):
        exact, rounded, sizes = (deepcopy(layer).double() for _ in range(3))
        rounded.weight.copy_(own.to(layer.weight.dtype))
        if own_bias is not None:
            rounded.bias.copy_(own_bias.to(layer.weight.dtype))
        for tensor in sizes.parameters():
            tensor.abs_()
        # (what is too small for the dtype is lost before it is scaled)
        bound = _MOST * rounding(layer.weight, sizes(given.abs()) / _MOST, given)
        if not bool(((rounded(taken) * gain - exact(given)).abs() <= bound).all()):
            raise RuntimeError(f"equalize: {pair.name} with scaled channels does not compute what it did")
