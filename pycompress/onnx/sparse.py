"""The sparse layers: stored without their zeros (``Graph.matrix``), and multiplied with them, for ONNX has no sparse product."""

from __future__ import annotations

from pycompress.nn.sparse import SparseLinear
from pycompress.onnx.dense import lower_linear
from pycompress.onnx.graph import Graph
from pycompress.onnx.int8 import lower_int8_linear


def lower_sparse_linear(graph: Graph, x: str, layer: SparseLinear) -> str:
    """With int8 weights as :func:`lower_int8_linear` does, with float32 weights as any dense layer."""
    return (lower_int8_linear if layer.bits == 8 else lower_linear)(graph, x, layer)
