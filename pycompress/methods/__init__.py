"""Compression methods: float weight -> canonical weight. One file per method, its source named on line 1."""

from pycompress.methods.dense import Dense
from pycompress.methods.inputs import InputStatistics
from pycompress.methods.int4 import Int4
from pycompress.methods.int8 import Int8
from pycompress.methods.low_rank import LowRank
from pycompress.methods.method import Method, Refused
from pycompress.methods.observers import Entropy, Known, MeanSquaredError, MinMax, MovingAverage, Observer, Percentile
from pycompress.methods.sparse import Sparse

__all__ = [
    "Dense",
    "Entropy",
    "InputStatistics",
    "Int4",
    "Int8",
    "Known",
    "LowRank",
    "MeanSquaredError",
    "Method",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "Refused",
    "Sparse",
]
