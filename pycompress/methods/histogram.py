"""``Histogram``: how often the values of an input came, in a memory that does not grow with them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 8192
_HALF = BINS // 2
_SMALLEST = -126  # the exponent of an input of zeros
_CHUNK = 1 << 20  # values that are sorted into bins at a time


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts int64 [BINS] of values in [-2^exponent, 2^exponent), in bins of one width.

    Where larger values come, the limit doubles until it holds them, and bins that become one are added up. A width is a power of
    two and zero an edge, so nothing is rounded: whatever the order and the size of the batches, the counts are those of all values
    at once.
    """

    counts: Tensor
    exponent: int

    @classmethod
    def empty(cls) -> Histogram:
        return cls(torch.zeros(BINS, dtype=torch.int64, device="cpu"), _SMALLEST)

    @property
    def width(self) -> float:
        """Of a bin."""
        return math.ldexp(1.0, self.exponent + 1) / BINS

    def edges(self) -> Tensor:
        """The lower ends of the bins, and the limit: float64 [BINS + 1]."""
        return torch.arange(-_HALF, _HALF + 1, dtype=torch.float64, device="cpu") * self.width

    def centres(self) -> Tensor:
        """float64 [BINS]."""
        return self.edges()[:-1] + 0.5 * self.width

    def with_values(self, values: Tensor, largest: float) -> Histogram:
        """Finite values besides, of any shape, on the CPU; ``largest``: no magnitude is larger."""
        wide = self._widened(max(_SMALLEST, math.frexp(largest)[1]))
        counts = wide.counts.clone()
        for some in values.flatten().split(_CHUNK):
            bins = (some.double() / wide.width).floor_().to(torch.int64).add_(_HALF)
            counts += torch.bincount(bins, minlength=BINS)
        return Histogram(counts, wide.exponent)

    def merged(self, other: Histogram) -> Histogram:
        """Of the values of both."""
        exponent = max(self.exponent, other.exponent)
        return Histogram(self._widened(exponent).counts + other._widened(exponent).counts, exponent)

    def _widened(self, exponent: int) -> Histogram:
        if exponent <= self.exponent:
            return self
        bins = torch.arange(-_HALF, _HALF, dtype=torch.int64, device="cpu") >> min(exponent - self.exponent, 62)
        counts = torch.zeros_like(self.counts).index_add_(0, bins + _HALF, self.counts)
        return Histogram(counts, exponent)
