"""Nodes with constant weights that become layers: real ones of ``torch.nn``, so that all of the package works on them.

Each function takes a node if it can, and leaves it to the table of operators if not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from pycompress.onnx.importing.values import Constant, Size, Value
from pycompress.onnx.operators.products import padded, same_padded
from pycompress.onnx.operators.shapes import reshape

if TYPE_CHECKING:
    from pycompress.onnx.importing.importer import Importer, Node

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_WITH_BIAS: Any = (nn.Linear, *_CONVOLUTIONS.values())
_BATCH_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _floats(value: Value | None, *dims: int) -> Tensor | None:
    """A constant of floats with so many dimensions and some numbers."""
    found = value.tensor if isinstance(value, Constant) else None
    if found is None or not torch.is_floating_point(found) or found.dim() not in dims or not found.numel():
        return None
    return found


def _node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


def _bias(value: Value | None, n: int) -> Tensor | None:
    """A constant [n], or [1, n]."""
    found = _floats(value, 1, 2)
    return found.reshape(n) if found is not None and found.shape[-1] == n == found.numel() else None


# --- products -----------------------------------------------------------------------------------------------------------


def _linear(at: Importer, node: Node, weight: Tensor, bias: Tensor | None) -> None:
    """Takes the node as a layer with this weight [n, k]."""
    x, source, *_ = node.inputs
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    layer.weight = at.parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    node.give(at.call_layer(node, layer, source, at.argument(x), rank=at.rank(x)))


def matmul(at: Importer, node: Node) -> bool:
    """x [..., k] . w [k, n]"""
    weight = _floats(node.inputs[1], 2)
    if weight is None:
        return False
    _linear(at, node, weight.T, None)
    return True


def gemm(at: Importer, node: Node) -> bool:
    """Factors go into weight and bias, where they are not 1."""
    _, w, c = (*node.inputs, None)[:3]
    weight = _floats(w, 2)
    if weight is None or node.attributes.get("transA"):
        return False
    alpha, beta = node.attributes.get("alpha", 1.0), node.attributes.get("beta", 1.0)
    weight = weight if node.attributes.get("transB") else weight.T
    bias = _bias(c, len(weight))
    if c is not None and bias is None:
        return False
    _linear(at, node, weight if alpha == 1 else weight * alpha, bias if bias is None or beta == 1 else bias * beta)
    return True


def add(at: Importer, node: Node) -> bool:
    """A constant that is added to what a layer without a bias gives, and nothing else takes, is its bias. TensorFlow writes a layer
    of sequences as one of rows, and adds behind the reshape."""
    for x, constant in zip(node.inputs, reversed(node.inputs), strict=True):
        layer: Any = at.layer_of(x) or _reshaped(at, x)
        if not isinstance(layer, _WITH_BIAS) or layer.bias is not None or at.uses(_node(x)) > 1:
            continue
        n, image = layer.weight.shape[0], layer.weight.dim() - 2  # dimensions behind the channels
        bias = _floats(constant, image + 1, image + 2) if image else _floats(constant, 1)
        if bias is not None and bias.numel() == n == bias.shape[-image - 1] and bias.dtype == layer.weight.dtype:
            layer.bias = nn.Parameter(bias.reshape(n).clone())
            node.give(x)
            return True
    return False


def _reshaped(at: Importer, x: Value | None) -> nn.Linear | None:
    """The linear layer whose features, all of them, a reshape keeps as its last dimension, if nothing else takes what it gives."""
    if not isinstance(x, fx.Node) or x.target is not reshape or at.uses(_node(x.args[0])) > 1:
        return None
    layer, sizes = at.layer_of(x.args[0]), x.args[1]
    known = isinstance(layer, nn.Linear) and isinstance(sizes, list | tuple) and len(sizes) > 0
    return layer if known and sizes[-1] == layer.out_features else None  # type: ignore[index, return-value, union-attr]


def conv(at: Importer, node: Node) -> bool:
    """Pads that are not alike on both sides, and not those of ``same``, are put around the image before."""
    x, w, b = (*node.inputs, None)[:3]
    weight = _floats(w, 3, 4, 5)
    bias = None if b is None or weight is None else _bias(b, len(weight))
    if weight is None or (b is not None and bias is None):
        return False
    kernel, n = list(weight.shape[2:]), weight.dim() - 2
    said = node.attributes
    stride, dilation, groups = said.get("strides", [1] * n), said.get("dilations", [1] * n), said.get("group", 1)
    if said.get("kernel_shape", kernel) != kernel or groups < 1 or len(weight) % groups:
        raise ValueError(
            f"kernel_shape is {said.get('kernel_shape')} and group {groups}, the weight is {list(weight.shape)}"
        )
    before, behind = _pads(said, n)
    whole = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    same = [one // 2 for one in whole], [one - one // 2 for one in whole]
    auto, plain = said.get("auto_pad", "NOTSET"), all(one == 1 for one in stride)
    padding: Any = tuple(before)
    argument = at.argument(x)
    if auto in ("SAME_UPPER", "SAME_LOWER") and plain and (auto == "SAME_UPPER" or same[0] == same[1]):
        padding = tuple(same[0]) if same[0] == same[1] else "same"
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        kwargs = {"kernel_shape": kernel, "strides": stride, "dilations": dilation, "auto_pad": auto}
        argument, padding = at.call(same_padded, argument, rank=weight.dim(), **kwargs), (0,) * n
    elif auto == "VALID":
        padding = (0,) * n
    elif before != behind or min(before) < 0:
        if plain and (before, behind) == same:
            padding = "same"
        else:
            argument, padding = at.call(padded, argument, (before, behind), rank=weight.dim()), (0,) * n
    layer = _CONVOLUTIONS[n](
        weight.shape[1] * groups, len(weight), tuple(kernel), tuple(stride), padding, tuple(dilation), groups,
        bias=False, device="meta",
    )  # fmt: skip
    layer.weight = at.parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    node.give(at.call_layer(node, layer, w, argument, rank=weight.dim()))
    return True


def conv_transpose(at: Importer, node: Node) -> bool:
    """Where it says pads that are alike on both sides; others are left to the table."""
    x, w, b = (*node.inputs, None)[:3]
    said, weight = node.attributes, _floats(w, 3, 4, 5)
    if weight is None or said.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in said:
        return False
    n, groups = weight.dim() - 2, said.get("group", 1)
    stride, dilation, more = (
        said.get(name, [d] * n) for name, d in (("strides", 1), ("dilations", 1), ("output_padding", 0))
    )
    before, behind = _pads(said, n)
    bias = None if b is None else _bias(b, weight.shape[1] * groups)
    fits = all(rest < max(by, step) for rest, by, step in zip(more, stride, dilation, strict=True))
    if before != behind or min(before) < 0 or not fits or (b is not None and bias is None):
        return False
    layer = _TRANSPOSED[n](
        len(weight), weight.shape[1] * groups, tuple(weight.shape[2:]), tuple(stride), tuple(before), tuple(more), groups,
        bias=False, dilation=tuple(dilation), device="meta",
    )  # fmt: skip
    layer.weight = at.parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    node.give(at.call_layer(node, layer, w, at.argument(x), rank=weight.dim()))
    return True


def _pads(said: dict[str, Any], n: int) -> tuple[list[int], list[int]]:
    pads = said.get("pads", [0] * (2 * n))
    if len(pads) != 2 * n:
        raise ValueError(f"pads is {pads}, expected {2 * n} numbers")
    return pads[:n], pads[n:]


def gather(at: Importer, node: Node) -> bool:
    """Rows of a matrix, chosen by tokens. (An ``nn.Embedding`` takes none that count from behind.)"""
    table, indices = node.inputs
    weight = _floats(table, 2)
    if weight is None or isinstance(indices, Constant | Size) or node.attributes.get("axis", 0) not in (0, -2):
        return False
    rows, width = weight.shape
    layer = nn.Embedding(rows, width, device="meta", dtype=weight.dtype)
    layer.weight = at.parameter(weight)
    rank = at.rank(indices)
    node.give(at.call_layer(node, layer, table, at.argument(indices), rank=None if rank is None else rank + 1))
    return True


# --- norms and activations ----------------------------------------------------------------------------------------------


def batch_norm(at: Importer, node: Node) -> bool:
    """Where the rank of its input is known, as torch has a class for each."""
    x, *tensors = node.inputs
    said, kind = node.attributes, _BATCH_NORMS.get(at.rank(x) or 0)
    found = [_floats(one, 1) for one in tensors]
    if kind is None or said.get("training_mode") or not said.get("spatial", 1) or any(one is None for one in found):
        return False
    scale, bias, mean, var = found
    assert scale is not None
    assert bias is not None
    assert mean is not None
    assert var is not None
    layer = kind(len(scale), eps=said.get("epsilon", 1e-5), momentum=1 - said.get("momentum", 0.9))
    layer.weight, layer.bias = nn.Parameter(scale.clone()), nn.Parameter(bias.clone())
    layer.running_mean, layer.running_var = mean.clone(), var.clone()
    node.give(at.call_layer(node, layer, tensors[0], at.argument(x), rank=at.rank(x)))
    return True


def layer_norm(at: Importer, node: Node) -> bool:
    """Over all dimensions that its scale has."""
    x, scale, bias = (*node.inputs, None)[:3]
    said, rank = node.attributes, at.rank(x)
    gain, shift = _floats(scale, 1, 2, 3), None if bias is None else _floats(bias, 1, 2, 3)
    axis = said.get("axis", -1)
    if gain is None or (bias is not None and (shift is None or shift.shape != gain.shape)):
        return False
    if (axis >= 0 and rank is None) or gain.dim() != (-axis if axis < 0 else (rank or 0) - axis):
        return False
    layer = nn.LayerNorm(
        tuple(gain.shape), eps=said.get("epsilon", 1e-5), bias=shift is not None, device="meta", dtype=gain.dtype
    )
    layer.weight = nn.Parameter(gain.clone())
    if shift is not None:
        layer.bias = nn.Parameter(shift.clone())
    node.give(at.call_layer(node, layer, scale, at.argument(x), rank=rank))
    return True


def relu(at: Importer, node: Node) -> bool:
    node.give(at.call_layer(node, nn.ReLU(), None, at.argument(node.inputs[0]), rank=at.rank(node.inputs[0])))
    return True


def gelu(at: Importer, node: Node) -> bool:
    layer = nn.GELU(node.attributes.get("approximate", "none"))
    node.give(at.call_layer(node, layer, None, at.argument(node.inputs[0]), rank=at.rank(node.inputs[0])))
    return True


def swish(at: Importer, node: Node) -> bool:
    if node.attributes.get("alpha", 1.0) != 1:
        return False
    node.give(at.call_layer(node, nn.SiLU(), None, at.argument(node.inputs[0]), rank=at.rank(node.inputs[0])))
    return True


LAYERS: dict[str, Callable[[Importer, Node], bool]] = {
    "Add": add, "BatchNormalization": batch_norm, "Conv": conv, "ConvTranspose": conv_transpose, "Gather": gather, "Gelu": gelu,
    "Gemm": gemm, "LayerNormalization": layer_norm, "MatMul": matmul, "Relu": relu, "Swish": swish,
}  # fmt: skip
