"""Int8 of a recurrent layer: each of its matrices as Int8 rounds the weight of a linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from pycompress.methods.method import finite_matrix
from pycompress.weights.recurrent import Int8RecurrentWeight, matrices, whole_shape

if TYPE_CHECKING:
    from pycompress.methods.int8 import Int8


@dataclass(frozen=True)
class OfRecurrent:
    """Int8 for the matrices of an LSTM or a GRU, given one below another (:func:`pycompress.weights.recurrent.stacked`)."""

    name: ClassVar[str] = Int8RecurrentWeight.name

    method: Int8
    cell: str
    input_size: int
    hidden_size: int
    num_layers: int
    bidirectional: bool

    def compress(self, weight: Tensor) -> Int8RecurrentWeight:
        """Raises what :meth:`Int8.compress` does, and ValueError for a weight of another shape."""
        own = (self.cell, self.input_size, self.hidden_size, self.num_layers, self.bidirectional)
        w, of = finite_matrix("Int8", weight), matrices(*own)
        if tuple(w.shape) != whole_shape(of):
            raise ValueError(f"Int8: the weight is {list(w.shape)}, expected that of a layer {list(whole_shape(of))}")
        return Int8RecurrentWeight(*own, tuple(self.method.compress(w[one.rows, : one.k]) for one in of))
