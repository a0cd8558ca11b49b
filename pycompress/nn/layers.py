"""The table of compressed layers: (kind of layer, canonical weight) -> module."""

from __future__ import annotations

from pycompress.kinds import KINDS, Kind
from pycompress.nn.int4 import Int4Linear
from pycompress.nn.int8 import Int8Linear
from pycompress.nn.int8_conv import Int8Conv1d, Int8Conv2d
from pycompress.nn.int8_embedding import Int8Embedding
from pycompress.nn.int8_recurrent import Int8GRU, Int8LSTM
from pycompress.nn.layer import CompressedLayer
from pycompress.nn.low_rank import LowRankLinear
from pycompress.nn.low_rank_conv import LowRankConv2d
from pycompress.nn.low_rank_embedding import LowRankEmbedding
from pycompress.nn.sparse import SparseLinear
from pycompress.nn.sparse_conv import SparseConv1d, SparseConv2d

# By the names of both. A method takes a kind of layers where there is a module for what it makes of them.
LAYERS: dict[tuple[str, str], type[CompressedLayer]] = {}


def register(layer: type[CompressedLayer]) -> type[CompressedLayer]:
    """Puts a class of layers, its ``kind`` and its ``weight_type``, into the table; also as a decorator. Returns the class."""
    if not any(layer.kind.name == kind.name for kind in KINDS):
        KINDS.insert(0, layer.kind)  # it may be more special than ours
    LAYERS[layer.kind.name, layer.weight_type.name] = layer
    return layer


for _layer in (
    Int8Linear, Int4Linear, SparseLinear, LowRankLinear,
    Int8Conv2d, SparseConv2d, LowRankConv2d,
    Int8Conv1d, SparseConv1d,
    Int8Embedding, LowRankEmbedding,
    Int8LSTM, Int8GRU,
):  # fmt: skip
    register(_layer)


def layer_for(kind: Kind, weight: str) -> type[CompressedLayer] | None:
    """The module for a kind with a weight of this name; None where there is none."""
    return LAYERS.get((kind.name, weight))


def no_layer(weight: str) -> str:
    """What to say where there is none: which kinds of layers do have one with a weight of this name."""
    *first, last = dict.fromkeys(kind.plural for kind in KINDS if (kind.name, weight) in LAYERS)
    return f"{weight} takes {', '.join(first)}{' and ' if first else ''}{last} only"


def weights_of(kind: str) -> list[str]:
    """The names of the weights that layers of a kind can have, sorted."""
    return sorted(weight for name, weight in LAYERS if name == kind)
