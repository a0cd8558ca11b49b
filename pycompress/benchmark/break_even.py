"""From how many weights on a compressed layer is no longer the faster one: interpolated between those that were measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from pycompress.benchmark.grid import DENSE_FP32
from pycompress.benchmark.harness import geometric_mean
from pycompress.benchmark.results import Record, best_ratio, measured


class Crossing(NamedTuple):
    """The share of the weights at which two layers are equally fast."""

    share: float
    side: str = ""  # "below" or "above": it lies beyond the shares that were measured, of which this is the last

    def __str__(self) -> str:
        return f"{self.side} {self.share:.0%}".lstrip()


def crossing(speedups: Mapping[float, float]) -> Crossing:
    """Where the compressed layer stops being the faster one.

    Args:
        speedups: share -> time of the dense layer over that of the compressed one. Walking from the smallest, the
            first that falls below 1 and its predecessor are joined by a line in log(speedup).
    """
    points = sorted(speedups.items())
    share, speedup = points[0]
    if speedup < 1:
        return Crossing(share, "below")
    for (share, speedup), (larger, slower) in pairwise(points):
        if slower < 1:
            way = math.log(speedup) / math.log(speedup / slower)
            return Crossing(share + way * (larger - share))
    return Crossing(points[-1][0], "above")


@dataclass(frozen=True)
class BreakEven:
    """Up to which share a compressed fp32 layer is at least as fast as the best dense one."""

    m: int
    mean: Crossing  # of the geometric means over the shapes
    shapes: dict[tuple[int, int], Crossing]  # (k, n) -> of that shape alone
    shares: tuple[float, ...]  # at which it was measured
    unit: str  # what they are shares of, in words

    def __str__(self) -> str:
        low, high = (choose(self.shapes.values(), key=lambda found: found.share) for choose in (min, max))
        measured_at = ", ".join(f"{share:.0%}" for share in self.shares)
        return (
            f"break-even with the best dense fp32, m = {self.m}: {self.mean} {self.unit} over {len(self.shapes)} shape(s), "
            f"from {low} to {high} (interpolated between time ratios measured at {measured_at})"
        )


def break_even(records: Iterable[Record], share: Callable[[Record], float], unit: str) -> list[BreakEven]:
    """Per number of rows, from the records of one kind of layer at all its shares, which `share` reads from a record."""
    found: dict[int, dict[tuple[int, int], dict[float, float]]] = {}
    for record in records:
        if measured(record, DENSE_FP32):
            shape = record["k"], record["n"]
            speedups = found.setdefault(record["m"], {}).setdefault(shape, {})
            speedups[share(record)] = best_ratio(record, DENSE_FP32)
    lines = []
    for m, shapes in sorted(found.items()):
        shares = tuple(sorted(next(iter(shapes.values()))))  # the same for all shapes
        means = {share: geometric_mean(speedups[share] for speedups in shapes.values()) for share in shares}
        crossings = {shape: crossing(speedups) for shape, speedups in shapes.items()}
        lines.append(BreakEven(m, crossing(means), crossings, shares, unit))
    return lines
