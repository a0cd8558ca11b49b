"""Layers in what TensorRT's parser takes: as in the form ``fused``, but with signed integers around zero alone.

It has no zero points (https://docs.nvidia.com/deeplearning/tensorrt, "Working with Quantized Types"), 4 bits for weights only, and
no operators on bits, by which sparse weights are stored elsewhere: here they are matrices.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pycompress.nn.layer import CompressedLayer
from pycompress.onnx.graph import Graph, Lowering, array
from pycompress.weights import Int4Weight, Int8Weight, LowRankWeight, Weight


def symmetric_linear(graph: Graph, x: str, layer: CompressedLayer) -> str:
    """x float32 [..., k] -> y float32 [..., n]."""
    weight = layer.canonical()
    if not isinstance(weight, LowRankWeight):
        v = graph.bias(_product(graph, _in_range(graph, x, weight), weight, ""), layer)
        return graph.activation(v, layer)
    v = x
    for name, values, scale in (("down", weight.down, weight.down_scale), ("up", weight.up, weight.up_scale)):
        v = graph.node("MatMul", v, _transposed(graph, name, values.numpy(), None if scale is None else array(scale)))
    v = graph.bias(v, layer)
    if weight.residual is not None:
        v = graph.node("Add", _product(graph, x, weight.residual, "residual_"), v)
    return graph.activation(v, layer)


def symmetric_conv(graph: Graph, x: str, layer: Any) -> str:
    """x float32 [images, in_channels, height, width], or sequences -> y float32."""
    weight, geometry = layer.canonical(), layer.geometry
    x = _in_range(graph, x, weight)
    if isinstance(weight, Int8Weight):
        values = graph.weight("weight", weight.values.numpy().reshape(layer.dense_shape))
        stored = _dequantized(graph, values, "weight", array(weight.scale), axis=0)
    else:
        stored = graph.weight("weight", array(weight.decompress()).reshape(layer.dense_shape))
    bias = [] if layer.bias32 is None else [graph.constant("bias", array(layer.bias32))]
    return graph.activation(graph.convolved([x, stored, *bias], geometry), layer)


def symmetric_rows(graph: Graph, x: str, layer: CompressedLayer) -> str:
    """x int64 [...] -> y float32 [..., embedding_dim]."""
    return graph.node("Gather", graph.weight("weight", array(layer.canonical().decompress())), x)


def symmetric_scale(weight: Any) -> float | None:
    """Of a static weight's input: the float32 step of 127 that reach as far as its range does; None of any other weight."""
    fixed = getattr(weight, "input_range", None)
    if fixed is None:
        return None
    step, zero = fixed
    return float(np.float32(step * max(zero, 2**weight.activation_bits - 1 - zero) / 127))


def _product(graph: Graph, x: str, weight: Weight, prefix: str) -> str:
    """x . weight^T"""
    name = f"{prefix}weight"
    if isinstance(weight, Int8Weight):
        return graph.node("MatMul", x, _transposed(graph, name, weight.values.numpy(), array(weight.scale)))
    if isinstance(weight, Int4Weight) and weight.symmetric and weight.k % weight.group == 0:
        values = graph.nibbles(name, (weight.integers().numpy().T ^ 8).astype(np.uint8), signed=True)
        scale = graph.constant(f"{name}_scale", array(weight.scale).T)
        dense = graph.node("DequantizeLinear", values, scale, axis=0, block_size=weight.group)
        return graph.node("MatMul", x, dense)
    return graph.node("MatMul", x, _transposed(graph, name, array(weight.decompress()), None))


def _transposed(graph: Graph, name: str, values: Any, scale: Any) -> str:
    """float32 [k, n] of float32, or int8 with a scale a row, [n, k]."""
    stored = graph.weight(name, values.T)
    return stored if scale is None else _dequantized(graph, stored, name, scale, axis=1)


def _dequantized(graph: Graph, values: str, name: str, scale: Any, axis: int) -> str:
    zeros = graph.constant(f"{name}_zero_point", np.zeros(len(scale)), np.int8)
    return graph.node("DequantizeLinear", values, graph.constant(f"{name}_scale", scale), zeros, axis=axis)


def _in_range(graph: Graph, x: str, weight: Weight) -> str:
    """x, rounded to steps around zero that reach as far as a static weight's range."""
    step = symmetric_scale(weight)
    if step is None:
        return x
    scale, zero = graph.constant("input_scale", step), graph.constant("input_zero_point", 0, np.int8)
    return graph.node("DequantizeLinear", graph.node("QuantizeLinear", x, scale, zero), scale, zero)


# By kind of layer and weight; what is not there is lowered as ever.
SYMMETRIC: dict[tuple[str, str], Lowering] = {
    **dict.fromkeys([("linear", name) for name in ("int8", "int4", "sparse", "low_rank")], symmetric_linear),
    **dict.fromkeys([(kind, name) for kind in ("conv2d", "conv1d") for name in ("int8", "sparse")], symmetric_conv),
    ("embedding", "int8"): symmetric_rows,
}
