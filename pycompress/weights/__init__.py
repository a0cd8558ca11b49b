"""Canonical weights: what numbers mean. One file each: a table of tensors and one of settings; WEIGHTS has them by name."""

from pycompress.weights.dense import DenseWeight
from pycompress.weights.int4 import Int4Weight
from pycompress.weights.int8 import Int8Weight
from pycompress.weights.low_rank import LowRankWeight
from pycompress.weights.low_rank_conv import LowRankConv2dWeight
from pycompress.weights.recurrent import Int8RecurrentWeight
from pycompress.weights.rules import MAX_IN_FEATURES
from pycompress.weights.sparse import SparseWeight
from pycompress.weights.weight import OPTIONAL, REQUIRED, WEIGHTS, Expected, Field, Setting, Weight, register

__all__ = [
    "MAX_IN_FEATURES",
    "OPTIONAL",
    "REQUIRED",
    "WEIGHTS",
    "DenseWeight",
    "Expected",
    "Field",
    "Int4Weight",
    "Int8RecurrentWeight",
    "Int8Weight",
    "LowRankConv2dWeight",
    "LowRankWeight",
    "Setting",
    "SparseWeight",
    "Weight",
    "register",
]
