"""Compression methods: float weight -> canonical weight. One file per method, its source named on line 1."""

from pycompress.methods.int8 import Int8, Int8Weight
from pycompress.methods.sparse import Sparse, SparseWeight
from pycompress.methods.weight import Method, Weight

__all__ = ["Int8", "Int8Weight", "Method", "Sparse", "SparseWeight", "Weight"]
