"""The sparse layers, with their zeros: ONNX has no sparse product."""

from __future__ import annotations

import onnx

from pycompress.nn.sparse import SparseLinear
from pycompress.nn.sparse_conv import SparseConv2d
from pycompress.onnx.graph import Graph, array, floats, images
from pycompress.onnx.int8 import lower_int8_linear


def lower_sparse_linear(layer: SparseLinear) -> onnx.ModelProto:
    """Lowers a SparseLinear: with int8 weights as :func:`lower_int8_linear` does, with float32 weights to MatMul.

    For these the input is x, float32 [m, k], for any m, and the output y, float32 [m, n]. The weight is stored
    with its zeros, float32 [k, n], and the runtime adds up the products in an order of its own, so y is the
    layer's up to rounding. It multiplies the zeros too: where a row of x holds NaN or Inf, the whole row of y
    is NaN or Inf, and the layer's only in those columns that have a weight for it.
    """
    if layer.bits == 8:
        return lower_int8_linear(layer)
    graph = Graph()
    v = graph.matmul("x", "weight", array(layer.canonical().decompress()))
    graph.node("Identity", graph.activation(graph.bias(v, layer), layer), output="y")
    return graph.model("sparse_linear", floats("x", "m", layer.k), [floats("y", "m", layer.n)])


def lower_sparse_conv2d(layer: SparseConv2d) -> onnx.ModelProto:
    """Lowers a SparseConv2d to Conv, which adds the bias as well.

    The input is x, float32 [images, in_channels, height, width], for any images, height and width, and the output y,
    float32 [images, out_channels, its height, its width]. The weight is stored with its zeros. For rounding, and for
    NaN and Inf, what :func:`lower_sparse_linear` says of a row holds for the inputs of an output.
    """
    graph = Graph()
    v = graph.conv("x", "weight", array(layer.weight), layer.geometry, layer.bias)
    graph.node("Identity", graph.activation(v, layer), output="y")
    x, y = images(layer)
    return graph.model("sparse_conv2d", x, [y])
