"""The low-rank layers: their factors one behind the other, and the residual of a linear layer beside them."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from pycompress.methods.int4 import Int4Weight
from pycompress.methods.int8 import Int8Weight
from pycompress.methods.low_rank import LowRankWeight
from pycompress.methods.sparse import SparseWeight
from pycompress.nn.low_rank import LowRankLinear
from pycompress.nn.low_rank_conv import LowRankConv2d
from pycompress.nn.low_rank_embedding import LowRankEmbedding
from pycompress.onnx.graph import OPSET, Graph, array, floats, images
from pycompress.onnx.int4 import BLOCKS_OPSET, int4_product, rows_output
from pycompress.onnx.int8 import int8_product, integer_outputs, integers, poisoned


def lower_low_rank_linear(layer: LowRankLinear) -> onnx.ModelProto:
    """Lowers a LowRankLinear with in_features k, out_features n and rank r.

    The input is x, float32 [m, k], for any m. The outputs are y, float32 [m, n], and

    - for int8 factors t, float32 [m, r], what the second factor meets; and of both products down_q, uint8 [m, k], down_acc,
      int32 [m, r], up_q, uint8 [m, r], and up_acc, int32 [m, n];
    - for a residual with int8 weights residual_q, uint8 [m, k], and residual_acc, int32 [m, n];
    - for one with int4 weights, which are stored and multiplied as :func:`lower_int4_linear` has it, residual_q, uint8 [m, k].

    float32 factors, and residuals, are MatMul, and y is the layer's up to rounding. Integers are treated as
    :func:`lower_int8_linear` does: q and acc are the layer's own, and so are t, and y after the activations none and relu,
    where all weights are int8. A row of x with NaN or Inf gives NaN where anything is int8 or int4, otherwise NaN or Inf where
    the runtime meets it.
    """
    weight = layer.canonical()
    residual = weight.residual
    graph = Graph(BLOCKS_OPSET if isinstance(residual, Int4Weight) else OPSET)
    outputs, broken = [floats("y", "m", layer.n)], []
    if weight.bits == 32:
        v = graph.matmul(graph.matmul("x", "down", array(weight.down)), "up", array(weight.up))
    else:
        v, bad = _int8_factors(graph, weight)
        r = weight.rank
        outputs += [floats("t", "m", r), *integer_outputs("down_", layer.k, r), *integer_outputs("up_", r, layer.n)]
        broken.append(bad)
    v = graph.bias(v, layer)
    if isinstance(residual, Int4Weight):
        beside, bad = int4_product(graph, "x", residual, prefix="residual_")
        v = graph.node("Add", beside, v)
        outputs.append(rows_output("residual_q", layer.k))
        broken.append(bad)
    elif isinstance(residual, Int8Weight | SparseWeight) and residual.scale is not None:
        beside, bad = int8_product(graph, "x", *integers(residual), prefix="residual_")
        v = graph.node("Add", beside, v)
        outputs += integer_outputs("residual_", layer.k, layer.n)
        broken.append(bad)
    elif residual is not None:
        v = graph.node("Add", graph.matmul("x", "residual", array(residual.decompress())), v)
    y = graph.activation(v, layer)
    for bad in broken:
        y = poisoned(graph, y, bad)
    graph.node("Identity", y, output="y")
    return graph.model("low_rank_linear", floats("x", "m", layer.k), outputs)


def _int8_factors(graph: Graph, weight: LowRankWeight) -> tuple[str, str]:
    """The second product, without a bias, and where x is broken."""
    assert weight.activation_bits is not None
    assert weight.down_scale is not None
    assert weight.up_scale is not None
    amax = 2**weight.activation_bits - 1
    v, broken = int8_product(graph, "x", weight.down.numpy(), array(weight.down_scale), amax, "down_")
    t = poisoned(graph, v, broken, output="t")
    return int8_product(graph, t, weight.up.numpy(), array(weight.up_scale), amax, "up_")


def lower_low_rank_conv2d(layer: LowRankConv2d) -> onnx.ModelProto:
    """Lowers a LowRankConv2d to the Conv nodes that it runs as, of which the last one adds the bias.

    The input is x, float32 [images, in_channels, height, width], for any images, height and width, and the output y,
    float32 [images, out_channels, its height, its width], the layer's up to rounding.
    """
    graph, v = Graph(), "x"
    factors = layer.canonical().tensors()
    for (name, factor), stage in zip(factors.items(), layer.stages, strict=True):
        v = graph.conv(v, name, array(factor), stage, layer.bias if name == "up" else None)
    graph.node("Identity", graph.activation(v, layer), output="y")
    x, y = images(layer)
    return graph.model("low_rank_conv2d", x, [y])


def lower_low_rank_embedding(layer: LowRankEmbedding) -> onnx.ModelProto:
    """Lowers a LowRankEmbedding to Gather and MatMul.

    The input is x, int64 [tokens], from 0 to num_embeddings - 1, and the output y, float32 [tokens, embedding_dim], the
    layer's up to rounding.
    """
    graph, weight = Graph(), layer.canonical()
    rows = graph.node("Gather", graph.weight("up", array(weight.up)), "x")
    v = graph.node("MatMul", rows, graph.weight("down", array(weight.down)))
    graph.node("Identity", v, output="y")
    x = helper.make_tensor_value_info("x", TensorProto.INT64, ["tokens"])
    return graph.model("low_rank_embedding", x, [floats("y", "tokens", layer.k)])
