"""Parts taken out of a layer's input: against least squares as NumPy solves it, and against every order there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from pycompress.methods.elimination import Consumer, eliminated, refitted
from pycompress.methods.inputs import DAMPING


def drawn(n: int, k: int, b: int, seed: int = 0) -> Consumer:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, k, generator=generator, dtype=torch.float64) @ torch.randn(
        k, k, generator=generator, dtype=torch.float64
    )
    weight = torch.randn(n, k, generator=generator, dtype=torch.float64)
    return Consumer(weight, x.T @ x / 50, torch.randperm(k, generator=generator).view(-1, b))


def least(consumer: Consumer, gone: Tensor) -> np.ndarray:
    """The minimum of tr((W' - W) H (W' - W)^T), H damped, with zeros where columns are gone."""
    w, h = consumer.weight.numpy(), consumer.moment.numpy()
    h = h + DAMPING * h.diagonal().mean() * np.eye(len(h))
    root = np.linalg.cholesky(h)  # ||(W' - W) L||
    stay = ~gone.numpy()
    found = np.zeros_like(w)
    found[:, stay] = np.linalg.lstsq(root[stay].T, (w @ root).T, rcond=None)[0].T
    return found


def loss(consumer: Consumer, weight: Tensor) -> float:
    change = weight - consumer.weight
    return float(((change @ consumer.damped) * change).sum())


@pytest.mark.parametrize("b", [1, 3])
def test_what_stays_is_the_least_squares_solution(b: int) -> None:
    consumer = drawn(7, 12, b)
    gone = torch.zeros(12, dtype=torch.bool)
    gone[consumer.columns[1:3].flatten()] = True
    np.testing.assert_allclose(refitted(consumer, gone).numpy(), least(consumer, gone), atol=1e-9)
    assert torch.equal(refitted(consumer, torch.zeros(12, dtype=torch.bool)), consumer.weight)


@pytest.mark.parametrize("b", [1, 2])
def test_each_step_is_the_cheapest_and_costs_what_it_says(b: int) -> None:
    """With sensitivities: plain sums."""
    drawn_ = drawn(5, 8 * b, b)
    consumer = Consumer(drawn_.weight, drawn_.moment, drawn_.columns, torch.rand(5, dtype=torch.float64))
    scaled = Consumer(drawn_.weight * consumer.fisher.sqrt()[:, None], drawn_.moment, drawn_.columns)  # type: ignore[union-attr]
    order = eliminated([consumer])
    gone = torch.zeros(8 * b, dtype=torch.bool)
    before = 0.0
    left = set(range(8))
    for step, cost in zip(order.steps, order.losses.tolist(), strict=True):
        best = {}
        for part in left:
            trial = gone.clone()
            trial[consumer.columns[part]] = True
            best[part] = loss(scaled, refitted(scaled, trial))
        assert int(step) == min(best, key=best.__getitem__)
        assert before + cost == pytest.approx(best[int(step)], rel=1e-9)
        before = best[int(step)]
        gone[consumer.columns[int(step)]] = True
        left.remove(int(step))
    assert len(left) == 1


def test_losses_are_shares_of_the_power_where_nothing_is_said() -> None:
    consumer = drawn(5, 6, 1)
    order = eliminated([consumer])
    gone = torch.zeros(6, dtype=torch.bool)
    gone[consumer.columns[torch.cat(order.steps[:2])].flatten()] = True
    lost = loss(consumer, refitted(consumer, gone)) / consumer.power
    assert float(order.losses[:2].sum()) == pytest.approx(-np.log1p(-lost))


def test_several_consumers_are_added_up_and_what_is_held_stays() -> None:
    both = [drawn(5, 6, 1), drawn(4, 6, 1, seed=1)]
    held = torch.tensor([True, False, False, False, False, True])
    order = eliminated(both, held)
    assert sorted(torch.cat(order.steps).tolist()) == [1, 2, 3, 4]
    alone = [eliminated([one], held) for one in both]
    first = {int(order.steps[0])}
    assert first <= {1, 2, 3, 4}
    for one in alone:
        assert float(order.losses[0]) >= float(one.losses[0])


@pytest.mark.parametrize("case", ["zero", "dead", "copies", "one row", "huge"])
def test_inputs_that_say_little(case: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    if case == "zero":
        x.zero_()
    elif case == "dead":
        x[:, 2:4] = 0
    elif case == "copies":
        x[:, 3:] = x[:, :3]
    elif case == "one row":
        x = x[:1]
    else:
        x[0, 0] = 1e12
    consumer = Consumer(
        torch.randn(3, 6, generator=generator, dtype=torch.float64), x.T @ x / len(x), torch.arange(6)[:, None]
    )
    order = eliminated([consumer])
    assert len(order.steps) == 5
    assert bool(torch.isfinite(order.losses).all())
    if case == "dead":
        assert {int(step) for step in order.steps[:2]} == {2, 3}
    for count in range(5):
        gone = torch.zeros(6, dtype=torch.bool)
        gone[torch.cat(order.steps[: count + 1])] = True
        assert bool(torch.isfinite(refitted(consumer, gone)).all())


def test_a_greedy_order_is_near_the_best_one() -> None:
    consumer = drawn(4, 7, 1)
    order = eliminated([consumer])
    gone = torch.zeros(7, dtype=torch.bool)
    gone[torch.cat(order.steps[:3])] = True
    every = []
    for chosen in itertools.combinations(range(7), 3):
        trial = torch.zeros(7, dtype=torch.bool)
        trial[consumer.columns[list(chosen)].flatten()] = True
        every.append(loss(consumer, refitted(consumer, trial)))
    parts = torch.zeros(7, dtype=torch.bool)
    parts[consumer.columns[gone.nonzero().flatten()].flatten()] = True
    assert loss(consumer, refitted(consumer, parts)) <= sorted(every)[len(every) // 4]
