"""``compress``: replace the layers of a model that a plan names."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pycompress import passes
from pycompress.calibration import Calibration
from pycompress.calls import Inputs, call_model, evaluating, only_argument
from pycompress.kinds import pruned_names, without_pruning
from pycompress.measure import interleaved_us
from pycompress.methods.inputs import InputStatistics
from pycompress.methods.method import Method, Refused
from pycompress.nn import CompressedLayer, layer_for
from pycompress.plan import Plan, Target, count_shared_weights_once, number_ties, targets_of
from pycompress.records import RECORDS, LayerRecord, Summary, summary
from pycompress.surgery import compressed_layers, install, switch_off_fast_paths

__all__ = ["Inputs", "LayerRecord", "Method", "Plan", "Summary", "compress", "compressed_layers", "summary"]

ModelT = TypeVar("ModelT", bound=nn.Module)

_LARGE = 50_000_000  # weights from which compress() shows a progress bar on a terminal


def _compressed(target: Target, ties: dict[int, list[CompressedLayer]]) -> CompressedLayer | None:
    """The compressed layer; one that ties its weight to an earlier one (in ``ties``) shares that one's, if they came out alike.

    None where its method refuses it: then the target has lost its method, and its record says why.
    """
    method, module, record = target.method, target.module, target.record
    assert method is not None
    kind, dense = layer_for(target.kind, method.name), target.dense.detach()
    assert kind is not None
    try:
        weight = target.kind.fitted(method, module).compress(dense)
    except Refused as refused:
        target.keep_dense(str(refused))
        return None
    except (TypeError, ValueError) as error:
        raised = TypeError if isinstance(error, TypeError) else ValueError
        raise raised(f"compress: {target.name}: {error}") from error
    layer = kind.replacing(module, weight, record.activation)
    layer.train(module.training)
    shares = layer.tie([] if target.tie is None else ties.setdefault(target.tie, []))
    record.describe(layer, shares_weight=shares)
    norm = float(dense.float().norm())
    record.error = float((weight.decompress() - dense.float()).norm()) / norm if norm else 0.0
    return layer


def _install(model: nn.Module, target: Target, layer: CompressedLayer) -> None:
    for name in target.names:
        if name:
            install(model, name, layer)
    for name in target.fused:
        install(model, name, nn.Identity())


# --- measuring --------------------------------------------------------------------------------------------------------


def _input_shapes(model: nn.Module, targets: list[Target], inputs: Inputs) -> dict[int, list[Tensor]]:
    """The shapes, strides and dtypes in which the example inputs reach each target: tensors without data, one a call."""
    calls: dict[int, list[Tensor]] = {id(t.module): [] for t in targets}

    def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls[id(module)].append(torch.empty_like(only_argument(args, keywords), device="meta"))

    handles = [t.module.register_forward_pre_hook(note, with_kwargs=True) for t in targets]
    try:
        with evaluating(model, inputs):
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _keep_if_faster(model: nn.Module, targets: list[Target], inputs: Inputs, progress: bool) -> None:
    """Measures each layer on the shapes that the inputs produce; where dense wins, the target loses its method."""
    calls = _input_shapes(model, targets, inputs)
    for target in _track(targets, "measuring", progress):
        shapes = calls[id(target.module)]
        if not shapes:
            target.keep_dense("example_inputs never reach it, so it could not be shown to be faster")
            continue
        layer = _compressed(target, {})
        if layer is None:
            continue
        activations = [model.get_submodule(name) for name in target.fused[:1]]
        plain = without_pruning(target.module)  # dense without torch's masks: these need not be applied at each call

        def dense(x: Tensor, steps: Sequence[nn.Module] = (plain, *activations)) -> Tensor:
            for step in steps:
                x = step(x)
            return x

        dense_us = us = 0.0
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            for shape in shapes:
                x = target.kind.sample(target.module, shape)
                pair = interleaved_us(lambda x=x, f=dense: f(x), lambda x=x, f=layer: f(x))  # type: ignore[misc]
                dense_us, us = dense_us + pair[0], us + pair[1]
        record = target.record
        record.dense_us, record.us = dense_us, us
        if us >= dense_us:
            target.keep_dense(f"dense is faster here: {dense_us:.0f} us against {us:.0f} us")


def _track(items: list[Target], what: str, show: bool) -> Iterator[Target]:
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
    calibration: Mapping[str, InputStatistics] | None = None,
    example_inputs: Inputs | None = None,
    only_if_faster: bool = False,
    inplace: bool = False,
    progress: bool | None = None,
) -> ModelT:
    """Replaces the layers that ``plan`` names by compressed ones. Everything that can fail fails before a layer is replaced.

    Args:
        model: any ``nn.Module`` with ``nn.Linear`` (or transformers' ``Conv1D``) or ``nn.Conv2d`` layers, on the CPU; or with
            ``nn.Embedding``, for a method that takes embeddings; or of a kind that was registered.
        plan: a method for every layer, or an ordered ``{glob: method or None}``; the first glob that matches a layer's dotted name
            decides, None keeps it dense, and so does no match. A method that looks at several layers together (``Sparse`` with the
            scope ``model``) sees those that the same object stands for. All linear layers and convolutions count as matched; those
            that their method cannot take (a Conv2d that is to be int8, in groups, transposed or of another kind) stay dense, and
            their summary says why; so do those that it refuses when it sees their weight (``LowRank`` where its rank would not be
            faster).
        calibration: what :func:`calibrate` gathered, for methods that make use of it; others go without.
        example_inputs: a tensor, a sequence of positional or a mapping of keyword arguments for ``model``. Running them leaves the
            model, them and the random state as they were.
        only_if_faster: measure each layer on the shapes that ``example_inputs`` produce, dense and compressed in turns, and keep
            the dense one where it is not slower.
        inplace: change ``model`` itself, layer by layer, so that no more than the model and one layer are in memory. Otherwise a
            copy is returned, which shares nothing with ``model``; the dense weights that are replaced are never copied.
        progress: show a progress bar; None: on a terminal, where the model is large.
    Returns:
        The compressed model. A layer followed by ReLU, GELU or SiLU takes the activation into its kernel, and the activation
        module becomes ``nn.Identity``. :func:`summary` tells what became of each layer. Weights that such layers shared stay
        shared; a weight shared with another kind of layer (an embedding) stays dense. A layer that ``torch.nn.utils.prune`` pruned
        is taken with its masks, as it computes.
    Raises:
        TypeError: the plan is no method and no mapping of globs to methods, or there is nothing to compress in that type.
        ValueError: a glob matches nothing, a weight holds NaN or Inf (the layer is named) or is not on the CPU, ``only_if_faster``
            without ``example_inputs``, ``inplace`` where the model itself is the layer, a calibration that is still running or that
            never saw a layer whose method makes use of it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compress: model is {type(model).__name__}, expected a torch.nn.Module")
    if only_if_faster and example_inputs is None:
        raise ValueError(
            "compress: only_if_faster needs example_inputs, to measure the layers on the shapes that they meet"
        )
    if isinstance(calibration, Calibration) and calibration.running:
        raise ValueError("compress: the calibration is still running, expected its `with` block to have ended")
    targets = targets_of(model, plan, calibration)
    chosen = [target for target in targets if target.method is not None]
    passes.run(model, chosen)
    if inplace and any(target.module is model for target in chosen):
        raise ValueError("compress: the model itself is the layer to replace, which cannot be done in place")
    if progress is None:
        progress = sys.stderr.isatty() and sum(math.prod(t.kind.shape(t.module)) for t in chosen) > _LARGE
    if only_if_faster:
        assert example_inputs is not None
        _keep_if_faster(model, chosen, example_inputs, progress)
        chosen = [target for target in chosen if target.method is not None]
    count_shared_weights_once(targets)
    number_ties(chosen)
    result = _replace_in_place(model, chosen, progress) if inplace else _replace_in_copy(model, chosen, progress)
    records = [target.record for target in targets]
    earlier = [record for record in model.__dict__.get(RECORDS, []) if record.method is not None]
    again = {record.name for record in records}
    records += [record for record in earlier if record.name not in again]
    order = {name: i for i, (name, _) in enumerate(result.named_modules(remove_duplicate=False))}
    result.__dict__[RECORDS] = sorted(records, key=lambda record: order.get(record.name, len(order)))
    switch_off_fast_paths(result)
    return result


def _replace_in_place(model: ModelT, targets: list[Target], progress: bool) -> ModelT:
    ties: dict[int, list[CompressedLayer]] = {}
    for target in _track(targets, "compressing", progress):
        layer = _compressed(target, ties)
        if layer is not None:
            _install(model, target, layer)
        target.module = nn.Identity()  # lets go of the dense weight before the next layer is compressed
    return model


def _replace_in_copy(model: ModelT, targets: list[Target], progress: bool) -> ModelT:
    ties: dict[int, list[CompressedLayer]] = {}
    memo: dict[int, Any] = {}  # what stands here for a module is taken for its copy: its dense weight is never copied
    layers: list[CompressedLayer] = []
    for target in _track(targets, "compressing", progress):
        layer = _compressed(target, ties)
        if layer is not None:
            memo[id(target.module)] = layer
            layers.append(layer)
    for module in model.modules():
        if id(module) not in memo:
            memo.update(_products_of_pruning(module))
    result = deepcopy(model, memo)
    for target, layer in zip([target for target in targets if target.method is not None], layers, strict=True):
        _install(result, target, layer)
    return result


def _products_of_pruning(module: nn.Module) -> dict[int, Tensor]:
    """Copies, by id, of what torch.nn.utils.prune leaves in a module between two calls: deepcopy refuses what has a history."""
    products = [module.__dict__.get(name) for name in pruned_names(module)]
    return {id(product): product.detach().clone() for product in products if isinstance(product, Tensor)}
