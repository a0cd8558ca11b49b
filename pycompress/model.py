"""``compress``: replace the layers of a model that a plan names."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from torch import nn

from pycompress import passes
from pycompress.calibration import Calibration
from pycompress.calls import Inputs, uncompiled
from pycompress.copying import copied
from pycompress.kinds import folded_into, mark_folded
from pycompress.methods.bias import correction
from pycompress.methods.inputs import InputStatistics
from pycompress.methods.made import Made
from pycompress.methods.method import Method, Refused
from pycompress.methods.notes import noted
from pycompress.nn import CompressedLayer, layer_for
from pycompress.nn.trained import as_dense, is_trained
from pycompress.passes import whole
from pycompress.passes.fold_norm import fold_behind, note_left
from pycompress.plan import (
    Costs,
    Plan,
    Planner,
    Target,
    count_shared_weights_once,
    number_ties,
    settle_methods,
    targets_of,
)
from pycompress.progress import on_a_terminal, track
from pycompress.race import keep_blocks_that_are_not_slower, keep_faster_layers, keep_what_makes_it_faster, replacements
from pycompress.records import LayerRecord, Summary, leave_records, relative_error, summary
from pycompress.surgery import compressed_layers, held_elsewhere, names_of, swap, switch_off_fast_paths
from pycompress.weights import Weight

__all__ = ["Inputs", "LayerRecord", "Method", "Plan", "Summary", "compress", "compressed_layers", "summary"]

ModelT = TypeVar("ModelT", bound=nn.Module)

_LARGE = 50_000_000  # weights from which compress() shows a progress bar on a terminal


def layers_of(
    targets: list[Target], means: Mapping[str, InputStatistics], *, progress: bool = False
) -> dict[nn.Module, CompressedLayer]:  # fmt: skip
    """The compressed layer of each module that has a method, none in its place. Those that share their weight share a compressed
    one, if it came out alike. Where a method refuses a layer, the target has lost its method, and its record says why.

    Args:
        means: of the inputs that were seen, by which biases are corrected.
    """
    layers: dict[nn.Module, CompressedLayer] = {}
    ties: dict[int, list[CompressedLayer]] = {}
    weights: dict[Any, tuple[Weight | Refused, list[str]]] = {}
    for target in track(_chosen(targets), "compressing", progress):
        module, record = target.module, target.record
        weight, notes = _weight(target, weights)
        if isinstance(weight, Refused):
            target.keep_dense(str(weight))
            continue
        kind = layer_for(target.kind, weight.name)
        assert kind is not None
        dense = target.computing
        layer = kind.replacing(dense, weight, record.activation)
        if norms := folded_into(dense):
            mark_folded(layer, norms)
        _correct_bias(layer, target, weight, means)
        layer.train(module.training)
        shares = target.tie is not None and layer.tie(ties.setdefault(target.tie, []))
        record.describe(layer, shares_weight=shares)
        record.note = "; ".join(filter(None, [record.note, *notes]))
        record.error = relative_error(target.dense.detach(), weight.decompress())
        layers[module] = layer
    return layers


def _correct_bias(layer: CompressedLayer, target: Target, weight: Weight, seen: Mapping[str, InputStatistics]) -> None:
    """Has a bias make up for what the outputs' mean has lost, where the inputs of the layer were seen."""
    found = next((seen[name] for name in target.names if name in seen), None)
    if not target.kind.has_rows(target.module):  # means of all groups' rows together are none's
        return
    if layer.bias32 is not None and found is not None and found.mean is not None:
        layer.bias32.add_(correction(target.dense.detach(), weight.decompress(), found.mean).float())


def _weight(
    target: Target, shared: dict[Any, tuple[Weight | Refused, list[str]]]
) -> tuple[Weight | Refused, list[str]]:  # fmt: skip
    """What the method makes of the weight, or why it refuses it, and its notes; of one that several layers share, once."""
    method, module = target.method, target.module
    assert method is not None
    key = (target.key, id(method), target.kind.geometry(module))
    if target.tie is not None and key in shared:
        return shared[key]
    with noted() as notes:
        try:
            weight: Weight | Refused = target.kind.fitted(method, module).compress(target.dense.detach())
        except Refused as refused:
            weight = refused
        except (TypeError, ValueError) as error:
            raised = TypeError if isinstance(error, TypeError) else ValueError
            raise raised(f"compress: {target.name}: {error}") from error
    if target.tie is not None:
        shared[key] = weight, notes
    return weight, notes


