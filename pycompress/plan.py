"""What a plan says about each layer of a model, and which of them have to stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pycompress import fusion, ops
from pycompress.methods.inputs import InputStatistics
from pycompress.methods.weight import CalibratedMethod, LayersMethod, Method, is_method, refusal
from pycompress.nn import LAYERS
from pycompress.nn.dense import (
    dense_bias,
    dense_shape,
    dense_weight,
    geometry_of,
    has_foreign_hooks,
    is_candidate,
    is_conv1d,
    is_convolution,
    is_linear,
    padding_idx_of,
    stored_weight,
    weight_parameter,
    weight_shape,
)
from pycompress.records import LayerRecord

Plan = Method | Mapping[str, Method | None]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Target:
    """One candidate module, under all the names that the model has for it."""

    module: nn.Module
    names: list[str]
    method: Method | None = None
    fused: list[str] = field(default_factory=list)  # names of activation modules that its kernel takes over
    tie: int | None = None  # number of the group of layers that share one weight
    record: LayerRecord = field(init=False)

    def __post_init__(self) -> None:
        lazy = any(is_lazy(p) for p in self.module.parameters())
        size = 0 if lazy else sum(p.numel() * p.element_size() for p in self.module.parameters())
        shape = (0, 0) if lazy else dense_shape(self.module)
        self.record = LayerRecord(self.names[0], type(self.module).__name__, shape, size, bytes=size)

    @property
    def name(self) -> str:
        """The name that an error message has for it."""
        return self.names[0] or "the model itself"

    def keep_dense(self, reason: str) -> None:
        """Takes the method away again; times that were measured stay on record."""
        old = self.record
        self.method, self.fused = None, []
        self.record = LayerRecord(
            old.name, old.kind, old.shape, old.dense_bytes, reason=reason, bytes=old.dense_bytes, dense_us=old.dense_us, us=old.us,
        )  # fmt: skip


def split(name: str) -> tuple[str, str]:
    """A dotted name as (name of the parent, attribute)."""
    parent, _, attribute = name.rpartition(".")
    return parent, attribute


def targets_of(model: nn.Module, plan: Plan, calibration: Mapping[str, InputStatistics] | None = None) -> list[Target]:
    """All linear layers and convolutions of a model; those that the plan compresses, and that can be, have a method.

    Embeddings are among them where a method of the plan takes any. Methods that make use of inputs have those of their layer.

    Raises:
        TypeError, ValueError: a plan that is none, that fits nothing, a weight that cannot be compressed, a layer whose inputs were
            never seen. The model is only looked at: whatever can stop a compression stops it here.
    """
    rules = _rules(plan)
    methods = [method for method in rules.values() if method is not None]
    targets = _candidates(model, embeddings=any(not refusal(method, "Embedding") for method in methods))
    _assign_methods(targets, rules)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for target in targets:
        if target.method is not None and (reason := _why_dense(target, model, owners)):
            target.keep_dense(reason)
    chosen = [target for target in targets if target.method is not None]
    _check_weights(chosen)
    _look_at_all_layers(chosen)
    if calibration is not None:
        _give_inputs(chosen, calibration)
    _take_over_activations(model, chosen)
    return targets


def _candidates(model: nn.Module, *, embeddings: bool) -> list[Target]:
    found: dict[int, Target] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not (is_candidate(module) or (embeddings and isinstance(module, nn.Embedding))):
            continue
        if id(module) in found:
            found[id(module)].names.append(name)
        else:
            found[id(module)] = Target(module, [name])
    return list(found.values())


def _known(method: object) -> bool:
    return is_method(method) and method.name in LAYERS


def _rules(plan: Plan) -> dict[str, Method | None]:
    """{glob: method or None}. Raises where the plan is none."""
    if not (isinstance(plan, Mapping) or _known(plan)):
        raise TypeError(
            f"compress: the plan is {plan!r}, expected a method such as Int8() or a mapping of globs to methods"
        )
    rules: dict[str, Method | None] = dict(plan) if isinstance(plan, Mapping) else {"*": plan}
    for glob, method in rules.items():
        if not isinstance(glob, str) or not (method is None or _known(method)):
            raise TypeError(
                f"compress: the plan maps {glob!r} to {method!r}, expected a glob and a method such as Int8(), or None"
            )
    if not rules:
        raise ValueError("compress: the plan is empty, expected a method or {glob: method}")
    return rules


def _assign_methods(targets: list[Target], rules: Mapping[str, Method | None]) -> None:
    """The first glob that matches one of a layer's names decides. Raises where a glob matches nothing."""
    matched: set[str] = set()
    for target in targets:
        hits = [glob for glob in rules if any(fnmatchcase(name, glob) for name in target.names)]
        matched.update(hits)
        if not hits:
            target.record.reason = "no glob of the plan matches it"
            continue
        target.method = rules[hits[0]]
        if target.method is None:
            target.record.reason = f"the plan keeps {hits[0]!r} dense"
    for glob in rules:
        if glob not in matched:
            names = ", ".join(target.name for target in targets[:5]) or "none"
            raise ValueError(
                f"compress: the glob {glob!r} matches no layer that could be compressed; there are: {names}, ..."
            )


