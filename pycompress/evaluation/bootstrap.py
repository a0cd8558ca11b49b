"""Intervals by drawing rows with replacement: percentiles (Efron & Tibshirani 1993, An Introduction to the Bootstrap)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A figure, and where it lies with the given confidence; ``low`` and ``high`` are None where that cannot be said."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        between = "" if self.low is None else f" ({self.low:.4g} to {self.high:.4g})"
        return f"{self.value:.4g}{between}"


@dataclass(frozen=True)
class Sample:
    """What a figure is made of: tensors with a row each for what may be drawn, and the figure of some such rows."""

    rows: tuple[Tensor, ...]
    figure: Callable[..., float]

    def __len__(self) -> int:
        return len(self.rows[0])

    def of(self, drawn: Tensor) -> float:
        return self.figure(*(rows[drawn] for rows in self.rows))

    @property
    def value(self) -> float:
        """Of all rows."""
        return self.figure(*self.rows)


@dataclass(frozen=True)
class Bootstrap:
    """How often rows are drawn, and how sure one wants to be.

    Raises:
        ValueError: fewer than 10 resamples, or a confidence that is not between 0 and 1.
    """

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 10 or not 0 < self.confidence < 1:
            raise ValueError(
                f"evaluate: resamples is {self.resamples} and confidence {self.confidence}, expected at least 10, and a number "
                "between 0 and 1"
            )

    def intervals(self, *samples: Sample) -> list[Interval]:
        """Of each of one or two samples of the same rows, and of two the difference, first less second: with the same rows drawn
        for both, so that what is hard for both moves neither.

        Draws of which there is no figure (NaN: of one class alone) are left out; where that is more than half of them, or where
        there is one row, there is no interval.
        """
        values = [sample.value for sample in samples]
        count = len(samples[0])
        if len(samples) == 2:
            values.append(values[0] - values[1])
        if count < 2:
            return [Interval(value) for value in values]
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        drawn = np.empty((self.resamples, len(values)))
        for figures in drawn:
            rows = torch.randint(count, (count,), generator=generator, dtype=torch.int64, device="cpu")
            figures[: len(samples)] = [sample.of(rows) for sample in samples]
            if len(samples) == 2:
                figures[2] = figures[0] - figures[1]
        return [self._interval(value, figures) for value, figures in zip(values, drawn.T, strict=True)]

    def _interval(self, value: float, figures: np.ndarray) -> Interval:
        known = figures[np.isfinite(figures)]
        if 2 * len(known) < len(figures):
            return Interval(value)
        low, high = np.quantile(known, [(1 - self.confidence) / 2, (1 + self.confidence) / 2])
        return Interval(value, float(low), float(high))
