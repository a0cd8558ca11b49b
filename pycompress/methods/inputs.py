"""What a layer's inputs look like, as far as methods need it: second moments (SVD-LLM, Wang et al. 2024, arXiv:2403.07378)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from pycompress.methods.histogram import BINS, Histogram
from pycompress.weights.weight import described

# Added to the diagonal of the second moment, as a share of its mean: enough for directions that calibration never showed to count.
# Between 1e-6 and 1e-2 it changes the embeddings of a MiniLM by less than 0.001 in cosine.
DAMPING = 1e-2

_FLOATS = "float64 or float32"


# What may be gathered of a layer's inputs: second moments, which include the mean squares; mean squares; lowest and highest values;
# how often each value came, and the ends of each call, both with the lowest and highest values.
PARTS = ("moments", "diagonals", "ranges", "histograms", "extremes")
OF_VALUES = frozenset({"ranges", "histograms", "extremes"})  # those to which it is all one in which row a value stands
LAST_CALLS = 1024  # of which the ends are kept


@dataclass(frozen=True, eq=False, repr=False)
class InputStatistics:
    """Of the rows x [k] that a linear layer (or, unfolded, a convolution) met, or of the tokens that an embedding did.

    What was not gathered is None; of the first three groups there is one at least.

    Attributes:
        rows: how many rows or tokens were seen, from 1.
        second_moment: float64 or float32 [k, k], the sum of x x^T over the rows, over their number.
        mean: float64 [k], with a second moment or mean squares.
        counts: int64 [num_embeddings], how often each token came; of an embedding, which has nothing else.
        mean_square: float64 [k], the mean of x^2; None beside a second moment, whose diagonal it is.
        low, high: float64 [k], the lowest and the highest value of each feature.
        histogram, limit: int64 [BINS] and float64 [1]: how many values fell into each of the bins between -limit and limit, a power
            of two; see :class:`pycompress.methods.histogram.Histogram`.
        extremes: float64 [calls, 2], the lowest and the highest value of each of the last calls of the layer, the latest last.
    Raises:
        ValueError: anything else, NaN or Inf.
    """

    rows: int
    second_moment: Tensor | None = None
    mean: Tensor | None = None
    counts: Tensor | None = None
    mean_square: Tensor | None = field(default=None, kw_only=True)
    low: Tensor | None = field(default=None, kw_only=True)
    high: Tensor | None = field(default=None, kw_only=True)
    histogram: Tensor | None = field(default=None, kw_only=True)
    limit: Tensor | None = field(default=None, kw_only=True)
    extremes: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if type(self.rows) is not int or self.rows < 1:
            raise ValueError(f"InputStatistics: rows is {self.rows!r}, expected a number from 1")
        if self.counts is not None:
            self._check_counts(self.counts)
            return
        if all(value is None for value in (self.second_moment, self.mean_square, self.low)):
            raise ValueError(
                f"InputStatistics: second_moment is None, expected {_FLOATS} [k, k], mean_square or low and high"
            )
        self._check_shapes(self.features)
        self._check_values()
        for name, tensor in self.tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"InputStatistics: {name} holds NaN or Inf, expected finite values")

    def _check_shapes(self, k: int) -> None:
        moment = self.second_moment
        if moment is not None and (moment.dtype not in (torch.float64, torch.float32) or moment.shape != (k, k)):
            raise ValueError(f"InputStatistics: second_moment is {described(moment)}, expected {_FLOATS} [k, k]")
        wanted = {
            "mean": moment is not None or self.mean_square is not None,
            "mean_square": moment is None and self.mean_square is not None,
            "low": self.low is not None,
            "high": self.low is not None,
        }
        for name, present in wanted.items():
            tensor = getattr(self, name)
            if (tensor is not None) != present or (present and (tensor.dtype, tensor.shape) != (torch.float64, (k,))):
                raise ValueError(
                    f"InputStatistics: {name} is {described(tensor)}, expected {f'float64 [{k}]' if present else None}"
                )

    def _check_values(self) -> None:
        """What there is of all values, whatever feature they are of; beside the lowest and highest ones."""
        forms: dict[str, Any] = {"histogram": (torch.int64, (BINS,)), "limit": (torch.float64, (1,))}
        if self.extremes is not None:
            calls = len(self.extremes) if self.extremes.dim() else 0
            forms["extremes"] = (torch.float64, (min(max(calls, 1), LAST_CALLS), 2))
        for name, (dtype, shape) in forms.items():
            tensor, present = getattr(self, name), name == "extremes" or self.histogram is not None
            if (tensor is not None) != present or (present and (tensor.dtype, tensor.shape) != (dtype, shape)):
                expected = f"{dtype} {list(shape)}" if present else "None"
                raise ValueError(f"InputStatistics: {name} is {described(tensor)}, expected {expected}")
            if present and self.low is None:
                raise ValueError(f"InputStatistics: there is {name} without low and high, expected them besides")
        if self.histogram is not None and self.limit is not None:
            reach = float(self.limit)
            if not (reach > 0 and math.isfinite(reach) and math.frexp(reach)[0] == 0.5):
                raise ValueError(f"InputStatistics: limit is {reach}, expected a power of two")
            if bool((self.histogram < 0).any()) or not bool(self.histogram.any()):
                raise ValueError("InputStatistics: histogram has no values or fewer, expected numbers from 0")

    @property
    def features(self) -> int:
        """k; of an embedding how many tokens there are."""
        others = ("histogram", "limit", "extremes")
        sizes = (len(t) if t.dim() else 0 for name, t in self.tensors().items() if name not in others)
        return max(sizes, default=0)

    def tensors(self) -> dict[str, Tensor]:
        """What was gathered, by name."""
        names = (item.name for item in fields(self) if item.name != "rows")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    @property
    def gathered(self) -> tuple[str, ...]:
        """Those of ``PARTS`` that there are; nothing of an embedding."""
        parts = (
            ("moments", self.second_moment), ("diagonals", self.mean_square), ("ranges", self.low),
            ("histograms", self.histogram), ("extremes", self.extremes),
        )  # fmt: skip
        return tuple(name for name, tensor in parts if tensor is not None)

    @classmethod
    def joined(cls, parts: Sequence[InputStatistics]) -> InputStatistics:
        """Of all the rows that the parts, which are of one kind and size, saw: of layers that share one weight, say. What one of
        them lacks is lacking."""
        if len(parts) == 1:
            return parts[0]
        rows = sum(part.rows for part in parts)

        def all_of(name: str) -> list[Tensor] | None:
            found = [tensor for part in parts if (tensor := getattr(part, name)) is not None]
            return found if len(found) == len(parts) else None

        def mean_of(found: list[Tensor] | None) -> Tensor | None:
            if found is None:
                return None
            weights = [part.rows / rows for part in parts]
            return torch.stack([w * tensor for w, tensor in zip(weights, found, strict=True)]).sum(dim=0)

        counts = all_of("counts")
        if counts is not None:
            return cls(rows, counts=torch.stack(counts).sum(dim=0))
        moment, squares = mean_of(all_of("second_moment")), None
        if moment is None and all("moments" in part.gathered or "diagonals" in part.gathered for part in parts):
            squares = mean_of([part.squares("InputStatistics", part.features) for part in parts])
        mean = None if moment is None and squares is None else mean_of(all_of("mean"))
        low, high, extremes = all_of("low"), all_of("high"), all_of("extremes")
        values = None
        if all_of("histogram"):
            values = reduce(Histogram.merged, [part.distribution("InputStatistics") for part in parts])
        return cls(
            rows, moment, mean, mean_square=squares,
            low=None if low is None else torch.stack(low).amin(dim=0),
            high=None if high is None else torch.stack(high).amax(dim=0),
            **({} if values is None else kept(values)),
            extremes=None if extremes is None else torch.cat(extremes)[-LAST_CALLS:],
        )  # fmt: skip

    def moment(self, kind: str, k: int) -> Tensor:
        """The second moment, float64 [k, k], for a weight [n, k]; ``kind``: who asks.

        Raises:
            ValueError: there is none, or it is of another size.
        """
        if self.second_moment is None:
            raise self._lacking(kind, "a second moment", "moments")
        self._check_width(kind, k)
        return self.second_moment.double()

    def squares(self, kind: str, k: int) -> Tensor:
        """The mean square of each feature, float64 [k], for a weight [n, k]. Raises as :meth:`moment` does."""
        found = self.mean_square if self.second_moment is None else self.second_moment.diagonal()
        if found is None:
            raise self._lacking(kind, "mean squares", "diagonals")
        self._check_width(kind, k)
        return found.double()

    def range(self, kind: str, k: int) -> tuple[Tensor, Tensor]:
        """The lowest and the highest value of each feature, float64 [k], for a weight [n, k]. Raises as :meth:`moment` does."""
        if self.low is None or self.high is None:
            raise self._lacking(kind, "ranges", "ranges")
        self._check_width(kind, k)
        return self.low, self.high

    def distribution(self, kind: str) -> Histogram:
        """How often each value came. Raises as :meth:`moment` does."""
        if self.histogram is None or self.limit is None:
            raise self._lacking(kind, "histograms", "histograms")
        return Histogram(self.histogram, math.frexp(float(self.limit))[1] - 1)

    def extremes_of(self, kind: str) -> Tensor:
        """The ends of the last calls, float64 [calls, 2]. Raises as :meth:`moment` does."""
        if self.extremes is None:
            raise self._lacking(kind, "the ends of calls", "extremes")
        return self.extremes

    def _lacking(self, kind: str, what: str, part: str) -> ValueError:
        if self.counts is not None:
            return ValueError(f"{kind}: inputs are those of an embedding, expected {what}")
        have = " and ".join(self.gathered)
        return ValueError(
            f"{kind}: of the inputs {have} were gathered, expected {part} (calibrate(..., plan=...) gathers what a plan needs)"
        )

    def _check_width(self, kind: str, k: int) -> None:
        if self.features != k:
            raise ValueError(f"{kind}: inputs are {self.features} features wide, the weight has k = {k}")

    def __repr__(self) -> str:
        shown = [f"{name}={described(tensor)}" for name, tensor in self.tensors().items() if name != "mean"]
        return f"InputStatistics({', '.join([f'rows={self.rows}', *shown])})"

    def _check_counts(self, counts: Tensor) -> None:
        if len(self.tensors()) > 1:
            raise ValueError(
                "InputStatistics: counts and second_moment or mean were given, expected the one or the others"
            )
        if counts.dtype != torch.int64 or counts.dim() != 1:
            raise ValueError(f"InputStatistics: counts is {described(counts)}, expected int64 [num_embeddings]")
        if bool((counts < 0).any()) or int(counts.sum()) != self.rows:
            raise ValueError(
                f"InputStatistics: counts add up to {int(counts.sum())}, expected numbers from 0 that make {self.rows} rows"
            )


def kept(values: Histogram) -> dict[str, Tensor]:
    """The fields that hold a histogram."""
    limit = torch.tensor([math.ldexp(1.0, values.exponent)], dtype=torch.float64, device="cpu")
    return {"histogram": values.counts, "limit": limit}


def damped(moment: Tensor) -> Tensor | None:
    """The second moment with DAMPING of its mean on the diagonal, float64 [k, k]; None where the inputs were all zero."""
    damping = DAMPING * float(moment.diagonal().mean())
    if damping == 0:
        return None
    return moment + damping * torch.eye(len(moment), dtype=torch.float64, device=moment.device)


def damped_root(moment: Tensor, kind: str) -> Tensor | None:
    """L, float64 [k, k], with L L^T the damped second moment; None where the inputs are all zero, and say nothing.

    Raises:
        ValueError: the second moment is that of no inputs: it has negative eigenvalues; ``kind``: who asks.
    """
    whole = damped(moment)
    if whole is None:
        return None
    factor, failed = torch.linalg.cholesky_ex(whole)
    if int(failed):
        raise ValueError(f"{kind}: the second moment of the inputs has negative eigenvalues, expected none")
    root: Tensor = factor
    return root


class Metric:
    """What the inputs make of an error: ||E X||_F^2 over their number is the sum of (E M) * E, M their second moment.

    Attributes:
        moment: float64 [k, k], or None: the identity.
    """

    def __init__(self, moment: Tensor | None = None) -> None:
        self.moment = moment

    def whitened(self, w: Tensor) -> Tensor:
        """w L, float64 [n, k], with L L^T the damped second moment."""
        root = None if self.moment is None else damped_root(self.moment, "LowRank")
        return w if root is None else w @ root

    def squares(self, rows: Tensor) -> Tensor:
        """The mean squares of what rows float64 [r, k] make of the inputs: float64 [r]."""
        return ((rows if self.moment is None else rows @ self.moment) * rows).sum(dim=1).clamp_(min=0)

    def norm(self, rows: Tensor) -> float:
        return float(self.squares(rows).sum().sqrt())
