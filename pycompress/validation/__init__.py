"""Prove a compressed model: every layer on its real inputs, then the whole model, against ONNX Runtime.

Each layer is computed by three parties: the native kernel, the lowered layer in ONNX Runtime, and NumPy.
Their integers must be equal, their floating-point sums within derived bounds, and a disagreement between any two is named.
"""

from pycompress.validation.report import WHOLE_MODEL, LayerRecord, ModelRecord, Report
from pycompress.validation.run import validate

__all__ = ["WHOLE_MODEL", "LayerRecord", "ModelRecord", "Report", "validate"]
