"""LSTM, GRU and RNN nodes with constant weights as ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``.

ONNX has the rows of the weights in another order: those of an LSTM for the gates i, o, f, c where torch has i, f, c, o; those of
a GRU z, r, h where torch has r, z, h.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from pycompress.onnx.importing.values import Constant, Value
from pycompress.onnx.operators.shapes import by_directions

if TYPE_CHECKING:
    from pycompress.onnx.importing.importer import Importer, Node

_GATES = {"LSTM": [0, 2, 3, 1], "GRU": [1, 0, 2], "RNN": [0]}
_CLASSES: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
_ACTIVATIONS = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"]}
OPERATORS = tuple(_GATES)


def recurrent(at: Importer, node: Node) -> None:
    """Raises NotImplementedError for what torch's layers cannot do."""
    x, w, r, b, lengths, h, c, peepholes = (*node.inputs, *[None] * 8)[:8]
    said = node.attributes
    layer = _layer(node.operator, said, w, r, b)
    if lengths is not None and not _all_alike(
        lengths, at.known_size(node.input_names[0], int(bool(said.get("layout", 0))))
    ):
        raise NotImplementedError("its sequence_lens are not the whole length")
    if peepholes is not None and not _zeros(peepholes):
        raise NotImplementedError("it has peepholes")
    batch_first = bool(said.get("layout", 0))
    turned = said.get("direction") == "reverse"
    directions = 2 if layer.bidirectional else 1
    sequence = at.argument(x)
    if batch_first:
        sequence = at.call(torch.transpose, sequence, 0, 1, rank=3)
    if turned:
        sequence = at.call(torch.flip, sequence, [0], rank=3)
    states = [one for one in ((h, c) if node.operator == "LSTM" else (h,)) if one is not None and not _zeros(one)]
    arguments: list[Any] = [sequence]
    if states:
        given: list[Any] = [h, c] if node.operator == "LSTM" else [h]
        if None in given:
            raise NotImplementedError("it has one initial state of two")
        nodes = [at.argument(one) for one in given]
        if batch_first:
            nodes = [at.call(torch.transpose, one, 0, 1, rank=3) for one in nodes]
        arguments.append(tuple(nodes) if node.operator == "LSTM" else nodes[0])
    called = at.call_layer(node, layer, w, *arguments, rank=None)
    y = at.call(operator.getitem, called, 0, rank=3)
    if turned:
        y = at.call(torch.flip, y, [0], rank=3)
    y = at.call(by_directions, y, directions, rank=4)
    last = at.call(operator.getitem, called, 1, rank=3)
    ends: list[fx.Node] = [last]
    if node.operator == "LSTM":
        ends = [at.call(operator.getitem, last, i, rank=3) for i in (0, 1)]
    if batch_first:
        y = at.call(torch.permute, y, [2, 0, 1, 3], rank=4)
        ends = [at.call(torch.transpose, one, 0, 1, rank=3) for one in ends]
    node.give(y, *ends)


def _layer(kind: str, said: dict[str, Any], w: Value | None, r: Value | None, b: Value | None) -> Any:
    """The layer, with its weights."""
    tensors = [one.tensor if isinstance(one, Constant) else None for one in (w, r, b)]
    if tensors[0] is None or tensors[1] is None or (b is not None and tensors[2] is None):
        raise NotImplementedError("its weights are not constant")
    gates = _GATES[kind]
    directions, rows, k = tensors[0].shape
    hidden = rows // len(gates)
    shapes = [tuple(one.shape) for one in tensors if one is not None]
    expected = [(directions, rows, k), (directions, rows, hidden), (directions, 2 * rows)][: len(shapes)]
    two = said.get("direction") == "bidirectional"
    if (
        shapes != expected
        or rows % len(gates)
        or directions != 1 + two
        or said.get("hidden_size", hidden) != hidden
        or not hidden
    ):
        raise ValueError(
            f"its weights are {shapes} with hidden_size {said.get('hidden_size')} and direction {said.get('direction')}"
        )
    own = [name.lower() for name in said.get("activations", _ACTIVATIONS.get(kind, ["tanh"]) * directions)]
    if kind == "RNN" and own in (["relu"] * directions, ["tanh"] * directions):
        extra = {"nonlinearity": own[0]}
    elif own == _ACTIVATIONS.get(kind, []) * directions:
        extra = {}
    else:
        raise NotImplementedError(f"its activations are {own}")
    if said.get("clip") or said.get("input_forget"):
        raise NotImplementedError("it clips its cell, or couples input and forget gate")
    if kind == "GRU" and not said.get("linear_before_reset"):
        raise NotImplementedError("linear_before_reset is 0, which nn.GRU cannot do")
    layer = _CLASSES[kind](k, hidden, bias=b is not None, bidirectional=directions == 2, **extra)
    for i, suffix in enumerate(("", "_reverse")[:directions]):
        parts = {"weight_ih_l0": tensors[0][i], "weight_hh_l0": tensors[1][i]}
        if tensors[2] is not None:
            parts |= dict(zip(("bias_ih_l0", "bias_hh_l0"), tensors[2][i].chunk(2), strict=True))
        for name, tensor in parts.items():
            ordered = torch.cat([tensor.chunk(len(gates))[gate] for gate in gates])
            setattr(layer, name + suffix, nn.Parameter(ordered))
    return layer


def _zeros(value: Value) -> bool:
    return isinstance(value, Constant) and not value.tensor.any()


def _all_alike(lengths: Value, length: int | None) -> bool:
    """Whether the lengths say nothing: all are that of the sequence."""
    return isinstance(lengths, Constant) and length is not None and bool((lengths.tensor == length).all())
