"""Compressed layers for PyTorch: native int8, int4, sparse and low-rank kernels, put into a model, proved against ONNX Runtime."""

from pycompress.calibration import calibrate
from pycompress.evaluation import evaluate
from pycompress.interchange import compress_onnx, export, from_onnx
from pycompress.methods import (
    Entropy,
    Int4,
    Int8,
    Known,
    LowRank,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Percentile,
    Sparse,
)
from pycompress.model import compress, summary
from pycompress.nn import SparseConv2d, SparseLinear
from pycompress.passes.equalize import equalize
from pycompress.passes.fold_norm import fold_norms
from pycompress.report import report
from pycompress.search import profile, search, sensitivity
from pycompress.storage import load, save
from pycompress.structure import Cut, fisher, shrink, shrunk
from pycompress.targets import deploy
from pycompress.train import Distillation, Ramp, prepare, reconstruct
from pycompress.validation import validate

__all__ = [
    "Cut",
    "Distillation",
    "Entropy",
    "Int4",
    "Int8",
    "Known",
    "LowRank",
    "MeanSquaredError",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "Ramp",
    "Sparse",
    "SparseConv2d",
    "SparseLinear",
    "calibrate",
    "compress",
    "compress_onnx",
    "deploy",
    "equalize",
    "evaluate",
    "export",
    "fisher",
    "fold_norms",
    "from_onnx",
    "load",
    "prepare",
    "profile",
    "reconstruct",
    "report",
    "save",
    "search",
    "sensitivity",
    "shrink",
    "shrunk",
    "summary",
    "validate",
]
__version__ = "0.1.0"
