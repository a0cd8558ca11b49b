"""Wanda (Sun et al. 2023, arXiv:2306.11695): weights ranked by magnitude times the norm of their input feature."""

from __future__ import annotations

from torch import Tensor


def importance(w: Tensor, squares: Tensor) -> Tensor:
    """float32 [n, k], finite: |w[i, j]| * ||x[j]||, up to a factor that all of them share. The paper compares within each row.

    Args:
        w: float32 [n, k], finite.
        squares: float64 [k], the mean square of each feature.
    """
    largest = squares.amax()
    size = (squares / largest).sqrt() if float(largest) > 0 else squares.new_ones(squares.shape)
    scaled: Tensor = (w.double().abs() * size).float()
    return scaled
