"""Changes across layers. A pass reads a model and the layers of a plan and returns its edits; it changes nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from pycompress.passes import activations
from pycompress.passes.edit import Edit
from pycompress.plan import Target

Pass = Callable[[nn.Module, Sequence[Target]], list[Edit]]
PASSES: list[Pass] = [activations.take_over]

__all__ = ["PASSES", "Edit", "Pass", "run"]


def run(model: nn.Module, targets: Sequence[Target]) -> None:
    """All passes, one behind the other; each sees what those before it made of the targets."""
    for one in PASSES:
        for edit in one(model, targets):
            edit.apply()
