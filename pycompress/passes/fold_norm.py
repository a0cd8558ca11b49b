"""A batch norm beside a layer goes into the layer's weight and bias; in its place stands an ``nn.Identity``.

Behind a layer it always fits. Before one it does where no zeros are padded, which the norm would not have seen. What stands between
the two may be dropout, which does nothing in evaluation, and nothing else: a norm with a negative gain does not commute with a ReLU
or a maximum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pycompress.calls import Inputs, uncompiled
from pycompress.copying import copied
from pycompress.kinds import kind_of, without_pruning
from pycompress.kinds.folded import LAYERS, channels_of, emptied, folded
from pycompress.nn.layer import REMARK
from pycompress.passes import whole
from pycompress.passes.edit import Edit, FoldNorm
from pycompress.passes.graph import Graph
from pycompress.passes.layers import Obstacles, random_input, rounding
from pycompress.passes.trial import tried
from pycompress.plan import Target
from pycompress.surgery import names_of, swap

ModelT = TypeVar("ModelT", bound=nn.Module)

_BETWEEN = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def fold_norms(model: ModelT, example_inputs: Inputs | None = None, *, inplace: bool = False) -> ModelT:
    """Folds batch norms into the linear layers and convolutions beside them, which then compute both.

    That one takes what the other gives, all of it and only that, is found on the traced graph of the model; where it cannot be
    traced, in the source of its modules. Each folded layer is compared with the two on random input, the model on
    ``example_inputs``.

    Args:
        model: in evaluation mode.
        example_inputs: a tensor, a sequence of positional or a mapping of keyword arguments. What changes a result of the model is
            left out. A norm beside a linear layer is folded only where they are given: of an input with three dimensions it
            normalizes the second, and the layer the last.
        inplace: change ``model`` itself; otherwise a copy is returned, which shares nothing with it, except functions.
    Returns:
        The model with fewer norms. :func:`summary` has a note of each layer into which one is folded, and the reason of each norm
        that stays. Layers and norms stay that are used elsewhere too, hooked, pruned, shared or held where they cannot be replaced.
    Raises:
        TypeError: no module; or it holds something that cannot be copied (it is named).
        ValueError: the model, or a norm of it, is in training mode, where norms use the statistics of each batch.
        RuntimeError: a folded layer computes something else than the two.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold_norms: model is {type(model).__name__}, expected a torch.nn.Module")
    given, plain = model, uncompiled(model)
    for name, module in plain.named_modules():
        if module.training and (module is plain or isinstance(module, _BatchNorm)):
            raise ValueError(f"fold_norms: {name or 'the model'} is in training mode, expected model.eval() before")
    with whole.without(plain):
        result = plain if inplace else copied(plain, ())
        _fold(result, example_inputs)
    whole.remove(result)
    return given if inplace else result  # type: ignore[return-value]


def _fold(model: nn.Module, inputs: Inputs | None) -> None:
    targets = [Target(module, kind, names) for module, names in names_of(model).items() if (kind := kind_of(module))]
    edits = tried(model, _edits(model, targets, inputs, before=True), inputs)
    for edit in edits:
        edit.apply()
    places: dict[nn.Module, nn.Module] = {}
    for target in targets:
        if target.norms:
            places[target.module] = target.computing
            places |= {norm.module: emptied(norm.channels) for norm in target.norms}
    swap(model, places)
    note_left(model, edits)


