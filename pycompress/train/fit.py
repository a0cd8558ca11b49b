"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) on unlabelled batches, for a number of steps or for a time."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

EVALUATIONS = 10  # of a fit, evenly spaced, besides that of the start
PATIENCE = 4  # evaluations in a row without a better score that end it; before the learning rate falls scores may rise at first
_WARM_UP = 0.05  # of a fit, in which the learning rate rises
_NORM = 1.0  # to which gradients are clipped
_BETAS = (0.9, 0.98)


class Clock:
    """Seconds of work, with a past in another process, and without what is done while it rests."""

    def __init__(self, before: float = 0.0) -> None:
        self._start = time.perf_counter() - before

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def rest(self, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        work()
        self._start += time.perf_counter() - start


@dataclass(frozen=True)
class Budget:
    """Of one fit: a number of steps or, where that is None, the time of the clock at which it ends."""

    steps: int | None
    until: float = math.inf

    def share(self, steps: int, clock: Clock, start: float) -> float:
        """How much of it is spent, from 0 on; ``start``: the time of the clock at which the fit began."""
        if self.steps is not None:
            return steps / self.steps if self.steps else 1.0
        return (clock.seconds - start) / max(self.until - start, 1e-9)


@dataclass
class Fit:
    """Where an optimization stands; all of it but the parameters, which are given to :func:`run`.

    Attributes:
        score, best: the best score yet, and the parameters that had it.
        first_score: before the first step. least: the best one since, and ``worse``, how many evaluations ago that was.
        start: the time of the clock at which it began.
    """

    start: float = 0.0
    steps: int = 0
    score: float = math.inf
    first_score: float = math.inf
    least: float = math.inf
    worse: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


def run(
    fit: Fit,
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[int], Tensor],
    score: Callable[[], float],
    batches: int,
    budget: Budget,
    clock: Clock,
    *,
    lr: float,
    seed: str,
    after_score: Callable[[Fit], None],
) -> None:
    """Continues a fit until its budget is spent or its score gets no better; the parameters are the best ones then, also where
    anything is raised.

    Args:
        loss: of the batch of a number below ``batches``.
        score: of the parameters as they are now; the less, the better.
        lr: rises, then falls to 0 as the budget is spent.
        seed: of the order of the batches, which is a function of it and of the number of steps alone.
        after_score: called when the fit could be continued from what it holds, and from the parameters.
    """
    own = list(parameters.values())
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in own)
    optimizer = torch.optim.AdamW(own, lr=lr, betas=_BETAS, weight_decay=0.0, fused=fused)
    if fit.optimizer:
        optimizer.load_state_dict(fit.optimizer)
    try:
        scored = _scored_share(fit, budget, clock)
        while fit.worse < PATIENCE:
            share = budget.share(fit.steps, clock, fit.start)
            if share >= min(scored, 1.0) or not fit.best:
                _score(fit, parameters, score, optimizer)
                after_score(fit)
                scored = _scored_share(fit, budget, clock)
                if share >= 1:
                    return
                continue
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (share + 1e-3) / _WARM_UP) * (1 - share)
            optimizer.zero_grad()
            loss(order(seed, fit.steps, batches)).backward()
            nn.utils.clip_grad_norm_(own, _NORM)
            optimizer.step()
            fit.steps += 1
    finally:
        _put(fit.best, parameters)
        optimizer.zero_grad()


def order(seed: str, step: int, batches: int) -> int:
    """The batch of a step: every epoch all of them, in an order of its own."""
    epoch, position = divmod(step, batches)
    return random.Random(f"{seed}/{epoch}").sample(range(batches), batches)[position]


def _scored_share(fit: Fit, budget: Budget, clock: Clock) -> float:
    """The share of the budget at which the next score is due."""
    return (math.floor(budget.share(fit.steps, clock, fit.start) * EVALUATIONS + 1e-9) + 1) / EVALUATIONS


def _score(
    fit: Fit, parameters: Mapping[str, nn.Parameter], score: Callable[[], float], optimizer: torch.optim.Optimizer
) -> None:  # fmt: skip
    now = score()
    if not fit.best:
        fit.first_score = now
    elif now < fit.least:
        fit.least, fit.worse = now, 0
    else:
        fit.worse += 1
    if now < fit.score or not fit.best:
        fit.score = now
        fit.best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    fit.optimizer = optimizer.state_dict()


def _put(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
