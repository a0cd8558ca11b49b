"""``search``: which candidate for which layer, under limits of time, bytes and quality, by what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from pycompress.calls import Inputs
from pycompress.methods.inputs import InputStatistics
from pycompress.methods.method import Method
from pycompress.progress import on_a_terminal
from pycompress.replacing import FilePath
from pycompress.search.cache import Cache
from pycompress.search.choices import Candidates, Choices, calibrated, named
from pycompress.search.front import LIMITS, Front, Shape, goal_of
from pycompress.search.machine import DENSE, Machine
from pycompress.search.plans import Plans
from pycompress.search.quality import Metric, Quality, checked
from pycompress.search.ratings import Ratings, check_workers, pool_of
from pycompress.search.sensitivity import cheap, rated
from pycompress.search.shapes import Shapes, checked_shapes, smaller
from pycompress.structure import Cut


def search(
    model: nn.Module,
    candidates: Candidates | Method,
    batches: Sequence[Inputs],
    limits: Mapping[str, float],
    *,
    example_inputs: Inputs,
    metric: Metric = "cosine",
    exact: bool = False,
    calibration: Mapping[str, InputStatistics] | Sequence[Inputs] | None = None,
    shapes: Shapes | None = None,
    target: Machine | None = None,
    points: int = 12,
    workers: str | None = None,
    cache: FilePath | None = None,
    progress: bool | None = None,
) -> Front:
    """Plans with one candidate for each layer, of which none is worse than another in time, bytes and quality together.

    What a layer costs is measured: its time once for all layers of its shape, in turns with the dense layer; what the model
    loses by it, as :func:`sensitivity` does it. Sums of these over layers say what a plan costs. Plans on the front of the sums
    are then built and measured as whole models, with blocks that run as one op as :func:`compress` has them, and the sums
    corrected by the outcome.

    Args:
        model: as :func:`compress` takes it; it is only looked at. Two copies of it are in memory, and the layers of each candidate.
        candidates: methods, or {name: method}. Any layer may stay dense besides.
        batches: by which quality is measured and, without a calibration, the layers' inputs are gathered. What is calibrated on
            text of one kind should be measured on another.
        limits: the most ``ms`` (of a call with the example inputs), ``mb`` (the whole model, in 1e6 bytes) and ``layer_mb`` (the
            layers that are searched), and the least ``quality``: any of them.
        example_inputs: with what times are measured, in the shape that the model will meet.
        metric, exact: as :func:`sensitivity` has them. Where a layer has no ``change``, all losses are exact ones.
        calibration: what was gathered of the layers' inputs, or the batches to gather it from; None: those above.
        shapes: smaller models, whose plans stand on the same front: {name: settings of :func:`shrink`, or a list of such for one
            call after another}: shares of ``neurons``, ``heads``, ``channels`` or ``blocks``, ``fisher`` true. Each is calibrated
            anew, for which ``calibration`` has to be batches. Blocks go by the metric. A shape that misses the limit of quality
            while it is dense is not searched; ``Front.shapes`` has what each costs. All are in memory.
        target: the machine that the plan is for, from :func:`profile`; None: this one, with as many threads as torch has now.
            Times are predicted then, and only linear layers compressed: of these it has times.
        points: how many mixed plans are measured besides those for the limits.
        workers: as :func:`sensitivity` has them: who rates the models of plans. Times are measured in this process, while they
            wait. All comes out as without them, times apart; with a ``target``, to the bit.
        cache: a file that keeps each measurement as soon as it is made: a search that was stopped, or is made again, repeats
            none. It goes by the content of model, batches and candidates, by the processor, its kernels and the number of threads.
        progress: show progress bars; None: on a terminal.
    Returns:
        The :class:`Front`. Where no plan keeps to the limits, its ``best`` is the nearest, and ``missed`` says which and by how
        much.
    Raises:
        TypeError, ValueError, RuntimeError: as :func:`sensitivity`; a limit of another name, or that is no number; a target that
            has no times of a candidate; a shape that :func:`shrink` refuses, by its name. ImportError: as :func:`sensitivity`.
    """
    who = "search"
    inputs, methods, calls = checked(batches, who), named(candidates, who), checked_shapes(shapes or {}, who)
    _check_limits(limits, who)
    if calls and isinstance(calibration, Mapping):
        raise ValueError(f"{who}: calibration is of the whole model, expected batches: each shape is calibrated anew")
    if DENSE in methods:
        raise ValueError(f"{who}: a candidate is called {DENSE!r}, which every layer may stay, expected another name")
    if target is not None:
        target.check(methods, who)
    check_workers(workers, who)
    known = Cache(cache)
    show = on_a_terminal() if progress is None else progress
    data = inputs  # to calibrate shapes on
    if calibration is not None and not isinstance(calibration, Mapping):
        calibration = data = checked(calibration, who, "calibration")
    seen = calibrated(model, methods, inputs, calibration, who)
    choices = Choices(model, methods, seen, example_inputs, known, who)
    quality = Quality(choices.model, inputs, metric, who)
    made = {
        name: smaller(choices.model, own, data, example_inputs, quality, known, f"{who}: shape {name!r}")
        for name, own in calls.items()
    }

    def searched(choices: Choices, quality: Quality, points: int, of: tuple[Plans, Shape] | None = None) -> Plans:
        losses = cheap(choices, inputs, quality, known, progress=show)
        with pool_of(workers, choices, quality) as pool:
            ratings = Ratings(choices, quality, known, pool, progress=show)
            if exact or any(loss.cheap is not None and loss.change is None for loss in losses.values()):
                losses = rated(losses, ratings, show)
            one = Plans(choices, losses, quality, ratings, example_inputs, dict(limits), target, known, show, of)
            one.run(points)
        return one

    done, records = [searched(choices, quality, points)], list[Shape]()
    for name, (small, own) in made.items():
        beside = quality.from_smaller(small, f"the shape {name!r}")
        shape = Shape(name, own, done[0].cost_of(small, beside.best), cut=Cut.of(small))
        if beside.best < limits.get("quality", -math.inf):
            why = f"it misses {limits['quality']:g} before any layer is compressed"
            records.append(replace(shape, reason=why))
            continue
        records.append(shape)
        seen = calibrated(small, methods, inputs, calibration, who)
        choices = Choices(small, methods, seen, example_inputs, known, who)
        done.append(searched(choices, beside, points // 4, (done[0], shape)))
    found = [point for one in done for point in one.points()]
    bounds = [one.bound() for one in done]
    best_bound = max(bounds) if goal_of(limits) == "quality" else min(bounds)
    return Front(found, limits, target.name if target else "", records, best_bound)


def _check_limits(limits: Any, who: str) -> None:
    if not isinstance(limits, Mapping) or not limits:
        raise TypeError(f"{who}: limits is {limits!r}, expected numbers for some of {', '.join(LIMITS)}")
    for name, value in limits.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if name not in LIMITS or not number:
            raise ValueError(f"{who}: limits has {name!r}: {value!r}, expected numbers for some of {', '.join(LIMITS)}")
