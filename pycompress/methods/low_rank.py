"""LowRank: truncated SVD (Eckart & Young 1936), whitened where inputs are known (SVD-LLM, Wang et al. 2024, arXiv:2403.07378).

Beside a 4-bit residual it is the weight's side of SVDQuant (Li et al. 2024, arXiv:2411.05007), which also moves outliers of the
inputs into the weight; that is not done here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import partial
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from pycompress.methods import break_even, low_rank_conv, svd
from pycompress.methods.inputs import DAMPING, InputStatistics, Metric
from pycompress.methods.int8 import Int8
from pycompress.methods.method import CalibratedMethod, Method, Refused, Timing, finite_matrix, is_method
from pycompress.methods.svd import balanced
from pycompress.profiles import DEFAULT, Profile, profile
from pycompress.weights import Weight
from pycompress.weights.low_rank import RESIDUAL, LowRankWeight, unshared_bits
from pycompress.weights.low_rank_conv import DECOMPOSITIONS, LowRankConv2dWeight, Ranks, Shape4, largest_ranks

BREAK_EVEN = "break-even"


@dataclass(frozen=True, repr=False)
class LowRank:
    """Two thin factors in place of the weight: W [n, k] = up [n, r] @ down [r, k], and possibly a residual beside them.

    Of all weights of rank r, the product is the one with the smallest ||W - W_r||_F; with the inputs X that calibration saw, the
    one with the smallest ||(W - W_r) X||_F. Both project the outputs on their r leading directions.

    Args:
        rank: from 1 to min(n, k); or "break-even": the largest rank that ``compress()`` measures, here and now, to be not slower
            than the dense layer (linear layers without a residual only).
        energy: instead of a rank: the smallest one that keeps this share of ||W X||_F^2 (of ||W||_F^2 without inputs), in (0, 1].
        error: instead of a rank: the smallest one with ||(W - W_r) X||_F at most this share of ||W X||_F, in [0, 1).
        bits: 32 (default: float32 factors) or 8: factors quantized per row as :class:`Int8` does it.
        activation_bits: 7 (default) or 8, for 8-bit factors: the range in which the layer quantizes what each of them meets.
        residual: the method that compresses what the factors leave: ``Int8``, ``Int4`` (which is given the inputs too), ``Sparse``,
            ``Dense``, or another whose weights are registered and have no residual of their own.
        alternations: how often factors and residual are fitted again in turn, each to what the other leaves; of all rounds the one
            with the smallest error of the outputs is taken.
        algorithm: ``exact`` (LAPACK, in float64), ``randomized`` (see methods/svd.py for its bound; needs a rank) or ``auto``:
            randomized for a large layer of small rank.
        decomposition: of convolutions: ``channel``, ``spatial`` or ``tucker`` (which makes no use of inputs, and takes a rank as
            that of both its sides, or the size of a side that is smaller).
        embeddings: take embeddings too, each token counting as often as calibration met it.
        rank_guard: refuse a rank whose layer would not be smaller and faster than the dense one (an embedding: smaller).
        profile: the machine by whose speeds ``rank_guard`` judges (see :mod:`pycompress.profiles`).
        inputs: what the layer's inputs look like; ``compress(..., calibration=...)`` sets it for each layer.
    Raises:
        TypeError: an argument of another type. ValueError: another value, or not exactly one of rank, energy and error.
    """

    name: ClassVar[str] = "low_rank"

    rank: int | str | None = None
    energy: float | None = field(default=None, kw_only=True)
    error: float | None = field(default=None, kw_only=True)
    bits: int = field(default=32, kw_only=True)
    activation_bits: int = field(default=7, kw_only=True)
    residual: Method | None = field(default=None, kw_only=True)
    alternations: int = field(default=0, kw_only=True)
    algorithm: str = field(default="auto", kw_only=True)
    decomposition: str = field(default="channel", kw_only=True)
    embeddings: bool = field(default=False, kw_only=True)
    rank_guard: bool = field(default=True, kw_only=True)
    profile: str | Profile = field(default=DEFAULT, kw_only=True)
    inputs: InputStatistics | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._check_size()
        for option in LowRankWeight.options:
            if option.name in ("bits", "activation_bits"):
                option.check("LowRank", getattr(self, option.name))
        profile("LowRank", "profile", self.profile)
        for name, names in (("algorithm", svd.ALGORITHMS), ("decomposition", DECOMPOSITIONS)):
            if getattr(self, name) not in names:
                raise ValueError(f"LowRank: {name} is {getattr(self, name)!r}, expected one of {', '.join(names)}")
        for name in ("embeddings", "rank_guard"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"LowRank: {name} is {getattr(self, name)!r}, expected True or False")
        if self.inputs is not None and not isinstance(self.inputs, InputStatistics):
            raise TypeError(f"LowRank: inputs is {type(self.inputs).__name__}, expected InputStatistics or None")
        self._check_residual()
        if self.algorithm == "randomized" and self.rank is None:
            raise ValueError(
                "LowRank: algorithm is 'randomized', expected a rank: energy and error need the whole spectrum"
            )

    def _check_size(self) -> None:
        given = {name: value for name in ("rank", "energy", "error") if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise ValueError(f"LowRank: {given or 'nothing'} is given, expected exactly one of rank, energy and error")
        ((name, value),) = given.items()
        if name == "rank":
            if value != BREAK_EVEN and (type(value) is not int or value < 1):
                raise ValueError(f"LowRank: rank is {value!r}, expected a number from 1 or {BREAK_EVEN!r}")
            return
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"LowRank: {name} is {value!r}, expected a number")
        if name == "energy" and not 0 < value <= 1:
            raise ValueError(f"LowRank: energy is {value!r}, expected a share in (0, 1]")
        if name == "error" and not 0 <= value < 1:
            raise ValueError(f"LowRank: error is {value!r}, expected a share in [0, 1)")

    def _check_residual(self) -> None:
        residual, alternations = self.residual, self.alternations
        if residual is not None and not is_method(residual):
            raise TypeError(f"LowRank: residual is {residual!r}, expected a method such as Int8() or None")
        if residual is not None and residual.name not in RESIDUAL.known():
            known = ", ".join(RESIDUAL.known())
            raise ValueError(f"LowRank: residual is {residual!r}, expected one that makes weights of {known}")
        if expected := unshared_bits(residual):
            raise ValueError(f"LowRank: residual is {residual!r}, expected activation_bits {expected}")
        if residual is not None and self.rank == BREAK_EVEN:
            raise ValueError(
                f"LowRank: rank is {BREAK_EVEN!r} beside a residual, expected a number: it is measured without"
            )
        if type(alternations) is not int or alternations < 0:
            raise ValueError(f"LowRank: alternations is {alternations!r}, expected a number from 0")
        if alternations and residual is None:
            raise ValueError(f"LowRank: alternations is {alternations}, expected 0 without a residual")

    def __repr__(self) -> str:
        shown = [f for f in fields(self) if getattr(self, f.name) != f.default]
        given = [f"{f.name}={getattr(self, f.name)!r}" for f in shown]
        return f"LowRank({', '.join(given)})"

    @property
    def lost(self) -> float:
        """The share of ||W X||_F^2 that the rank may lose, where energy or error says so."""
        return 1 - self.energy if self.energy is not None else (self.error or 0.0) ** 2

    # --- what it takes --------------------------------------------------------------------------------------------

    def refuses(self, kind: str) -> str:
        """Why it does not take layers of a kind, ``Linear``, ``Conv2d`` or ``Embedding``, for the sake of its options; or ''."""
        if kind == "Linear":
            return ""
        if kind == "Embedding" and not self.embeddings:
            return "LowRank takes embeddings with embeddings=True only"
        if self.rank == BREAK_EVEN:
            return "the break-even is measured for linear layers only"
        if self.bits == 8 or self.residual is not None:
            what = "a residual" if self.bits == 32 else "int8 factors"
            return f"{what} can be had in linear layers only"
        return ""

    def with_inputs(self, statistics: InputStatistics) -> LowRank:
        """The method for the layer that met these inputs."""
        return replace(self, inputs=statistics)

    def for_convolution(self, shape: Shape4, stride: tuple[int, int]) -> Method:
        """The method for a convolution with a weight [n, channels, height, width]; it too is given the matrix [n, k]."""
        return _OfConvolution(self, shape, stride)

    def measured(self, shape: tuple[int, int], time: Timing) -> LowRank:
        """The method for a linear layer [n, k]: with the rank that "break-even" stands for, found by bisection on random factors.

        Args:
            time: gives the microseconds of the dense layer, and of the one with a weight in its place.
        Raises:
            Refused: no rank makes a layer that is smaller, and not slower.
        """
        if self.rank != BREAK_EVEN:
            return self
        n, k = shape

        def is_fast(rank: int) -> bool:
            dense_us, us = time(self._random(n, k, rank))
            return us <= dense_us

        rank = break_even.largest(min(n, k, break_even.largest_smaller(shape, self.bits)), is_fast)
        if rank == 0:
            raise Refused(f"no rank of a {n}x{k} layer is measured to be faster than the dense one here")
        return replace(self, rank=rank, rank_guard=False)  # which would only estimate what was measured

    def _random(self, n: int, k: int, rank: int) -> LowRankWeight:
        dice = torch.Generator(device="cpu").manual_seed(0)
        down, up = (torch.empty(size, dtype=torch.float32, device="cpu") for size in ((rank, k), (n, rank)))
        if self.bits == 32:
            return LowRankWeight(down.normal_(generator=dice), up.normal_(generator=dice))
        scales = down.new_ones(rank), up.new_ones(n)
        down, up = (factor.random_(-127, 128, generator=dice).to(torch.int8) for factor in (down, up))
        return LowRankWeight(down, up, *scales, self.activation_bits)

    # --- compression ----------------------------------------------------------------------------------------------

    def compress(self, weight: Tensor) -> LowRankWeight:
        """The factors of a linear layer's weight, and the residual.

        Args:
            weight: floating point [n, k], 1 <= k <= 65536, on any device; the result lies on the CPU.
        Raises:
            TypeError: not a floating-point matrix. ValueError: NaN or Inf, the meta device, a shape that is empty or too large, a
            rank above min(n, k), inputs of another size. Refused: ``rank_guard`` found the layer no better than the dense one.
        """
        w = finite_matrix("LowRank", weight)
        n, k = w.shape
        rank = self.given_rank((n, k))
        if rank is not None:
            self._guard((n, k), rank, None)  # before the work
        target = w.double()
        if self.inputs is not None and self.inputs.counts is not None:
            table = self._table(target, self.inputs, rank)
            self._guard((n, k), table.rank, None)
            return table
        metric = self.metric(k)
        best = self._beside(target, self._factors(target, metric, rank))
        self._guard((n, k), best.rank, best.residual)
        return self._alternated(target, best, metric)

    def _table(self, target: Tensor, inputs: InputStatistics, rank: int | None) -> LowRankWeight:
        """Of an embedding [num_embeddings, d], a row of which counts as often as its token came: up is the narrow table, down the
        basis. The roles of rows and columns are those of a linear layer, exchanged."""
        counts, n = inputs.counts, len(target)
        if counts is None or len(counts) != n:
            raise ValueError(f"LowRank: inputs are counts of {inputs.rows} tokens, expected those of {n} embeddings")
        weights = counts.double() + DAMPING * inputs.rows / n  # a token that never came counts a little
        _, basis = self.split((target * weights.sqrt()[:, None]).T, Metric(), rank)
        return LowRankWeight(*balanced(basis.T, target @ basis))

    def given_rank(self, shape: tuple[int, int]) -> int | None:
        """None where the weight decides."""
        rank, most = self.rank, min(shape)
        if rank == BREAK_EVEN:
            raise ValueError(
                f"LowRank: rank is {BREAK_EVEN!r}, expected that measured() has put a number in its place, as compress() lets it"
            )
        assert not isinstance(rank, str)
        if rank is not None and rank > most:
            raise ValueError(f"LowRank: rank is {rank}, expected at most {most} for a weight [{shape[0]}, {shape[1]}]")
        return rank

    def _guard(self, shape: tuple[int, int], rank: int, residual: Weight | None) -> None:
        if not self.rank_guard:
            return
        most = break_even.estimated(shape, self.bits, profile("LowRank", "profile", self.profile), residual)
        if rank <= most:
            return
        n, k = shape
        beside = "" if residual is None else f" beside its {residual.name} residual"
        limit = f"the break-even is rank {most}" if most else "no rank is"
        raise Refused(f"rank {rank}{beside} would not be smaller and faster than dense {n}x{k}: {limit}")

    def metric(self, k: int) -> Metric:
        return Metric(None if self.inputs is None else self.inputs.moment("LowRank", k))

    def split(self, target: Tensor, metric: Metric, rank: int | None) -> tuple[Tensor, Tensor]:
        """target float64 [n, k] -> down [r, k] and up [n, r], float64. The columns of up are the leading directions of the outputs,
        orthonormal; rank None: as few as ``energy`` or ``error`` allows.
        """
        white = metric.whitened(target)
        if rank is not None:
            up = svd.leading(white, rank, self.algorithm)
            return up.T @ target, up
        up = svd.exact(white)
        down = up.T @ target
        rank = self._smallest(metric.squares(down), float(metric.squares(target).sum()))
        return down[:rank], up[:, :rank]

    def _smallest(self, squares: Tensor, total: float) -> int:
        """The smallest rank that keeps enough: squares are what each direction holds of the total."""
        # A little more, for what rounding has changed: at energy 1, directions of zeros need not be kept.
        budget = self.lost * total + len(squares) * torch.finfo(torch.float64).eps * total
        lost = torch.cat([squares.flip(0).cumsum(0).flip(0)[1:], squares.new_zeros(1)])  # [i]: with rank i + 1
        return 1 + int((lost <= budget).nonzero()[0])

    def _factors(self, target: Tensor, metric: Metric, rank: int | None) -> LowRankWeight:
        down, up = self.split(target, metric, rank)
        if self.bits == 8:
            return self._quantized(down, up, metric)
        return LowRankWeight(*balanced(down, up))

    def _quantized(self, down: Tensor, up: Tensor, metric: Metric) -> LowRankWeight:
        """int8 factors. The singular values, of the outputs where inputs are known, are split evenly between the two.

        That makes no difference to the rounding of down, a row of which has its own scale. But it decides how even the columns of
        up are, and the numbers that they are multiplied with, which share one scale a row each: all of the singular values in one
        factor spoil that one. Measured on a MiniLM at half rank, calibrated, with 7-bit activations, as 1 - cosine to the
        embeddings with float32 factors: 0.0040 with all of them in down, 0.0031 with 3/4, 0.0029 with half, 0.0032 with 1/4,
        0.0048 with none.
        """
        size = metric.squares(down).sqrt()  # of what each row of down gives: root mean square over the inputs
        share = torch.where(size > 0, size.sqrt(), 1.0)
        int8 = Int8(self.activation_bits, fit=self.profile)
        first, second = (int8.compress(m.float().contiguous()) for m in (down / share[:, None], up * share))
        return LowRankWeight(first.values, second.values, first.scale, second.scale, self.activation_bits)

    def _beside(self, target: Tensor, factors: LowRankWeight) -> LowRankWeight:
        """The same factors and what compresses the rest."""
        if self.residual is None:
            return factors
        method = self.residual
        if self.inputs is not None and isinstance(method, CalibratedMethod):
            method = method.with_inputs(self.inputs)
        residual = method.compress((target - factors.decompress()).float())
        return replace(factors, residual=residual)

    def _alternated(self, target: Tensor, best: LowRankWeight, metric: Metric) -> LowRankWeight:
        latest, least = best, metric.norm(target - best.decompress())
        for _ in range(self.alternations):
            assert latest.residual is not None
            rest = target - latest.residual.decompress()
            latest = self._beside(target, self._factors(rest, metric, best.rank))
            lost = metric.norm(target - latest.decompress())
            if lost < least:
                best, least = latest, lost
        return best


# --- of convolutions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OfConvolution:
    """LowRank for the weight [n, c, height, width] of a convolution, given as [n, k]."""

    name: ClassVar[str] = LowRank.name

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
