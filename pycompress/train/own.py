"""What a training learns besides the model's parameters: gates, and the scales of grids; each by an Adam of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pycompress.train.gates import Gates

GATES_LR = 0.05
SCALES_LR = 1e-3  # the share of itself by which a step changes a scale


class Own:
    """The training's own parameters, and what moves them.

    Args:
        gates: of the layers that have some.
    """

    def __init__(self, gates: Sequence[Gates]) -> None:
        self._multipliers = [one.multipliers for one in gates]
        parameters = [parameter for one in gates for parameter in (one.logits, one.multipliers)]
        self._gates = torch.optim.Adam(parameters, GATES_LR) if gates else None
        self._scales: torch.optim.Adam | None = None

    def learn(self, scales: Sequence[nn.Parameter]) -> None:
        """Moves these from now on, too."""
        self._scales = torch.optim.Adam(scales, SCALES_LR) if scales else None

    def step(self, left: float) -> None:
        """By the gradients that came since the last one; ``left`` is the share of the training that is still to come, with which
        scales come to rest. The multipliers of gates rise, against them."""
        for multiplier in self._multipliers:
            if multiplier.grad is not None:
                multiplier.grad.neg_()
        if self._scales is not None:
            self._scales.param_groups[0]["lr"] = SCALES_LR * left
        for optimizer in filter(None, (self._gates, self._scales)):
            _share_gradients(optimizer.param_groups[0]["params"])
            optimizer.step()
            optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """Of the optimizers."""
        parts = {"gates": self._gates, "scales": self._scales}
        return {name: None if optimizer is None else optimizer.state_dict() for name, optimizer in parts.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        for name, optimizer in (("gates", self._gates), ("scales", self._scales)):
            if optimizer is not None:
                optimizer.load_state_dict(state[name])


def _share_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """The mean over all processes, so that all of them learn the same."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.distributed.all_reduce(gradient)
        parameter.grad = gradient / torch.distributed.get_world_size()
