"""Bias correction (Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", 1906.04721)."""

from __future__ import annotations

from torch import Tensor


def correction(w: Tensor, compressed: Tensor, mean: Tensor) -> Tensor:
    """What a bias gains so that the outputs keep their mean: (W - W') E[x], float64 [n].

    Args:
        w, compressed: floating point [n, k], the weight before and after.
        mean: float64 [k], of the inputs.
    """
    return (w.double() - compressed.double()) @ mean
