"""Plans on the front of time, bytes and loss, where all three are sums over layers (a multiple-choice knapsack problem).

For given prices of a byte and of a loss the best choice of each layer is independent of the others: a sweep over prices gives
the plans on the convex hull of the front (Everett 1963, "Generalized Lagrange multiplier method"). What a limit leaves between
two of them is filled by exchanges in one layer, and in two at once, as long as any is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Costs = NDArray[np.float64]  # [choices, 3]: time, bytes, loss
Picked = tuple[int, ...]  # a choice for each item

TIME, BYTES, LOSS = range(3)
_PRICES = 25  # of each of two axes
_STARTS = (
    24,
    2,
)  # plans of the hull from which exchanges begin, and those of their results from which pairs are exchanged
_NARROWED = 5  # grids of prices, each around the best of the one before
_MISSED = 1e4  # what missing a limit by all of it costs, in largest costs of the goal
_LEAST = 1e-10  # of an exchange that counts
_MOST = 1000  # exchanges that are tried in pairs: their square is held in memory


def hull(items: Sequence[Costs]) -> list[Picked]:
    """The plans that are best for some prices of a byte and of a loss, from the fastest on; none twice."""
    spans = np.array([item.max(axis=0) - item.min(axis=0) for item in items]).sum(axis=0)
    unit = np.where(spans > 0, spans, 1.0)
    scaled = [item / unit for item in items]
    prices = np.concatenate([[0.0], np.geomspace(1e-4, 1e4, _PRICES - 1)])
    # A little of everything, so that of equals the one that is better otherwise is taken.
    weights = np.array([(1.0, a + 1e-9, b + 1e-9) for a in prices for b in prices])
    picked = np.stack([(item @ weights.T).argmin(axis=0) for item in scaled])
    found = dict.fromkeys(map(tuple, picked.T.tolist()))
    return sorted(found, key=lambda picked: float(total(items, picked)[TIME]))


def total(items: Sequence[Costs], picked: Picked) -> NDArray[np.float64]:
    """Of a plan: float64 [3]."""
    return np.sum([item[choice] for item, choice in zip(items, picked, strict=True)], axis=0)  # type: ignore[no-any-return]


def best(items: Sequence[Costs], goal: int, limits: Mapping[int, float]) -> Picked:
    """The plan with the smallest sum of the costs ``goal`` whose other sums keep to the limits; where none does, the one that comes
    nearest to them. Exact where exchanges in two layers find what is missing to a plan on the hull."""
    unit = sum(float(item[:, goal].max()) for item in items) or 1.0

    def merit(costs: NDArray[np.float64]) -> NDArray[np.float64]:
        return costs[..., goal] / unit + _MISSED * excess(costs, limits)

    starts = hull(items) + [tuple(int(item[:, axis].argmin()) for item in items) for axis in limits]

    def rank(picked: Picked) -> float:
        return float(merit(total(items, picked)))

    nearest = sorted(starts, key=rank)[: _STARTS[0]]
    alone = sorted({_exchanged(items, picked, merit, pairs=False) for picked in nearest}, key=rank)
    return min((_exchanged(items, picked, merit, pairs=True) for picked in alone[: _STARTS[1]]), key=rank)


def least(items: Sequence[Costs], goal: int, limits: Mapping[int, float]) -> float:
    """What the goal's sum is at least, of any plan whose other sums keep to the limits; infinite where one alone is out of reach.

    Lagrangian duality: with any prices on what a plan takes of the limits, the sum of the layers' best choices less the price of
    the limits is such a bound. The prices are those of a grid that narrows around the best ones."""
    axes = [axis for axis in limits if axis != goal]
    if any(sum(float(item[:, axis].min()) for item in items) > limits[axis] for axis in limits):
        return math.inf
    unit = sum(float(item[:, goal].max()) for item in items) or 1.0
    spans = np.array([sum(float(np.ptp(item[:, axis])) for item in items) or 1.0 for axis in axes])
    limit = np.array([limits[axis] for axis in axes])
    ranges, found = [(1e-4, 1e4)] * len(axes), -math.inf
    for _ in range(_NARROWED):
        grids = [np.concatenate([[0.0], np.geomspace(low, high, _PRICES - 1)]) for low, high in ranges]
        prices = np.stack([axis.ravel() for axis in np.meshgrid(*grids)], axis=1) if axes else np.zeros((1, 0))
        prices = prices * (unit / spans)
        values = sum((item[:, [goal]] + item[:, axes] @ prices.T).min(axis=0) for item in items) - prices @ limit
        found = max(found, float(np.max(values)))
        center = prices[int(np.argmax(values))] / (unit / spans)
        ranges = [
            (max(c * (low / high) ** (2 / _PRICES), 1e-9), max(c * (high / low) ** (2 / _PRICES), 1e-8))
            for c, (low, high) in zip(center, ranges, strict=True)
        ]
    return found


def excess(costs: NDArray[np.float64], limits: Mapping[int, float]) -> NDArray[np.float64]:
    """By how much limits are missed, as shares of them, together; of costs [..., 3]."""
    over = [np.maximum(0.0, costs[..., axis] - limit) / max(abs(limit), 1e-12) for axis, limit in limits.items()]
    return np.sum([np.zeros(costs.shape[:-1]), *over], axis=0)  # type: ignore[no-any-return]


def _exchanged(
    items: Sequence[Costs], picked: Picked, merit: Callable[[NDArray[np.float64]], NDArray[np.float64]], *, pairs: bool
) -> Picked:
    """After all exchanges in one layer, or else (``pairs``) in two at once, that lessen the merit, the best first."""
    now = [*picked]
    while True:
        costs = total(items, tuple(now))
        owners, choices, steps = _steps(items, now)
        moves = [int(merit(costs + steps).argmin())] if len(steps) else []
        if moves and not merit(costs + steps[moves[0]]) < merit(costs) - _LEAST:
            moves = _best_pair(owners, steps, costs, merit) if pairs else []
        if not moves:
            return tuple(now)
        for move in moves:
            now[owners[move]] = int(choices[move])


def _best_pair(
    owners: NDArray[np.int64], steps: NDArray[np.float64], costs: NDArray[np.float64],
    merit: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> list[int]:  # fmt: skip
    """The two steps, in different layers, that lessen the merit most; none where none do."""
    these = np.flatnonzero(np.abs(steps).any(axis=1))[:_MOST]
    both = merit(costs + steps[these, None] + steps[None, these])
    both[owners[these, None] == owners[None, these]] = np.inf
    if not both.size or not both.min() < merit(costs) - _LEAST:
        return []
    first, second = np.unravel_index(int(both.argmin()), both.shape)
    return [int(these[first]), int(these[second])]


def _steps(
    items: Sequence[Costs], now: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:  # fmt: skip
    """All exchanges in one layer: which one, its new choice, and what it adds to the costs."""
    owners = np.concatenate([np.full(len(item), i) for i, item in enumerate(items)])
    choices = np.concatenate([np.arange(len(item)) for item in items])
    steps = np.concatenate([item - item[choice] for item, choice in zip(items, now, strict=True)])
    moving = np.concatenate([np.arange(len(item)) != choice for item, choice in zip(items, now, strict=True)])
    return owners[moving], choices[moving], steps[moving]


def not_dominated(costs: NDArray[np.float64]) -> list[int]:
    """Which rows [points, 3] are such that no other is at least as good in all and better in one; of equal ones the first."""
    kept = []
    for i, own in enumerate(costs):
        as_good, better = (costs <= own).all(axis=1), (costs < own).any(axis=1)
        equal_before = (costs[:i] == own).all(axis=1).any()
        if not (as_good & better).any() and not equal_before:
            kept.append(i)
    return kept
