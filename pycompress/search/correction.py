"""What sums over layers say of a whole model, corrected by models that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Parts = Mapping[str, float]  # of a plan: what its layers add up to, by the name of their candidate

_DOUBT = 1.0  # of a factor that was never measured, as a share of it
_LEAST = 0.05  # of what it was before anything was measured


class Correction:
    """value = offset + sum over candidates of factor * part: a linear regression with a prior, so that few measurements move
    only what they say something of.

    Layers of one candidate are off together: by what a block of a model does besides its layers, by caches, by errors that add up.

    Args:
        candidates: names of all.
        factor: of all candidates, before anything is measured.
        offset: of all plans, likewise; 0: there is none.
    """

    def __init__(self, candidates: Sequence[str], factor: float = 1.0, offset: float = 0.0) -> None:
        self._columns = [*candidates]
        self._prior = np.array([offset, *(factor for _ in candidates)])
        self._found = self._prior.copy()

    @property
    def offset(self) -> float:
        """What every plan costs besides its layers."""
        return float(self._found[0])

    def factor(self, candidate: str) -> float:
        return float(self._found[1 + self._columns.index(candidate)])

    def of(self, parts: Parts) -> float:
        """The value of a plan."""
        return float(self._row(parts) @ self._found)

    def scaled_to(self, outcomes: Sequence[tuple[Parts, float]]) -> Correction:
        """The same with one factor for all candidates: the median of what values are to the sums of their parts, where there are
        any."""
        factors = [value / whole for parts, value in outcomes if (whole := sum(parts.values())) > 0 and value > 0]
        return Correction(self._columns, float(np.median(factors)) if factors else 1.0, self._prior[0])

    def carried(self, offset: float) -> Correction:
        """The same as it was found, with another offset, as what is known before anything is measured."""
        result = Correction(self._columns)
        result._prior = np.array([offset, *self._found[1:]])
        result._found = result._prior.copy()
        return result

    def fitted(self, plans: Sequence[Parts], values: Sequence[float], errors: Sequence[float]) -> Correction:
        """The same, by what was measured; ``errors``: by how much each value may be off."""
        rows = np.array([self._row(parts) for parts in plans]).reshape(len(plans), len(self._prior))
        weights = 1 / np.asarray(errors, dtype=np.float64)
        doubt = np.maximum(np.abs(self._prior) * _DOUBT, 1e-12)
        scaled = rows * weights[:, None] * doubt  # of unknowns that are about 1
        missing = (np.asarray(values) - rows @ self._prior) * weights
        step = np.linalg.solve(scaled.T @ scaled + np.eye(len(doubt)), scaled.T @ missing)
        result = Correction(self._columns)
        result._prior = self._prior
        result._found = np.maximum(self._prior + doubt * step, _LEAST * self._prior)
        return result

    def _row(self, parts: Parts) -> NDArray[np.float64]:
        return np.array([1.0, *(parts.get(name, 0.0) for name in self._columns)])
