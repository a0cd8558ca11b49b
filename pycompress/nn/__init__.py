"""Modules that take the place of dense layers."""

from pycompress.nn.geometry import Conv2dGeometry
from pycompress.nn.int8 import Int8Linear
from pycompress.nn.layer import CompressedLayer
from pycompress.nn.linear import CompressedLinear
from pycompress.nn.sparse import SparseLayer, SparseLinear
from pycompress.nn.sparse_conv import SparseConv2d

# By the name of the method; plans, files and summaries know no other kinds of layers.
LAYERS: dict[str, type[CompressedLinear]] = {"int8": Int8Linear, "sparse": SparseLinear}
CONVOLUTIONS: dict[str, type[SparseConv2d]] = {"sparse": SparseConv2d}

__all__ = [
    "CONVOLUTIONS",
    "LAYERS",
    "CompressedLayer",
    "CompressedLinear",
    "Conv2dGeometry",
    "Int8Linear",
    "SparseConv2d",
    "SparseLayer",
    "SparseLinear",
]
