"""The int8 convolution in ONNX operators."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from pycompress.nn.int8_conv import Int8Conv2d
from pycompress.onnx.graph import Graph, array
from pycompress.onnx.int8 import integers, poisoned, quantized, quantized_statically, without_broken


def lower_int8_conv(graph: Graph, x: str, layer: Int8Conv2d) -> str:
    """x float32 [images, in_channels, height, width] -> y float32 [images, out_channels, its height, its width]; sequences alike.

    Shown besides are q, uint8 of x's shape, the quantized images, and acc, int32 of y's shape: the sums of (q - zero point) times
    the weights. They, and y after an exact activation, are the layer's own to the bit; an image with NaN or Inf gives
    zeros in q and acc and NaN in y.

    A ConvInteger has one zero point for all images, so q goes without one: around it lie its own zero points, which an image's
    zero is, and what they add to all sums, the zero point times the sum of the weights, is taken off behind it.
    """
    weight = layer.canonical()
    values, weight_scale, amax = integers(weight)
    geometry, n = layer.geometry, layer.n
    axes = [*range(1, 2 + geometry.dims)]  # an image, or a sequence
    clean, broken = without_broken(graph, x, axes)
    if weight.input_range is None:
        q, scale, zero_point = quantized(graph, clean, amax, "q", axes)
    else:
        q, scale, zero_point = quantized_statically(graph, clean, amax, "", weight.input_range, dims=len(axes) + 1)
    # Pad takes one number for all images: zeros around q - zero point, as integers.
    zero = graph.node("Cast", zero_point, to=TensorProto.INT32)
    inside = graph.node("Sub", graph.node("Cast", q, to=TensorProto.INT32), zero)
    inside = graph.node("Pad", graph.filled(inside, geometry), graph.sides("sides", geometry.sides))
    wide = graph.node("Add", inside, zero)
    stored = graph.kernels("weight", values.reshape(n, -1, *geometry.kernel_size))
    unsigned = ["", graph.zero_points()] if graph.unsigned else []
    sums = graph.node(
        "ConvInteger", graph.node("Cast", wide, to=TensorProto.UINT8), stored, *unsigned, kernel_shape=geometry.kernel_size,
        strides=geometry.stride, dilations=geometry.dilation, group=geometry.groups,
    )  # fmt: skip
    by_channel = (1, n, *(1,) * geometry.dims)
    column_sum = graph.constant("column_sum", values.sum(axis=1, dtype=np.int32).reshape(by_channel), np.int32)
    acc = graph.node("Sub", sums, graph.node("Mul", zero, column_sum), output="acc")
    sizes, out_sizes = layer.kind.sizes(n, layer.k, geometry)
    graph.show(q, TensorProto.UINT8, *sizes)
    graph.show(acc, TensorProto.INT32, *out_sizes)
    v = graph.node("Mul", graph.node("Cast", acc, to=TensorProto.FLOAT), scale)
    v = graph.node("Mul", v, graph.constant("weight_scale", weight_scale.reshape(by_channel)))
    if layer.bias32 is not None:
        v = graph.node("Add", v, graph.constant("bias", array(layer.bias32).reshape(by_channel)))
    return poisoned(graph, graph.activation(v, layer), broken)
