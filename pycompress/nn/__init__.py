"""Modules that take the place of dense layers."""

from pycompress.nn.conv import CompressedConv2d
from pycompress.nn.geometry import Conv2dGeometry
from pycompress.nn.int4 import Int4Linear
from pycompress.nn.int8 import Int8Linear
from pycompress.nn.layer import CompressedLayer
from pycompress.nn.linear import CompressedLinear
from pycompress.nn.low_rank import LowRankLinear
from pycompress.nn.low_rank_conv import LowRankConv2d
from pycompress.nn.low_rank_embedding import LowRankEmbedding
from pycompress.nn.sparse import SparseLayer, SparseLinear
from pycompress.nn.sparse_conv import SparseConv2d

# By the name of the method; plans, files and summaries know no other kinds of layers.
LAYERS: dict[str, type[CompressedLinear]] = {
    "int4": Int4Linear,
    "int8": Int8Linear,
    "low_rank": LowRankLinear,
    "sparse": SparseLinear,
}
CONVOLUTIONS: dict[str, type[CompressedConv2d]] = {"low_rank": LowRankConv2d, "sparse": SparseConv2d}
EMBEDDINGS: dict[str, type[LowRankEmbedding]] = {"low_rank": LowRankEmbedding}

__all__ = [
    "CONVOLUTIONS",
    "EMBEDDINGS",
    "LAYERS",
    "CompressedConv2d",
    "CompressedLayer",
    "CompressedLinear",
    "Conv2dGeometry",
    "Int4Linear",
    "Int8Linear",
    "LowRankConv2d",
    "LowRankEmbedding",
    "LowRankLinear",
    "SparseConv2d",
    "SparseLayer",
    "SparseLinear",
]
