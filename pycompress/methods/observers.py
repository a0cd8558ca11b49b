"""Observers: which range a static quantization takes, from what calibration saw of an input. Compared by Wu et al. 2020,
arXiv:2004.09602: which is best depends on the model.

All of them give one range for the whole tensor, which has zero in it. They are the parts of a method: small frozen values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from pycompress.methods.histogram import BINS, Histogram
from pycompress.methods.inputs import InputStatistics

_CANDIDATES = 100  # of an end of the range, from all of it down to a hundredth
_ROUNDS = 2
_STRIDE = 8  # bins between two candidates of the entropy observer


@runtime_checkable
class Observer(Protocol):
    """What chooses the range; ``needs``: those of ``inputs.PARTS`` that calibration gathers for it."""

    needs: ClassVar[tuple[str, ...]]

    def ends(self, inputs: InputStatistics | None, levels: int) -> tuple[float, float]:
        """The lowest and the highest value that is not clipped, to be quantized to so many integers.

        Args:
            inputs: with what ``needs`` says; None where that is nothing.
        """


def _seen(inputs: InputStatistics | None) -> InputStatistics:
    assert inputs is not None
    return inputs


def _extremes(inputs: InputStatistics) -> tuple[float, float]:
    low, high = inputs.range("Int8", inputs.features)
    return float(low.amin()), float(high.amax())


@dataclass(frozen=True)
class Known:
    """A range that is known without a calibration: that of an image, or of what a sigmoid gives.

    Raises:
        ValueError: the ends are not finite, or low is above high.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ValueError(f"Known: low is {self.low!r}, high {self.high!r}, expected finite numbers, low <= high")

    def ends(self, inputs: InputStatistics | None, levels: int) -> tuple[float, float]:  # noqa: ARG002 - others need them
        return self.low, self.high


@dataclass(frozen=True)
class MinMax:
    """From the lowest to the highest value that was seen (Jacob et al. 2018, arXiv:1712.05877): nothing of it is clipped."""

    needs: ClassVar[tuple[str, ...]] = ("ranges",)

    def ends(self, inputs: InputStatistics | None, levels: int) -> tuple[float, float]:  # noqa: ARG002 - others need it
        return _extremes(_seen(inputs))


@dataclass(frozen=True)
class MovingAverage:
    """Exponential moving averages of the lowest and the highest value of each batch (Jacob et al. 2018, arXiv:1712.05877, section
    3.1): a single batch with an outlier counts little. One batch gives its own ends.

    Calibration keeps the ends of the last 1,024 calls of a layer; before these, a batch would count less than
    momentum^1024.

    Args:
        momentum: what the average keeps at each batch, from 0 to 0.99.
    Raises:
        ValueError: another momentum.
    """

    needs: ClassVar[tuple[str, ...]] = ("ranges", "extremes")

    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 0.99:
            raise ValueError(f"MovingAverage: momentum is {self.momentum!r}, expected 0 to 0.99")

    def ends(self, inputs: InputStatistics | None, levels: int) -> tuple[float, float]:  # noqa: ARG002 - others need it
        extremes = _seen(inputs).extremes_of("Int8")
        age = torch.arange(len(extremes) - 1, -1, -1, dtype=torch.float64, device="cpu")
        share = (1 - self.momentum) * self.momentum**age
        share[0] = self.momentum ** float(age[0])  # the first one begins the average
        low, high = (share[:, None] * extremes).sum(dim=0).tolist()
        return low, high


@dataclass(frozen=True)
class Percentile:
    """All but a small share of the values, cut off alike at both ends (as ONNX Runtime's percentile calibration does it).

    What is cut are whole values: of too few to have one that is cut (below 20,000 with 99.99), and of a constant, nothing is, and
    the range is that of :class:`MinMax`.

    Args:
        percent: of the values that are within, above 50 up to 100.
    Raises:
        ValueError: another percentage.
    """

    needs: ClassVar[tuple[str, ...]] = ("ranges", "histograms")

    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percent <= 100:
            raise ValueError(f"Percentile: percent is {self.percent!r}, expected above 50 up to 100")

    def ends(self, inputs: InputStatistics | None, levels: int) -> tuple[float, float]:  # noqa: ARG002 - others need it
        (low, high), seen = _extremes(_seen(inputs)), _seen(inputs).distribution("Int8")
        below, edges = seen.counts.cumsum(0), seen.edges()
        total = int(below[-1])
        cut = int(total * (100 - self.percent) / 200)
        first, last = int((below > cut).nonzero()[0]), int((below >= total - cut).nonzero()[0])
        return max(low, float(edges[first])), min(high, float(edges[last + 1]))


