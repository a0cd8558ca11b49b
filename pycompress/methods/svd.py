"""Leading singular vectors: by LAPACK, or by a randomized range finder (Halko, Martinsson & Tropp 2011, arXiv:0909.4061)."""

from __future__ import annotations

import torch
from torch import Tensor

ALGORITHMS = ("auto", "exact", "randomized")
OVERSAMPLING = 16  # columns beyond the rank
POWER_ITERATIONS = 2
# A rank of at most 1/8 of a side of at least 2048: there the range finder's products, in float64 on two cores, take less than
# half the time of the eigenvectors, and 1.0 to 1.02 times the optimal error on trained weights.
_LARGE, _SMALL_SHARE = 2048, 8


def chosen(algorithm: str, shape: tuple[int, int], rank: int | None) -> str:
    """``exact`` or ``randomized``: what "auto" takes for a weight of this shape and rank (None: not known beforehand)."""
    if algorithm != "auto":
        return algorithm
    small = rank is not None and rank * _SMALL_SHARE <= min(shape)
    return "randomized" if small and min(shape) >= _LARGE else "exact"


def exact(a: Tensor) -> Tensor:
    """All left singular vectors of a, float64 [n, k], the leading one first: float64 [n, min(n, k)], orthonormal columns.

    They are eigenvectors of the smaller Gram matrix. That squares the condition number, which leaves singular values an absolute
    error of about 1e-8 of the largest: less than the rounding of float32 has changed the matrix by. It takes half
    the time of an SVD of a square matrix, and less of others.
    """
    n, k = a.shape
    if n <= k:
        vectors: Tensor = torch.linalg.eigh(a @ a.T)[1]
        return vectors.flip(1)
    right = torch.linalg.eigh(a.T @ a)[1].flip(1)
    basis: Tensor = torch.linalg.qr(a @ right)[0]  # orthogonal columns already, of lengths that may be tiny or zero
    return basis


def randomized(a: Tensor, rank: int) -> Tensor:
    """About the ``rank`` leading left singular vectors of a, float64 [n, k]: float64 [n, rank], orthonormal columns, the same
    ones at each call.

    With r = rank, p = OVERSAMPLING and t the optimal error (t^2 is the sum of the squared singular values behind the r-th), the
    expected squared Frobenius error of projecting on r + p columns without power iterations is at most (1 + r / (p - 1)) t^2
    (theorem 10.5), and cutting them down to r adds at most t^2:

        E ||a - U U^T a||_F^2 <= (2 + r / (p - 1)) t^2.

    The power iterations bring it near t^2 (the spectral error, to the power 1 / (2 q + 1): corollary 10.10).
    """
    n, k = a.shape
    columns = min(rank + OVERSAMPLING, n, k)
    sketch = torch.randn(
        k, columns, dtype=a.dtype, device="cpu", generator=torch.Generator(device="cpu").manual_seed(0)
    )
    basis: Tensor = torch.linalg.qr(a @ sketch)[0]
    for _ in range(POWER_ITERATIONS):  # orthonormalized at each half step, or rounding would drown the small values
        basis = torch.linalg.qr(a.T @ basis)[0]
        basis = torch.linalg.qr(a @ basis)[0]
    return basis @ exact(basis.T @ a)[:, :rank]


def leading(a: Tensor, rank: int, algorithm: str) -> Tensor:
    """The ``rank`` leading left singular vectors of a, float64 [n, k], by an algorithm of ALGORITHMS: float64 [n, rank]."""
    if chosen(algorithm, (a.shape[0], a.shape[1]), rank) == "randomized":
        return randomized(a, rank)
    return exact(a)[:, :rank]


def balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """float32, with equal norms of a row of down and its column of up: neither overflows where the weight does not."""
    below, above = down.norm(dim=1), up.norm(dim=0)
    share = torch.where((below > 0) & (above > 0), (below / above).sqrt(), 1.0)
    return (down / share[:, None]).float().contiguous(), (up * share).float().contiguous()
