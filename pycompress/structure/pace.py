"""How much has to go for a model to be so many times as fast, by measuring it."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from torch import nn

from pycompress.calls import Inputs, call_model, evaluating
from pycompress.state import unwatched

_HALVINGS = 7
_ROUNDS, _SECONDS = (5, 25), 1.5  # of both models: at least and at most, and for how long in between


def speedup_of(dense: nn.Module, small: nn.Module, inputs: Inputs) -> float:
    """How many times as fast the small one is: the median of ratios turn by turn."""
    ratios: list[float] = []
    with evaluating(dense, inputs), evaluating(small, inputs):
        for model in (dense, small):
            call_model(model, inputs)  # warms up; and the block around this one learns what a call writes to
        with unwatched():
            end = time.perf_counter() + _SECONDS
            while len(ratios) < _ROUNDS[0] or (len(ratios) < _ROUNDS[1] and time.perf_counter() < end):
                before, after = (_seconds(model, inputs) for model in (dense, small))
                ratios.append(before / after)
    return median(ratios)


def share_for(speedup: float, measured: Callable[[float], float]) -> float:
    """The largest share with which ``measured(share)`` reaches the speed-up, to 1 / 128, by halving.

    Raises:
        ValueError: even the smallest model does not.
    """
    low, high = 0.0, 1.0
    if (best := measured(low)) < speedup:
        raise ValueError(
            f"shrink: speedup is {speedup}, which the smallest model does not reach: it is {best:.2f} times as fast"
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if measured(middle) < speedup:
            high = middle
        else:
            low = middle
    return low


def _seconds(model: nn.Module, inputs: Inputs) -> float:
    start = time.perf_counter()
    call_model(model, inputs)
    return time.perf_counter() - start
