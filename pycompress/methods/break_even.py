"""From which rank on a low-rank layer is no longer smaller and faster than the dense one: estimated, or measured here and now."""

from __future__ import annotations

from functools import cache

import torch

from pycompress import ops
from pycompress.measure import interleaved_us
from pycompress.methods.dense import DenseWeight
from pycompress.methods.int4 import Int4Weight
from pycompress.methods.int8 import Int8Weight
from pycompress.methods.sparse import SparseWeight

Residual = Int8Weight | Int4Weight | SparseWeight | DenseWeight  # what may stand beside the factors

# How many multiply-adds take as long as one of the best dense float32 layer, at 32 and more rows, geometric means over six shapes:
# `python benchmarks/kernels.py --op low_rank` prints them (rank min(n, k) / 8 to / 2: 0.87 to 0.95); "sparse 8" is from `--op
# sparse`, unstructured at 80 % zeros, "int4" from `--op int4`, groups of 32 at 128 and more rows.
# `only_if_faster` measures each layer itself.
SPEED = {
    "factors 32": 0.9,
    "factors 8": 1.8,
    "dense": 1.0,
    "int8": 2.1,
    "int4": 2.2,
    "sparse 32": 0.56,
    "sparse 8": 0.7,
}
ROWS = 128  # of the input with which a break-even is measured
_STEP = 8  # ranks between which it does not tell apart


def residual_cost(residual: Residual | None) -> float:
    """Estimated time of a residual's product, in multiply-adds of the dense float32 layer."""
    if residual is None:
        return 0.0
    n, k = residual.shape
    if isinstance(residual, SparseWeight):
        return residual.nnz / SPEED[f"sparse {residual.bits}"]
    return n * k / SPEED[residual.name]


def residual_bytes(residual: Residual | None) -> int:
    return 0 if residual is None else sum(t.nbytes for t in residual.tensors().values())


def estimated(shape: tuple[int, int], bits: int, residual: Residual | None = None) -> int:
    """The largest rank whose layer is estimated to be faster than the dense one, and smaller; 0 where there is none."""
    n, k = shape
    time = (n * k - residual_cost(residual)) * SPEED[f"factors {bits}"] / (n + k)
    return max(0, min(_below(time), largest_smaller(shape, bits, residual), n, k))


def largest_smaller(shape: tuple[int, int], bits: int, residual: Residual | None = None) -> int:
    """The largest rank with which the canonical weight takes fewer bytes than the dense one in float32; 0 where there is none."""
    n, k = shape
    room = 4 * n * k - residual_bytes(residual)
    if bits == 8:  # and the scales, float32 [r] and [n]
        return max(0, _below((room - 4 * n) / (n + k + 4)))
    return max(0, _below(room / (4 * (n + k))))


def _below(value: float) -> int:
    """The largest whole number that is less."""
    return int(-(-value // 1)) - 1


def measured(shape: tuple[int, int], bits: int, activation_bits: int) -> int:
    """The largest rank, in steps of 8, that is measured to be not slower than torch's dense layer with 128 rows, and is smaller; 0
    where there is none. Measured once a process, shape, kind of factors and number of threads.
    """
    n, k = shape
    most = min(n, k, largest_smaller(shape, bits))
    return _measured(n, k, most, bits, activation_bits, torch.get_num_threads())


@cache
def _measured(n: int, k: int, most: int, bits: int, activation_bits: int, threads: int) -> int:  # noqa: ARG001
    ranks = [*range(_STEP, most + 1, _STEP)]
    if most > 0 and most % _STEP:
        ranks.append(most)
    good, bad = -1, len(ranks)  # bisects: the time grows with the rank
    with torch.inference_mode():
        x, weight = torch.randn(ROWS, k), torch.randn(n, k)
        while bad - good > 1:
            middle = (good + bad) // 2
            packed = _random_packed(n, k, ranks[middle], bits, activation_bits)
            dense_us, us = interleaved_us(
                lambda: torch.nn.functional.linear(x, weight),
                lambda packed=packed: ops.low_rank_linear(x, packed, n),  # type: ignore[misc]
            )
            good, bad = (middle, bad) if us <= dense_us else (good, middle)
    return ranks[good] if good >= 0 else 0


def _random_packed(n: int, k: int, rank: int, bits: int, activation_bits: int) -> torch.Tensor:
    if bits == 32:
        return ops.low_rank_pack(torch.randn(rank, k), torch.randn(n, rank))
    down, up = (torch.randint(-127, 128, size, dtype=torch.int8) for size in ((rank, k), (n, rank)))
    return ops.low_rank_pack(down, up, torch.ones(rank), torch.ones(n), activation_bits)
