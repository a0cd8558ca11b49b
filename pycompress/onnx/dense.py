"""Layers with their weight decompressed: what is left where no operator knows the weight as it is."""

from __future__ import annotations

from pycompress.nn.conv import CompressedConv2d
from pycompress.nn.layer import CompressedLayer
from pycompress.onnx.graph import Graph, array


def lower_linear(graph: Graph, x: str, layer: CompressedLayer) -> str:
    """x [m, k] -> MatMul with the float32 weight, stored as [k, n] with its zeros: the layer's y up to rounding.

    The runtime adds up the products in an order of its own, and multiplies zeros too: where a row of x holds NaN or Inf, the whole
    row of y does.
    """
    v = graph.matmul(x, "weight", array(layer.canonical().decompress()))
    return graph.activation(graph.bias(v, layer), layer)


def lower_conv(graph: Graph, x: str, layer: CompressedConv2d) -> str:
    """x [images, in_channels, height, width], or sequences -> Conv, which adds the bias as well. For rounding, and for NaN and Inf,
    what :func:`lower_linear` says of a row holds for the inputs of an output."""
    weight = layer.canonical().decompress().view(layer.dense_shape)
    return graph.activation(graph.conv(x, "weight", array(weight), layer.geometry, layer.bias32), layer)
