"""Compression methods: float weight -> canonical weight. One file per method, its source named on line 1."""

from pycompress.methods.dense import Dense, DenseWeight
from pycompress.methods.inputs import InputStatistics
from pycompress.methods.int4 import Int4, Int4Weight
from pycompress.methods.int8 import Int8, Int8Weight
from pycompress.methods.low_rank import LowRank, LowRankWeight
from pycompress.methods.sparse import Sparse, SparseWeight
from pycompress.methods.weight import Method, Refused, Weight

__all__ = [
    "Dense",
    "DenseWeight",
    "InputStatistics",
    "Int4",
    "Int4Weight",
    "Int8",
    "Int8Weight",
    "LowRank",
    "LowRankWeight",
    "Method",
    "Refused",
    "Sparse",
    "SparseWeight",
    "Weight",
]
