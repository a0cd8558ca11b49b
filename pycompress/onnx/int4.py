"""The product with 4-bit weights in ONNX operators."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from pycompress.methods.int4 import Int4Weight
from pycompress.nn.int4 import Int4Linear
from pycompress.onnx.graph import Graph, array, floats
from pycompress.onnx.int8 import poisoned, quantized, without_broken

BLOCKS_OPSET = 21  # the first with 4-bit integers, and with a DequantizeLinear that has a scale per block


def lower_int4_linear(layer: Int4Linear) -> onnx.ModelProto:
    """Lowers an Int4Linear with in_features k and out_features n.

    The input is x, float32 [m, k], for any m, and the output y, float32 [m, n], the layer's up to rounding. With 8-bit
    activations there is another output: q, uint8 [m, k], the quantized rows of x, the layer's own. A row of x with NaN or Inf then
    gives zeros in q and NaN in y; with 16-bit activations NaN and Inf spread as they do in the layer.

    The weight is stored as uint4 [k, n], its scale as float32 and its zero points as uint4, both [groups, n], and a
    DequantizeLinear in blocks makes a float32 weight of them, exactly. A runtime may fuse that with the MatMul behind it, and
    :func:`session` sets ONNX Runtime not to round x when it does.
    """
    graph, weight = Graph(BLOCKS_OPSET), layer.canonical()
    outputs = [floats("y", "m", layer.n)]
    if layer.activation_bits == 16:
        v = graph.bias(graph.node("MatMul", "x", _dequantized(graph, weight)), layer)
        graph.node("Identity", graph.activation(v, layer), output="y")
    else:
        v, broken = int4_product(graph, "x", weight)
        poisoned(graph, graph.activation(graph.bias(v, layer), layer), broken, output="y")
        outputs.append(rows_output("q", layer.k))
    return graph.model("int4_linear", floats("x", "m", layer.k), outputs)


def int4_product(graph: Graph, x: str, weight: Int4Weight, prefix: str = "") -> tuple[str, str]:
    """x, quantized by rows to 8 bits, times 4-bit weights.

    Args:
        x: float32 [m, k].
        prefix: of the names under which the graph has q and the weight's constants.
    Returns:
        ((q - zero point) . weight^T) * scale of x, float32 [m, n]; and bool [m, 1]: where x holds NaN or Inf. These rows go on
        as zeros.
    """
    clean, broken = without_broken(graph, x)
    q, scale, zero_point = quantized(graph, clean, 255, prefix + "q")
    steps = graph.node("Sub", graph.node("Cast", q, to=TensorProto.FLOAT), zero_point)
    product = graph.node("MatMul", steps, _dequantized(graph, weight, prefix))
    return graph.node("Mul", product, scale), broken


def rows_output(name: str, k: int) -> onnx.ValueInfoProto:
    """The quantized rows of x, uint8 [m, k]."""
    return helper.make_tensor_value_info(name, TensorProto.UINT8, ["m", k])


def _dequantized(graph: Graph, weight: Int4Weight, prefix: str = "") -> str:
    """float32 [k, n]. The last block is short where k is no multiple of the group."""
    values = graph.nibbles(prefix + "weight", weight.integers().numpy().T)
    scale = graph.constant(prefix + "weight_scale", array(weight.scale).T)
    zero_point = graph.nibbles(prefix + "weight_zero_point", weight.zero_points().numpy().T)
    return graph.node("DequantizeLinear", values, scale, zero_point, axis=0, block_size=weight.group)
