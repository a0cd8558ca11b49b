"""Low-rank layers at many rows on a CUDA device, alone and beside an int8 layer: cases of `benchmarks/gpu.py`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from pycompress.benchmark.cuda import Build, Case, Run, Set, torch_dense
from pycompress.benchmark.cuda_int8 import ours as dense_int8
from pycompress.methods.int8 import Int8
from pycompress.nn.low_rank import LowRankLinear
from pycompress.weights import LowRankWeight

BRANCH_RANK = 32


def _gaussian(n: int, k: int) -> torch.Tensor:
    """[n, k] of the variance 1 / k."""
    return torch.randn(n, k, dtype=torch.float32, device="cpu").mul_(k**-0.5)


def _factors(n: int, k: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian down [rank, k] and up [n, rank] whose product has the variance 1 / k; bfloat16 numbers, as the peers have them."""
    down, up = _gaussian(rank, k), _gaussian(n, rank)
    return down.bfloat16().float(), up.bfloat16().float()


def an_eighth(n: int, k: int) -> LowRankWeight:
    """Factors of rank k / 8."""
    return LowRankWeight(*_factors(n, k, max(k // 8, 1)))


def beside_int8(n: int, k: int) -> LowRankWeight:
    """Factors of rank BRANCH_RANK beside an int8 weight."""
    return LowRankWeight(*_factors(n, k, BRANCH_RANK), residual=Int8(8).compress(_gaussian(n, k)))


def ours(one: Set) -> Run:
    assert isinstance(one.weight, LowRankWeight)
    layer = LowRankLinear.from_weight(one.weight, one.linear.bias).to(one.x.device)
    return lambda: layer(one.x)


def torch_two_linears(one: Set) -> Run:
    assert isinstance(one.weight, LowRankWeight)
    down, up = (factor.to(one.x) for factor in (one.weight.down, one.weight.up))
    bias = one.linear.bias.detach().to(one.x.dtype)
    return lambda: nn.functional.linear(nn.functional.linear(one.x, down), up, bias)


DENSE: Mapping[str, Build] = {"torch_bf16": torch_dense(torch.bfloat16), "pycompress_dense_int8": dense_int8}

# There are several launches in a layer: none of its kernels is forced alone.
_WIDE = {"pycompress_low_rank": ours, **DENSE, "torch_two_linears": torch_two_linears}
LOW_RANK_WIDE = (Case("low_rank_wide_cuda", _WIDE, weight=an_eighth),)
SIDE_BRANCH = (Case("side_branch_cuda", {"pycompress_side_branch": ours, **DENSE}, weight=beside_int8),)
