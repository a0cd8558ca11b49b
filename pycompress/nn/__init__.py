"""Modules that take the place of dense layers."""

from pycompress.kinds import Conv1dGeometry, Conv2dGeometry, RecurrentGeometry
from pycompress.nn.conv import CompressedConv2d
from pycompress.nn.int4 import Int4Linear
from pycompress.nn.int8 import Int8Linear
from pycompress.nn.int8_conv import Int8Conv1d, Int8Conv2d
from pycompress.nn.int8_embedding import Int8Embedding
from pycompress.nn.int8_recurrent import Int8GRU, Int8LSTM
from pycompress.nn.layer import CompressedLayer
from pycompress.nn.layers import LAYERS, layer_for, register
from pycompress.nn.linear import CompressedLinear
from pycompress.nn.low_rank import LowRankLinear
from pycompress.nn.low_rank_conv import LowRankConv2d
from pycompress.nn.low_rank_embedding import LowRankEmbedding
from pycompress.nn.plain import PlainLinear
from pycompress.nn.sparse import SparseLayer, SparseLinear
from pycompress.nn.sparse_conv import SparseConv1d, SparseConv2d

__all__ = [
    "LAYERS",
    "CompressedConv2d",
    "CompressedLayer",
    "CompressedLinear",
    "Conv1dGeometry",
    "Conv2dGeometry",
    "Int4Linear",
    "Int8Conv1d",
    "Int8Conv2d",
    "Int8Embedding",
    "Int8GRU",
    "Int8LSTM",
    "Int8Linear",
    "LowRankConv2d",
    "LowRankEmbedding",
    "LowRankLinear",
    "PlainLinear",
    "RecurrentGeometry",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLayer",
    "SparseLinear",
    "layer_for",
    "register",
]
