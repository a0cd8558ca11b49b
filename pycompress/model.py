"""``compress``: replace the layers of a model that a plan names; ``summary``: what became of each."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pycompress import fusion, ops
from pycompress.measure import interleaved_us
from pycompress.methods import Int8
from pycompress.nn import Int8Linear

Method = Int8
Plan = Method | Mapping[str, Method | None]
Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
ModelT = TypeVar("ModelT", bound=nn.Module)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGE = 50_000_000  # weights from which compress() shows a progress bar on a terminal


@dataclass
class LayerRecord:
    """What became of one layer.

    Attributes:
        name, kind: dotted name in the model, class of the dense layer.
        method: ``int8`` or None where the layer stayed dense; ``reason`` says why then.
        dense_bytes, bytes: parameters before and after.
        error: relative error of the weight, ||W - W'|| / ||W|| (Frobenius).
        dense_us, us: measured time of one call, where ``only_if_faster`` measured it.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    dense_bytes: int
    method: str | None = None
    reason: str = ""
    bytes: int = 0
    error: float | None = None
    dense_us: float | None = None
    us: float | None = None
    activation: str = "none"


# --- reading the model ------------------------------------------------------------------------------------------------


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _is_candidate(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def dense_weight(module: nn.Module) -> Tensor:
    """The [n, k] weight of a candidate."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if is_conv1d(module) else weight


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """``model(inputs)``: a tensor as the only argument, a sequence as positional, a mapping as keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return model(*inputs)
    raise TypeError(
        f"inputs is {type(inputs).__name__}, expected a tensor, a sequence of arguments or a mapping of keywords"
    )


@dataclass
class _Target:
    """One candidate module, under all the names that the model has for it."""

    module: nn.Module
    names: list[str]
    method: Method | None = None
    fused: list[str] = field(default_factory=list)  # names of activation modules that its kernel takes over
    tie: int | None = None  # number of the group of layers that share one weight
    record: LayerRecord = field(init=False)

    def __post_init__(self) -> None:
        lazy = any(is_lazy(p) for p in self.module.parameters())
        shape = (0, 0) if lazy else tuple(dense_weight(self.module).shape)
        size = 0 if lazy else sum(p.numel() * p.element_size() for p in self.module.parameters())
        self.record = LayerRecord(self.names[0], type(self.module).__name__, (shape[0], shape[1]), size, bytes=size)


def _split(name: str) -> tuple[str, str]:
    parent, _, attribute = name.rpartition(".")
    return parent, attribute


def _targets(model: nn.Module) -> list[_Target]:
    found: dict[int, _Target] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not _is_candidate(module):
            continue
        if id(module) in found:
            found[id(module)].names.append(name)
        else:
            found[id(module)] = _Target(module, [name])
    return list(found.values())


def _assign_methods(targets: list[_Target], plan: Plan) -> None:
    """The first glob that matches one of a layer's names decides. Raises where a glob matches nothing."""
    if not isinstance(plan, (Mapping, Int8)):
        raise TypeError(
            f"compress: the plan is {plan!r}, expected a method such as Int8() or a mapping of globs to methods"
        )
    rules = dict(plan) if isinstance(plan, Mapping) else {"*": plan}
    for glob, method in rules.items():
        if not isinstance(glob, str) or not (method is None or isinstance(method, Int8)):
            raise TypeError(
                f"compress: the plan maps {glob!r} to {method!r}, expected a glob and a method such as Int8(), or None"
            )
    if not rules:
        raise ValueError("compress: the plan is empty, expected a method or {glob: method}")
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
            names = ", ".join(t.names[0] or "the model itself" for t in targets[:5]) or "none"
            raise ValueError(
                f"compress: the glob {glob!r} matches no layer that could be compressed; there are: {names}, ..."
            )


def _why_dense(target: _Target, model: nn.Module, owners: dict[int, list[str]]) -> str:
    """Why this layer has to stay as it is, or ''."""
    module = target.module
    for name in target.names:
        if name and isinstance(model.get_submodule(_split(name)[0]), nn.MultiheadAttention):
            return "inside nn.MultiheadAttention, which reads its weights itself: left whole"
    if any(is_lazy(p) for p in module.parameters()):
        return "its parameters are not initialized yet"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"{type(module).__name__} is a subclass of Linear, which may do something else"
    if fusion.has_hooks(module):
        return "it has hooks, which would be lost"
    weight = dense_weight(module)
    users = [_split(name)[0] for name in owners.get(id(module.weight), [])]
    foreign = [name for name in users if not _is_candidate(model.get_submodule(name))]
    if foreign:
        return f"its weight is shared with {foreign[0]}: compressing it would add bytes"
    if weight.dtype not in _DTYPES:
        return f"its weight is {weight.dtype}, expected float32, bfloat16 or float16"
    if 0 in weight.shape or weight.shape[1] > ops.MAX_IN_FEATURES:
        return f"its weight is {list(weight.shape)}, expected 1 to {ops.MAX_IN_FEATURES} input features"
    return ""


def _check_weights(targets: list[_Target]) -> None:
    """Everything that could stop a compression later stops it here, before the model is touched."""
    for target in targets:
        weight, name = dense_weight(target.module), target.names[0] or "the model itself"
        if weight.device.type != "cpu":
            raise ValueError(f"compress: {name} is on {weight.device}, expected the CPU, where the int8 kernels run")
        for kind, tensor in (("weight", weight), ("bias", target.module.bias)):
            if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"compress: the {kind} of {name} holds NaN or Inf, expected finite values")


