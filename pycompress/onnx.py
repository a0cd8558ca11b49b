"""Lower one compressed layer to ONNX: standard operators only, so that any ONNX runtime can run or check it.

The operators are specified at https://onnx.ai/onnx/operators/ (for each the newest version up to OPSET): Mul,
Add, Sub, Div, Neg, Min, Max, Less, Where, IsNaN, Round, Clip, Cast, ReduceMin, ReduceMax, ReduceSum, MatMul,
MatMulInteger, Conv and Identity; for the activations Relu, Erf and Exp. ONNX has no sparse product, so sparse weights
are lowered with their zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pycompress.methods.int8 import Int8Weight
from pycompress.methods.sparse import SparseWeight
from pycompress.nn.int8 import Int8Linear
from pycompress.nn.linear import CompressedLinear
from pycompress.nn.sparse import SparseLinear
from pycompress.nn.sparse_conv import SparseConv2d

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


def lower_int8_linear(layer: Int8Linear | SparseLinear) -> onnx.ModelProto:
    """Lowers an Int8Linear, or a SparseLinear with int8 weights, with in_features k and out_features n.

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
    values, weight_scale, amax = integers(weight)
    _check_size(values)
    n, k = values.shape
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
    v = graph.node("Mul", v, graph.constant("weight_scale", weight_scale[None, :]))
    v = _bias_and_activation(graph, v, layer)
    graph.node("Where", broken, graph.constant("nan", np.nan), v, output="y")
    return _model(graph, "int8_linear", k, n, integer_outputs=True)


def integers(weight: Int8Weight | SparseWeight) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], int]:
    """The int8 values [n, k] of a canonical weight, zeros and all; its scale, float32 [n]; and the largest activation."""
    scale, bits = weight.scale, weight.activation_bits
    assert scale is not None
    assert bits is not None
    values = replace(weight, scale=torch.ones_like(scale)).decompress()
    return values.detach().cpu().numpy().astype(np.int8), scale.detach().float().cpu().numpy(), 2**bits - 1


def lower_sparse_linear(layer: SparseLinear) -> onnx.ModelProto:
    """Lowers a SparseLinear: with int8 weights as :func:`lower_int8_linear` does, with float32 weights to MatMul.

    For these the input is x, float32 [m, k], for any m, and the output y, float32 [m, n]. The weight is stored
    with its zeros, float32 [k, n], and the runtime adds up the products in an order of its own, so y is the
    layer's up to rounding. It multiplies the zeros too: where a row of x holds NaN or Inf, the whole row of y
    is NaN or Inf, and the layer's only in those columns that have a weight for it.
    """
    if layer.bits == 8:
        return lower_int8_linear(layer)
    dense = layer.canonical().decompress().numpy()
    _check_size(dense)
    n, k = dense.shape
    graph = Graph()
    v = graph.node("MatMul", "x", graph.constant("weight", dense.T))
    graph.node("Identity", _bias_and_activation(graph, v, layer), output="y")
    return _model(graph, "sparse_linear", k, n, integer_outputs=False)


def lower_sparse_conv2d(layer: SparseConv2d) -> onnx.ModelProto:
    """Lowers a SparseConv2d to Conv, which adds the bias as well.

    The input is x, float32 [images, in_channels, height, width], for any images, height and width, and the output y,
    float32 [images, out_channels, its height, its width]. The weight is stored with its zeros. For rounding, and for
    NaN and Inf, what :func:`lower_sparse_linear` says of a row holds for the inputs of an output.
    """
    geometry, dense = layer.geometry, layer.weight.numpy()
    _check_size(dense)
    graph = Graph()
    top, bottom, left, right = geometry.sides
    bias = [] if layer.bias is None else [graph.constant("bias", layer.bias.detach().float().cpu().numpy())]
    v = graph.node(
        "Conv", "x", graph.constant("weight", dense), *bias, kernel_shape=geometry.kernel_size, strides=geometry.stride,
        pads=[top, left, bottom, right], dilations=geometry.dilation,
    )  # fmt: skip
    graph.node("Identity", ACTIVATIONS[layer.activation](graph, v), output="y")
    value = helper.make_tensor_value_info
    x = value("x", TensorProto.FLOAT, ["images", layer.in_channels, "height", "width"])
    y = value("y", TensorProto.FLOAT, ["images", layer.out_channels, "out_height", "out_width"])
    return _model_of(graph, "sparse_conv2d", x, [y])


def _check_size(values: npt.NDArray[Any]) -> None:
    if values.nbytes > MAX_WEIGHT_BYTES:
        raise ValueError(
            f"lower: the weight {list(values.shape)} has {values.nbytes} bytes, expected at most {MAX_WEIGHT_BYTES}"
        )


def _bias_and_activation(graph: Graph, v: str, layer: CompressedLinear) -> str:
    if layer.bias is not None:
        v = graph.node("Add", v, graph.constant("bias", layer.bias.detach().float().cpu().numpy()[None, :]))
    return ACTIVATIONS[layer.activation](graph, v)


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


def _model(graph: Graph, name: str, k: int, n: int, *, integer_outputs: bool) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    outputs = [value("y", TensorProto.FLOAT, ["m", n])]
    if integer_outputs:
        outputs += [value("q", TensorProto.UINT8, ["m", k]), value("acc", TensorProto.INT32, ["m", n])]
    return _model_of(graph, name, value("x", TensorProto.FLOAT, ["m", k]), outputs)


def _model_of(graph: Graph, name: str, x: onnx.ValueInfoProto, outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
    proto = helper.make_graph(graph.nodes, name, [x], outputs, graph.initializers)
    opset = helper.make_opsetid("", OPSET)
    # The oldest file version that holds this opset, so that older runtimes read it too.
    ir_version = helper.find_min_ir_version_for([opset])
    return helper.make_model(proto, opset_imports=[opset], ir_version=ir_version, producer_name="pycompress")


LOWERINGS: dict[type[nn.Module], Callable[[Any], onnx.ModelProto]] = {
    Int8Linear: lower_int8_linear,
    SparseLinear: lower_sparse_linear,
    SparseConv2d: lower_sparse_conv2d,
}
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
