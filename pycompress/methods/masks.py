"""Which weights stay: the largest, one by one (Han et al. 2015, arXiv:1506.02626), in blocks (Gray et al. 2017, "GPU kernels for
block-sparse weights") or N of M (Mishra et al. 2021, arXiv:2104.08378).

Everything is ranked by integer keys that order as the magnitudes do. Integers compare the same on every processor, in every
floating-point mode, and ties go to the lowest position: the same weight always gives the same mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pycompress.weights.sparse import magnitude_bits

# Output channels x consecutive input features that stay or go together.
BLOCKS = {
    "unstructured": (1, 1), "16x1": (16, 1), "16x4": (16, 4), "1x4": (1, 4),
    "16x16": (16, 16), "32x32": (32, 32), "64x64": (64, 64),
}  # fmt: skip
# N of M consecutive input features stay.
N_OF_M = {"2:4": (2, 4), "4:8": (4, 8), "4:16": (4, 16)}
PATTERNS = (*BLOCKS, *N_OF_M)

Floats = NDArray[np.float32]
Keys = NDArray[np.signedinteger[Any]]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Pattern:
    """What stays of a ranking.

    Attributes:
        name: one of PATTERNS.
        density: share of the weights (of the blocks); an N:M pattern has its own.
        each_row: of blocks, whether the density holds in it; else over all of them together.
    """

    name: str
    density: float
    each_row: bool = False

    def largest(self, importance: Floats, before: int = 0) -> Mask:
        """The support [n, columns] with the largest sum of squares.

        Args:
            before: of a weight's columns, how many come before these and are done: together they keep what the density says. A
                multiple of the pattern's own columns.
        """
        if self.name in N_OF_M:
            return n_of_m(importance, *N_OF_M[self.name])
        block = BLOCKS[self.name]
        keys = block_keys(importance, block)
        rows = keys if self.each_row else keys.reshape(1, -1)
        done = before // block[1] * (1 if self.each_row else len(keys))
        count = round(self.density * (done + rows.shape[1])) - round(self.density * done)
        return expand(largest(rows, count).reshape(keys.shape), block, importance.shape)


def block_keys(importance: Floats, block: tuple[int, int]) -> Keys:
    """One key a block: [ceil(n / rows), ceil(k / columns)], in the order of the block's sum of squares.

    A block at the edge is smaller and its plain sum counts: it keeps less and costs a kernel as much as a whole one. With a
    fixed number of blocks this keeps the largest sum of squares there is (swapping a kept block for another cannot raise it).
    """
    if block == (1, 1):
        return magnitude_bits(importance)
    (n, k), (rows, columns) = importance.shape, block
    sums = np.zeros((-(-n // rows), -(-k // columns)))
    # Squares of float32 are exact in float64; added in this order, whatever the processor's vectors.
    for row in range(min(n, rows)):
        for column in range(min(k, columns)):
            part = importance[row::rows, column::columns].astype(np.float64)
            sums[: part.shape[0], : part.shape[1]] += part * part
    return sums.view(np.int64)


def expand(keep: Mask, block: tuple[int, int], shape: tuple[int, ...]) -> Mask:
    """The mask [n, k] of a grid of blocks."""
    rows, columns = block
    if block == (1, 1):
        return keep
    return np.asarray(np.repeat(np.repeat(keep, rows, axis=0), columns, axis=1)[: shape[0], : shape[1]])


def largest(keys: Keys, count: int) -> Mask:
    """Exactly the ``count`` largest of each row of keys [rows, columns], of equal ones the first."""
    columns = keys.shape[1]
    if count == 0:
        return np.zeros(keys.shape, np.bool_)
    threshold = np.partition(keys, columns - count, axis=1)[:, columns - count]
    keep = keys > threshold[:, None]
    missing = count - keep.sum(axis=1)
    for row in range(len(keys)):
        tied = np.flatnonzero(keys[row] == threshold[row])
        keep[row, tied[: missing[row]]] = True
    return np.asarray(keep)


def n_of_m(importance: Floats, kept: int, group: int) -> Mask:
    """The ``kept`` largest of each ``group`` consecutive input features, of equal ones the first; a shorter last group keeps
    min(kept, its size).

    No other N:M mask keeps more: the groups are disjoint, and of each, no other ``kept`` weights have a larger sum.
    """
    n, k = importance.shape
    padded = np.full((n, -(-k // group) * group), -1, np.int32)  # behind k: smaller than any key
    padded[:, :k] = magnitude_bits(importance)
    keys = np.ascontiguousarray(padded.reshape(-1, group).T)
    keep = np.empty(keys.shape, np.bool_)
    for i, own in enumerate(keys):  # a weight stays if fewer than `kept` of its group come before it
        before = np.zeros(len(own), np.uint8)
        for j, other in enumerate(keys):
            if j != i:
                before += other >= own if j < i else other > own
        keep[i] = before < kept
    return np.asarray(keep.T.reshape(padded.shape)[:, :k])


def shares(keys: Sequence[Keys], count: int) -> list[int]:
    """How many of the ``count`` largest keys of all arrays together lie in each; of equal ones, those of the first arrays.

    Bisects the threshold: nothing is copied or sorted, however large the model.
    """
    if count == 0:
        return [0] * len(keys)
    low, high = 0, int(np.iinfo(keys[0].dtype).max) + 1  # at least `count` keys are >= low, fewer are >= high
    while high - low > 1:
        middle = (low + high) // 2
        if sum(int(np.count_nonzero(array >= middle)) for array in keys) >= count:
            low = middle
        else:
            high = middle
    own = [int(np.count_nonzero(array > low)) for array in keys]
    missing = count - sum(own)
    for i, array in enumerate(keys):
        tied = min(missing, int(np.count_nonzero(array == low)))
        own[i] += tied
        missing -= tied
    return own
