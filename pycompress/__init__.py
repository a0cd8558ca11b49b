"""Compressed layers for PyTorch: native int8, int4, sparse and low-rank kernels, put into a model, proved against ONNX Runtime."""

from pycompress.calibration import calibrate
from pycompress.methods import Int4, Int8, LowRank, Sparse
from pycompress.model import compress, summary
from pycompress.nn import SparseConv2d, SparseLinear
from pycompress.storage import load, save
from pycompress.validation import validate

__all__ = [
    "Int4",
    "Int8",
    "LowRank",
    "Sparse",
    "SparseConv2d",
    "SparseLinear",
    "calibrate",
    "compress",
    "load",
    "save",
    "summary",
    "validate",
]
__version__ = "0.1.0"
