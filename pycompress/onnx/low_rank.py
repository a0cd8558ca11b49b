"""The low-rank layers: their factors one behind the other, and the residual of a linear layer beside them."""

from __future__ import annotations

from onnx import TensorProto

from pycompress.nn.low_rank import LowRankLinear
from pycompress.nn.low_rank_conv import LowRankConv2d
from pycompress.nn.low_rank_embedding import LowRankEmbedding
from pycompress.onnx.graph import Graph, array
from pycompress.onnx.int4 import int4_product
from pycompress.onnx.int8 import int8_product, integers, poisoned
from pycompress.weights import Int4Weight, Int8Weight, LowRankWeight, SparseWeight


def lower_low_rank_linear(graph: Graph, x: str, layer: LowRankLinear) -> str:
    """x float32 [m, k] -> y float32 [m, n]. Shown besides, for factors of rank r, are

    - for int8 factors t, float32 [m, r], what the second factor meets; and of both products down_q, uint8 [m, k], down_acc,
      int32 [m, r], up_q, uint8 [m, r], and up_acc, int32 [m, n];
    - for a residual with int8 weights residual_q, uint8 [m, k], and residual_acc, int32 [m, n];
    - for one with int4 weights, which are stored and multiplied as :func:`lower_int4_linear` has it, residual_q, uint8 [m, k].

    float32 factors, and other residuals, are MatMul, and y is the layer's up to rounding. Integers are treated as
    :func:`lower_int8_linear` does: q and acc are the layer's own, and so are t, and y after an exact activation,
    where all weights are int8. A row of x with NaN or Inf gives NaN where anything is int8 or int4, otherwise NaN or Inf where
    the runtime meets it.
    """
    weight, broken = layer.canonical(), list[str]()
    residual = weight.residual
    if weight.bits == 32:
        v = graph.matmul(graph.matmul(x, "down", array(weight.down)), "up", array(weight.up))
    else:
        v, *broken = _int8_factors(graph, x, weight)
    v = graph.bias(v, layer)
    if isinstance(residual, Int4Weight):
        beside, *bad = int4_product(graph, x, residual, prefix="residual_")
    elif isinstance(residual, Int8Weight | SparseWeight) and residual.scale is not None:
        beside, *bad = int8_product(graph, x, *integers(residual), prefix="residual_")
    elif residual is not None:
        beside, bad = graph.matmul(x, "residual", array(residual.decompress())), []
    if residual is not None:
        v, broken = graph.node("Add", beside, v), [*broken, *bad]
    y = graph.activation(v, layer)
    for rows in broken:
        y = poisoned(graph, y, rows)
    return y


def _int8_factors(graph: Graph, x: str, weight: LowRankWeight) -> tuple[str, str]:
    """The second product, without a bias, and where x is broken."""
    assert weight.activation_bits is not None
    assert weight.down_scale is not None
    assert weight.up_scale is not None
    graph.show("t", TensorProto.FLOAT, "m", weight.rank)
    amax = 2**weight.activation_bits - 1
    v, broken = int8_product(graph, x, weight.down.numpy(), array(weight.down_scale), amax, "down_")
    t = poisoned(graph, v, broken, output="t")
    return int8_product(graph, t, weight.up.numpy(), array(weight.up_scale), amax, "up_")


def lower_low_rank_conv2d(graph: Graph, x: str, layer: LowRankConv2d) -> str:
    """The Conv nodes that it runs as, of which the last one adds the bias: x float32 [images, in_channels, height, width] -> y
    float32 [images, out_channels, its height, its width], the layer's up to rounding.
    """
    v, factors = x, layer.canonical().parts()
    for (name, factor), stage in zip(factors.items(), layer.stages, strict=True):
        v = graph.conv(v, name, array(factor), stage, layer.bias32 if name == "up" else None)
    return graph.activation(v, layer)


def lower_low_rank_embedding(graph: Graph, x: str, layer: LowRankEmbedding) -> str:
    """x int64 [tokens], from 0 to num_embeddings - 1 -> Gather and MatMul: y float32 [tokens, embedding_dim], the layer's up to
    rounding.
    """
    weight = layer.canonical()
    rows = graph.node("Gather", graph.weight("up", array(weight.up)), x)
    return graph.node("MatMul", rows, graph.weight("down", array(weight.down)))