# --- replacing --------------------------------------------------------------------------------------------------------


def _compressed(target: _Target, ties: dict[int, Int8Linear]) -> Int8Linear:
    """The compressed layer; one that ties its weight to an earlier one (in ``ties``) shares that one's packed weight."""
    method, module, record = target.method, target.module, target.record
    assert method is not None
    dense = dense_weight(module).detach()
    weight = method.compress(dense)
    layer = Int8Linear(weight, module.bias if isinstance(module.bias, Tensor) else None, record.activation)
    layer.train(module.training)
    first = layer if target.tie is None else ties.setdefault(target.tie, layer)
    if first is not layer and (first.activation_bits, first.weight_bits) == (layer.activation_bits, layer.weight_bits):
        layer.share(first)
        own = [layer.bias]
    else:
        own = [layer.bias, layer.weight_scale, weight.values]
    record.bytes = sum(t.numel() * t.element_size() for t in own if t is not None)
    norm = float(dense.float().norm())
    record.error = float((weight.decompress() - dense.float()).norm()) / norm if norm else 0.0
    record.method = method.name
    return layer


def install(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a layer into its place, in the mode (training or not) of the one that was there."""
    parent, attribute = _split(name)
    layer.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), attribute, layer)


def switch_off_fast_paths(model: nn.Module) -> None:
    """torch's transformer encoder has a fast path that reads float weights, and packs padded batches for it: not with ours."""
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)) or not compressed_layers(module):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        else:
            module.use_nested_tensor = module.enable_nested_tensor = False


def _install(model: nn.Module, target: _Target, layer: Int8Linear) -> None:
    for name in target.names:
        if name:
            install(model, name, layer)
    for name in target.fused:
        install(model, name, nn.Identity())


def _plan_fusion(model: nn.Module, targets: list[_Target]) -> None:
    followers: dict[str, dict[str, tuple[str, str]]] = {}
    for target in targets:
        hits = []
        for name in filter(None, target.names):
            parent, attribute = _split(name)
            if parent not in followers:
                followers[parent] = fusion.followers(model.get_submodule(parent))
            if attribute in followers[parent]:
                activation, kind = followers[parent][attribute]
                hits.append((f"{parent}.{activation}".lstrip("."), kind))
        if (
            hits and len(hits) == len(target.names) and len({kind for _, kind in hits}) == 1
        ):  # alike wherever it is used
            target.record.activation = hits[0][1]
            target.fused = [name for name, _ in hits]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, was in training.items():
            module.training = was


def _input_shapes(
    model: nn.Module, targets: list[_Target], inputs: Inputs
) -> dict[int, list[tuple[torch.Size, torch.dtype]]]:
    """The shapes in which the example inputs reach each target, one entry a call."""
    calls: dict[int, list[tuple[torch.Size, torch.dtype]]] = {id(t.module): [] for t in targets}

    def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        (x,) = (*args, *keywords.values())
        calls[id(module)].append((x.shape, x.dtype))

    handles = [t.module.register_forward_pre_hook(note, with_kwargs=True) for t in targets]
    try:
        with _evaluating(model):
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _keep_if_faster(model: nn.Module, targets: list[_Target], inputs: Inputs, progress: bool) -> None:
    """Measures each layer on the shapes that the inputs produce; where dense wins, the target loses its method."""
    calls = _input_shapes(model, targets, inputs)
    for target in _track(targets, "measuring", progress):
        shapes = calls[id(target.module)]
        if not shapes:
            _keep_dense(target, "example_inputs never reach it, so it could not be shown to be faster")
            continue
        layer = _compressed(target, {})
        activations = [model.get_submodule(name) for name in target.fused[:1]]

        def dense(x: Tensor, steps: Sequence[nn.Module] = (target.module, *activations)) -> Tensor:
            for step in steps:
                x = step(x)
            return x

        dense_us = us = 0.0
        with torch.inference_mode():
            for shape, dtype in shapes:
                x = torch.randn(shape, dtype=torch.float32).to(dtype)
                pair = interleaved_us(lambda x=x, f=dense: f(x), lambda x=x, f=layer: f(x))  # type: ignore[misc]
                dense_us, us = dense_us + pair[0], us + pair[1]
        record = target.record
        record.dense_us, record.us = dense_us, us
        if us >= dense_us:
            _keep_dense(target, f"dense is faster here: {dense_us:.0f} us against {us:.0f} us")


