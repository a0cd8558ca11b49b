"""Changes across layers. A pass reads a model and the layers of a plan and returns its edits; it changes nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from pycompress.calls import Inputs
from pycompress.passes import activations
from pycompress.passes.edit import Edit
from pycompress.passes.trial import agreeing
from pycompress.plan import Target

Pass = Callable[[nn.Module, Sequence[Target]], list[Edit]]
PASSES: list[Pass] = [activations.take_over]

__all__ = ["PASSES", "Edit", "Pass", "run"]


def run(model: nn.Module, targets: Sequence[Target], inputs: Inputs | None = None) -> None:
    """All passes, one behind the other; each sees what those before it made of the targets. Edits after which the model would
    compute something else on ``inputs`` are left out."""
    for one in PASSES:
        edits = one(model, targets)
        if edits and inputs is not None:
            edits = agreeing(model, edits, inputs)
        for edit in edits:
            edit.apply()