def _why_dense(target: Target, model: nn.Module, owners: dict[int, list[str]]) -> str:
    """Why this layer has to stay as it is, or ''."""
    module = target.module
    for name in target.names:
        if name and isinstance(model.get_submodule(split(name)[0]), nn.MultiheadAttention):
            return "inside nn.MultiheadAttention, which reads its weights itself: left whole"
    if any(is_lazy(p) for p in module.parameters()):
        return "its parameters are not initialized yet"
    assert target.method is not None
    if reason := _misfit(module) or refusal(target.method, _kind(module)):
        return reason
    if has_foreign_hooks(module):
        return "it has hooks, which would be lost"
    users = [split(name)[0] for name in owners.get(id(weight_parameter(module)), [])]
    foreign = [name for name in users if not _can_share(module, model.get_submodule(name))]
    if foreign:
        return f"its weight is shared with {foreign[0]}: compressing it would add bytes"
    dtype, shape = stored_weight(module).dtype, weight_shape(module)
    if dtype not in _DTYPES:
        return f"its weight is {dtype}, expected float32, bfloat16 or float16"
    if 0 in shape or shape[1] > ops.MAX_IN_FEATURES:
        return f"its weight is {list(shape)}, expected 1 to {ops.MAX_IN_FEATURES} input features"
    return ""


def _kind(module: nn.Module) -> str:
    """What a method is asked whether it takes it."""
    if isinstance(module, nn.Embedding):
        return "Embedding"
    return "Conv2d" if is_convolution(module) else "Linear"


def _can_share(module: nn.Module, other: nn.Module) -> bool:
    """Whether the compressed layers of two modules with one weight could have one compressed weight: not those of embeddings."""
    if module is other:
        return True
    embeddings = isinstance(module, nn.Embedding) or isinstance(other, nn.Embedding)
    return not embeddings and not _misfit(other)


def _misfit(module: nn.Module) -> str:
    """Why no method could take this module, whatever its weight, or ''."""
    kind = type(module)
    if is_linear(module):
        plain = kind is nn.Linear or is_conv1d(module)
        return "" if plain else f"{kind.__name__} is a subclass of Linear, which may do something else"
    if isinstance(module, nn.Embedding):
        return _why_not(padding_idx_of, module, "Embedding")
    if not isinstance(module, nn.Conv2d):
        return f"{kind.__name__} has no compressed layer"
    return _why_not(geometry_of, module, "Conv2d")


def _why_not(read: Callable[[nn.Module], object], module: nn.Module, base: str) -> str:
    """Why a module of this kind, of which ``read`` reads what a compressed layer has to know, has none, or ''."""
    kind = type(module)
    if kind is not getattr(nn, base):
        return f"{kind.__name__} is a subclass of {base}, which may do something else"
    try:
        read(module)
    except ValueError as error:
        return str(error)
    return ""


