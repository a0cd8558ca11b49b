"""LowRank: truncated SVD (Eckart & Young 1936), whitened where inputs are known (SVD-LLM, Wang et al. 2024, arXiv:2403.07378).

Beside a 4-bit residual it is the weight's side of SVDQuant (Li et al. 2024, arXiv:2411.05007), which also moves outliers of the
inputs into the weight; that is not done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from pycompress.methods import break_even, ranks, svd
from pycompress.methods.factors import quantized
from pycompress.methods.inputs import DAMPING, InputStatistics, Metric
from pycompress.methods.int8 import Int8
from pycompress.methods.low_rank_of_convolution import OfConvolution
from pycompress.methods.method import CalibratedMethod, Method, Refused, Timing, finite_matrix, is_method
from pycompress.methods.svd import balanced
from pycompress.profiles import DEFAULT, Profile, profile
from pycompress.weights import Weight
from pycompress.weights.low_rank import RESIDUAL, LowRankWeight, unshared_bits
from pycompress.weights.low_rank_conv import DECOMPOSITIONS, Shape4

BREAK_EVEN = "break-even"
SCOPES = ("layer", "model")


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
        share: instead of a rank: the multiply-adds of the factors, as a share of the dense weights', in (0, 1]; where ``scope`` is
            ``layer``, the rank is rounded down to a multiple of 8.
        scope: where the share holds: in each ``layer`` (default), or over all linear layers and convolutions of the ``model``
            together: they get the ranks with which they lose least (see :meth:`for_layers`).
        bits: 32 (default: float32 factors) or 8: factors quantized per row as :class:`Int8` does it.
        activation_bits: 7 (default) or 8, for 8-bit factors: the range in which the layer quantizes what each of them meets.
        residual: the method that compresses what the factors leave: ``Int8``, ``Int4`` (which is given the inputs too), ``Sparse``,
            ``Dense``, or another whose weights are registered and have no residual of their own.
        alternations: how often factors and residual are fitted in turn, each to what the other leaves; of all rounds the one with
            the smallest error of the outputs is taken. The first fits the factors to the residual that is there (1 or 2 is best).
        algorithm: ``exact`` (LAPACK, in float64), ``randomized`` (see methods/svd.py for its bound; needs a rank) or ``auto``:
            randomized for a large layer of small rank.
        decomposition: of convolutions: ``channel``, ``spatial`` or ``tucker`` (which makes no use of inputs, and takes a rank as
            that of both its sides, or the size of a side that is smaller).
        embeddings: take embeddings too, each token counting as often as calibration met it.
        rank_guard: refuse a rank whose layer would not be smaller and faster than the dense one (an embedding: smaller).
        profile: the machine by whose speeds ``rank_guard`` judges (see :mod:`pycompress.profiles`).
        inputs: what the layer's inputs look like; ``compress(..., calibration=...)`` sets it for each layer.
    Raises:
        TypeError: an argument of another type. ValueError: another value, or not exactly one of rank, energy, error and share.
    """

    name: ClassVar[str] = "low_rank"

    rank: int | str | None = None
    energy: float | None = field(default=None, kw_only=True)
    error: float | None = field(default=None, kw_only=True)
    share: float | None = field(default=None, kw_only=True)
    scope: str = field(default="layer", kw_only=True)
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
        for name, names in (("algorithm", svd.ALGORITHMS), ("decomposition", DECOMPOSITIONS), ("scope", SCOPES)):
            if getattr(self, name) not in names:
                raise ValueError(f"LowRank: {name} is {getattr(self, name)!r}, expected one of {', '.join(names)}")
        for name in ("embeddings", "rank_guard"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"LowRank: {name} is {getattr(self, name)!r}, expected True or False")
        if self.inputs is not None and not isinstance(self.inputs, InputStatistics):
            raise TypeError(f"LowRank: inputs is {type(self.inputs).__name__}, expected InputStatistics or None")
        self._check_residual()
        self._check_share()
        if self.algorithm == "randomized" and self.rank is None and self.share is None:
            raise ValueError(
                "LowRank: algorithm is 'randomized', expected a rank: energy and error need the whole spectrum"
            )

    def _check_size(self) -> None:
        sizes = ("rank", "energy", "error", "share")
        given = {name: value for name in sizes if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise ValueError(
                f"LowRank: {given or 'nothing'} is given, expected exactly one of rank, energy, error and share"
            )
        ((name, value),) = given.items()
        if name == "rank":
            if value != BREAK_EVEN and (type(value) is not int or value < 1):
                raise ValueError(f"LowRank: rank is {value!r}, expected a number from 1 or {BREAK_EVEN!r}")
            return
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"LowRank: {name} is {value!r}, expected a number")
        if name in ("energy", "share") and not 0 < value <= 1:
            raise ValueError(f"LowRank: {name} is {value!r}, expected a share in (0, 1]")
        if name == "error" and not 0 <= value < 1:
            raise ValueError(f"LowRank: error is {value!r}, expected a share in [0, 1)")

    def _check_share(self) -> None:
        if self.share is not None and self.decomposition == "tucker":
            raise ValueError("LowRank: share is given, expected a rank, energy or error: tucker has ranks of two kinds")
        if self.scope == "layer":
            return
        for name, value, expected in (
            ("share", self.share, "a share in (0, 1]"), ("residual", self.residual, None), ("embeddings", self.embeddings, False),
            ("decomposition", self.decomposition, "channel"),
        ):  # fmt: skip
            if value != expected and not (name == "share" and value is not None):
                raise ValueError(f"LowRank: {name} is {value!r}, expected {expected} for the scope 'model'")

    def _check_residual(self) -> None:
        residual, alternations = self.residual, self.alternations
        if residual is not None and not is_method(residual):
            raise TypeError(f"LowRank: residual is {residual!r}, expected a method such as Int8() or None")
        if residual is not None and residual.name not in RESIDUAL.known():
            known = ", ".join(RESIDUAL.known())
            raise ValueError(f"LowRank: residual is {residual!r}, expected one that makes weights of {known}")
        if expected := unshared_bits(residual):
            raise ValueError(f"LowRank: residual is {residual!r}, expected activation_bits {expected}")
        if getattr(residual, "activation", "dynamic") != "dynamic":
            raise ValueError(f"LowRank: residual is {residual!r}, expected a dynamic one: it shares quantized rows")
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

    def at(self, strength: float, shape: tuple[int, int]) -> LowRank:
        """The milder method on the way to this one: a rank falls from min(n, k); so do an energy and a share from 1, an error rises
        from 0."""
        if strength >= 1 or self.rank == BREAK_EVEN:
            return self
        if isinstance(self.rank, int):
            full = min(shape)
            rank = full - round(strength * (full - min(self.rank, full)))
            return replace(self, rank=rank, rank_guard=False)
        if self.error is not None:
            return replace(self, error=strength * self.error, rank_guard=False)
        name = "energy" if self.energy is not None else "share"
        return replace(self, **{name: 1 - strength * (1 - getattr(self, name)), "rank_guard": False})

    def for_layers(
        self, weights: Sequence[Tensor], inputs: Sequence[InputStatistics] | None = None
    ) -> Sequence[Method]:
        """One method per layer: ``self`` for each, but for scope ``model`` one with the layer's own rank, a multiple of 8, so that
        together the factors take at most the share of the multiply-adds (bytes, at ``bits``) of all the dense weights.

        A layer loses the squares that its rank leaves of what it makes of the inputs, each output feature by its variance, and the
        layer's sum over the root of its total (without inputs: of the weight, each row by its norm). A layer that would need a rank
        from the break-even on stays dense where ``rank_guard`` is set, and takes its dense bytes from the others.

        Args:
            weights: floating point [n, k] each. inputs: of each layer.
        Raises:
            ValueError: the share does not allow a rank of 8 in each layer; and what :meth:`compress` raises for a weight.
        """
        if self.scope != "model":
            return [self] * len(weights)
        own = [finite_matrix("LowRank", weight) for weight in weights]
        layers = [self._layer(w, inputs[i] if inputs else None) for i, w in enumerate(own)]
        assert self.share is not None
        try:
            found = ranks.shared_out(layers, self.share * sum(w.numel() for w in own))
        except ValueError as error:
            raise ValueError(f"LowRank: share is {self.share!r}: {error}") from None
        return [
            _StaysDense(layer.most) if rank is None else replace(self, rank=rank, share=None, scope="layer")
            for layer, rank in zip(layers, found, strict=True)
        ]

    def _layer(self, w: Tensor, inputs: InputStatistics | None) -> ranks.Layer:
        n, k = w.shape
        wins, most, dense = ranks.wins(w.double(), inputs), min(n, k), None
        if self.rank_guard:
            most = break_even.estimated((n, k), self.bits, profile("LowRank", "profile", self.profile))
            dense = n * k * 32 // self.bits
        return ranks.Layer(wins, n + k, most, dense)

    def with_inputs(self, statistics: InputStatistics) -> LowRank:
        """The method for the layer that met these inputs."""
        return replace(self, inputs=statistics)

    def for_convolution(self, shape: Shape4, stride: tuple[int, int]) -> Method:
        """The method for a convolution with a weight [n, channels, height, width]; it too is given the matrix [n, k]."""
        return OfConvolution(self, shape, stride)

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
        if self.scope == "model":
            raise ValueError("LowRank: scope is 'model', expected the method that for_layers(weights) gives this layer")
        if self.share is not None:
            return ranks.of_share(shape, self.share)
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
            return quantized(target, down, up, metric, Int8(self.activation_bits, fit=self.profile))
        return LowRankWeight(*balanced(down, up))

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
        """The best of all pairs: factors beside the residual that they were fitted to, and beside that of what they leave."""
        latest, least = best, metric.norm(target - best.decompress()) if self.alternations else 0.0
        for _ in range(self.alternations):
            residual = latest.residual
            assert residual is not None
            factors = self._factors(target - residual.decompress(), metric, best.rank)
            latest = self._beside(target, factors)
            for pair in (replace(factors, residual=residual), latest):
                lost = metric.norm(target - pair.decompress())
                if lost < least:
                    best, least = pair, lost
        return best


@dataclass(frozen=True)
class _StaysDense:
    """For a layer whose dense weight is worth more than the ranks that its share would allow."""

    name: ClassVar[str] = LowRank.name

    most: int

    def compress(self, weight: Tensor) -> LowRankWeight:  # noqa: ARG002
        reason = f"it would need a rank above the break-even, {self.most}" if self.most else "no rank is faster"
        raise Refused(f"the shared budget keeps it dense: {reason}")
