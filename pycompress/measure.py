"""Which of two callables is faster here and now."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

Clock = Callable[[], float]  # seconds


def _turn(call: Callable[[], object], repeat: int, clock: Clock = time.perf_counter) -> float:
    start = clock()
    for _ in range(repeat):
        call()
    return (clock() - start) / repeat


def interleaved_us(
    first: Callable[[], object], second: Callable[[], object], *, rounds: int = 7, turn_s: float = 0.002,
    clock: Clock = time.perf_counter,
) -> tuple[float, float]:  # fmt: skip
    """Median microseconds per call of both, measured in turns A B A B so that a drifting clock meets both alike.

    Args:
        rounds: turns of each.
        turn_s: how long one turn lasts at least, in seconds.
        clock: what tells the time.
    """
    repeats = []
    for call in (first, second):
        call()
        once = max(_turn(call, 1, clock), 1e-7)
        repeats.append(max(1, min(1000, round(turn_s / once))))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        times[0].append(_turn(first, repeats[0], clock))
        times[1].append(_turn(second, repeats[1], clock))
    return median(times[0]) * 1e6, median(times[1]) * 1e6


def in_turns(calls: Sequence[Callable[[], object]], fewest: int, seconds: float) -> list[list[float]]:
    """Seconds of each call, round by round A B A B, after one that warms up: ``fewest`` rounds, and more while ``seconds`` last."""
    for call in calls:
        call()
    start, rounds = time.perf_counter(), list[list[float]]()
    while len(rounds) < fewest or time.perf_counter() - start < seconds:
        rounds.append([_turn(call, 1) for call in calls])
    return rounds
