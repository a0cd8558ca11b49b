"""What a layer is: one object for each kind, which all that is done to layers asks about its matrix, its bias and its input."""

from __future__ import annotations

from torch import nn

from pycompress.kinds.altered import alteration, replaced_code
from pycompress.kinds.conv1d import Conv1D
from pycompress.kinds.conv2d import Conv2d, Conv2dGeometry, Convolution
from pycompress.kinds.embedding import Embedding, EmbeddingGeometry
from pycompress.kinds.folded import channels_emptied, emptied, folded, folded_into, mark_folded
from pycompress.kinds.kind import Geometry, Kind
from pycompress.kinds.linear import Linear
from pycompress.kinds.nn_conv1d import Conv1d, Conv1dGeometry
from pycompress.kinds.padded import surrounded, zeros_around
from pycompress.kinds.pruned import has_foreign_hooks, pruned_names, without_pruning
from pycompress.kinds.recurrent import Gru, Lstm, Recurrent, RecurrentGeometry

LINEAR, CONV1D, CONV2D, EMBEDDING, CONVOLUTION = Linear(), Conv1D(), Conv2d(), Embedding(), Convolution()
NN_CONV1D = Conv1d()  # torch's; CONV1D is transformers', a linear layer
LSTM, GRU = Lstm(), Gru()
# The first one that matches a module is its kind. ``nn.register`` puts the kind of somebody else's layer in front.
KINDS: list[Kind] = [LINEAR, CONV1D, CONV2D, NN_CONV1D, EMBEDDING, LSTM, GRU, CONVOLUTION]

__all__ = [
    "CONV1D",
    "CONV2D",
    "CONVOLUTION",
    "EMBEDDING",
    "GRU",
    "KINDS",
    "LINEAR",
    "LSTM",
    "NN_CONV1D",
    "Conv1dGeometry",
    "Conv2dGeometry",
    "EmbeddingGeometry",
    "Geometry",
    "Kind",
    "Recurrent",
    "RecurrentGeometry",
    "alteration",
    "channels_emptied",
    "emptied",
    "folded",
    "folded_into",
    "has_foreign_hooks",
    "kind_of",
    "mark_folded",
    "pruned_names",
    "replaced_code",
    "surrounded",
    "without_pruning",
    "zeros_around",
]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a dense module, or None."""
    return next((kind for kind in KINDS if kind.matches(module)), None)