@dataclass(frozen=True)
class MeanSquaredError:
    """The range in which rounding and clipping together make the smallest mean squared error (Choukroun et al. 2019,
    arXiv:1902.06822), by a search over both ends in turns, on the histogram. A constant, and few values, keep theirs.
    """

    needs: ClassVar[tuple[str, ...]] = ("ranges", "histograms")

    def ends(self, inputs: InputStatistics | None, levels: int) -> tuple[float, float]:
        seen, (low, high) = _seen(inputs).distribution("Int8"), _extremes(_seen(inputs))
        low, high = min(low, 0.0), max(high, 0.0)
        there = seen.counts.nonzero().flatten()
        values, counts = seen.centres()[there].clamp_(low, high), seen.counts[there].double()
        shares = torch.linspace(1, 1 / _CANDIDATES, _CANDIDATES, dtype=torch.float64, device="cpu")
        best_low, best_high = low, high
        for _ in range(_ROUNDS if low < high else 0):
            best_high = _best(values, counts, torch.full_like(shares, best_low), shares * high, levels)[1]
            best_low = _best(values, counts, shares * low, torch.full_like(shares, best_high), levels)[0]
        return best_low, best_high


def _best(values: Tensor, counts: Tensor, low: Tensor, high: Tensor, levels: int) -> tuple[float, float]:
    """Of several ranges, the first one with the smallest error."""
    step = ((high - low) / (levels - 1)).clamp_(min=torch.finfo(torch.float64).tiny)[:, None]
    kept = torch.minimum(torch.maximum(values, low[:, None]), high[:, None])
    image = (kept / step).round_().mul_(step)
    best = int(((image - values).square_() @ counts).argmin())
    return float(low[best]), float(high[best])


@dataclass(frozen=True)
class Entropy:
    """The range whose quantized histogram is closest to the whole one by Kullback-Leibler divergence (Migacz, "8-bit Inference with
    TensorRT", GTC 2017): windows around zero are tried, what lies outside is added to their ends. Of ranges as good as each other
    (a constant, few values) the widest is taken.
    """

    needs: ClassVar[tuple[str, ...]] = ("ranges", "histograms")

    def ends(self, inputs: InputStatistics | None, levels: int) -> tuple[float, float]:
        seen, (low, high) = _seen(inputs).distribution("Int8"), _extremes(_seen(inputs))
        there, zero = seen.counts.nonzero().flatten(), BINS // 2
        first, end = min(int(there[0]), zero), max(int(there[-1]) + 1, zero)
        best, chosen = math.inf, max(zero - first, end - zero)
        for reach in range(chosen, 0, -_STRIDE):
            begin, stop = max(first, zero - reach), min(end, zero + reach)
            if stop - begin < levels:
                break
            divergence = _divergence(seen, begin, stop, levels)
            if divergence < best:
                best, chosen = divergence, reach
        limit = chosen * seen.width
        return max(low, -limit), min(high, limit)


def _divergence(seen: Histogram, begin: int, stop: int, levels: int) -> float:
    """Of the bins [begin, stop), which take what lies outside, quantized to so many levels, from these bins as they are."""
    inside = seen.counts[begin:stop].double()
    whole = inside.clone()
    whole[0] += float(seen.counts[:begin].sum())
    whole[-1] += float(seen.counts[stop:].sum())
    level = torch.arange(stop - begin, dtype=torch.int64, device="cpu") * levels // (stop - begin)
    there = (inside > 0).double()
    of_level = torch.zeros(2, levels, dtype=torch.float64, device="cpu").index_add_(
        1, level, torch.stack([inside, there])
    )
    quantized = (of_level[0] / of_level[1].clamp(min=1))[level] * there
    whole, quantized = whole / whole.sum(), (quantized / quantized.sum().clamp(min=1)).clamp_(min=1e-10)
    return float(torch.special.xlogy(whole, whole / quantized).sum())