def compress(
    model: ModelT,
    plan: Plan | None = None,
    *,
    calibration: Mapping[str, InputStatistics] | None = None,
    example_inputs: Inputs | None = None,
    only_if_faster: bool | Costs = False,
    inplace: bool = False,
    progress: bool | None = None,
    blocks: bool = True,
    skip_padding: bool = False,
    correct_bias: bool = True,
    fold_norms: bool = True,
    target: Planner | None = None,
) -> ModelT:
    """Replaces the layers that ``plan`` names by compressed ones. Everything that can fail fails before a layer is replaced.

    Args:
        model: any ``nn.Module`` with ``nn.Linear`` (or transformers' ``Conv1D``) or ``nn.Conv2d`` layers, on the CPU; or with
            ``nn.Embedding``, for a method that takes embeddings; or of a kind that was registered.
        plan: a method for every layer, or an ordered ``{glob: method or None}``; the first glob that matches a layer's dotted name
            decides, None keeps it dense, and so does no match. A method that looks at several layers together (``Sparse`` with the
            scope ``model``) sees those that the same object stands for. All linear layers and convolutions count as matched; those
            that their method cannot take (a convolution that is transposed, or in groups and to be sparse) stay dense, and their
            summary says why; so do those that it refuses when it sees their weight (``LowRank`` where its rank would not be
            faster). None: of a model that :func:`prepare` made, each layer by what it was trained as.
        calibration: what :func:`calibrate` gathered, for methods that make use of it; others go without.
        example_inputs: a tensor, a sequence of positional or a mapping of keyword arguments for ``model``. Where activations are to
            be fused, the model is run on them with and without; where the outputs differ, the activation stays. Running them leaves
            the model, them and the random state as they were.
        only_if_faster: measure each layer on the shapes that ``example_inputs`` produce, dense and compressed in turns, and keep
            the dense one where it is not slower; then the whole model, and put layers back (half of them, half of these, and so
            on) until its median time is below the dense model's. Layers that are alike are measured once. The profile of another
            machine (:func:`profile`) instead: linear layers stay compressed that are faster by its times, all others stay dense;
            nothing is measured here.
        inplace: change ``model`` itself. All compressed layers are made before the first is put in its place, so that the model and
            they are in memory together. Otherwise a copy is returned, which shares nothing with ``model``, except functions; the
            dense weights that are replaced are never copied.
        progress: show a progress bar; None: on a terminal, where the model is large.
        blocks: have transformer blocks of known classes, and the embeddings and means around them, run as one op each, and static
            int8 convolutions hand on bytes (:mod:`pycompress.passes.whole`). Each block is tried beside its original first, and
            stays as it was where they differ; with hooks inside, gradients, in training, or with attentions asked for, the original
            forward runs. Where ``only_if_faster`` is set, those blocks stay with which the model is not slower.
        skip_padding: have blocks compute no token that their mask hides from all others; they give zeros there, where the model
            would give numbers that nobody reads. All other tokens get what they would get in a sequence of their own.
        correct_bias: where the calibration saw a layer that has a bias, have the bias keep the mean of the outputs
            (:mod:`pycompress.methods.bias`).
        fold_norms: fold a batch norm behind a layer into the layer before that is compressed, as :func:`fold_norms` does; in
            evaluation mode only. The summary has the reason of each norm that stays.
        target: instead of a plan: the profile of a machine (:func:`profile`), by which each linear layer gets the precision
            that is fastest there and fits its memory; convolutions and embeddings get int8 where it is short.
    Returns:
        The compressed model; :func:`summary` tells what became of each layer.

        - A layer followed by ReLU, ReLU6, GELU, SiLU, Hardswish or QuickGELU takes the activation into its kernel, and the
          module becomes ``nn.Identity``, where the source of the model says that neither is used otherwise.
        - A layer is replaced wherever the model holds it, in lists, dictionaries and the like; attributes that somebody gave it go
          over to the compressed one. Weights that such layers shared stay shared. A layer that ``torch.nn.utils.prune`` pruned is
          taken with its masks, as it computes.
        - Layers stay dense that have hooks, a forward of their own, or a weight that is no plain tensor (parallelized, quantized)
          or is shared with another kind of layer (an embedding); and those that something holds where they cannot be replaced,
          such as the closure of a function.
    Raises:
        TypeError: the plan is no method and no mapping of globs to methods, there is none and nothing is prepared, there is nothing
            to compress in that type, or the model holds something that cannot be copied (it is named); ``only_if_faster`` is
            neither a bool nor a machine.
        ValueError: a glob matches nothing, a weight holds NaN or Inf (the layer is named) or is not on the CPU, ``only_if_faster``
            without ``example_inputs``, ``skip_padding`` without ``blocks``, ``inplace`` where the model itself is the layer, a
            calibration that is still running or that never saw a layer whose method makes use of it, a plan for a prepared model, a
            target beside a plan, or one whose memory is too small for the model (``DoesNotFit``); a method of which the machine to
            be faster on has no times.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compress: model is {type(model).__name__}, expected a torch.nn.Module")
    if target is not None:
        if plan is not None:
            raise ValueError("compress: both a plan and a target are given, expected one of them")
        plan = target.plan_for(model, example_inputs)
    if not isinstance(only_if_faster, bool) and not hasattr(only_if_faster, "layer_us"):
        raise TypeError(
            f"compress: only_if_faster is {only_if_faster!r}, expected True, False, or the profile of a machine"
        )
    if only_if_faster and example_inputs is None:
        raise ValueError(
            "compress: only_if_faster needs example_inputs, to measure the layers on the shapes that they meet"
        )
    whole.check(blocks, skip_padding, "compress")
    options: dict[str, Any] = {"example_inputs": example_inputs, "only_if_faster": only_if_faster, "inplace": inplace}
    options |= {"progress": progress, "blocks": blocks, "skip_padding": skip_padding, "correct_bias": correct_bias}
    without = () if fold_norms else (fold_behind,)
    if any(map(is_trained, model.modules())):
        return _frozen(model, plan, options)
    if plan is None:
        raise TypeError(
            "compress: the plan is None, expected a method or {glob: method}: no layer of the model is prepared"
        )
    if isinstance(calibration, Calibration) and calibration.running:
        raise ValueError("compress: the calibration is still running, expected its `with` block to have ended")
    given, model = model, uncompiled(model)  # type: ignore[assignment]
    with whole.without(model):
        result = _replaced(
            model, plan, calibration, example_inputs, only_if_faster, inplace, progress, correct_bias, without
        )
    whole.remove(result)
    if blocks:
        whole.install(result, skip_padding=skip_padding)
        if only_if_faster is True:
            assert example_inputs is not None
            keep_blocks_that_are_not_slower(result, example_inputs)
    return given if inplace else result


def _frozen(model: ModelT, plan: Plan | None, options: Mapping[str, Any]) -> ModelT:
    """A prepared model, each layer by the weight that it was trained as."""
    if plan is not None:
        raise ValueError("compress: the model is prepared, expected no plan: compress(model) freezes what was trained")
    with as_dense(model) as weights:
        made: dict[int, Any] = {id(weight): Made(weight) for weight in weights.values()}
        # (A weight that is made already takes no norm in.)
        return compress(
            model, {name: made[id(weight)] for name, weight in weights.items()}, **options, fold_norms=False
        )


def _replaced(
    model: ModelT, plan: Plan, calibration: Mapping[str, InputStatistics] | None, example_inputs: Inputs | None,
    only_if_faster: bool | Costs, inplace: bool, progress: bool | None, correct_bias: bool, without: Collection[passes.Pass],
) -> ModelT:  # fmt: skip
    """The model, or a copy of it, with compressed layers."""
    targets, edits = planned(model, plan, calibration, example_inputs, without=without)
    if inplace and any(target.module is model for target in _chosen(targets)):
        raise ValueError("compress: the model itself is the layer to replace, which cannot be done in place")
    if progress is None:
        progress = on_a_terminal() and sum(math.prod(t.kind.shape(t.module)) for t in _chosen(targets)) > _LARGE
    layers = layers_of(targets, (calibration or {}) if correct_bias else {}, progress=progress)
    if only_if_faster:
        assert example_inputs is not None
        costs = None if only_if_faster is True else only_if_faster
        keep_faster_layers(model, _chosen(targets), layers, example_inputs, costs, progress)
        if costs is None and model not in layers:
            keep_what_makes_it_faster(model, _chosen(targets), layers, example_inputs)
    result = _with_layers(model, replacements(_chosen(targets), layers), inplace=inplace)
    for target in targets:
        target.record.dense_bytes += sum(norm.bytes for norm in target.norms)
    leave_records(result, [target.record for target in targets])
    note_left(result, edits)
    switch_off_fast_paths(result)
    return result


def planned(
    model: nn.Module, plan: Plan, calibration: Mapping[str, InputStatistics] | None = None, inputs: Inputs | None = None,
    *, without: Collection[passes.Pass] = (),
) -> tuple[list[Target], list[passes.Edit]]:  # fmt: skip
    """The layers of a model, those to be compressed with the method that is to do it, and what passes make of them; the model is
    only looked at. Raises as :func:`compress` does."""
    targets = targets_of(model, plan)
    _keep_what_is_held_elsewhere(model, targets)
    edits = passes.run(model, _chosen(targets), inputs, without=without)
    settle_methods(targets, calibration)
    count_shared_weights_once(targets)
    number_ties(_chosen(targets))
    return targets, edits


def _chosen(targets: list[Target]) -> list[Target]:
    return [target for target in targets if target.method is not None]


def _keep_what_is_held_elsewhere(model: nn.Module, targets: list[Target]) -> None:
    held = held_elsewhere(model, [target.module for target in _chosen(targets)])
    for target in targets:
        if target.module in held:
            target.keep_dense(f"{held[target.module][0]} holds it, where it cannot be replaced")


def _with_layers(model: ModelT, places: dict[nn.Module, nn.Module], *, inplace: bool) -> ModelT:
    """The model, or a copy of it, with other modules in these places."""
    if model in places:
        return places[model]  # type: ignore[return-value]
    if inplace:
        swap(model, places)
        return model
    names = names_of(model)
    result = copied(model, places)
    swap(result, {result.get_submodule(name): new for old, new in places.items() for name in names[old]})
    return result
