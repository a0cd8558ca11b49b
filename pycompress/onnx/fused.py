"""Layers as what runtimes have one operator for: a product with a weight behind DequantizeLinear, which OpenVINO, TensorRT or ONNX
Runtime compute with the integers as they are. Standard operators here too.

A layer that quantizes each row of its input leaves that in floating point: no operator does it. Static ranges stand in the graph as
QuantizeLinear and DequantizeLinear, which divide by the scale where the kernels multiply by its inverse: now and then an integer is
one off.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pycompress.nn.int4 import Int4Linear
from pycompress.nn.int8 import Int8Linear
from pycompress.nn.int8_conv import Int8Conv2d
from pycompress.nn.low_rank import LowRankLinear
from pycompress.nn.sparse import SparseLinear
from pycompress.onnx.graph import Graph, Lowering, array
from pycompress.onnx.int4 import dequantized_blocks
from pycompress.onnx.int8 import dequantized, integers
from pycompress.weights import Int4Weight, Int8Weight, SparseWeight, Weight


def fuse_linear(graph: Graph, x: str, layer: Int8Linear | Int4Linear | SparseLinear) -> str:
    """x float32 [..., k] -> y float32 [..., n]: act(x . W^T + bias), x rounded to its static range where there is one."""
    weight = layer.canonical()
    x = _in_range(graph, x, weight)
    return graph.activation(graph.bias(_product(graph, x, weight), layer), layer)


def fuse_low_rank_linear(graph: Graph, x: str, layer: LowRankLinear) -> str:
    """x float32 [..., k] -> y float32 [..., n]: act((x . down^T) . up^T + bias + x . residual^T)."""
    weight = layer.canonical()
    if weight.bits == 32:
        v = graph.matmul(graph.matmul(x, "down", array(weight.down)), "up", array(weight.up))
    else:
        v = x
        for name, values, scale in (("down_", weight.down, weight.down_scale), ("up_", weight.up, weight.up_scale)):
            v = graph.node("MatMul", v, dequantized(graph, _numpy(values), array(scale), name))
    v = graph.bias(v, layer)
    if weight.residual is not None:
        v = graph.node("Add", _product(graph, x, weight.residual, "residual_"), v)
    return graph.activation(v, layer)


def fuse_int8_conv(graph: Graph, x: str, layer: Int8Conv2d) -> str:
    """x float32 [images, in_channels, height, width], or sequences -> y float32."""
    weight, geometry = layer.canonical(), layer.geometry
    x = _in_range(graph, x, weight)
    values = _numpy(weight.values).reshape(layer.n, -1, *geometry.kernel_size)
    stored = graph.node(
        "DequantizeLinear", graph.kernels("weight", values), graph.constant("weight_scale", array(weight.scale)),
        graph.zero_points(layer.n), axis=0,
    )  # fmt: skip
    bias = [] if layer.bias32 is None else [graph.constant("bias", array(layer.bias32))]
    return graph.activation(graph.convolved([x, stored, *bias], geometry), layer)


def _product(graph: Graph, x: str, weight: Weight, prefix: str = "") -> str:
    """x . weight^T"""
    if isinstance(weight, Int4Weight):
        return graph.node("MatMul", x, dequantized_blocks(graph, weight, prefix))
    if isinstance(weight, Int8Weight | SparseWeight) and weight.scale is not None:
        values, scale, _ = integers(weight)
        return graph.node("MatMul", x, dequantized(graph, values, scale, prefix))
    return graph.matmul(x, f"{prefix}weight", array(weight.decompress()))


def _in_range(graph: Graph, x: str, weight: Weight) -> str:
    """x, rounded to the steps of a static weight's range."""
    fixed = getattr(weight, "input_range", None)
    if fixed is None:
        return x
    step, zero = np.float32(fixed[0]), int(fixed[1])
    if weight.activation_bits == 7:  # type: ignore[attr-defined]  # QuantizeLinear ends at 255
        low, high = graph.constant("input_low", -zero * step), graph.constant("input_high", (127 - zero) * step)
        x = graph.node("Clip", x, low, high)
    scale, zero_point = graph.constant("input_scale", step), graph.constant("input_zero_point", zero, np.uint8)
    return graph.node("DequantizeLinear", graph.node("QuantizeLinear", x, scale, zero_point), scale, zero_point)


def _numpy(values: Tensor) -> npt.NDArray[np.int8]:
    found: npt.NDArray[np.int8] = values.cpu().numpy()
    return found


# By kind of layer and weight; what is not there is lowered as ever.
FUSED: dict[tuple[str, str], Lowering] = {
    ("linear", "int8"): fuse_linear,
    ("linear", "int4"): fuse_linear,
    ("linear", "sparse"): fuse_linear,
    ("linear", "low_rank"): fuse_low_rank_linear,
    ("conv2d", "int8"): fuse_int8_conv,
    ("conv1d", "int8"): fuse_int8_conv,
}
