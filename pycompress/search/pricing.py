"""What each layer costs with each candidate, so that a plan costs the sum: microseconds, bytes, loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

import numpy as np

from pycompress.progress import track
from pycompress.search.choices import Choices
from pycompress.search.machine import DENSE, Machine
from pycompress.search.sensitivity import Sensitivity
from pycompress.search.solver import Costs
from pycompress.search.timing import LayerTimes


@dataclass(frozen=True)
class Item:
    """Layers that share a weight, which have one candidate together; mostly one layer.

    Attributes:
        names: of the layers.
        choices: names of the candidates that take all of them; the first is DENSE.
        costs: [choices, 3]: microseconds, bytes, loss.
    """

    names: list[str]
    choices: list[str]
    costs: Costs


def priced(
    choices: Choices, losses: Sensitivity, times: LayerTimes, target: Machine | None, *, progress: bool
) -> list[Item]:  # fmt: skip
    """The items of a model; ``target``: the machine whose times are meant, None: this one."""
    groups: dict[str, list[str]] = {}
    for name, layer in choices.layers.items():
        groups.setdefault(layer.tie, []).append(name)
    items = []
    for names in track([*groups.values()], "measuring", progress):
        takers = {c: [_loss(losses, name, c) for name in names] for c in choices.candidates}
        takers = {c: own for c, own in takers.items() if all(map(math.isfinite, own))}
        if target is not None:  # whose times are those of linear layers: others stay dense there
            takers = {
                c: own for c, own in takers.items() if choices.layers[names[0]].facts[c].makes["kind"] == "linear"
            }
        pairs = {c: [_us(choices, times, target, name, c) for name in names] for c in takers}
        # The dense layer was measured beside each candidate: all of that says what it takes.
        dense = sum(median(pairs[c][i][0] for c in takers) for i in range(len(names))) if takers else 0.0
        rows = [(dense, float(sum(choices.layers[name].bytes for name in names)), 0.0)]
        for c, own in takers.items():
            before, after = (sum(pair[i] for pair in pairs[c]) for i in (0, 1))
            size = sum(choices.layers[name].facts[c].bytes for name in names)
            rows.append((dense * after / before if before else 0.0, float(size), sum(own)))
        items.append(Item(names, [DENSE, *takers], np.array(rows)))
    return items


def _loss(losses: Sensitivity, name: str, candidate: str) -> float:
    """NaN where the candidate does not take the layer, or nobody knows what that does."""
    loss = losses[name, candidate]
    if loss.reason or loss.cheap is None:
        return math.nan
    return loss.cheap if loss.exact is None else max(loss.exact, 0.0)


def _us(
    choices: Choices, times: LayerTimes, target: Machine | None, name: str, candidate: str
) -> tuple[float, float]:  # fmt: skip
    """Dense and compressed."""
    if target is None:
        return times.us(name, candidate)
    makes = choices.layers[name].facts[candidate].makes
    calls = [(math.prod(shape[:-1]), makes["n"], makes["k"]) for shape in times.shapes[name]]
    dense, after = (sum(target.us(own, *call) for call in calls) for own in (DENSE, candidate))
    return dense, after
