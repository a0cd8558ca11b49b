"""What a plan says about each layer of a model, and which of them have to stay as they are."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pycompress import ops
from pycompress.calls import Inputs, uncompiled
from pycompress.kinds import (
    Kind,
    alteration,
    folded,
    folded_into,
    kind_of,
    mark_folded,
    surrounded,
    without_pruning,
    zeros_around,
)
from pycompress.measure import interleaved_us
from pycompress.methods.inputs import OF_VALUES, InputStatistics
from pycompress.methods.method import (
    NEEDS_CALIBRATION,
    CalibratedMethod,
    LayersMethod,
    MeasuredMethod,
    Method,
    Refused,
    SelectiveMethod,
    is_method,
    needs_of,
)
from pycompress.nn.layers import LAYERS, layer_for, no_layer
from pycompress.records import CUT, LayerRecord
from pycompress.surgery import compressed_layers, names_of, split
from pycompress.weights import Weight

Plan = Method | Mapping[str, Method | None]


class Planner(Protocol):
    """What makes a plan for a model: the profile of a machine (:func:`pycompress.profile`)."""

    def plan_for(self, model: nn.Module, example_inputs: Inputs | None = None) -> Mapping[str, Method | None]:
        """Raises ValueError where there is none."""


class Costs(Protocol):
    """Times that were measured somewhere (:class:`pycompress.search.Machine`).

    Attributes:
        name: of that machine.
    """

    name: str

    def layer_us(self, method: Method, shape: tuple[int, int], rows: int) -> tuple[float, float]:
        """Microseconds of a linear layer [n, k] at so many rows, dense and compressed. Raises ValueError where there are none."""


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 128  # of the input with which layers are measured where a method asks for it


@dataclass(frozen=True)
class Norm:
    """A batch norm that is folded into a layer; ``behind``: it takes the layer's results, else it gives its inputs."""

    module: nn.Module
    name: str
    behind: bool = True

    @property
    def channels(self) -> int:
        """How many it normalizes."""
        return int(self.module.num_features)  # type: ignore[arg-type]

    @property
    def bytes(self) -> int:
        """Of its parameters and buffers."""
        return sum(one.numel() * one.element_size() for one in (*self.module.parameters(), *self.module.buffers()))


@dataclass
class Target:
    """One candidate module, under all the names that the model has for it."""

    module: nn.Module
    kind: Kind
    names: list[str]
    method: Method | None = None
    norms: list[Norm] = field(default_factory=list)  # that are folded into its weight and bias
    fused: nn.Module | None = None  # the activation module that its kernel takes over
    pad: nn.Module | None = None  # the padding module before it, whose zeros it puts around its input itself
    tie: int | None = None  # number of the group of layers that share one weight
    record: LayerRecord = field(init=False)

    def __post_init__(self) -> None:
        lazy = any(is_lazy(p) for p in self.module.parameters())
        size = 0 if lazy else sum(p.numel() * p.element_size() for p in self.module.parameters())
        shape = (0, 0) if lazy else self.kind.dense_shape(self.module)
        self.record = LayerRecord(self.names[0], type(self.module).__name__, shape, size, bytes=size)

    @property
    def name(self) -> str:
        """The name that an error message has for it."""
        return self.names[0] or "the model itself"

    @property
    def computing(self) -> nn.Module:
        """The module with its norms folded in, and with its padding module's zeros around, made anew at each call; or as it is."""
        module = without_pruning(self.module) if self.norms else self.module
        for norm in self.norms:
            module = folded(module, norm.module, behind=norm.behind)
            mark_folded(module, ", ".join(filter(None, [folded_into(module), norm.name])))
        if self.pad is not None and (sides := zeros_around(self.pad)):
            module = surrounded(module, sides)
        return module

    @property
    def first(self) -> nn.Module:
        """Whose inputs are those of the layer that comes of it."""
        return self.pad or self.module

    @property
    def last(self) -> nn.Module:
        """Whose results are those of the layer that comes of it, but for an activation."""
        return next((norm.module for norm in self.norms if norm.behind), self.module)

    @property
    def dense(self) -> Tensor:
        """The weight [n, k] with which it computes."""
        return self.kind.matrix(self.computing)

    @property
    def key(self) -> tuple[int, int, int]:
        """Alike for modules that compute with one weight: the same tensor, the same mask, read the same way round."""
        mask = self.module._buffers.get("weight_mask")
        return id(self.kind.stored(self.module)), id(mask), id(self.kind)

    def keep_dense(self, reason: str) -> None:
        """Takes the method away again; times that were measured stay on record."""
        old = self.record
        self.method, self.norms, self.fused, self.pad = None, [], None, None
        self.record = LayerRecord(
            old.name, old.kind, old.shape, old.dense_bytes, reason=reason, bytes=old.dense_bytes, dense_us=old.dense_us, us=old.us,
        )  # fmt: skip


