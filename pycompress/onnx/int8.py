"""The int8 product in ONNX operators, and the layers that are one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto

from pycompress.nn.int8 import Int8Linear
from pycompress.nn.int8_embedding import Int8Embedding
from pycompress.nn.sparse import SparseLinear
from pycompress.onnx.graph import Graph, array
from pycompress.weights import Int8Weight, SparseWeight


def lower_int8_linear(graph: Graph, x: str, layer: Int8Linear | SparseLinear) -> str:
    """An Int8Linear, or a SparseLinear with int8 weights: x float32 [m, k] -> y float32 [m, n].

    Shown besides are q, uint8 [m, k], the quantized rows of x; and acc, int32 [m, n] = (q - zero point) . weight^T.

    The graph takes the float32 steps of the layer one operator at a time, in the layer's order. So q and
    acc, and y after an exact activation, are the layer's own to the bit. A row of x with NaN or
    Inf gives zeros in q and acc and NaN in y.

    Of a static layer scale and zero point of x are constants. x is multiplied by the inverse of the scale, as the kernels do it; a
    QuantizeLinear would divide, and now and then round another way.

    The weight is stored once, as int8 [k, n]. With 8-bit activations and 8-bit weights a runtime that adds
    two u8 * s8 products in 16 bits saturates, and :func:`session` sets ONNX Runtime not to. With 7 bits on
    either side nothing can saturate.

    With 16-bit activations x is not quantized, and y is the only output: act(x . (float(weight) * scale) + bias) by
    DequantizeLinear and MatMul, the layer's up to rounding. NaN and Inf spread as they do in the layer.
    """
    if layer.settings["activation_bits"] == 16:
        values, weight_scale, _ = integers(layer.canonical())
        v = graph.node("MatMul", x, dequantized(graph, values, weight_scale))
        return graph.activation(graph.bias(v, layer), layer)
    weight = layer.canonical()
    v, broken = int8_product(graph, x, *integers(weight), input_range=getattr(weight, "input_range", None))
    return poisoned(graph, graph.activation(graph.bias(v, layer), layer), broken)


def lower_int8_embedding(graph: Graph, x: str, layer: Int8Embedding) -> str:
    """x int64 [tokens], from 0 to num_embeddings - 1 -> two Gather and a Mul: y float32 [tokens, embedding_dim], the layer's to the
    bit."""
    weight = layer.canonical()
    assert isinstance(weight, Int8Weight)
    rows = graph.node("Gather", graph.weight("weight", weight.values.cpu().numpy()), x)
    scale = graph.node("Gather", graph.constant("weight_scale", array(weight.scale)[:, None]), x)
    return graph.node("Mul", graph.node("Cast", rows, to=TensorProto.FLOAT), scale)


def dequantized(
    graph: Graph, values: npt.NDArray[np.int8], weight_scale: npt.NDArray[np.float32], prefix: str = ""
) -> str:
    """float32 [k, n], of int8 [n, k] and float32 [n]."""
    values_t = graph.matrix(f"{prefix}weight", values)
    # ONNX Runtime's session.x64quantprecision gives a weight without zero points one for all channels, and then refuses it.
    zero_point = graph.zero_points(len(values), prefix=prefix)
    scale = graph.constant(f"{prefix}weight_scale", weight_scale)
    return graph.node("DequantizeLinear", values_t, scale, zero_point, axis=1)


def integers(weight: Int8Weight | SparseWeight) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], int]:
    """The int8 values [n, k] of a canonical weight, zeros and all; its scale, float32 [n]; and the largest activation."""
    scale, bits = weight.scale, weight.activation_bits
    assert scale is not None
    assert bits is not None
    values = replace(weight, scale=torch.ones_like(scale)).decompress()
    return values.detach().cpu().numpy().astype(np.int8), array(scale), 2**bits - 1


def int8_product(
    graph: Graph,
    x: str,
    values: npt.NDArray[np.int8],
    weight_scale: npt.NDArray[np.float32],
    amax: int,
    prefix: str = "",
    input_range: tuple[float, int] | None = None,
) -> tuple[str, str]:
    """x, quantized by rows or by one range, times int8 weights.

    Args:
        x: float32 [m, k].
        values, weight_scale, amax: int8 [n, k], float32 [n] and the largest activation.
        prefix: of the names under which the graph shows q and acc, and has the weight's constants.
        input_range: scale and zero point of a static weight's input.
    Returns:
        (float(acc) * scale of x) * weight_scale, float32 [m, n]; and bool [m, 1]: where x holds NaN or Inf. These rows go on
        as zeros: NaN has no place in a Cast to uint8.
    """
    clean, broken = without_broken(graph, x)
    if input_range is None:
        q, scale, zero_point = quantized(graph, clean, amax, prefix + "q")
    else:
        q, scale, zero_point = quantized_statically(graph, clean, amax, prefix, input_range)
    values_t = graph.matrix(prefix + "weight", values)
    zero = ["", graph.zero_points()] if graph.unsigned else []
    column_sum = graph.constant(prefix + "column_sum", values.sum(axis=1, dtype=np.int32)[None, :], np.int32)
    shift = graph.node("Mul", graph.node("Cast", zero_point, to=TensorProto.INT32), column_sum)
    acc = graph.node("Sub", graph.node("MatMulInteger", q, values_t, *zero), shift, output=prefix + "acc")
    graph.show(q, TensorProto.UINT8, "m", values.shape[1])
    graph.show(acc, TensorProto.INT32, "m", values.shape[0])
    v = graph.node("Mul", graph.node("Cast", acc, to=TensorProto.FLOAT), scale)
    return graph.node("Mul", v, graph.constant(prefix + "weight_scale", weight_scale[None, :])), broken


def without_broken(graph: Graph, x: str, axes: Sequence[int] = (-1,)) -> tuple[str, str]:
    """x [m, k] with zeros in the rows that hold NaN or Inf; and bool [m, 1]: which these are. A row is what lies along ``axes``."""
    zero, row = graph.constant("zero", 0.0), graph.constant("row", [*axes], np.int64)
    # x * 0 is NaN where x is NaN or Inf.
    poison = graph.node("ReduceSum", graph.node("Mul", x, zero), row, keepdims=1)
    broken = graph.node("IsNaN", poison)
    return graph.node("Where", broken, zero, x), broken


def poisoned(graph: Graph, v: str, broken: str, output: str = "") -> str:
    """v, with NaN in the rows that are broken."""
    return graph.node("Where", broken, graph.constant("nan", np.nan), v, output=output)


def quantized(graph: Graph, x: str, amax: int, output: str, axes: Sequence[int] = (-1,)) -> tuple[str, str, str]:
    """Quantizes every row of x, what lies along ``axes``: the names of q uint8 [m, k] (the output's), scale and zero point, both
    float32 [m, 1]."""
    zero, row = graph.constant("zero", 0.0), graph.constant("row", [*axes], np.int64)
    half_amax = graph.constant(f"half_amax_{amax}", amax / 2)
    high_q = graph.constant(f"amax_{amax}", amax)
    one_half = graph.constant("one_half", 0.5)
    low = graph.node("Min", graph.node("ReduceMin", x, row, keepdims=1), zero)
    high = graph.node("Max", graph.node("ReduceMax", x, row, keepdims=1), zero)
    # Halved before the subtraction: high - low overflows for rows that span the whole range of float32.
    half = graph.node("Sub", graph.node("Mul", high, one_half), graph.node("Mul", low, one_half))
    flat = graph.node("Less", half, graph.constant("smallest_half", 2.0**-100))
    divisor = graph.node("Where", flat, graph.constant("one", 1.0), half)
    scale = graph.node("Where", flat, zero, graph.node("Div", half, half_amax))
    inverse = graph.node("Where", flat, zero, graph.node("Div", half_amax, divisor))
    zero_point = graph.node("Round", graph.node("Mul", graph.node("Neg", low), inverse))
    zero_point = graph.node("Clip", zero_point, zero, high_q)
    q = graph.node("Add", graph.node("Round", graph.node("Mul", x, inverse)), zero_point)
    q = graph.node("Cast", graph.node("Clip", q, zero, high_q), to=TensorProto.UINT8, output=output)
    return q, scale, zero_point


def quantized_statically(
    graph: Graph, x: str, amax: int, prefix: str, input_range: tuple[float, int], dims: int = 2
) -> tuple[str, str, str]:
    """As :func:`quantized`, with one range for all rows, whose scale and zero point are constants [1, 1], or of more ``dims``."""
    scale = graph.constant(f"{prefix}input_scale", np.full((1,) * dims, input_range[0]))
    zero_point = graph.constant(f"{prefix}input_zero_point", np.full((1,) * dims, input_range[1]))
    inverse = graph.constant(f"{prefix}input_inverse", np.float32(1) / np.float32(input_range[0]))
    q = graph.node("Add", graph.node("Round", graph.node("Mul", x, inverse)), zero_point)
    q = graph.node("Clip", q, graph.constant("zero", 0.0), graph.constant(f"amax_{amax}", amax))
    return graph.node("Cast", q, to=TensorProto.UINT8, output=f"{prefix}q"), scale, zero_point
