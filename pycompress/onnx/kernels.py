"""Layers as custom ops of ONNX Runtime: our own kernels, in a library that any of its languages can load.

The domain is ``pycompress``, the library ``pycompress/_onnxruntime.so`` (``csrc/onnxruntime``). An op takes x float32 [..., k], the
tensors of the layer's canonical weight as constants, each under its own name, and gives y float32 [..., n]: the layer's to the bit.
"""

from __future__ import annotations

from typing import Any

from pycompress.nn.int4 import Int4Linear
from pycompress.nn.int8 import Int8Linear
from pycompress.nn.layer import CompressedLayer
from pycompress.nn.low_rank import LowRankLinear
from pycompress.nn.sparse import SparseLinear
from pycompress.onnx.graph import KERNELS_DOMAIN, Graph, Lowering, array
from pycompress.ops.cpu import native
from pycompress.ops.cpu.low_rank import FUSED as FUSED_RESIDUALS
from pycompress.weights import Weight

# The entry of a session's options that says in how many parts a layer is cut; else as many as the machine has threads.
THREADS = "pycompress.threads"
_LIBRARY = None if (_folder := native.folder()) is None else _folder / "_onnxruntime.so"
# The inputs of the ops, x and the bias among them, in their order.
_INPUTS = {
    "Int8Linear": ("x", "values", "scale", "bias", "input_scale", "input_zero_point"),
    "Int4Linear": ("x", "values", "scale", "bias", "zero_point"),
    "SparseLinear": ("x", "mask", "values", "scale", "bias"),
    "LowRankLinear": (
        "x", "down", "up", "down_scale", "up_scale", "bias", "residual_values", "residual_scale", "residual_zero_point",
        "residual_mask", "residual_weight",
    ),
}  # fmt: skip


def has_library() -> bool:
    """Whether this installation was built with it."""
    return _LIBRARY is not None and _LIBRARY.is_file()


def library() -> str:
    """The path of the library of custom ops, for ``RegisterCustomOpsLibrary`` of ONNX Runtime 1.18 or later, in any language.

    Raises:
        RuntimeError: this installation was built without native modules.
    """
    if not has_library():
        raise RuntimeError(
            "onnx.library: there is no _onnxruntime.so, expected pycompress to be built with its kernels"
        )
    return str(_LIBRARY)


def lower_int8_linear(graph: Graph, x: str, layer: Int8Linear) -> str:
    """x float32 [..., k] -> y float32 [..., n]."""
    weight = layer.canonical()
    return _node(graph, x, layer, "Int8Linear", weight, activation_bits=weight.activation_bits)


def lower_int4_linear(graph: Graph, x: str, layer: Int4Linear) -> str:
    """x float32 [..., k] -> y float32 [..., n]."""
    weight = layer.canonical()
    bits = weight.activation_bits
    return _node(graph, x, layer, "Int4Linear", weight, k=weight.k, group=weight.group, activation_bits=bits)


def lower_sparse_linear(graph: Graph, x: str, layer: SparseLinear) -> str:
    """x float32 [..., k] -> y float32 [..., n]."""
    weight = layer.canonical()
    bits = weight.activation_bits or 0
    return _node(graph, x, layer, "SparseLinear", weight, k=weight.k, activation_bits=bits)


def lower_low_rank_linear(graph: Graph, x: str, layer: LowRankLinear) -> str:
    """x float32 [..., k] -> y float32 [..., n]."""
    weight = layer.canonical()
    residual = weight.residual
    said: dict[str, Any] = {"activation_bits": weight.activation_bits or 0, "residual": ""}
    if residual is not None:
        said["residual"] = residual.name
        own = residual.settings()
        said |= {f"residual_{name}": own[name] for name in ("group",) if name in own}
        said |= {"residual_k": weight.shape[1], "residual_activation_bits": own.get("activation_bits", 0)}
    return _node(graph, x, layer, "LowRankLinear", weight, **said)


def _node(graph: Graph, x: str, layer: CompressedLayer, op: str, weight: Weight, **attributes: Any) -> str:
    parts = {name: graph.part(name, part) for name, part in weight.parts().items()}
    if layer.bias32 is not None:
        parts["bias"] = graph.constant("bias", array(layer.bias32))
    inputs = [{"x": x, **parts}.get(name, "") for name in _INPUTS[op]]
    while not inputs[-1]:
        inputs.pop()
    return graph.node(op, *inputs, domain=KERNELS_DOMAIN, activation=layer.activation, **attributes)


# By kind of layer and weight; what is not there is lowered as ever.
KERNELS: dict[tuple[str, str], Lowering] = {
    ("linear", "int8"): lower_int8_linear,
    ("linear", "int4"): lower_int4_linear,
    ("linear", "sparse"): lower_sparse_linear,
    ("linear", "low_rank"): lower_low_rank_linear,
}


def runs(layer: CompressedLayer) -> bool:
    """Whether there is an op for a layer: not where a residual beside its factors runs as an op of its own."""
    beside = layer.settings.get("residual", {"method": ""})["method"]
    return (layer.kind.name, layer.weight_type.name) in KERNELS and beside in FUSED_RESIDUALS
