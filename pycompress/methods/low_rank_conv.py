"""Low-rank convolutions (Zhang 2016, arXiv:1505.06798; Jaderberg 2014, arXiv:1405.3866; Kim 2016, arXiv:1511.06530).

A decomposition replaces one convolution by a chain of smaller ones, without anything between them:

    channel   [r, c, kh, kw], then [n, r, 1, 1]                                    Zhang: an SVD of the weight as [n, c kh kw]
    spatial   [r, c, kh, 1], then [n, r, 1, kw]                                    Jaderberg: an SVD of it as [n kw, c kh]
    tucker    [r_in, c, 1, 1], then [r_out, r_in, kh, kw], then [n, r_out, 1, 1]   Kim: Tucker-2, by HOSVD and rounds of HOOI
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from pycompress.profiles import Profile
from pycompress.weights.low_rank_conv import (
    LowRankConv2dWeight,
    Ranks,
    Shape4,
    factor_shapes,
    largest_ranks,
)

HOOI_ROUNDS = 10  # at most; they end where one gains less than HOOI_GAIN of the weight's squares
HOOI_GAIN = 1e-7

Split = Callable[[Tensor], tuple[Tensor, Tensor]]  # a matrix [a, b] -> down [r, b] and up [a, r], both float32


# --- sizes --------------------------------------------------------------------------------------------------------------


def multiply_adds(decomposition: str, shape: Shape4, ranks: Ranks, stride: tuple[int, int]) -> int:
    """For one position of the result. What runs before a stride runs at all positions that the stride leaves out, too."""
    down, *core, up = (prod(size) for size in factor_shapes(decomposition, shape, ranks).values())
    repeated = {"channel": 1, "spatial": stride[1], "tucker": stride[0] * stride[1]}[decomposition]
    return down * repeated + sum(core) + up


def cost(decomposition: str, shape: Shape4, ranks: Ranks, stride: tuple[int, int], machine: Profile) -> float:
    """Estimated time, in multiples of the dense convolution's."""
    return multiply_adds(decomposition, shape, ranks, stride) / machine.speed(decomposition) / prod(shape)


def share_of_bytes(decomposition: str, shape: Shape4, ranks: Ranks) -> float:
    """Bytes of the factors, in multiples of the dense weight's."""
    return sum(prod(size) for size in factor_shapes(decomposition, shape, ranks).values()) / prod(shape)


# --- decompositions -----------------------------------------------------------------------------------------------------


def channel(weight: Tensor, split: Split) -> LowRankConv2dWeight:
    """weight [n, c, kh, kw]; split sees it as [n, c kh kw], an input of which is a patch."""
    n, _, height, width = weight.shape
    down, up = split(weight.flatten(1))
    return LowRankConv2dWeight("channel", down.reshape(len(down), -1, height, width), up.reshape(n, -1, 1, 1))


def spatial(weight: Tensor, split: Split) -> LowRankConv2dWeight:
    """weight [n, c, kh, kw]; split sees it as [n kw, c kh]: output channel and column against input channel and row."""
    n, c, height, width = weight.shape
    down, up = split(weight.permute(0, 3, 1, 2).reshape(n * width, c * height))
    rows = up.reshape(n, width, -1).transpose(1, 2).contiguous()
    return LowRankConv2dWeight("spatial", down.reshape(-1, c, height, 1), rows.reshape(n, -1, 1, width))


def tucker(weight: Tensor, ranks: tuple[int, int]) -> LowRankConv2dWeight:
    """Tucker-2 in float64: the weight's projection on r_in directions of its input and r_out of its output channels.

    The directions start as those that hold most of the weight each on its own (HOSVD), which loses at most the sum of what either
    leaves out, and at most twice as many squares as the best ones would (De Lathauwer et al. 2000). Each round of HOOI then takes
    the best ones of one side for those of the other, so it never loses more than before.

    Args:
        weight: float32 [n, c, kh, kw].
        ranks: (r_in, r_out), from 1 to c and to n.
    """
    w, (r_in, r_out) = weight.double(), ranks
    u_in, u_out = _directions(w, 1, r_in), _directions(w, 0, r_out)
    total, held = float(w.square().sum()), 0.0
    for _ in range(HOOI_ROUNDS):
        u_in = _directions(torch.einsum("ncyx,no->ocyx", w, u_out), 1, r_in)
        narrow = torch.einsum("ncyx,ci->niyx", w, u_in)
        u_out = _directions(narrow, 0, r_out)
        before, held = held, float(torch.einsum("niyx,no->oiyx", narrow, u_out).square().sum())
        if held - before <= HOOI_GAIN * total:
            break
    core = torch.einsum("ncyx,ci,no->oiyx", w, u_in, u_out)
    down, up = u_in.T[..., None, None], u_out[..., None, None]
    return LowRankConv2dWeight("tucker", *(factor.float().contiguous() for factor in (down, up, core)))


def tucker_ranks(weight: Tensor, lost: float, stride: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """The cheapest (r_in, r_out) with which :func:`tucker` loses at most this share of the squares of the weight.

    HOSVD loses at most the sum of what the two sides leave out, so every pair whose sum is small enough will do.
    """
    shape = (weight.shape[0], weight.shape[1], weight.shape[2], weight.shape[3])
    w = weight.double()
    # [r]: what r directions of a side leave out. A little more than `lost` for the rounding of the spectrum itself.
    tails = [_tails(_spectrum(w, dim)) for dim in (1, 0)]
    budget = (lost + 1e-13) * float(w.square().sum())
    best: tuple[int, tuple[int, int]] | None = None
    for r_in in range(1, len(tails[0])):
        fits = (tails[0][r_in] + tails[1][1:] <= budget).nonzero()
        if len(fits):
            pair = (r_in, 1 + int(fits[0]))
            best = min(filter(None, (best, (multiply_adds("tucker", shape, pair, stride), pair))))
    return largest_ranks("tucker", shape) if best is None else best[1]  # type: ignore[return-value]


def _unfolded(w: Tensor, dim: int) -> Tensor:
    return w.movedim(dim, 0).flatten(1)


def _directions(w: Tensor, dim: int, rank: int) -> Tensor:
    """float64 [size of the dimension, rank]: the orthonormal directions that hold most of w."""
    matrix = _unfolded(w, dim)
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T)[1]
    return vectors[:, -rank:].flip(1)


def _spectrum(w: Tensor, dim: int) -> Tensor:
    """The squared singular values of w, unfolded along a dimension, descending."""
    matrix = _unfolded(w, dim)
    squares: Tensor = torch.linalg.eigvalsh(matrix @ matrix.T)
    return squares.clamp(min=0).flip(0)


def _tails(squares: Tensor) -> Tensor:
    """[r]: the sum of all squares but the first r; as many and one entries."""
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
