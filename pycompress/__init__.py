"""Compressed layers for PyTorch: native int8 kernels, put into a model and proved against ONNX Runtime."""

from pycompress.methods import Int8
from pycompress.model import compress, summary
from pycompress.storage import load, save
from pycompress.validation import validate

__all__ = ["Int8", "compress", "load", "save", "summary", "validate"]
__version__ = "0.1.0"
