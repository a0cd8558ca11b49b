"""The product with 4-bit weights in ONNX operators."""

from __future__ import annotations

from onnx import TensorProto

from pycompress.nn.int4 import Int4Linear
from pycompress.onnx.graph import Graph, array
from pycompress.onnx.int8 import poisoned, quantized, without_broken
from pycompress.weights import Int4Weight


def lower_int4_linear(graph: Graph, x: str, layer: Int4Linear) -> str:
    """x float32 [m, k] -> y float32 [m, n], the layer's up to rounding.

    With 8-bit activations there is another output: q, uint8 [m, k], the quantized rows of x, the layer's own. A row of x with NaN
    or Inf then gives zeros in q and NaN in y; with 16-bit activations NaN and Inf spread as they do in the layer.

    The weight is stored as uint4 [k, n], its scale as float32 and its zero points as uint4, both [groups, n], and a
    DequantizeLinear in blocks makes a float32 weight of them, exactly. A runtime may fuse that with the MatMul behind it, and
    :func:`session` sets ONNX Runtime not to round x when it does.
    """
    weight = layer.canonical()
    if layer.activation_bits == 16:
        return graph.activation(graph.bias(graph.node("MatMul", x, dequantized_blocks(graph, weight)), layer), layer)
    v, broken = int4_product(graph, x, weight)
    return poisoned(graph, graph.activation(graph.bias(v, layer), layer), broken)


def int4_product(graph: Graph, x: str, weight: Int4Weight, prefix: str = "") -> tuple[str, str]:
    """x, quantized by rows to 8 bits, times 4-bit weights.

    Args:
        x: float32 [m, k].
        prefix: of the names under which the graph shows q and has the weight's constants.
    Returns:
        ((q - zero point) . weight^T) * scale of x, float32 [m, n]; and bool [m, 1]: where x holds NaN or Inf. These rows go on
        as zeros.
    """
    clean, broken = without_broken(graph, x)
    q, scale, zero_point = quantized(graph, clean, 255, prefix + "q")
    graph.show(q, TensorProto.UINT8, "m", weight.k)
    steps = graph.node("Sub", graph.node("Cast", q, to=TensorProto.FLOAT), zero_point)
    product = graph.node("MatMul", steps, dequantized_blocks(graph, weight, prefix))
    return graph.node("Mul", product, scale), broken


def dequantized_blocks(graph: Graph, weight: Int4Weight, prefix: str = "") -> str:
    """float32 [k, n]. The last block is short where k is no multiple of the group."""
    values = graph.nibbles(prefix + "weight", weight.integers().numpy().T)
    scale = graph.constant(prefix + "weight_scale", array(weight.scale).T)
    zero_point = graph.nibbles(prefix + "weight_zero_point", weight.zero_points().numpy().T)
    return graph.node("DequantizeLinear", values, scale, zero_point, axis=0, block_size=weight.group)
