"""From which rank on a low-rank layer is no longer smaller and faster than the dense one: arithmetic; nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable

from pycompress.profiles import Profile
from pycompress.weights import Weight

STEP = 8  # ranks between which a measured break-even does not tell apart


def residual_cost(residual: Weight | None, profile: Profile) -> float:
    """Estimated time of a residual's product, in multiply-adds of the dense float32 layer."""
    if residual is None:
        return 0.0
    n, k = residual.shape
    return float(getattr(residual, "nnz", n * k) / profile.speed(residual.name, getattr(residual, "bits", None)))


def estimated(shape: tuple[int, int], bits: int, profile: Profile, residual: Weight | None = None) -> int:
    """The largest rank whose layer is estimated to be faster than the dense one, and smaller; 0 where there is none."""
    n, k = shape
    time = (n * k - residual_cost(residual, profile)) * profile.speed("factors", bits) / (n + k)
    return max(0, min(_below(time), largest_smaller(shape, bits, residual), n, k))


def largest_smaller(shape: tuple[int, int], bits: int, residual: Weight | None = None) -> int:
    """The largest rank with which the canonical weight takes fewer bytes than the dense one in float32; 0 where there is none."""
    n, k = shape
    beside = 0 if residual is None else sum(tensor.nbytes for tensor in residual.tensors().values())
    room = 4 * n * k - beside
    if bits == 8:  # and the scales, float32 [r] and [n]
        return max(0, _below((room - 4 * n) / (n + k + 4)))
    return max(0, _below(room / (4 * (n + k))))


def _below(value: float) -> int:
    """The largest whole number that is less."""
    return int(-(-value // 1)) - 1


def largest(most: int, is_fast: Callable[[int], bool]) -> int:
    """The largest rank up to ``most``, in steps of 8, that is fast, where all that are smaller are too; 0 where there is none."""
    ranks = [*range(STEP, most + 1, STEP)]
    if most > 0 and most % STEP:
        ranks.append(most)
    good, bad = -1, len(ranks)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if is_fast(ranks[middle]) else (good, middle)
    return ranks[good] if good >= 0 else 0
