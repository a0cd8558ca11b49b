"""How long a call takes, dense and compressed in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from pycompress.calls import Inputs, call_model
from pycompress.evaluation.outputs import resized
from pycompress.measure import in_turns
from pycompress.state import unchanged, unwatched

FEWEST, SECONDS = 21, 2.0  # rounds at least, and for how long there are more


@dataclass(frozen=True)
class Times:
    """Of one model: median and 95th percentile of a call in milliseconds, and rows per second at the median."""

    p50_ms: float
    p95_ms: float
    rows_per_s: float


@dataclass(frozen=True)
class Latency:
    """Of calls with ``rows`` rows.

    Attributes:
        times, baseline: of both models.
        speedup: the baseline's time over the model's: the median of the ratios of each round, and their quartiles.
    """

    rows: int
    times: Times
    baseline: Times | None
    speedup: tuple[float, float, float] | None


def latencies(
    models: Sequence[nn.Module], inputs: Inputs, rows: int, counts: Sequence[int], seconds: float = SECONDS
) -> list[Latency]:  # fmt: skip
    """Of each number of rows, which are those of the inputs, and again. ``models``: the model, and the baseline if there is one."""
    return [_latency(models, resized(inputs, rows, count), count, seconds) for count in counts]


def _latency(models: Sequence[nn.Module], inputs: Inputs, rows: int, seconds: float) -> Latency:
    # (not `evaluating`: what is compiled, and torch's fast paths, run as they do for a user)
    with unchanged(*models, inputs), torch.no_grad():
        for model in models:
            model.eval()
            call_model(model, inputs)  # and the block learns what a call writes to
        with unwatched():
            calls = [partial(call_model, model, inputs) for model in models]
            turns = np.array(in_turns(calls, FEWEST, seconds), dtype=np.float64)
    times = []
    for own in turns.T:
        p50, p95 = np.quantile(own, (0.5, 0.95))
        times.append(Times(float(p50) * 1e3, float(p95) * 1e3, rows / float(p50)))
    if len(models) == 1:
        return Latency(rows, times[0], None, None)
    low, median, high = np.quantile(turns[:, 1] / turns[:, 0], (0.25, 0.5, 0.75))
    return Latency(rows, times[0], times[1], (float(median), float(low), float(high)))
