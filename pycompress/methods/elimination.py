"""Parts of a layer's input, taken out in the order of what they cost (Kurtic, Frantar and Alistarh 2023, arXiv:2302.04089).

What is lost where the columns R of a matrix W go and the others are fitted anew has a closed form, the surgeon's of Hassibi and
Stork (1993): tr(W_R (H^-1)_RR^-1 W_R^T), H the second moment of the inputs. Taking R out changes W and H^-1 by closed forms too, so
that the next parts are judged as the layer then is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.methods.inputs import DAMPING

_STEPS = 64  # about as many for a layer: each takes so many parts at once that there are no more


@dataclass(frozen=True, eq=False)
class Consumer:
    """A matrix, and which columns of it multiply each part.

    Attributes:
        weight: float64 [n, k].
        moment: float64 [k, k], the second moment of its inputs, or where a bias takes up their mean their covariance.
        columns: int64 [parts, b].
        fisher: float64 [n], what an error of each result counts; None: as a share of the power of the results.
    """

    weight: Tensor
    moment: Tensor
    columns: Tensor
    fisher: Tensor | None = None

    @property
    def damped(self) -> Tensor:
        """The moment with :data:`DAMPING` of its mean diagonal; of inputs that are all zero the identity."""
        share = DAMPING * float(self.moment.diagonal().mean())
        return self.moment + (share or 1.0) * torch.eye(len(self.moment), dtype=torch.float64, device="cpu")

    @property
    def power(self) -> float:
        """The mean square of its results, summed over them."""
        return float(((self.weight @ self.moment) * self.weight).sum())


@dataclass(frozen=True, eq=False)
class Elimination:
    """The order in which parts go.

    Attributes:
        steps: the parts that go at each step, int64 each; some parts are in none, since something has to stay.
        losses: float64 [steps], what each adds to the loss; of several consumers the sum. Where a loss is a share of the power, it
            counts as minus the logarithm of the share that is kept: little lost of each is better than all of one.
    """

    steps: list[Tensor]
    losses: Tensor

    @property
    def sizes(self) -> Tensor:
        """int64 [steps]."""
        return torch.tensor([len(step) for step in self.steps], dtype=torch.int64, device="cpu")


def eliminated(consumers: Sequence[Consumer], held: Tensor | None = None) -> Elimination:
    """The order in which the parts go, each step taking those that cost least by then.

    Args:
        consumers: of the same parts.
        held: bool [parts], which have to stay; None: none.
    """
    parts = len(consumers[0].columns)
    free = torch.ones(parts, dtype=torch.bool, device="cpu") if held is None else ~held
    states = [_State(one) for one in consumers]
    steps: list[Tensor] = []
    losses: list[float] = []
    at_once = _at_once(parts)
    fewest = at_once if bool(free.all()) else 0  # (what is held stays anyway)
    while int(free.sum()) > fewest:
        scores = sum((state.scores() for state in states), torch.zeros(parts, dtype=torch.float64, device="cpu"))
        scores[~free] = torch.inf
        step = torch.sort(scores, stable=True).indices[: min(at_once, int(free.sum()) - fewest)].sort().values
        losses.append(sum(state.without(step) for state in states))
        steps.append(step)
        free[step] = False
    return Elimination(steps, torch.tensor(losses, dtype=torch.float64, device="cpu"))


def _at_once(parts: int) -> int:
    return max(1, parts // _STEPS)


class _State:
    """A consumer from which parts have gone."""

    def __init__(self, consumer: Consumer) -> None:
        self.columns = consumer.columns
        self.weight = consumer.weight.clone()
        self.relative = consumer.fisher is None
        self.lost = 0.0
        if consumer.fisher is None:
            self.weight /= (consumer.power or 1.0) ** 0.5
        else:
            self.weight *= consumer.fisher.sqrt()[:, None]
        factor, failed = torch.linalg.cholesky_ex(consumer.damped)
        if int(failed):
            raise ValueError("shrink: the moment of the inputs has negative eigenvalues, expected none")
        self.inverse = torch.cholesky_inverse(factor)

    def scores(self) -> Tensor:
        """float64 [parts]: what each part would cost by itself; of those that are gone it means nothing."""
        if self.columns.shape[1] == 1:
            own = self.inverse.diagonal()
            costs: Tensor = self.weight.square().sum(dim=0) / torch.where(own > 0, own, 1.0)
            return costs[self.columns[:, 0]]
        blocks = self.inverse[self.columns[:, :, None], self.columns[:, None, :]]  # [parts, b, b]
        gone = blocks.diagonal(dim1=1, dim2=2) == 0
        weights = self.weight.T[self.columns]  # [parts, b, n]
        costs = torch.linalg.inv(blocks + torch.diag_embed(gone.double())) * (weights @ weights.mT)
        return costs.sum(dim=(1, 2))

    def without(self, parts: Tensor) -> float:
        """Takes parts out. Returns what that costs."""
        columns = self.columns[parts].flatten()
        block = self.inverse[columns][:, columns]
        rows = self.inverse[columns]
        weights = self.weight[:, columns]
        fitted = torch.linalg.solve(block, rows)  # [columns, k]
        cost = float((weights * torch.linalg.solve(block, weights.T).T).sum())
        self.weight -= weights @ fitted
        self.inverse -= rows.T @ fitted
        self.inverse[columns] = 0.0
        self.inverse[:, columns] = 0.0
        self.weight[:, columns] = 0.0
        before, self.lost = self.lost, self.lost + max(cost, 0.0)
        return _kept(before) - _kept(self.lost) if self.relative else self.lost - before


def _kept(lost: float) -> float:
    """The logarithm of the share of the power that is kept. (Damping may take more than there is.)"""
    return math.log1p(-min(lost, 1 - 1e-9))


def refitted(consumer: Consumer, gone: Tensor) -> Tensor:
    """The weight float64 [n, k] whose results are nearest, in least squares, with zeros in the columns that are gone.

    Where they add nothing to what the others say, the others stay as they are.

    Args:
        gone: bool [k].
    """
    moment = consumer.damped
    stay = ~gone
    change = torch.linalg.solve(moment[stay][:, stay], moment[stay][:, gone] @ consumer.weight[:, gone].T).T
    weight = torch.zeros_like(consumer.weight)
    weight[:, stay] = consumer.weight[:, stay] + change
    return weight
