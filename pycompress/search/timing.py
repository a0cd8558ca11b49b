"""What layers and models take here and now."""

from __future__ import annotations

import os
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.calls import Inputs, call_model, evaluating
from pycompress.measure import Clock
from pycompress.race import input_shapes, layer_us
from pycompress.search.cache import Cache, digest
from pycompress.search.choices import Choices
from pycompress.state import unwatched

_ROUNDS, _SECONDS = (7, 41), 1.5  # of two models: at least and at most, and for how long in between


def clock() -> Clock:
    """With one thread the time that this thread has had of its processor, in which others take no part; else the time."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def here() -> dict[str, Any]:
    """What times depend on besides what is measured."""
    from pycompress.benchmark.environment import processor_name

    return {
        "processor": processor_name(),
        "instruction_sets": [name for name, present in ops.instruction_sets().items() if present],
        "kernels": os.environ.get("PYCOMPRESS_ISA", ""),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


class LayerTimes:
    """Microseconds of all calls that example inputs make of a layer, measured once for those that are alike.

    Attributes:
        shapes: of each layer's inputs, one a call, by the layer's first name.
    """

    def __init__(self, choices: Choices, inputs: Inputs, cache: Cache) -> None:
        self._choices, self._inputs, self._cache, self._here = choices, inputs, cache, here()
        noted = input_shapes(choices.model, [*choices.owners.values()], inputs)
        self._met = {name: noted[id(target.module)] for name, target in choices.owners.items()}
        self._replaced: dict[str, dict[int, list[Tensor]]] = {}
        self.shapes = {name: [tuple(x.shape) for x in own] for name, own in self._met.items()}

    def us(self, name: str, candidate: str) -> tuple[float, float]:
        """Dense and compressed, in turns; 0 for a layer that is never called."""
        met = [(x.shape, x.stride(), str(x.dtype)) for x in self._met[name]]
        if not met:
            return 0.0, 0.0
        makes = self._choices.layers[name].facts[candidate].makes
        key = digest("layer us", self._here, self._choices.candidates[candidate], makes, met)
        known = self._cache.get(key)
        if known is None:
            known = self._cache.put(key, [*self._measured(name, candidate)])
        return known[0], known[1]

    def _measured(self, name: str, candidate: str) -> tuple[float, float]:
        made = self._choices.made(candidate)
        if candidate not in self._replaced:  # (what takes a padding module in meets what that met)
            targets = [target for target, _ in made.values()]
            self._replaced[candidate] = input_shapes(self._choices.model, targets, self._inputs)
        target, layer = made[name]
        return layer_us(target, layer, self._replaced[candidate][id(target.module)], clock())


def model_us(dense: nn.Module, other: nn.Module, inputs: Inputs) -> tuple[float, float]:
    """Median microseconds of a call of the dense model, and the median of the ratios of the other's time to it, turn by turn."""
    tick = clock()

    def once(model: nn.Module) -> float:
        start = tick()
        call_model(model, inputs)
        return tick() - start

    times: list[tuple[float, float]] = []
    with evaluating(dense, inputs), evaluating(other, inputs):
        for model in (dense, other):
            call_model(model, inputs)  # warms up; and the block around this one learns what a call writes to
        with unwatched():
            for model in (dense, other):
                call_model(model, inputs)
            end = time.perf_counter() + _SECONDS
            while len(times) < _ROUNDS[0] or (len(times) < _ROUNDS[1] and time.perf_counter() < end):
                times.append((once(dense), once(other)))
    return 1e6 * median(a for a, _ in times), median(b / a for a, b in times)
