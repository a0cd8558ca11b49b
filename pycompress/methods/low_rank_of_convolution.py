"""LowRank of a convolution: the decompositions of low_rank_conv.py, each matrix of them split as LowRank says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from pycompress.methods import low_rank_conv
from pycompress.methods.inputs import Metric
from pycompress.methods.method import Refused, finite_matrix
from pycompress.methods.svd import balanced
from pycompress.profiles import profile
from pycompress.weights.low_rank import LowRankWeight
from pycompress.weights.low_rank_conv import LowRankConv2dWeight, Ranks, Shape4, largest_ranks

if TYPE_CHECKING:
    from pycompress.methods.low_rank import LowRank


@dataclass(frozen=True)
class OfConvolution:
    """LowRank for the weight [n, c, height, width] of a convolution, given as [n, k]."""

    name: ClassVar[str] = LowRankWeight.name

    method: LowRank
    shape: Shape4
    stride: tuple[int, int]

    def compress(self, weight: Tensor) -> LowRankConv2dWeight:
        """Raises what :meth:`LowRank.compress` does, and ValueError for a weight of another shape."""
        w = finite_matrix("LowRank", weight)
        if tuple(w.shape) != (self.shape[0], prod(self.shape[1:])):
            raise ValueError(
                f"LowRank: the weight is {list(w.shape)}, expected that of a convolution {list(self.shape)}"
            )
        metric, w4 = self.method.metric(w.shape[1]), w.reshape(self.shape)
        if self.method.decomposition == "tucker":
            result = self._tucker(w4)
        elif self.method.decomposition == "spatial":
            result = low_rank_conv.spatial(w4, partial(self._split, metric=self._of_columns(metric)))
        else:
            result = low_rank_conv.channel(w4, partial(self._split, metric=metric))
        self._guard(result.ranks)
        return result

    def _split(self, matrix: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
        rank = self.method.given_rank((matrix.shape[0], matrix.shape[1]))
        return balanced(*self.method.split(matrix.double(), metric, rank))

    def _of_columns(self, metric: Metric) -> Metric:
        """For inputs [c * height]: the mean over the columns of the kernel, as though different columns had nothing in common."""
        if metric.moment is None:
            return metric
        _, c, height, width = self.shape
        columns = metric.moment.reshape(c, height, width, c, height, width).diagonal(dim1=2, dim2=5)
        return Metric(columns.mean(dim=-1).reshape(c * height, c * height))

    def _tucker(self, w4: Tensor) -> LowRankConv2dWeight:
        rank, most = self.method.rank, largest_ranks("tucker", self.shape)
        if rank is None:
            return low_rank_conv.tucker(w4, low_rank_conv.tucker_ranks(w4, self.method.lost, self.stride))
        assert isinstance(rank, int)
        if rank > max(most):
            raise ValueError(f"LowRank: rank is {rank}, expected at most {max(most)} for a weight {list(self.shape)}")
        return low_rank_conv.tucker(w4, (min(rank, most[0]), min(rank, most[1])))

    def _guard(self, ranks: Ranks) -> None:
        if not self.method.rank_guard or self._is_better(ranks):
            return
        limits = largest_ranks(self.method.decomposition, self.shape)
        even: Ranks = ()
        for rank in range(1, max(limits) + 1):
            smaller = tuple(min(rank, limit) for limit in limits)
            if not self._is_better(smaller):
                break
            even = smaller
        limit = f"the break-even is rank {'x'.join(map(str, even))}" if even else "no rank is"
        raise Refused(
            f"rank {'x'.join(map(str, ranks))} ({self.method.decomposition}) would not be smaller and faster than the dense "
            f"{'x'.join(map(str, self.shape))}: {limit}"
        )

    def _is_better(self, ranks: Ranks) -> bool:
        kind, machine = self.method.decomposition, profile("LowRank", "profile", self.method.profile)
        time = low_rank_conv.cost(kind, self.shape, ranks, self.stride, machine)
        return time < 1 and low_rank_conv.share_of_bytes(kind, self.shape, ranks) < 1
