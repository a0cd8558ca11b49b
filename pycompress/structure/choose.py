"""Which units go: those whose loss is smallest, over all layers by one threshold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pycompress.methods.elimination import Elimination
from pycompress.structure.cut import tensor_at
from pycompress.structure.units import Units

Orders = Mapping[Units, Elimination]


def by_share(orders: Orders, share: float) -> dict[Units, Tensor]:
    """Bool [size] for each: which stay where this share of all of them does. Every place keeps some."""
    return _below(orders, dict.fromkeys(orders, 1.0), (1 - share) * sum(units.size for units in orders))


def by_cost(model: nn.Module, orders: Orders, share: float) -> dict[Units, Tensor]:
    """The same, where this share stays of the parameters that could go, and a loss is judged by the parameters that it saves."""
    costs = {units: parameters_of(model, units) for units in orders}
    most = sum(float(orders[units].sizes.sum()) * costs[units] for units in orders)
    return _below(orders, costs, (1 - share) * most)


def parameters_of(model: nn.Module, units: Units) -> float:
    """How many parameters a unit has."""
    shares = [(tensor_at(model, one.tensor), one) for one in units.slices]
    return sum(tensor.numel() / tensor.shape[one.dim] * one.positions.shape[1] for tensor, one in shares)


def loss_of(order: Elimination, stay: Tensor) -> float:
    """What is lost where only these stay, which an order leads to."""
    return float(sum(loss for step, loss in zip(order.steps, order.losses.tolist(), strict=True) if not stay[step[0]]))


def _below(orders: Orders, costs: Mapping[Units, float], target: float) -> dict[Units, Tensor]:
    """Takes steps, the least loss for its cost first, until about ``target`` of cost is gone.

    A step never goes before those that its order has in front of it: it is judged by the largest of their losses.
    """
    stay = {units: torch.ones(units.size, dtype=torch.bool, device="cpu") for units in orders}
    queue = []
    for place, (units, order) in enumerate(orders.items()):
        each = order.losses / (order.sizes * costs[units])
        worst = each.cummax(dim=0).values.tolist() if len(each) else []
        queue += [(loss, place, i, units, step) for i, (loss, step) in enumerate(zip(worst, order.steps, strict=True))]
    gone = 0.0
    for *_, units, step in sorted(queue, key=lambda one: one[:3]):
        cost = len(step) * costs[units]
        if gone + cost / 2 > target:
            break
        stay[units][step] = False
        gone += cost
    return stay
