"""What a layer's inputs look like, as far as methods need it: second moments (SVD-LLM, Wang et al. 2024, arXiv:2403.07378)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.weights.weight import described

# Added to the diagonal of the second moment, as a share of its mean: enough for directions that calibration never showed to count.
# Between 1e-6 and 1e-2 it changes the embeddings of a MiniLM by less than 0.001 in cosine.
DAMPING = 1e-2


@dataclass(frozen=True, eq=False, repr=False)
class InputStatistics:
    """Of the rows x [k] that a linear layer (or, unfolded, a convolution) met, or of the tokens that an embedding did.

    Attributes:
        rows: how many rows or tokens were seen, from 1.
        second_moment: float64 [k, k], the sum of x x^T over the rows, over their number; None for an embedding.
        mean: float64 [k], None for an embedding.
        counts: int64 [num_embeddings], how often each token came; None but for an embedding.
    Raises:
        ValueError: anything else, NaN or Inf.
    """

    rows: int
    second_moment: Tensor | None = None
    mean: Tensor | None = None
    counts: Tensor | None = None

    def __post_init__(self) -> None:
        if type(self.rows) is not int or self.rows < 1:
            raise ValueError(f"InputStatistics: rows is {self.rows!r}, expected a number from 1")
        if self.counts is not None:
            self._check_counts(self.counts)
            return
        moment, mean = self.second_moment, self.mean
        if moment is None or moment.dtype != torch.float64 or moment.dim() != 2 or len(set(moment.shape)) != 1:
            raise ValueError(f"InputStatistics: second_moment is {described(moment)}, expected float64 [k, k]")
        if mean is None or mean.dtype != torch.float64 or mean.shape != moment.shape[:1]:
            raise ValueError(f"InputStatistics: mean is {described(mean)}, expected float64 [{moment.shape[0]}]")
        for name, tensor in (("second_moment", moment), ("mean", mean)):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"InputStatistics: {name} holds NaN or Inf, expected finite values")

    @classmethod
    def joined(cls, parts: Sequence[InputStatistics]) -> InputStatistics:
        """Of all the rows that the parts, which are of one kind and size, saw: of layers that share one weight, say."""
        if len(parts) == 1:
            return parts[0]
        rows = sum(part.rows for part in parts)
        if parts[0].counts is not None:
            return cls(rows, counts=torch.stack([part.counts for part in parts if part.counts is not None]).sum(dim=0))
        moments = [part.second_moment * (part.rows / rows) for part in parts if part.second_moment is not None]
        means = [part.mean * (part.rows / rows) for part in parts if part.mean is not None]
        return cls(rows, torch.stack(moments).sum(dim=0), torch.stack(means).sum(dim=0))

    def moment(self, kind: str, k: int) -> Tensor:
        """The second moment, for a weight [n, k]; ``kind``: who asks. Raises ValueError where there is none, or of another size."""
        if self.second_moment is None:
            raise ValueError(f"{kind}: inputs are those of an embedding, expected a second moment")
        if len(self.second_moment) != k:
            raise ValueError(f"{kind}: inputs are {len(self.second_moment)} features wide, the weight has k = {k}")
        return self.second_moment

    def squares(self, kind: str, k: int) -> Tensor:
        """The mean square of each feature, float64 [k], for a weight [n, k]. Raises as :meth:`moment` does."""
        return self.moment(kind, k).diagonal()

    def __repr__(self) -> str:
        name = "counts" if self.second_moment is None else "second_moment"
        return f"InputStatistics(rows={self.rows}, {name}={described(getattr(self, name))})"

    def _check_counts(self, counts: Tensor) -> None:
        if self.second_moment is not None or self.mean is not None:
            raise ValueError(
                "InputStatistics: counts and second_moment or mean were given, expected the one or the others"
            )
        if counts.dtype != torch.int64 or counts.dim() != 1:
            raise ValueError(f"InputStatistics: counts is {described(counts)}, expected int64 [num_embeddings]")
        if bool((counts < 0).any()) or int(counts.sum()) != self.rows:
            raise ValueError(
                f"InputStatistics: counts add up to {int(counts.sum())}, expected numbers from 0 that make {self.rows} rows"
            )


def damped_root(moment: Tensor, kind: str) -> Tensor | None:
    """L, float64 [k, k], with L L^T the damped second moment; None where the inputs are all zero, and say nothing.

    Raises:
        ValueError: the second moment is that of no inputs: it has negative eigenvalues; ``kind``: who asks.
    """
    damping = DAMPING * float(moment.diagonal().mean())
    if damping == 0:
        return None
    factor, failed = torch.linalg.cholesky_ex(
        moment + damping * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    )
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
