"""Lower one compressed layer to ONNX: standard operators only, so that any ONNX runtime can run or check it.

The operators are specified at https://onnx.ai/onnx/operators/ (for each the newest version up to OPSET): Mul,
Add, Sub, Div, Neg, Min, Max, Less, Where, IsNaN, Round, Clip, Cast, ReduceMin, ReduceMax, ReduceSum, MatMul,
MatMulInteger, DequantizeLinear, Conv, Gather and Identity; for the activations Relu, Erf and Exp. ONNX has no sparse product,
so sparse weights are lowered with their zeros. 4-bit weights need a newer opset, BLOCKS_OPSET.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

try:
    import onnx
    import onnxruntime
except ImportError as error:
    raise ImportError(
        f'pycompress.onnx needs onnx and onnxruntime ({error}): pip install "pycompress[onnx]"'
    ) from error

from pycompress.nn.int4 import Int4Linear
from pycompress.nn.int8 import Int8Linear
from pycompress.nn.low_rank import LowRankLinear
from pycompress.nn.low_rank_conv import LowRankConv2d
from pycompress.nn.low_rank_embedding import LowRankEmbedding
from pycompress.nn.sparse import SparseLinear
from pycompress.nn.sparse_conv import SparseConv2d
from pycompress.onnx.activation import ACTIVATIONS
from pycompress.onnx.graph import MAX_WEIGHT_BYTES, OPSET, Graph
from pycompress.onnx.int4 import BLOCKS_OPSET, lower_int4_linear
from pycompress.onnx.int8 import integers, lower_int8_linear
from pycompress.onnx.low_rank import lower_low_rank_conv2d, lower_low_rank_embedding, lower_low_rank_linear
from pycompress.onnx.sparse import lower_sparse_conv2d, lower_sparse_linear

__all__ = [
    "ACTIVATIONS", "BLOCKS_OPSET", "LOWERINGS", "MAX_WEIGHT_BYTES", "OPSET", "Graph", "integers", "lower", "lower_int4_linear",
    "lower_int8_linear", "lower_low_rank_conv2d", "lower_low_rank_embedding", "lower_low_rank_linear", "lower_sparse_conv2d",
    "lower_sparse_linear", "session",
]  # fmt: skip

LOWERINGS: dict[type[nn.Module], Callable[[Any], onnx.ModelProto]] = {
    Int8Linear: lower_int8_linear,
    Int4Linear: lower_int4_linear,
    SparseLinear: lower_sparse_linear,
    SparseConv2d: lower_sparse_conv2d,
    LowRankLinear: lower_low_rank_linear,
    LowRankConv2d: lower_low_rank_conv2d,
    LowRankEmbedding: lower_low_rank_embedding,
}


def lower(layer: nn.Module) -> onnx.ModelProto:
    """Lowers a compressed layer to a model of standard ONNX operators, which the ONNX checker has passed.

    Args:
        layer: of a type in LOWERINGS, whose function describes the inputs and outputs of the model.
    Raises:
        TypeError: there is no lowering for this type of layer. ValueError: the weight is larger than 2 GiB.
    """
    lowering = LOWERINGS.get(type(layer))
    if lowering is None:
        known = ", ".join(kind.__name__ for kind in LOWERINGS)
        raise TypeError(f"lower: the layer is {type(layer).__name__}, expected one of: {known}")
    model = lowering(layer)
    onnx.checker.check_model(model, full_check=True)
    return model


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Opens a model in ONNX Runtime on the CPU, set for exact integers and for float32 products.

    On x86 without VNNI the u8 * s8 product of ONNX Runtime saturates unless x64quantprecision is set, and
    that entry is obeyed by a graph transformation that runs from ORT_ENABLE_EXTENDED on: with less
    optimisation the integers are wrong. From that level on DequantizeLinear and MatMul become one operator too
    (MatMulNBits), which rounds x to 8 bits by blocks unless its accuracy level is set to 1, float32. One thread and
    no spinning, so that no idle worker takes a core from what runs next.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