def note_left(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Has the norms that stay say why."""
    for edit in edits:
        if isinstance(edit, FoldNorm):
            stays = edit.target is not None and not edit.target.norms
            if reason := edit.reason or ("the layer beside it stays dense" if stays else ""):
                vars(model.get_submodule(edit.name))[REMARK] = f"not folded: {reason}"


def fold_behind(model: nn.Module, targets: Sequence[Target], inputs: Inputs | None = None) -> list[FoldNorm]:
    """A norm that follows a layer becomes the layer's, as :func:`fold_norms` has it. Those before one stay: the layer's input,
    which a calibration saw, must not change."""
    return _edits(model, targets, inputs, before=False)


def _edits(model: nn.Module, targets: Iterable[Target], inputs: Inputs | None, *, before: bool) -> list[FoldNorm]:
    """Of each norm one; those that stay have a reason. ``before``: whether one that stands before a layer may go too."""
    norms = {module: names[0] for module, names in names_of(model).items() if isinstance(module, _BatchNorm)}
    if not norms:
        return []
    graph = Graph(model)
    found = graph.sources(lambda what: type(what) in _BETWEEN and not what.training)
    by_module = {target.module: target for target in targets}
    after = {source: module for module, source in found.items() if isinstance(source, nn.Module)} if before else {}
    obstacles = Obstacles(model, [*norms, *by_module])
    edits: list[FoldNorm] = []
    for norm, name in norms.items():
        source = found.get(norm, "no call of it was seen")
        behind = not isinstance(source, str) and source in by_module
        target = by_module.get(source if behind else after.get(norm))  # type: ignore[arg-type]
        reason = obstacles.of_norm(norm)
        if target is None:
            reason = reason or (source if isinstance(source, str) else _stranger(source))
        else:
            layer = target.module
            reason = reason or obstacles.of_layer(layer, pruned=not before)
            reason = reason or _misfit(layer, norm, behind, inputs is not None)
            reason = reason or _checked(target.name, name, layer, norm, behind)
        edits.append(FoldNorm(target, norm, reason, behind, name))
    edits.sort(key=lambda edit: not edit.behind)  # what stands behind a layer is folded first
    return _without_those_asked_for(graph, edits)


def _without_those_asked_for(graph: Graph, edits: list[FoldNorm]) -> list[FoldNorm]:
    """Norms stay without which the code of the model goes another way, or fails, because it asks something of them."""
    wanted = [edit.emptied for edit in edits if not edit.reason]
    if not wanted or graph.same_without(wanted):
        return edits
    asked = {norm for norm in wanted if not graph.same_without([norm])}
    if not graph.same_without([norm for norm in wanted if norm not in asked]):
        asked = {*wanted}
    reason = "the code of the model asks for more than its results"
    return [replace(edit, reason=reason) if edit.emptied in asked else edit for edit in edits]


def _stranger(source: nn.Module) -> str:
    """What is said of a module before a norm that does not take it in."""
    return f"the {type(source).__name__} before it {'stays dense' if type(source) in LAYERS else 'cannot take it in'}"


# --- whether it fits -------------------------------------------------------------------------------------------------------


def _misfit(layer: Any, norm: Any, behind: bool, seen: bool) -> str:
    """Why weight and bias of this layer cannot do what the norm does, or ''."""
    linear, transposed = type(layer) is nn.Linear, getattr(layer, "transposed", False)
    if linear and not seen:
        return "a linear layer may have inputs of three dimensions, of which a norm takes the second: example_inputs would tell"
    if not behind and transposed:
        return "the edges of what a transposed convolution gives have fewer inputs"
    if not behind and not linear and _pads_zeros(layer):
        return "the convolution behind it pads its input with zeros, which the norm does not see"
    channels = channels_of(layer)[behind]
    if channels != norm.num_features:
        return f"it has {norm.num_features} channels, the layer {channels}"
    return ""


def _pads_zeros(layer: Any) -> bool:
    """Whether a convolution does so."""
    if layer.padding == "same":
        return layer.padding_mode == "zeros" and any(size > 1 for size in layer.weight.shape[2:])
    return layer.padding_mode == "zeros" and layer.padding != "valid" and any(layer.padding)


# --- checked --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _checked(name: str, norm_name: str, layer: Any, norm: Any, behind: bool) -> str:
    """Compares the folded layer with the two, on random input in float64: they differ by no more than its weight and bias were
    rounded. Returns why it is none that could be compared, or ''; raises RuntimeError where it is another one."""
    layer = without_pruning(layer)
    fresh: Any = folded(layer, norm, behind=behind)
    if not all(bool(torch.isfinite(one).all()) for one in fresh.parameters()):
        return f"the folded layer would hold NaN or Inf in {fresh.weight.dtype}"
    exact, exact_norm, rounded = (deepcopy(one).double().eval() for one in (layer, norm, fresh))
    sizes, size_norm = deepcopy(exact), deepcopy(exact_norm)
    for tensor in (*sizes.parameters(), *size_norm.parameters()):
        tensor.abs_()
    size_norm.running_mean.abs_().neg_()
    x = random_input(layer)
    y = exact_norm(exact(x)) if behind else exact(exact_norm(x))
    largest = folded(sizes, size_norm, behind=behind)(x.abs())
    if not bool(((rounded(x) - y).abs() <= rounding(fresh.weight, largest, x)).all()):
        raise RuntimeError(f"fold_norms: {name} with {norm_name} folded in does not compute what the two compute")
    return ""
