"""The measuring harness: candidates take turns, and only turns of the same round are compared.

The clock of a shared machine drifts by a fifth within seconds: two turns of the same round can be compared, two
separate runs cannot. Every ratio is therefore the median of the per-round ratios.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value, interpolated linearly."""
    low, median, high = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75))
    return Spread(float(median), float(low), float(high))


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate, one entry per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return spread(self.seconds).median

    @property
    def quartiles(self) -> tuple[float, float]:
        _, low, high = spread(self.seconds)
        return low, high


def ratio(a: Timing, b: Timing) -> Spread:
    """Median and quartiles of the per-round ratio a / b: above 1 where b is the faster one."""
    return spread([x / y for x, y in zip(a.seconds, b.seconds, strict=True)])


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean of positive values; raises StatisticsError where there are none."""
    return statistics.geometric_mean(values)


FEWEST_ROUNDS = 3  # what a median and its quartiles need


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    min_time_s: float,
    pause_s: float = 0.0,
    budget_s: float = math.inf,
) -> dict[str, Timing]:
    """Time the candidates turn by turn: A B C A B C ..., `rounds` times.

    Each is warmed up and then called often enough for one turn to last about `min_time_s`. `pause_s` is slept
    before each turn: 0.02 lets the workers of ONNX Runtime fall asleep, which would otherwise steal the cores
    from whoever is next. Once `budget_s` is spent, warming up included, no round begins any more, but there are
    three at least (or `rounds`, if fewer), as many of each candidate.
    """
    if rounds < 1:
        raise ValueError(f"interleave: rounds is {rounds}, expected at least 1")
    start = time.perf_counter()
    calls = {name: _calls_per_turn(run, min_time_s) for name, run in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() - start >= budget_s:
            break
        for name, run in candidates.items():
            time.sleep(pause_s)
            if calls[name] > 1:
                run()  # brings caches and sleeping threads back; a call as long as the turn does so by itself
            seconds[name].append(_turn(run, calls[name]))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _turn(run: Callable[[], object], calls: int) -> float:
    """Seconds per call over `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _calls_per_turn(run: Callable[[], object], min_time_s: float) -> int:
    """Warm up, and say how many calls last about `min_time_s`."""
    run()
    calls = 1
    while (elapsed := _turn(run, calls) * calls) < min_time_s / 4:
        calls *= 2
    return max(1, math.ceil(calls * min_time_s / elapsed))


def rotating(runs: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """One callable for many, called in turn: each meets weights that the others drove out of the cache."""
    following = 0

    def run() -> object:
        nonlocal following
        chosen = runs[following]
        following = (following + 1) % len(runs)
        return chosen()

    return run
