"""``Front``: plans of which none is worse than another in everything, and the one among them that keeps to the limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, overload

import numpy as np

from pycompress.plan_file import WrittenPlan
from pycompress.search.solver import not_dominated
from pycompress.structure import Cut

LIMITS = ("ms", "mb", "layer_mb", "quality")


@dataclass(frozen=True)
class Cost:
    """What a plan takes.

    Attributes:
        ms: of a call with the example inputs.
        mb, layer_mb: of all parameters and buffers, and of those of the layers that were searched, in 1e6 bytes.
        quality: by the metric, the higher the better.
    """

    ms: float
    mb: float
    layer_mb: float
    quality: float

    def missed(self, limits: Mapping[str, float]) -> dict[str, float]:
        """The limits that it does not keep to, and by how much."""
        over = {
            name: (limit - self.quality if name == "quality" else getattr(self, name) - limit)
            for name, limit in limits.items()
        }
        return {name: value for name, value in over.items() if value > 0}


@dataclass(frozen=True)
class Point:
    """A plan and what it takes.

    Attributes:
        plan: a name for each layer that was searched, and its method; None stays dense.
        predicted: before it was measured, from those that were measured before.
        additive: by the sums over layers alone, which nothing corrected.
        measured: of the whole model. For another machine its ``ms`` are predicted.
        uniform: the name of the candidate, where all layers have the same one.
        shape: the name of the smaller model (:class:`Shape`) that the plan is for; '' is the model itself.
    """

    plan: WrittenPlan
    predicted: Cost
    additive: Cost
    measured: Cost
    uniform: str = ""
    shape: str = ""


@dataclass(frozen=True)
class Shape:
    """A smaller dense model, of which :func:`search` took plans.

    Attributes:
        name: by which it was asked for.
        shrink: the settings of the calls of :func:`pycompress.shrink` that make it, one after another; blocks by their names.
        measured: what it takes while all its layers are dense; None where it could not be made.
        reason: why no plan for it was searched; '' where plans were.
        cut: what it lacks, with what each part was judged by.
    """

    name: str
    shrink: tuple[Mapping[str, Any], ...] = ()
    measured: Cost | None = None
    reason: str = ""
    cut: Cut = field(default_factory=Cut)

    def __str__(self) -> str:
        own = self.measured
        what = "" if own is None else f"dense {own.ms:.2f} ms, {own.mb:.2f} MB, quality {own.quality:.4f}"
        return f"{self.name}: {'; '.join(one for one in (what, self.reason and f'not searched: {self.reason}') if one)}"


class Front(Sequence[Point]):
    """The plans that were measured and of which no other is at least as good in time, bytes and quality, from the fastest on.

    Attributes:
        limits: by name.
        measured: all plans that were measured, those that others dominate too.
        target: the machine whose times are meant; '' is this one.
        shapes: the smaller models, by name: what each lacks, and what that alone costs.
        bound: no plan within the limits is better in what has no limit, ms, mb or quality, by sums over layers as measurements
            corrected them: what is left to gain with these candidates and shapes. None: unknown.
    """

    def __init__(
        self, measured: Sequence[Point], limits: Mapping[str, float], target: str = "", shapes: Sequence[Shape] = (),
        bound: float | None = None,
    ) -> None:  # fmt: skip
        self.measured, self.limits, self.target, self.bound = [*measured], dict(limits), target, bound
        self.shapes = {shape.name: shape for shape in shapes}
        costs = np.array([[p.measured.ms, p.measured.mb, -p.measured.quality] for p in measured]).reshape(-1, 3)
        self._points = sorted((self.measured[i] for i in not_dominated(costs)), key=lambda point: point.measured.ms)

    def __len__(self) -> int:
        return len(self._points)

    def __iter__(self) -> Iterator[Point]:
        return iter(self._points)

    @overload
    def __getitem__(self, index: int) -> Point: ...
    @overload
    def __getitem__(self, index: slice) -> list[Point]: ...
    def __getitem__(self, index: int | slice) -> Point | list[Point]:
        return self._points[index]

    @property
    def best(self) -> Point:
        """Of the plans that keep to the limits the best in what has none: in quality, else the fastest, else the smallest; with
        limits on all three in quality. Where none keeps to them, the one that comes nearest: ``missed`` says what it lacks."""
        good = [point for point in self if not self._missed(point)]
        if not good:
            return min(self, key=self.distance)
        goal = goal_of(self.limits)
        return min(
            good, key=lambda point: -point.measured.quality if goal == "quality" else getattr(point.measured, goal)
        )

    @property
    def best_uniform(self) -> Point | None:
        """As ``best``, of the plans with one candidate for all layers of the model itself; None where none of them keeps to the
        limits."""
        good = [point for point in self.measured if point.uniform and not point.shape and not self._missed(point)]
        goal = goal_of(self.limits)
        return min(
            good, key=lambda p: -p.measured.quality if goal == "quality" else getattr(p.measured, goal), default=None
        )

    @property
    def missed(self) -> dict[str, float]:
        """The limits that ``best`` does not keep to, and by how much; empty where it keeps to all."""
        return self._missed(self.best)

    def distance(self, point: Point) -> float:
        """By how much a plan misses limits, as shares of them (of quality: of what the limit allows to be lost), together."""
        most = max(one.measured.quality for one in self.measured)
        units = {name: abs(most - limit if name == "quality" else limit) for name, limit in self.limits.items()}
        return sum(value / max(units[name], 1e-9) for name, value in self._missed(point).items())

    def _missed(self, point: Point) -> dict[str, float]:
        return point.measured.missed(self.limits)

    def errors(self, of: str = "predicted") -> Cost:
        """The largest error over the mixed plans on the front: of milliseconds and bytes as a share, of quality as it is.

        Args:
            of: ``predicted``, or ``additive``: what nothing corrected.
        """
        worst = Cost(0.0, 0.0, 0.0, 0.0)
        for point in self:
            if point.uniform:
                continue
            guess, found = getattr(point, of), point.measured
            for own in fields(Cost):
                a, b = getattr(guess, own.name), getattr(found, own.name)
                off = abs(a - b) / (1.0 if own.name == "quality" else max(b, 1e-12))
                worst = replace(worst, **{own.name: max(getattr(worst, own.name), off)})
        return worst

    def __str__(self) -> str:
        head = ("", "ms", "predicted", "MB", "layers MB", "quality", "predicted", "plan")
        rows: list[tuple[str, ...]] = [head]
        best = self.best
        for point in self:
            what = f"{point.uniform} everywhere" if point.uniform else _mix(point.plan)
            what = f"{point.shape}: {what}" if point.shape else what
            rows.append(self._row("best" if point is best else "", point.measured, point.predicted, what))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(c.rjust(w) if 0 < i < 7 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        lines += map(str, self.shapes.values())
        for name, value in self.missed.items():
            lines.append(f"no plan keeps to {name} = {self.limits[name]:g}: the nearest misses it by {value:.4g}")
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__

    @staticmethod
    def _row(mark: str, found: Cost, guess: Cost, plan: str) -> tuple[str, ...]:
        return (
            mark, f"{found.ms:.2f}", f"{guess.ms:.2f}", f"{found.mb:.2f}", f"{found.layer_mb:.2f}",
            f"{found.quality:.4f}", f"{guess.quality:.4f}", plan,
        )  # fmt: skip


def goal_of(limits: Mapping[str, float]) -> str:
    """What the best plan is best in."""
    for goal, names in (("quality", {"quality"}), ("ms", {"ms"}), ("mb", {"mb", "layer_mb"})):
        if not names & set(limits):
            return goal
    return "quality"


def _mix(plan: WrittenPlan) -> str:
    """How many layers have which method."""
    counts: dict[str, int] = {}
    for method in plan.values():
        name = "dense" if method is None else repr(method)
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items(), key=lambda pair: -pair[1]))
