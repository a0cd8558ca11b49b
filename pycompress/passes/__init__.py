"""Changes across layers. A pass reads a model and the layers of a plan and returns its edits; it changes nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn

from pycompress.calls import Inputs
from pycompress.passes import activations, fold_norm, padding
from pycompress.passes.edit import Edit
from pycompress.passes.trial import tried
from pycompress.plan import Target

Pass = Callable[[nn.Module, Sequence[Target], Inputs | None], Sequence[Edit]]
PASSES: list[Pass] = [
    fold_norm.fold_behind,
    activations.take_over,
    padding.take_in,
]  # (an activation may follow a norm)

__all__ = ["PASSES", "Edit", "Pass", "run"]


def run(
    model: nn.Module, targets: Sequence[Target], inputs: Inputs | None = None, *, without: Collection[Any] = ()
) -> list[Edit]:  # fmt: skip
    """All passes but some, one behind the other; each sees what those before it made of the targets. Edits after which the model
    would compute something else on ``inputs`` are left out. Returns all edits."""
    edits: list[Edit] = []
    for one in PASSES:
        own = tried(model, one(model, targets, inputs), inputs) if one not in without else []
        for edit in own:
            edit.apply()
        edits += own
    return edits
