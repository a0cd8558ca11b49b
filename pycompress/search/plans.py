"""``Plans``: those of one model that were measured, what the others would take by these, and which one to measure next."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from pycompress.calls import Inputs
from pycompress.copying import copied
from pycompress.methods.method import Method
from pycompress.plan_file import WrittenPlan
from pycompress.progress import track
from pycompress.records import summary
from pycompress.search.cache import Cache, digest
from pycompress.search.choices import Choices
from pycompress.search.correction import Correction
from pycompress.search.front import Cost, Point, Shape, goal_of
from pycompress.search.machine import DENSE, Machine
from pycompress.search.pricing import priced
from pycompress.search.quality import Quality
from pycompress.search.ratings import Question, Ratings
from pycompress.search.sensitivity import Sensitivity
from pycompress.search.solver import BYTES, LOSS, TIME, Costs, Picked, best, hull, least, total
from pycompress.search.timing import LayerTimes, here, model_us

_TURNS = 4  # of a plan for the limits, a measurement of it, and what that corrects
_TIGHTER = 0.05  # of a limit that a turn's plan missed: in the next one so much less is allowed
_WIDER = {LOSS: 4.0, BYTES: 1.5, TIME: 1.5}  # shares of the limits up to which other plans are worth measuring
_NOISE = 0.03  # of a measured time, as a share


class Plans:
    """What is known, and what is measured next."""

    def __init__(
        self, choices: Choices, losses: Sensitivity, quality: Quality, ratings: Ratings, inputs: Inputs,
        limits: dict[str, float], target: Machine | None, cache: Cache, progress: bool,
        smaller: tuple[Plans, Shape] | None = None,
    ) -> None:  # fmt: skip
        """``smaller``: the search of the whole model, of which this one's was made."""
        self._choices, self._quality, self._inputs, self._limits = choices, quality, inputs, limits
        self._ratings, self._target, self._cache, self._progress, self._here = ratings, target, cache, progress, here()
        self._from: Plans | None
        self._shape: Shape | None
        self._from, self._shape = smaller or (None, None)
        self._name = self._shape.name if self._shape else ""
        # What is raced against is the whole model.
        self._original: nn.Module = self._from._original if self._from else copied(choices.model, ())
        self._dense_bytes = summary(choices.model).bytes
        self._others = self._dense_bytes - sum(layer.bytes for layer in choices.layers.values())
        self._dense_us: float = self._from._dense_us if self._from else self._dense_model_us()
        own_us = self._dense_us * (self._from.ratio_of(choices.model) if self._from else 1.0)
        times = LayerTimes(choices, inputs, cache)
        self._items = priced(choices, losses, times, target, progress=progress)
        layers_us = rest_of = sum(float(item.costs[0, TIME]) for item in self._items)
        if target is not None:  # what the model takes besides its layers is as many times as long there as they are
            rest_of = sum(
                float(item.costs[0, TIME]) for item in priced(choices, losses, times, None, progress=progress)
            )
        rest = max(own_us - rest_of, 0.02 * own_us) * (layers_us / rest_of if rest_of else 1.0)
        self._dense_ms = own_us / 1e3 if target is None else (layers_us + rest) / 1e3
        names = [DENSE, *choices.candidates]
        self._ms, self._loss = Correction(names, 1.0, rest), Correction(names)
        self._sums_alone = self._ms, self._loss
        if self._from:  # sums are off as they were found to be there
            self._ms = self._from._ms.carried(self._from._ms.offset * own_us / self._dense_us)
            self._loss = self._from._loss.carried(0.0)
            self._sums_alone = self._sums_alone[0], self._from._sums_alone[1].carried(0.0)
        self._done: dict[Picked, Point] = {}
        self._outcomes: list[tuple[dict[str, float], dict[str, float], float | None, float]] = []

    def _dense_model_us(self) -> float:
        key = digest("dense us", self._choices.key, self._here)
        known = self._cache.get(key)
        if known is None:
            known = self._cache.put(key, model_us(self._original, self._original, self._inputs)[0])
        return float(known)

    def ratio_of(self, small: nn.Module) -> float:
        """The time of a smaller dense model to that of the whole one."""
        key = digest("smaller us", self._choices.key, small, self._here)
        known = self._cache.get(key)
        if known is None:
            known = self._cache.put(key, model_us(self._original, small, self._inputs)[1])
        return float(known)

    def cost_of(self, small: nn.Module, quality: float) -> Cost:
        """Of a smaller dense model."""
        layers = Choices(small, self._choices.candidates, None, None, self._cache, "search").layers.values()
        size = sum(layer.bytes for layer in layers)
        return Cost(self._dense_ms * self.ratio_of(small), summary(small).bytes / 1e6, size / 1e6, quality)

    def run(self, points: int) -> None:
        """Measures plans of one candidate, which say most of the corrections; then mixed ones; then those for the limits."""
        if not self._from:
            self._measure_uniform()
        for _ in track([*range(points)], "measuring", self._progress):
            if (next_one := self._between(self._done)) is None:
                break
            self._prepare(next_one)
            self._measure(next_one)
            self._correct()
        tighter = 0.0
        for _ in range(_TURNS):
            picked = self._best(tighter)
            if picked in self._done and not self._done[picked].measured.missed(self._limits):
                break
            self._measure(picked)
            self._correct()
            tighter += _TIGHTER if self._done[picked].measured.missed(self._limits) else 0.0

    def points(self) -> list[Point]:
        """All plans that were measured, and the one that leaves all layers dense."""
        layers = self._dense_bytes - self._others
        dense = Cost(self._dense_ms, self._dense_bytes / 1e6, layers / 1e6, self._quality.best)
        everywhere = Point(self._plan(dict.fromkeys(self._choices.layers)), dense, dense, dense, DENSE, self._name)
        return [everywhere, *self._done.values()]

    def bound(self) -> float:
        """What no plan can be better than in the goal, within the limits, by the sums as they are corrected."""
        goal = goal_of(self._limits)
        axis = {"quality": LOSS, "ms": TIME, "mb": BYTES}[goal]
        value = least(self._corrected(), axis, self._bounds({}))
        if goal == "ms":
            return (self._ms.offset + value) / 1e3
        return self._quality.best - value if goal == "quality" else (self._others + value) / 1e6

    def _measure_uniform(self) -> None:
        uniform = dict.fromkeys(self._uniform(name) for name in self._choices.candidates)
        self._ratings.prepare([self._question(picked) for picked in uniform])
        losses = [
            (self._sums(picked)[1], self._whole(picked)[2]) for picked in track([*uniform], "measuring", self._progress)
        ]
        self._loss = self._sums_alone[1].scaled_to([(own, self._quality.best - found) for own, found in losses])
        self._sums_alone = self._ms, self._loss
        for picked in uniform:
            self._measure(picked)
        self._correct()
        self._measure(self._half_dense())
        self._correct()

    # --- which plans --------------------------------------------------------------------------------------------------

    def _uniform(self, candidate: str) -> Picked:
        return tuple(item.choices.index(candidate) if candidate in item.choices else 0 for item in self._items)

    def _half_dense(self) -> Picked:
        """Every second layer dense, the others as they are fastest: which says what dense layers take beside compressed ones, in
        blocks that run as one op."""
        items = self._corrected()
        return tuple(int(item[:, TIME].argmin()) if i % 2 else 0 for i, item in enumerate(items))

    def _best(self, tighter: float) -> Picked:
        """The plan for the limits, as far as is known; all limits but that of bytes, which is exact, made tighter by this share."""
        goal = {"quality": LOSS, "ms": TIME, "mb": BYTES}[goal_of(self._limits)]
        return best(self._corrected(), goal, self._bounds({TIME: 1 - tighter, LOSS: 1 - tighter}))

    def _bounds(self, shares: Mapping[int, float]) -> dict[int, float]:
        """The limits as limits of sums; ``shares``: of each that is taken, 1 where nothing is said."""
        bounds: dict[int, float] = {}
        for name, limit in self._limits.items():
            if name == "ms":
                bounds[TIME] = limit * 1e3 * shares.get(TIME, 1.0) - self._ms.offset
            elif name == "quality":
                bounds[LOSS] = (self._quality.best - limit) * shares.get(LOSS, 1.0)
            else:
                room = limit * 1e6 * shares.get(BYTES, 1.0) - (self._others if name == "mb" else 0)
                bounds[BYTES] = min(room, bounds.get(BYTES, math.inf))
        return bounds

    def _between(self, done: Collection[Picked]) -> Picked | None:
        """Of the plans on the hull, near the limits where there are any, the one whose loss is farthest from those of all that are
        done, by their ranks; None where all are."""
        items = self._corrected()
        plans = sorted(hull(items), key=lambda picked: float(total(items, picked)[LOSS]))
        wide = self._bounds(_WIDER)
        near = [picked for picked in plans if all(total(items, picked)[axis] <= most for axis, most in wide.items())]
        plans = near or plans
        places = [i for i, picked in enumerate(plans) if picked in done or not any(picked)]
        left = [i for i in range(len(plans)) if i not in places]
        return plans[max(left, key=lambda i: min((abs(i - j) for j in places), default=i))] if left else None

    def _prepare(self, next_one: Picked) -> None:
        """Has workers rate a plan, and beside it those that would follow if it corrected nothing."""
        if self._ratings.at_once == 1 or self._ratings.knows(self._question(next_one)):
            return
        done = {*self._done}
        following: Picked | None = next_one
        questions: list[Question] = []
        while following is not None and len(questions) < self._ratings.at_once:
            questions.append(self._question(following))
            done.add(following)
            following = self._between(done)
        self._ratings.prepare(questions)

    def _corrected(self) -> list[Costs]:
        """What items cost, so that the sums are what was found to come out."""
        found = []
        for item in self._items:
            costs = item.costs.copy()
            costs[:, TIME] *= [self._ms.factor(name) for name in item.choices]
            costs[:, LOSS] *= [self._loss.factor(name) for name in item.choices]
            found.append(costs)
        return found

    # --- what they cost -----------------------------------------------------------------------------------------------

    def _sums(self, picked: Picked) -> tuple[dict[str, float], dict[str, float], float]:
        """Microseconds and losses by candidate, and all bytes."""
        us, loss, size = dict[str, float](), dict[str, float](), 0.0
        for item, choice in zip(self._items, picked, strict=True):
            name, costs = item.choices[choice], item.costs[choice]
            us[name] = us.get(name, 0.0) + float(costs[TIME])
            loss[name] = loss.get(name, 0.0) + float(costs[LOSS])
            size += float(costs[BYTES])
        return us, loss, size

    def _measure(self, picked: Picked) -> None:
        if picked in self._done:
            return
        us, loss, size = self._sums(picked)
        predicted, additive = (
            self._cost(ms.of(us), size, lost.of(loss)) for ms, lost in ((self._ms, self._loss), self._sums_alone)
        )
        found_us, found_bytes, quality = self._whole(picked)
        self._outcomes.append((us, loss, found_us, self._quality.best - quality))
        found = predicted.ms * 1e3 if found_us is None else found_us
        cost = self._cost(found, found_bytes - self._others, self._quality.best - quality)
        uniform = next((name for name in self._choices.candidates if picked == self._uniform(name) and any(picked)), "")
        self._done[picked] = Point(self._written(picked, cost), predicted, additive, cost, uniform, self._name)

    def _cost(self, us: float, size: float, loss: float) -> Cost:
        return Cost(us / 1e3, (self._others + size) / 1e6, size / 1e6, self._quality.best - loss)

    def _whole(self, picked: Picked) -> tuple[float | None, float, float]:
        """Of the plan's model: microseconds (None where they are those of another machine), bytes and quality."""
        question = self._question(picked)
        size, quality = self._ratings.of(question)
        if not math.isfinite(quality):
            raise ValueError(
                f"search: the metric {self._ratings.metric} gives {quality} for {question.what}, expected a finite number"
            )
        if self._target is not None:
            return None, size, quality
        key = digest("model us", self._choices.key, self._methods(picked), self._here)
        ratio = self._cache.get(key)
        if ratio is None:
            with self._choices.applied(question.plan, blocks=True) as model:
                ratio = self._cache.put(key, model_us(self._original, model, self._inputs)[1])
        return ratio * self._dense_us, size, quality

    def _question(self, picked: Picked) -> Question:
        plan = self._by_layer(picked)
        what = f"a plan of {', '.join(dict.fromkeys(plan.values()))}"
        return Question({name: None if own == DENSE else own for name, own in plan.items()}, True, what)

    def _by_layer(self, picked: Picked) -> dict[str, str]:
        """The name of the candidate of each layer, in the order of the model."""
        found = {
            name: item.choices[choice] for item, choice in zip(self._items, picked, strict=True) for name in item.names
        }
        return {name: found[name] for name in self._choices.layers}

    def _methods(self, picked: Picked) -> dict[str, Method | None]:
        return {name: self._choices.candidates.get(candidate) for name, candidate in self._by_layer(picked).items()}

    def _written(self, picked: Picked, cost: Cost) -> WrittenPlan:
        where = self._here if self._target is None else {"target": self._target.name}
        about = {"ms": cost.ms, "mb": cost.mb, "layer_mb": cost.layer_mb, "quality": cost.quality}
        return self._plan(self._methods(picked), {**about, "metric": self._quality.name, **where})

    def _plan(self, methods: Mapping[str, Method | None], about: Mapping[str, Any] | None = None) -> WrittenPlan:
        return WrittenPlan(methods, about, self._shape.shrink if self._shape else ())

    def _correct(self) -> None:
        """By all plans that were measured."""
        timed = [(us, found) for us, _, found, _ in self._outcomes if found is not None]
        if timed:
            self._ms = self._ms.fitted(
                [us for us, _ in timed], [us for _, us in timed], [_NOISE * us for _, us in timed]
            )
        # Errors add up while they are small: a model that has lost much says little of one that has not.
        least = 5e-4 * max(abs(self._quality.best), 1e-3)
        lost = [(loss, max(found, 0.0)) for _, loss, _, found in self._outcomes]
        errors = [least + 0.05 * found + 5 * found**2 for _, found in lost]
        self._loss = self._loss.fitted([loss for loss, _ in lost], [found for _, found in lost], errors)