def targets_of(model: nn.Module, plan: Plan) -> list[Target]:
    """All layers of a known kind; those that the plan compresses, and that can be, have a method.

    Kinds that are no candidates of every plan are among them where a method of the plan takes any.

    Raises:
        TypeError, ValueError: a plan that is none, that fits nothing, that is for a layer which is not on the CPU, or for a model
            that was made smaller.
    """
    calls, cut = getattr(plan, "shrink", ()), vars(uncompiled(model)).get(CUT)
    if len(calls) > len(cut.steps if cut else ()):
        raise ValueError(
            "compress: the plan is for a smaller model, expected one by pc.shrunk(model, plan.shrink, batches): "
            f"{'; '.join(map(str, calls))}"
        )
    rules = _rules(plan)
    methods = [method for method in rules.values() if method is not None]
    targets = _candidates(model, methods)
    _assign_methods(model, targets, rules)
    owners = _Owners(model)
    for target in targets:
        if target.method is not None and (reason := _why_dense(target, model, owners)):
            target.keep_dense(reason)
    for target in targets:
        if target.method is not None and (device := target.kind.stored(target.module).device).type != "cpu":
            raise ValueError(f"compress: {target.name} is on {device}, expected the CPU, where the kernels run")
    return targets


def settle_methods(targets: list[Target], calibration: Mapping[str, InputStatistics] | None = None) -> None:
    """Gives each target the method for the weight with which it computes: those that look at all their layers have seen them, those
    that make use of inputs have those of their layer. Some are refused then.

    Raises:
        ValueError: a weight that cannot be compressed, a layer whose inputs were never seen. Layers are only looked at: whatever
            can stop a compression stops it here, or in :func:`targets_of`.
    """
    chosen = [target for target in targets if target.method is not None]
    _check_weights(chosen)
    _look_at_all_layers(chosen, calibration)
    _let_measure(chosen)
    chosen = [target for target in chosen if target.method is not None]
    if calibration is not None:
        _give_inputs(chosen, calibration)
    for target in chosen:
        assert target.method is not None
        method = target.kind.fitted(target.method, target.module)
        if getattr(method, "lacks_inputs", False):
            raise ValueError(
                f"compress: {target.name}: {method!r} goes by what the layer's inputs are, {NEEDS_CALIBRATION}"
            )


def _candidates(model: nn.Module, methods: list[Method]) -> list[Target]:
    kinds = {module: kind_of(module) for module in model.modules()}
    asked = {kind for kind in kinds.values() if kind and (kind.always or any(not _refusal(m, kind) for m in methods))}
    return [
        Target(module, kind, names)
        for module, names in names_of(model).items()
        if (kind := kinds[module]) in asked and kind
    ]


def _refusal(method: Method, kind: Kind) -> str:
    """Why a method cannot take layers of a kind, or '': the table knows no layer, or an option of its own stands against it."""
    if layer_for(kind, method.name) is None:
        return no_layer(method.name)
    return method.refuses(kind.title) if isinstance(method, SelectiveMethod) else ""


def _known(method: object) -> bool:
    return is_method(method) and any(weight == method.name for _, weight in LAYERS)


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


def _assign_methods(model: nn.Module, targets: list[Target], rules: Mapping[str, Method | None]) -> None:
    """The first glob that matches one of a layer's names decides. Raises where a glob matches nothing."""
    names = {name for target in targets for name in target.names}
    matched: set[str] = set()
    for target in targets:
        hits = [glob for glob in rules if any(_matches(glob, name, names) for name in target.names)]
        matched.update(hits)
        if not hits:
            target.record.reason = "no glob of the plan matches it"
            continue
        target.method = rules[hits[0]]
        if target.method is None:
            target.record.reason = f"the plan keeps {hits[0]!r} dense"
    for glob in rules:
        if glob not in matched:
            raise ValueError(
                f"compress: the glob {glob!r} matches no layer that could be compressed{_instead(model, glob, targets)}"
            )


