"""Lower compressed layers to ONNX: standard operators only, so that any ONNX runtime can run or check them.

The operators are specified at https://onnx.ai/onnx/operators/ (for each the newest version up to OPSET): Mul,
Add, Sub, Div, Neg, Min, Max, Less, Where, IsNaN, Round, Clip, Cast, ReduceMin, ReduceMax, ReduceSum, MatMul,
MatMulInteger, DequantizeLinear, Conv, ConvInteger, Pad, Gather and Identity; for the activations Relu, Erf and Exp; for recurrent
layers Scan, Shape, Reshape, Concat, Split, Unsqueeze and Abs. ONNX has no sparse product, so sparse weights are multiplied with
their zeros, which BitwiseAnd, Reshape, Transpose, Slice and CumSum put in. 4-bit weights need a newer opset, BLOCKS_OPSET.

A lowering of rows or tokens takes any leading dimensions: whole models (:mod:`pycompress.onnx.whole_model`) give it theirs.
"""

from __future__ import annotations

import os

from torch import nn

try:
    import onnx
    import onnxruntime
except ImportError as error:
    raise ImportError(
        f'pycompress.onnx needs onnx and onnxruntime ({error}): pip install "pycompress[onnx]"'
    ) from error

from pycompress.nn import LAYERS, CompressedLayer
from pycompress.onnx.activation import ACTIVATIONS
from pycompress.onnx.dense import lower_conv, lower_linear
from pycompress.onnx.fused import FUSED
from pycompress.onnx.graph import BLOCKS_OPSET, MAX_WEIGHT_BYTES, OPSET, Graph, Lowering
from pycompress.onnx.int4 import lower_int4_linear
from pycompress.onnx.int8 import integers, lower_int8_embedding, lower_int8_linear
from pycompress.onnx.int8_conv import lower_int8_conv
from pycompress.onnx.int8_recurrent import lower_int8_recurrent
from pycompress.onnx.kernels import KERNELS, THREADS, has_library, library, runs
from pycompress.onnx.low_rank import lower_low_rank_conv2d, lower_low_rank_embedding, lower_low_rank_linear
from pycompress.onnx.sparse import lower_sparse_linear
from pycompress.onnx.symmetric import SYMMETRIC
from pycompress.replacing import FilePath

__all__ = [
    "ACTIVATIONS", "BLOCKS_OPSET", "DENSE", "FORMS", "FUSED", "KERNELS", "LOWERINGS", "MAX_WEIGHT_BYTES", "OPSET", "Graph",
    "integers", "library", "lower", "lowering_of", "runs", "session",
]  # fmt: skip

# By kind of layer and weight, as in nn.LAYERS.
LOWERINGS: dict[tuple[str, str], Lowering] = {
    ("linear", "int8"): lower_int8_linear,
    ("linear", "int4"): lower_int4_linear,
    ("linear", "sparse"): lower_sparse_linear,
    ("linear", "low_rank"): lower_low_rank_linear,
    ("conv2d", "int8"): lower_int8_conv,
    ("conv1d", "int8"): lower_int8_conv,
    ("conv2d", "low_rank"): lower_low_rank_conv2d,
    ("embedding", "int8"): lower_int8_embedding,
    ("lstm", "int8"): lower_int8_recurrent,
    ("gru", "int8"): lower_int8_recurrent,
    ("embedding", "low_rank"): lower_low_rank_embedding,
}
# By kind: with the decompressed weight, for weights that have no lowering of their own.
DENSE: dict[str, Lowering] = {"linear": lower_linear, "conv2d": lower_conv, "conv1d": lower_conv}


# Of a whole model: the layers' own numbers, what runtimes have one operator for, or our kernels as custom ops.
FORMS = ("exact", "fused", "kernels")
# What a form has instead of LOWERINGS. One besides those is for a target of its own.
TABLES: dict[str, dict[tuple[str, str], Lowering]] = {
    "exact": {},
    "fused": FUSED,
    "kernels": KERNELS,
    "symmetric": SYMMETRIC,
}


def lowering_of(layer: CompressedLayer, form: str = "exact") -> Lowering | None:
    """A layer's lowering: that of its kind and weight, a method ``lower(graph, x)`` of its own, or the dense one of its kind."""
    key = layer.kind.name, layer.weight_type.name
    found = TABLES[form].get(key) if form != "kernels" or runs(layer) else None
    found = found or LOWERINGS.get(key)
    if found is None and hasattr(layer, "lower"):
        return lambda graph, x, layer: layer.lower(graph, x)
    return found or DENSE.get(layer.kind.name)


def lower(layer: nn.Module, form: str = "exact") -> onnx.ModelProto:
    """Lowers a compressed layer to a model of standard ONNX operators (of ours in the form ``kernels``), which the ONNX checker has
    passed.

    The input is x, the items of the layer's kind: float32 rows [m, k] or images, int64 tokens, or sequences [steps, batch, k],
    beside which a recurrent layer takes its first states. The outputs are y, float32, and what the lowering shows besides.

    Raises:
        TypeError: there is no lowering for this type of layer. ValueError: the weights are larger than 2 GiB, alone or together.
    """
    lowering = lowering_of(layer, form) if isinstance(layer, CompressedLayer) else None
    if lowering is None or not isinstance(layer, CompressedLayer):
        known = ", ".join(kind.__name__ for kind in LAYERS.values())
        raise TypeError(f"lower: the layer is {type(layer).__name__}, expected one of: {known}")
    graph = Graph()
    graph.node("Identity", lowering(graph, "x", layer), output="y")
    model = graph.model(layer)
    onnx.checker.check_model(model, full_check=True)
    return model


def session(model: onnx.ModelProto | FilePath, *, threads: int = 1) -> onnxruntime.InferenceSession:
    """Opens a model, or a file, in ONNX Runtime on the CPU, set for exact integers and for float32 products.

    On x86 without VNNI the u8 * s8 product of ONNX Runtime saturates unless x64quantprecision is set, and
    that entry is obeyed by a graph transformation that runs from ORT_ENABLE_EXTENDED on: with less
    optimisation the integers are wrong. From that level on DequantizeLinear and MatMul become one operator too
    (MatMulNBits), which rounds x to 8 bits by blocks unless its accuracy level is set to 1, float32. One thread, if not
    said otherwise, and no spinning, so that no idle worker takes a core from what runs next.

    Our own ops (the form ``kernels``) are there, where pycompress was built with its kernels; each has a pool of OpenMP beside that
    of ONNX Runtime, for as many threads.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if has_library():
        options.add_session_config_entry(THREADS, str(max(threads, 1)))
        options.register_custom_ops_library(library())
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else os.fspath(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
