"""Ranks shared out over layers by what each loses (as SVD-LLM v2 does it, Wang et al. 2025, arXiv:2503.12340, in closed form).

A rank of a layer [n, k] costs n + k multiply-adds, and wins one more squared singular value of W X. These fall, so what a layer
loses is convex in its rank, and the best ranks for a budget are found by taking what wins most for a multiply-add, one step after
another. A layer that would gain more by its dense weight than by its next step takes that instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pycompress.methods.break_even import STEP
from pycompress.methods.inputs import DAMPING, InputStatistics, Metric


class Layer(NamedTuple):
    """A layer that is to have a rank.

    Attributes:
        wins: float64 [min(n, k)], descending: what each further rank wins.
        cost: of a rank: n + k.
        most: the largest rank that it can have; 0: none.
        dense: what its dense weight costs, more than the largest rank, with which it loses nothing; None: it must not stay dense.
    """

    wins: Tensor
    cost: int
    most: int
    dense: int | None = None


class _Step(NamedTuple):
    """From one rank of a layer to the next, or to its dense weight (rank None)."""

    worth: float  # what it wins, over its cost
    layer: int
    rank: int | None
    cost: int


def wins(w: Tensor, inputs: InputStatistics | None) -> Tensor:
    """What each further rank of a weight wins, float64 [min(n, k)], descending.

    The squared singular values of D W L: L L^T the second moment of the inputs, D the reciprocal standard deviations of the outputs
    (without inputs: the identity, and reciprocal norms of the rows); all of them over the root of their sum.

    Without D, a few features of the outputs that are far larger than the others decide: a layer that is followed by a LayerNorm can
    lose most of the others. And with the sums themselves, or each layer's over its whole sum, wide layers would get too much or too
    little (see benchmarks/NOTES.md).
    """
    metric = Metric(None if inputs is None else inputs.moment("LowRank", w.shape[1]))
    spread = metric.squares(w)
    if inputs is not None and inputs.mean is not None:
        spread = (spread - (w @ inputs.mean).square()).clamp_(min=0)
    spread = spread + DAMPING * spread.mean()
    a = metric.whitened(torch.where(spread > 0, spread.rsqrt(), 0.0)[:, None] * w)
    squares: Tensor = torch.linalg.eigvalsh(a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a)
    squares = squares.flip(0).clamp_(min=0)
    total = float(squares.sum())
    return squares / total**0.5 if total else squares


def of_share(shape: tuple[int, int], share: float) -> int:
    """The rank of a layer whose factors take this share of its multiply-adds, rounded down (from 8 on to steps of 8), from 1."""
    n, k = shape
    rank = min(int(share * n * k / (n + k)), n, k)
    return max(1, rank - rank % STEP if rank >= STEP else rank)


def shared_out(layers: Sequence[Layer], budget: float) -> list[int | None]:
    """The ranks, in steps of 8, with which all layers together lose least for a budget; None: a layer stays dense.

    Of the ranks that cost no more, none lose less, until the first step comes that the rest of the budget does not allow; others
    that it allows are taken then, so that what is left is less than the dearest step.

    Raises:
        ValueError: the budget does not allow the first step of each layer.
    """
    ranks = _taken([_path(i, layer) for i, layer in enumerate(layers)], budget)
    # Where the budget ended before a layer's dense weight, the layer goes on with ranks instead.
    rest = [_dense(i, layer, 0) if ranks[i] is None else _steps(i, layer) for i, layer in enumerate(layers)]
    return _taken(rest, budget)


def _steps(index: int, layer: Layer) -> list[_Step]:
    first = min(STEP, layer.most)
    ranks = [first, *range(2 * STEP, layer.most + 1, STEP)] if first else []
    return [
        _Step(float(layer.wins[rank - first : rank].sum()) / (first * layer.cost), index, rank, first * layer.cost)
        for rank in ranks
    ]


def _dense(index: int, layer: Layer, rank: int) -> list[_Step]:
    """From a rank to the dense weight; nothing where there is none."""
    if layer.dense is None:
        return []
    cost = layer.dense - rank * layer.cost
    return [_Step(float(layer.wins[rank:].sum()) / cost, index, None, cost)]


def _path(index: int, layer: Layer) -> list[_Step]:
    """The steps as long as each wins more for its cost than the dense weight would, and that."""
    steps = _steps(index, layer)
    rank = 0
    for taken, step in enumerate(steps):
        dense = _dense(index, layer, rank)
        if taken and dense and dense[0].worth > step.worth:
            return [*steps[:taken], *dense]
        rank = step.rank or 0
    return [*steps, *_dense(index, layer, rank)]


def _taken(paths: list[list[_Step]], budget: float) -> list[int | None]:
    """The rank of each layer. The first step of each is taken in any case."""
    first = [path[0] for path in paths]
    left = budget - sum(step.cost for step in first)
    if left < 0:
        raise ValueError(f"the budget is {budget:.0f}, expected at least {budget - left:.0f}: the smallest ranks")
    ranks, ended = [step.rank for step in first], set[int]()
    # sorted() is stable: of steps of the same worth, those of the first layers come first, and each layer's in order.
    for step in sorted((step for path in paths for step in path[1:]), key=lambda step: -step.worth):
        if step.layer in ended or step.worth <= 0:
            continue
        if step.cost > left:
            ended.add(step.layer)
            continue
        left -= step.cost
        ranks[step.layer] = step.rank
    return ranks