def _keep_dense(target: _Target, reason: str) -> None:
    record = target.record
    target.method, target.fused = None, []
    target.record = replace(record, method=None, bytes=record.dense_bytes, error=None, activation="none", reason=reason)


def _track(items: list[_Target], what: str, show: bool) -> Iterator[_Target]:
    if not show:
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        for i, item in enumerate(items):
            print(f"\r{what} layer {i + 1} of {len(items)}", end="", file=sys.stderr, flush=True)  # noqa: T201
            yield item
        print(file=sys.stderr)  # noqa: T201
        return
    yield from track(items, description=what, console=Console(stderr=True))


def compress(
    model: ModelT,
    plan: Plan,
    *,
    example_inputs: Inputs | None = None,
    only_if_faster: bool = False,
    inplace: bool = False,
    progress: bool | None = None,
) -> ModelT:
    """Replaces the linear layers that ``plan`` names by compressed ones. Everything that can fail fails before a layer is replaced.

    Args:
        model: any ``nn.Module`` with ``nn.Linear`` (or transformers' ``Conv1D``) layers, on the CPU.
        plan: a method for every layer, or an ordered ``{glob: method or None}``; the first glob that matches a layer's dotted name
            decides, None keeps it dense, and so does no match.
        example_inputs: a tensor, a sequence of positional or a mapping of keyword arguments for ``model``.
        only_if_faster: measure each layer on the shapes that ``example_inputs`` produce, dense and compressed in turns, and keep
            the dense one where it is not slower.
        inplace: change ``model`` itself, layer by layer, so that no more than the model and one layer are in memory. Otherwise a
            copy is returned, which shares nothing with ``model``; the dense weights that are replaced are never copied.
        progress: show a progress bar; None: on a terminal, where the model is large.
    Returns:
        The compressed model. A linear layer followed by ReLU, GELU or SiLU takes the activation into its kernel, and the activation
        module becomes ``nn.Identity``. :func:`summary` tells what became of each layer. Weights that linear layers shared stay
        shared; a weight shared with another kind of layer (an embedding) stays dense.
    Raises:
        TypeError: the plan is no method and no mapping of globs to methods, or there is nothing to compress in that type.
        ValueError: a glob matches nothing, a weight holds NaN or Inf (the layer is named) or is not on the CPU, ``only_if_faster``
            without ``example_inputs``, or ``inplace`` where the model itself is the layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compress: model is {type(model).__name__}, expected a torch.nn.Module")
    if only_if_faster and example_inputs is None:
        raise ValueError(
            "compress: only_if_faster needs example_inputs, to measure the layers on the shapes that they meet"
        )
    targets = _targets(model)
    _assign_methods(targets, plan)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for target in targets:
        if target.method is not None and (reason := _why_dense(target, model, owners)):
            target.method, target.record.reason = None, reason
    chosen = [target for target in targets if target.method is not None]
    _check_weights(chosen)
    if inplace and any(target.module is model for target in chosen):
        raise ValueError("compress: the model itself is the layer to replace, which cannot be done in place")
    if progress is None:
        progress = sys.stderr.isatty() and sum(dense_weight(t.module).numel() for t in chosen) > _LARGE

    _plan_fusion(model, chosen)
    if only_if_faster:
        assert example_inputs is not None
        _keep_if_faster(model, chosen, example_inputs, progress)
        chosen = [target for target in chosen if target.method is not None]
    records = [target.record for target in targets]
    _count_shared_weights_once(targets)
    _number_ties(chosen)
    result = _replace_in_place(model, chosen, progress) if inplace else _replace_in_copy(model, chosen, progress)
    earlier = [record for record in model.__dict__.get(_RECORDS, []) if record.method is not None]
    again = {record.name for record in records}
    records += [record for record in earlier if record.name not in again]
    order = {name: i for i, (name, _) in enumerate(result.named_modules(remove_duplicate=False))}
    result.__dict__[_RECORDS] = sorted(records, key=lambda record: order.get(record.name, len(order)))
    switch_off_fast_paths(result)
    return result


_RECORDS = "_pycompress_records"


def _count_shared_weights_once(targets: list[_Target]) -> None:
    seen: set[int] = set()
    for target in targets:
        weight = target.module.weight
        if id(weight) in seen and isinstance(weight, Tensor):  # (a lazy one is never shared)
            target.record.dense_bytes -= weight.numel() * weight.element_size()
            if target.method is None:
                target.record.bytes = target.record.dense_bytes
        seen.add(id(weight))


def _number_ties(targets: list[_Target]) -> None:
    # Conv1D reads a weight transposed: it cannot share a packed weight with a Linear.
    weights = [(id(target.module.weight), is_conv1d(target.module)) for target in targets]
    for target, weight in zip(targets, weights, strict=True):
        if weights.count(weight) > 1:
            target.tie = weights.index(weight)


def _replace_in_place(model: ModelT, targets: list[_Target], progress: bool) -> ModelT:
    ties: dict[int, Int8Linear] = {}
    for target in _track(targets, "compressing", progress):
        _install(model, target, _compressed(target, ties))
        target.module = nn.Identity()  # lets go of the dense weight before the next layer is compressed
    return model


def _replace_in_copy(model: ModelT, targets: list[_Target], progress: bool) -> ModelT:
    ties: dict[int, Int8Linear] = {}
    memo: dict[
        int, Any
    ] = {}  # deepcopy takes what stands here for a module's copy, so its dense weight is never copied
    for target in _track(targets, "compressing", progress):
        memo[id(target.module)] = _compressed(target, ties)
    layers = [memo[id(target.module)] for target in targets]
    result = deepcopy(model, memo)
    for target, layer in zip(targets, layers, strict=True):
        _install(result, target, layer)
    return result


# --- reporting --------------------------------------------------------------------------------------------------------


def compressed_layers(model: nn.Module) -> dict[str, Int8Linear]:
    """The compressed layers of a model by name, each module once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


