"""``add_products``: the sum of x x^T over rows, the upper triangle alone, in float32 where that keeps what is needed.

Rows go in blocks of ``BLOCK`` into float32 products; at most ``BLOCKS`` of these are added in float32, and their sums in the dtype
of the total. So an entry (i, j) of a sum of r <= BLOCK * BLOCKS rows is off by ``r u / (1 - r u)``, u = 2^-24, times the sum of
|x_i x_j| at most (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), which is no more than the root of (i, i) times
(j, j); a total in float64 adds nothing to it, one in float32 as many u as there were sums. Of normal rows it is 2e-7.

The same bits at any number of threads: a product over so few rows is split over its results alone, and where a tile has a
multiple of ``STEP`` columns, all parts of it come from one kernel (of MKL on a Zen 5, parts of 17, 24 or 33 columns came from two).
"""

from __future__ import annotations

from torch import Tensor

BLOCK, BLOCKS = 512, 8  # 384 or 768 rows are another product with MKL's threads, 256 or 512 are not
STEP = 16  # columns
LEAF = 96  # columns of a tile on the diagonal: below, a product is too small to be quick
# Between these, no square, and no sum of squares of BLOCK * BLOCKS rows, leaves float32; far below the largest, it counts as zero.
SMALLEST, LARGEST = 2.0**-48, 2.0**56


def fits_float32(largest: float) -> bool:
    """Whether rows, whose largest magnitude this is, are multiplied in float32."""
    return SMALLEST <= largest <= LARGEST or largest == 0


def wide(k: int) -> int:
    """The next multiple of STEP."""
    return -(-k // STEP) * STEP


def tiles(start: int, stop: int) -> list[tuple[slice, slice]]:
    """What covers the upper triangle: halves, as far as STEP allows, against each other, then each half by itself; squares on the
    diagonal at the end."""
    if stop - start <= LEAF:
        own = slice(start, stop)
        return [(own, own)]
    middle = start + wide((stop - start + 1) // 2)
    return [(slice(start, middle), slice(middle, stop)), *tiles(start, middle), *tiles(middle, stop)]


def add_products(total: Tensor, rows: Tensor) -> None:
    """Adds the sum of x x^T to the tiles of a total.

    Args:
        total: float64 or float32 [k, k], k from 2.
        rows: float32 [r, k] whose largest magnitude fits; or float64, for products in float64.
    """
    for some in rows.split(BLOCK * BLOCKS):
        for down, across in tiles(0, len(total)):
            product = rows.new_zeros(down.stop - down.start, across.stop - across.start)
            for block in some.split(BLOCK):
                product.addmm_(block[:, down].T, block[:, across])
            total[down, across] += product


def mirror(total: Tensor) -> None:
    """Fills what is below the tiles, so that the total is symmetric to the bit."""
    for down, across in tiles(0, len(total)):
        if down == across:
            tile = total[down, across]
            tile.copy_(tile.triu() + tile.triu(1).T)
        else:
            total[across, down] = total[down, across].T
