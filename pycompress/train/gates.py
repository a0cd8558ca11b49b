"""L0: a gate before every weight (or block) that learns whether it stays, by hard-concrete distributions (Louizos et al. 2018,
arXiv:1712.01312), to a density that is asked for, by a Lagrangian (Wang et al. 2020, arXiv:1910.04732).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1  # of the distribution, and the interval that it is stretched to
_OPEN = 2.0  # the logits of a gate in the beginning: it is open in 97 of 100 draws


class Gates:
    """Of one weight [n, k], and the multipliers that hold their density.

    Args:
        shape: of the weight. block: rows and columns that have one gate.
        seed: of what is drawn.
    """

    def __init__(self, shape: tuple[int, int], block: tuple[int, int], seed: int) -> None:
        count = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
        self.logits = nn.Parameter(torch.full(count, _OPEN, dtype=torch.float32, device="cpu"))
        self.multipliers = nn.Parameter(torch.zeros(2, dtype=torch.float32, device="cpu"))
        self._block, self._random = block, torch.Generator(device="cpu").manual_seed(seed)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_random": self._random.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._random = torch.Generator(device="cpu")
        self._random.set_state(state["_random"])

    def drawn(self, shape: torch.Size) -> Tensor:
        """Gates [n, k] in [0, 1], most of them 0 or 1, with a gradient to the logits."""
        u = torch.rand(self.logits.shape, generator=self._random, dtype=torch.float32, device="cpu")
        u = u.clamp_(1e-6, 1 - 1e-6)
        noise = u.log() - (-u).log1p()
        return self._spread(_stretched((noise + self.logits) / _TEMPERATURE), shape)

    @torch.no_grad()
    def expected(self, shape: torch.Size) -> Tensor:
        """The gates [n, k] that an evaluation uses: their medians."""
        return self._spread(_stretched(self.logits / _TEMPERATURE), shape)

    def density(self) -> Tensor:
        """The expected share of gates that are not 0."""
        return torch.sigmoid(self.logits - _TEMPERATURE * math.log(-_LOW / _HIGH)).mean()

    def penalty(self, density: float) -> Tensor:
        """What is added to the loss, for a density that is to be held; the multipliers rise by its gradient."""
        over = self.density() - density
        return self.multipliers[0] * over + self.multipliers[1] * over.square()

    def importance(self, shape: torch.Size) -> Tensor:
        """float32 [n, k], larger where a gate is likelier to be open."""
        return self._spread(torch.sigmoid(self.logits.detach().double()).float(), shape)

    def state(self) -> dict[str, Tensor]:
        """All that it is, and where its random numbers are."""
        return {
            "logits": self.logits.detach(), "multipliers": self.multipliers.detach(), "random": self._random.get_state()
        }  # fmt: skip

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse."""
        self.logits.copy_(state["logits"])
        self.multipliers.copy_(state["multipliers"])
        self._random.set_state(state["random"])

    def _spread(self, gates: Tensor, shape: torch.Size) -> Tensor:
        rows, columns = self._block
        if (rows, columns) == (1, 1):
            return gates
        wide = gates.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)
        return wide[: shape[0], : shape[1]]


def _stretched(x: Tensor) -> Tensor:
    return (torch.sigmoid(x) * (_HIGH - _LOW) + _LOW).clamp(0, 1)
