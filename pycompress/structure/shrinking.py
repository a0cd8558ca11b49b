"""``shrink``: a smaller dense model, without the units that its results need least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pycompress.calibration import Calibration
from pycompress.calls import Inputs, call_model, evaluating, uncompiled
from pycompress.copying import copied
from pycompress.kinds import Kind, kind_of
from pycompress.methods.elimination import Consumer, Elimination, eliminated, refitted
from pycompress.methods.inputs import InputStatistics
from pycompress.methods.threads import one_thread
from pycompress.passes import whole
from pycompress.structure import channels as by_flow
from pycompress.structure import transformers
from pycompress.structure.choose import by_cost, by_share, loss_of
from pycompress.structure.cut import Cut, Record, leave_cut, masked
from pycompress.structure.depth import tensors_in, without, without_blocks
from pycompress.structure.pace import share_for, speedup_of
from pycompress.structure.units import KINDS, Input, Left, Units
from pycompress.surgery import compressed_layers

ModelT = TypeVar("ModelT", bound=nn.Module)
Rate = float | bool | Mapping[str, float | bool | None] | None
Chosen = dict[Units, Tensor]  # which units stay, bool [size] each

_ROUNDING = 1e-3  # of the largest result: what a smaller model may differ by from one that does not use what it lacks


def shrink(
    model: ModelT,
    *,
    neurons: Rate = None,
    heads: Rate = None,
    channels: Rate = None,
    blocks: Rate | Sequence[str] = None,
    speedup: float | None = None,
    calibration: Mapping[str, InputStatistics] | None = None,
    fisher: Mapping[str, Tensor] | None = None,
    example_inputs: Inputs | None = None,
) -> ModelT:
    """A smaller dense model: without the neurons, attention heads, channels or whole blocks that its results need least.

    What stays is fitted anew, in least squares, to what the layers gave before. The model passed in is left as it is; the result
    shares nothing with it, can be trained, and compressed (``compress``) like any dense model; ``Cut.of`` tells what became of it.

    A rate is the share that stays, over all layers by one threshold; or ``{glob: share or None}`` of names of layers, where the
    first glob that matches decides and holds for those that match it together; or True: as ``speedup`` asks.

    Args:
        model: on the CPU, without compressed layers.
        neurons: of the MLPs of transformer blocks of known classes; by the name of the layer that makes them.
        heads: of their attentions; by the name of the module that holds the query.
        channels: of convolutions, and features of linear layers, wherever the way of each through the model, from
            ``example_inputs`` on, leads through operations that treat channels alike; by the name of the first layer that makes
            them. Needs ``example_inputs``.
        blocks: whole blocks: modules of an ``nn.ModuleList`` or ``nn.Sequential`` whose result looks like their input; by their
            names. They go one after another, each the one without which the results of the model for ``example_inputs`` change
            least. Needs ``example_inputs``, and a call of its own, since the inputs of what stays are others then. Or a list of the
            names of those that go.
        speedup: how many times as fast the model has to be on ``example_inputs``, measured in turns: of all units whose rate is
            True so many go, those first that lose least for the parameters that they save.
        calibration: what :func:`calibrate` gathered. A unit's loss is what the layers behind it lose of the power of their results
            once they are fitted anew, by the moments of their inputs. Without it by their weights alone, and nothing is fitted.
        fisher: what :func:`fisher` gathered: then a loss is what it makes of the results of the model, or of its loss.
        example_inputs: a tensor, a sequence of positional or a mapping of keyword arguments. Where they are given, the smaller
            model is run on them beside one that only does not use what it lacks, before anything is fitted: they have to agree.
    Raises:
        TypeError: no module; or it holds something that cannot be copied (it is named).
        ValueError: no rate, one outside (0, 1], a glob that matches nothing, nothing that can shrink (with the reasons), a
            calibration that never saw a layer, a speed-up that cannot be reached, what ``example_inputs`` are needed for.
        RuntimeError: the smaller model computes something else than one that does not use what it lacks.
    """
    rates = {"neurons": neurons, "heads": heads, "channels": channels}
    _check(model, {**rates, "blocks": blocks}, speedup, calibration, example_inputs)
    dense = uncompiled(model)
    with whole.without(dense):
        small: Any = copied(dense, ())
    cut_before = Cut.of(dense)
    if isinstance(blocks, Sequence):
        cut = without(small, blocks, example_inputs)
    elif blocks is not None:
        assert example_inputs is not None
        assert not isinstance(blocks, bool)
        cut = without_blocks(small, blocks if isinstance(blocks, Mapping) else {"*": blocks}, example_inputs)
    else:
        asked, left = _asked(small, rates, example_inputs)
        seek = _Orders(small, calibration, fisher)
        with one_thread():
            orders = {units: seek.of(units) for pool, _ in asked for units in pool}
        stay = _chosen(dense, small, asked, orders, speedup, example_inputs)
        records = tuple(
            Record(u.kind, u.name, u.size, int(kept.sum()), loss_of(orders[u], kept)) for u, kept in stay.items()
        )
        cut = replace(Cut.leaving(small, stay), records=records, left=tuple(left))
        if example_inputs is not None:
            _compare(small, cut, stay, example_inputs)
        with one_thread():
            seek.refit(stay)
    leave_cut(small, Cut())
    leave_cut(cut.apply(small), cut_before.then(cut))
    return small  # type: ignore[no-any-return]


def _check(
    model: object, rates: Mapping[str, Rate | Sequence[str]], speedup: float | None, calibration: object, inputs: Inputs | None
) -> None:  # fmt: skip
    if not isinstance(model, nn.Module):
        raise TypeError(f"shrink: model is {type(model).__name__}, expected a torch.nn.Module")
    given = {name: rate for name, rate in rates.items() if rate is not None and rate is not False}
    if not given:
        raise ValueError(
            "shrink: neurons, heads, channels or blocks is needed, expected the share that stays of one of them"
        )
    by_name = isinstance(given.get("blocks"), Sequence)
    shares = {
        name: [*rate.values()] if isinstance(rate, Mapping) else [] if isinstance(rate, Sequence) else [rate]
        for name, rate in given.items()
    }
    for name, own in shares.items():
        for share in own:
            if share is not None and share is not True and not (isinstance(share, int | float) and 0 < share <= 1):
                raise ValueError(f"shrink: {name} is {share!r}, expected a share above 0 and up to 1")
    if (speedup is not None) != any(share is True for own in shares.values() for share in own):
        raise ValueError("shrink: speedup and a rate of True need each other: how fast, and what may go for it")
    if "blocks" in given and (len(given) > 1 or any(share is True for share in shares["blocks"])):
        raise ValueError(
            "shrink: blocks need a share, and a call of their own: calibrate what stays before it shrinks further"
        )
    for name in ("channels", "blocks"):
        if name in given and inputs is None and not (name == "blocks" and by_name):
            raise ValueError(f"shrink: {name} needs example_inputs")
    if speedup is not None and (inputs is None or speedup <= 1):
        raise ValueError(f"shrink: speedup is {speedup}, expected more than 1, and example_inputs to measure it on")
    if isinstance(calibration, Calibration) and calibration.running:
        raise ValueError("shrink: the calibration is still running, expected its `with` block to have ended")
    if layers := compressed_layers(model):
        raise ValueError(
            f"shrink: {next(iter(layers)) or 'the model'} is compressed, expected a dense model: compress it afterwards"
        )


def _asked(
    model: nn.Module, rates: Mapping[str, Rate], inputs: Inputs | None
) -> tuple[list[tuple[list[Units], float | bool]], list[Left]]:
    """Units that share one rate, and what cannot shrink."""
    pools: list[tuple[list[Units], float | bool]] = []
    left: list[Left] = []
    for kind in KINDS:
        rate = rates[kind]
        if rate is None or rate is False:
            continue
        found, reasons = _units_of(model, kind, inputs)
        globs: Mapping[str, float | bool | None] = rate if isinstance(rate, Mapping) else {"*": rate}
        matched: dict[str, list[Units]] = {glob: [] for glob in globs}
        met = set()
        everything: list[Units | Left] = [*found, *reasons]
        for one in everything:
            glob = next((glob for glob in globs if fnmatchcase(one.name, glob)), None)
            met.add(glob)
            if glob is not None and globs[glob] is not None:
                matched[glob].append(one) if isinstance(one, Units) else left.append(one)
        if unmet := [glob for glob in globs if glob not in met and isinstance(rate, Mapping)]:
            names = ", ".join(one.name for one in everything)
            raise ValueError(
                f"shrink: {kind}: {unmet[0]!r} matches nothing, expected one of {names or 'nothing: there are none'}"
            )
        if not any(matched.values()):
            why = "; ".join(f"{one.name or 'the model'}: {one.reason}" for one in reasons[:3])
            raise ValueError(
                f"shrink: no {kind} that can go{': ' + why if why else ', no layer that is known here makes any'}"
            )
        pools += [(units, globs[glob]) for glob, units in matched.items() if units]  # type: ignore[misc]
    return pools, left


def _units_of(model: nn.Module, kind: str, inputs: Inputs | None) -> tuple[list[Units], list[Left]]:
    if kind == "channels":
        assert inputs is not None
        return by_flow.units_of(model, inputs)
    return transformers.units_of(model, kind)


def _chosen(
    dense: nn.Module, small: nn.Module, pools: list[tuple[list[Units], float | bool]], orders: dict[Units, Elimination],
    speedup: float | None, inputs: Inputs | None,
) -> Chosen:  # fmt: skip
    stay: Chosen = {}
    for pool, share in pools:
        if share is not True:
            stay |= by_share({units: orders[units] for units in pool}, share)
    timed = {units: orders[units] for pool, share in pools if share is True for units in pool}
    if speedup is None:
        return stay
    assert inputs is not None

    def measured(share: float) -> float:
        trial = copied(small, ())
        Cut.leaving(small, {**stay, **by_cost(small, timed, share)}).apply(trial)
        return speedup_of(dense, trial, inputs)

    return {**stay, **by_cost(small, timed, share_for(speedup, measured))}


def _compare(model: nn.Module, cut: Cut, stay: Chosen, inputs: Inputs) -> None:
    """Raises RuntimeError where the cut model differs from one that does not use what is cut."""
    small, unused = copied(model, ()), copied(model, ())
    for one in (small, unused):
        leave_cut(one, Cut())
    cut.apply(small)
    masked(unused, stay)
    try:
        y_all, expected_all = _results(small, inputs), _results(unused, inputs)
    except Exception as error:
        raise RuntimeError(
            f"shrink: the smaller model does not run ({type(error).__name__}: {error}): its code may count on sizes that it had; "
            "{glob: None} keeps a layer as it is"
        ) from error
    for y, expected in zip(y_all, expected_all, strict=True):
        if y.shape != expected.shape or not bool(((y - expected).abs() <= _ROUNDING * expected.abs().amax()).all()):
            raise RuntimeError(
                f"shrink: the smaller model gives something else than one that does not use what it lacks: {list(y.shape)}, "
                f"expected {list(expected.shape)} and the same numbers"
            )


def _results(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with evaluating(model, inputs):
        return [tensor.double().clone() for tensor in tensors_in(call_model(model, inputs))]


class _Orders:
    """What a model's units cost, and how what stays is fitted anew."""

    def __init__(
        self, model: nn.Module, calibration: Mapping[str, InputStatistics] | None, fisher: Mapping[str, Tensor] | None
    ) -> None:  # fmt: skip
        self.model, self.calibration, self.fisher = model, calibration, fisher

    def of(self, units: Units) -> Elimination:
        """The order in which units go."""
        return eliminated([self._consumer(one) for one in units.inputs], units.held)

    def refit(self, stay: Chosen) -> None:
        """Writes what is fitted into the model's layers, of their old size."""
        columns: dict[str, list[Tensor]] = {}
        for units, kept in stay.items():
            for one in units.inputs:
                columns.setdefault(one.layer, []).append(one.columns[~kept].flatten())
        for name, gone in columns.items():
            statistics = self._statistics(name)
            if statistics is None:
                continue
            layer: Any = self.model.get_submodule(name)
            consumer = self._consumer(Input(name, torch.empty(0, 1, dtype=torch.int64, device="cpu")))
            lacking = torch.zeros(consumer.weight.shape[1], dtype=torch.bool, device="cpu")
            lacking[torch.cat(gone)] = True
            weight = refitted(consumer, lacking)
            with torch.no_grad():
                layer.weight.copy_(weight.view_as(layer.weight))
                if layer.bias is not None and statistics.mean is not None:
                    layer.bias.copy_(layer.bias.double() + (consumer.weight - weight) @ statistics.mean.double())

    def _consumer(self, one: Input) -> Consumer:
        layer = self.model.get_submodule(one.layer)
        weight = _kind(layer).matrix(layer).detach().double()
        statistics = self._statistics(one.layer)
        counts = self._counts(one.layer, len(weight))
        if statistics is None:
            return Consumer(weight, torch.eye(weight.shape[1], dtype=torch.float64, device="cpu"), one.columns, counts)
        moment = statistics.moment("shrink", weight.shape[1])
        if layer.bias is not None:  # which takes up what the mean changes
            assert statistics.mean is not None
            mean = statistics.mean.double()
            moment = moment - torch.outer(mean, mean)
        return Consumer(weight, moment, one.columns, counts)

    def _counts(self, name: str, n: int) -> Tensor | None:
        if self.fisher is None:
            return None
        counts = self.fisher.get(name)
        if counts is None or counts.shape != (n,):
            what = "missing" if counts is None else f"{list(counts.shape)}"
            raise ValueError(f"shrink: the fisher of {name or 'the model'} is {what}, expected [{n}]")
        return counts

    def _statistics(self, name: str) -> InputStatistics | None:
        layer = self.model.get_submodule(name)
        if self.calibration is None or not _kind(layer).has_rows(layer):
            return None
        if name not in self.calibration:
            raise ValueError(
                f"shrink: the calibration never saw {name or 'the model'}, expected batches that run through it"
            )
        return self.calibration[name]


def _kind(layer: nn.Module) -> Kind:
    kind = kind_of(layer)
    assert kind is not None
    return kind
