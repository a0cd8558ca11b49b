"""``only_if_faster``: each layer against its dense one, and then the whole model against the dense one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.calls import Inputs, call_model, evaluating
from pycompress.kinds import emptied, without_pruning
from pycompress.measure import Clock, interleaved_us
from pycompress.nn import CompressedLayer
from pycompress.nn.block import LEFT, Block, become_block, become_original
from pycompress.passes.blocks import blocks_of
from pycompress.plan import Costs, Target
from pycompress.progress import track
from pycompress.state import unwatched
from pycompress.surgery import Swap, switch_off_fast_paths

Layers = Mapping[nn.Module, CompressedLayer]  # by the dense module

_ROUNDS, _SECONDS = (7, 41), 2.0  # of a whole model: at least and at most, and for how long in between


def replacements(targets: Iterable[Target], layers: Layers) -> dict[nn.Module, nn.Module]:
    """What takes which place where these targets are compressed."""
    places: dict[nn.Module, nn.Module] = {}
    for target in targets:
        places[target.module] = layers[target.module]
        for norm in target.norms:
            places[norm.module] = emptied(norm.channels)
        if target.fused is not None:
            places[target.fused] = nn.Identity()
        if target.pad is not None:
            places[target.pad] = nn.Identity()
    return places


# --- layer by layer ---------------------------------------------------------------------------------------------------


def keep_faster_layers(
    model: nn.Module, targets: list[Target], layers: Layers, inputs: Inputs, costs: Costs | None, progress: bool
) -> None:  # fmt: skip
    """Measures each layer on the shapes that the inputs produce, or looks up its ``costs``; where dense wins, the target loses its
    method. Layers that are alike are measured once."""
    calls = input_shapes(model, targets, inputs)
    known: dict[str, tuple[float, float]] = {}
    for target in track(targets, "measuring", progress):
        shapes, layer, record = calls[id(target.module)], layers[target.module], target.record
        if not shapes:
            target.keep_dense("example_inputs never reach it, so it could not be shown to be faster")
            continue
        if costs is not None:
            where = f"on {costs.name}"
            if target.kind.name != "linear":
                target.keep_dense(
                    f"{costs.name} has times of linear layers only, so it could not be shown to be faster"
                )
                continue
            record.dense_us, record.us = _looked_up(target, shapes, costs)
        else:
            where = "here"
            alike = repr((makes(target, layer), [(x.shape, x.stride(), x.dtype) for x in shapes]))
            if alike not in known:
                known[alike] = layer_us(target, layer, shapes)
            record.dense_us, record.us = known[alike]
        if record.us >= record.dense_us:
            target.keep_dense(f"dense is faster {where}: {record.dense_us:.0f} us against {record.us:.0f} us")


def _looked_up(target: Target, shapes: list[Tensor], costs: Costs) -> tuple[float, float]:
    method = target.method
    assert method is not None
    if getattr(method, "inputs", None) is not None:  # what calibration saw changes no time
        method = replace(method, inputs=None)  # type: ignore[type-var]
    try:
        pairs = [costs.layer_us(method, target.kind.shape(target.module), math.prod(x.shape[:-1])) for x in shapes]
    except ValueError as error:
        raise ValueError(f"compress: {target.name}: {error}") from None
    return sum(dense for dense, _ in pairs), sum(us for _, us in pairs)


def makes(target: Target, layer: CompressedLayer) -> dict[str, Any]:
    """What the time of a compressed layer may depend on besides the shape of its input."""
    geometry = None if layer.geometry is None else layer.geometry.settings()
    return {
        "kind": layer.kind.name, "method": layer.label, "n": layer.n, "k": layer.k, "geometry": geometry,
        "bias": layer.bias32 is not None, "activation": layer.activation, "norms": len(target.norms),
        "pads": target.pad is not None, **layer.settings,
    }  # fmt: skip


def input_shapes(model: nn.Module, targets: list[Target], inputs: Inputs) -> dict[int, list[Tensor]]:
    """The shapes, strides and dtypes in which the example inputs reach each target: tensors without data, one a call."""
    calls: dict[int, list[Tensor]] = {id(t.module): [] for t in targets}
    owners = {t.first: t for t in targets}

    def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        target = owners[module]
        calls[id(target.module)].append(torch.empty_like(target.kind.input_of(args, keywords), device="meta"))

    handles = [first.register_forward_pre_hook(note, with_kwargs=True) for first in owners]
    try:
        with evaluating(model, inputs):
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def layer_us(
    target: Target, layer: CompressedLayer, shapes: list[Tensor], clock: Clock = time.perf_counter
) -> tuple[float, float]:  # fmt: skip
    """Of all calls together, dense and compressed."""
    steps = [without_pruning(target.module)]  # dense without torch's masks: these need not be applied at each call
    steps = [*filter(None, [target.pad]), *steps, *(norm.module for norm in target.norms)]
    if target.fused is not None:
        steps.append(target.fused)

    def dense(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    dense_us = us = 0.0
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for shape in shapes:
            x = target.kind.sample(target.module, shape)
            pair = interleaved_us(lambda x=x: dense(x), lambda x=x: layer(x), clock=clock)  # type: ignore[misc]
            dense_us, us = dense_us + pair[0], us + pair[1]
    return dense_us, us


# --- the whole model --------------------------------------------------------------------------------------------------


def keep_what_makes_it_faster(model: nn.Module, targets: list[Target], layers: Layers, inputs: Inputs) -> None:
    """Puts dense layers back until the model is faster than the dense one: a layer may win alone and lose in its place, where other
    code asks for its weight or converts its results.

    Where the model is not faster with all, each half of the layers is tried in turn, and halves of these, and at last what is left
    together. Decided by medians over turns, so that what makes no difference may go either way, and nothing that makes one.
    """
    if targets:
        _faster(model, targets, layers, inputs)


def _faster(
    model: nn.Module, targets: list[Target], layers: Layers, inputs: Inputs
) -> tuple[float, list[Target]]:  # fmt: skip
    """Those of the targets with which the model is faster, and by how much; the others lose their method."""
    dense_us, us = model_us(model, targets, layers, inputs)
    if us < dense_us:
        return dense_us - us, targets
    if len(targets) == 1:
        return _put_back(targets, dense_us, us)
    middle = len(targets) // 2
    halves = [_faster(model, half, layers, inputs) for half in (targets[:middle], targets[middle:])]
    (_, worse), better = sorted(halves, key=lambda half: half[0])
    if not worse:
        return better
    both = [*worse, *better[1]]
    dense_us, us = model_us(model, both, layers, inputs)
    if us < dense_us:
        return dense_us - us, both
    _put_back(worse, dense_us, us)
    return better


def _put_back(targets: list[Target], dense_us: float, us: float) -> tuple[float, list[Target]]:
    for target in targets:
        target.keep_dense(f"the model is slower with it: {us:.0f} us against {dense_us:.0f} us")
    return 0.0, []


def model_us(model: nn.Module, targets: list[Target], layers: Layers, inputs: Inputs) -> tuple[float, float]:
    """Median microseconds of a call of the model, dense and with these layers, in turns."""
    change = Swap(model, replacements(targets, layers))

    def turn() -> tuple[float, float]:
        dense = _call_us(model, inputs)
        change.do()
        try:
            return dense, _call_us(model, inputs)
        finally:
            change.undo()

    fewest, most = _ROUNDS
    rounds = round(_SECONDS * 1e6 / sum(turn()))  # the first one warms up
    turns = [turn() for _ in range(max(fewest, min(most, rounds)))]
    return median(dense for dense, _ in turns), median(us for _, us in turns)


def keep_blocks_that_are_not_slower(model: nn.Module, inputs: Inputs) -> None:
    """Has blocks run as they did before until the model is not slower with those that are left: all of them or, where it is, each
    half in turn, and halves of these."""
    _not_slower(model, [*blocks_of(model).items()], inputs)


def _not_slower(model: nn.Module, blocks: list[tuple[nn.Module, Block]], inputs: Inputs) -> None:
    """Leaves those of the blocks in with which the model is not slower than with none of them; all others stay as they are."""
    if not blocks:
        return

    def put(these: list[tuple[nn.Module, Block]]) -> None:
        for module, block in these:
            become_block(module, block.description)

    def turn() -> tuple[float, float]:
        for module, _ in blocks:
            become_original(module)
        without = _call_us(model, inputs)
        put(blocks)
        return without, _call_us(model, inputs)

    turn()
    before, after = map(median, zip(*(turn() for _ in range(_ROUNDS[0])), strict=True))
    if after <= before:
        return
    for module, _ in blocks:
        become_original(module)
        vars(module)[LEFT] = f"the model is slower with it: {after:.0f} us against {before:.0f} us"
    if len(blocks) > 1:
        middle = len(blocks) // 2
        for half in (blocks[:middle], blocks[middle:]):
            for module, _ in half:
                del vars(module)[LEFT]
            put(half)
            _not_slower(model, half, inputs)


def _call_us(model: nn.Module, inputs: Inputs) -> float:
    """Of one call, as a user would make it: each meets the same caches, counters and inputs."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with evaluating(model, inputs):
        with evaluating(model, inputs):
            call_model(model, inputs)  # warms up; and the block around this one learns what a call writes to
        switch_off_fast_paths(model)
        torch.backends.mha.set_fastpath_enabled(fast_path)
        with unwatched():
            start = time.perf_counter()
            call_model(model, inputs)
            return (time.perf_counter() - start) * 1e6
