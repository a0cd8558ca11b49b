"""``shrunk``: several calls of ``shrink`` one after another, as a plan's file has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pycompress.calibration import calibrate
from pycompress.calls import Inputs
from pycompress.structure.fisher import fisher
from pycompress.structure.shrinking import shrink

Settings = Mapping[str, Any]  # of a call of shrink

SETTINGS = ("neurons", "heads", "channels", "blocks", "fisher")


def shrunk(
    model: nn.Module, calls: Sequence[Settings], batches: Sequence[Inputs], *, example_inputs: Inputs | None = None
) -> nn.Module:  # fmt: skip
    """A smaller dense model by calls of :func:`shrink` one after another, each calibrated anew on what the one before left.

        plan = WrittenPlan.load("plan.toml")
        small = pc.shrunk(model, plan.shrink, batches, example_inputs=batches[0])
        small = pc.compress(small, plan, calibration=pc.calibrate(small, batches, plan=plan))

    Args:
        model: as :func:`shrink` takes it; it is left as it is.
        calls: the settings ``neurons``, ``heads``, ``channels``, ``blocks`` of each; ``fisher`` true: by the model's results.
        batches: the inputs to calibrate on.
        example_inputs: as :func:`shrink` has them.
    Returns:
        The smaller model; the model itself where there are no calls.
    Raises:
        TypeError, ValueError, RuntimeError: a setting of another name, and what :func:`shrink` raises.
    """
    for settings in calls:
        if others := [name for name in settings if name not in SETTINGS]:
            raise ValueError(f"shrunk: a call of shrink has {others[0]!r}, expected some of {', '.join(SETTINGS)}")
        own = {**settings}
        counts = fisher(model, batches) if own.pop("fisher", False) else None
        seen = None if "blocks" in own else calibrate(model, batches)
        model = shrink(model, **own, calibration=seen, fisher=counts, example_inputs=example_inputs)
    return model
