"""Activations as the modules that kernels take in, directly behind their layers.

Files before opset 20 have no Gelu, and none before 24 has a Swish: these write them as products and sums. And some write a layer on
rows, as a matrix, with the activation behind the reshape that makes sequences of them again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pycompress.onnx.operators.arithmetic import divide, power
from pycompress.onnx.operators.shapes import reshape

Call = Callable[[fx.Node, nn.Module], fx.Node]


def simplify(graph: fx.Graph, buffers: Mapping[str, Tensor], call: Call) -> None:
    """Puts a module in the place of the last node of each activation, which ``call`` adds with the arguments of a node.

    Args:
        buffers: the constants by name.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not operator.mul:
            continue
        for read in (_gelu, _gelu_tanh, _silu):
            if (found := read(_Reader(buffers), node)) is not None:
                layer, x = found
                with graph.inserting_after(node):
                    fresh = call(node, layer)
                fresh.args, fresh.meta = (x,), dict(node.meta)
                node.replace_all_uses_with(fresh)
                break


def put_before_reshapes(graph: fx.Graph, layers: Mapping[str, nn.Module]) -> None:
    """Has an activation behind the reshape of what a linear layer gives come before it: it takes each number on its own."""
    for node in list(graph.nodes):
        if node.op != "call_module" or not isinstance(layers[node.target], nn.ReLU | nn.GELU | nn.SiLU):
            continue
        moved = node.args[0]
        before = moved.args[0] if _is(moved, reshape) and len(moved.users) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        if isinstance(layers[str(before.target)], nn.Linear):
            node.replace_all_uses_with(moved)
            node.args = (before,)
            moved.replace_input_with(before, node)
            moved.prepend(node)


class _Reader:
    """Reads an expression of nodes."""

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        self._buffers = buffers

    def number(self, value: Any) -> float | None:
        """A constant of one number."""
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, fx.Node) and value.op == "get_attr":
            held = self._buffers[str(value.target)]
            return float(held.reshape(())) if held.numel() == 1 else None
        return None

    def factors(self, node: Any, deep: int = 6) -> tuple[float, list[fx.Node]]:
        """(product of the numbers, the other factors) of a product of products and quotients, so deep that an activation fits."""
        if (number := self.number(node)) is not None:
            return number, []
        if not deep:
            return 1.0, [node]
        if _is(node, operator.mul):
            parts = [self.factors(one, deep - 1) for one in node.args]
            return parts[0][0] * parts[1][0], parts[0][1] + parts[1][1]
        if _is(node, divide) and (by := self.number(node.args[1])):
            number, others = self.factors(node.args[0], deep - 1)
            return number / by, others
        return 1.0, [node]

    def plus_one(self, node: Any) -> Any:
        """What stands beside 1 in a sum."""
        if not _is(node, operator.add):
            return None
        a, b = node.args
        return a if self.number(b) == 1 else b if self.number(a) == 1 else None


def _is(node: Any, *functions: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in functions


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5)  # as files write constants, with six digits or more


def _two(reader: _Reader, node: fx.Node, factor: float) -> tuple[fx.Node, fx.Node] | None:
    """The two factors beside this number, in both orders one after the other."""
    number, others = reader.factors(node)
    return (others[0], others[1]) if _near(number, factor) and len(others) == 2 else None


def _gelu(reader: _Reader, node: fx.Node) -> tuple[nn.Module, fx.Node] | None:
    """0.5 x (1 + erf(x / sqrt(2)))"""
    pair = _two(reader, node, 0.5)
    for x, sum_ in (pair, pair[::-1]) if pair else ():
        erf = reader.plus_one(sum_)
        if _is(erf, torch.erf):
            number, others = reader.factors(erf.args[0])
            if _near(number, math.sqrt(0.5)) and others == [x]:
                return nn.GELU(), x
    return None


def _gelu_tanh(reader: _Reader, node: fx.Node) -> tuple[nn.Module, fx.Node] | None:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))"""
    pair = _two(reader, node, 0.5)
    for x, sum_ in (pair, pair[::-1]) if pair else ():
        tanh = reader.plus_one(sum_)
        if not _is(tanh, torch.tanh):
            continue
        number, others = reader.factors(tanh.args[0])
        if _near(number, math.sqrt(2 / math.pi)) and _is_cubic(reader, others, x):
            return nn.GELU("tanh"), x
    return None


def _is_cubic(reader: _Reader, factors: list[fx.Node], x: fx.Node) -> bool:
    """x + 0.044715 x^3, or x (1 + 0.044715 x^2)"""
    if len(factors) == 2 and x in factors:
        sum_ = factors[1] if factors[0] is x else factors[0]
        return _is_power(reader, reader.plus_one(sum_), x, 2)
    if len(factors) != 1 or not _is(factors[0], operator.add):
        return False
    a, b = factors[0].args
    return (a is x and _is_power(reader, b, x, 3)) or (b is x and _is_power(reader, a, x, 3))


def _is_power(reader: _Reader, node: Any, x: fx.Node, exponent: int) -> bool:
    """0.044715 x^exponent"""
    if node is None:
        return False
    number, others = reader.factors(node)
    degree = 0.0
    for one in others:
        raised = reader.number(one.args[1]) if _is(one, power) and one.args[0] is x else None
        degree += 1 if one is x else raised if raised is not None else math.nan
    return _near(number, 0.044715) and degree == exponent


def _silu(reader: _Reader, node: fx.Node) -> tuple[nn.Module, fx.Node] | None:
    """x sigmoid(x)"""
    pair = _two(reader, node, 1.0)
    for x, gate in (pair, pair[::-1]) if pair else ():
        if _is(gate, torch.sigmoid) and gate.args == (x,):
            return nn.SiLU(), x
    return None
