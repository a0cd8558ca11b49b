"""Lower one compressed layer to ONNX: standard operators only, so that any ONNX runtime can run or check it.

The operators are specified at https://onnx.ai/onnx/operators/ (for each the newest version up to OPSET): Mul,
Add, Sub, Div, Neg, Min, Max, Less, Where, IsNaN, Round, Clip, Cast, ReduceMin, ReduceMax, ReduceSum and
MatMulInteger; for the activations Relu, Erf and Exp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from pycompress.nn.int8 import Int8Linear

try:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
except ImportError as error:
    raise ImportError(
        f'pycompress.onnx needs onnx and onnxruntime ({error}): pip install "pycompress[onnx]"'
    ) from error

OPSET = 20  # what torch.onnx.export writes by default; onnxruntime reads it since 1.17
MAX_WEIGHT_BYTES = 2**31 - 2**20  # a protobuf message ends at 2 GiB


class Graph:
    """A graph under construction. Both methods return the name of the value they add."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, value: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> str:
        """Stores the value as an initializer."""
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype, order="C"), name))
        return name

    def node(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Applies a one-output operator of the standard domain."""
        output = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output


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


def lower_int8_linear(layer: Int8Linear) -> onnx.ModelProto:
    """Lowers an Int8Linear with in_features k and out_features n.

    The input is x, float32 [m, k], for any m. The outputs are y, float32 [m, n]; q, uint8 [m, k], the
    quantized rows of x; and acc, int32 [m, n] = (q - zero point) . weight^T.

    The graph takes the float32 steps of the layer one operator at a time, in the layer's order. So q and
    acc, and y after the activations none and relu, are the layer's own to the bit. A row of x with NaN or
    Inf gives zeros in q and acc and NaN in y.

    The weight is stored once, as int8 [k, n]. With 8-bit activations and 8-bit weights a runtime that adds
    two u8 * s8 products in 16 bits saturates, and :func:`session` sets ONNX Runtime not to. With 7 bits on
    either side nothing can saturate.
    """
    weight = layer.canonical()
    values = weight.values.detach().cpu().numpy()  # int8 [n, k]
    n, k = values.shape
    if values.nbytes > MAX_WEIGHT_BYTES:
        raise ValueError(f"lower: the weight [{n}, {k}] has {values.nbytes} bytes, expected at most {MAX_WEIGHT_BYTES}")
    amax = 2**weight.activation_bits - 1
    graph = Graph()
    zero = graph.constant("zero", 0.0)
    last_axis = graph.constant("last_axis", [1], np.int64)

    # x * 0 is NaN where x is NaN or Inf. Such rows continue as zeros: NaN has no place in a Cast to uint8.
    poison = graph.node("ReduceSum", graph.node("Mul", "x", zero), last_axis, keepdims=1)
    broken = graph.node("IsNaN", poison)
    x = graph.node("Where", broken, zero, "x")

    q, scale, zero_point = _quantize(graph, x, amax, zero, last_axis)
    values_t = graph.constant("weight", values.T, np.int8)
    column_sum = graph.constant("column_sum", values.sum(axis=1, dtype=np.int32)[None, :], np.int32)
    shift = graph.node("Mul", graph.node("Cast", zero_point, to=TensorProto.INT32), column_sum)
    acc = graph.node("Sub", graph.node("MatMulInteger", q, values_t), shift, output="acc")

    v = graph.node("Mul", graph.node("Cast", acc, to=TensorProto.FLOAT), scale)
    v = graph.node("Mul", v, graph.constant("weight_scale", weight.scale.detach().float().cpu().numpy()[None, :]))
    if layer.bias is not None:
        v = graph.node("Add", v, graph.constant("bias", layer.bias.detach().float().cpu().numpy()[None, :]))
    v = ACTIVATIONS[layer.activation](graph, v)
    graph.node("Where", broken, graph.constant("nan", np.nan), v, output="y")
    return _model(graph, k, n)


def _quantize(graph: Graph, x: str, amax: int, zero: str, last_axis: str) -> tuple[str, str, str]:
    """Quantizes every row of x: the names of q uint8 [m, k], scale and zero point, both float32 [m, 1]."""
    half_amax = graph.constant("half_amax", amax / 2)
    high_q = graph.constant("amax", amax)
    one_half = graph.constant("one_half", 0.5)
    low = graph.node("Min", graph.node("ReduceMin", x, last_axis, keepdims=1), zero)
    high = graph.node("Max", graph.node("ReduceMax", x, last_axis, keepdims=1), zero)
    # Halved before the subtraction: high - low overflows for rows that span the whole range of float32.
    half = graph.node("Sub", graph.node("Mul", high, one_half), graph.node("Mul", low, one_half))
    flat = graph.node("Less", half, graph.constant("smallest_half", 2.0**-100))
    divisor = graph.node("Where", flat, graph.constant("one", 1.0), half)
    scale = graph.node("Where", flat, zero, graph.node("Div", half, half_amax))
    inverse = graph.node("Where", flat, zero, graph.node("Div", half_amax, divisor))
    zero_point = graph.node("Round", graph.node("Mul", graph.node("Neg", low), inverse))
    zero_point = graph.node("Clip", zero_point, zero, high_q)
    q = graph.node("Add", graph.node("Round", graph.node("Mul", x, inverse)), zero_point)
    q = graph.node("Cast", graph.node("Clip", q, zero, high_q), to=TensorProto.UINT8, output="q")
    return q, scale, zero_point


def _relu(graph: Graph, v: str) -> str:
    return graph.node("Relu", v)


def _gelu(graph: Graph, v: str) -> str:
    """0.5 v (1 + erf(v / sqrt 2))"""
    erf = graph.node("Erf", graph.node("Mul", v, graph.constant("sqrt_half", 0.5**0.5)))
    half_v = graph.node("Mul", v, graph.constant("gelu_half", 0.5))
    return graph.node("Mul", half_v, graph.node("Add", erf, graph.constant("gelu_one", 1.0)))


def _gelu_tanh(graph: Graph, v: str) -> str:
    """0.5 v (1 + tanh u) = v sigmoid(2u), u = sqrt(2 / pi) (v + 0.044715 v^3)"""
    cube = graph.node("Mul", graph.node("Mul", v, v), v)
    inner = graph.node("Add", v, graph.node("Mul", cube, graph.constant("cube_factor", 0.044715)))
    return _times_sigmoid(graph, v, graph.node("Mul", inner, graph.constant("twice_sqrt", 2 * (2 / np.pi) ** 0.5)))


def _silu(graph: Graph, v: str) -> str:
    return _times_sigmoid(graph, v, v)


def _times_sigmoid(graph: Graph, v: str, s: str) -> str:
    """v sigmoid(s) = v / (1 + exp(-s)). ONNX Runtime's Sigmoid stops at 1e-8, this goes on to 0."""
    exp = graph.node("Exp", graph.node("Neg", s))
    return graph.node("Div", v, graph.node("Add", exp, graph.constant("sigmoid_one", 1.0)))


def _model(graph: Graph, k: int, n: int) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    outputs = [
        value("y", TensorProto.FLOAT, ["m", n]),
        value("q", TensorProto.UINT8, ["m", k]),
        value("acc", TensorProto.INT32, ["m", n]),
    ]
    x = value("x", TensorProto.FLOAT, ["m", k])
    proto = helper.make_graph(graph.nodes, "int8_linear", [x], outputs, graph.initializers)
    opset = helper.make_opsetid("", OPSET)
    # The oldest file version that holds this opset, so that older runtimes read it too.
    ir_version = helper.find_min_ir_version_for([opset])
    return helper.make_model(proto, opset_imports=[opset], ir_version=ir_version, producer_name="pycompress")


LOWERINGS: dict[type[nn.Module], Callable[[Any], onnx.ModelProto]] = {Int8Linear: lower_int8_linear}
ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    "none": lambda _graph, v: v,
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
}


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Opens a model in ONNX Runtime on the CPU, set for exact integers.

    On x86 without VNNI the u8 * s8 product of ONNX Runtime saturates unless x64quantprecision is set, and
    that entry is obeyed by a graph transformation that runs from ORT_ENABLE_EXTENDED on: with less
    optimisation the integers are wrong. One thread and no spinning, so that no idle worker takes a core
    from what runs next.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