def _check_weights(targets: list[Target]) -> None:
    """Everything that could stop a compression later stops it here, before the model is touched."""
    for target in targets:
        device = stored_weight(target.module).device
        if device.type != "cpu":
            raise ValueError(f"compress: {target.name} is on {device}, expected the CPU, where the kernels run")
        for kind, tensor in (("weight", dense_weight(target.module)), ("bias", dense_bias(target.module))):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"compress: the {kind} of {target.name} holds NaN or Inf, expected finite values")


def _look_at_all_layers(targets: list[Target]) -> None:
    """Gives each layer its own method where the plan's wants to see all its layers first; a shared weight is seen once."""
    groups: dict[int, list[Target]] = {}
    for target in targets:
        groups.setdefault(id(target.method), []).append(target)
    for group in groups.values():
        method = group[0].method
        if not isinstance(method, LayersMethod):
            continue
        weights: dict[tuple[int, int, bool], Tensor] = {}
        for target in group:
            weights.setdefault(_weight_key(target.module), dense_weight(target.module).detach())
        own = dict(zip(weights, method.for_layers(list(weights.values())), strict=True))
        for target in group:
            target.method = own[_weight_key(target.module)]


def _give_inputs(targets: list[Target], calibration: Mapping[str, InputStatistics]) -> None:
    """Tells the methods that ask for it what their layer's inputs look like; layers that share a weight are told of all of theirs,
    so that they go on sharing it."""
    groups: dict[tuple[int, int, bool], list[Target]] = {}
    for target in targets:
        if isinstance(target.method, CalibratedMethod):
            groups.setdefault(_weight_key(target.module), []).append(target)
    for group in groups.values():
        inputs = InputStatistics.joined([_inputs_of(target, calibration) for target in group])
        for target in group:
            assert isinstance(target.method, CalibratedMethod)
            target.method = target.method.with_inputs(inputs)


def _inputs_of(target: Target, calibration: Mapping[str, InputStatistics]) -> InputStatistics:
    found = [calibration[name] for name in target.names if name in calibration]
    if not found:
        raise ValueError(
            f"compress: the calibration never saw {target.name}: run batches that reach it, or have the plan keep it dense"
        )
    return found[0]


def _weight_key(module: nn.Module) -> tuple[int, int, bool]:
    """Alike for modules that compute with one weight: the same tensor, the same mask, read the same way round."""
    return id(stored_weight(module)), id(module._buffers.get("weight_mask")), is_conv1d(module)


def _take_over_activations(model: nn.Module, targets: list[Target]) -> None:
    followers: dict[str, dict[str, tuple[str, str]]] = {}
    for target in targets:
        if isinstance(target.module, nn.Embedding):
            continue  # has no kernel that could
        hits = []
        for name in filter(None, target.names):
            parent, attribute = split(name)
            if parent not in followers:
                followers[parent] = fusion.followers(model.get_submodule(parent))
            if attribute in followers[parent]:
                activation, kind = followers[parent][attribute]
                hits.append((f"{parent}.{activation}".lstrip("."), kind))
        alike = len(hits) == len(target.names) and len({kind for _, kind in hits}) == 1  # wherever it is used
        if hits and alike:
            target.record.activation = hits[0][1]
            target.fused = [name for name, _ in hits]


def count_shared_weights_once(targets: list[Target]) -> None:
    """Takes a weight that several layers share off the dense bytes of all but the first of them."""
    seen: set[int] = set()
    for target in targets:
        weight = weight_parameter(target.module)
        if weight is None:
            continue
        if id(weight) in seen:
            target.record.dense_bytes -= weight.numel() * weight.element_size()
            if target.method is None:
                target.record.bytes = target.record.dense_bytes
        seen.add(id(weight))


def number_ties(targets: list[Target]) -> None:
    """Gives the layers that share a weight a number; of those, the ones with equal compressed weights can share these."""
    # Conv1D reads a weight transposed: it cannot share a packed weight with a Linear.
    weights = [(id(stored_weight(target.module)), is_conv1d(target.module)) for target in targets]
    for target, weight in zip(targets, weights, strict=True):
        if weights.count(weight) > 1:
            target.tie = weights.index(weight)
