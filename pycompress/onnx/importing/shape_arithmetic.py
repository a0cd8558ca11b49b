"""Nodes that compute with shapes, as arithmetic on Python's integers (:mod:`pycompress.onnx.operators.sizes`)."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pycompress.onnx.importing.reading import DTYPES
from pycompress.onnx.importing.values import Constant, Size, Value
from pycompress.onnx.operators import sizes

if TYPE_CHECKING:
    from pycompress.onnx.importing.importer import Importer, Node

_MANY = 64  # numbers of a constant that may be sizes


def taken(at: Importer, node: Node) -> bool:
    """Takes a node if all that it computes with are shapes, sizes of them and whole numbers."""
    if node.operator in ("Shape", "Size") and not isinstance(node.inputs[0], Constant):
        node.give(_shape(at, node) if node.operator == "Shape" else Size(_numel(at, node), scalar=True))
        return True
    if not any(isinstance(one, Size) for one in node.inputs):
        return False
    operands = [_sizes(one) for one in node.inputs]
    if any(one is None for one in operands):
        return False
    known = [one for one in operands if one is not None]
    found = _computed(at, node, known)
    if found is not None:
        node.give(replace(found, dtype=_dtype(node, known)))
    return found is not None


def _dtype(node: Node, operands: list[Size]) -> torch.dtype:
    if node.operator == "Cast":
        return DTYPES[node.attributes["to"]]
    if node.operator in ("Equal", "Greater", "Less"):
        return torch.bool
    return operands[1 if node.operator == "Where" else 0].dtype


def _sizes(value: Value | None) -> Size | None:
    """A value as sizes, where it is nothing but a few whole numbers."""
    if isinstance(value, Size):
        return value
    if not isinstance(value, Constant) or value.tensor.dim() > 1 or value.tensor.numel() > _MANY:
        return None
    if value.tensor.dtype not in (torch.int64, torch.int32, torch.bool):
        return None
    found = value.tensor.tolist()
    several = isinstance(found, list)
    return Size(tuple(found) if several else found, not several, value.tensor.dtype)


def _shape(at: Importer, node: Node) -> Size:
    """Where the rank is known, number by number."""
    (x,) = node.inputs
    start, end, rank = node.attributes.get("start", 0), node.attributes.get("end"), at.rank(x)
    shape = at.call(getattr, at.argument(x), "shape")
    if rank is None:
        whole = start == 0 and end is None
        return Size(shape if whole else at.call(operator.getitem, shape, slice(start, end)), scalar=False)
    return Size(tuple(at.call(operator.getitem, shape, i) for i in range(rank)[start:end]), scalar=False)


def _numel(at: Importer, node: Node) -> Any:
    return at.call(sizes.product, at.call(getattr, at.argument(node.inputs[0]), "shape"))


def _computed(at: Importer, node: Node, operands: list[Size]) -> Size | None:
    """None where it is none that is known of sizes."""
    x, rest, said = operands[0], operands[1:], node.attributes
    axis = said.get("axis", 0)
    match node.operator:
        case "Cast" if DTYPES.get(said["to"]) in (torch.int32, torch.int64):
            return x
        case "Concat" if axis in (0, -1) and not any(one.scalar for one in operands):
            known = [one.parts for one in operands]
            if None not in known:
                return Size(tuple(part for parts in known if parts is not None for part in parts), scalar=False)
            return Size(at.call(sizes.joined, *(one.value for one in operands)), scalar=False)
        case "Gather" if axis in (0, -1) and not x.scalar:
            return _gathered(at, x, rest[0])
        case "Slice" if all(_literal(one) for one in rest):
            return _sliced(at, x, [list(one.value) for one in rest])
        case "Slice" if not rest:  # starts and ends are attributes
            return _sliced(at, x, [said["starts"], said["ends"], said.get("axes", [0])])
        case "Squeeze" if not x.scalar:
            one = x.parts[0] if x.parts is not None and len(x.parts) == 1 else at.call(sizes.as_one, x.value)
            return Size(one, scalar=True)
        case "Unsqueeze" if x.scalar:
            return Size((x.value,), scalar=False)
        case "Reshape" if _literal(rest[0]) and not rest[0].scalar and len(rest[0].value) <= 1:
            if x.scalar:
                return Size((x.value,), scalar=False) if rest[0].value else x
            return x if rest[0].value else Size(at.call(sizes.as_one, x.value), scalar=True)
        case "ReduceProd" if not x.scalar:
            product = at.call(sizes.product, x.value)
            return Size((product,), scalar=False) if said.get("keepdims", 1) else Size(product, scalar=True)
        case name if name in sizes.ARITHMETIC:
            return _each(at, name, operands)
    return None


def _literal(size: Size) -> bool:
    return all(isinstance(one, int) for one in size.parts or (None,))


def _gathered(at: Importer, x: Size, indices: Size) -> Size | None:
    """Chosen numbers; the places must be known."""
    if not _literal(indices):
        return None
    parts, chosen = x.parts, indices.parts or ()
    found = tuple(at.call(operator.getitem, x.value, i) if parts is None else parts[i] for i in chosen)
    return Size(found[0], scalar=True) if indices.scalar else Size(found, scalar=False)


def _sliced(at: Importer, x: Size, bounds: list[list[int]]) -> Size:
    starts, ends, axes, steps = (*bounds, [0], [1])[:4] if len(bounds) < 3 else (*bounds, [1])[:4]
    if not len(starts) == len(ends) == len(steps) == 1 or axes not in ([0], [-1]):
        raise ValueError(f"sizes are cut at {bounds}, expected one dimension")
    cut = slice(starts[0], ends[0] if steps[0] > 0 or ends[0] > -_MANY else None, steps[0])
    if x.parts is not None:
        return Size(x.parts[cut], scalar=False)
    return Size(at.call(operator.getitem, x.value, cut), scalar=False)


def _each(at: Importer, name: str, operands: list[Size]) -> Size:
    """Number by number, where they are known; at once what is all numbers."""
    function, scalar = sizes.ARITHMETIC[name], all(one.scalar for one in operands)
    if all(_literal(one) for one in operands):
        return Size(function(*(one.value for one in operands)), scalar=scalar)
    known = [one.parts for one in operands]
    if scalar or None in known:
        return Size(at.call(function, *(one.value for one in operands)), scalar=scalar)
    length = max(len(parts) for parts in known if parts is not None)
    rows = [parts * length if len(parts) == 1 else parts for parts in known if parts is not None]
    found = []
    for column in zip(*rows, strict=True):
        numbers = all(isinstance(one, int) for one in column)
        found.append(function(*column) if numbers else at.call(function, *column))
    return Size(tuple(found), scalar=False)
