"""Compressed layers for PyTorch: native int8 and sparse kernels, put into a model and proved against ONNX Runtime."""

from pycompress.methods import Int8, Sparse
from pycompress.model import compress, summary
from pycompress.nn import SparseConv2d, SparseLinear
from pycompress.storage import load, save
from pycompress.validation import validate

__all__ = ["Int8", "Sparse", "SparseConv2d", "SparseLinear", "compress", "load", "save", "summary", "validate"]
__version__ = "0.1.0"