def _matches(glob: str, name: str, names: Container[str]) -> bool:
    """Whatever is the name of a layer means this layer: ``a[0]`` is no glob for ``a0`` where there is an ``a[0]``."""
    return name == glob if glob in names else fnmatchcase(name, glob)


def _instead(model: nn.Module, glob: str, targets: list[Target]) -> str:
    """What a glob matches that cannot be compressed again, or else what there would be."""
    done = compressed_layers(model)
    for name, layer in done.items():
        if _matches(glob, name, done):
            return f": {name or 'the model itself'} is an {type(layer).__name__} already"
    return f"; there are: {', '.join(target.name for target in targets[:5]) or 'none'}, ..."


class _Owners:
    """Which modules hold a parameter, and which of them could not share a compressed weight with others."""

    def __init__(self, model: nn.Module) -> None:
        self._all: dict[int, list[tuple[str, nn.Module]]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            for parameter in (p for p in module._parameters.values() if p is not None):
                self._all.setdefault(id(parameter), []).append((name, module))
        self._alone = {
            parameter: [(name, module) for name, module in owners if not _can_share(module)]
            for parameter, owners in self._all.items()
            if len(owners) > 1
        }

    def foreign(self, target: Target) -> str:
        """The name of a module that needs the target's weight as it is, or ''."""
        table = self._alone if target.kind.shares else self._all
        parameters = target.kind.parameters(target.module)
        owners = [owner for parameter in parameters for owner in table.get(id(parameter), [])]
        return next((name or "the model itself" for name, module in owners if module is not target.module), "")


def _can_share(module: nn.Module) -> bool:
    """Whether its compressed layer could have one compressed weight with that of another module."""
    kind = kind_of(module)
    return kind is not None and kind.shares and not kind.misfit(module)


def _why_dense(target: Target, model: nn.Module, owners: _Owners) -> str:
    """Why this layer has to stay as it is, or ''."""
    module, kind, method = target.module, target.kind, target.method
    for name in target.names:
        if name and isinstance(model.get_submodule(split(name)[0]), nn.MultiheadAttention):
            return "inside nn.MultiheadAttention, which reads its weights itself: left whole"
    if any(is_lazy(p) for p in module.parameters()):
        return "its parameters are not initialized yet"
    assert method is not None
    if reason := kind.misfit(module) or _refusal(method, kind):
        return reason
    layer = layer_for(kind, method.name)
    assert layer is not None
    if reason := layer.misfit(kind.geometry(module)) or alteration(module):
        return reason
    if foreign := owners.foreign(target):
        return f"its weight is shared with {foreign}: compressing it would add bytes"
    for name, tensor in kind.tensors(module).items():
        if tensor is not None and (reason := _oddity(tensor)):
            return f"its {name} is {reason}"
    shape = kind.shape(module)
    if 0 in shape or shape[1] > ops.MAX_IN_FEATURES:
        return f"its weight is {list(shape)}, expected 1 to {ops.MAX_IN_FEATURES} input features"
    return ""


def _oddity(tensor: Tensor) -> str:
    """What keeps a kernel from reading these numbers, or ''."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}, expected a plain tensor"
    if tensor.layout != torch.strided:
        return f"laid out as {tensor.layout}, expected {torch.strided}"
    if tensor.dtype not in _DTYPES:
        return f"{tensor.dtype}, expected float32, bfloat16 or float16"
    return ""


def _check_weights(targets: list[Target]) -> None:
    """Everything that could stop a compression later stops it here, before the model is touched."""
    seen: set[tuple[int, int, int]] = set()
    for target in targets:
        module = target.computing
        weight = None if target.key in seen else target.kind.matrix(module)
        seen.add(target.key)
        for kind, tensor in (("weight", weight), ("bias", target.kind.bias(module))):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"compress: the {kind} of {target.name} holds NaN or Inf, expected finite values")


def _look_at_all_layers(targets: list[Target], calibration: Mapping[str, InputStatistics] | None) -> None:
    """Gives each layer its own method where the plan's wants to see all its layers first; a shared weight is seen once."""
    groups: dict[int, list[Target]] = {}
    for target in targets:
        groups.setdefault(id(target.method), []).append(target)
    for group in groups.values():
        method = group[0].method
        if not isinstance(method, LayersMethod):
            continue
        users = _users(group)
        weights = [own[0].dense.detach() for own in users.values()]
        told = calibration is not None and _is_told(method)
        inputs = [_joined_inputs(own, calibration) for own in users.values()] if told and calibration else None
        methods = dict(zip(users, method.for_layers(weights, inputs), strict=True))
        for target in group:
            target.method = methods[target.key]


def _users(targets: list[Target]) -> dict[tuple[int, int, int], list[Target]]:
    """The layers that compute with each weight."""
    users: dict[tuple[int, int, int], list[Target]] = {}
    for target in targets:
        users.setdefault(target.key, []).append(target)
    return users


def _let_measure(targets: list[Target]) -> None:
    """Settles what only the machine can tell of a method, once for each shape; some are refused then."""
    settled: dict[tuple[int, tuple[int, int]], Method | Refused] = {}
    for target in targets:
        method, shape = target.method, target.kind.shape(target.module)
        if not isinstance(method, MeasuredMethod):
            continue
        key = (id(method), shape)
        if key not in settled:
            try:
                settled[key] = method.measured(shape, partial(_times, target))
            except Refused as refused:
                settled[key] = refused
        found = settled[key]
        if isinstance(found, Refused):
            target.keep_dense(str(found))
        else:
            target.method = found


def _times(target: Target, weight: Weight) -> tuple[float, float]:
    """Microseconds of a linear layer with its dense weight, and with this one, at ROWS rows."""
    kind = layer_for(target.kind, weight.name)
    assert kind is not None
    layer, dense = kind.build(weight, target.kind.geometry(target.module)), target.dense.detach().float()
    x = torch.randn(
        ROWS, dense.shape[1], generator=torch.Generator(device="cpu").manual_seed(0), dtype=torch.float32, device="cpu"
    )
    with torch.inference_mode():
        return interleaved_us(lambda: torch.nn.functional.linear(x, dense), lambda: layer(x))


def _give_inputs(targets: list[Target], calibration: Mapping[str, InputStatistics]) -> None:
    """Tells the methods that ask for it what their layer's inputs look like; layers that share a weight are told of all of theirs,
    so that they go on sharing it. A layer of which no rows are gathered is compressed without, and its record says so."""
    told_of: list[Target] = []
    for target in targets:
        if target.method is None or not _is_told(target.method):
            continue
        if target.kind.has_rows(target.module) or needs_of(target.method) & OF_VALUES:
            told_of.append(target)
        else:
            target.record.note = f"not calibrated: {target.kind.no_rows}"
    for group in _users(told_of).values():
        inputs = _joined_inputs(group, calibration)
        told: list[tuple[Method, Method]] = []  # what is the same method stays the same
        for target in group:
            method = target.method
            assert isinstance(method, CalibratedMethod)
            if not any(method is before for before, _ in told):
                told.append((method, method.with_inputs(inputs)))
            target.method = next(after for before, after in told if before is method)


def _is_told(method: Method) -> bool:
    return isinstance(method, CalibratedMethod) and bool(needs_of(method))


def _joined_inputs(users: list[Target], calibration: Mapping[str, InputStatistics]) -> InputStatistics:
    return InputStatistics.joined([_inputs_of(target, calibration) for target in users])


def _inputs_of(target: Target, calibration: Mapping[str, InputStatistics]) -> InputStatistics:
    found = [calibration[name] for name in target.names if name in calibration]
    if not found:
        raise ValueError(
            f"compress: the calibration never saw {target.name}: run batches that reach it, or have the plan keep it dense"
        )
    return found[0]


def count_shared_weights_once(targets: list[Target]) -> None:
    """Takes a weight that several layers share off the dense bytes of all but the first of them."""
    seen: set[int] = set()
    for target in targets:
        weight = target.kind.parameter(target.module)
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
    groups: dict[tuple[int, Kind], list[Target]] = {}
    for target in targets:
        groups.setdefault((id(target.kind.stored(target.module)), target.kind), []).append(target)
    for number, group in enumerate(groups.values()):
        for target in group if len(group) > 1 else ():
            target.tie = number
