"""What a compressed weight loses of its layer's output, by what calibration saw of the inputs: no model is run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycompress.methods.inputs import InputStatistics


def output_error(w: Tensor, compressed: Tensor, inputs: InputStatistics | None) -> float:
    """trace(D M D^T) / trace(W M W^T), in float64: the share of the squares of a layer's outputs that is error.

    Args:
        w, compressed: floating point [n, k], the weight before and after; D is their difference.
        inputs: with M, the second moment of the inputs, or its diagonal; of an embedding with the counts of its tokens. Without any
            of these M is the identity.
    """
    dense = w.detach().double()
    difference = dense - compressed.detach().double()
    if inputs is not None and inputs.second_moment is not None:
        moment = inputs.second_moment.double()
        lost, whole = (float(((x @ moment) * x).sum()) for x in (difference, dense))
    else:
        weights = _weights(inputs, dense)
        lost, whole = (float((weights * x.square()).sum()) for x in (difference, dense))
    return max(lost, 0.0) / whole if whole > 0 else 0.0


def _weights(inputs: InputStatistics | None, w: Tensor) -> Any:
    """Of each square."""
    if inputs is None:
        return 1.0
    if inputs.counts is not None:
        return inputs.counts.to(torch.float64)[:, None]
    return 1.0 if inputs.mean_square is None else inputs.squares("sensitivity", w.shape[1])