class Summary:
    """What became of each layer; ``str()`` is a table.

    Attributes:
        layers: one :class:`LayerRecord` a layer.
        dense_bytes, bytes: of all parameters and buffers of the model, before and after (a shared tensor counts once).
    """

    def __init__(self, layers: list[LayerRecord], total_bytes: int) -> None:
        self.layers = layers
        self.bytes = total_bytes
        self.dense_bytes = total_bytes + sum(layer.dense_bytes - layer.bytes for layer in layers)

    def __str__(self) -> str:
        head = ("layer", "shape", "method", "bytes", "of dense", "error", "dense us", "us", "")
        rows = [head, *(self._row(layer) for layer in self.layers)]
        rows.append(
            (
                "the whole model",
                "",
                "",
                f"{self.bytes:,}",
                f"{self.bytes / max(self.dense_bytes, 1):.2f}",
                "",
                "",
                "",
                "",
            )
        )
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        left = {0, 2, len(head) - 1}
        lines = []
        for row in rows:
            cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("  ".join(cells))
        return "\n".join(line.rstrip() for line in lines)

    @staticmethod
    def _row(layer: LayerRecord) -> tuple[str, ...]:
        def number(value: float | None, spec: str) -> str:
            return "" if value is None else format(value, spec)

        fused = "" if layer.activation == "none" else f"+{layer.activation}"
        return (
            layer.name or "(the model)", f"{layer.shape[0]}x{layer.shape[1]}", (layer.method or "dense") + fused,
            f"{layer.bytes:,}", f"{layer.bytes / max(layer.dense_bytes, 1):.2f}", number(layer.error, ".4f"),
            number(layer.dense_us, ".0f"), number(layer.us, ".0f"), layer.reason,
        )  # fmt: skip


def summary(model: nn.Module) -> Summary:
    """Per layer: method, bytes before and after, weight error, measured times, or why it was left alone.

    For a model that was loaded from a file the errors and times are not known.
    """
    seen: dict[int, Tensor] = {}
    for module in model.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None:
                seen[id(tensor)] = tensor
    packed = {id(layer.packed): layer for layer in compressed_layers(model).values()}
    total = sum(t.numel() * t.element_size() for key, t in seen.items() if key not in packed and not is_lazy(t))
    total += sum(layer.in_features * layer.out_features for layer in packed.values())
    records: list[LayerRecord] | None = model.__dict__.get(_RECORDS)
    if records is None:
        records = [_record_of(name, layer) for name, layer in compressed_layers(model).items()]
    return Summary(list(records), total)


def _record_of(name: str, layer: Int8Linear) -> LayerRecord:
    n, k = layer.out_features, layer.in_features
    channels = n * (1 + (layer.bias is not None))
    return LayerRecord(
        name,
        "Linear",
        (n, k),
        4 * (n * k + channels - n),
        Int8.name,
        bytes=n * k + 4 * channels,
        activation=layer.activation,
    )
